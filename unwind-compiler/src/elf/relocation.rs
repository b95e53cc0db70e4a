//! Where the sections of a relocatable file are, and what relocations make of its call frame information.
//!
//! # Why this shape
//! Kernel modules and object files are relocatable (`ET_REL`): their sections have no addresses, and fields of
//! their call frame information are zero until a linker fills them in. Unwinders that read such a file as
//! it is find all functions at one address, so most leave it out. Here sections are laid out as elfutils does
//! for a file that is not loaded (libdwfl, `dwfl_report_offline`): those with `SHF_ALLOC` one behind the
//! other in the order of their headers from address 0, each at the next multiple of its `sh_addralign`. That
//! is the image address space of such a file for its table. A file and its split debug file have the same section
//! headers, so the same layout. Names go by another, in which a section's place is known by its name alone
//! (`windlass_schema::kernel_module`): who samples a module has no headers, and no stack in a module is walked by tables.
//!
//! Linkers stop at the first relocation they cannot apply. Here it costs the entry that it lies in, which
//! is made unreadable, because with a field unfilled it would be read as something else; and so does a
//! relocation that is missing where the address of a function belongs.
//!
//! Sources: System V gABI, chapter 4 (relocation); AMD64 psABI 1.0, 4.4.1; ELF for the Arm 64-bit
//! Architecture, 5.7.

use std::ops::Range;
use std::rc::Rc;

use object::elf::{self, Rela64};
use object::read::SectionIndex;
use object::read::elf::{SectionHeader, Sym};
use object::{LittleEndian, SymbolIndex};
use windlass_schema::Architecture;

use super::{LE, SectionKind, Sections, Symbols};
use crate::cursor::Cursor;

type Rela = Rela64<LittleEndian>;

/// Image addresses of the sections of a relocatable file, by section number.
pub(super) struct Layout {
    /// `None` for sections that are not loaded, or not within 64 bits.
    addresses: Vec<Option<u64>>,
}

impl Layout {
    pub(super) fn of(sections: &Sections<'_>) -> Self {
        let mut end = Some(0u64);
        let addresses = sections.iter().map(|section| {
            if !section.sh_flags(LE).contains(elf::SHF_ALLOC) {
                return None;
            }
            let start = end?.checked_next_multiple_of(section.sh_addralign(LE).max(1));
            end = start.and_then(|start| start.checked_add(section.sh_size(LE)));
            end.and(start)
        });
        Self { addresses: addresses.collect() }
    }

    /// Where a section is.
    pub(super) fn address(&self, section: SectionIndex) -> Option<u64> {
        self.addresses.get(section.0).copied().flatten()
    }
}

/// The relocations of one section.
pub(super) struct Relocations<'a> {
    pub(super) architecture: Architecture,
    pub(super) layout: Rc<Layout>,
    /// Number of the section that is relocated.
    pub(super) section: SectionIndex,
    pub(super) entries: &'a [Rela],
    pub(super) symbols: Symbols<'a>,
}

/// Why a field cannot be filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// What it refers to is in another file, was discarded, or is not loaded.
    Unresolved,
    /// The type is not known, or the value does not fit.
    Malformed,
}

/// A value and how many bytes it takes.
type Field = (u64, usize);

impl<'a> Relocations<'a> {
    /// Those for section `target`: none if there are several sections of them, which no assembler writes.
    pub(super) fn of(
        architecture: Architecture,
        layout: Rc<Layout>,
        (file, sections): (&'a [u8], &Sections<'a>),
        target: SectionIndex,
    ) -> Self {
        let mut found = sections.iter().filter(|section| {
            section.sh_type(LE) == elf::SHT_RELA && usize::try_from(section.sh_info(LE)) == Ok(target.0)
        });
        let only = found.next().filter(|_| found.next().is_none());
        let entries = only.and_then(|section| section.rela(LE, file).ok().flatten());
        let (entries, symbols) = entries.unwrap_or((&[], SectionIndex(0)));
        let symbols = sections.symbol_table_by_index(LE, file, symbols).unwrap_or_default();
        Self { architecture, layout, section: target, entries, symbols }
    }

    /// Fills in the fields of a section that is at `address`. Entries with a field that cannot be filled
    /// come out unreadable.
    pub(super) fn apply(&self, kind: SectionKind, address: u64, data: &mut [u8]) {
        let mut relocations: Vec<&Rela> = self.entries.iter().collect();
        relocations.sort_by_key(|relocation| relocation.r_offset.get(LE));
        let mut rest = &relocations[..];
        let mut at = 0;
        while let Some(place) = place_at(data, at) {
            let Some(entry) = Entry::of(kind, data, &place) else {
                at = place.end;
                continue;
            };
            let index_of = |at: usize| rest.partition_point(|it| it.r_offset.get(LE) < at as u64);
            let here = &rest[index_of(place.start)..index_of(place.end)];
            rest = &rest[index_of(place.end)..];
            if !self.fill(&entry, here, address, data) {
                entry.spoil(data);
            }
            at = place.end;
        }
    }

