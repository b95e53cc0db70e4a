//! The GNU build-ID of an ELF file.

use object::elf::{self, FileHeader32, FileHeader64};
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader};
use windlass_schema::BuildId;

/// The GNU build-ID of an ELF file of any class, byte order and machine: from the notes that program
/// headers name, else from those of sections.
pub fn build_id_of(elf: &[u8]) -> Option<BuildId> {
    fn of<H: FileHeader<Endian = object::Endianness>>(file: &[u8]) -> Option<BuildId> {
        let header = H::parse(file).ok()?;
        let endian = header.endian().ok()?;
        let segments = header.program_headers(endian, file).unwrap_or_default();
        let of_segments = segments.iter().filter_map(|segment| segment.notes(endian, file).ok().flatten());
        let sections = header.sections(endian, file).unwrap_or_default();
        let of_sections = sections.iter().filter_map(|section| section.notes(endian, file).ok().flatten());
        of_segments.chain(of_sections).find_map(|mut notes| {
            while let Ok(Some(note)) = notes.next() {
                if note.name() == elf::ELF_NOTE_GNU && note.n_type(endian) == elf::NT_GNU_BUILD_ID {
                    return BuildId::new(note.desc()).ok();
                }
            }
            None
        })
    }
    of::<FileHeader64<object::Endianness>>(elf).or_else(|| of::<FileHeader32<object::Endianness>>(elf))
}
