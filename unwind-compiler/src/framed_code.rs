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

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use crate::code_bytes::CodeBytes;
use crate::function_walk::{Flow, is_entry};
use crate::recognise::{Code, Prologue, Recognised, Starts};
use crate::report::RecognisedKind;

/// Narrowest gap that is looked at, in bytes, as the agent that uploads one has it. Functions in assembly without CFI come
/// in some tens of kilobytes.
const MIN_GAP_BYTES: u64 = 256 * 1024;
/// Fewest functions to tell by whether code keeps frame pointers.
const MIN_FUNCTIONS: usize = 64;
/// For how many functions with a frame pointer one may build a frame without it.
const FRAME_POINTERS_PER_OTHER: usize = 20;
/// What compilers align functions to.
const FUNCTION_ALIGNMENT: u64 = 16;
/// Longest function that is put together, in bytes. V8's have up to twenty thousand.
const MAX_FUNCTION_BYTES: u64 = 64 * 1024;
/// How often functions are put together from what was taken for several. Three times are enough for V8's.
const MAX_ROUNDS: usize = 8;

/// What is known of `gap`, in the order of addresses, if it is wide and its functions keep frame pointers.
pub(crate) fn framed_code<C: Code>(
    code: &CodeBytes<'_>,
    gap: &Range<u64>,
    starts: &Starts,
) -> Option<Vec<Recognised>> {
    if gap.end - gap.start < MIN_GAP_BYTES {
        return None;
    }
    let bytes = code.get(gap)?;
    let mut functions = functions::<C>(gap, bytes, starts)?;
    let mut walks = BTreeMap::new();
    for _ in 0..MAX_ROUNDS {
        follow::<C>(gap, bytes, &functions, &mut walks);
        if !put_together(&walks, &mut functions, starts) {
            break;
        }
    }
    let mut found = Vec::new();
    // Whether the function in front may switch to what looks like the start of one.
    let mut may_switch = true;
    for (start, walk) in &walks {
        let is_known = starts.symbols.contains_key(start) || !may_switch;
        may_switch = walk.may_switch;
        if walk.is_believed(is_known, &functions) {
            walk.append_rows(&mut found);
        }
    }
    Some(found)
}

/// Where functions start, if nearly all that build a frame do so with a frame pointer.
fn functions<C: Code>(gap: &Range<u64>, bytes: &[u8], starts: &Starts) -> Option<BTreeSet<u64>> {
    let (mut kept, mut others) = (0, 0);
    let mut functions = BTreeSet::new();
    let first = gap.start.next_multiple_of(FUNCTION_ALIGNMENT);
    // Where the function ends that a symbol names.
    let mut named_to = 0;
    for start in (first..gap.end).step_by(FUNCTION_ALIGNMENT as usize) {
        let (before, code) = bytes.split_at((start - gap.start) as usize);
        let end = starts.symbols.get(&start);
        let is_start = end.is_some() || C::is_padded(before) && start >= named_to;
        // Otherwise there is more padding.
        if !is_start || code.len() < 2 || C::is_padded(&code[..2]) {
            continue;
        }
        named_to = end.copied().unwrap_or(named_to);
        functions.insert(start);
        match C::prologue(code) {
            Prologue::FramePointer => kept += 1,
            Prologue::Other => others += 1,
            Prologue::Unknown => {}
        }
    }
    (kept >= MIN_FUNCTIONS && others * FRAME_POINTERS_PER_OTHER <= kept).then_some(functions)
}

/// Follows those of `functions` whose end has moved.
fn follow<'a, C: Code>(
    gap: &Range<u64>,
    bytes: &'a [u8],
    functions: &BTreeSet<u64>,
    walks: &mut BTreeMap<u64, Walk<'a, C>>,
) {
    walks.retain(|start, _| functions.contains(start));
    let ends = functions.iter().skip(1).copied().chain([gap.end]);
    for (start, end) in functions.iter().zip(ends) {
        if walks.get(start).is_none_or(|walk| walk.range.end != end) {
            let code = &bytes[(start - gap.start) as usize..(end - gap.start) as usize];
            walks.insert(*start, Walk::follow(*start..end, code));
        }
    }
}

