//! What a walk needs of an instruction set.
//!
//! Unwinders for several instruction sets tend to pick one by conditional compilation, so that each build can
//! be tested on its own kind of machine alone. Here it is a type parameter: any host walks the stacks of any
//! machine, and what a program does not instantiate costs it nothing.

use windlass_schema::{Record, StopReason};

use crate::frame_pointer::FramePointers;
use crate::memory::StackMemory;

/// The registers of one frame.
pub trait Machine: FramePointers {
    /// The program counter: an instruction's address if [exact](Self::is_exact), else a return address.
    fn program_counter(&self) -> u64;

    /// Whether the frame is the innermost one, or one that a signal interrupted.
    fn is_exact(&self) -> bool;

    /// Replaces the registers by those of the caller. On an error they are unchanged, and `EndOfStack` means
    /// that there is no caller.
    fn step<M: StackMemory>(&mut self, record: Record, memory: &M) -> Result<(), StopReason>;
}
