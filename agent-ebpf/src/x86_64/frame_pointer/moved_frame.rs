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

use super::{CodeWithoutTable, DWARF_RBP, DWARF_RSP, PUSH_RBP, SET_RBP, is_zero};
use crate::memory::StackMemory;
use crate::x86_64::Registers;

/// How many bytes in front of an address are looked at: one in front of `mov %rsp, %rbp`, its three, and those of three
/// moves behind it, eight, four and eight where n takes four.
const BYTES: u64 = 24;

/// Whether the first `run` of these bytes of code have a `mov %rsp, %rbp` that is not behind `push %rbp`. Without a branch,
/// as [`Signs`](super::Signs).
#[inline(always)]
const fn sets_rbp_again(code: [u64; 3], run: u64) -> bool {
    let [mut bytes, mut second, mut third] = code;
    let (mut is_set, mut at) = (0, 4);
    // `at` is behind the `mov`.
    while at <= BYTES {
        let mov = bytes >> 8 & 0xff_ffff;
        let sets = is_zero(mov ^ SET_RBP[0]) | is_zero(mov ^ SET_RBP[1]);
        is_set |= sets & (is_zero(bytes & 0xff ^ PUSH_RBP) ^ 1) & (at <= run) as u64;
        bytes = bytes >> 8 | second << 56;
        second = second >> 8 | third << 56;
        third >>= 8;
        at += 1;
    }
    is_set != 0
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