    /// Fills in the fields of one entry; `false` if one that matters cannot be.
    fn fill(&self, entry: &Entry, relocations: &[&Rela], address: u64, data: &mut [u8]) -> bool {
        let mut filled_to = entry.body;
        let mut has_address = entry.is_cie;
        for relocation in relocations {
            // Sorted, and before the end of the entry.
            let at = relocation.r_offset.get(LE) as usize;
            let (value, len) = match self.value(relocation, address.wrapping_add(at as u64)) {
                Ok(field) => field,
                // A personality routine, which no walk needs, is in another file as a rule.
                Err(Fault::Unresolved) if entry.is_cie => continue,
                Err(_) => return false,
            };
            if at < filled_to || at + len > entry.end {
                return false;
            }
            data[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
            filled_to = at + len;
            has_address |= at == entry.function;
        }
        has_address
    }

    /// What a relocation makes of the field at address `place`.
    fn value(&self, relocation: &Rela, place: u64) -> Result<Field, Fault> {
        use elf::*;
        let value = || {
            let symbol = self.symbol(relocation.r_sym(LE, false)).ok_or(Fault::Unresolved)?;
            Ok(symbol.wrapping_add_signed(relocation.r_addend.get(LE)))
        };
        let fits = |value: u64, range: Range<i64>| {
            range.contains(&(value as i64)).then_some((value, 4)).ok_or(Fault::Malformed)
        };
        let signed = i64::from(i32::MIN)..1 << 31;
        let distance = || value().map(|value| value.wrapping_sub(place));
        match (self.architecture, relocation.r_type(LE, false)) {
            (Architecture::X86_64, R_X86_64_NONE) | (Architecture::Aarch64, R_AARCH64_NONE) => {
                Err(Fault::Unresolved)
            }
            (Architecture::X86_64, R_X86_64_64) | (Architecture::Aarch64, R_AARCH64_ABS64) => {
                Ok((value()?, 8))
            }
            (Architecture::X86_64, R_X86_64_PC64) | (Architecture::Aarch64, R_AARCH64_PREL64) => {
                Ok((distance()?, 8))
            }
            (Architecture::X86_64, R_X86_64_32) => fits(value()?, 0..1 << 32),
            (Architecture::X86_64, R_X86_64_32S) => fits(value()?, signed),
            // A function of this file needs no entry of a PLT.
            (Architecture::X86_64, R_X86_64_PC32 | R_X86_64_PLT32)
            | (Architecture::Aarch64, R_AARCH64_PREL32) => fits(distance()?, signed),
            (Architecture::Aarch64, R_AARCH64_ABS32) => fits(value()?, signed.start..1 << 32),
            _ => Err(Fault::Malformed),
        }
    }

    /// The address of a symbol, if it is of a section that is loaded or of the one that is relocated.
    fn symbol(&self, number: u32) -> Option<u64> {
        let index = SymbolIndex(usize::try_from(number).ok()?);
        let symbol = self.symbols.symbol(index).ok()?;
        let section = self.symbols.symbol_section(LE, symbol, index).ok()??;
        let address = match self.layout.address(section) {
            // `.debug_frame` says where a CIE is by its offset.
            None if section == self.section => 0,
            address => address?,
        };
        address.checked_add(symbol.st_value(LE))
    }
}

/// Where an entry is: its length field, what follows that, and its end.
struct Place {
    start: usize,
    body: usize,
    end: usize,
}

/// The entry whose length field is at `at`. A terminator is one without a body.
fn place_at(data: &[u8], at: usize) -> Option<Place> {
    let mut cursor = Cursor::new(data, at);
    let length = match cursor.u32()? {
        0xffff_ffff => cursor.u64()?,
        length => length.into(),
    };
    let body = cursor.position();
    cursor.take(length)?;
    Some(Place { start: at, body, end: cursor.position() })
}

/// What of an entry relocations and their failures touch.
struct Entry {
    kind: SectionKind,
    is_cie: bool,
    body: usize,
    end: usize,
    /// Where the address of the function is.
    function: usize,
}

impl Entry {
    /// `None` for a terminator or what is too short to be an entry.
    fn of(kind: SectionKind, data: &[u8], place: &Place) -> Option<Self> {
        let mut cursor = Cursor::new(&data[..place.end], place.body);
        let is_64_bit = place.body - place.start > 4;
        let is_cie = match kind {
            SectionKind::EhFrame => cursor.u32()? == 0,
            SectionKind::DebugFrame if is_64_bit => cursor.u64()? == u64::MAX,
            SectionKind::DebugFrame => cursor.u32()? == u32::MAX,
        };
        Some(Self { kind, is_cie, body: place.body, end: place.end, function: cursor.position() })
    }

    /// Makes the entry one that every reader refuses: an FDE names a CIE that cannot be, a CIE a version that is
    /// none.
    fn spoil(&self, data: &mut [u8]) {
        if self.is_cie {
            if let Some(version) = data[..self.end].get_mut(self.function) {
                *version = NO_VERSION;
            }
            return;
        }
        let nowhere = match self.kind {
            // More than the distance back to the section's first byte.
            SectionKind::EhFrame => u64::MAX,
            SectionKind::DebugFrame => data.len() as u64,
        };
        let pointer = &mut data[self.body..self.function];
        pointer.copy_from_slice(&nowhere.to_le_bytes()[..pointer.len()]);
    }
}

/// A version that no CIE has: they are 1 to 4.
const NO_VERSION: u8 = 0xff;
