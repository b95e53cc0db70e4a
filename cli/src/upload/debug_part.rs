//! Splitting the debug information off a program, as `objcopy --only-keep-debug` does, without it.
//!
//! The debug file has all sections of the program, so that symbols and relocations still refer to the same ones. Those
//! that are loaded lose their bytes (`SHT_NOBITS`), but for notes, since the build-ID among them is what ties both; all
//! others, the DWARF and the symbol tables, keep them as they are, compressed or not.
//!
//! ```text
//! ELF header
//! program headers     of those without bytes the size in the file is 0, and the offset what their alignment asks for
//! kept sections       in the order they had, aligned as each says
//! section headers
//! ```
//! Nothing is copied: the result says which parts of the file lie where, between bytes of its own. `objcopy` holds a
//! whole program in memory, and `datadog-ci` fails where none is installed.

use std::ops::Range;

use object::Endianness;
use object::elf::{
    self, FileHeader64, PT_GNU_PROPERTY, PT_LOAD, PT_NOTE, PT_PHDR, ProgramHeader64, SHF_ALLOC, SHT_NOBITS,
    SHT_NOTE, SHT_NULL, SectionHeader64,
};
use object::pod::{bytes_of, bytes_of_slice};
use object::read::elf::{FileHeader as _, ProgramHeader as _, SectionHeader as _};

/// Largest alignment of a section that is kept, in bytes. Notes, DWARF and symbols ask for 1 to 16.
const MAX_ALIGNMENT: u64 = 64;

type Header = FileHeader64<Endianness>;
type Segment = ProgramHeader64<Endianness>;
type Section = SectionHeader64<Endianness>;

/// A part of a file that is made of another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// New bytes.
    Bytes(Vec<u8>),
    /// Bytes of the other.
    File(Range<u64>),
}

impl Piece {
    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File(range) => range.end - range.start,
        }
    }
}

/// Why nothing can be split off.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SplitError {
    /// Headers are broken.
    #[error("broken ELF file: {0}")]
    Broken(object::Error),
    /// Of 32 bits.
    #[error("a 32-bit ELF file, --only-debug splits those of 64 bits: upload it whole")]
    Class,
    /// Only program headers.
    #[error("no section headers")]
    NoSections,
    /// A section is not in the file, or in it together with others.
    #[error("section {0} lies outside of the file, or over others")]
    Section(usize),
}

/// A kept section: where it was, and where it goes.
struct Moved {
    old: Range<u64>,
    new: u64,
}

/// The pieces of the debug file of `elf`.
pub(crate) fn debug_part(elf: &[u8]) -> Result<Vec<Piece>, SplitError> {
    /// `EI_CLASS`.
    const CLASS: usize = 4;
    if elf.get(CLASS) == Some(&elf::ELFCLASS32.0) {
        return Err(SplitError::Class);
    }
    let mut header = *Header::parse(elf).map_err(SplitError::Broken)?;
    let endian = header.endian().map_err(SplitError::Broken)?;
    let mut segments = header.program_headers(endian, elf).map_err(SplitError::Broken)?.to_vec();
    let mut sections = header.section_headers(endian, elf).map_err(SplitError::Broken)?.to_vec();
    if sections.is_empty() {
        return Err(SplitError::NoSections);
    }
    let head_bytes = (size_of::<Header>() + size_of_val(&segments[..])) as u64;
    let (moved, mut at) = place(&mut sections, endian, head_bytes, elf.len() as u64)?;
    for segment in &mut segments {
        place_segment(segment, endian, head_bytes, &moved);
    }
    let mut pieces = vec![Piece::Bytes(Vec::new())];
    let mut written = head_bytes;
    for Moved { old, new } in moved {
        pieces.push(Piece::Bytes(vec![0; (new - written) as usize]));
        written = new + (old.end - old.start);
        pieces.push(Piece::File(old));
    }
    let padding = at.next_multiple_of(8) - at;
    at += padding;
    header.e_phoff.set(endian, if segments.is_empty() { 0 } else { size_of::<Header>() as u64 });
    header.e_shoff.set(endian, at);
    let mut tail = vec![0; padding as usize];
    tail.extend_from_slice(bytes_of_slice(&sections));
    pieces.push(Piece::Bytes(tail));
    let mut head = bytes_of(&header).to_vec();
    head.extend_from_slice(bytes_of_slice(&segments));
    pieces[0] = Piece::Bytes(head);
    pieces.retain(|piece| piece.size() > 0);
    Ok(pieces)
}

