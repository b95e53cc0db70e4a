//! What a barrier has on the stack, below the frame of the compiled method that it is part of.
//!
//! # Why this shape
//! A collector that moves objects while Java runs (-XX:+UseZGC) has a method look at each reference that it loads. Where that has
//! to be seen to, the method goes on behind its end, saves what it has in registers below its frame, calls, and comes back
//! (`ZBarrierSetAssembler::generate_c2_load_barrier_stub` and `generate_c1_load_barrier_stub`, zBarrierSetAssembler_x86.cpp):
//!
//! ```text
//! sub $n, %rsp                      push %rax; sub $16, %rsp
//! mov %r10, m(%rsp) ...             mov %rcx, 8(%rsp) ...
//! call                              call
//! mov %rax, %rcx                    add $16, %rsp
//! mov m(%rsp), %r10 ...             mov %rax, %rcx; pop %rax
//! add $n, %rsp;  jmp                jmp
//! ```
//!
//! The header's frame size says nothing of these n bytes, and no table where it is. But each instruction behind the call is one
//! of a few up to `add` and `jmp`, which name n: CFA = rsp + n + 8 * frame size. Where others come first, the frame is all there
//! is. In the first half, which only an innermost frame is in, what is said last in front of the address counts: behind `sub`,
//! nothing is proved.

use windlass_schema::StopReason;

use super::{JUMP, LOW_3, TO_BARRIER, TO_BARRIER_END};
use crate::frame_pointer::{Candidate, CodeWithoutTable, Search};
use crate::memory::StackMemory;
use crate::x86_64::Registers;
use crate::x86_64::code_bytes::{each, first, is};

/// `add $n, %rsp` with n of one byte, below 128, and of four.
const FREE: u64 = 0xc4_8348;
const FREE_BYTES: u64 = 4;
const FREE_FAR: u64 = 0xc4_8148;
const FREE_FAR_BYTES: u64 = 7;
/// `mov %rax, %r..`, without the bits that say which.
const MOVE_RAX: u64 = 0xc0_8b48;
const MOVE_RAX_MASK: u64 = 0xc7_fffb;
const MOVE_RAX_BYTES: u64 = 3;
/// `mov n(%rsp), %r..` begins with this, without the bit of r8 to r15.
const MOVE: u64 = 0x8b48;
const MOVE_MASK: u64 = 0xfffb;
/// `vzeroupper`.
const VZEROUPPER: u64 = 0x77_f8c5;
const VZEROUPPER_BYTES: u64 = 3;
const POP_RAX: u64 = 0x58;
const SHORT_JUMP: u64 = 0xeb;

/// From an instruction of a barrier back to its `sub`, in bytes: all of 15 registers and 32 of vectors are saved in between, by
/// up to 8 and 11 bytes each.
const MAX_BYTES_BACK: u64 = 512;
/// How many bytes each turn looks at.
const BYTES_OF_TURN: u64 = 32;

/// How many bits the frame's size has in what is remembered.
const FRAME_BITS: u32 = 32;
const FRAME_MASK: u64 = (1 << FRAME_BITS) - 1;

/// Bytes of the instruction that `code` begins with, if it loads a register from beside rsp; otherwise 0. The Intel SDM,
/// volume 2, 2.1.5, has the bytes behind the opcode: a ModRM byte which says that a SIB byte follows, and that, which says rsp.
#[inline(always)]
const fn bytes_of_load(code: u64) -> u64 {
    let opcode_at = if code & MOVE_MASK == MOVE {
        1
    } else {
        match code & 0xff {
            // VEX of two bytes and of three, EVEX.
            0xc5 => 2,
            0xc4 => 3,
            0x62 => 4,
            // A vector's load without these, perhaps with a REX prefix.
            0x66 | 0xf2 | 0xf3 if code >> 8 & 0xff == 0x0f => 2,
            0x66 | 0xf2 | 0xf3 if code >> 8 & 0xf0 == 0x40 && code >> 16 & 0xff == 0x0f => 3,
            _ => return 0,
        }
    };
    let (modrm, sib) = (code >> (8 * opcode_at + 8) & 0xff, code >> (8 * opcode_at + 16) & 0xff);
    if modrm & 7 != 4 || sib != 0x24 {
        return 0;
    }
    match modrm >> 6 {
        0 => opcode_at + 3,
        1 => opcode_at + 4,
        2 => opcode_at + 7,
        _ => 0,
    }
}

