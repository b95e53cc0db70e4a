//! Opening an ELF file, and what it brings.

use object::elf::{ELFMAG, SHF_ALLOC, SHF_EXECINSTR, SHT_NOBITS};
use object::{File, Object, ObjectSection, ObjectSymbol, Section, SectionFlags, SectionKind};

use crate::range::Range;
use crate::relocatable::Placement;

/// A file is no ELF file.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ElfError {
    /// Another format.
    #[error("no ELF file: it begins with {0:02x?}")]
    NotElf(Vec<u8>),
    /// Headers or tables are broken.
    #[error("broken ELF file: {0}")]
    Broken(object::Error),
}

/// What a file brings to symbolization and unwinding. A section without data (`SHT_NOBITS`, as in
/// split debug files and skeletons) brings nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// `.debug_info`: functions and inlined calls.
    pub debug_info: bool,
    /// `.debug_line`: files and lines.
    pub line_table: bool,
    /// `.symtab`, with symbols in it.
    pub symtab: bool,
    /// `.dynsym`, with symbols in it.
    pub dynsym: bool,
    /// `.eh_frame` or `.debug_frame`.
    pub unwind: bool,
    /// `.gnu_debugdata`: a compressed symbol table.
    pub gnu_debugdata: bool,
    /// Machine code.
    pub code: bool,
}

/// What an ELF file brings.
///
/// ```
/// # use windlass_symbol_index::describe;
/// let own = std::fs::read(std::env::current_exe()?)?;
/// assert!(describe(&own)?.unwind);
/// assert!(describe(b"#!/bin/sh").is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn describe(elf: &[u8]) -> Result<Contents, ElfError> {
    let file = parse(elf)?;
    let mut contents = Contents {
        symtab: file.symbols().any(|symbol| symbol.is_definition()),
        dynsym: file.dynamic_symbols().any(|symbol| symbol.is_definition()),
        ..Contents::default()
    };
    for section in file.sections().filter(has_data) {
        match section.name_bytes() {
            _ if is_debug_info(&section) => contents.debug_info = true,
            Ok(b".debug_line" | b".zdebug_line") => contents.line_table = true,
            Ok(b".eh_frame" | b".debug_frame" | b".zdebug_frame") => contents.unwind = true,
            Ok(b".gnu_debugdata") => contents.gnu_debugdata = true,
            _ => contents.code |= section.kind() == SectionKind::Text,
        }
    }
    Ok(contents)
}

/// Opens an ELF file of any type.
fn parse(elf: &[u8]) -> Result<File<'_>, ElfError> {
    if !elf.starts_with(&ELFMAG) {
        return Err(ElfError::NotElf(elf.iter().take(ELFMAG.len()).copied().collect()));
    }
    File::parse(elf).map_err(ElfError::Broken)
}

/// An ELF file and where it lies among the addresses of its image.
pub(crate) struct Image<'a> {
    pub(crate) file: File<'a>,
    /// Bytes of the file.
    pub(crate) bytes: usize,
    pub(crate) placement: Placement,
}

impl<'a> Image<'a> {
    pub(crate) fn parse(elf: &'a [u8]) -> Result<Self, ElfError> {
        let file = parse(elf)?;
        Ok(Self { bytes: elf.len(), placement: Placement::of(&file), file })
    }

    /// The image addresses of each section with code, whether or not the file holds its data.
    pub(crate) fn code(&self) -> Vec<Range> {
        self.placement.code(&self.file).into_iter().map(|(_, range)| range).collect()
    }
}

/// Whether a section is loaded to be run.
pub(crate) fn is_code(section: &Section<'_, '_>) -> bool {
    is_loaded(section)
        && matches!(section.flags(), SectionFlags::Elf { sh_flags, .. } if sh_flags.contains(SHF_EXECINSTR))
}

/// Whether a section is part of the image, and not only of the file.
pub(crate) fn is_loaded(section: &Section<'_, '_>) -> bool {
    matches!(section.flags(), SectionFlags::Elf { sh_flags, .. } if sh_flags.contains(SHF_ALLOC))
}

/// Whether DWARF functions can be expected in it.
pub(crate) fn has_debug_info(file: &File<'_>) -> bool {
    file.sections().filter(has_data).any(|section| is_debug_info(&section))
}

fn is_debug_info(section: &Section<'_, '_>) -> bool {
    matches!(section.name_bytes(), Ok(b".debug_info" | b".zdebug_info"))
}

fn has_data(section: &Section<'_, '_>) -> bool {
    let no_bits = matches!(section.flags(), SectionFlags::Elf { sh_type, .. } if sh_type == SHT_NOBITS);
    !no_bits && section.size() > 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_say_what_is_wrong() {
        assert_eq!(describe(b"ab").unwrap_err().to_string(), "no ELF file: it begins with [61, 62]");
        let broken = describe(b"\x7fELF\x02\x01\x01").unwrap_err().to_string();
        assert!(broken.starts_with("broken ELF file: "), "{broken}");
    }
}
