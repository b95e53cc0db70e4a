//! Folds runs of rows (a prologue's pushes, an epilogue's pops) into one entry each.
//!
//! # Why this shape
//! One row in two follows another by a byte or two and moves the CFA by 8. The OpenTelemetry profiler
//! merges such pairs; a run record (see [`windlass_schema::record`]) takes the whole run, exactly. Any part of a
//! run is a run, so taking the longest at each step gives the fewest entries. But a run that occurs
//! once costs a dictionary record, more than the rows it replaces. So entries are chosen by cost: a first
//! pass takes the longest runs everywhere and counts them, a second weighs each use of a record with
//! its share of the record's own bytes.

use std::collections::HashMap;

use windlass_schema::Record;
use windlass_schema::page::{BLOCK_SHIFT, PAGE_SHIFT};
use windlass_schema::record::{MAX_RUN_BYTES, frame_pointer, kind, return_address};

use crate::rows::Row;

/// From `address` on, up to the next entry of its block, `record` holds at the distance from `address`.
pub(crate) type Entry = Row;

/// Folds rows into entries. Each page begins with the state that enters it, and no run leaves its block.
pub(crate) fn fold(rows: &[Row]) -> Vec<Entry> {
    let rows = restated(rows);
    let blocks = || rows.chunk_by(|a, b| a.address >> BLOCK_SHIFT == b.address >> BLOCK_SHIFT);
    let mut entries = Vec::with_capacity(rows.len() / 2);
    for block in blocks() {
        fold_longest(block, &mut entries);
    }
    for _ in 0..COST_PASSES {
        let costs = Costs::of(&entries);
        entries.clear();
        for block in blocks() {
            fold_cheapest(block, &costs, &mut entries);
        }
    }
    entries
}

/// Passes after the first. Each sees the costs of the one before. Measured on seven large images: the first
/// gains 0.5% to 10%, the third up to 1.5%, two more nothing.
const COST_PASSES: usize = 3;

/// `rows`, with the state that enters each page stated again at its start.
pub(crate) fn restated(rows: &[Row]) -> Vec<Row> {
    let page = |row: &Row| row.address >> PAGE_SHIFT;
    let mut restated = Vec::with_capacity(rows.len() + rows.len() / 64);
    let mut state = Row { address: 0, record: Record::NO_CFI };
    for row in rows {
        if state.record != Record::NO_CFI {
            // One for each page that the state spans: an image has at most `MAX_PAGES`.
            for page in page(&state) + 1..=page(row) {
                let start = page << PAGE_SHIFT;
                if start != row.address {
                    restated.push(Row { address: start, record: state.record });
                }
            }
        }
        restated.push(*row);
        state = *row;
    }
    restated
}

fn fold_longest(block: &[Row], entries: &mut Vec<Entry>) {
    let mut rest = block;
    while let Some(first) = rest.first() {
        let mut chosen = (1, first.record);
        runs_at(rest, |len, record| {
            if len > chosen.0 {
                chosen = (len, record);
            }
        });
        entries.push(Entry { address: first.address, record: chosen.1 });
        rest = &rest[chosen.0..];
    }
}

/// What a use of each record costs, in 1/256 byte.
struct Costs(HashMap<Record, u32>);

/// Bytes of an entry, of a record in the dictionary, and of a page's reference to a record.
const ENTRY_BYTES: u32 = 2;
const RECORD_BYTES: u32 = 8;
const LOCAL_BYTES: u32 = 2;

impl Costs {
    fn of(entries: &[Entry]) -> Self {
        #[derive(Default)]
        struct Use {
            entries: u32,
            pages: u32,
            last_page: Option<u64>,
        }
        let mut uses: HashMap<Record, Use> = HashMap::new();
        for entry in entries {
            let page = Some(entry.address >> PAGE_SHIFT);
            let used = uses.entry(entry.record).or_default();
            used.entries += 1;
            if used.last_page != page {
                used.last_page = page;
                used.pages += 1;
            }
        }
        let cost = |used: &Use| {
            let record_bytes = u64::from(RECORD_BYTES) + u64::from(LOCAL_BYTES) * u64::from(used.pages);
            256 * ENTRY_BYTES + (256 * record_bytes / u64::from(used.entries)) as u32
        };
        Self(uses.iter().map(|(record, used)| (*record, cost(used))).collect())
    }

    /// A record not in use yet has itself to pay.
    fn of_use(&self, record: Record) -> u32 {
        *self.0.get(&record).unwrap_or(&(256 * (ENTRY_BYTES + RECORD_BYTES + LOCAL_BYTES)))
    }
}

