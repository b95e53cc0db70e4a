//! Writes one page; the format is that of [`crate::page`].

use crate::page::{
    BLOCK_SHIFT, GROUP_BLOCKS, GROUP_SHIFT, MAX_NARROW_COUNT, NINTH_BITS, PageLayout, WIDE_COUNTS,
    WIDE_RECORDS,
};

/// Record numbers that a byte tells apart, and nine bits.
const NARROW_RECORDS: usize = 256;
const NINE_BIT_RECORDS: usize = 512;
/// Blocks of a page.
const PAGE_BLOCKS: usize = 256;

/// An entry of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageEntry {
    /// Offset in the page.
    pub offset: u16,
    /// Number of its record in the dictionary.
    pub record: u16,
}

/// Writes pages, one after the other.
pub struct PageWriter {
    /// For each record, the number of the last page that uses it, counted from 1.
    used_in: Vec<u32>,
    /// For each record, its number in the page.
    numbers: Vec<u16>,
    page: u32,
    /// Records that the page uses, sorted.
    used: Vec<u16>,
}

impl PageWriter {
    /// Pages with a dictionary of so many records.
    pub fn new(records: usize) -> Self {
        Self { used_in: vec![0; records], numbers: vec![0; records], page: 0, used: Vec::new() }
    }

    /// Appends the page with these entries: at least one, at most as many as `density` lets through, in the
    /// order of their offsets.
    pub fn write(&mut self, entries: &[PageEntry], page: &mut Vec<u8>) {
        let group = |entry: &PageEntry| u32::from(entry.offset) >> GROUP_SHIFT;
        let first_group = group(&entries[0]);
        let groups = group(&entries[entries.len() - 1]) - first_group + 1;
        let mut counts = [0u8; PAGE_BLOCKS];
        for entry in entries {
            counts[usize::from(entry.offset) >> BLOCK_SHIFT] += 1;
        }
        let counts = &counts[(GROUP_BLOCKS * first_group) as usize..][..(GROUP_BLOCKS * groups) as usize];
        let is_wide = counts.iter().any(|count| usize::from(*count) > MAX_NARROW_COUNT);
        self.collect_used(entries);
        let counts_flag = if is_wide { WIDE_COUNTS } else { 0 };
        let narrow = split_numbers(&self.used, NARROW_RECORDS).map(|split| (0, split));
        let nine = || split_numbers(&self.used, NINE_BIT_RECORDS).map(|split| (NINTH_BITS, split));
        let (numbers_flag, (common, locals_from)) =
            narrow.or_else(nine).unwrap_or((WIDE_RECORDS, (0, self.used.len())));
        let flags = counts_flag | numbers_flag;
        let locals = &self.used[locals_from..];
        let layout = PageLayout::new(
            flags,
            first_group,
            groups,
            locals.len() as u32,
            entries.len() as u32,
            common as u32,
        );

        let start = page.len();
        page.extend([flags, first_group as u8, groups as u8, locals.len() as u8]);
        page.extend((entries.len() as u16).to_le_bytes());
        page.extend([common as u8, (locals.len() >> 8) as u8]);
        if is_wide {
            page.extend_from_slice(counts);
        } else {
            page.extend(counts.chunks_exact(2).map(|pair| pair[0] | pair[1] << 4));
        }
        let mut before = 0u16;
        for counts in counts.chunks_exact(GROUP_BLOCKS as usize) {
            page.extend(before.to_le_bytes());
            before += counts.iter().map(|count| u16::from(*count)).sum::<u16>();
        }
        page.extend(locals.iter().flat_map(|number| number.to_le_bytes()));
        if flags & WIDE_RECORDS != 0 {
            page.extend(entries.iter().flat_map(|entry| entry.record.to_le_bytes()));
        }
        page.extend(entries.iter().map(|entry| entry.offset as u8));
        if flags & WIDE_RECORDS == 0 {
            for (number, record) in (common as u16..).zip(locals) {
                self.numbers[usize::from(*record)] = number;
            }
            let numbers = &self.numbers;
            let number = |entry: &PageEntry| match entry.record {
                record if usize::from(record) < common => record,
                record => numbers[usize::from(record)],
            };
            page.extend(entries.iter().map(|entry| number(entry) as u8));
            if flags & NINTH_BITS != 0 {
                let bit = |entry: &PageEntry| (number(entry) >> 8) as u8;
                let byte = |entries: &[PageEntry]| {
                    (0..).zip(entries).map(|(at, entry)| bit(entry) << at).sum::<u8>()
                };
                page.extend(entries.chunks(8).map(byte));
            }
        }
        debug_assert_eq!(page.len() - start, layout.end as usize);
    }

    fn collect_used(&mut self, entries: &[PageEntry]) {
        self.page += 1;
        self.used.clear();
        for entry in entries {
            let used_in = &mut self.used_in[usize::from(entry.record)];
            if *used_in != self.page {
                *used_in = self.page;
                self.used.push(entry.record);
            }
        }
        self.used.sort_unstable();
    }
}

/// How many of the dictionary's first numbers to take as they are, and where among the numbers in use, which
/// are sorted, those begin that a page names itself. `None` if the page uses more than `most`.
fn split_numbers(used: &[u16], most: usize) -> Option<(usize, usize)> {
    // One more common number saves one local at most, so their sum never falls: the most that fit are best.
    let mut locals_from = used.len();
    for common in (0..=usize::from(u8::MAX)).rev() {
        while locals_from > 0 && usize::from(used[locals_from - 1]) >= common {
            locals_from -= 1;
        }
        let locals = used.len() - locals_from;
        if common + locals <= most {
            return Some((common, locals_from));
        }
    }
    None
}
