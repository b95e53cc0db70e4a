//! Writes a table file from its entries; the format is that of [`crate::table`].
//!
//! The same rows give the same bytes: records are numbered by how many pages use them, those of most pages first, of which
//! those that most entries have, of which the least; each page is written as [`crate::page_writer`] says.

use crate::page::{PAGE_CODE_BYTES, PAGE_SHIFT};
use crate::page_writer::{PageEntry, PageWriter};
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
    let page = |offset: u32| offset >> PAGE_SHIFT;
    let first = entries.first().map_or(0, |first| page(first.offset));
    let pages = entries.last().map_or(0, |last| page(last.offset) - first + 1) as usize;
    let base = header.base.get().wrapping_add(u64::from(first) << PAGE_SHIFT);
    let directory_at = HEADER_BYTES + 8 * records.len();
    let pages_at = directory_at + 4 * pages.next_multiple_of(2);

    let mut file = Vec::with_capacity(pages_at + entries.len() * 5 / 2);
    file.extend(MAGIC);
    file.extend(VERSION.to_le_bytes());
    file.extend([header.architecture as u8, 0]);
    file.extend([0; 8]);
    file.extend(base.to_le_bytes());
    file.resize(40, 0);
    file.push(header.build_id.as_bytes().len() as u8);
    file.extend(header.build_id.as_bytes());
    file.resize(HEADER_BYTES, 0);
    file.extend(records.iter().flat_map(|record| record.0.to_le_bytes()));
    file.resize(pages_at, 0);

    let mut directory = vec![NO_PAGE; pages];
    let mut writer = PageWriter::default();
    let mut of_page = Vec::new();
    for entries in entries.chunk_by(|a, b| page(a.offset) == page(b.offset)) {
        of_page.clear();
        of_page.extend(entries.iter().map(|entry| PageEntry {
            offset: (entry.offset % PAGE_CODE_BYTES as u32) as u16,
            record: entry.record,
        }));
        directory[(page(entries[0].offset) - first) as usize] = ((file.len() - pages_at) / 8) as u32;
        writer.write(&of_page, &mut file);
        file.resize(file.len().next_multiple_of(8), 0);
    }
    for (at, offset) in directory.iter().enumerate() {
        file[directory_at + 4 * at..][..4].copy_from_slice(&offset.to_le_bytes());
    }
    let page_bytes = file.len() - pages_at;
    let fields = [pages as u32, records.len() as u32, page_bytes as u32, header.rows];
    for (at, field) in fields.iter().enumerate() {
        file[24 + 4 * at..][..4].copy_from_slice(&field.to_le_bytes());
    }
    let sum = checksum(&file);
    file[8..16].copy_from_slice(&sum.to_le_bytes());
    file
}