fn fold_cheapest(block: &[Row], costs: &Costs, entries: &mut Vec<Entry>) {
    // Cheapest way to state the rows from each index on: (cost, rows of the first entry, its record).
    let mut best = vec![(0, 0, Record::NO_CFI); block.len() + 1];
    for index in (0..block.len()).rev() {
        let plain = block[index].record;
        let mut cheapest = (costs.of_use(plain) + best[index + 1].0, 1, plain);
        runs_at(&block[index..], |len, record| {
            let cost = costs.of_use(record) + best[index + len].0;
            if cost < cheapest.0 {
                cheapest = (cost, len, record);
            }
        });
        best[index] = cheapest;
    }
    let mut index = 0;
    while index < block.len() {
        let (_, len, record) = best[index];
        entries.push(Entry { address: block[index].address, record });
        index += len;
    }
}

/// Calls `found` with the length and the record of each run of at least two rows that begins `rows`.
fn runs_at(rows: &[Row], mut found: impl FnMut(usize, Record)) {
    for kind in [kind::PUSH_RUN, kind::POP_RUN] {
        let Some(mut run) = Run::begin(rows[0].record, kind) else { return };
        for (index, row) in rows.iter().enumerate().skip(1) {
            if !run.extend(row.address - rows[0].address, row.record) {
                break;
            }
            found(index + 1, run.to_record());
        }
    }
}

/// A run under construction; fields as in [`windlass_schema::record`].
struct Run {
    kind: u8,
    base: Record,
    base_words: u32,
    mask: u16,
    event: u8,
    has_last: bool,
    /// State at the last distance.
    words: u32,
    frame_pointer: (u8, i16),
}

impl Run {
    fn begin(base: Record, run_kind: u8) -> Option<Self> {
        let base_words = u32::from(u8::try_from(base.offset() / 8).ok()?);
        let foldable = base.kind() == kind::RSP
            && base.return_address() == return_address::AT_CFA
            && base.frame_pointer() <= frame_pointer::AT_CFA
            && base.offset() % 8 == 0
            && base.offset() >= 0;
        foldable.then_some(Self {
            kind: run_kind,
            base,
            base_words,
            mask: 0,
            event: 0,
            has_last: false,
            words: base_words,
            frame_pointer: (base.frame_pointer(), base.frame_pointer_offset()),
        })
    }

    /// Takes `next`, the state from `distance` on, into the run if it can.
    fn extend(&mut self, distance: u64, next: Record) -> bool {
        if self.has_last
            || !(1..=u64::from(MAX_RUN_BYTES)).contains(&distance)
            || next.return_address() != return_address::AT_CFA
        {
            return false;
        }
        let is_push = self.kind == kind::PUSH_RUN;
        let bit = distance as u8 - 1;
        if !is_push && next == Record::NO_CFI {
            self.mask |= 1 << bit;
            self.has_last = true;
            return true;
        }
        let words = if is_push { Some(self.words + 1) } else { self.words.checked_sub(1) };
        let offset_is = |words: u32| i64::from(next.offset()) == 8 * i64::from(words);
        let sets_rbp = is_push && next.kind() == kind::RBP && offset_is(self.words);
        let moves = next.kind() == kind::RSP && words.is_some_and(offset_is);
        let stays = next.kind() == kind::RSP && offset_is(self.words);
        if !(sets_rbp || moves || stays) {
            return false;
        }
        let words = words.filter(|_| moves).unwrap_or(self.words);
        let saves = (next.frame_pointer(), next.frame_pointer_offset());
        let event =
            if is_push { (frame_pointer::AT_CFA, -8 * words as i16) } else { (frame_pointer::SAME, 0) };
        let has_event = saves != self.frame_pointer;
        if has_event && (saves != event || self.event != 0 || sets_rbp) {
            return false;
        }
        if sets_rbp || moves {
            self.mask |= 1 << bit;
        }
        if has_event {
            self.event = 0x80 | bit;
        }
        (self.words, self.frame_pointer, self.has_last) = (words, saves, sets_rbp);
        true
    }

