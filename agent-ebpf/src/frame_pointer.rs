//! Going on where no table says how: by a frame pointer that is proved to be this frame's.
//!
//! # Why this shape
//! Code of a JIT compiler, and assembly without CFI, has nothing but the frame pointer to walk by. Whether the code
//! keeps one is not known, nor, in the innermost frame, whether this function has set it up yet: between a
//! function's first instruction and its prologue's end, behind its epilogue, and in a function without a frame, the
//! register is the caller's, and whoever believes it loses the caller and goes on as if nothing were missing.
//! Other unwinders accept that: Perforator takes a step by the frame pointer wherever it has no rule, Parca's did so in
//! memory of JIT compilers, and OpenTelemetry's knows the frames of one runtime after the other. Here a step is taken only
//! where the instructions in front of the address, or the words on the stack, leave no other caller; or, behind the
//! innermost frame, where all code of an image is known to keep frame pointers, or all that a compiler makes. See
//! [`x86_64`](crate::x86_64) and [`aarch64`](crate::aarch64) for what counts. Otherwise the walk ends with its reason.
//!
//! Looking for a proof takes many small reads. So that a BPF program needs no loop for them, a [`Search`] makes
//! one in each turn of the walk, as a step does.

use windlass_schema::StopReason;

use crate::memory::StackMemory;

/// Most turns that a walk spends on searches: at some 60 ns each, 0.1 ms. Fifty frames of a compiler whose code is not
/// known take about a thousand.
pub const MAX_SEARCH_TURNS: usize = 2048;

/// A search for the proof that the frame pointer is that of a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Search {
    /// Where it has come to: in the code, or on the stack.
    pub at: u64,
    /// 0 if none is under way; otherwise the instruction set's to define.
    pub phase: u32,
    /// Turns that this walk has left.
    pub left: u32,
    /// What was seen on the way; the instruction set's to define.
    pub seen: u64,
}

impl Search {
    /// None under way, at the start of a walk.
    pub const START: Self = Self { at: 0, phase: Self::NONE, left: MAX_SEARCH_TURNS as u32, seen: 0 };
    /// The phase in which none is under way.
    pub const NONE: u32 = 0;
}

/// A frame that may be the caller's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Return address.
    pub address: u64,
    /// Stack pointer of the caller.
    pub stack_pointer: u64,
    /// Frame pointer of the caller.
    pub frame_pointer: u64,
    /// Whether this is the caller, if `address` is a return address at all. Otherwise nothing may be one here, or there
    /// are two that could be the caller.
    pub is_caller: bool,
}

/// What code a frame is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CodeWithoutTable {
    /// Where its mapping starts.
    pub start: u64,
    /// Whether all of its functions that build a frame are known to keep frame pointers.
    pub keeps_frame_pointers: bool,
    /// Whether a JIT compiler made it.
    pub is_jit: bool,
    /// Whether that compiler is the one that is known to keep frame pointers, and no other in the same process.
    pub is_of_known_jit: bool,
    /// Why the walk ends when nothing is proved.
    pub unproved: StopReason,
}

/// What an instruction set says of frame pointers.
pub trait FramePointers {
    /// One turn of looking for the caller: a candidate, or nothing yet. On an error there is no telling.
    fn look_for_caller<M: StackMemory>(
        &self,
        search: &mut Search,
        code: &CodeWithoutTable,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason>;

    /// Whether `address` is right behind a call, by the bytes in front of it. `None` if they cannot be read.
    fn follows_call<M: StackMemory>(address: u64, memory: &M) -> Option<bool>;

    /// Replaces the registers by those of the caller.
    fn return_to(&mut self, caller: &Candidate);
}
