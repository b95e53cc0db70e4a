//! Where code is in a file that is not linked, and what relocations make of its DWARF.
//!
//! # Why this shape
//! Kernel modules are relocatable files (`ET_REL`): their sections have no addresses, and each address in their DWARF
//! is zero until the kernel's loader or a linker fills it in. perf and elfutils place sections one behind the
//! other, as no loader does, and need to be told where each was loaded. Here code is placed by the name of
//! its section ([`kernel_module`]), so that an address has one form on every host, and everybody
//! comes to it alone. (A table of such a file has the layout of elfutils; no stack is walked by those.)
//!
//! Relocations are applied to decompressed copies of the sections that are read. What refers to a section without
//! a place, or to what is not in the file, gets an address beyond all that an index holds, so
//! that it names nothing.
//!
//! Sources: System V gABI, chapter 4 (relocation); AMD64 psABI 1.0, 4.4.1; ELF for the Arm 64-bit Architecture, 5.7.

use std::collections::HashMap;

use object::{
    File, Object, ObjectKind, ObjectSection, ObjectSymbol, RelocationKind, RelocationTarget, SectionIndex,
    SymbolIndex,
};
use windlass_schema::kernel_module::{self, SECTION_SPAN};

use crate::elf;
use crate::range::Range;

/// Where everything is that has no place: farther from any base than the 4 GiB that a SymCache reaches, and as far
/// from the end of all addresses.
const NOWHERE: u64 = 1 << 62;

/// Bytes of the smallest field that is filled in.
const SMALLEST_FIELD_BYTES: usize = 4;

/// Image addresses of the sections of a file.
pub(crate) enum Placement {
    /// As its headers have them.
    Linked,
    /// By name: sections with code of a relocatable file.
    ByName(HashMap<SectionIndex, u64>),
}

impl Placement {
    pub(crate) fn of(file: &File<'_>) -> Self {
        if file.kind() != ObjectKind::Relocatable {
            return Self::Linked;
        }
        let mut starts: HashMap<SectionIndex, u64> = HashMap::new();
        let mut claimed: HashMap<u64, SectionIndex> = HashMap::new();
        for section in file.sections().filter(elf::is_code) {
            let start = section.name().ok().and_then(kernel_module::section_start);
            let Some(start) = start.filter(|_| section.size() <= SECTION_SPAN) else { continue };
            // Of several sections of one name nobody knows which is meant.
            match claimed.insert(start, section.index()) {
                None => starts.insert(section.index(), start),
                Some(other) => starts.remove(&other),
            };
        }
        Self::ByName(starts)
    }

    /// What is to be added to addresses in a section, if it has a place.
    pub(crate) fn bias(&self, section: SectionIndex) -> Option<u64> {
        match self {
            Self::Linked => Some(0),
            Self::ByName(starts) => starts.get(&section).copied(),
        }
    }

    /// The image addresses of each section with code that has a place, from start to end (exclusive), whether or not
    /// the file holds its data.
    pub(crate) fn code(&self, file: &File<'_>) -> Vec<(SectionIndex, Range)> {
        let code = file.sections().filter(elf::is_code);
        code.filter_map(|section| {
            let start = section.address().checked_add(self.bias(section.index())?)?;
            Some((section.index(), (start, start.saturating_add(section.size()))))
        })
        .collect()
    }
}

/// Fills in the fields of `data`, which is the decompressed `section`; `false` if there is one that cannot be.
pub(crate) fn relocate(
    file: &File<'_>,
    placement: &Placement,
    section: &object::Section<'_, '_>,
    data: &mut [u8],
) -> bool {
    let mut complete = true;
    // Each fills a field of its own. Headers can name the same list any number of times.
    for (offset, relocation) in section.relocations().take(data.len() / SMALLEST_FIELD_BYTES) {
        if relocation.kind() == RelocationKind::None {
            continue;
        }
        let field = usize::try_from(offset).ok().and_then(|start| {
            let bytes = usize::from(relocation.size() / 8);
            data.get_mut(start..start.checked_add(bytes)?)
        });
        let is_known = relocation.kind() == RelocationKind::Absolute && !relocation.has_implicit_addend();
        let (Some(field), true) = (field, is_known) else {
            complete = false;
            continue;
        };
        let target = match relocation.target() {
            RelocationTarget::Symbol(symbol) => target(file, placement, symbol),
            _ => None,
        };
        let value = target.unwrap_or(NOWHERE).wrapping_add_signed(relocation.addend());
        complete &= write(field, value, file.is_little_endian());
    }
    complete
}

/// The address of a symbol in code, the offset of one in DWARF.
fn target(file: &File<'_>, placement: &Placement, symbol: SymbolIndex) -> Option<u64> {
    let symbol = file.symbol_by_index(symbol).ok()?;
    let section = file.section_by_index(symbol.section_index()?).ok()?;
    let start = match elf::is_loaded(&section) {
        true => placement.bias(section.index())?,
        false => 0,
    };
    start.checked_add(symbol.address())
}

/// Writes `value` into a field of 4 or 8 bytes; `false` if it does not fit there.
fn write(field: &mut [u8], value: u64, little_endian: bool) -> bool {
    let bytes = if little_endian { value.to_le_bytes() } else { value.to_be_bytes() };
    match (field.len(), u32::try_from(value)) {
        (8, _) => field.copy_from_slice(&bytes),
        (4, Ok(_)) if little_endian => field.copy_from_slice(&bytes[..4]),
        (4, Ok(_)) => field.copy_from_slice(&bytes[4..]),
        _ => return false,
    }
    true
}
