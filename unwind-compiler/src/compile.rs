//! From ELF bytes to a table: the steps in order.

use std::borrow::Cow;

use windlass_schema::page::PAGE_SHIFT;
use windlass_schema::{BuildId, Record, Table};

use crate::chains::Step;
use crate::density::bound;
use crate::elf::{CompileError, Image, SectionKind};
use crate::encode::encode;
use crate::entries::{Cie, Entries, Fde};
use crate::fold::fits_dictionary;
use crate::go_functions::{GoFunction, functions};
use crate::placement::Placement;
use crate::report::{Report, SkipReason};
use crate::rows::{Interval, merge};
use crate::shapes::{FdeRows, Shapes};

/// Bytes of a section to an FDE, as compilers write them: 50 over a whole distribution.
const FDE_BYTES: usize = 48;
/// Chains to an FDE: five in C++ of a large library.
const CHAINS_PER_FDE: usize = 5;

/// A table and how it came about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// The table file; see [`windlass_schema::table`].
    pub table: Vec<u8>,
    /// What became of the image's call frame information.
    pub report: Report,
}

/// Compiles the call frame information of a 64-bit little-endian ELF image of x86-64 or aarch64: `.eh_frame`,
/// where that has nothing to say Go's function table, and where that has nothing to say `.debug_frame`. `build_id` is written into the table, not checked.
///
/// An image without call frame information gives an empty table, and whatever is malformed in it
/// is skipped and reported; only a file of another kind is an error. The table has passed [`Table::parse`]. Takes
/// memory in proportion to the sections: twice their size for compilers' output, about 40 times at worst.
pub fn compile(elf: &[u8], build_id: BuildId) -> Result<Compiled, CompileError> {
    let image = Image::parse(elf)?;
    let mut report = Report::default();
    let data: Vec<_> = image.frames.iter().map(|section| section.data()).collect();
    let (cies, mut fdes) = collect(&image, &data, &mut report);
    let go = functions(&image);
    if !go.is_empty() {
        report.go_functions = go.len() as u64;
        fdes.extend(go.iter().zip(0..).map(|(function, number)| Fde {
            start: function.start,
            length: (function.end - function.start) as u32,
            cie: GO_FUNCTION,
            offset: number,
            instructions: (0, 0),
        }));
        fdes.sort_by_key(|fde| fde.start);
    }
    let base = fdes.first().map_or(0, |first| first.start >> PAGE_SHIFT << PAGE_SHIFT);
    let mut placement = Placement::new(base, CHAINS_PER_FDE * fdes.len());
    let source = Source { cies: &cies, go: &go };
    place(&source, &fdes, &mut placement, &mut report);
    if placement.is_too_dense || !fits_dictionary(&placement.chains) {
        let bounded = bound(placement.all_rows());
        placement = Placement::new(base, bounded.len());
        placement.rows(&bounded);
    }
    report.count_rows(&placement);
    let table = encode(build_id, image.architecture, &placement);
    // A table that its readers refuse must not be handed on, kept and served. One pass, small against the rest.
    Table::parse(&table).map_err(CompileError::Table)?;
    Ok(Compiled { table, report })
}

/// What stands in the place of a CIE's number for a Go function, whose own is the offset.
const GO_FUNCTION: u32 = u32::MAX;

/// Where rows come from.
struct Source<'s, 'a> {
    cies: &'s [Cie<'a>],
    go: &'s [GoFunction],
}

impl Source<'_, '_> {
    /// The rows of an FDE or a Go function, and their rank: where both cover an address the one with the lower
    /// is right. `.debug_frame` of Go does not say where rbp is.
    fn rows(&self, fde: &Fde, report: &mut Report) -> (Vec<Step>, u8) {
        if fde.cie == GO_FUNCTION {
            return (self.go[fde.offset as usize].steps.clone(), 1);
        }
        let cie = &self.cies[fde.cie as usize];
        let rows = FdeRows::of(cie, fde);
        report.cfi_rows += rows.cfi_rows;
        if rows.is_malformed {
            report.skip(fde.skipped(SkipReason::Instructions));
        }
        let rank = match cie.kind {
            SectionKind::EhFrame => 0,
            SectionKind::DebugFrame => 2,
        };
        (rows.steps, rank)
    }
}

