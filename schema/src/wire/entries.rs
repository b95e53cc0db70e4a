//! The entries of a table, one after the other.
//!
//! An entry is a record and the gap to the entry before. What it is follows from
//! where in its function it stands: behind an end the next function begins, at a multiple of 16; the frame is taken
//! down as it was built up; and behind a return amid a function the state is what it was before the frame
//! was taken down. So for each entry these are tried, in this order:
//! 1. what followed the last three entries the last time: one flag for record and gap;
//! 2. behind pops, the state before them; elsewhere what followed the last two records, and what
//!    followed the last one after the same pushes: a flag each;
//! 3. the record's number, in the contexts of what the function saved, of the state, and of the record before;
//! 4. for the gap, that of the same two records the last time, or else its length and its bits.

use crate::record::{MAX_RUN_BYTES, Record, kind};

use super::coder::Coder;
use super::symbols::{Flags, SPREAD, Symbols, hash};

/// An entry: bytes from the base of the table, and its record by the order of the coded dictionary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) struct Entry {
    pub(super) offset: u32,
    pub(super) record: u16,
}

/// No record.
const NONE: u16 = u16::MAX;

/// What is known of a record.
#[derive(Clone, Copy)]
struct Facts {
    kind: u8,
    /// Bytes from its entry to where coverage ends by it.
    end: Option<u32>,
    /// The state behind it, as a context, and as a record of the table if there is one.
    state: u64,
    behind: u16,
    /// Of pushes: what they have saved, as a context.
    saved: u64,
}

/// The records of a table, as models see them.
pub(super) struct Known(Vec<Facts>);

impl Known {
    /// `records` by the order of the coded dictionary.
    pub(super) fn new(records: &[Record]) -> Self {
        let mut by_value: Vec<(Record, u16)> = records.iter().copied().zip(0..).collect();
        by_value.sort_unstable();
        let number = |record: Record| {
            let at = by_value.binary_search_by_key(&record, |(record, _)| *record);
            at.map_or(NONE, |at| by_value[at].1)
        };
        Self(records.iter().map(|record| Facts::new(*record, number)).collect())
    }
}

impl Facts {
    fn new(record: Record, number: impl Fn(Record) -> u16) -> Self {
        let behind = record.at(u32::MAX);
        let end = (behind == Record::NO_CFI)
            .then(|| (0..=MAX_RUN_BYTES).find(|distance| record.at(*distance) == Record::NO_CFI))
            .flatten();
        let pushed = u32::from(record.aux()) + record.run_mask().count_ones();
        let saved = hash([
            pushed.into(),
            behind.frame_pointer().into(),
            behind.frame_pointer_offset() as u64,
            behind.kind().into(),
        ]);
        Self { kind: record.kind(), end, state: hash([behind.0]), behind: number(behind), saved }
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
    /// Notes what followed this time. One that was right more than `patience` times survives being wrong.
    #[inline(always)]
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
    /// How often each was right, by its trust.
    is_right: Flags,
}

impl Predictions {
    fn new(bits: u32) -> Self {
        Self { slots: vec![Prediction::default(); 1 << bits], shift: 64 - bits, is_right: Flags::new(256) }
    }

    #[inline(always)]
    fn slot(&mut self, hash: u64) -> (&mut Prediction, u8) {
        (&mut self.slots[(hash >> self.shift) as usize], hash as u8 | 1)
    }

    /// The prediction for `hash`, if there is one.
    #[inline(always)]
    fn find(&mut self, hash: u64) -> Option<Prediction> {
        let (slot, check) = self.slot(hash);
        (slot.check == check).then_some(*slot)
    }

    #[inline(always)]
    fn learn(&mut self, hash: u64, record: u16, gap: u32, patience: u8) {
        let (slot, check) = self.slot(hash);
        slot.learn(check, record, gap, patience);
    }
}

/// Functions start at multiples of this.
const FUNCTION_ALIGNMENT: u32 = 16;
/// Gap that stands for "where functions start"; other gaps behind the end of one are one more.
const ALIGNED: u32 = 0;
/// Lengths of gaps from this on are not told apart.
const LONG: u32 = 15;

/// Codes entries in the order of their offsets.
pub(super) struct EntryModel<'a> {
    known: &'a Known,
    records: Symbols<3>,
    records_low: Symbols<2>,
    gaps: Symbols<3>,
    upper_bits: Symbols<1>,
    by_three: Predictions,
    by_two: Predictions,
    by_pushes: Predictions,
    by_pair: Predictions,
    is_restored: Flags,
    is_aligned: Flags,
    /// The last two records, newest first, and hashes of the last three entries.
    history: [u16; 2],
    pairs: [u64; 3],
    /// Predictions by three in a row that were right.
    streak: usize,
    /// Offset of the last entry, and where coverage ends by it.
    last: u32,
    end: Option<u32>,
    is_first: bool,
    /// Of the function: the record it begins with; its pushes; what it saved, and whether that may change;
    /// the state; the state before the last pops.
    function: u16,
    pushes: u64,
    saved: u64,
    is_prologue: bool,
    state: u64,
    behind: u16,
    before_pops: u16,
}

