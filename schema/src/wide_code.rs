//! Which code without CFI is wide, and what tells that its functions keep frame pointers?
//!
//! A runtime brings functions that its own compiler made ahead of time: V8's built-in functions are 1.5 MB amid the code of node.
//! Two decide over such code and have to agree: the agent, which puts it into the skeleton of an image and follows frame pointers in it
//! without a table, and the compiler of tables, which works out rows for it. How a function begins each reads with what it has:
//! the agent by bytes, the compiler by instructions.

use core::ops::RangeInclusive;

/// How many bytes without CFI are wide. Functions in assembly without CFI come in some tens of kilobytes; the most, ten times V8's
/// built-in functions, is what an agent reads at once.
pub const WIDE_BYTES: RangeInclusive<u64> = 256 * 1024..=16 * 1024 * 1024;
/// What compilers align functions to.
pub const FUNCTION_ALIGNMENT: u64 = 16;
/// Fewest functions to tell by whether code keeps frame pointers.
pub const MIN_FUNCTIONS: usize = 64;
/// For how many functions with a frame pointer one may build a frame without it.
pub const FRAME_POINTERS_PER_OTHER: usize = 20;

/// How functions build their frames. Those that build none, as leaves, say nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Frames {
    /// Functions that establish the frame pointer.
    pub with_frame_pointer: usize,
    /// Functions that build a frame without.
    pub others: usize,
}

impl Frames {
    /// Whether nearly all functions that build a frame do so with a frame pointer.
    pub const fn keep_frame_pointers(self) -> bool {
        self.with_frame_pointer >= MIN_FUNCTIONS
            && self.others.saturating_mul(FRAME_POINTERS_PER_OTHER) <= self.with_frame_pointer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearly_all_of_enough_functions() {
        for (with_frame_pointer, others, expect) in [
            (MIN_FUNCTIONS, 0, true),
            (MIN_FUNCTIONS - 1, 0, false),
            (100, 5, true),
            (100, 6, false),
            (0, 0, false),
            (usize::MAX, usize::MAX, true),
            (MIN_FUNCTIONS, usize::MAX, false),
        ] {
            let frames = Frames { with_frame_pointer, others };
            assert_eq!(frames.keep_frame_pointers(), expect, "{frames:?}");
        }
    }
}
