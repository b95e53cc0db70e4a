//! What lies at which image address: code, and bytes of the file.
//!
//! # Why this shape
//! Segments say what the running program has, sections say it of files that are not linked or not
//! loaded: relocatable files have no segments, and those of skeletons and split debug files lead to other bytes. So
//! bytes are found by sections, or by segments where there are none; what counts as loaded is the
//! other way round.

use std::ops::Range;

use object::elf;
use object::read::elf::{ProgramHeader, SectionHeader};
use windlass_schema::page::{BLOCK_SHIFT, PAGE_SHIFT};
use windlass_schema::table::MAX_PAGES;

use super::{Image, LE, SectionRow, Segment};

/// Name of the sections in which skeletons have a part of another one's bytes.
const PART_OF_CODE: &[u8] = b".text.without_cfi";

/// What a segment's end is rounded up to when it is mapped.
const MEMORY_PAGE_BYTES: u64 = 4096;

/// Bytes of a file that are loaded.
#[derive(Clone, Copy)]
pub(super) struct Loaded<'a> {
    pub(super) address: u64,
    pub(super) bytes: &'a [u8],
    pub(super) is_writable: bool,
}

impl<'a> Image<'a> {
    /// Finds what is loaded: by segments, or by the sections of a file that has none yet.
    pub(super) fn find_code(&mut self) {
        let mut loaded: Vec<(Range<u64>, bool)> = if self.is_relocatable() {
            self.code().map(|(range, _)| (range, true)).collect()
        } else {
            let loads = self.segments.iter().filter(|segment| segment.p_type(LE) == elf::PT_LOAD);
            let range = |segment: &Segment| {
                let start = segment.p_vaddr(LE);
                start..start.saturating_add(segment.p_memsz(LE))
            };
            loads.map(|load| (range(load), load.p_flags(LE).contains(elf::PF_X))).collect()
        };
        self.first_code = loaded.iter().filter(|(_, is_code)| *is_code).map(|(range, _)| range.start).min();
        loaded.retain(|(range, _)| !range.is_empty());
        loaded.sort_by_key(|(range, _)| range.start);
        self.loaded = loaded.into_iter().map(|(range, _)| range).collect();
    }

    /// Where a section is loaded.
    pub(super) fn address_of(&self, number: object::SectionIndex, section: &SectionRow) -> Option<u64> {
        match &self.layout {
            Some(layout) => layout.address(number),
            None => Some(section.sh_addr(LE)),
        }
    }

    /// The bytes that are loaded of a file that is linked: those of sections, or of segments where there are none.
    pub(super) fn loaded_bytes(&self) -> impl Iterator<Item = Loaded<'a>> + Clone + '_ {
        let sections = self.sections.iter().filter_map(|section| {
            let flags = section.sh_flags(LE);
            let bytes = section.data(LE, self.file).ok()?;
            let is_writable = flags.contains(elf::SHF_WRITE);
            let loaded = Loaded { address: section.sh_addr(LE), bytes, is_writable };
            flags.contains(elf::SHF_ALLOC).then_some(loaded)
        });
        let segments = self.segments.iter().filter(|_| self.sections.is_empty()).filter_map(|segment| {
            let bytes = segment.data(LE, self.file).ok()?;
            let is_writable = segment.p_flags(LE).contains(elf::PF_W);
            let loaded = Loaded { address: segment.p_vaddr(LE), bytes, is_writable };
            (segment.p_type(LE) == elf::PT_LOAD).then_some(loaded)
        });
        sections.chain(segments)
    }

    /// Ranges of code, and their bytes where the file has them: sections, or segments where there are none.
    pub(super) fn code(&self) -> impl Iterator<Item = (Range<u64>, Option<&'a [u8]>)> + '_ {
        let range = |start: u64, len: u64| start..start.saturating_add(len);
        let whole = |range: &Range<u64>, bytes: &'a [u8]| {
            (bytes.len() as u64 == range.end - range.start).then_some(bytes)
        };
        let sections = self.sections.enumerate().filter_map(move |(number, section)| {
            let range = self.code_section(number, section)?;
            let bytes = section.data(LE, self.file).ok().and_then(|bytes| whole(&range, bytes));
            Some((range, bytes))
        });
        let segments = self.segments.iter().filter(|_| self.sections.is_empty()).filter_map(move |segment| {
            let is_code = segment.p_type(LE) == elf::PT_LOAD && segment.p_flags(LE).contains(elf::PF_X);
            let range = range(segment.p_vaddr(LE), segment.p_filesz(LE));
            let bytes = segment.data(LE, self.file).ok().and_then(|bytes| whole(&range, bytes));
            is_code.then_some((range, bytes))
        });
        sections.chain(segments)
    }

