//! Which code of an image has no CFI and keeps frame pointers throughout?
//!
//! A runtime brings functions that its own compiler made ahead of time: V8's built-in functions are 1.5 MB amid the code
//! of node, without CFI, and each call from one JavaScript function to another passes through some. What that compiler
//! makes at run time is of the same make. That it keeps frame pointers cannot be read off a frame: code compiled without
//! optimisation has no prologue of its own but calls a function for it. So it is read off the image, as the
//! service does where nearly all of an image is such code; but the service has no more than a skeleton of most images, into
//! which such code goes, and tables are not always to be had; and what is asked here takes no DWARF: `.eh_frame_hdr` says where functions with CFI begin (LSB Core, 10.6.2), and a
//! wide gap between two of them is looked at.

use std::ops::Range;

use object::LittleEndian as LE;
use object::elf;
use object::read::ReadRef;
use object::read::elf::ProgramHeader as _;
use windlass_schema::wide_code::{FUNCTION_ALIGNMENT, Frames, WIDE_BYTES};

use crate::image::ProgramHeader;

/// Most bytes of gaps of one image that are looked at, and so of such code in a skeleton: of V8 there are one and a half
/// million. Anyone can map a file that has nothing but gaps.
const MAX_GAPS_BYTES: u64 = 2 * *WIDE_BYTES.end();
/// Largest `.eh_frame_hdr` read, in bytes: two million functions.
const MAX_HEADER_BYTES: u64 = 16 * 1024 * 1024;

/// Bytes in front of the table of `.eh_frame_hdr`: version, three encodings, a pointer, a count.
const TABLE_OFFSET: usize = 12;
/// Those of version 1, with a pointer of four bytes, a count of four, and pairs of four-byte offsets from the header.
const HEADER_START: [u8; 4] = [1, 0x1b, 0x03, 0x3b];
/// Bytes of an FDE up to the end of its range, if its addresses have four: length, CIE, start, range.
const FDE_BYTES: u64 = 16;

/// The image addresses of code of `image` that has no CFI and keeps frame pointers. What is malformed has none.
pub(crate) fn frame_pointer_code<'data, R: ReadRef<'data>>(
    program_headers: &[ProgramHeader],
    image: R,
) -> Vec<Range<u64>> {
    let file = Loaded { program_headers, image };
    let mut kept = Vec::new();
    for gap in file.wide_gaps().unwrap_or_default() {
        let aligned = gap.start.next_multiple_of(FUNCTION_ALIGNMENT)..gap.end;
        if file.bytes(aligned.start, aligned.end - aligned.start, true).is_some_and(keeps_frame_pointers) {
            kept.push(gap);
        }
    }
    kept
}

/// An image by its addresses.
pub(crate) struct Loaded<'h, R> {
    pub(crate) program_headers: &'h [ProgramHeader],
    pub(crate) image: R,
}

impl<'data, R: ReadRef<'data>> Loaded<'_, R> {
    /// Where the file has the bytes at an address, in one segment.
    pub(crate) fn offset(&self, address: u64, count: u64, executable: bool) -> Option<u64> {
        self.program_headers.iter().find_map(|segment| {
            let is_load = segment.p_type(LE) == elf::PT_LOAD;
            let at = address.checked_sub(segment.p_vaddr(LE)).filter(|_| is_load)?;
            let is_inside = at.checked_add(count)? <= segment.p_filesz(LE);
            let has_kind = !executable || segment.p_flags(LE).contains(elf::PF_X);
            segment.p_offset(LE).checked_add(at).filter(|_| is_inside && has_kind)
        })
    }

    /// The bytes at an address, in one segment.
    fn bytes(&self, address: u64, count: u64, executable: bool) -> Option<&'data [u8]> {
        self.image.read_bytes_at(self.offset(address, count, executable)?, count).ok()
    }

    /// Wide gaps between functions with CFI.
    fn wide_gaps(&self) -> Option<Vec<Range<u64>>> {
        let is_code = |segment: &&ProgramHeader| {
            segment.p_flags(LE).contains(elf::PF_X) && segment.p_filesz(LE) >= *WIDE_BYTES.start()
        };
        self.program_headers.iter().find(is_code)?;
        let mut entries = self.entries()?;
        let (mut start, mut fde) = entries.next()?;
        let (mut gaps, mut left) = (Vec::new(), MAX_GAPS_BYTES);
        for (next, next_fde) in entries {
            // The table is sorted, for a binary search (LSB Core, 10.6.2.1); in another, gaps may lie over each other.
            let apart = next.checked_sub(start)?;
            if WIDE_BYTES.contains(&apart)
                && let Some(end) =
                    self.end_of(start, fde).filter(|end| WIDE_BYTES.contains(&next.saturating_sub(*end)))
            {
                let Some(rest) = left.checked_sub(next - end) else { break };
                left = rest;
                gaps.push(end..next);
            }
            (start, fde) = (next, next_fde);
        }
        Some(gaps)
    }

    /// The table of `.eh_frame_hdr`: where functions with CFI start, in order, and where their FDEs are.
    fn entries(&self) -> Option<impl Iterator<Item = (u64, u64)>> {
        let is_header = |segment: &&ProgramHeader| segment.p_type(LE) == elf::PT_GNU_EH_FRAME;
        let segment = self.program_headers.iter().find(is_header)?;
        let (address, size) = (segment.p_vaddr(LE), segment.p_filesz(LE).min(MAX_HEADER_BYTES));
        let header = self.image.read_bytes_at(segment.p_offset(LE), size).ok()?;
        let table = header.strip_prefix(&HEADER_START)?.get(TABLE_OFFSET - HEADER_START.len()..)?;
        let count = u32::from_le_bytes(header[8..TABLE_OFFSET].try_into().ok()?) as usize;
        let at = move |bytes: &[u8]| {
            let offset = i32::from_le_bytes(bytes.try_into().expect("4 bytes"));
            address.wrapping_add_signed(offset.into())
        };
        Some(table.chunks_exact(8).take(count).map(move |pair| (at(&pair[..4]), at(&pair[4..]))))
    }

    /// Functions with CFI, by their starts, as far as `.eh_frame_hdr` is of the usual kind.
    pub(crate) fn functions(&self) -> Vec<Range<u64>> {
        let range = |(start, fde)| Some(start..self.end_of(start, fde)?);
        let mut functions: Vec<_> = self.entries().into_iter().flatten().filter_map(range).collect();
        functions.sort_by_key(|function| function.start);
        functions
    }

    /// Where the function ends that starts there and has its FDE there.
    fn end_of(&self, start: u64, fde: u64) -> Option<u64> {
        let bytes = self.bytes(fde, FDE_BYTES, false)?;
        let word = |at: usize| Some(i32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        // Start and range are of four bytes if the one comes out right.
        let place = fde.wrapping_add(8).wrapping_add_signed(word(8)?.into());
        start.checked_add(u64::from(word(12)?.cast_unsigned())).filter(|_| place == start)
    }
}

