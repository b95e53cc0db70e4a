//! Procedure linkage tables of x86-64 that no CFI covers: lld and mold write none.
//!
//! ```text
//!            ld, lld                 with IBT               mold                  call frame
//! first      push [rip + a]          push [rip + a]         endbr64               + 8 with mold
//!                                                           push r11              + 8 with mold
//!                                                           push [rip + a]        cfa = rsp + 16
//!            jmp [rip + b]           bnd jmp [rip + b]      jmp [rip + b]         cfa = rsp + 24
//! lazy       jmp [rip + c]           endbr64                endbr64               cfa = rsp + 8
//!            push n                  push n                 mov r11d, n
//!            jmp first               bnd jmp first          jmp [rip + c]         cfa = rsp + 16 behind a push
//! not lazy   jmp [rip + c]           endbr64                endbr64               cfa = rsp + 8
//!                                    bnd jmp [rip + c]      jmp [rip + c]
//! ```
//! An indirect jump alone is no proof, as code in assembly has some in the middle of a function. So a lazy entry
//! counts if it is in a row with the first one that it jumps to; one that is not lazy, if a whole section is
//! made of nothing else.

use windlass_schema::{CfaRule, FramePointerRule, Register, ReturnAddressRule, Rule};

use super::by_bytes::ENDBR64;
use crate::recognise::Linkage;

/// Bytes of an entry, and what its address is a multiple of.
const ENTRY_BYTES: usize = 16;
/// Bytes of a short one.
const SHORT_BYTES: usize = 8;

const PUSH_MEMORY: [u8; 2] = [0xff, 0x35];
const JUMP_MEMORY: [u8; 2] = [0xff, 0x25];
const PUSH_CONSTANT: [u8; 1] = [0x68];
const JUMP: [u8; 1] = [0xe9];
const BND: [u8; 1] = [0xf2];
const PUSH_R11: [u8; 2] = [0x41, 0x53];
const MOVE_TO_R11: [u8; 2] = [0x41, 0xbb];

/// What fills an entry up.
const PADDING: [&[u8]; 7] = [
    &[0x66, 0x0f, 0x1f, 0x44, 0, 0],
    &[0x0f, 0x1f, 0x44, 0, 0],
    &[0x0f, 0x1f, 0x40, 0],
    &[0x0f, 0x1f, 0],
    &[0x66, 0x90],
    &[0x90],
    &[0xcc],
];

/// Reads instructions by their bytes.
#[derive(Clone, Copy)]
struct Cursor<'a> {
    code: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    fn skip(&mut self, bytes: &[u8]) -> bool {
        let is_there = self.code.get(self.at..).is_some_and(|code| code.starts_with(bytes));
        self.at += if is_there { bytes.len() } else { 0 };
        is_there
    }

    /// An instruction with a constant of 4 bytes.
    fn constant(&mut self, opcode: &[u8]) -> Option<i32> {
        let start = self.at;
        let value = self.skip(opcode).then(|| self.code.get(self.at..)?.first_chunk()).flatten();
        match value {
            Some(value) => self.at += value.len(),
            None => self.at = start,
        }
        value.map(|value| i32::from_le_bytes(*value))
    }

    fn jump(&mut self, opcode: &[u8]) -> Option<i32> {
        let start = self.at;
        self.skip(&BND);
        let to = self.constant(opcode);
        if to.is_none() {
            self.at = start;
        }
        to
    }

    /// Up to the next multiple of `bytes`, if nothing but padding is there.
    fn pad(&mut self, bytes: usize) -> Option<usize> {
        while !self.at.is_multiple_of(bytes) {
            PADDING.iter().any(|padding| self.skip(padding)).then_some(())?;
        }
        Some(self.at)
    }
}

fn frame(cfa: CfaRule) -> Rule {
    Rule::Frame { cfa, return_address: ReturnAddressRule::AtCfa(-8), frame_pointer: FramePointerRule::Same }
}

fn rsp(offset: i32) -> Rule {
    frame(CfaRule::Offset(Register::RSP, offset))
}

