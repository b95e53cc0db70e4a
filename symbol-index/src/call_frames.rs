//! Where functions start and end, from call frame information.
//!
//! Distributions strip the names of a library's internal functions, and profilers then show each address of such a
//! function as one of its own, which tears recursions through it apart. The running program needs
//! `.eh_frame` to unwind, so that survives every strip, and it has an FDE for each function: where it
//! starts and how long it is. That gives no name, but says which addresses are of one function.
//! Parts that a compiler moves out of a function (`.cold`) have FDEs of their own and stay apart.
//!
//! Entries are found by their lengths, so that one that is broken costs itself alone.

use std::collections::HashMap;

use gimli::{BaseAddresses, EhFrame, EhFrameOffset, Reader as _, RunTimeEndian, UnwindSection as _};
use object::{CompressionFormat, Object, ObjectKind, ObjectSection, ObjectSegment, SegmentFlags, elf::PF_X};

use crate::dwarf::Reader;
use crate::elf::Image;
use crate::range::{self, Range};
use crate::symbol::{Segment, Symbol};

/// Most functions taken of an image, 256 MiB of them: forty times those of the largest library of a
/// Debian developer's machine.
const MAX_FUNCTIONS: usize = 1 << 24;

/// The extents of the functions in `image`, disjoint and ascending: none longer than what is loaded as code.
/// Memory in proportion to `.eh_frame`. None of a file that is not linked, which has its symbols: they are what it is
/// linked by.
pub(crate) fn functions(image: &Image<'_>) -> Vec<Range> {
    let file = &image.file;
    if file.kind() == ObjectKind::Relocatable {
        return Vec::new();
    }
    let Some(section) = file.section_by_name(".eh_frame") else { return Vec::new() };
    // Compressed, no program could unwind by it.
    let data = section.compressed_data().ok().filter(|data| data.format == CompressionFormat::None);
    let Some(data) = data else { return Vec::new() };
    let endian = if file.is_little_endian() { RunTimeEndian::Little } else { RunTimeEndian::Big };
    let eh_frame = Section {
        data: Reader::new(data.data, endian),
        address: section.address(),
        address_bytes: if file.is_64() { 8 } else { 4 },
    };
    eh_frame.functions(&code(image), MAX_FUNCTIONS)
}

/// What is loaded as code.
fn code(image: &Image<'_>) -> Vec<Range> {
    let file = &image.file;
    let mut ranges = image.code();
    if ranges.is_empty() {
        let is_code = |flags| matches!(flags, SegmentFlags::Elf { p_flags, .. } if p_flags.contains(PF_X));
        let segments = file.segments().filter(|segment| is_code(segment.flags()));
        ranges.extend(
            segments.map(|segment| (segment.address(), segment.address().saturating_add(segment.size()))),
        );
    }
    range::union(ranges)
}

/// An `.eh_frame`.
struct Section<'a> {
    data: Reader<'a>,
    /// Image address of its first byte.
    address: u64,
    /// Size of an address in bytes.
    address_bytes: u8,
}

impl Section<'_> {
    /// The extents inside `code` of its first `limit` FDEs that have one.
    fn functions(&self, code: &[Range], limit: usize) -> Vec<Range> {
        let mut section = EhFrame::from(self.data);
        section.set_address_size(self.address_bytes);
        let bases = BaseAddresses::default().set_eh_frame(self.address);
        let mut cies = HashMap::new();
        let mut extent = |offset| {
            let partial = section.partial_fde_from_offset(&bases, EhFrameOffset(offset)).ok()?;
            let cie_offset = partial.cie_offset();
            let cie = cies.entry(cie_offset.0);
            let cie = cie.or_insert_with(|| section.cie_from_offset(&bases, cie_offset).ok()).as_ref()?;
            let fde = partial.parse(|_, _, _| Ok(cie.clone())).ok()?;
            let start = fde.initial_address();
            // The linker leaves FDEs of what it dropped at 0, outside of all code.
            let (_, code_end) = range::containing(code, start)?;
            let end = start.checked_add(fde.len())?.min(code_end);
            (start < end).then_some((start, end))
        };
        let mut functions = Vec::new();
        let mut rest = self.data;
        while functions.len() < limit {
            let offset = rest.offset_from(self.data);
            let Ok((length, _)) = rest.read_initial_length() else { break };
            let Ok(mut body) = rest.split(length) else { break };
            // A terminator, which linkers leave in the middle too, has no body, and a CIE the id 0.
            if body.read_u32().is_ok_and(|id| id != 0) {
                functions.extend(extent(offset));
            }
        }
        range::cut_at_starts(functions)
    }
}