/// Whether nearly all functions that build a frame do so with a frame pointer. A function is what begins at an aligned
/// address behind padding; of which one byte alone may be a trap behind a call that does not return. `code` is aligned.
fn keeps_frame_pointers(code: &[u8]) -> bool {
    let mut frames = Frames::default();
    let alignment = FUNCTION_ALIGNMENT as usize;
    for at in (alignment..code.len()).step_by(alignment) {
        if !matches!(code[at - 2..at], [0xcc, 0xcc] | [0x90, 0x90]) {
            continue;
        }
        match &code[at..] {
            // push %rbp; mov %rsp, %rbp
            [0x55, 0x48, 0x89, 0xe5, ..] | [0x55, 0x48, 0x8b, 0xec, ..] => frames.with_frame_pointer += 1,
            // push; sub ..., %rsp
            [0x50..=0x57, ..] | [0x41, 0x50..=0x57, ..] | [0x48, 0x81 | 0x83, 0xec, ..] => frames.others += 1,
            _ => {}
        }
    }
    frames.keep_frame_pointers()
}

#[cfg(test)]
mod tests {
    use windlass_schema::wide_code::MIN_FUNCTIONS;

    use super::*;
    use crate::image::{file_header, program_headers};

    fn code(functions: &[(&[u8], usize)]) -> Vec<u8> {
        let mut code = vec![0xcc; FUNCTION_ALIGNMENT as usize];
        for (start, count) in functions {
            for _ in 0..*count {
                code.extend_from_slice(start);
                code.resize(code.len().next_multiple_of(FUNCTION_ALIGNMENT as usize), 0xcc);
            }
        }
        code
    }

    #[test]
    fn functions_tell_by_how_they_begin() {
        let (kept, second) = (&[0x55, 0x48, 0x89, 0xe5][..], &[0x55, 0x48, 0x8b, 0xec][..]);
        let (other, leaf) = (&[0x55, 0x48, 0x83, 0xec, 0x20][..], &[0x31, 0xc0, 0xc3][..]);
        for (functions, expect) in [
            (&[(kept, MIN_FUNCTIONS / 2), (second, MIN_FUNCTIONS / 2)][..], true),
            (&[(kept, MIN_FUNCTIONS - 1)], false),
            (&[(kept, 100), (leaf, 1000), (other, 5)], true),
            (&[(kept, 100), (other, 6)], false),
            (&[(leaf, 1000)], false),
            (&[], false),
        ] {
            assert_eq!(keeps_frame_pointers(&code(functions)), expect, "{functions:x?}");
        }
    }

    /// The gaps found in an image of the machine, if it is there.
    fn found(path: &str) -> Option<Vec<Range<u64>>> {
        let file = std::fs::read(path).ok()?;
        let header = file_header(&file[..]).unwrap();
        Some(frame_pointer_code(program_headers(header, &file[..]).unwrap(), &file[..]))
    }

