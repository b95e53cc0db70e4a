//! Procedure linkage tables of aarch64, which no linker writes CFI for.
//!
//! ```text
//! first      bti c                     with BTI                       cfa = sp, return address in x30
//!            stp x16, x30, [sp, -16]!                                 behind it: cfa = sp + 16, at cfa - 8
//!            adrp x16, a; ldr x17, [x16, b]; add x16, x16, c; br x17; nop ...
//! others     bti c                     with BTI                       cfa = sp, return address in x30
//!            adrp x16, a; ldr x17, [x16, b]; add x16, x16, c
//!            autia1716                 with signed pointers
//!            br x17; nop ...
//! ```
//! An indirect jump alone is no proof. So an entry counts in a row with a first one, which nothing else looks like, or
//! where a whole section is made of nothing else; mold leaves the `add` out there.

use windlass_schema::{CfaRule, FramePointerRule, Register, ReturnAddressRule, Rule};

use super::instruction::BYTES;
use crate::recognise::Linkage;

const BTI_C: u32 = 0xd503_245f;
const NOP: u32 = 0xd503_201f;
const AUTIA1716: u32 = 0xd503_219f;
const BR_X17: u32 = 0xd61f_0220;
const STP_X16_X30: u32 = 0xa9bf_7bf0;

/// adrp x16, ldr x17, [x16, n] and add x16, x16, n: bits that count, and what they are.
const ADRP_X16: (u32, u32) = (0x9f00_001f, 0x9000_0010);
const LDR_X17: (u32, u32) = (0xffc0_03ff, 0xf940_0211);
const ADD_X16: (u32, u32) = (0xff80_03ff, 0x9100_0210);

/// Reads instructions by their bits.
#[derive(Clone, Copy)]
struct Cursor<'a> {
    code: &'a [[u8; BYTES]],
    at: usize,
}

impl Cursor<'_> {
    fn skip(&mut self, (mask, value): (u32, u32)) -> bool {
        let word = self.code.get(self.at).map(|bytes| u32::from_le_bytes(*bytes));
        let is_there = word.is_some_and(|word| word & mask == value);
        self.at += usize::from(is_there);
        is_there
    }

    fn skip_word(&mut self, word: u32) -> bool {
        self.skip((u32::MAX, word))
    }

    /// An entry from its adrp on.
    fn jump(&mut self, is_short_known: bool) -> Option<()> {
        (self.skip(ADRP_X16) && self.skip(LDR_X17)).then_some(())?;
        (self.skip(ADD_X16) || is_short_known).then_some(())?;
        self.skip_word(AUTIA1716);
        self.skip_word(BR_X17).then_some(())?;
        while self.skip_word(NOP) {}
        Some(())
    }
}

fn frame(offset: i32, return_address: ReturnAddressRule) -> Rule {
    Rule::Frame {
        cfa: CfaRule::Offset(Register::SP, offset),
        return_address,
        frame_pointer: FramePointerRule::Same,
    }
}

/// The first entry: its instructions, and the row behind its store.
fn first(code: &[[u8; BYTES]]) -> Option<(usize, usize)> {
    let mut c = Cursor { code, at: 0 };
    c.skip_word(BTI_C);
    c.skip_word(STP_X16_X30).then_some(())?;
    let pushed = c.at;
    c.jump(false)?;
    Some((c.at, pushed))
}

/// The run of entries that `code` begins with, at `address`. With `is_section`, `code` is a whole section.
pub(super) fn run(code: &[u8], address: u64, is_section: bool) -> Option<Linkage> {
    if !address.is_multiple_of(BYTES as u64) {
        return None;
    }
    let (code, rest) = code.as_chunks();
    let header = first(code);
    if header.is_none() && !is_section {
        return None;
    }
    let called = frame(0, ReturnAddressRule::Register(Register::X30));
    let mut rows = vec![(0, called)];
    let mut c = Cursor { code, at: 0 };
    if let Some((instructions, pushed)) = header {
        rows.push((pushed * BYTES, frame(16, ReturnAddressRule::AtCfa(-8))));
        rows.push((instructions * BYTES, called));
        c.at = instructions;
    }
    let start = c.at;
    let mut end = start;
    loop {
        c.skip_word(BTI_C);
        if c.jump(header.is_none()).is_none() {
            break;
        }
        end = c.at;
    }
    let is_proved = match header {
        Some(_) => end > start,
        None => is_section && rest.is_empty() && end == code.len() && end > 0,
    };
    is_proved.then_some(Linkage { bytes: end * BYTES, rows })
}
