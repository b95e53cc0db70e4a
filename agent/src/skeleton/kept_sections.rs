//! Which sections have their contents in a skeleton?

use object::LittleEndian as LE;
use object::elf;
use object::read::elf::SectionHeader as _;

use super::{CODE_SECTION, RELOCATION_SECTION, name_of};
use crate::image::SectionHeader;

/// Names of the section of Go's function table.
pub(super) const GO_TABLE: &[u8] = b".gopclntab";
pub(super) const GO_TABLE_OF_PIE: &[u8] = b".data.rel.ro.gopclntab";

/// Types of sections whose contents belong into a skeleton: notes, symbols, and arrays of functions to call.
const KEPT_KINDS: [elf::SectionType; 7] = [
    elf::SHT_NOTE,
    elf::SHT_SYMTAB,
    elf::SHT_DYNSYM,
    elf::SHT_SYMTAB_SHNDX,
    elf::SHT_INIT_ARRAY,
    elf::SHT_FINI_ARRAY,
    elf::SHT_PREINIT_ARRAY,
];

/// Whether the contents of a section belong into a skeleton.
pub(super) fn is_kept(section: &SectionHeader, names: &[u8]) -> bool {
    let kind = section.sh_type(LE);
    if kind == elf::SHT_NOBITS || kind == elf::SHT_NULL {
        return false;
    }
    let name = name_of(section, names);
    KEPT_KINDS.contains(&kind)
        || name.starts_with(b".note")
        || name.starts_with(b".gnu.version")
        || [
            &b".eh_frame"[..],
            b".eh_frame_hdr",
            b".debug_frame",
            b".zdebug_frame",
            GO_TABLE,
            GO_TABLE_OF_PIE,
            CODE_SECTION,
            RELOCATION_SECTION,
            b".dynsym",
            b".dynstr",
            b".symtab",
            b".strtab",
            b".gnu_debuglink",
            b".gnu_debugaltlink",
            b".gnu_debugdata",
        ]
        .contains(&name)
}

/// Whether a section is of the symbol table that is not loaded.
pub(super) fn is_symbols(section: &SectionHeader, names: &[u8]) -> bool {
    [elf::SHT_SYMTAB, elf::SHT_SYMTAB_SHNDX].contains(&section.sh_type(LE))
        || [&b".symtab"[..], b".strtab"].contains(&name_of(section, names))
}
