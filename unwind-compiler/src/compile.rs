//! From ELF bytes to a table: the steps in order.

use windlass_schema::page::PAGE_SHIFT;
use windlass_schema::{BuildId, Record, Table};

use crate::chains::Chains;
use crate::density::bound;
use crate::elf::{CompileError, Image};
use crate::encode::encode;
use crate::entries::Entries;
use crate::fold::fits_dictionary;
use crate::go_functions::functions;
use crate::placement::Placement;
use crate::report::{Report, SkipReason};
use crate::rows::{Interval, merge};
use crate::shapes::{Links, ShapeNumber, Shapes};
use crate::stretch::Stretch;
use crate::uncovered::Uncovered;

/// Bytes of a section to an FDE, as compilers write them: 50 over a whole distribution.
const FDE_BYTES: usize = 48;
/// Places of chains to an FDE: less than three in C++ of a large library.
const PLACES_PER_FDE: usize = 3;

/// Rises when an image gets other rows than before, so that a service that keeps tables makes them again.
pub const REVISION: u8 = 8;

/// A table and how it came about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// The table file; see [`windlass_schema::table`].
    pub table: Vec<u8>,
    /// What became of the image's call frame information.
    pub report: Report,
}

/// Compiles the call frame information of a 64-bit little-endian ELF image of x86-64 or aarch64: `.eh_frame`,
/// where that has nothing to say Go's function table, and where that has nothing to say `.debug_frame`; and code that
/// none of them covers, as far as its instructions leave no doubt. `build_id` is written into the table, not checked.
///
/// An image without call frame information gives an empty table, and whatever is malformed in it
/// is skipped and reported; only a file of another kind is an error. The table has passed [`Table::parse`]. Takes
/// memory in proportion to the sections: twice their size for compilers' output, about 40 times at worst.
pub fn compile(elf: &[u8], build_id: BuildId) -> Result<Compiled, CompileError> {
    let image = Image::parse(elf)?;
    let mut report = Report::default();
    let Collected { functions, links, chains, uncovered } = collect(&image, &mut report);
    report.count_uncovered(&uncovered);
    let base = functions.first().map_or(0, |first| first.start >> PAGE_SHIFT << PAGE_SHIFT);
    let mut placement = Placement::new(chains, base, PLACES_PER_FDE * functions.len());
    place(&functions, &links, &mut placement, &mut report);
    if placement.is_too_dense || !fits_dictionary(&placement.chains) {
        let bounded = bound(placement.all_rows());
        placement = Placement::new(Chains::default(), base, bounded.len());
        placement.rows(&bounded);
    }
    report.count_rows(&placement);
    let table = encode(build_id, image.architecture, &placement);
    // A table that its readers refuse must not be handed on, kept and served. One pass, small against the rest.
    Table::parse(&table).map_err(CompileError::Table)?;
    Ok(Compiled { table, report })
}

/// What is known of code that nothing covers, as [`compile`] has it.
pub(crate) fn uncovered(image: &Image<'_>) -> Uncovered {
    collect(image, &mut Report::default()).uncovered
}

/// Code with rows from one source: an FDE, a stretch of Go functions, or one that is recognised.
#[derive(Clone, Copy, Debug)]
struct Function {
    start: u64,
    length: u32,
    shape: ShapeNumber,
}

impl Function {
    /// Of a stretch of this rank.
    fn of_stretch(stretch: &Stretch, rank: u8, shapes: &mut Shapes<'_>) -> Self {
        let shape = shapes.of_steps(&stretch.steps, rank);
        Self { start: stretch.start, length: (stretch.end - stretch.start) as u32, shape }
    }

    fn end(&self) -> u64 {
        self.start + u64::from(self.length)
    }
}

/// Rank of what Go's function table says, between that of `.eh_frame` and that of `.debug_frame`: the latter, of Go, does
/// not say where rbp is.
const GO_RANK: u8 = 1;
/// Rank of what is recognised, where there is nothing else.
const RECOGNISED_RANK: u8 = 3;

/// Code with rows.
struct Collected {
    /// In the order of their addresses.
    functions: Vec<Function>,
    /// Of their shapes.
    links: Links,
    chains: Chains,
    /// Part of `functions`.
    uncovered: Uncovered,
}

