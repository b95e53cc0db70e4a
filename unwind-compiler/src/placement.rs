//! Lays chains at their addresses: one list in the order of addresses, as the format wants it.
//!
//! The format's entries do not cross a block of 256 bytes, and each page begins with the state that enters
//! it; a chain that does cross is divided there. What the format has no room for is noticed here and left
//! to [`density`](crate::density).

use windlass_schema::Record;
use windlass_schema::page::{BLOCK_SHIFT, MAX_BLOCK_ENTRIES, PAGE_SHIFT};

use crate::chains::{ChainNumber, Chains, Link, Step};
use crate::density::PAGE_ROWS;
use crate::rows::{Row, push};

/// A chain at its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    /// Bytes from the base of the table.
    pub(crate) offset: u32,
    pub(crate) chain: ChainNumber,
}

/// Bytes of code in a block.
const BLOCK_BYTES: u32 = 1 << BLOCK_SHIFT;

/// Chains laid out so far.
pub(crate) struct Placement {
    pub(crate) chains: Chains,
    pub(crate) placed: Vec<Placed>,
    /// Image address of offset 0, a multiple of the size of a page.
    pub(crate) base: u64,
    /// Whether some block or page has more rows than the format may hold.
    pub(crate) is_too_dense: bool,
    /// Rows: changes of the state.
    pub(crate) rows: u64,
    /// The state behind the last row.
    state: Record,
    /// Number of the last block and of the last page, and the rows of each.
    block: (u32, usize),
    page: (u32, usize),
    /// Memory for a chain under division and for what it is divided into.
    divided: Vec<Step>,
    links: Vec<Link>,
}

impl Placement {
    /// Of these chains and more, with offsets from `base` on, for about so many places.
    pub(crate) fn new(chains: Chains, base: u64, expected: usize) -> Self {
        Self {
            chains,
            placed: Vec::with_capacity(expected),
            base,
            is_too_dense: false,
            rows: 0,
            state: Record::NO_CFI,
            block: (0, 0),
            page: (0, 0),
            divided: Vec::new(),
            links: Vec::new(),
        }
    }

    /// Lays out a chain of a function that starts at `start`.
    pub(crate) fn link(&mut self, start: u32, link: Link) {
        let offset = start + link.at;
        if (offset % BLOCK_BYTES) + link.span < BLOCK_BYTES {
            self.place(offset, link.chain);
        } else {
            let mut steps = std::mem::take(&mut self.divided);
            steps.clear();
            steps.extend_from_slice(self.chains.steps(link.chain));
            self.steps(offset, &steps);
            self.divided = steps;
        }
    }

    /// Lays out rows at bytes from `start` on.
    pub(crate) fn steps(&mut self, start: u32, steps: &[Step]) {
        let block = |step: &Step| (start + step.at) >> BLOCK_SHIFT;
        let mut links = std::mem::take(&mut self.links);
        links.clear();
        for steps in steps.chunk_by(|a, b| block(a) == block(b)) {
            self.chains.divide(steps, |link| links.push(link));
        }
        links.iter().for_each(|link| self.place(start + link.at, link.chain));
        self.links = links;
    }

    /// Lays out rows; those without coverage end it.
    pub(crate) fn rows(&mut self, rows: &[Row]) {
        let offset = |row: &Row| (row.address - self.base) as u32;
        let steps: Vec<Step> = rows.iter().map(|row| Step { at: offset(row), record: row.record }).collect();
        for steps in steps.split_inclusive(|step| step.record == Record::NO_CFI) {
            match steps.split_last() {
                Some((last, before)) if last.record == Record::NO_CFI => {
                    self.steps(0, before);
                    self.end_coverage(last.at);
                }
                _ => self.steps(0, steps),
            }
        }
    }

