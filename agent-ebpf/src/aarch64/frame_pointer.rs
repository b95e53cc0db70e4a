//! Whether x29 is the frame pointer of a frame in code without a table: nothing proves it yet.

use windlass_schema::StopReason;

use super::registers::Registers;
use crate::frame_pointer::{Candidate, CodeWithoutTable, FramePointers, Search};
use crate::memory::StackMemory;

impl FramePointers for Registers {
    #[inline(always)]
    fn look_for_caller<M: StackMemory>(
        &self,
        _search: &mut Search,
        code: &CodeWithoutTable,
        _memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        Err(code.unproved)
    }

    #[inline(always)]
    fn follows_call<M: StackMemory>(_address: u64, _memory: &M) -> Option<bool> {
        None
    }

    #[inline(always)]
    fn return_to(&mut self, _caller: &Candidate) {}
}
