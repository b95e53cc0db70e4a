//! What is known of each instruction of wide code without CFI whose functions keep frame pointers.
//!
//! # Why this shape
//! A runtime brings functions that its own compiler made ahead of time: V8's built-in functions are 1.5 MB amid the code
//! of node. They keep frame pointers, but not on every way: what is short is done without a frame, and a frame is built
//! where a call needs one, or not at all. So a frame pointer says who called only where the frame is known, and that is
//! what following the instructions says. A function that cannot be followed to its end is refused elsewhere
//! ([`function_walk`](crate::function_walk)); here that would leave out half: compilers of runtimes switch to addresses
//! that are computed, pass arguments on by the thousand, and enter functions in their middle to unwind an exception.
//! So the frame is told by address: known, where every way that comes there agrees, or else left to a proof by what lies on
//! the stack when a sample is taken.
//!
//! # What is certain
//! Functions start behind padding, and so may a block of one that is in front of it: where a function jumps to with a frame of
//! its own is a part of it, and so is all in between. At a start, a call has been made, or a jump that stands for one,
//! if without any call on the way control comes to a return, or a jump elsewhere, or a prologue, with the frame as it
//! was at the start. What returns with any other frame is not believed at all.
//! What is called may not return, and padding stands behind that only where the next function needs some. So behind a call
//! the frame is known if what follows undoes it, uses it, or goes to where control comes without the call.
//! Two kinds of V8's functions start otherwise, and say so: those that leave a frame which they have not built, and those that drop
//! their return address and build a frame around the next one. The latter stand for the function whose prologue calls them.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use windlass_schema::wide_code::WIDE_BYTES;

use crate::code_bytes::CodeBytes;
use crate::function_walk::Budget;
use crate::recognise::{Code, Prologue, Recognised, Starts};

mod function_starts;
mod walk;

use function_starts::functions;
use walk::{Entry, Walk};

/// Longest function that is put together, in bytes. V8's have up to twenty thousand.
const MAX_FUNCTION_BYTES: u64 = 64 * 1024;
/// Most instructions of a function, which are kept while it is followed: one of four bytes each.
const MAX_INSTRUCTIONS: usize = MAX_FUNCTION_BYTES as usize / 4;
/// Instructions that are followed, and functions that are put together, for each byte of a gap. Instructions have four
/// bytes, and few are followed again.
const FOLLOWED_PER_BYTE: u64 = 2;
/// For how many bytes of a gap a row, a jump or a function is kept. V8's have a row for a hundred, the shortest functions with
/// a frame five for sixteen; this bounds the memory for code that is made to have more.
const BYTES_PER_KEPT: u64 = 3;
/// How often functions are put together from what was taken for several. Three times are enough for V8's.
const MAX_ROUNDS: usize = 8;

/// What is known of `gap`, in the order of addresses, if it is wide and its functions keep frame pointers.
pub(crate) fn framed_code<C: Code>(
    code: &CodeBytes<'_>,
    gap: &Range<u64>,
    starts: &Starts,
) -> Option<Vec<Recognised>> {
    let gap_bytes = gap.end - gap.start;
    if !WIDE_BYTES.contains(&gap_bytes) {
        return None;
    }
    let mut budget = Budget { instructions: gap_bytes * FOLLOWED_PER_BYTE, kept: gap_bytes / BYTES_PER_KEPT };
    within::<C>(code, gap, starts, &mut budget)
}

/// As [`framed_code`], as far as `budget` goes: otherwise nothing is known, as what is not followed may jump anywhere.
fn within<C: Code>(
    code: &CodeBytes<'_>,
    gap: &Range<u64>,
    starts: &Starts,
    budget: &mut Budget,
) -> Option<Vec<Recognised>> {
    let bytes = code.get(gap)?;
    let mut functions = functions::<C>(gap, bytes, starts)?;
    let mut followed = BTreeMap::new();
    for _ in 0..MAX_ROUNDS {
        follow::<C>(gap, bytes, &functions, &mut followed, budget)?;
        if !put_together(&followed, &mut functions, starts, budget)? {
            break;
        }
    }
    let mut found = Vec::new();
    // Whether the function in front may switch to what looks like the start of one.
    let mut may_switch = true;
    for (start, function) in followed {
        let is_known = starts.symbols.contains_key(&start) || !may_switch;
        let is_called = starts.called.contains(&start);
        may_switch = function.may_switch;
        if (is_called || function.is_proved(is_known)) && function.is_right(&functions) {
            found.extend(function.rows);
            continue;
        }
        let code = &bytes[(start - gap.start) as usize..(function.end - gap.start) as usize];
        let may_be_entered = C::prologue(code) != Prologue::FramePointer;
        let entries = [(Entry::InFrame, C::IN_FRAME), (Entry::InPrologue, C::IN_PROLOGUE)];
        for (entry, state) in entries.into_iter().filter(|_| may_be_entered) {
            let Some(state) = state else { continue };
            let entered = Walk::<C>::follow_from(entry, state, start..function.end, code, budget)?;
            if entered.is_proved && entered.is_right(&functions) {
                found.extend(entered.rows);
                break;
            }
        }
    }
    Some(found)
}

