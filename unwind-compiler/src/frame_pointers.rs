//! Whether code without call frame information keeps frame pointers throughout.
//!
//! # Why this shape
//! Where there is no CFI at all, a chain of frame pointers is all that is left to walk by, and going by it in code
//! that uses the register for something else gives wrong frames. A compiler's option decides it for all functions alike. So
//! a look at how functions begin tells: nearly all that build a frame have to build it that way. Those
//! that build none, as leaves, say nothing.

use std::collections::BTreeSet;
use std::ops::Range;

use windlass_schema::Architecture;

use crate::code_bytes::CodeBytes;
use crate::recognise::{Code, Prologue, Starts};
use crate::{aarch64, x86_64};

/// Fewest functions to tell by whether code keeps frame pointers.
const MIN_FUNCTIONS: usize = 8;

/// For how many functions with a frame pointer one may build a frame without it: start files of C
/// libraries and what is in assembly.
const FRAME_POINTERS_PER_OTHER: usize = 20;

/// What compilers align functions to, unless told otherwise. Constants and the middle of instructions look like calls;
/// hardly one leads to such an address.
const FUNCTION_ALIGNMENT: u64 = 16;

/// Bytes of code that are looked at for calls. The largest images have a hundred times as many; their functions are
/// compiled alike.
const LOOKED_AT_BYTES: u64 = 4 << 20;

/// Bytes of code that are looked at together.
const WINDOW_BYTES: usize = 64 << 10;

/// Whether the code in `gaps` keeps frame pointers, as far as one can tell: nearly all functions that build a
/// frame do, by symbols of functions and by where calls lead.
pub(crate) fn keeps_frame_pointers(
    architecture: Architecture,
    code: &CodeBytes<'_>,
    gaps: &[Range<u64>],
    starts: &Starts,
) -> bool {
    match architecture {
        Architecture::X86_64 => are_kept::<x86_64::code::Machine>(code, gaps, starts),
        Architecture::Aarch64 => are_kept::<aarch64::code::Machine>(code, gaps, starts),
    }
}

fn are_kept<C: Code>(code: &CodeBytes<'_>, gaps: &[Range<u64>], starts: &Starts) -> bool {
    let mut functions: BTreeSet<u64> = starts.symbols.keys().copied().collect();
    let all_bytes: u64 = gaps.iter().map(|gap| gap.end - gap.start).sum();
    let windows = all_bytes / LOOKED_AT_BYTES + 1;
    let mut number = 0;
    for gap in gaps {
        let Some(bytes) = code.get(gap) else { continue };
        let first = (gap.start.wrapping_neg() % C::ALIGNMENT) as usize;
        for from in (first..bytes.len()).step_by(WINDOW_BYTES) {
            number += 1;
            // One in so many, all over the code.
            if number % windows != 0 {
                continue;
            }
            for at in (from..bytes.len().min(from + WINDOW_BYTES)).step_by(C::ALIGNMENT as usize) {
                let called = C::call(&bytes[at..], gap.start + at as u64);
                functions.extend(called.filter(|start| start.is_multiple_of(FUNCTION_ALIGNMENT)));
            }
        }
    }
    let (mut kept, mut others) = (0, 0);
    for start in functions {
        let behind = gaps.partition_point(|gap| gap.start <= start);
        let gap = behind.checked_sub(1).map(|at| start..gaps[at].end).filter(|gap| !gap.is_empty());
        let Some(bytes) = gap.and_then(|gap| code.get(&gap)) else { continue };
        match C::prologue(bytes) {
            Prologue::FramePointer => kept += 1,
            Prologue::Other => others += 1,
            Prologue::Unknown => {}
        }
    }
    kept >= MIN_FUNCTIONS && others * FRAME_POINTERS_PER_OTHER <= kept
}