    /// Ranges of code: sections, but for those that are a part of another, or segments where there are none.
    pub(super) fn code_sections(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let is_part = |name: &[u8]| name == PART_OF_CODE;
        let sections = self
            .sections
            .enumerate()
            .filter(move |(_, section)| !self.sections.section_name(LE, section).is_ok_and(is_part));
        let sections = sections.filter_map(|(number, section)| self.code_section(number, section));
        let segments = self.code().filter(|_| self.sections.is_empty()).map(|(range, _)| range);
        sections.chain(segments)
    }

    /// Where a section is loaded, if it is code.
    fn code_section(&self, number: object::SectionIndex, section: &SectionRow) -> Option<Range<u64>> {
        let is_code = section.sh_flags(LE).contains(elf::SHF_ALLOC | elf::SHF_EXECINSTR);
        let start = self.address_of(number, section).filter(|_| is_code)?;
        Some(start..start.saturating_add(section.sh_size(LE)))
    }

    /// The 8 bytes of the file that are loaded at `address`: none where a linker or a dynamic linker has a say
    /// in them.
    pub(crate) fn word_at(&self, address: u64) -> Option<u64> {
        if self.is_relocatable() {
            return None;
        }
        let words = self.words.get_or_init(|| {
            let is_final = |loaded: &Loaded<'_>| !(self.is_dynamic && loaded.is_writable);
            let words = self.loaded_bytes().filter(|loaded| !loaded.bytes.is_empty() && is_final(loaded));
            let mut words: Vec<_> = words.map(|loaded| (loaded.address, loaded.bytes)).collect();
            words.sort_by_key(|(start, _)| *start);
            words
        });
        let behind = words.partition_point(|(start, _)| *start <= address);
        let (start, bytes) = words[..behind].last()?;
        let skip = usize::try_from(address - start).ok()?;
        Some(u64::from_le_bytes(*bytes.get(skip..)?.first_chunk()?))
    }

    /// Whether address 0 is loaded as code.
    pub(crate) fn has_code_at_zero(&self) -> bool {
        self.first_code == Some(0)
    }

    /// Whether one table reaches the code at `range`, and it is loaded as far as headers say: a segment ends
    /// with its last page, a section of a relocatable file where it ends. The row that ends the coverage
    /// needs a page of the table as well; it is at the end of `range`, or at that of its block if the
    /// block is overfull.
    pub(crate) fn reaches(&self, range: &Range<u64>) -> bool {
        let first = self.first_code.unwrap_or(0) >> PAGE_SHIFT << PAGE_SHIFT;
        // The last page of the address space ends where no address can say.
        let last_page = u64::MAX >> PAGE_SHIFT << PAGE_SHIFT;
        let reach = first.saturating_add(u64::from(MAX_PAGES) << PAGE_SHIFT).min(last_page);
        let is_in_reach = range.start >= first && range.end < reach - (1 << BLOCK_SHIFT);
        is_in_reach && self.loads(range)
    }

    /// Whether headers say that all of `range` is loaded, or say nothing at all.
    fn loads(&self, range: &Range<u64>) -> bool {
        if self.loaded.is_empty() {
            return !self.is_relocatable();
        }
        // Loadable segments do not overlap (gABI, chapter 5): only the last that begins before it can hold it.
        let behind = self.loaded.partition_point(|load| load.start <= range.start);
        let slack = if self.is_relocatable() { 0 } else { MEMORY_PAGE_BYTES - 1 };
        self.loaded[..behind]
            .last()
            .is_some_and(|load| load.contains(&range.start) && range.end <= load.end.saturating_add(slack))
    }
}

#[cfg(test)]
mod tests {
    use windlass_schema::Architecture;

    use super::*;

    /// Where the reach of an image with code at `first` ends, which `end` is just short of or at.
    #[track_caller]
    fn check_reach(first: u64, end: u64) {
        let image = Image { first_code: Some(first), ..Image::new(&[], Architecture::X86_64) };
        assert!(image.reaches(&(first..end - 1)), "{first:#x}..{end:#x}");
        assert!(!image.reaches(&(first..end)), "{first:#x}..{end:#x}");
    }

    #[test]
    fn the_row_behind_the_last_fde_has_a_page() {
        check_reach(0, (1 << 32) - 256);
        check_reach(0x40_0123, 0x40_0000 + (1 << 32) - 256);
        // The kernel's half: the last page of the address space is out of reach.
        check_reach(0xffff_ffff_8000_0000, 0xffff_ffff_fffe_ff00);
    }
}
