//! From ELF bytes to a table: the steps in order.

use gimli::UnwindContext;
use windlass_schema::{BuildId, Rule, Table, UnsupportedReason};

use crate::cfi::for_each_fde;
use crate::density::bound;
use crate::elf::{CompileError, Image};
use crate::encode::encode;
use crate::projection::Projection;
use crate::report::{Report, SkipReason};
use crate::rows::{Interval, merge};

/// A table and how it came about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// The table file; see [`windlass_schema::table`].
    pub table: Vec<u8>,
    /// What became of the image's call frame information.
    pub report: Report,
}

/// Compiles the `.eh_frame` of an x86-64 ELF image. `build_id` is written into the table, not checked.
///
/// An image without call frame information gives an empty table, and whatever is malformed in it
/// is skipped and reported; only a file that is no 64-bit little-endian x86-64 ELF is an error. The table
/// has passed [`Table::parse`]. Takes
/// memory in proportion to `.eh_frame`: 8 times its size for compilers' output, about 40 at worst.
pub fn compile(elf: &[u8], build_id: BuildId) -> Result<Compiled, CompileError> {
    let image = Image::parse(elf)?;
    let mut report = Report::default();
    let mut intervals = Vec::new();
    let mut context = UnwindContext::new();
    let eh_frame_bytes = for_each_fde(&image, |fde| {
        let fde = match fde {
            Ok(fde) => fde,
            Err(skipped) => return report.skip(skipped),
        };
        report.fdes += 1;
        let projection = Projection::of(&fde);
        let first = intervals.len();
        let end = fde.rows(&mut context, |range, row| {
            report.cfi_rows += 1;
            let record = projection.rule(row).to_record();
            push(&mut intervals, first, range, record);
        });
        if let Err(unknown_from) = end {
            let record = Rule::Unsupported(UnsupportedReason::Malformed).to_record();
            push(&mut intervals, first, unknown_from..fde.range().end, record);
            report.skip(fde.skipped(SkipReason::Instructions));
        }
    });
    let rows = bound(merge(intervals));
    report.eh_frame_bytes = eh_frame_bytes;
    report.count_rows(&rows);
    let table = encode(build_id, &rows);
    // A table that its readers refuse must not be handed on, kept and served. One pass, small against the rest.
    Table::parse(&table).map_err(CompileError::Table)?;
    Ok(Compiled { table, report })
}

/// Appends an interval, or extends the last if it is of the same FDE and record. `first` is the number of
/// the FDE's first interval.
fn push(
    intervals: &mut Vec<Interval>,
    first: usize,
    range: std::ops::Range<u64>,
    record: windlass_schema::Record,
) {
    match intervals[first..].last_mut() {
        Some(last) if last.record == record => last.end = range.end,
        _ => intervals.push(Interval { start: range.start, end: range.end, record }),
    }
}
