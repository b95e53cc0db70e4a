//! Writes a table file from its entries; the format is that of [`crate::table`].
//!
//! The same rows give the same bytes: records are numbered by how many pages use them, those of most pages first, of which
//! those that most entries have, of which the least; each page is written as [`crate::page_writer`] says.

use std::ops::RangeInclusive;

use crate::page::{PAGE_CODE_BYTES, PAGE_SHIFT};
pub use crate::page_writer::PageEntry;
use crate::page_writer::PageWriter;
use crate::record::Record;
use crate::table::{HEADER_BYTES, MAGIC, NO_PAGE, VERSION, checksum};
use crate::{Architecture, BuildId, ImageAddress};

/// What a table's header says that does not follow from its entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableHeader {
    /// Instruction set of the image.
    pub architecture: Architecture,
    /// The image.
    pub build_id: BuildId,
    /// Image address that entries count from; a multiple of a page's size.
    pub base: ImageAddress,
    /// Rows that the table states.
    pub rows: u32,
}

/// An entry of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableEntry {
    /// Bytes from the base.
    pub offset: u32,
    /// Number of its record in the dictionary.
    pub record: u16,
}

/// Numbers the records as tables do, in their entries too. Each must be in use.
pub fn number_records(records: &mut Vec<Record>, entries: &mut [TableEntry]) {
    let mut uses = vec![(0u32, 0u32, u32::MAX); records.len()];
    for entry in &*entries {
        let (pages, entries, last) = &mut uses[usize::from(entry.record)];
        let page = entry.offset >> PAGE_SHIFT;
        *pages += u32::from(page != *last);
        *entries += 1;
        *last = page;
    }
    let mut order: Vec<usize> = (0..records.len()).collect();
    order.sort_unstable_by_key(|number| {
        let (pages, entries, _) = uses[*number];
        (std::cmp::Reverse(pages), std::cmp::Reverse(entries), records[*number])
    });
    let mut numbers = vec![0; records.len()];
    for (new, old) in (0..).zip(&order) {
        numbers[*old] = new;
    }
    for entry in entries {
        entry.record = numbers[usize::from(entry.record)];
    }
    *records = order.into_iter().map(|number| records[number]).collect();
}

/// The file with these records and entries, which are in the order of their offsets. Pages of the directory
/// begin at that of the first entry. What the format has no room for (see [`crate::page`]) must not be in it.
pub fn write_table(header: &TableHeader, records: &[Record], entries: &[TableEntry]) -> Vec<u8> {
    let page = |entry: &TableEntry| entry.offset >> PAGE_SHIFT;
    let pages = entries.first().zip(entries.last()).map(|(first, last)| page(first)..=page(last));
    let mut writer = TableWriter::new(header, records, pages, entries.len());
    let mut of_page = Vec::new();
    for entries in entries.chunk_by(|a, b| page(a) == page(b)) {
        of_page.clear();
        of_page.extend(entries.iter().map(|entry| PageEntry {
            offset: (entry.offset % PAGE_CODE_BYTES as u32) as u16,
            record: entry.record,
        }));
        writer.page(page(&entries[0]), &of_page);
    }
    writer.finish()
}

/// A table file in the making: one page after the other.
pub struct TableWriter {
    file: Vec<u8>,
    first_page: u32,
    directory_at: usize,
    pages_at: usize,
    writer: PageWriter,
}

impl TableWriter {
    /// The file with these records and pages, numbered from the base of `header`, of about so many entries.
    pub fn new(
        header: &TableHeader,
        records: &[Record],
        pages: Option<RangeInclusive<u32>>,
        expected_entries: usize,
    ) -> Self {
        let first_page = pages.as_ref().map_or(0, |pages| *pages.start());
        let page_count = pages.map_or(0, |pages| pages.end() - pages.start() + 1);
        let base = header.base.get().wrapping_add(u64::from(first_page) << PAGE_SHIFT);
        let directory_at = HEADER_BYTES + 8 * records.len();
        let pages_at = directory_at + 4 * page_count.next_multiple_of(2) as usize;

        let mut file = Vec::with_capacity(pages_at + expected_entries * 5 / 2);
        file.extend(MAGIC);
        file.extend(VERSION.to_le_bytes());
        file.extend([header.architecture as u8, 0]);
        file.extend([0; 8]);
        file.extend(base.to_le_bytes());
        file.extend([page_count, records.len() as u32, 0, header.rows].map(u32::to_le_bytes).as_flattened());
        file.push(header.build_id.as_bytes().len() as u8);
        file.extend(header.build_id.as_bytes());
        file.resize(HEADER_BYTES, 0);
        file.extend(records.iter().flat_map(|record| record.0.to_le_bytes()));
        file.resize(directory_at + 4 * page_count as usize, NO_PAGE as u8);
        file.resize(pages_at, 0);
        Self { file, first_page, directory_at, pages_at, writer: PageWriter::new(records.len()) }
    }

    /// Writes the page of this number: at least one entry, in the order of their offsets. Pages come in the order of
    /// their numbers.
    pub fn page(&mut self, number: u32, entries: &[PageEntry]) {
        let offset = ((self.file.len() - self.pages_at) / 8) as u32;
        let at = self.directory_at + 4 * (number - self.first_page) as usize;
        self.file[at..at + 4].copy_from_slice(&offset.to_le_bytes());
        self.writer.write(entries, &mut self.file);
        self.file.resize(self.file.len().next_multiple_of(8), 0);
    }

    /// The whole file.
    pub fn finish(mut self) -> Vec<u8> {
        let page_bytes = (self.file.len() - self.pages_at) as u32;
        self.file[PAGE_BYTES_AT..PAGE_BYTES_AT + 4].copy_from_slice(&page_bytes.to_le_bytes());
        let sum = checksum(&self.file);
        self.file[CHECKSUM_AT..CHECKSUM_AT + 8].copy_from_slice(&sum.to_le_bytes());
        self.file
    }
}

/// Where a header has its checksum and the size of all pages.
const CHECKSUM_AT: usize = 8;
const PAGE_BYTES_AT: usize = 32;

/// Each byte of [`NO_PAGE`] is the same.
const _: () = assert!(NO_PAGE == u32::from_le_bytes([NO_PAGE as u8; 4]));