/// Bytes of the instruction, if a barrier may have it between its call and its `add`.
#[inline(always)]
const fn bytes_of_restoring(code: u64) -> u64 {
    if code & MOVE_RAX_MASK == MOVE_RAX {
        MOVE_RAX_BYTES
    } else if code & LOW_3 == VZEROUPPER {
        VZEROUPPER_BYTES
    } else {
        bytes_of_load(code)
    }
}

/// What `add $n, %rsp` adds, and its length. 0 if it is another instruction.
#[inline(always)]
const fn freed(code: u64) -> (u64, u64) {
    if code & (LOW_3 | 1 << 31) == FREE {
        (code >> 24 & 0x7f, FREE_BYTES)
    } else if code & (LOW_3 | 1 << 55) == FREE_FAR {
        (code >> 24 & 0x7fff_ffff, FREE_FAR_BYTES)
    } else {
        (0, 0)
    }
}

/// What is popped between `add` and `jmp`, in bytes. `None` if no `jmp` is there.
#[inline(always)]
const fn popped(code: u64) -> Option<u64> {
    let code = if code & MOVE_RAX_MASK == MOVE_RAX { code >> 24 } else { code };
    let (code, bytes) = if code & 0xff == POP_RAX { (code >> 8, 8) } else { (code, 0) };
    if code & 0xff == JUMP || code & 0xff == SHORT_JUMP { Some(bytes) } else { None }
}

impl Registers {
    /// Starts in a method's body, at so many bytes from where its frame is complete.
    #[inline(always)]
    pub(super) fn search_barrier(
        &self,
        search: &mut Search,
        frame_bytes: u64,
        done: u64,
    ) -> Result<Option<Candidate>, StopReason> {
        (search.phase, search.at) = (TO_BARRIER_END, self.rip);
        search.seen = frame_bytes | done << FRAME_BITS;
        Ok(None)
    }

    /// Looks at the next instruction.
    #[inline(always)]
    pub(in crate::x86_64) fn look_for_barrier_end<M: StackMemory>(
        &self,
        search: &mut Search,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        let code = memory.word(search.at).unwrap_or(0);
        let restoring = bytes_of_restoring(code);
        if restoring != 0 {
            search.at = search.at.wrapping_add(restoring);
            return Ok(None);
        }
        let (freed, bytes) = freed(code);
        let behind = memory.word(search.at.wrapping_add(bytes)).filter(|_| bytes != 0);
        let popped = behind.and_then(popped);
        if self.exact != 0 && popped.is_none() {
            (search.phase, search.at) = (TO_BARRIER, self.rip);
            return Ok(None);
        }
        let below = popped.map_or(0, |popped| popped.wrapping_add(freed));
        self.caller_by_frame_size((search.seen & FRAME_MASK).wrapping_add(below), memory)
    }

    /// Looks at the next bytes back for what last moved rsp.
    #[inline(always)]
    pub(in crate::x86_64) fn look_for_barrier<M: StackMemory>(
        &self,
        search: &mut Search,
        code: &CodeWithoutTable,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        let body = self.rip.wrapping_sub(search.seen >> FRAME_BITS);
        let count = search.at.wrapping_sub(body).min(BYTES_OF_TURN);
        let is_done = count == 0 || self.rip.wrapping_sub(search.at) >= MAX_BYTES_BACK;
        search.at = search.at.wrapping_sub(count);
        let Some(words) = memory.words::<5>(search.at) else { return Err(code.unproved) };
        let (mut takes, mut frees, mut word) = (0, 0, 0);
        while word < 4 {
            let (here, behind) = (words[word], words[word + 1]);
            // 48 81 or 48 83, then ec or c4.
            let second = here >> 8 | behind << 56;
            let third = here >> 16 | behind << 48;
            // Not what has not been run yet.
            let mask = first(count.saturating_sub(8 * word as u64));
            let moves = is(here, 0x48) & is(second | each(2), 0x83) & mask;
            let (take, free) = (moves & is(third, 0xec), moves & is(third, 0xc4));
            if take | free != 0 {
                (takes, frees) = (take, free);
            }
            word += 1;
        }
        if !is_done && takes > frees {
            return Err(code.unproved);
        }
        if is_done || frees != 0 {
            return self.caller_by_frame_size(search.seen & FRAME_MASK, memory);
        }
        Ok(None)
    }
}
