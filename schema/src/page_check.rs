//! Whether a page is as [`page`](crate::page) says: everything that lookups rely on.
//!
//! A table is checked on each way between programs, so it should cost little: what entries have in common is checked
//! once, and what is left for each is a comparison that compilers make sixteen of at a time.

use crate::page::{
    GROUP_BLOCKS, MAX_BLOCK_ENTRIES, NINTH_BITS, PageBytes as _, PageLayout, WIDE_COUNTS, WIDE_RECORDS,
};
use crate::record::Record;
use crate::table::{MAX_PAGE_BYTES, MAX_RECORDS};

/// Record numbers that nine bits tell apart.
const NUMBERS: usize = 512;

/// Checks the page at the start of `bytes`, given what holds of the dictionary's records; gives its size.
pub(crate) fn check_page(bytes: &[u8], limits: &Limits) -> Result<u32, &'static str> {
    let layout = PageLayout::read(&bytes);
    if layout.end > MAX_PAGE_BYTES {
        return Err("longer than a page may be");
    }
    let Some(page) = bytes.get(..layout.end as usize) else {
        return Err("longer than the page area");
    };
    let forms = layout.flags & (WIDE_RECORDS | NINTH_BITS);
    if layout.flags & !(WIDE_COUNTS | WIDE_RECORDS | NINTH_BITS) != 0 || forms == WIDE_RECORDS | NINTH_BITS {
        return Err("flags that no page has");
    }
    if layout.groups == 0 || layout.first_group + layout.groups > 256 / GROUP_BLOCKS || layout.entries == 0 {
        return Err("counts out of range");
    }
    check_index(page, &layout)?;
    if forms == WIDE_RECORDS {
        check_wide_records(page, &layout, limits)?;
    } else {
        check_records(page, &layout, limits)?;
    }
    Ok(layout.end)
}

/// The low bytes of all entries.
fn low_bytes<'a>(page: &'a [u8], layout: &PageLayout) -> &'a [u8] {
    &page[layout.low_bytes_at as usize..][..layout.entries as usize]
}

/// Checks that blocks divide the entries, and that entries ascend in each.
fn check_index(page: &[u8], layout: &PageLayout) -> Result<(), &'static str> {
    let low = low_bytes(page, layout);
    let is_descent = |at: usize| low[at - 1] >= low[at];
    let mut between_blocks = 0;
    let mut next = 0;
    for block in 0..GROUP_BLOCKS * layout.groups {
        let (start, end) = layout.block(&page, block);
        if start != next || end < start || (end - start) as usize > MAX_BLOCK_ENTRIES {
            return Err("index out of order");
        }
        if end > layout.entries {
            return Err("index beyond the entries");
        }
        if start != 0 && start != end {
            between_blocks += usize::from(is_descent(start as usize));
        }
        next = end;
    }
    if next != layout.entries {
        return Err("entries behind the index");
    }
    // Where entries do not ascend, another block begins.
    let descents: usize = low.iter().zip(&low[1..]).map(|(a, b)| usize::from(a >= b)).sum();
    if descents != between_blocks {
        return Err("entries out of order");
    }
    Ok(())
}

/// Checks entries with dictionary numbers.
fn check_wide_records(page: &[u8], layout: &PageLayout, limits: &Limits) -> Result<(), &'static str> {
    for (entry, low) in (0..).zip(low_bytes(page, layout)) {
        limits.check(layout.dictionary_number(&page, entry, entry), *low)?;
    }
    Ok(())
}

/// Checks entries with the page's own numbers.
fn check_records(page: &[u8], layout: &PageLayout, limits: &Limits) -> Result<(), &'static str> {
    // The highest low byte of each number's entries; below any for one that is no record's.
    let mut highest = [-1i16; NUMBERS];
    for (number, highest) in (0..layout.common).zip(&mut highest) {
        *highest = limits.of(number).unwrap_or(-1);
    }
    for local in 0..layout.locals {
        let number = u32::from(page.half(layout.locals_at + 2 * local));
        let limit = limits.of(number).ok_or("record number beyond the dictionary")?;
        if let Some(highest) = highest.get_mut((layout.common + local) as usize) {
            *highest = limit;
        }
    }
    let mut is_beyond = false;
    for (entry, low) in (0..).zip(low_bytes(page, layout)) {
        let number = layout.record_number(&page, entry, entry) as usize % NUMBERS;
        is_beyond |= i16::from(*low) > highest[number];
    }
    if !is_beyond {
        return Ok(());
    }
    // Something is wrong: what, is seen one by one.
    for (entry, low) in (0..).zip(low_bytes(page, layout)) {
        if layout.record_number(&page, entry, entry) >= layout.common + layout.locals {
            return Err("record number without a local");
        }
        limits.check(layout.dictionary_number(&page, entry, entry), *low)?;
    }
    Ok(())
}

/// For each record, the highest low byte of an entry that has it: its changes have to stay in the entry's block.
pub(crate) struct Limits {
    highest: [u8; MAX_RECORDS as usize],
    records: usize,
}

impl Limits {
    /// Of a dictionary's bytes: of at most as many records as a table may have.
    pub(crate) fn of_dictionary(dictionary: &[u8]) -> Self {
        let mut limits = Self { highest: [0; MAX_RECORDS as usize], records: 0 };
        for (bytes, highest) in dictionary.as_chunks().0.iter().zip(&mut limits.highest) {
            *highest = (0xff - Record(u64::from_le_bytes(*bytes)).last_change()) as u8;
            limits.records += 1;
        }
        limits
    }

    /// That of a record; `None` if it is not in the dictionary.
    fn of(&self, number: u32) -> Option<i16> {
        self.highest[..self.records].get(number as usize).map(|highest| i16::from(*highest))
    }

    /// Checks an entry with this low byte.
    fn check(&self, number: u32, low: u8) -> Result<(), &'static str> {
        match self.of(number) {
            None => Err("record number beyond the dictionary"),
            Some(highest) if i16::from(low) > highest => Err("a run that leaves its block"),
            Some(_) => Ok(()),
        }
    }
}
