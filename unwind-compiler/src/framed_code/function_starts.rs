//! Where functions start in wide code without CFI, and whether they keep frame pointers.

use std::collections::BTreeSet;
use std::ops::Range;

use windlass_schema::wide_code::{FUNCTION_ALIGNMENT, Frames};

use crate::recognise::{Code, Prologue, Starts};

/// Where functions start, if nearly all that build a frame do so with a frame pointer.
pub(super) fn functions<C: Code>(gap: &Range<u64>, bytes: &[u8], starts: &Starts) -> Option<BTreeSet<u64>> {
    let mut frames = Frames::default();
    let mut functions = BTreeSet::new();
    let symbols = starts.symbols.range(gap.start..gap.end).map(|(start, _)| *start);
    let first = gap.start.next_multiple_of(FUNCTION_ALIGNMENT);
    let padded = (first..gap.end).step_by(FUNCTION_ALIGNMENT as usize).filter(|start| {
        // Where a symbol covers it, it is a part of that function.
        let named = starts.symbols.range(..=start).next_back();
        C::is_padded(&bytes[..(start - gap.start) as usize]) && named.is_none_or(|(_, end)| end <= start)
    });
    let called = starts.called.range(gap.start..gap.end).copied();
    for start in symbols.chain(called).chain(padded).filter(|start| start.is_multiple_of(C::ALIGNMENT)) {
        let code = &bytes[(start - gap.start) as usize..];
        // Otherwise there is more padding.
        if code.len() < 2 || C::is_padded(&code[..2]) || !functions.insert(start) {
            continue;
        }
        match C::prologue(code) {
            Prologue::FramePointer => frames.with_frame_pointer += 1,
            Prologue::Other => frames.others += 1,
            Prologue::Unknown => {}
        }
    }
    frames.keep_frame_pointers().then_some(functions)
}
