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
    // Nearly all that are: one push or pop of something else than rbp. Only the offset differs, by a word.
    let is_word = matches!(next.offset().wrapping_sub(state.offset()), 8 | -8);
    if is_word && next.0 as u32 == state.0 as u32 && distance > 0 {
        return base_words(state).is_some() && words_of(next).is_some();
    }
    let is_run = |kind| Run::begin(state, kind).is_some_and(|mut run| run.extend(distance, next));
    is_run(kind::PUSH_RUN) || is_run(kind::POP_RUN)
}

/// A run under construction; fields as in [`windlass_schema::record`].
pub(crate) struct Run {
    kind: u8,
    base: Record,
    base_words: u32,
    mask: u16,
    event: u8,
    /// Bits 6 and 7 of byte 0.
    last: u8,
    extra: u8,
    /// Whether nothing can follow.
    is_closed: bool,
    /// State at the last distance.
    words: u32,
    frame_pointer: (u8, i16),
}

/// Bits of byte 0.
const LAST: u8 = 0x40;
const FRAME: u8 = 0x80;

impl Run {
    pub(crate) fn begin(base: Record, run_kind: u8) -> Option<Self> {
        let base_words = base_words(base)?;
        Some(Self {
            kind: run_kind,
            base,
            base_words,
            mask: 0,
            event: 0,
            last: 0,
            extra: 0,
            is_closed: false,
            words: base_words,
            frame_pointer: (base.frame_pointer(), base.frame_pointer_offset()),
        })
    }

    /// Takes `next`, the state from `distance` on, into the run if it can.
    pub(crate) fn extend(&mut self, distance: u64, next: Record) -> bool {
        if self.is_closed
            || !(1..=u64::from(MAX_RUN_BYTES)).contains(&distance)
            || next.return_address() != return_address::AT_CFA
        {
            return false;
        }
        let bit = distance as u8 - 1;
        if self.kind == kind::PUSH_RUN { self.push(bit, next) } else { self.pop(bit, next) }
    }

    fn push(&mut self, bit: u8, next: Record) -> bool {
        let Some(words) = words_of(next) else { return false };
        let saves = (next.frame_pointer(), next.frame_pointer_offset());
        // `push rbp` saves it where the CFA then is.
        let saves_here = saves.0 == frame_pointer::AT_CFA && i64::from(saves.1) == -8 * i64::from(words);
        match (next.kind(), saves == self.frame_pointer) {
            (kind::FP, true) if words == self.words => (self.last, self.is_closed) = (LAST, true),
            (kind::SP, true) if words == self.words + 1 => {}
            (kind::SP, true) if words > self.words + 1 => {
                let Ok(extra) = u8::try_from(words - self.words - 1) else { return false };
                (self.extra, self.is_closed) = (extra, true);
            }
            (kind::SP, false)
                if self.event == 0 && saves_here && (self.words..=self.words + 1).contains(&words) =>
            {
                self.event = 0x80 | bit;
            }
            _ => return false,
        }
        self.mask |= u16::from(next.kind() == kind::FP || words != self.words) << bit;
        (self.words, self.frame_pointer) = (words, saves);
        true
    }

    fn pop(&mut self, bit: u8, next: Record) -> bool {
        if next == Record::NO_CFI {
            return self.close(bit, LAST, 0);
        }
        let Some(words) = words_of(next) else { return false };
        let saves = (next.frame_pointer(), next.frame_pointer_offset());
        let base_saves = (self.base.frame_pointer(), self.base.frame_pointer_offset());
        match next.kind() {
            kind::FP if saves == (frame_pointer::AT_CFA, -16) && words != 0 => {
                return u8::try_from(words).is_ok_and(|extra| self.close(bit, LAST | FRAME, extra));
            }
            kind::SP if words > self.base_words && saves == base_saves => {
                let extra = u8::try_from(words - self.base_words);
                return extra.is_ok_and(|extra| self.close(bit, LAST, extra));
            }
            kind::SP if words == self.words || words + 1 == self.words => {}
            _ => return false,
        }
        if saves != self.frame_pointer {
            if saves != (frame_pointer::SAME, 0) || self.event != 0 {
                return false;
            }
            self.event = 0x80 | bit;
        }
        self.mask |= u16::from(words != self.words) << bit;
        (self.words, self.frame_pointer) = (words, saves);
        true
    }

    fn close(&mut self, bit: u8, last: u8, extra: u8) -> bool {
        self.mask |= 1 << bit;
        (self.last, self.extra, self.is_closed) = (last, extra, true);
        true
    }

    pub(crate) fn to_record(&self) -> Record {
        let first = self.kind | self.base.frame_pointer() << 4 | self.last;
        Record(
            u64::from(first)
                | u64::from(self.base_words) << 8
                | u64::from(self.mask) << 16
                | u64::from(self.event) << 32
                | u64::from(self.extra) << 40
                | u64::from(self.base.frame_pointer_offset() as u16) << 48,
        )
    }
}

/// The CFA's offset in words, of a state that a run can begin with.
fn base_words(base: Record) -> Option<u32> {
    let words = u32::from(u8::try_from(base.offset() / 8).ok()?);
    let is_base = base.kind() == kind::SP
        && base.return_address() == return_address::AT_CFA
        && base.frame_pointer() <= frame_pointer::AT_CFA
        && base.offset() % 8 == 0
        && base.offset() >= 0;
    is_base.then_some(words)
}

/// The CFA's offset in words.
fn words_of(record: Record) -> Option<u32> {
    (record.offset() % 8 == 0).then(|| u32::try_from(record.offset() / 8).ok()).flatten()
}