/// Takes out of `functions` what is a part of another. Whether there was any.
fn put_together<C: Code>(
    walks: &BTreeMap<u64, Walk<'_, C>>,
    functions: &mut BTreeSet<u64>,
    starts: &Starts,
) -> bool {
    let before = functions.len();
    for (start, walk) in walks {
        for (target, has_frame_pointer) in &walk.entered {
            // A jump to a function that stands for a call, with a frame that could not be followed.
            if functions.contains(target) && !has_frame_pointer {
                continue;
            }
            let (first, last) = if target > start { (*start, *target) } else { (*target, *start) };
            let mut parts: Vec<u64> = functions.range(first + 1..=last).copied().collect();
            if last - first > MAX_FUNCTION_BYTES || parts.iter().any(|part| starts.symbols.contains_key(part))
            {
                continue;
            }
            parts.drain(..).for_each(|part| {
                functions.remove(&part);
            });
        }
    }
    functions.len() < before
}

/// What is known in front of an instruction.
#[derive(Clone, Copy, PartialEq)]
struct Way<S> {
    /// `None` if nothing is, or ways disagree.
    state: Option<S>,
    /// Whether a way leads there on which no call has to return.
    is_certain: bool,
    /// Whether each way leads there behind a call in a frame without a frame pointer.
    is_doubtful: bool,
}

/// An instruction that control comes to.
#[derive(Clone, Copy)]
struct Met<S> {
    way: Way<S>,
    /// Where it ends, once it has been looked at.
    end: Option<u64>,
}

/// A function that is followed.
struct Walk<'a, C: Code> {
    range: Range<u64>,
    /// Of `range`.
    code: &'a [u8],
    /// Each instruction that control reaches.
    met: BTreeMap<u64, Met<C::State>>,
    pending: Vec<u64>,
    /// Whether control comes for certain to a return, a jump to another function or a prologue with the frame of the start.
    is_proved: bool,
    /// Whether it comes so to a jump to an address that the code does not say, which may be within the function.
    leaves: bool,
    /// Whether it comes to such a jump with another frame, or one that is not known.
    may_switch: bool,
    /// Whether the function returns with another frame, or is no code.
    is_refuted: bool,
    /// Where control goes outside of `range` with another frame than that of the start, and whether that has a frame pointer.
    entered: Vec<(u64, bool)>,
    /// Where it jumps outside of `range` with that.
    jumps: Vec<u64>,
}

impl<'a, C: Code> Walk<'a, C> {
    fn follow(range: Range<u64>, code: &'a [u8]) -> Self {
        let start = range.start;
        let mut walk = Self {
            range,
            code,
            met: BTreeMap::new(),
            pending: Vec::new(),
            is_proved: false,
            leaves: false,
            may_switch: false,
            is_refuted: false,
            entered: Vec::new(),
            jumps: Vec::new(),
        };
        walk.meet(start, Way { state: Some(C::ENTRY), is_certain: true, is_doubtful: false });
        while let Some(address) = walk.pending.pop() {
            walk.pass(address);
        }
        walk
    }

    /// Control comes to `address` on this way. The frame there only ever becomes less known, so that this ends.
    fn meet(&mut self, address: u64, way: Way<C::State>) {
        if !self.range.contains(&address) {
            self.is_refuted = true;
            self.entered.push((address, true));
            return;
        }
        let Some(met) = self.met.get_mut(&address) else {
            self.met.insert(address, Met { way, end: None });
            return self.pending.push(address);
        };
        let joined = Way {
            state: met.way.state.zip(way.state).and_then(|(one, other)| C::join(one, other)),
            is_certain: met.way.is_certain || way.is_certain,
            is_doubtful: met.way.is_doubtful && way.is_doubtful,
        };
        if joined != met.way {
            met.way = joined;
            self.pending.push(address);
        }
    }

