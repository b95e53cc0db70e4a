//! Where an image keeps the Go linker's function table, and what it is read with.
//!
//! # Why this shape
//! The decoder in [`go`](crate::go) takes bytes and knows nothing of ELF. Which bytes is decided here: the table has a
//! section of its own, of one of two names, or is found by its first bytes where sections have gone; the words
//! that describe the module are data, or are put there by relocations when the image is loaded.

use object::LittleEndian;
use object::elf::{self, Rela64};
use object::read::elf::SectionHeader;
use windlass_schema::Architecture;

use super::{Image, LE, SectionRow};
use crate::go::{GoCode, GoImage, find_table, text_start};

/// A Go function table and what it is read with.
pub(crate) struct GoTable<'a> {
    architecture: Architecture,
    table: &'a [u8],
    text: Option<u64>,
    code: Vec<GoCode<'a>>,
}

impl GoTable<'_> {
    /// As the decoder takes it.
    pub(crate) fn image(&self) -> GoImage<'_> {
        GoImage { architecture: self.architecture, table: self.table, text: self.text, code: &self.code }
    }
}

impl<'a> Image<'a> {
    /// What the Go linker wrote of an image's functions.
    pub(crate) fn go_table(&self) -> Option<GoTable<'a>> {
        // Go's own linker makes images, and its compiler's objects have no such table.
        if self.is_relocatable() {
            return None;
        }
        let by_name =
            self.section_named(b".gopclntab").or_else(|| self.section_named(b".data.rel.ro.gopclntab"));
        let (address, table) = match by_name {
            Some(section) => (section.sh_addr(LE), section.data(LE, self.file).ok()?),
            // Where nothing has a name, by its first bytes.
            None if self.sections.is_empty() => self.loaded_bytes().find_map(|loaded| {
                find_table(loaded.bytes)
                    .map(|at| (loaded.address.wrapping_add(at as u64), &loaded.bytes[at..]))
            })?,
            None => return None,
        };
        if table.is_empty() {
            return None;
        }
        let code = (self.code())
            .filter_map(|(range, bytes)| Some(GoCode { address: range.start, bytes: bytes? }))
            .filter(|code| !code.bytes.is_empty())
            .collect();
        let words = self.loaded_bytes().filter(|loaded| loaded.is_writable).flat_map(|loaded| {
            // Aligned words, as the start of a section need not be.
            let skip = loaded.address.wrapping_neg() as usize % 8;
            let (words, _) = loaded.bytes.get(skip..).unwrap_or_default().as_chunks();
            let addresses = (skip as u64..).step_by(8).map(move |at| loaded.address.wrapping_add(at));
            addresses.zip(words.iter().map(|word| u64::from_le_bytes(*word)))
        });
        let text = text_start(table, address, words.chain(self.relative_relocations()));
        Some(GoTable { architecture: self.architecture, table, text, code })
    }

    /// Addresses, and the words that a dynamic linker puts there before the image's own base is added.
    fn relative_relocations(&self) -> impl Iterator<Item = (u64, u64)> + Clone + '_ {
        let kind = match self.architecture {
            Architecture::X86_64 => elf::R_X86_64_RELATIVE.0,
            Architecture::Aarch64 => elf::R_AARCH64_RELATIVE.0,
        };
        // By name: the linker's own is not listed as dynamic by every version.
        let sections =
            [b".rela".as_slice(), b".rela.dyn"].into_iter().filter_map(|name| self.section_named(name));
        sections.flat_map(move |section| {
            let entries = section.data_as_array::<Rela64<LittleEndian>, _>(LE, self.file).unwrap_or_default();
            let is_relative = move |entry: &&Rela64<LittleEndian>| entry.r_info.get(LE) == u64::from(kind);
            entries
                .iter()
                .filter(is_relative)
                .map(|entry| (entry.r_offset.get(LE), entry.r_addend.get(LE) as u64))
        })
    }

    /// The first section of this name.
    fn section_named(&self, name: &[u8]) -> Option<&'a SectionRow> {
        let is_named =
            |section: &&SectionRow| self.sections.section_name(LE, *section).is_ok_and(|it| it == name);
        self.sections.iter().find(is_named)
    }
}
