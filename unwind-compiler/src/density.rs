//! Marks what the format has no room for: code with more rows than a block or a page holds, and rules
//! beyond the size of a dictionary.
//!
//! No image seen comes near these limits (at most 74 entries in a block, 3,000 records); damaged and
//! hostile ones do, and must end as unsupported rows in a table like any other.

use std::collections::HashMap;

use windlass_schema::page::{BLOCK_SHIFT, MAX_BLOCK_ENTRIES, PAGE_CODE_BYTES, PAGE_HEADER_BYTES, PAGE_SHIFT};
use windlass_schema::table::{MAX_PAGE_BYTES, MAX_RECORDS};
use windlass_schema::{Record, UnsupportedReason};

use crate::rows::{Row, push};

/// Blocks in a page.
const PAGE_BLOCKS: usize = (PAGE_CODE_BYTES >> BLOCK_SHIFT) as usize;
/// Rows of each block that always fit a page, at three bytes an entry (wide records) and two for
/// the index of a block (wide index).
const SPARSE_BLOCK_ROWS: usize = (MAX_PAGE_BYTES - PAGE_HEADER_BYTES - 4) as usize / PAGE_BLOCKS / 3 - 1;
/// Rows of a page that always fit it.
pub(crate) const PAGE_ROWS: usize = SPARSE_BLOCK_ROWS * PAGE_BLOCKS;

const _: () = assert!(
    PAGE_HEADER_BYTES as usize + 2 * PAGE_BLOCKS + 2 + 3 * PAGE_ROWS <= MAX_PAGE_BYTES as usize
        && SPARSE_BLOCK_ROWS < MAX_BLOCK_ENTRIES
);

/// Rows that any page can hold, and whose rules any dictionary can.
pub(crate) fn bound(rows: Vec<Row>) -> Vec<Row> {
    bound_dictionary(bound_blocks(rows))
}

/// Replaces the rows of each overfull block by one.
fn bound_blocks(rows: Vec<Row>) -> Vec<Row> {
    let page = |row: &Row| row.address >> PAGE_SHIFT;
    let block = |row: &Row| row.address >> BLOCK_SHIFT;
    // The state that enters a page or leaves an overfull block takes a row more.
    let fits = |rows: &[Row]| {
        rows.chunk_by(|a, b| page(a) == page(b)).all(|rows| rows.len() < PAGE_ROWS)
            && rows.chunk_by(|a, b| block(a) == block(b)).all(|rows| rows.len() < MAX_BLOCK_ENTRIES)
    };
    if fits(&rows) {
        return rows;
    }
    let dense = Record::unsupported(UnsupportedReason::DenseBlock);
    let mut bounded = Vec::with_capacity(rows.len());
    for rows in rows.chunk_by(|a, b| page(a) == page(b)) {
        let limit = if rows.len() < PAGE_ROWS { MAX_BLOCK_ENTRIES } else { SPARSE_BLOCK_ROWS };
        // End of an overfull block, and the state to return to there.
        let mut leave: Option<(u64, Record)> = None;
        for rows in rows.chunk_by(|a, b| block(a) == block(b)) {
            if let Some((end, record)) = leave.take() {
                push(&mut bounded, end, record);
            }
            let start = block(&rows[0]) << BLOCK_SHIFT;
            if rows.len() < limit {
                rows.iter().for_each(|row| push(&mut bounded, row.address, row.record));
            } else {
                push(&mut bounded, start, dense);
                leave = Some((start + (1 << BLOCK_SHIFT), rows[rows.len() - 1].record));
            }
        }
        if let Some((end, record)) = leave {
            push(&mut bounded, end, record);
        }
    }
    bounded
}

/// Replaces all but the most used records, if there are more than a dictionary holds.
fn bound_dictionary(mut rows: Vec<Row>) -> Vec<Row> {
    let mut uses: HashMap<Record, usize> = HashMap::new();
    for row in &rows {
        *uses.entry(row.record).or_default() += 1;
    }
    if uses.len() <= MAX_RECORDS as usize {
        return rows;
    }
    let mut by_use: Vec<_> = uses.into_iter().filter(|(record, _)| *record != Record::NO_CFI).collect();
    by_use.sort_unstable_by_key(|(record, uses)| (std::cmp::Reverse(*uses), *record));
    // Two are spoken for: no CFI, and this reason.
    let kept: std::collections::HashSet<_> =
        by_use.into_iter().map(|(record, _)| record).take(MAX_RECORDS as usize - 2).collect();
    let full = Record::unsupported(UnsupportedReason::DictionaryFull);
    for row in rows.iter_mut().filter(|row| row.record != Record::NO_CFI && !kept.contains(&row.record)) {
        row.record = full;
    }
    rows.dedup_by_key(|row| row.record);
    rows
}
