//! Whether a stub of HotSpot has its frame at an address.
//!
//! # Why this shape
//! Stubs stand in one blob, many in a row, some with a frame and some without, so that its header does not say which one an
//! address is in. Each begins at a multiple of 32 (`CodeEntryAlignment`); those with a frame with `enter()`, and they return by
//! `leave; ret`, or `pop %rbp; ret` (stubGenerator_x86_64.cpp). So between a beginning of that kind and an address, without such an end
//! in between, the frame is that stub's: one without a frame has the end of another in front of it. Bytes that only look like
//! an end cost no more than the proof. Right behind what may be a `leave` or a `pop %rbp` nothing is believed.

use windlass_schema::StopReason;

use super::{IN_STUB, LOW_4, PROLOGUE};
use crate::frame_pointer::{Candidate, CodeWithoutTable, Search};
use crate::memory::StackMemory;
use crate::x86_64::Registers;
use crate::x86_64::code_bytes::is;

/// What stubs are aligned to, in bytes: each turn looks at as many.
const ALIGNMENT: u64 = 32;
/// How far in front of an address its stub's beginning is looked for, in bytes.
const MAX_BYTES: u64 = 8 * 1024;

/// `mov -0x28(%rbp), %rdi; mov -0x20(%rbp), %esi; cmp`: where Java returns to that C++ has called (`generate_call_stub`), in a stub
/// that is not aligned. It looks where the result belongs.
const CALLED_JAVA: u64 = 0x83e0_758b_d87d_8b48;

/// The bytes looked at are the address's own.
const IS_FIRST: u64 = 1;

const LEAVE: u64 = 0xc9;
const POP_RBP: u64 = 0x5d;
const RET: u64 = 0xc3;

/// The highest bit of each byte of `bytes` that may leave a frame.
#[inline(always)]
const fn leaves(bytes: u64) -> u64 {
    is(bytes, LEAVE) | is(bytes, POP_RBP)
}

impl Registers {
    /// Starts with the stub that the address is in.
    #[inline(always)]
    pub(super) fn search_stub<M: StackMemory>(
        &self,
        search: &mut Search,
        code: &CodeWithoutTable,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        if self.exact == 0 && memory.word(self.rip) == Some(CALLED_JAVA) {
            return self.caller_by_frame_pointer(memory);
        }
        let may_have_left =
            self.exact != 0 && memory.word(self.rip.wrapping_sub(8)).is_none_or(|bytes| leaves(bytes) != 0);
        if may_have_left {
            return self.search_code(search, code.unproved, memory);
        }
        let address = self.rip.wrapping_sub(1 ^ u64::from(self.exact));
        (search.phase, search.at, search.seen) = (IN_STUB, address & !(ALIGNMENT - 1), IS_FIRST);
        Ok(None)
    }

    /// Looks at the next 32 bytes back.
    #[inline(always)]
    pub(in crate::x86_64) fn look_at_stub<M: StackMemory>(
        &self,
        search: &mut Search,
        code: &CodeWithoutTable,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        let is_near = search.at >= code.start && self.rip.wrapping_sub(search.at) < MAX_BYTES;
        let Some(words) = memory.words::<5>(search.at).filter(|_| is_near) else {
            return self.search_code(search, code.unproved, memory);
        };
        let (mut ends, mut word) = (0, 0);
        while word < 4 {
            let next = words[word] >> 8 | words[word + 1] << 56;
            ends |= leaves(words[word]) & is(next, RET);
            word += 1;
        }
        // No stub begins within these, so that what ends among the address's own is the one that it is in.
        if ends != 0 && search.seen != IS_FIRST {
            return self.search_code(search, code.unproved, memory);
        }
        if words[0] & LOW_4 == PROLOGUE {
            return self.caller_by_frame_pointer(memory);
        }
        (search.at, search.seen) = (search.at.wrapping_sub(ALIGNMENT), 0);
        Ok(None)
    }
}