/// Which kind of entries a first one has behind it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Style {
    Pushing,
    Mold,
}

/// The first entry, and what it goes with.
fn first(code: &[u8]) -> Option<(Style, Linkage)> {
    // Most code is something else, and all of it is asked about.
    if !code.starts_with(&PUSH_MEMORY) && !code.starts_with(&ENDBR64) {
        return None;
    }
    let mut c = Cursor { code, at: 0 };
    let mut rows = Vec::new();
    let style = if c.skip(&ENDBR64) {
        rows.push((0, rsp(8)));
        c.skip(&PUSH_R11).then_some(Style::Mold)?
    } else {
        Style::Pushing
    };
    rows.push((c.at, rsp(16)));
    c.constant(&PUSH_MEMORY)?;
    rows.push((c.at, rsp(24)));
    c.jump(&JUMP_MEMORY)?;
    Some((style, Linkage { bytes: c.pad(ENTRY_BYTES)?, rows }))
}

/// What an entry is, and its bytes.
enum Entry {
    /// From which byte on the CFA is a word further, and where it jumps to from the start of `code`.
    Pushing {
        threshold: i16,
        target: i64,
        bytes: usize,
    },
    Jumping {
        is_mold: bool,
        bytes: usize,
    },
}

fn entry(code: &[u8]) -> Option<Entry> {
    let mut c = Cursor { code, at: 0 };
    let has_landing = c.skip(&ENDBR64);
    let is_mold = has_landing && c.constant(&MOVE_TO_R11).is_some();
    let is_jumping = c.jump(&JUMP_MEMORY).is_some();
    let is_jump = is_mold || has_landing && is_jumping;
    if !is_jump && c.constant(&PUSH_CONSTANT).is_some() {
        let threshold = c.at as i16;
        let to = c.jump(&JUMP)?;
        let target = c.at as i64 + i64::from(to);
        return Some(Entry::Pushing { threshold, target, bytes: c.pad(ENTRY_BYTES)? });
    }
    is_jumping.then_some(())?;
    let bytes = c.pad(if has_landing { ENTRY_BYTES } else { SHORT_BYTES })?;
    Some(Entry::Jumping { is_mold, bytes })
}

/// The run of entries that `code` begins with, at `address`. With `is_section`, `code` is a whole section.
#[inline]
pub(super) fn run(code: &[u8], address: u64, is_section: bool) -> Option<Linkage> {
    if !address.is_multiple_of(SHORT_BYTES as u64) {
        return None;
    }
    run_of_aligned(code, address, is_section)
}

fn run_of_aligned(code: &[u8], address: u64, is_section: bool) -> Option<Linkage> {
    let header = address.is_multiple_of(ENTRY_BYTES as u64).then(|| first(code)).flatten();
    if header.is_none() && !is_section {
        return None;
    }
    let (mut at, style, mut rows) = match header {
        Some((style, Linkage { bytes, rows })) => (bytes, Some(style), rows),
        None => (0, None, Vec::new()),
    };
    let header_bytes = at;
    // Entries that need none.
    let is_other_section = is_section && style.is_none();
    while let Some(entry) = code.get(at..).and_then(entry) {
        let (rule, bytes) = match entry {
            Entry::Pushing { threshold, target, bytes } => {
                let is_first = at as i64 + target == 0 && style == Some(Style::Pushing);
                let is_aligned = (address + at as u64).is_multiple_of(ENTRY_BYTES as u64);
                if !is_aligned || !(is_first || is_other_section) {
                    break;
                }
                (frame(CfaRule::Plt { threshold, base: 8 }), bytes)
            }
            Entry::Jumping { is_mold, bytes } => {
                if !(is_mold && style == Some(Style::Mold) || is_other_section) {
                    break;
                }
                (rsp(8), bytes)
            }
        };
        if rows.last().is_none_or(|(_, last)| *last != rule) {
            rows.push((at, rule));
        }
        at += bytes;
    }
    let is_proved =
        if style.is_some() { at > header_bytes } else { is_other_section && at == code.len() && at > 0 };
    is_proved.then_some(Linkage { bytes: at, rows })
}
