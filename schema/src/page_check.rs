//! Whether a page is as [`page`](crate::page) says: everything that lookups rely on.
//!
//! A table is checked on each way between programs, so it should cost little: what entries have in common is checked
//! once, and what is left for each is a comparison that compilers make sixteen of at a time.

use crate::page::{
    GROUP_BLOCKS, MAX_BLOCK_ENTRIES, NINTH_BITS, PageBytes as _, PageLayout, WIDE_COUNTS, WIDE_RECORDS,
};
use crate::record::Record;
use crate::table::MAX_PAGE_BYTES;

/// Record numbers that nine bits tell apart.
const NUMBERS: usize = 512;

/// Checks the page at the start of `bytes`, given the dictionary's bytes; gives its size.
pub(crate) fn check_page(bytes: &[u8], dictionary: &[u8]) -> Result<u32, &'static str> {
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
        check_wide_records(page, &layout, dictionary)?;
    } else {
        check_records(page, &layout, dictionary)?;
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
fn check_wide_records(page: &[u8], layout: &PageLayout, dictionary: &[u8]) -> Result<(), &'static str> {
    for (entry, low) in (0..).zip(low_bytes(page, layout)) {
        check_record(layout.dictionary_number(&page, entry, entry), *low, dictionary)?;
    }
    Ok(())
}

/// Checks entries with the page's own numbers: each number once.
fn check_records(page: &[u8], layout: &PageLayout, dictionary: &[u8]) -> Result<(), &'static str> {
    // Of each number, the highest low byte of an entry that has it, plus one.
    let mut highest = [0u16; NUMBERS];
    for (entry, low) in (0..).zip(low_bytes(page, layout)) {
        let number = layout.record_number(&page, entry, entry) as usize % NUMBERS;
        highest[number] = highest[number].max(u16::from(*low) + 1);
    }
    let known = (layout.common + layout.locals) as usize;
    if highest.iter().skip(known).any(|highest| *highest != 0) {
        return Err("record number without a local");
    }
    for (number, highest) in (0..layout.common).zip(highest) {
        if let Some(low) = highest.checked_sub(1) {
            check_record(number, low as u8, dictionary)?;
        }
    }
    for local in 0..layout.locals {
        let number = u32::from(page.half(layout.locals_at + 2 * local));
        let highest = highest.get((layout.common + local) as usize).copied().unwrap_or(0);
        check_record(number, highest.saturating_sub(1) as u8, dictionary)?;
    }
    Ok(())
}

/// Checks that a record is in the dictionary, and that its changes stay in the block of an entry with this low byte.
fn check_record(number: u32, low: u8, dictionary: &[u8]) -> Result<(), &'static str> {
    let bytes = dictionary.get(8 * number as usize..).and_then(|rest| rest.first_chunk());
    let Some(record) = bytes.map(|bytes| Record(u64::from_le_bytes(*bytes))) else {
        return Err("record number beyond the dictionary");
    };
    if u32::from(low) + record.last_change() > 0xff {
        return Err("a run that leaves its block");
    }
    Ok(())
}