/// The FDEs of all sections, in the order of their addresses, and their CIEs.
fn collect<'a>(
    image: &Image<'_>,
    data: &'a [Option<Cow<'_, [u8]>>],
    report: &mut Report,
) -> (Vec<Cie<'a>>, Vec<Fde>) {
    let mut cies = Vec::new();
    let bytes: usize = data.iter().flatten().map(|data| data.len()).sum();
    let mut fdes = Vec::with_capacity(bytes / FDE_BYTES);
    for skipped in &image.skipped {
        report.skip(*skipped);
    }
    for (number, (section, data)) in image.frames.iter().zip(data).enumerate() {
        let Some(data) = data else {
            report.skip(section.skipped(SkipReason::Unreadable));
            continue;
        };
        report.eh_frame_bytes += data.len() as u64;
        let mut entries = Entries::new(image, number, data, &mut cies);
        entries.for_each(image, section.stated_bytes, |fde| match fde {
            Ok(fde) => fdes.push(fde),
            Err(skipped) => report.skip(skipped),
        });
    }
    report.fdes = fdes.len() as u64;
    // Stable: of FDEs at one address, the first of the first section comes first. Linkers leave long sorted runs.
    fdes.sort_by_key(|fde| fde.start);
    (cies, fdes)
}

/// Lays the rows of all FDEs out.
fn place(source: &Source<'_, '_>, fdes: &[Fde], placement: &mut Placement, report: &mut Report) {
    let mut shapes = Shapes::new(fdes.len());
    let mut covered_to = placement.base;
    let mut rest = fdes;
    while let Some(first) = rest.first() {
        let mut end = first.range().end;
        let mut len = 1;
        while let Some(next) = rest.get(len).filter(|next| next.start < end) {
            end = end.max(next.range().end);
            len += 1;
        }
        if covered_to < first.start {
            placement.end_coverage((covered_to - placement.base) as u32);
        }
        let (cluster, behind) = rest.split_at(len);
        match cluster {
            [only] => place_one(source, only, &mut shapes, placement, report),
            several => place_overlapping(source, several, placement, report),
        }
        report.code_bytes += end - first.start;
        covered_to = end;
        rest = behind;
    }
    placement.end_coverage((covered_to - placement.base) as u32);
}

fn place_one(
    source: &Source<'_, '_>,
    fde: &Fde,
    shapes: &mut Shapes,
    placement: &mut Placement,
    report: &mut Report,
) {
    let start = (fde.start - placement.base) as u32;
    if fde.cie != GO_FUNCTION
        && let Some((shape, links)) = shapes.of(source.cies, fde, &mut placement.chains)
    {
        links.iter().for_each(|link| placement.link(start, *link));
        report.cfi_rows += shape.cfi_rows;
        if shape.is_malformed {
            report.skip(fde.skipped(SkipReason::Instructions));
        }
        return;
    }
    let (steps, _) = source.rows(fde, report);
    placement.steps(start, &steps);
}

/// Lays out what several FDEs say of the same addresses.
fn place_overlapping(source: &Source<'_, '_>, fdes: &[Fde], placement: &mut Placement, report: &mut Report) {
    let mut intervals = Vec::new();
    for fde in fdes {
        let (steps, rank) = source.rows(fde, report);
        let ends = steps.iter().skip(1).map(|step| step.at).chain([fde.length]);
        intervals.extend(steps.iter().zip(ends).map(|(step, end)| Interval {
            start: fde.start + u64::from(step.at),
            end: fde.start + u64::from(end),
            rank,
            record: step.record,
        }));
    }
    let mut rows = merge(intervals);
    // Whether the coverage ends there is for what comes next to say.
    if rows.last().is_some_and(|last| last.record == Record::NO_CFI) {
        rows.pop();
    }
    placement.rows(&rows);
}