/// Gives each section its place, the first at `at`, and tells where the last ends.
fn place(
    sections: &mut [Section],
    endian: Endianness,
    mut at: u64,
    file_bytes: u64,
) -> Result<(Vec<Moved>, u64), SplitError> {
    let mut order: Vec<usize> = (0..sections.len()).collect();
    order.sort_by_key(|&index| sections[index].sh_offset(endian));
    let (mut moved, mut kept_bytes) = (Vec::new(), 0u64);
    for index in order {
        let section = &mut sections[index];
        let kind = section.sh_type(endian);
        if kind == SHT_NULL {
            // The first one's fields count sections when there are many.
            continue;
        }
        let is_loaded = section.sh_flags(endian).contains(SHF_ALLOC);
        if kind == SHT_NOBITS || is_loaded && kind != SHT_NOTE {
            section.sh_type.set(endian, SHT_NOBITS);
            section.sh_offset.set(endian, at);
            continue;
        }
        let (start, size) = (section.sh_offset(endian), section.sh_size(endian));
        // What lies over other sections would be copied more than once.
        kept_bytes = kept_bytes.saturating_add(size);
        let end = start.checked_add(size).filter(|end| *end <= file_bytes && kept_bytes <= file_bytes);
        let end = end.ok_or(SplitError::Section(index))?;
        let alignment = section.sh_addralign(endian);
        if size > 0 && alignment.is_power_of_two() && alignment <= MAX_ALIGNMENT {
            at = at.next_multiple_of(alignment);
        }
        section.sh_offset.set(endian, at);
        if size > 0 {
            moved.push(Moved { old: start..end, new: at });
            at += size;
        }
    }
    Ok((moved, at))
}

fn place_segment(segment: &mut Segment, endian: Endianness, head_bytes: u64, moved: &[Moved]) {
    let (start, size) = (segment.p_offset(endian), segment.p_filesz(endian));
    match segment.p_type(endian) {
        PT_PHDR => return segment.p_offset.set(endian, size_of::<Header>() as u64),
        // The one that loads the headers still does, so that those of the program are in a segment.
        PT_LOAD if start == 0 && size >= head_bytes => return segment.p_filesz.set(endian, head_bytes),
        PT_NOTE | PT_GNU_PROPERTY => {
            let new_of = |offset: u64| {
                let part = moved.iter().find(|part| part.old.contains(&offset))?;
                Some(part.new + (offset - part.old.start))
            };
            let last = start.checked_add(size).and_then(|end| end.checked_sub(1));
            if let (Some(new), Some(last)) = (new_of(start), last.and_then(new_of))
                && last.checked_sub(new) == size.checked_sub(1)
            {
                return segment.p_offset.set(endian, new);
            }
        }
        _ => {}
    }
    // A loadable segment's offset is its address modulo the alignment, with bytes or without.
    let alignment = segment.p_align(endian);
    let congruent = if alignment.is_power_of_two() { segment.p_vaddr(endian) % alignment } else { 0 };
    segment.p_offset.set(endian, congruent);
    segment.p_filesz.set(endian, 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assembled(elf: &[u8], pieces: &[Piece]) -> Vec<u8> {
        let mut whole = Vec::new();
        for piece in pieces {
            match piece {
                Piece::Bytes(bytes) => whole.extend_from_slice(bytes),
                Piece::File(range) => whole.extend_from_slice(&elf[range.start as usize..range.end as usize]),
            }
        }
        whole
    }

    fn own() -> Vec<u8> {
        std::fs::read("../fixtures/elf/inlined").unwrap()
    }

    #[test]
    fn debug_sections_and_notes_keep_their_bytes_and_nothing_else() {
        use object::{Object as _, ObjectSection as _};
        let elf = own();
        let part = assembled(&elf, &debug_part(&elf).unwrap());
        assert!(part.len() < elf.len());
        let (whole, split) =
            (object::File::parse(&elf[..]).unwrap(), object::File::parse(&part[..]).unwrap());
        assert_eq!(split.build_id().unwrap(), whole.build_id().unwrap());
        let mut with_bytes = 0;
        for (old, new) in whole.sections().zip(split.sections()) {
            assert_eq!((old.name(), old.address(), old.size()), (new.name(), new.address(), new.size()));
            let name = old.name().unwrap();
            if name.starts_with(".debug_") || name.starts_with(".note") || name == ".symtab" {
                assert_eq!(old.data().unwrap(), new.data().unwrap(), "{name}");
                with_bytes += 1;
            }
        }
        assert!(with_bytes > 5, "{with_bytes}");
        let contents = windlass_symbol_index::describe(&part).unwrap();
        assert!(contents.debug_info && contents.symtab && !contents.code && !contents.unwind, "{contents:?}");
    }

    #[test]
    fn what_was_split_off_is_its_own_debug_part() {
        let elf = own();
        let part = assembled(&elf, &debug_part(&elf).unwrap());
        let again = assembled(&part, &debug_part(&part).unwrap());
        assert!(again == part);
    }

    #[test]
    fn damage_is_an_error_or_a_part_no_larger_than_the_file() {
        let elf = own();
        for cut in (0..elf.len()).step_by(101) {
            let _ = debug_part(&elf[..cut]);
        }
        // Each byte of the headers, then of the section headers.
        let sections = u64::from_le_bytes(elf[0x28..0x30].try_into().unwrap()) as usize;
        for at in (0..0x40 + 14 * 0x38).chain(sections..elf.len()) {
            for value in [0, 0x7f, 0xff] {
                let mut damaged = elf.clone();
                damaged[at] = value;
                if let Ok(pieces) = debug_part(&damaged) {
                    let bytes: u64 = pieces.iter().map(Piece::size).sum();
                    let headers = damaged.len() + (1 << 16) * MAX_ALIGNMENT as usize;
                    assert!(bytes <= (damaged.len() + headers) as u64, "{bytes} bytes");
                }
            }
        }
    }
}