    fn to_record(&self) -> Record {
        let first = self.kind | self.base.frame_pointer() << 4 | u8::from(self.has_last) << 6;
        Record(
            u64::from(first)
                | u64::from(self.base_words) << 8
                | u64::from(self.mask) << 16
                | u64::from(self.event) << 32
                | u64::from(self.base.frame_pointer_offset() as u16) << 48,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use windlass_schema::Rule;

    fn rsp(words: i32, saved: Option<i16>) -> Record {
        let (rule, f) = saved.map_or((frame_pointer::SAME, 0), |f| (frame_pointer::AT_CFA, f));
        Record::plain(kind::RSP, rule, 0, 0, f, 8 * words)
    }

    fn rbp(words: i32, saved: i16) -> Record {
        Record::plain(kind::RBP, frame_pointer::AT_CFA, 0, 0, saved, 8 * words)
    }

    /// Folds rows by the longest runs; `expect` are the entries' addresses. Checks each state on the way.
    #[track_caller]
    fn check(rows: &[(u64, Record)], expect: &[u64]) {
        let rows: Vec<Row> =
            rows.iter().map(|(address, record)| Row { address: *address, record: *record }).collect();
        let mut entries = Vec::new();
        fold_longest(&rows, &mut entries);
        assert_eq!(entries.iter().map(|entry| entry.address).collect::<Vec<_>>(), expect);
        for address in rows[0].address..rows[rows.len() - 1].address + 40 {
            let state = rows.iter().rfind(|row| row.address <= address).unwrap().record;
            let entry = entries.iter().rfind(|entry| entry.address <= address).unwrap();
            let found = entry.record.at((address - entry.address) as u32);
            assert_eq!(Rule::try_from(found), Rule::try_from(state), "at {address:#x}");
        }
    }

    #[test]
    fn frame_pointer_prologue_is_one_entry() {
        check(&[(0, rsp(1, None)), (1, rsp(2, Some(-16))), (4, rbp(2, -16))], &[0]);
    }

    #[test]
    fn pushes_with_rbp_among_them_are_one_entry() {
        let rows = [rsp(1, None), rsp(2, None), rsp(3, Some(-24)), rsp(4, Some(-24))];
        check(&[(0, rows[0]), (2, rows[1]), (3, rows[2]), (4, rows[3])], &[0]);
        // A save at another offset than the CFA's own is no push of rbp.
        check(&[(0, rows[0]), (2, rows[1]), (3, rsp(3, Some(-16))), (4, rsp(4, Some(-16)))], &[0, 3]);
    }

    #[test]
    fn pops_are_one_entry() {
        let rows = [rsp(4, Some(-16)), rsp(3, Some(-16)), rsp(2, Some(-16)), rsp(1, None)];
        check(&[(0, rows[0]), (1, rows[1]), (2, rows[2]), (3, rows[3])], &[0]);
        check(&[(0, rows[0]), (17, rows[1]), (18, rows[2])], &[0, 17]);
        check(&[(0, rsp(0, None)), (1, rsp(-1, None))], &[0, 1]);
    }

    #[test]
    fn the_end_of_coverage_is_the_last_change_of_pops() {
        let rows = [rsp(3, Some(-16)), rsp(2, Some(-16)), rsp(1, None), Record::NO_CFI];
        check(&[(0, rows[0]), (1, rows[1]), (2, rows[2]), (3, rows[3])], &[0]);
        check(&[(0, rows[2]), (7, rows[3])], &[0]);
        check(&[(0, rows[2]), (17, rows[3])], &[0, 17]);
        // Another function, or pushes before the end.
        check(&[(0, rows[2]), (1, rows[3]), (2, rows[2])], &[0, 2]);
        check(&[(0, rows[2]), (1, rsp(2, None)), (2, rows[3])], &[0, 2]);
    }

    #[test]
    fn a_late_save_is_an_event_without_a_change() {
        check(&[(0, rsp(1, None)), (1, rsp(2, None)), (5, rsp(2, Some(-16))), (7, rsp(3, Some(-16)))], &[0]);
    }

    #[test]
    fn nothing_follows_the_frame_pointer() {
        let rows = [(0, rsp(1, None)), (1, rsp(2, Some(-16))), (4, rbp(2, -16)), (5, rsp(3, Some(-16)))];
        check(&rows, &[0, 5]);
    }

    #[test]
    fn base_beyond_a_byte_stays_plain() {
        check(&[(0, rsp(256, None)), (1, rsp(257, None))], &[0, 1]);
        check(&[(0, rsp(255, None)), (1, rsp(256, None))], &[0]);
    }

    #[test]
    fn a_state_is_stated_again_in_each_page() {
        let rows = [
            Row { address: 0xfff0, record: rsp(1, None) },
            Row { address: 0x2_0000, record: rsp(2, None) },
            Row { address: 0x2_0001, record: Record::NO_CFI },
            Row { address: 0x5_0001, record: rsp(1, None) },
        ];
        let addresses: Vec<_> = restated(&rows).iter().map(|row| row.address).collect();
        assert_eq!(addresses, [0xfff0, 0x1_0000, 0x2_0000, 0x2_0001, 0x5_0001]);
    }
}