impl<'a> EntryModel<'a> {
    /// For `entries` entries behind the offset `from`.
    pub(super) fn new(known: &'a Known, entries: u32, from: u32) -> Self {
        let bits = entries.checked_ilog2().unwrap_or(0).clamp(9, 18);
        Self {
            known,
            records: Symbols::new([bits.min(12), bits.min(13), bits.min(14)]),
            records_low: Symbols::new([bits.min(13), bits.min(14)]),
            gaps: Symbols::new([bits.min(12), bits.min(12), bits.min(14)]),
            upper_bits: Symbols::new([8]),
            by_three: Predictions::new(bits),
            by_two: Predictions::new(bits.min(14)),
            by_pushes: Predictions::new(bits.min(14)),
            by_pair: Predictions::new(bits.min(14)),
            is_restored: Flags::new(1),
            is_aligned: Flags::new(1),
            history: [NONE; 2],
            pairs: [0; 3],
            streak: 0,
            last: from,
            end: Some(0),
            is_first: true,
            function: 0,
            pushes: 0,
            saved: 0,
            is_prologue: true,
            state: 0,
            behind: NONE,
            before_pops: NONE,
        }
    }

    /// Codes the next entry; `None` if what is decoded cannot be one.
    #[inline(always)]
    pub(super) fn code<C: Coder>(&mut self, coder: &mut C, entry: Entry) -> Option<Entry> {
        // Where the next function is expected, from the last entry on.
        let aligned = self.end.map(|end| {
            let end = self.last.wrapping_add(end);
            end.checked_next_multiple_of(FUNCTION_ALIGNMENT).unwrap_or(end).wrapping_sub(self.last)
        });
        let distance = entry.offset.wrapping_sub(self.last);
        let gap = match aligned {
            Some(aligned) if distance == aligned => ALIGNED,
            Some(_) => distance.wrapping_add(1),
            None => distance,
        };
        let (record, gap) = self.code_pair(coder, entry.record, gap);
        let distance = match aligned {
            Some(aligned) if gap == ALIGNED => aligned,
            Some(_) => gap.wrapping_sub(1),
            None => gap,
        };
        let offset = self.last.checked_add(distance)?;
        if distance == 0 && !self.is_first {
            return None;
        }
        self.follow(record, gap)?;
        self.last = offset;
        self.is_first = false;
        Some(Entry { offset, record })
    }

    /// Takes note of what the entry does.
    #[inline(always)]
    fn follow(&mut self, record: u16, gap: u32) -> Option<()> {
        let facts = self.known.0.get(usize::from(record))?;
        if self.end.is_some() {
            self.function = record;
            self.pushes = 0;
            self.saved = 0;
            self.is_prologue = true;
            self.behind = NONE;
            self.before_pops = NONE;
        }
        if facts.kind == kind::PUSH_RUN {
            self.pushes = hash([self.pushes, record.into()]);
            if self.is_prologue {
                self.saved = facts.saved;
            }
        } else {
            self.is_prologue = false;
        }
        if facts.kind == kind::POP_RUN {
            self.before_pops = self.behind;
        }
        self.behind = facts.behind;
        self.state = facts.state;
        self.end = facts.end;
        self.history = [record, self.history[0]];
        self.pairs = [hash([record.into(), gap.into()]), self.pairs[0], self.pairs[1]];
        Some(())
    }

    #[inline(always)]
    fn code_pair<C: Coder>(&mut self, coder: &mut C, record: u16, gap: u32) -> (u16, u32) {
        let by_three = self.pairs[0] ^ self.pairs[1].rotate_left(17) ^ self.pairs[2].rotate_left(39);
        let by_three = by_three.wrapping_mul(SPREAD);
        if let Some(predicted) = self.by_three.find(by_three) {
            let context = usize::from(predicted.trust) << 4 | self.streak.min(15);
            let is_right = predicted.record == record && predicted.gap == gap;
            if self.by_three.is_right.code(coder, context, is_right) {
                self.streak += 1;
                self.by_three.learn(by_three, predicted.record, predicted.gap, 15);
                return (predicted.record, predicted.gap);
            }
        }
        self.streak = 0;
        let record = self.code_record(coder, record);
        let gap = self.code_gap(coder, record, gap);
        self.by_three.learn(by_three, record, gap, 15);
        (record, gap)
    }

    #[inline(always)]
    fn code_record<C: Coder>(&mut self, coder: &mut C, record: u16) -> u16 {
        let [r0, r1] = self.history.map(u64::from);
        let (by_two, by_pushes) = (hash([1, r0, r1]), hash([2, r0, self.pushes]));
        let coded = self.guess_record(coder, record, by_two, by_pushes);
        let record = coded.unwrap_or_else(|| self.code_number(coder, record));
        self.by_two.learn(by_two, record, 0, 1);
        self.by_pushes.learn(by_pushes, record, 0, 1);
        record
    }