/// Follows those of `functions` whose end has moved.
fn follow<C: Code>(
    gap: &Range<u64>,
    bytes: &[u8],
    functions: &BTreeSet<u64>,
    followed: &mut BTreeMap<u64, Followed>,
    budget: &mut Budget,
) -> Option<()> {
    followed.retain(|start, _| functions.contains(start));
    let ends = functions.iter().skip(1).copied().chain([gap.end]);
    for (start, end) in functions.iter().zip(ends) {
        if followed.get(start).is_none_or(|function| function.end != end) {
            let code = &bytes[(start - gap.start) as usize..(end - gap.start) as usize];
            let function = Walk::<C>::follow(*start..end, code, budget)?;
            let kept = 1 + function.rows.len() + function.entered.len() + function.jumps.len();
            budget.kept = budget.kept.checked_sub(kept as u64)?;
            followed.insert(*start, function);
        }
    }
    Some(())
}

/// Takes out of `functions` what is a part of another. Whether there was any.
fn put_together(
    followed: &BTreeMap<u64, Followed>,
    functions: &mut BTreeSet<u64>,
    starts: &Starts,
    budget: &mut Budget,
) -> Option<bool> {
    let before = functions.len();
    for (start, function) in followed {
        for Entered { target, has_frame_pointer, .. } in &function.entered {
            // A jump to a function that stands for a call, with a frame that could not be followed.
            if functions.contains(target) && !has_frame_pointer {
                continue;
            }
            let (first, last) = if target > start { (*start, *target) } else { (*target, *start) };
            if last - first > MAX_FUNCTION_BYTES {
                continue;
            }
            let mut symbols = starts.symbols.range(first + 1..=last);
            let mut called = starts.called.range(first + 1..=last);
            if symbols.next().is_some() || called.next().is_some() {
                continue;
            }
            // Each is a part but once.
            let parts: Vec<u64> = functions.range(first + 1..=last).copied().collect();
            budget.instructions = budget.instructions.checked_sub(parts.len() as u64)?;
            for part in parts {
                functions.remove(&part);
            }
        }
    }
    Some(functions.len() < before)
}

/// Where control goes outside of a function with another frame than that of the start.
struct Entered {
    target: u64,
    has_frame_pointer: bool,
    /// Whether a way leads there on which calls are seen to return.
    is_sure: bool,
}

/// What came of following a function.
struct Followed {
    /// Where what is followed ends.
    end: u64,
    rows: Vec<Recognised>,
    /// Whether control comes for certain to a return, a jump to another function or a prologue with the frame of the start.
    is_proved: bool,
    /// Whether it comes so to a jump to an address that the code does not say, which may be within the function.
    leaves: bool,
    /// Whether it comes to such a jump with another frame, or one that is not known.
    may_switch: bool,
    /// Whether the function returns with another frame, or is no code.
    is_refuted: bool,
    entered: Vec<Entered>,
    /// Where it jumps outside of its range with the frame of the start.
    jumps: Vec<u64>,
}

impl Followed {
    /// Whether a function starts where its range does. With `is_known`, there is no other whose code it could be.
    fn is_proved(&self, is_known: bool) -> bool {
        self.is_proved || self.leaves && is_known
    }

    /// Whether it was followed rightly, if it starts there.
    fn is_right(&self, functions: &BTreeSet<u64>) -> bool {
        let is_start = |target: &u64| functions.contains(target);
        let stands_for_call = |one: &Entered| is_start(&one.target) && !one.has_frame_pointer;
        !self.is_refuted
            && self.jumps.iter().all(is_start)
            && self.entered.iter().filter(|one| one.is_sure).all(stands_for_call)
    }
}

#[cfg(test)]
mod tests;