/// Lets no symbol of unknown size reach from one of `functions`, or from between them, into another.
pub(crate) fn limit_symbols(symbols: &mut [Symbol<'_>], functions: &[Range]) {
    for symbol in symbols {
        let behind = functions.partition_point(|&(start, _)| start <= symbol.start);
        let own_end = range::containing(functions, symbol.start).map(|(_, end)| end);
        let boundary = own_end.or(functions.get(behind).map(|&(start, _)| start));
        symbol.limit = boundary.map_or(symbol.limit, |boundary| boundary.min(symbol.limit));
    }
}

/// Those of `functions` that `names` do not cover whole.
pub(crate) fn unnamed(mut functions: Vec<Range>, names: &[Segment<'_>]) -> Vec<Range> {
    functions.retain(|&(start, end)| {
        let first = names.partition_point(|name| name.end <= start);
        let mut at = start;
        for name in &names[first..] {
            if name.start > at || at >= end {
                break;
            }
            at = name.end;
        }
        at < end
    });
    functions
}

#[cfg(test)]
mod tests {
    use windlass_schema::http::Provenance;

    use super::*;
    use crate::symbol::Binding;

    const CODE: [Range; 1] = [(0x1000, 0x2000)];

    /// A section with a CIE of absolute 8-byte addresses, and then `entries`.
    fn section(entries: &[Vec<u8>]) -> Vec<u8> {
        let cie = [16, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0x78, 16, 0, 0, 0, 0, 0, 0, 0];
        entries.iter().fold(cie.to_vec(), |mut section, entry| {
            // An FDE says how far back its CIE is.
            let mut entry = entry.clone();
            if entry.len() > 4 {
                let back = section.len() as u32 + 4;
                entry[4..8].copy_from_slice(&back.to_le_bytes());
            }
            section.extend(entry);
            section
        })
    }

    fn fde(start: u64, size: u64) -> Vec<u8> {
        [&20_u32.to_le_bytes()[..], &[0; 4], &start.to_le_bytes(), &size.to_le_bytes()].concat()
    }

    #[track_caller]
    fn check(entries: &[Vec<u8>], limit: usize, expect: &[Range]) {
        let section = section(entries);
        let data = Reader::new(&section, RunTimeEndian::Little);
        let section = Section { data, address: 0, address_bytes: 8 };
        assert_eq!(section.functions(&CODE, limit), expect);
    }

    #[test]
    fn ordered_and_cut_to_code() {
        let entries = [fde(0x1ff0, 0x20), fde(0x1010, 0x20), fde(0x1000, 0x10), fde(0x1020, 0x20)];
        check(&entries, 9, &[(0x1000, 0x1010), (0x1010, 0x1020), (0x1020, 0x1040), (0x1ff0, 0x2000)]);
        check(&entries, 2, &[(0x1010, 0x1030), (0x1ff0, 0x2000)]);
        check(&[fde(0, 0x20), fde(0x1000, 0), fde(0x1100, u64::MAX), fde(0x2000, 1)], 9, &[]);
    }

    #[test]
    fn a_broken_entry_costs_itself() {
        let mut short = fde(0x1100, 0x10);
        short.truncate(12);
        short[0] = 8;
        let terminator = vec![0; 4];
        check(
            &[short, fde(0x1200, 0x10), terminator, fde(0x1300, 0x10)],
            9,
            &[(0x1200, 0x1210), (0x1300, 0x1310)],
        );
        let mut endless = fde(0x1300, 0x10);
        endless[3] = 0x7f;
        check(&[fde(0x1200, 0x10), endless, fde(0x1400, 0x10)], 9, &[(0x1200, 0x1210)]);
    }

    #[test]
    fn names_cover_functions_alone_or_together() {
        let name = |start, end| Segment { start, end, name: "f", provenance: Provenance::Dynsym };
        let functions = vec![(0x10, 0x20), (0x20, 0x30), (0x30, 0x40), (0x50, 0x60)];
        let names = [name(0x10, 0x18), name(0x18, 0x20), name(0x20, 0x28), name(0x2c, 0x40)];
        assert_eq!(unnamed(functions.clone(), &names), [(0x20, 0x30), (0x50, 0x60)]);
        assert_eq!(unnamed(functions.clone(), &[]), functions);
        assert_eq!(unnamed(functions, &[name(0, 0x100)]), []);
    }

    #[test]
    fn symbols_of_unknown_size_end_with_their_function() {
        let symbol = |start| Symbol {
            start,
            end: start,
            limit: 0x100,
            is_function: true,
            binding: Binding::Global,
            name: "f",
            provenance: Provenance::Dynsym,
        };
        let mut symbols = [symbol(0x8), symbol(0x10), symbol(0x14), symbol(0x20), symbol(0x48)];
        limit_symbols(&mut symbols, &[(0x10, 0x20), (0x30, 0x40)]);
        assert_eq!(symbols.map(|symbol| symbol.limit), [0x10, 0x20, 0x20, 0x30, 0x100]);
    }
}
