//! What do eight bytes of code look like: a prologue, an epilogue, a function's end?
//!
//! All bytes are looked at at once ([`code_bytes`](crate::x86_64::code_bytes)): a search looks at hundreds of words.

use super::{
    DOUBT, FUNCTION_ALIGNMENT, FUNCTION_END, LEAVE, NOP, POP_RBP, PUSH_RBP, RET, SET_RBP, TRAP, is_zero,
};
use crate::x86_64::code_bytes::{each, is, same};

/// What eight bytes of code look like, wherever an instruction may begin: the highest bit of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Signs {
    /// `push %rbp; mov %rsp, %rbp` begins.
    pub(super) prologues: u64,
    /// An epilogue's instruction is here, or the last byte of padding.
    pub(super) doubts: u64,
    /// A function's last byte is here.
    pub(super) ends: u64,
    /// The last but one byte of padding in front of an aligned address is here, and both are traps.
    pub(super) traps: u64,
}

impl Signs {
    /// Of `bytes`, which lie at `address`. `behind` are those that follow.
    #[inline(always)]
    pub(super) fn of(bytes: u64, behind: u64, address: u64) -> Self {
        let next = bytes >> 8 | behind << 56;
        let (third, fourth) = (bytes >> 16 | behind << 48, bytes >> 24 | behind << 40);
        // The byte that begins an instruction of so many which ends in front of an aligned address, if it is one of these.
        let aligned = FUNCTION_ALIGNMENT - 1 - (address & (FUNCTION_ALIGNMENT - 1));
        let last_of = |bytes: u64| {
            let at = (aligned + 1).wrapping_sub(bytes);
            is_zero(at >> 3) << (8 * (at & 7) + 7)
        };
        let last = last_of(1);
        let [one, other] = SET_RBP.map(|code| is(third, code >> 8 & 0xff) & is(fourth, code >> 16));
        let prologues = is(bytes, PUSH_RBP) & is(next, SET_RBP[0] & 0xff) & (one | other);
        // `pop %rbp`, and no displacement from rbp, which that is the last part of: those are multiples of four, and
        // instructions that are begin with a REX prefix; `mov %rbp, %rsp` and `pop %rbp`; `leave`, but not behind what
        // has `%ecx, %ecx` for operands.
        let is_displacement = is(next & each(3), 0) & !is(next & each(0xf0), 0x40);
        let epilogue = is(bytes, POP_RBP) & !is_displacement
            | is(next, POP_RBP) & (is(bytes, 0xe5) | is(bytes, 0xec))
            // 31, 33, 84, 85.
            | is(next, LEAVE) & !(is(bytes | each(2), 0x33) | is(bytes | each(1), 0x85));
        // What may never come back, in front of another function: `ud2`, `hlt`, jumps and calls.
        let leaves = last_of(5) & is(bytes | each(1), 0xe9)
            | last_of(6) & is(bytes, 0xff) & (is(next, 0x15) | is(next, 0x25))
            | last_of(2) & (is(bytes, 0xeb) | is(bytes, 0x0f) & is(next, 0x0b))
            | last & is(bytes, 0xf4);
        let is_trap = is(bytes, TRAP);
        let is_padding_next =
            is(next, TRAP) | is(next, NOP) | is(next, 0x0f) | is(next, 0x66) | is(next, 0x2e);
        Self {
            prologues,
            doubts: epilogue | leaves | last & (is(bytes, NOP) | is(bytes, 0)),
            ends: is(bytes, RET) & (is_padding_next | last) | is_trap & last,
            traps: last_of(2) & is_trap & same(bytes, next),
        }
    }

    /// Those of the first `count` bytes, one to eight.
    #[inline(always)]
    pub(super) const fn first(self, count: u64) -> Self {
        let mask = u64::MAX >> (u64::BITS as u64 - 8 * count);
        Self {
            prologues: self.prologues & mask,
            doubts: self.doubts & mask,
            ends: self.ends & mask,
            traps: self.traps & mask,
        }
    }

    /// The highest bit of each byte up to the last prologue's first.
    #[inline(always)]
    const fn hidden(self) -> u64 {
        let hidden = self.prologues | self.prologues >> 8;
        let hidden = hidden | hidden >> 16;
        hidden | hidden >> 32
    }

    /// At which byte the last prologue begins, if there is one.
    #[inline(always)]
    pub(super) const fn last_prologue(self) -> u64 {
        // The top byte of this product is the sum of all bytes.
        ((self.hidden() >> 7).wrapping_mul(each(1)) >> 56).wrapping_sub(1)
    }

    /// Whether there is padding behind the last prologue that is between functions for certain. A single trap may be what
    /// a call that does not return comes back to.
    #[inline(always)]
    pub(super) fn is_behind_padding(self) -> bool {
        self.traps & !self.hidden() != 0
    }

    /// What was seen behind the last prologue.
    #[inline(always)]
    pub(super) fn seen(self) -> u64 {
        let hidden = self.hidden();
        // The lowest bit of each byte, as a value below 2^63.
        let is_seen = |signs: u64| is_zero((signs & !hidden) >> 7) ^ 1;
        is_seen(self.doubts) * DOUBT | is_seen(self.ends) * FUNCTION_END
    }
}
