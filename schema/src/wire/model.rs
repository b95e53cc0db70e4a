//! What is probable: the records of a dictionary, and the entries of a table one after the other.

use crate::record::{MAX_RUN_BYTES, Record};

use super::coder::Coder;
use super::symbols::{Flags, Symbols, hash};

/// Codes the records of a dictionary, byte by byte.
pub(super) struct RecordModel {
    bytes: Symbols<4>,
    last: u64,
}

impl RecordModel {
    pub(super) fn new() -> Self {
        Self { bytes: Symbols::new(12), last: 0 }
    }

    pub(super) fn code<C: Coder>(&mut self, coder: &mut C, record: Record) -> Record {
        let mut coded = 0;
        for at in 0..8u64 {
            let before = coded & ((1 << (8 * at)) - 1);
            let byte = |value: u64, at: u64| value >> (8 * at) & 0xff;
            let kind = coded & 0xff;
            let previous = if at == 0 { byte(self.last, 0) } else { byte(coded, at - 1) };
            let contexts = [
                hash([1, at, kind]),
                hash([2, at, kind, byte(self.last, at)]),
                hash([3, at, kind, previous]),
                hash([4, at, before]),
            ];
            let value = self.bytes.code(coder, contexts, 2, byte(record.0, at) as u32);
            coded |= u64::from(value) << (8 * at);
        }
        self.last = coded;
        Record(coded)
    }
}

/// An entry: bytes from the base of the table, and the number of its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) struct Entry {
    pub(super) offset: u32,
    pub(super) record: u16,
}

/// What is known of a record.
#[derive(Clone, Copy)]
struct Facts {
    kind: u8,
    /// Hash of the state behind its run.
    state: u64,
    /// Bytes from its entry to where coverage ends by it.
    end: Option<u32>,
}

impl Facts {
    fn of(record: Record) -> Self {
        let behind = record.at(u32::MAX);
        let end = (behind == Record::NO_CFI)
            .then(|| (0..=MAX_RUN_BYTES).find(|distance| record.at(*distance) == Record::NO_CFI))
            .flatten();
        Self { kind: record.kind(), state: hash([behind.0]), end }
    }
}

/// What followed the last time.
#[derive(Clone, Copy, Default)]
struct Prediction {
    gap: u32,
    record: u16,
    /// Part of the hash, odd; 0 in an empty slot.
    check: u8,
    /// How often it was right, at most 15.
    trust: u8,
}

impl Prediction {
    /// Notes what followed this time.
    fn learn(&mut self, check: u8, record: u16, gap: u32, patience: u8) {
        if self.check == check && self.record == record && self.gap == gap {
            self.trust = (self.trust + 1).min(15);
        } else if self.check == check && self.trust > patience {
            self.trust /= 2;
        } else {
            *self = Self { check, record, gap, trust: 0 };
        }
    }
}

/// A table of predictions by the hash of what came before.
struct Predictions {
    slots: Vec<Prediction>,
    shift: u32,
}

impl Predictions {
    fn new(bits: u32) -> Self {
        Self { slots: vec![Prediction::default(); 1 << bits], shift: 64 - bits }
    }

    fn slot(&mut self, hash: u64) -> (&mut Prediction, u8) {
        (&mut self.slots[(hash >> self.shift) as usize], hash as u8 | 1)
    }
}

/// Functions start at multiples of this.
const FUNCTION_ALIGNMENT: u32 = 16;
/// Gap that stands for "where functions start"; other gaps behind the end of one are one more.
const ALIGNED: u32 = 0;

/// Codes entries in the order of their offsets.
pub(super) struct EntryModel {
    facts: Vec<Facts>,
    records: Symbols<5>,
    gaps: Symbols<4>,
    low_bits: Flags,
    by_three: Predictions,
    by_two: Predictions,
    by_pair: Predictions,
    is_by_three: Flags,
    is_by_two: Flags,
    is_by_pair: Flags,
    is_aligned: Flags,
    nibbles: u32,
    /// The last three (record, gap), newest first.
    history: [(u16, u32); 3],
    /// Predictions of three in a row that were right.
    streak: usize,
    /// The record that the function began with.
    function: u16,
    last: Option<Entry>,
}

impl EntryModel {
    /// For a table with these records and so many entries.
    pub(super) fn new(records: &[Record], entries: u32) -> Self {
        let bits = entries.checked_ilog2().unwrap_or(0).clamp(9, 17);
        Self {
            facts: records.iter().map(|record| Facts::of(*record)).collect(),
            records: Symbols::new((bits - 1).min(14)),
            gaps: Symbols::new((bits - 1).min(13)),
            low_bits: Flags::new(16 * 16 * 16),
            by_three: Predictions::new(bits.min(16)),
            by_two: Predictions::new(bits.min(15)),
            by_pair: Predictions::new(bits.min(15)),
            is_by_three: Flags::new(16 * 16),
            is_by_two: Flags::new(16),
            is_by_pair: Flags::new(16),
            is_aligned: Flags::new(1),
            nibbles: (records.len() as u32).max(2).ilog2() / 4 + 1,
            history: [(0, 0); 3],
            streak: 0,
            function: 0,
            last: None,
        }
    }