/// All functions, and the chains of their shapes.
fn collect(image: &Image<'_>, report: &mut Report) -> Collected {
    let go = functions(image);
    let data: Vec<_> = image.frames.iter().map(|section| section.data()).collect();
    let bytes: usize = data.iter().flatten().map(|data| data.len()).sum();
    let mut cies = Vec::new();
    let mut shapes = Shapes::new(bytes / FDE_BYTES);
    let mut all = Vec::with_capacity(bytes / FDE_BYTES);
    let mut trampolines = Vec::new();
    image.skipped.iter().for_each(|skipped| report.skip(*skipped));
    for (number, (section, data)) in image.frames.iter().zip(&data).enumerate() {
        let Some(data) = data else {
            report.skip(section.skipped(SkipReason::Unreadable));
            continue;
        };
        report.eh_frame_bytes += data.len() as u64;
        let mut entries = Entries::new(image, number, data, go.is_some(), &mut cies);
        entries.for_each(image, section.stated_bytes, |cies, fde| match fde {
            Ok(fde) => {
                let shape = shapes.of(cies, &fde);
                let facts = shapes.facts(shape);
                report.cfi_rows += u64::from(facts.cfi_rows);
                if facts.is_malformed {
                    report.skip(fde.skipped(SkipReason::Instructions));
                }
                let function = Function { start: fde.start, length: fde.length, shape };
                trampolines.extend(facts.is_trampoline.then(|| function.end()));
                all.push(function);
            }
            Err(skipped) => report.skip(skipped),
        });
    }
    report.fdes = all.len() as u64;
    if let Some(go) = go {
        report.count_go(&go);
        all.extend(go.stretches.iter().map(|stretch| Function::of_stretch(stretch, GO_RANK, &mut shapes)));
    }
    // Stable: of FDEs at one address, the first of the first section comes first. Linkers leave long sorted runs.
    all.sort_by_key(|function| function.start);
    trampolines.sort_unstable();
    // What is skipped may cover the rest.
    let uncovered = if report.is_whole() {
        Uncovered::of(image, all.iter().map(|function| function.start..function.end()), &trampolines)
    } else {
        Uncovered::default()
    };
    let recognised = uncovered.stretches();
    if !recognised.is_empty() {
        let stretches = recognised.iter();
        all.extend(stretches.map(|stretch| Function::of_stretch(stretch, RECOGNISED_RANK, &mut shapes)));
        all.sort_by_key(|function| function.start);
    }
    let (links, chains) = shapes.finish();
    Collected { functions: all, links, chains, uncovered }
}

/// Lays the rows of all functions out.
fn place(functions: &[Function], links: &Links, placement: &mut Placement, report: &mut Report) {
    let mut covered_to = placement.base;
    let mut rest = functions;
    while let Some(first) = rest.first() {
        let mut end = first.end();
        let mut len = 1;
        while let Some(next) = rest.get(len).filter(|next| next.start < end) {
            end = end.max(next.end());
            len += 1;
        }
        if covered_to < first.start {
            placement.end_coverage((covered_to - placement.base) as u32);
        }
        let (cluster, behind) = rest.split_at(len);
        match cluster {
            [only] => {
                let start = (only.start - placement.base) as u32;
                links.of(only.shape).0.iter().for_each(|link| placement.link(start, *link));
            }
            several => place_overlapping(several, links, placement),
        }
        // In a gap, and so alone.
        if links.of(first.shape).1 != RECOGNISED_RANK {
            report.code_bytes += end - first.start;
        }
        covered_to = end;
        rest = behind;
    }
    placement.end_coverage((covered_to - placement.base) as u32);
}

/// Lays out what several functions say of the same addresses.
fn place_overlapping(functions: &[Function], links: &Links, placement: &mut Placement) {
    let mut intervals = Vec::new();
    for function in functions {
        let (links, rank) = links.of(function.shape);
        let steps = links.iter().flat_map(|link| {
            let steps = placement.chains.steps(link.chain);
            steps.iter().map(|step| (function.start + u64::from(link.at + step.at), step.record))
        });
        let ends = steps.clone().skip(1).map(|(address, _)| address).chain([function.end()]);
        let interval = |((start, record), end)| Interval { start, end, rank, record };
        intervals.extend(steps.zip(ends).map(interval));
    }
    let mut rows = merge(intervals);
    // Whether the coverage ends there is for what comes next to say.
    if rows.last().is_some_and(|last| last.record == Record::NO_CFI) {
        rows.pop();
    }
    placement.rows(&rows);
}