    /// Takes the instruction at `address`.
    fn pass(&mut self, address: u64) {
        let code = &self.code[(address - self.range.start) as usize..];
        let Some(met) = self.met.get_mut(&address) else { return };
        let Some((bytes, flow)) = C::passes(code, address) else {
            self.is_refuted = true;
            return;
        };
        let next = address + bytes as u64;
        met.end = Some(next);
        let Way { state, is_certain, is_doubtful } = met.way;
        let behind = state.and_then(|state| C::step(code, address, state)).map(|step| step.behind);
        let way = Way { state: behind, ..met.way };
        let is_as_at_start = behind.is_some_and(is_entry::<C>);
        self.is_proved |=
            is_certain && state.is_some_and(is_entry::<C>) && C::prologue(code) == Prologue::FramePointer;
        match flow {
            Flow::Next => self.meet(next, way),
            Flow::Call(_) => {
                let is_doubtful = is_doubtful || !behind.is_some_and(C::has_frame_pointer);
                self.meet(next, Way { is_certain: false, is_doubtful, ..way });
            }
            Flow::Branch(target) => {
                self.go(target, way);
                self.meet(next, way);
            }
            Flow::Jump(target) => self.go(target, way),
            Flow::Return => {
                self.is_proved |= is_as_at_start && is_certain;
                self.is_refuted |= behind.is_some() && !is_as_at_start;
            }
            Flow::Leave => {
                self.leaves |= is_as_at_start && is_certain;
                self.may_switch |= !is_as_at_start;
            }
            Flow::Trap => {}
        }
    }

    /// Control jumps to `target`: within the function, or to another one, which then returns in place of this one.
    fn go(&mut self, target: u64, way: Way<C::State>) {
        if self.range.contains(&target) {
            self.meet(target, way);
        } else if way.state.is_some_and(is_entry::<C>) {
            self.is_proved |= way.is_certain;
            self.jumps.push(target);
        } else {
            self.entered.push((target, way.state.is_some_and(C::has_frame_pointer)));
        }
    }

    /// Whether the function starts where its range does, and was followed rightly. With `is_known`, there is no
    /// other whose code it could be.
    fn is_believed(&self, is_known: bool, functions: &BTreeSet<u64>) -> bool {
        let is_start = |target: &u64| functions.contains(target);
        let mut end = self.range.start;
        let overlaps = self.met.iter().any(|(start, met)| {
            let is_inside = *start < end;
            end = met.end.unwrap_or(*start);
            is_inside
        });
        let is_proved = self.is_proved || self.leaves && is_known;
        is_proved
            && !self.is_refuted
            && !overlaps
            && self.jumps.iter().all(is_start)
            && self.entered.iter().all(|(target, has_frame_pointer)| is_start(target) && !has_frame_pointer)
    }

    /// Whether there is code that no way was found to: what catches exceptions, or what is switched to.
    fn has_other_ways(&self) -> bool {
        let mut at = self.range.start;
        let ends = [(self.range.end, None)];
        let met = self.met.iter().map(|(start, met)| (*start, met.end));
        met.chain(ends).any(|(start, end)| {
            let mut rest =
                &self.code[(at.min(start) - self.range.start) as usize..(start - self.range.start) as usize];
            at = end.unwrap_or(start);
            while let Some(bytes) = C::padding(rest) {
                rest = rest.get(bytes..).unwrap_or_default();
            }
            !rest.is_empty()
        })
    }

    /// The rows of what is known. Behind a call that does not return may stand what is come to on other ways. With a frame
    /// pointer the frame is the same there, as who catches exceptions has one; without, that is too much doubt.
    fn append_rows(&self, found: &mut Vec<Recognised>) {
        let has_other_ways = self.may_switch || self.has_other_ways();
        for (start, met) in &self.met {
            let (Some(state), Some(end)) = (met.way.state, met.end) else { continue };
            if has_other_ways && met.way.is_doubtful {
                continue;
            }
            let rule = C::rule(state);
            match found.last_mut().filter(|last| last.range.end == *start && last.rule == rule) {
                Some(last) => last.range.end = end,
                None => {
                    let kind = RecognisedKind::Function;
                    found.push(Recognised { range: *start..end, rule, kind });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