    /// Codes the next entry; `None` if what is decoded cannot be one.
    pub(super) fn code<C: Coder>(&mut self, coder: &mut C, entry: Entry) -> Option<Entry> {
        let last_facts = self.last.map(|last| self.facts[usize::from(last.record)]);
        let end = last_facts.and_then(|facts| facts.end);
        let last = self.last.map_or(0, |last| last.offset);
        // Where the next function is expected, from the last entry on.
        let aligned = end.map(|end| {
            (last.wrapping_add(end))
                .checked_next_multiple_of(FUNCTION_ALIGNMENT)
                .unwrap_or(last)
                .wrapping_sub(last)
        });
        let distance = entry.offset.wrapping_sub(last);
        let gap = match aligned {
            Some(aligned) if distance == aligned => ALIGNED,
            Some(_) => distance.wrapping_add(1),
            None => distance,
        };
        let (record, gap) = self.code_pair(coder, entry.record, gap, last_facts, end.is_some());
        let distance = match aligned {
            Some(aligned) if gap == ALIGNED => aligned,
            Some(_) => gap.wrapping_sub(1),
            None => gap,
        };
        let offset = last.checked_add(distance)?;
        if usize::from(record) >= self.facts.len() || self.last.is_some() && distance == 0 {
            return None;
        }
        if end.is_some() || self.last.is_none() {
            self.function = record;
        }
        self.history = [(record, gap), self.history[0], self.history[1]];
        self.last = Some(Entry { offset, record });
        self.last
    }

    fn code_pair<C: Coder>(
        &mut self,
        coder: &mut C,
        record: u16,
        gap: u32,
        last: Option<Facts>,
        is_behind_end: bool,
    ) -> (u16, u32) {
        let [(r0, g0), (r1, g1), (r2, _)] =
            self.history.map(|(record, gap)| (u64::from(record), u64::from(gap)));
        let by_three = hash([3, r0, g0, r1, g1, r2]);
        let (predicted, check) = self.by_three.slot(by_three);
        let mut pair = None;
        if predicted.check == check {
            let context = usize::from(predicted.trust) * 16 + self.streak.min(15);
            let is_right = predicted.record == record && predicted.gap == gap;
            if self.is_by_three.code(coder, context, is_right) {
                pair = Some((predicted.record, predicted.gap));
            }
        }
        self.streak = if pair.is_some() { self.streak + 1 } else { 0 };
        let (record, gap) = match pair {
            Some(pair) => pair,
            None => {
                let record = self.code_record(coder, record, last, is_behind_end);
                (record, self.code_gap(coder, record, gap, last, is_behind_end))
            }
        };
        let (predicted, check) = self.by_three.slot(by_three);
        predicted.learn(check, record, gap, 15);
        let (predicted, check) = self.by_two.slot(hash([2, r0, r1]));
        predicted.learn(check, record, 0, 1);
        if !is_behind_end {
            let (predicted, check) = self.by_pair.slot(hash([1, r0, record.into()]));
            predicted.learn(check, 0, gap, 1);
        }
        (record, gap)
    }

    fn code_record<C: Coder>(
        &mut self,
        coder: &mut C,
        record: u16,
        last: Option<Facts>,
        is_behind_end: bool,
    ) -> u16 {
        let [(r0, _), (r1, _), _] = self.history.map(|(record, gap)| (u64::from(record), gap));
        let (predicted, check) = self.by_two.slot(hash([2, r0, r1]));
        let predicted = *predicted;
        if predicted.check == check
            && self.is_by_two.code(coder, predicted.trust.into(), predicted.record == record)
        {
            return predicted.record;
        }
        let (kind, state) = last.map_or((0, 0), |facts| (facts.kind, facts.state));
        let state = if is_behind_end { 1 } else { state };
        let function = u64::from(self.function);
        let contexts = [
            hash([1, kind.into(), is_behind_end.into()]),
            hash([2, state]),
            hash([3, r0]),
            hash([4, function, state]),
            hash([5, function, r0]),
        ];
        self.records.code(coder, contexts, self.nibbles, record.into()) as u16
    }

    fn code_gap<C: Coder>(
        &mut self,
        coder: &mut C,
        record: u16,
        gap: u32,
        last: Option<Facts>,
        is_behind_end: bool,
    ) -> u32 {
        let r0 = u64::from(self.history[0].0);
        if is_behind_end {
            if self.is_aligned.code(coder, 0, gap == ALIGNED) {
                return ALIGNED;
            }
        } else {
            let (predicted, check) = self.by_pair.slot(hash([1, r0, record.into()]));
            let predicted = *predicted;
            if predicted.check == check
                && self.is_by_pair.code(coder, predicted.trust.into(), predicted.gap == gap)
            {
                return predicted.gap;
            }
        }
        // One that is out of range is none of the table's; the caller finds that out.
        let kind = self.facts.get(usize::from(record)).map_or(0, |facts| facts.kind);
        let last_kind = last.map_or(0, |facts| facts.kind);
        let contexts = [
            hash([1, kind.into(), last_kind.into(), is_behind_end.into()]),
            hash([2, record.into()]),
            hash([3, r0]),
            hash([4, r0, record.into()]),
        ];
        let len = self.gaps.code(coder, contexts, 1, (32 - gap.leading_zeros()).min(15));
        let low_len = if len < 15 { len.saturating_sub(1) } else { 32 };
        let mut value = u32::from(0 < len && len < 15);
        let mut node = 1;
        for bit in (0..low_len).rev() {
            let bit = gap >> bit & 1 != 0;
            // The upper ones are worth learning.
            let bit = if node < 16 {
                let context = (usize::from(kind) << 4 | len as usize) << 4 | node;
                node <<= 1;
                let bit = self.low_bits.code(coder, context, bit);
                node |= usize::from(bit);
                bit
            } else {
                coder.bit(1 << 15, bit)
            };
            value = value << 1 | u32::from(bit);
        }
        value
    }
}