    /// The record, if it is one of those that are likely.
    #[inline(always)]
    fn guess_record<C: Coder>(
        &mut self,
        coder: &mut C,
        record: u16,
        by_two: u64,
        by_pushes: u64,
    ) -> Option<u16> {
        let is_start = self.end.is_some();
        if !is_start
            && self.last_kind() == kind::POP_RUN
            && self.before_pops != NONE
            && self.is_restored.code(coder, 0, record == self.before_pops)
        {
            return Some(self.before_pops);
        }
        let mut tried = NONE;
        if let Some(predicted) = self.by_two.find(by_two) {
            tried = predicted.record;
            if self.by_two.is_right.code(coder, predicted.trust.into(), record == tried) {
                return Some(tried);
            }
        }
        let predicted =
            self.by_pushes.find(by_pushes).filter(|predicted| !is_start && predicted.record != tried);
        if let Some(predicted) = predicted
            && self.by_pushes.is_right.code(coder, predicted.trust.into(), record == predicted.record)
        {
            return Some(predicted.record);
        }
        None
    }

    #[inline(always)]
    fn last_kind(&self) -> u8 {
        self.known.0.get(usize::from(self.history[0])).map_or(0, |facts| facts.kind)
    }

    /// Codes the number of a record, in few steps if it is small, as those of frequent ones are.
    #[inline(always)]
    fn code_number<C: Coder>(&mut self, coder: &mut C, record: u16) -> u16 {
        let [r0, _] = self.history.map(u64::from);
        let contexts = if self.end.is_some() {
            [1, hash([1, self.saved]), hash([1, r0]), hash([1, self.function.into(), r0])]
        } else {
            let kind = u64::from(self.last_kind());
            [hash([2, kind]), hash([2, self.saved, kind]), hash([2, self.state]), hash([2, self.saved, r0])]
        };
        let number = u32::from(record);
        let class = match number {
            0..12 => number,
            12..28 => 12,
            28..284 => 13,
            284..4380 => 14,
            _ => 15,
        };
        let class =
            self.records.code(coder, [contexts[1], contexts[2], contexts[3]], 0, class as usize) as u32;
        let (first, steps) = match class {
            0..12 => return class as u16,
            12 => (12, 1),
            13 => (28, 2),
            14 => (284, 3),
            _ => (4380, 4),
        };
        let left = number.wrapping_sub(first);
        let mut step = class;
        for at in (0..steps).rev() {
            let nibble = (left >> (4 * at) & 15) as usize;
            step = step << 4
                | self.records_low.code(coder, [contexts[2], contexts[3]], step.into(), nibble) as u32;
        }
        // One that is out of range is none of the table's; the caller finds that out.
        (first + (step & ((1 << (4 * steps)) - 1))) as u16
    }

    #[inline(always)]
    fn code_gap<C: Coder>(&mut self, coder: &mut C, record: u16, gap: u32) -> u32 {
        if self.end.is_some() {
            if self.is_aligned.code(coder, 0, gap == ALIGNED) {
                return ALIGNED;
            }
            return self.code_length(coder, record, gap);
        }
        let by_pair = hash([3, self.history[0].into(), record.into()]);
        let mut coded = None;
        if let Some(predicted) = self.by_pair.find(by_pair)
            && self.by_pair.is_right.code(coder, predicted.trust.into(), predicted.gap == gap)
        {
            coded = Some(predicted.gap);
        }
        let gap = coded.unwrap_or_else(|| self.code_length(coder, record, gap));
        self.by_pair.learn(by_pair, 0, gap, 1);
        gap
    }

    /// Codes a number of bytes: its length in bits, its upper bits as they are learned, its lower bits as they are.
    #[inline(always)]
    fn code_length<C: Coder>(&mut self, coder: &mut C, record: u16, gap: u32) -> u32 {
        let (r0, r1) = (u64::from(record), u64::from(self.history[0]));
        let contexts = [hash([1, r0]), hash([2, r1]), hash([3, r0, r1])];
        let len = (32 - gap.leading_zeros()).min(LONG);
        let len = self.gaps.code(coder, contexts, 0, len as usize) as u32;
        // The highest bit is known.
        let (mut value, lower) = match len {
            0 => return 0,
            LONG => (0, 32),
            _ => (1, len - 1),
        };
        let upper = lower.min(4);
        let plain = lower - upper;
        if upper != 0 {
            let kind = self.known.0.get(usize::from(record)).map_or(0, |facts| facts.kind);
            let bits = (gap >> plain & ((1 << upper) - 1)) as usize;
            let context = [hash([len.into(), kind.into()])];
            value =
                value << upper | self.upper_bits.code(coder, context, 0, bits) as u32 & ((1 << upper) - 1);
        }
        if plain != 0 {
            value = value << plain | coder.bits(plain, gap & ((1 << plain) - 1));
        }
        value
    }
}
