//! Writes one page; the format is that of [`windlass_schema::page`].

use windlass_schema::page::{
    BLOCK_SHIFT, GROUP_SHIFT, PAGE_CODE_BYTES, PageLayout, WIDE_INDEX, WIDE_RECORDS,
};

use crate::dictionary::Dictionary;
use crate::fold::Entry;

/// Record numbers that a byte tells apart.
const NARROW_RECORDS: usize = 256;

/// The bytes of the page whose entries these are: at least one, at most as many as `density` lets through.
pub(crate) fn write(entries: &[Entry], dictionary: &Dictionary) -> Vec<u8> {
    let offset = |entry: &Entry| entry.address % PAGE_CODE_BYTES;
    let numbers: Vec<u16> = entries.iter().map(|entry| dictionary.number(entry.record)).collect();
    let first_group = offset(&entries[0]) >> GROUP_SHIFT;
    let groups = (offset(&entries[entries.len() - 1]) >> GROUP_SHIFT) - first_group + 1;
    // First entry of each block, and one past the last.
    let block_starts: Vec<usize> = (0..=8 * groups)
        .map(|block| {
            let start = (8 * first_group + block) << BLOCK_SHIFT;
            entries.partition_point(|entry| offset(entry) < start)
        })
        .collect();
    let wide_index =
        block_starts.chunks(8).any(|group| group[group.len() - 1] - group[0] > usize::from(u8::MAX));
    let split = split_numbers(&numbers);
    let flags = if wide_index { WIDE_INDEX } else { 0 } | if split.is_none() { WIDE_RECORDS } else { 0 };
    let (common, locals) = split.unwrap_or_default();
    let layout = PageLayout::new(
        flags,
        first_group as u32,
        groups as u32,
        locals.len() as u32,
        entries.len() as u32,
        u32::from(common),
    );

    let mut page = Vec::with_capacity(layout.end as usize);
    page.extend([flags, first_group as u8, groups as u8, locals.len() as u8]);
    page.extend((entries.len() as u16).to_le_bytes());
    page.extend([common, 0]);
    let half = |value: usize| (value as u16).to_le_bytes();
    let step = if wide_index { 1 } else { 8 };
    page.extend(block_starts.iter().step_by(step).flat_map(|start| half(*start)));
    page.extend(locals.iter().flat_map(|number| number.to_le_bytes()));
    if flags & WIDE_RECORDS != 0 {
        page.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
    }
    if !wide_index {
        let in_group =
            block_starts.chunks_exact(8).flat_map(|group| group.iter().map(|start| start - group[0]));
        page.extend(in_group.map(|count| count as u8));
    }
    page.extend(entries.iter().map(|entry| entry.address as u8));
    if flags & WIDE_RECORDS == 0 {
        page.extend(numbers.iter().map(|number| match locals.binary_search(number) {
            Ok(local) => common + local as u8,
            Err(_) => *number as u8,
        }));
    }
    debug_assert_eq!(page.len(), layout.end as usize);
    page
}

/// How many of the dictionary's first numbers to take as they are, and the other numbers in use, sorted.
/// `None` if the page uses too many for a byte to tell apart.
fn split_numbers(numbers: &[u16]) -> Option<(u8, Vec<u16>)> {
    let mut used = numbers.to_vec();
    used.sort_unstable();
    used.dedup();
    // One more common number saves one local at most, so their sum never falls: the most that fit are best.
    (0..=u8::MAX).rev().find_map(|common| {
        let locals = &used[used.partition_point(|number| *number < u16::from(common))..];
        let fits =
            usize::from(common) + locals.len() <= NARROW_RECORDS && locals.len() <= usize::from(u8::MAX);
        fits.then(|| (common, locals.to_vec()))
    })
}
