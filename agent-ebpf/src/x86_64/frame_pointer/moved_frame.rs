//! Whether the innermost frame is on its way down the stack, so that nothing is saved yet where rbp points.
//!
//! A function that ends with a call of another, which takes more arguments on the stack than it was given, needs room for
//! them above its own frame. Cranelift makes it where the function starts (`gen_clobber_save`,
//! cranelift/codegen/src/isa/x64/abi.rs):
//!
//! ```text
//!     push %rbp;  mov %rsp, %rbp
//!     sub $n, %rsp;  mov %rsp, %rbp
//!     mov n(%rsp), %r11;    mov %r11, (%rsp)
//!     mov n+8(%rsp), %r11;  mov %r11, 8(%rsp)
//! ```
//!
//! From the second `mov` to the last one's end, what is above rbp is whatever earlier calls have left: maybe a return
//! address. HotSpot's compiler raises rbp behind such a `mov`, and [`hotspot`](crate::x86_64::hotspot) knows its form.
//!
//! # Why this shape
//! rbp is rsp there, as it is in all of a function that only keeps a frame pointer. So the last bytes that were run are
//! looked at for a `mov %rsp, %rbp` that is not a prologue's: as many as the moves take at most. That refuses a few
//! instructions behind the moves too, and none of a function that has no second `mov`.

use windlass_schema::StopReason;

use super::{CodeWithoutTable, DWARF_RBP, DWARF_RSP, PUSH_RBP, SET_RBP};
use crate::memory::StackMemory;
use crate::x86_64::Registers;
use crate::x86_64::code_bytes::{first, is};

/// How many bytes in front of an address are looked at: one in front of `mov %rsp, %rbp`, its three, and those of three
/// moves behind it, eight, four and eight where n takes four.
const BYTES: u64 = 24;

/// Whether the first `run` of these bytes of code have a `mov %rsp, %rbp` that is not behind `push %rbp`.
#[inline(always)]
const fn sets_rbp_again(code: [u64; 3], run: u64) -> bool {
    let (mut sets, mut word) = (0, 0);
    while word < code.len() {
        let here = code[word];
        let next = if word + 1 < code.len() { code[word + 1] } else { 0 };
        // Bytes in front of the three of the `mov`, and these.
        let [second, third, fourth] =
            [here >> 8 | next << 56, here >> 16 | next << 48, here >> 24 | next << 40];
        let [one, other] = SET_RBP;
        let moves = is(second, one & 0xff)
            & (is(third, one >> 8 & 0xff) & is(fourth, one >> 16)
                | is(third, other >> 8 & 0xff) & is(fourth, other >> 16));
        sets |= moves & !is(here, PUSH_RBP) & first(run.saturating_sub(8 * word as u64 + 3));
        word += 1;
    }
    sets != 0
}

impl Registers {
    /// Whether the innermost frame may be moving. Code that cannot be read is an error.
    #[inline(always)]
    pub(super) fn may_be_in_moved_frame<M: StackMemory>(
        &self,
        code: &CodeWithoutTable,
        memory: &M,
    ) -> Result<bool, StopReason> {
        if self.get(DWARF_RBP)? != self.general[DWARF_RSP as usize] {
            return Ok(false);
        }
        // In front of a mapping there is nothing to read.
        let run = self.rip.wrapping_sub(code.start).min(BYTES);
        let Some(words) = memory.words(self.rip.wrapping_sub(run)) else { return Err(code.unproved) };
        Ok(sets_rbp_again(words, run))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against the same written with slices. Bytes are few, so that those of a `mov` come up together.
        #[test]
        fn what_sets_rbp_is_found(
            bytes in prop::collection::vec(prop::sample::select(&[0x55, 0x48, 0x89, 0xe5, 0x8b, 0xec][..]), 24),
            at in 0..21usize,
            run in 0..=24usize,
        ) {
            let mut bytes = bytes;
            bytes[at + 1..at + 4].copy_from_slice(&[0x48, 0x8b, 0xec]);
            let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
            let expect = bytes[..run].windows(4).any(|code| {
                code[0] != 0x55 && matches!(code[1..], [0x48, 0x89, 0xe5] | [0x48, 0x8b, 0xec])
            });
            prop_assert_eq!(sets_rbp_again([word(0), word(8), word(16)], run as u64), expect);
        }
    }
}
