//! The numbers of records.
//!
//! An entry has one byte for its record. In each page, numbers below some `C` are the dictionary's own and
//! the rest are the page's, at two bytes for each record that the page uses. So the first
//! numbers go to the records that most pages use, whatever the count of entries.

use windlass_schema::Record;
use windlass_schema::page::PAGE_SHIFT;
use windlass_schema::table::MAX_RECORDS;

use crate::fold::Folded;
use crate::placement::Placed;

/// The records of a table, numbered.
pub(crate) struct Dictionary {
    pub(crate) records: Vec<Record>,
    /// By the number in [`Folded::records`]: the number in the dictionary.
    numbers: Vec<u16>,
}

/// What is known of the use of a record.
#[derive(Clone, Copy)]
struct Use {
    pages: u32,
    entries: u32,
    last_page: u32,
}

impl Dictionary {
    /// Numbers the records that are in use. `None` if they are more than a dictionary holds.
    pub(crate) fn of(folded: &Folded, placed: &[Placed]) -> Option<Self> {
        let mut uses = vec![Use { pages: 0, entries: 0, last_page: u32::MAX }; folded.records.len()];
        for placed in placed {
            let page = placed.offset >> PAGE_SHIFT;
            for entry in folded.entries(placed.chain) {
                let used = &mut uses[entry.record as usize];
                used.pages += u32::from(used.last_page != page);
                used.entries += 1;
                used.last_page = page;
            }
        }
        let mut used: Vec<usize> = (0..uses.len()).filter(|number| uses[*number].entries > 0).collect();
        if used.len() > MAX_RECORDS as usize {
            return None;
        }
        // The record itself last: the same image gives the same bytes.
        used.sort_unstable_by_key(|number| {
            let Use { pages, entries, .. } = uses[*number];
            (std::cmp::Reverse(pages), std::cmp::Reverse(entries), folded.records[*number])
        });
        let mut numbers = vec![0; folded.records.len()];
        for (number, index) in (0..).zip(&used) {
            numbers[*index] = number;
        }
        Some(Self { records: used.into_iter().map(|index| folded.records[index]).collect(), numbers })
    }

    /// The number of a record in use, given the one in [`Folded::records`].
    pub(crate) fn number(&self, record: u32) -> u16 {
        self.numbers[record as usize]
    }
}
