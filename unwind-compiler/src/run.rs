//! Builds run records: a prologue's pushes or an epilogue's pops as one record.
//!
//! Any part of a run is a run, so whether rows can be one is a matter of neighbours ([`links`]), and the
//! rows of a function fall apart into chains within which alone runs can be.

use windlass_schema::Record;
use windlass_schema::record::{MAX_RUN_BYTES, frame_pointer, kind, return_address};

/// Whether some run holds a state and, `distance` bytes on, the next.
pub(crate) fn links(state: Record, distance: u64, next: Record) -> bool {
    if distance > u64::from(MAX_RUN_BYTES) || state.kind() != kind::SP {
        return false;
    }
    [kind::PUSH_RUN, kind::POP_RUN]
        .into_iter()
        .any(|kind| Run::begin(state, kind).is_some_and(|mut run| run.extend(distance, next)))
}

/// A run under construction; fields as in [`windlass_schema::record`].
pub(crate) struct Run {
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
    pub(crate) fn begin(base: Record, run_kind: u8) -> Option<Self> {
        let base_words = u32::from(u8::try_from(base.offset() / 8).ok()?);
        let foldable = base.kind() == kind::SP
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
    pub(crate) fn extend(&mut self, distance: u64, next: Record) -> bool {
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
        let sets_rbp = is_push && next.kind() == kind::FP && offset_is(self.words);
        let moves = next.kind() == kind::SP && words.is_some_and(offset_is);
        let stays = next.kind() == kind::SP && offset_is(self.words);
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

    pub(crate) fn to_record(&self) -> Record {
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
