//! Whether code without call frame information keeps frame pointers throughout.
//!
//! # Why this shape
//! Where there is no CFI at all, a chain of frame pointers is all that is left to walk by, and going by it in code
//! that uses the register for something else gives wrong frames. A compiler's option decides it for all functions alike. So
//! a look at how functions begin tells: nearly all that build a frame have to build it that way. Those
//! that build none, as leaves, say nothing. What a static program was linked with may be compiled otherwise, as a C
//! library that sorts by a function of the program: so each function that is not seen to keep one is left out.

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

/// Most instructions of a function in front of its frame: what it returns early by needs none.
const MAX_INSTRUCTIONS_BEFORE_FRAME: usize = 32;

/// The functions in `gaps` that are not seen to keep frame pointers, if all others do, as far as one can tell: nearly all
/// functions that build a frame do, by symbols of functions and by where calls lead. Sorted and disjoint.
pub(crate) fn exceptions(
    architecture: Architecture,
    code: &CodeBytes<'_>,
    gaps: &[Range<u64>],
    starts: &Starts,
) -> Option<Vec<Range<u64>>> {
    match architecture {
        Architecture::X86_64 => exceptions_of::<x86_64::code::Machine>(code, gaps, starts),
        Architecture::Aarch64 => exceptions_of::<aarch64::code::Machine>(code, gaps, starts),
    }
}

fn exceptions_of<C: Code>(
    code: &CodeBytes<'_>,
    gaps: &[Range<u64>],
    starts: &Starts,
) -> Option<Vec<Range<u64>>> {
    let gap_of = |start: u64| {
        let behind = gaps.partition_point(|gap| gap.start <= start);
        gaps[..behind].last().filter(|gap| gap.contains(&start))
    };
    let mut functions: BTreeSet<u64> = starts.symbols.keys().copied().collect();
    for gap in gaps {
        let Some(bytes) = code.get(gap) else { continue };
        let first = (gap.start.wrapping_neg() % C::ALIGNMENT) as usize;
        for at in (first..bytes.len()).step_by(C::ALIGNMENT as usize) {
            let called = C::call(&bytes[at..], gap.start + at as u64);
            functions.extend(called.filter(|start| start.is_multiple_of(FUNCTION_ALIGNMENT)));
        }
    }
    functions.retain(|start| gap_of(*start).is_some());
    let (mut kept, mut others) = (0, 0);
    let mut exceptions = Vec::new();
    let nexts = functions.iter().skip(1).copied().chain([u64::MAX]);
    for (start, next) in functions.iter().copied().zip(nexts) {
        let Some(gap) = gap_of(start) else { continue };
        let function = start..next.min(gap.end);
        let Some(bytes) = code.get(&function) else { continue };
        let prologue = C::prologue(bytes);
        match prologue {
            Prologue::FramePointer => kept += 1,
            Prologue::Other => others += 1,
            Prologue::Unknown => {}
        }
        if later_prologue::<C>(bytes, start) != Prologue::FramePointer {
            exceptions.push(function);
        }
    }
    (kept >= MIN_FUNCTIONS && others * FRAME_POINTERS_PER_OTHER <= kept).then_some(exceptions)
}

/// How a function at `start` builds its frame, be it behind other instructions.
fn later_prologue<C: Code>(code: &[u8], start: u64) -> Prologue {
    let mut at = 0;
    for _ in 0..=MAX_INSTRUCTIONS_BEFORE_FRAME {
        let Some(rest) = code.get(at..) else { break };
        let prologue = C::prologue(rest);
        if prologue != Prologue::Unknown {
            return prologue;
        }
        let Some((bytes, _)) = C::passes(rest, start + at as u64) else { break };
        at += bytes;
    }
    Prologue::Unknown
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: u64 = 0x1000;
    /// push %rbp; mov %rsp, %rbp; call *%rax; leave; ret
    const KEEPS: [u8; 8] = [0x55, 0x48, 0x89, 0xe5, 0xff, 0xd0, 0xc9, 0xc3];
    /// push %rbx; call *%rax; pop %rbx; ret
    const OTHER: [u8; 5] = [0x53, 0xff, 0xd0, 0x5b, 0xc3];
    /// test %eax, %eax; jne +1; ret; and a frame pointer; and none.
    const KEEPS_LATER: [u8; 10] = [0x85, 0xc0, 0x75, 1, 0xc3, 0x55, 0x48, 0x89, 0xe5, 0xc3];
    const OTHER_LATER: [u8; 8] = [0x85, 0xc0, 0x75, 1, 0xc3, 0x53, 0x5b, 0xc3];

    /// The exceptions among these functions, of 16 bytes each, by their numbers.
    fn found(functions: &[&[u8]]) -> Option<Vec<u64>> {
        let mut code = Vec::new();
        let mut starts = Starts::default();
        for function in functions {
            let start = START + code.len() as u64;
            starts.symbols.insert(start, start + function.len() as u64);
            code.extend_from_slice(function);
            code.resize(code.len().next_multiple_of(FUNCTION_ALIGNMENT as usize), 0x90);
        }
        let bytes = CodeBytes::new(vec![(START, &code)]);
        let gap = START..START + code.len() as u64;
        let found = exceptions(Architecture::X86_64, &bytes, std::slice::from_ref(&gap), &starts)?;
        let number = |range: Range<u64>| {
            assert_eq!(range.end - range.start, FUNCTION_ALIGNMENT);
            (range.start - START) / FUNCTION_ALIGNMENT
        };
        Some(found.into_iter().map(number).collect())
    }

    #[test]
    fn functions_that_keep_none_are_exceptions() {
        let mut functions: Vec<&[u8]> = vec![&KEEPS; 40];
        assert_eq!(found(&functions), Some(vec![]));
        functions[7] = &OTHER;
        functions[8] = &KEEPS_LATER;
        functions[9] = &OTHER_LATER;
        functions[39] = &[0xc3];
        assert_eq!(found(&functions), Some(vec![7, 9, 39]));
        functions[10..13].fill(&OTHER);
        assert_eq!(found(&functions), None);
    }
}
