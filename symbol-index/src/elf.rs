//! Opening an ELF file, and what it brings.

use object::elf::{ELFMAG, SHF_ALLOC, SHF_EXECINSTR, SHT_NOBITS};
use object::{File, Object, ObjectKind, ObjectSection, ObjectSymbol, Section, SectionFlags, SectionKind};

/// A file is no ELF file that has image addresses.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ElfError {
    /// Another format.
    #[error("no ELF file: it begins with {0:02x?}")]
    NotElf(Vec<u8>),
    /// Headers or tables are broken.
    #[error("broken ELF file: {0}")]
    Broken(object::Error),
    /// `ET_REL`: its sections have no addresses yet.
    #[error("relocatable object: it has no image addresses")]
    Relocatable,
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

/// What an ELF file brings. Relocatable objects are described too.
///
/// ```
/// # use windlass_symbol_index::describe;
/// let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
/// assert!(describe(&own).unwrap().unwind);
/// assert!(describe(b"#!/bin/sh").is_err());
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

/// Opens an ELF file whose addresses are image addresses.
pub(crate) fn parse_image(elf: &[u8]) -> Result<File<'_>, ElfError> {
    let file = parse(elf)?;
    if file.kind() == ObjectKind::Relocatable {
        return Err(ElfError::Relocatable);
    }
    Ok(file)
}

/// The image addresses that a section with code takes up, from start to end (exclusive), whether or not
/// the file holds its data.
pub(crate) fn code_range(section: &Section<'_, '_>) -> Option<(u64, u64)> {
    let SectionFlags::Elf { sh_flags, .. } = section.flags() else { return None };
    let is_code = sh_flags.contains(SHF_ALLOC) && sh_flags.contains(SHF_EXECINSTR);
    is_code.then(|| (section.address(), section.address().saturating_add(section.size())))
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
