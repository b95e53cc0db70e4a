//! Lines of code that no function in DWARF describes.
//!
//! Compilers that were asked for line tables only (`-gline-tables-only`, Rust's `line-tables-only`)
//! leave out every function that inlines nothing, and assemblers may leave out all. Their rows are in
//! the line table all the same. They go into the SymCache as functions without a name; the lookup takes
//! the name from the symbols.

use symbolic::common::{Language, Name, NameMangling};
use symbolic::debuginfo::{FileInfo, Function, LineInfo};
use symbolic::symcache::SymCacheConverter;

use crate::dwarf::Reader;
use crate::elf::Image;
use crate::range::{self, Range};

/// Adds the lines of `dwarf`, of `image`, outside `functions`, the ranges relative to `base` that have functions.
/// Says whether all line tables could be read.
pub(crate) fn add(
    converter: &mut SymCacheConverter<'_>,
    dwarf: &gimli::Dwarf<Reader<'_>>,
    image: &Image<'_>,
    base: u64,
    functions: Vec<Range>,
) -> bool {
    let gaps = Gaps { base, functions: range::union(functions), code: image.code() };
    let mut complete = true;
    let mut units = dwarf.units();
    loop {
        let unit = match units.next() {
            Ok(Some(header)) => dwarf.unit(header),
            Ok(None) => return complete,
            Err(_) => return false,
        };
        complete &= unit.and_then(|unit| add_unit(converter, dwarf, &unit, &gaps)).is_ok();
    }
}

fn add_unit(
    converter: &mut SymCacheConverter<'_>,
    dwarf: &gimli::Dwarf<Reader<'_>>,
    unit: &gimli::Unit<Reader<'_>>,
    gaps: &Gaps,
) -> gimli::Result<()> {
    let Some(program) = unit.line_program.clone() else { return Ok(()) };
    let compilation_dir = unit.comp_dir.map_or(&[][..], |dir| dir.slice());
    let mut rows = program.rows();
    let mut previous: Option<gimli::LineRow> = None;
    let mut lines: Vec<LineInfo<'_>> = Vec::new();
    while let Some((header, &row)) = rows.next_row()? {
        if let Some(previous) = previous {
            for (start, end) in gaps.within(previous.address(), row.address()) {
                if lines.last().is_some_and(|last| last.address + last.size.unwrap_or(0) != start) {
                    add_function(converter, compilation_dir, std::mem::take(&mut lines));
                }
                lines.push(LineInfo {
                    address: start,
                    size: Some(end - start),
                    file: file_info(dwarf, unit, header, previous.file_index()),
                    line: previous.line().map_or(0, |line| line.get()),
                });
            }
        }
        previous = (!row.end_sequence()).then_some(row);
    }
    add_function(converter, compilation_dir, lines);
    Ok(())
}

/// Adds consecutive `lines` as a function without a name.
fn add_function(converter: &mut SymCacheConverter<'_>, compilation_dir: &[u8], lines: Vec<LineInfo<'_>>) {
    let (Some(first), Some(last)) = (lines.first(), lines.last()) else { return };
    let size = last.address + last.size.unwrap_or(0) - first.address;
    converter.process_symbolic_function(&Function {
        address: first.address,
        size,
        name: Name::new("", NameMangling::Unmangled, Language::Unknown),
        compilation_dir,
        lines,
        inlinees: Vec::new(),
        inline: false,
    });
}

fn file_info<'a>(
    dwarf: &gimli::Dwarf<Reader<'a>>,
    unit: &gimli::Unit<Reader<'a>>,
    header: &gimli::LineProgramHeader<Reader<'a>>,
    index: u64,
) -> FileInfo<'a> {
    let Some(file) = header.file(index) else { return FileInfo::default() };
    let text = |value| dwarf.attr_string(unit, value).map_or(&[][..], |text| text.slice());
    let directory = file.directory(header).map_or(&[][..], text);
    FileInfo::new(directory.into(), text(file.path_name()).into())
}

/// The code that has no functions.
struct Gaps {
    base: u64,
    /// Disjoint, ascending, relative to `base`.
    functions: Vec<Range>,
    /// Image addresses of sections with code. What the linker dropped has rows outside of all of them.
    code: Vec<Range>,
}

impl Gaps {
    /// The parts of the image addresses from `start` to `end` that lie in gaps, relative to the base.
    fn within(&self, start: u64, end: u64) -> Vec<Range> {
        let section = self.code.iter().find(|&&(first, behind)| first <= start && start < behind);
        let Some(&(_, code_end)) = section.filter(|_| self.base <= start) else { return Vec::new() };
        let (mut at, end) = (start - self.base, end.min(code_end).saturating_sub(self.base));
        let mut parts = Vec::new();
        let next = self.functions.partition_point(|&(_, behind)| behind <= at);
        for &(first, behind) in &self.functions[next..] {
            if first >= end {
                break;
            }
            if at < first {
                parts.push((at, first));
            }
            at = behind;
        }
        if at < end {
            parts.push((at, end));
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_between_functions() {
        let functions = range::union(vec![(0x30, 0x40), (0x10, 0x20), (0x18, 0x28)]);
        assert_eq!(functions, [(0x10, 0x28), (0x30, 0x40)]);
        let gaps = Gaps { base: 0x1000, functions, code: vec![(0x1000, 0x1050)] };
        assert_eq!(gaps.within(0x1000, 0x2000), [(0x0, 0x10), (0x28, 0x30), (0x40, 0x50)]);
        assert_eq!(gaps.within(0x1012, 0x1029), [(0x28, 0x29)]);
        assert_eq!(gaps.within(0x1012, 0x1020), []);
        assert_eq!(gaps.within(0x0, 0x2000), [], "rows of dropped code");
    }
}