    #[test]
    fn images_of_the_machine() {
        use object::{Object as _, ObjectSymbol as _};
        for path in ["/bin/bash", "/usr/bin/python3", "/usr/lib/x86_64-linux-gnu/libcrypto.so.3"] {
            assert!(found(path).is_none_or(|ranges| ranges.is_empty()), "{path}");
        }
        let Some(ranges) = found("/usr/bin/node") else { return };
        let file = std::fs::read("/usr/bin/node").unwrap();
        let elf = object::File::parse(&file[..]).unwrap();
        let builtins = elf.symbols().filter(|symbol| {
            symbol.name().is_ok_and(|name| name.starts_with("Builtins_")) && symbol.is_definition()
        });
        let is_inside = |address| ranges.iter().any(|range| range.contains(&address));
        assert!(builtins.into_iter().all(|symbol| is_inside(symbol.address())), "{ranges:x?}");
    }

    /// The service sees of such code what it would see of the whole image; behind it is other code without CFI.
    #[test]
    fn skeletons_have_the_code() {
        use object::{Object as _, ObjectSection as _};
        let Ok(file) = std::fs::read("/usr/bin/node") else { return };
        let skeleton = crate::skeleton::skeleton(&file[..]).unwrap();
        let (whole, cut) =
            (object::File::parse(&file[..]).unwrap(), object::File::parse(&skeleton[..]).unwrap());
        let ranges = found("/usr/bin/node").unwrap();
        let mut sections = cut.sections().filter(|section| {
            section.kind() == object::SectionKind::Text && section.data().is_ok_and(|data| !data.is_empty())
        });
        for range in ranges {
            let section = sections.next().expect("a section with the code");
            let size = range.end - range.start;
            assert_eq!((section.address(), section.size()), (range.start, size));
            let text = whole.section_by_name(".text").unwrap();
            assert_eq!(section.data().ok(), text.data_range(range.start, size).unwrap());
        }
    }

    /// The program headers of a crafted image of zeros, which is all code, and its bytes. Its header names functions at
    /// these offsets from the header, of which none has bytes.
    fn crafted(starts: &[u32], code_bytes: u64) -> (Vec<ProgramHeader>, Vec<u8>) {
        let table_end = TABLE_OFFSET + 8 * starts.len();
        let mut image = [&HEADER_START[..], &[0; 4], &(starts.len() as u32).to_le_bytes()].concat();
        for (number, start) in starts.iter().enumerate() {
            let fde = (table_end + FDE_BYTES as usize * number) as u32;
            image.extend([start.to_le_bytes(), fde.to_le_bytes()].concat());
        }
        for (number, start) in starts.iter().enumerate() {
            let place = (table_end + FDE_BYTES as usize * number + 8) as u32;
            image.extend([[0; 4], [0; 4], start.wrapping_sub(place).to_le_bytes(), [0; 4]].concat());
        }
        let header_bytes = image.len() as u64;
        image.resize((code_bytes + header_bytes) as usize, 0);
        let header = |kind, size: u64| ProgramHeader {
            p_type: object::U32::new(LE, kind),
            p_flags: object::U32::new(LE, elf::PF_X | elf::PF_R),
            p_offset: object::U64::new(LE, 0),
            p_vaddr: object::U64::new(LE, 0),
            p_paddr: object::U64::new(LE, 0),
            p_filesz: object::U64::new(LE, size),
            p_memsz: object::U64::new(LE, size),
            p_align: object::U64::new(LE, 1),
        };
        let size = image.len() as u64;
        (vec![header(elf::PT_LOAD, size), header(elf::PT_GNU_EH_FRAME, header_bytes)], image)
    }

    #[test]
    fn gaps_are_apart_and_bounded_in_all() {
        let gaps = |starts: &[u32], code_bytes: u64| {
            let (program_headers, image) = crafted(starts, code_bytes);
            Loaded { program_headers: &program_headers, image: &image[..] }.wide_gaps()
        };
        let mib = 1024 * 1024;
        assert_eq!(gaps(&[mib, 3 * mib, 4 * mib], 8 << 20), Some(vec![1 << 20..3 << 20, 3 << 20..4 << 20]));
        let over_each_other: Vec<u32> = (0..2000).map(|number| mib * (1 + number % 2)).collect();
        assert_eq!(gaps(&over_each_other, 8 << 20), None);
        let many: Vec<u32> = (1..64).map(|number| mib * number).collect();
        let many = gaps(&many, 64 << 20).expect("the table is sorted");
        let bytes: u64 = many.iter().map(|gap| gap.end - gap.start).sum();
        assert_eq!(bytes, MAX_GAPS_BYTES);
    }

    #[test]
    fn no_input_panics() {
        let mut file = std::fs::read("/bin/bash").unwrap();
        for at in (0..2048).chain((2048..file.len()).step_by(4099)) {
            file[at] ^= 0xff;
            if let Ok(header) = file_header(&file[..])
                && let Ok(headers) = program_headers(header, &file[..])
            {
                let _ = frame_pointer_code(headers, &file[..]);
            }
            file[at] ^= 0xff;
        }
    }
}
