//! Which sections has an image whose section headers were taken away (`sstrip`)?

use std::ops::Range;

use object::LittleEndian as LE;
use object::elf;
use object::read::ReadRef;
use object::read::elf::ProgramHeader as _;

use super::section;
use crate::image::{ProgramHeader, SectionHeader};
use crate::image_file::MAX_READ_BYTES;

/// Bytes of an `.eh_frame_hdr` up to the end of an `eh_frame_ptr` of four bytes.
const EH_FRAME_HDR_BYTES: u64 = 8;
/// Most bytes in which the end of `.eh_frame` is looked for; what lies behind is left out.
const MAX_EH_FRAME_BYTES: u64 = MAX_READ_BYTES / 2;

/// For an image without section headers: the null section and those of its unwind information.
pub(super) fn unwind_sections<'data, R: ReadRef<'data>>(
    segments: &[ProgramHeader],
    elf: R,
    names: &mut Vec<u8>,
) -> Vec<SectionHeader> {
    let mut sections = vec![section(names, b"", elf::SHT_NULL, 0, 0..0)];
    for note in segments.iter().filter(|segment| segment.p_type(LE) == elf::PT_NOTE) {
        let file = note.p_offset(LE)..note.p_offset(LE).saturating_add(note.p_filesz(LE));
        let mut note_section = section(names, b".note", elf::SHT_NOTE, note.p_vaddr(LE), file);
        note_section.sh_addralign.set(LE, note.p_align(LE));
        sections.push(note_section);
    }
    let is_code = |segment: &&ProgramHeader| {
        segment.p_type(LE) == elf::PT_LOAD && segment.p_flags(LE).contains(elf::PF_X)
    };
    for code in segments.iter().filter(is_code) {
        let file = code.p_offset(LE)..code.p_offset(LE).saturating_add(code.p_filesz(LE));
        let mut code = section(names, b".code", elf::SHT_PROGBITS, code.p_vaddr(LE), file);
        code.sh_flags.set(LE, elf::SHF_ALLOC | elf::SHF_EXECINSTR);
        sections.push(code);
    }
    let Some(hdr) = segments.iter().find(|segment| segment.p_type(LE) == elf::PT_GNU_EH_FRAME) else {
        return sections;
    };
    let (address, offset) = (hdr.p_vaddr(LE), hdr.p_offset(LE));
    let file = offset..offset.saturating_add(hdr.p_filesz(LE));
    sections.push(section(names, b".eh_frame_hdr", elf::SHT_PROGBITS, address, file));
    // LSB Core 5.0, 10.6.2: version 1, encoding of eh_frame_ptr, two more encodings, eh_frame_ptr.
    // Linkers write it relative to itself in four signed bytes (DW_EH_PE_pcrel | DW_EH_PE_sdata4).
    if let Ok(&[1, 0x1b, _, _, a, b, c, d]) = elf.read_bytes_at(offset, EH_FRAME_HDR_BYTES) {
        let distance = i64::from(i32::from_le_bytes([a, b, c, d]));
        let frames = address.wrapping_add(4).wrapping_add_signed(distance);
        if let Some(file) = eh_frame_range(segments, elf, frames) {
            sections.push(section(names, b".eh_frame", elf::SHT_PROGBITS, frames, file));
        }
    }
    sections
}

/// The file range of the `.eh_frame` at `address`: its records up to the terminating zero length, or
/// to the end of its segment.
fn eh_frame_range<'data, R: ReadRef<'data>>(
    segments: &[ProgramHeader],
    elf: R,
    address: u64,
) -> Option<Range<u64>> {
    let segment = segments.iter().find(|segment| {
        let into = address.wrapping_sub(segment.p_vaddr(LE));
        segment.p_type(LE) == elf::PT_LOAD && into < segment.p_filesz(LE)
    })?;
    let into = address - segment.p_vaddr(LE);
    let start = segment.p_offset(LE).checked_add(into)?;
    let left = (segment.p_filesz(LE) - into).min(MAX_EH_FRAME_BYTES);
    let bytes = elf.read_bytes_at(start, left).ok()?;
    let mut at = 0usize;
    while let Some(&[a, b, c, d]) = bytes.get(at..at.saturating_add(4)) {
        let record = u32::from_le_bytes([a, b, c, d]) as usize;
        at = at.saturating_add(4).saturating_add(record);
        if record == 0 {
            break;
        }
    }
    Some(start..start + (at as u64).min(left))
}
