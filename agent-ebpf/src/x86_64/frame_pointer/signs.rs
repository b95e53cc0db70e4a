//! What do eight bytes of code look like: a prologue, an epilogue, a function's end?
//!
//! A bit for each byte, without a branch: the verifier goes through both sides of each, and a search looks at hundreds of words.

use super::{
    DOUBT, FUNCTION_ALIGNMENT, FUNCTION_END, LEAVE, NOP, POP_RBP, PUSH_RBP, RET, SET_RBP, TRAP, is_among,
    is_zero,
};

/// What eight bytes of code look like, wherever an instruction may begin: a bit for each.
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
        const MASK: u64 = 0xffff_ffff;
        const FIRST: u64 = SET_RBP[0] << 8 | PUSH_RBP;
        const SECOND: u64 = SET_RBP[1] << 8 | PUSH_RBP;
        // The byte in front of an aligned address, if there is one among these.
        let aligned = FUNCTION_ALIGNMENT - 1 - (address & (FUNCTION_ALIGNMENT - 1));
        let (mut signs, mut bytes, mut behind) =
            (Self { prologues: 0, doubts: 0, ends: 0, traps: 0 }, bytes, behind);
        let mut at = 0;
        while at < 8 {
            let (byte, next) = (bytes & 0xff, bytes >> 8 & 0xff);
            let is_last = is_zero(at ^ aligned);
            signs.prologues |= (is_zero(bytes & MASK ^ FIRST) | is_zero(bytes & MASK ^ SECOND)) << at;
            // `pop %rbp`, and no displacement from rbp, which that is the last part of: those are multiples of four, and
            // instructions that are begin with a REX prefix; `mov %rbp, %rsp` and `pop %rbp`; `leave`, but not behind what
            // has `%ecx, %ecx` for operands.
            let is_displacement = is_zero(next & 3) & (is_zero(next & 0xf0 ^ 0x40) ^ 1);
            let epilogue = is_zero(byte ^ POP_RBP) & (is_displacement ^ 1)
                | is_zero(next ^ POP_RBP) & is_among(byte, [0xe5, 0xec])
                | is_zero(next ^ LEAVE) & (is_among(byte, [0x31, 0x33, 0x84, 0x85]) ^ 1);
            // What may never come back, in front of another function: `ud2`, `hlt`, jumps and calls.
            let is_last_of = |bytes: u64| is_zero((at + bytes - 1) ^ aligned);
            let leaves = is_last_of(5) & is_among(byte, [0xe8, 0xe9])
                | is_last_of(6) & is_zero(byte ^ 0xff) & is_among(next, [0x15, 0x25])
                | is_last_of(2) & (is_zero(byte ^ 0xeb) | is_zero(byte ^ 0x0f) & is_zero(next ^ 0x0b))
                | is_last & is_zero(byte ^ 0xf4);
            signs.doubts |= (epilogue | leaves | is_last & is_among(byte, [NOP, 0])) << at;
            let is_padded = is_among(next, [TRAP, NOP, 0x0f, 0x66, 0x2e]);
            let end = is_zero(byte ^ RET) & (is_padded | is_last) | is_zero(byte ^ TRAP) & is_last;
            signs.ends |= end << at;
            let is_last_but_one = is_zero((at + 1) ^ aligned);
            signs.traps |= (is_last_but_one & is_zero(byte ^ TRAP) & is_zero(next ^ TRAP)) << at;
            bytes = bytes >> 8 | behind << 56;
            behind >>= 8;
            at += 1;
        }
        signs
    }

    /// Those of the first `count` bytes.
    #[inline(always)]
    pub(super) const fn first(self, count: u64) -> Self {
        let mask = (1 << count) - 1;
        Self {
            prologues: self.prologues & mask,
            doubts: self.doubts & mask,
            ends: self.ends & mask,
            traps: self.traps & mask,
        }
    }

    /// A bit for each byte up to the last prologue's first.
    #[inline(always)]
    const fn hidden(self) -> u64 {
        let hidden = self.prologues | self.prologues >> 1;
        let hidden = hidden | hidden >> 2;
        hidden | hidden >> 4
    }

    /// At which byte the last prologue begins, if there is one.
    #[inline(always)]
    pub(super) const fn last_prologue(self) -> u64 {
        let (mut last, mut at) = (0, 1);
        while at < 8 {
            last += is_zero(self.prologues >> at) ^ 1;
            at += 1;
        }
        last
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
        let is_seen = |signs: u64| is_zero(signs & !hidden) ^ 1;
        is_seen(self.doubts) * DOUBT | is_seen(self.ends) * FUNCTION_END
    }
}