    /// From `offset` on nothing is covered.
    pub(crate) fn end_coverage(&mut self, offset: u32) {
        if self.state == Record::NO_CFI {
            return;
        }
        self.restate(offset);
        let last = self.placed.len().checked_sub(1).map(|last| (last, self.placed[last]));
        let ended = last
            .filter(|(_, last)| last.offset >> BLOCK_SHIFT == offset >> BLOCK_SHIFT)
            .and_then(|(at, last)| Some((at, self.chains.ended(last.chain, offset - last.offset)?)));
        match ended {
            Some((at, chain)) => {
                self.placed[at].chain = chain;
                self.count(offset, 1);
                self.state = Record::NO_CFI;
                self.rows += 1;
            }
            None => {
                let end = self.chains.single(Record::NO_CFI);
                self.place(offset, end);
            }
        }
    }

    /// Puts a chain that lies in one block at `offset`.
    fn place(&mut self, offset: u32, chain: ChainNumber) {
        let steps = self.chains.steps(chain);
        let (rows, first, last) = (steps.len(), steps[0].record, steps[steps.len() - 1].record);
        let is_restated = first == self.state;
        if is_restated && rows == 1 {
            return;
        }
        self.restate(offset);
        self.placed.push(Placed { offset, chain });
        self.count(offset, rows);
        self.rows += (rows - usize::from(is_restated)) as u64;
        self.state = last;
    }

    /// States the state that enters each page up to that of `offset`, where no row begins.
    fn restate(&mut self, offset: u32) {
        let page = offset >> PAGE_SHIFT;
        if page == self.page.0 || self.state == Record::NO_CFI {
            return;
        }
        let chain = self.chains.single(self.state);
        // One for each page that the state spans: an image has at most `MAX_PAGES`.
        for page in self.page.0 + 1..=page {
            let start = page << PAGE_SHIFT;
            if start != offset {
                self.placed.push(Placed { offset: start, chain });
                self.count(start, 1);
            }
        }
    }

    fn count(&mut self, offset: u32, rows: usize) {
        for (counted, number) in
            [(&mut self.block, offset >> BLOCK_SHIFT), (&mut self.page, offset >> PAGE_SHIFT)]
        {
            if counted.0 != number {
                *counted = (number, 0);
            }
            counted.1 += rows;
        }
        // The state that enters a page or leaves an overfull block takes a row more.
        self.is_too_dense |= self.block.1 >= MAX_BLOCK_ENTRIES || self.page.1 >= PAGE_ROWS;
    }

    /// Every row, in order.
    pub(crate) fn all_rows(&self) -> Vec<Row> {
        let mut rows = Vec::with_capacity(self.rows as usize);
        for placed in &self.placed {
            for step in self.chains.steps(placed.chain) {
                push(&mut rows, self.base + u64::from(placed.offset + step.at), step.record);
            }
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use windlass_schema::record::kind;

    fn rsp(words: i32) -> Record {
        Record::plain(kind::SP, 0, 0, 0, 0, 8 * words)
    }

    #[test]
    fn a_state_is_stated_again_in_each_page() {
        let rows = [
            Row { address: 0xfff0, record: rsp(1) },
            Row { address: 0x2_0000, record: rsp(2) },
            Row { address: 0x2_0001, record: Record::NO_CFI },
            Row { address: 0x5_0001, record: rsp(1) },
        ];
        let mut placement = Placement::new(Chains::default(), 0, 0);
        placement.rows(&rows);
        let offsets: Vec<_> = placement.placed.iter().map(|placed| placed.offset).collect();
        // The end of coverage is in the chain of 0x20000: the run `pop; ret` can hold both.
        assert_eq!(offsets, [0xfff0, 0x1_0000, 0x2_0000, 0x5_0001]);
        assert_eq!((placement.rows, placement.all_rows()), (4, rows.to_vec()));
    }

    #[test]
    fn a_function_that_goes_on_as_the_last_ended_has_no_row_of_its_own() {
        let mut placement = Placement::new(Chains::default(), 0, 0);
        placement.steps(0x100, &[Step { at: 0, record: rsp(1) }]);
        placement.steps(0x140, &[Step { at: 0, record: rsp(1) }]);
        placement.steps(0x180, &[Step { at: 0, record: rsp(1) }, Step { at: 1, record: rsp(2) }]);
        placement.end_coverage(0x1c0);
        let offsets: Vec<_> = placement.placed.iter().map(|placed| placed.offset).collect();
        assert_eq!((offsets, placement.rows), (vec![0x100, 0x180, 0x1c0], 3));
    }
}
