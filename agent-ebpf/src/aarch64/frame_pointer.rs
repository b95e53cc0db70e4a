//! Whether x29 is the frame pointer of a frame in code without a table.
//!
//! A function that keeps a frame pointer begins with `stp x29, x30, [sp, -N]!; mov x29, sp` and ends with
//! `ldp x29, x30, [sp], N; ret`. In between, CFA = x29 + N, with the caller's x29 and the return address at x29
//! (AAPCS64, 6.4.6). Only the prologue says where the CFA is, by which the caller's row may count: frames that are built in
//! another way are not left.
//!
//! # What is certain
//! 1. At some instructions (the innermost frame's address is that of one) the caller is known: `ret` goes to x30 and has no
//!    frame left, nor has one been built where x30 is signed or stored as above; between the prologue's two, and at the
//!    epilogue's `ldp`, the frame record is at sp.
//! 2. A function that calls another has stored x30 before. So of a caller the next store of x30 in front of its address is its own,
//!    and if that is of a prologue as above, it is in its body. Parts of functions that lie elsewhere are made by compilers that write
//!    CFI.
//! 3. The innermost frame is in a function's body behind such a prologue, if there is no instruction in between that loads x29
//!    or x30 or that ends a function, nor padding.
//!
//! In the third case it may still be in a function behind the other one, which ends with a call that does not return,
//! and have its return address in x30. So x30 has to be what the function was entered with, or an address behind its
//! prologue: one of its calls has left it there.
//!
//! Each caller's address has to lie in executable memory, behind a call.

use windlass_schema::StopReason;

use super::registers::{DWARF_SP, DWARF_X29, DWARF_X30, Registers};
use crate::frame_pointer::{Candidate, CodeWithoutTable, FramePointers, Search};
use crate::memory::StackMemory;

/// The search goes back through the code.
const IN_CODE: u32 = 1;

/// How far in front of an address its function's prologue is looked for, in bytes: compiled JavaScript has functions
/// of some kilobytes, and each turn of the search takes an instruction.
const MAX_CODE_BYTES: u64 = 4096;

/// Bytes of an instruction.
const INSTRUCTION: u64 = 4;

/// Bits that count, and what they are.
type Pattern = (u32, u32);

/// `stp x29, x30, [sp, -N]!`, and `ldp x29, x30, [sp], N`; N in words is in bits 15 to 21 (Arm ARM, C6.2, STP and LDP).
const PUSH_RECORD: Pattern = (0xffc0_7fff, 0xa980_7bfd);
const POP_RECORD: Pattern = (0xffc0_7fff, 0xa8c0_7bfd);
/// `mov x29, sp`.
const SET_X29: u32 = 0x9100_03fd;
/// `ret`, `retaa` and `retab`.
const RETURNS: [u32; 3] = [0xd65f_03c0, 0xd65f_0bff, 0xd65f_0fff];
/// `paciasp` and `pacibsp`, which sign with the stack pointer of the function's start.
const SIGNS: [u32; 2] = [0xd503_233f, 0xd503_237f];

/// Loads of pairs with x29 or x30 for the first or the second register, and of one (of any addressing).
const LOADS: [Pattern; 6] = [
    (0xfe40_001f, 0xa840_001d),
    (0xfe40_001f, 0xa840_001e),
    (0xfe40_7c00, 0xa840_7400),
    (0xfe40_7c00, 0xa840_7800),
    (0xfec0_001f, 0xf840_001d),
    (0xfec0_001f, 0xf840_001e),
];
/// Stores of pairs with x30 for the first or the second register, and of it alone.
const STORES: [Pattern; 3] =
    [(0xfe40_001f, 0xa800_001e), (0xfe40_7c00, 0xa800_7800), (0xfec0_001f, 0xf800_001e)];
/// What ends a function, and what is between functions: `br`, `ret` and those of signed addresses; `brk`; `udf` and zero;
/// `nop`.
const ENDS: [Pattern; 4] = [
    (0xfebf_0000, 0xd61f_0000),
    (0xffe0_001f, 0xd420_0000),
    (0xffff_0000, 0x0000_0000),
    (0xffff_ffff, 0xd503_201f),
];
/// `bl`, `blr`, and those of signed addresses.
const CALLS: [Pattern; 3] =
    [(0xfc00_0000, 0x9400_0000), (0xffff_fc1f, 0xd63f_0000), (0xfeff_f800, 0xd63f_0800)];

#[inline(always)]
const fn is(instruction: u32, (mask, value): Pattern) -> bool {
    instruction & mask == value
}

/// Whether it is one of these; without a branch, of which the verifier follows both sides.
#[inline(always)]
const fn is_one_of<const N: usize>(instruction: u32, patterns: [Pattern; N]) -> bool {
    let (mut is_one, mut at) = (false, 0);
    while at < N {
        is_one |= is(instruction, patterns[at]);
        at += 1;
    }
    is_one
}

/// Bytes that a `stp` takes off sp, or a `ldp` gives back: a signed number of words.
#[inline(always)]
const fn record_bytes(instruction: u32) -> u64 {
    let words = (instruction << 10) as i32 >> 25;
    words.unsigned_abs() as u64 * 8
}

/// The instruction at `address` and the one behind it.
#[inline(always)]
fn instructions<M: StackMemory>(address: u64, memory: &M) -> Option<[u32; 2]> {
    memory.word(address).map(|word| [word as u32, (word >> 32) as u32])
}

