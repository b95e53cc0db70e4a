//! The numbers of records.
//!
//! An entry has one byte for its record. In each page, numbers below some `C` are the dictionary's own and
//! the rest are the page's, at two bytes for each record that the page uses. So the first
//! numbers go to the records that most pages use, whatever the count of entries.

use std::collections::HashMap;

use windlass_schema::Record;
use windlass_schema::page::PAGE_SHIFT;
use windlass_schema::table::MAX_RECORDS;

use crate::fold::Entry;

/// All records of a table, numbered.
pub(crate) struct Dictionary {
    pub(crate) records: Vec<Record>,
    numbers: HashMap<Record, u16>,
}

impl Dictionary {
    /// Numbers the records of `entries`. `None` if they are more than a dictionary holds.
    pub(crate) fn of(entries: &[Entry]) -> Option<Self> {
        // Pages and entries that use a record, and the last page seen.
        let mut uses: HashMap<Record, (u32, u32, u64)> = HashMap::new();
        for entry in entries {
            let page = entry.address >> PAGE_SHIFT;
            let used = uses.entry(entry.record).or_insert((0, 0, u64::MAX));
            used.0 += u32::from(used.2 != page);
            used.1 += 1;
            used.2 = page;
        }
        if uses.len() > MAX_RECORDS as usize {
            return None;
        }
        let mut records: Vec<_> = uses.into_iter().collect();
        // The record itself last: the same image gives the same bytes.
        records.sort_unstable_by_key(|(record, (pages, entries, _))| {
            (std::cmp::Reverse(*pages), std::cmp::Reverse(*entries), *record)
        });
        let records: Vec<Record> = records.into_iter().map(|(record, _)| record).collect();
        let numbers = records.iter().zip(0..).map(|(record, number)| (*record, number)).collect();
        Some(Self { records, numbers })
    }

    /// The number of a record of these entries.
    pub(crate) fn number(&self, record: Record) -> u16 {
        *self.numbers.get(&record).expect("the dictionary was made of the entries that are encoded")
    }
}