impl Registers {
    /// The caller that x30 says, of a function without a frame.
    #[inline(always)]
    fn caller_in_register(&self) -> Result<Option<Candidate>, StopReason> {
        let address = self.get(DWARF_X30)? & !self.pac_mask;
        let stack_pointer = self.general[DWARF_SP as usize];
        let frame_pointer = self.get(DWARF_X29)?;
        Ok(Some(Candidate { address, stack_pointer, frame_pointer, is_caller: true }))
    }

    /// The caller by the frame record at `at`, in a frame of which so many bytes are from there on.
    #[inline(always)]
    fn caller_by_record<M: StackMemory>(
        &self,
        at: u64,
        bytes: u64,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        if at < self.general[DWARF_SP as usize] || at & 7 != 0 {
            return Err(StopReason::FramePointer);
        }
        let Some([frame_pointer, address]) = memory.words(at) else { return Err(memory.unreadable(at)) };
        let (address, stack_pointer) = (address & !self.pac_mask, at.wrapping_add(bytes));
        Ok(Some(Candidate { address, stack_pointer, frame_pointer, is_caller: true }))
    }

    /// What the instruction at the innermost address says.
    #[inline(always)]
    fn caller_by_instruction<M: StackMemory>(
        &self,
        unproved: StopReason,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        let Some([first, second]) = instructions(self.pc, memory) else { return Err(unproved) };
        let is_pushed_next = is(first, PUSH_RECORD) && second == SET_X29;
        if RETURNS.contains(&first) || SIGNS.contains(&first) || is_pushed_next {
            return self.caller_in_register();
        }
        let sp = self.general[DWARF_SP as usize];
        if is(first, POP_RECORD) {
            return self.caller_by_record(sp, record_bytes(first), memory);
        }
        if first != SET_X29 {
            return Ok(None);
        }
        match instructions(self.pc.wrapping_sub(INSTRUCTION), memory) {
            Some([before, _]) if is(before, PUSH_RECORD) => {
                self.caller_by_record(sp, record_bytes(before), memory)
            }
            _ => Err(unproved),
        }
    }

    /// Looks at the instruction in front of where the search has come to. What proves nothing is an error.
    #[inline(always)]
    fn look_at_code<M: StackMemory>(
        &self,
        search: &mut Search,
        code: &CodeWithoutTable,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        let at = search.at.wrapping_sub(2 * INSTRUCTION);
        if search.at < code.start.wrapping_add(2 * INSTRUCTION) || self.pc.wrapping_sub(at) > MAX_CODE_BYTES {
            return Err(code.unproved);
        }
        let Some([first, second]) = instructions(at, memory) else { return Err(code.unproved) };
        if is(first, PUSH_RECORD) && second == SET_X29 {
            let caller = self.caller_by_record(self.get(DWARF_X29)?, record_bytes(first), memory)?;
            return match caller {
                Some(caller) if !self.is_body(search.at, &caller)? => Err(code.unproved),
                caller => Ok(caller),
            };
        }
        let is_doubt = is_one_of(second, LOADS) | is_one_of(second, ENDS);
        if is_one_of(second, STORES) || is_doubt && self.exact != 0 {
            return Err(code.unproved);
        }
        search.at = search.at.wrapping_sub(INSTRUCTION);
        Ok(None)
    }

    /// Whether x30 is of the function whose body begins at `start` and was called from `caller`; in callers it is theirs.
    #[inline(always)]
    fn is_body(&self, start: u64, caller: &Candidate) -> Result<bool, StopReason> {
        if self.exact == 0 {
            return Ok(true);
        }
        let address = self.get(DWARF_X30)? & !self.pac_mask;
        // Where the function ends is not known: a loop's call may be behind the address.
        let end = self.pc.wrapping_add(MAX_CODE_BYTES);
        Ok(address == caller.address || start < address && address < end)
    }
}

impl FramePointers for Registers {
    #[inline(always)]
    fn look_for_caller<M: StackMemory>(
        &self,
        search: &mut Search,
        code: &CodeWithoutTable,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        if search.left == 0 {
            return Err(StopReason::FramePointer);
        }
        search.left -= 1;
        if search.phase == IN_CODE {
            return self.look_at_code(search, code, memory);
        }
        if self.exact != 0 {
            let caller = self.caller_by_instruction(code.unproved, memory)?;
            if caller.is_some() {
                return Ok(caller);
            }
        }
        (search.phase, search.at) = (IN_CODE, self.pc);
        Ok(None)
    }

    #[inline(always)]
    fn follows_call<M: StackMemory>(address: u64, memory: &M) -> Option<bool> {
        // Of a word that does not leave the page, so that it can be read where a mapping ends here.
        let before = address.wrapping_sub(INSTRUCTION);
        let word = memory.word(before & !7)?;
        Some(address & 3 == 0 && is_one_of((word >> (8 * (before & 4))) as u32, CALLS))
    }

    #[inline(always)]
    fn return_to(&mut self, caller: &Candidate) {
        self.general[DWARF_SP as usize] = caller.stack_pointer;
        self.general[DWARF_X29 as usize] = caller.frame_pointer;
        self.pc = caller.address;
        self.known = 1 << DWARF_SP | 1 << DWARF_X29;
        self.exact = 0;
    }
}

#[cfg(test)]
mod tests;
