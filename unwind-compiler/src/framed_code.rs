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

use crate::code_bytes::CodeBytes;
use crate::function_walk::{Budget, Flow, is_entry};
use crate::recognise::{Code, Prologue, Recognised, Starts};
use crate::report::RecognisedKind;

mod function_starts;
use function_starts::functions;

/// Narrowest gap that is looked at, in bytes, as the agent that uploads one has it. Functions in assembly without CFI come
/// in some tens of kilobytes.
const MIN_GAP_BYTES: u64 = 256 * 1024;
/// Widest gap that is looked at, in bytes: forty times V8's built-in functions.
const MAX_GAP_BYTES: u64 = 64 * 1024 * 1024;
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
    if !(MIN_GAP_BYTES..=MAX_GAP_BYTES).contains(&gap_bytes) {
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
    /// Whether a way leads from there to where the frame is seen to be this function's.
    comes_back: bool,
    /// Whether a way leads there on which each call is seen to return.
    is_sure: bool,
}

/// An instruction that was looked at.
struct Passed<S> {
    /// Where it ends.
    next: u64,
    flow: Flow,
    /// The frame behind it.
    behind: Option<S>,
}

impl<S> Passed<S> {
    /// Where control goes from there, as far as the code says.
    fn targets(&self) -> impl Iterator<Item = u64> + use<S> {
        let (one, other) = match self.flow {
            Flow::Next | Flow::Call(_) => (Some(self.next), None),
            Flow::Branch(target) => (Some(self.next), Some(target)),
            Flow::Jump(target) => (None, Some(target)),
            Flow::Return | Flow::Leave | Flow::Trap => (None, None),
        };
        one.into_iter().chain(other)
    }
}

/// How control comes to the start of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    /// By a call, or a jump that stands for one.
    Called,
    /// By a jump in the frame of a function that it leaves.
    InFrame,
    /// By a call in a prologue, to build the frame.
    InPrologue,
}

/// A function that is followed.
struct Walk<'a, C: Code> {
    entry: Entry,
    range: Range<u64>,
    /// Of `range`.
    code: &'a [u8],
    /// Each instruction that control reaches.
    met: BTreeMap<u64, Met<C::State>>,
    pending: Vec<u64>,
    /// Whether it has more instructions than are kept.
    is_too_long: bool,
}

impl<'a, C: Code> Walk<'a, C> {
    /// Follows the function at the start of `range`, which `code` is the code of. `None` if there is no more to be done.
    fn follow(range: Range<u64>, code: &'a [u8], budget: &mut Budget) -> Option<Followed> {
        Self::follow_from(Entry::Called, C::ENTRY, range, code, budget)
    }

    /// As [`follow`](Self::follow), if control comes there in this way, with this frame.
    fn follow_from(
        entry: Entry,
        state: C::State,
        range: Range<u64>,
        code: &'a [u8],
        budget: &mut Budget,
    ) -> Option<Followed> {
        let start = range.start;
        let (met, pending) = (BTreeMap::new(), Vec::new());
        let mut walk = Self { entry, range, code, met, pending, is_too_long: false };
        walk.meet(start, Way { state: Some(state), is_certain: true, is_doubtful: false });
        while let Some(address) = walk.pending.pop() {
            budget.instructions = budget.instructions.checked_sub(1)?;
            walk.pass(address);
        }
        walk.see_returns();
        Some(walk.finish())
    }

    /// Control comes to `address` on this way. The frame there only ever becomes less known, so that this ends.
    fn meet(&mut self, address: u64, way: Way<C::State>) {
        if !self.range.contains(&address) {
            return;
        }
        let is_full = self.met.len() >= MAX_INSTRUCTIONS;
        let Some(met) = self.met.get_mut(&address) else {
            self.is_too_long |= is_full;
            if is_full {
                return;
            }
            self.met.insert(address, Met { way, end: None, comes_back: false, is_sure: false });
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

    /// The instruction at `address`, in this state. `None` if it is none.
    fn passed(&self, address: u64, state: Option<C::State>) -> Option<Passed<C::State>> {
        let code = &self.code[(address - self.range.start) as usize..];
        let (bytes, flow) = C::passes(code, address)?;
        let behind = state.and_then(|state| C::step(code, address, state)).map(|step| step.behind);
        Some(Passed { next: address + bytes as u64, flow, behind })
    }

    /// Takes the instruction at `address`.
    fn pass(&mut self, address: u64) {
        let Some(way) = self.met.get(&address).map(|met| met.way) else { return };
        let Some(passed) = self.passed(address, way.state) else { return };
        self.met.entry(address).and_modify(|met| met.end = Some(passed.next));
        let mut way = Way { state: passed.behind, ..way };
        if let Flow::Call(_) = passed.flow {
            way.is_certain = false;
            way.is_doubtful |= !passed.behind.is_some_and(C::has_frame_pointer);
        }
        passed.targets().for_each(|target| self.meet(target, way));
    }

    /// Tells the instructions apart that are sure to be of this function. What is called may not return, and behind the call
    /// stands another function then, with a frame of its own. So a call is seen to return if a way from behind it leads
    /// to where the frame is as at the start, or to where control comes without the call; or to what uses the frame, of
    /// which the frame pointer is set in front of the call.
    fn see_returns(&mut self) {
        let mut ways = Vec::new();
        let (mut ends, mut uses) = (Vec::new(), Vec::new());
        for (address, met) in &self.met {
            let Some(passed) = self.passed(*address, met.way.state) else { continue };
            let is_as_at_start = passed.behind.is_some_and(is_entry::<C>);
            let mut is_end = is_as_at_start && matches!(passed.flow, Flow::Return | Flow::Leave);
            for target in passed.targets() {
                ways.push((target, *address));
                is_end |= match self.met.get(&target) {
                    Some(to) => to.way.is_certain && to.way.state.is_some(),
                    None => is_as_at_start && passed.flow == Flow::Jump(target),
                };
            }
            ends.extend(is_end.then_some(*address));
            let code = &self.code[(address - self.range.start) as usize..];
            uses.extend(met.way.state.is_some_and(|state| C::uses_frame(code, state)).then_some(*address));
        }
        ways.sort_unstable();
        self.come_back(&ways, ends, |_| true);
        self.come_back(&ways, uses, C::has_frame_pointer);
        let mut pending = vec![self.range.start];
        while let Some(address) = pending.pop() {
            let Some(met) = self.met.get_mut(&address).filter(|met| !met.is_sure) else { continue };
            met.is_sure = true;
            let state = met.way.state;
            let Some(passed) = self.passed(address, state) else { continue };
            let is_call = matches!(passed.flow, Flow::Call(_));
            let goes_there =
                |target: &u64| !is_call || self.met.get(target).is_some_and(|met| met.comes_back);
            pending.extend(passed.targets().filter(goes_there));
        }
    }

    /// Marks what leads to one of `to` on `ways`, which are sorted, through states like that.
    fn come_back(&mut self, ways: &[(u64, u64)], mut to: Vec<u64>, is_through: fn(C::State) -> bool) {
        let mut seen = BTreeSet::new();
        while let Some(address) = to.pop() {
            let Some(met) = self.met.get_mut(&address) else { continue };
            if !met.way.state.is_some_and(is_through) || !seen.insert(address) {
                continue;
            }
            met.comes_back = true;
            let first = ways.partition_point(|(to, _)| *to < address);
            to.extend(ways[first..].iter().take_while(|(to, _)| *to == address).map(|(_, from)| from));
        }
    }

    /// What it comes to.
    fn finish(self) -> Followed {
        let mut followed = Followed {
            end: self.range.end,
            rows: Vec::new(),
            is_proved: false,
            leaves: false,
            may_switch: false,
            is_refuted: self.is_too_long,
            entered: Vec::new(),
            jumps: Vec::new(),
        };
        let mut met_to = self.range.start;
        for (address, met) in &self.met {
            let is_sure = met.is_sure;
            // It shares a byte with the one in front, or is none.
            followed.is_refuted |= is_sure && (*address < met_to || met.end.is_none());
            met_to = met.end.filter(|_| is_sure).unwrap_or(met_to);
            self.judge(*address, met, &mut followed);
        }
        followed.rows = self.rows(followed.may_switch || self.has_other_ways());
        followed
    }

    /// Adds what the instruction at `address` says of the function.
    fn judge(&self, address: u64, met: &Met<C::State>, followed: &mut Followed) {
        let Some(passed) = self.passed(address, met.way.state) else { return };
        let Way { state, is_certain, .. } = met.way;
        let is_sure = met.is_sure;
        let is_as_at_start = passed.behind.is_some_and(is_entry::<C>);
        let code = &self.code[(address - self.range.start) as usize..];
        followed.is_proved |=
            is_certain && state.is_some_and(is_entry::<C>) && C::prologue(code) == Prologue::FramePointer;
        match passed.flow {
            // Behind the call in the prologue, with the frame; or elsewhere.
            Flow::Return if self.entry == Entry::InPrologue => {}
            Flow::Return => {
                followed.is_proved |= is_as_at_start && is_certain;
                followed.is_refuted |= is_sure && passed.behind.is_some() && !is_as_at_start;
            }
            Flow::Leave => {
                followed.leaves |= is_as_at_start && is_certain;
                followed.may_switch |= !is_as_at_start;
            }
            Flow::Next | Flow::Call(_) | Flow::Branch(_) | Flow::Jump(_) | Flow::Trap => {}
        }
        for target in passed.targets().filter(|target| !self.range.contains(target)) {
            let is_jump = matches!(passed.flow, Flow::Branch(to) | Flow::Jump(to) if to == target);
            if is_jump && is_as_at_start {
                followed.is_proved |= is_certain && self.entry != Entry::InPrologue;
                followed.jumps.extend(is_sure.then_some(target));
                continue;
            }
            // A call at the end is not seen to return.
            let is_sure = is_sure && !matches!(passed.flow, Flow::Call(_));
            followed.is_refuted |= is_sure && !is_jump;
            let has_frame_pointer = !is_jump || passed.behind.is_some_and(C::has_frame_pointer);
            followed.entered.push(Entered { target, has_frame_pointer, is_sure });
        }
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
    fn rows(&self, has_other_ways: bool) -> Vec<Recognised> {
        let mut rows: Vec<Recognised> = Vec::new();
        for (start, met) in self.met.iter().filter(|(_, met)| met.is_sure) {
            let (Some(state), Some(end)) = (met.way.state, met.end) else { continue };
            if has_other_ways && met.way.is_doubtful {
                continue;
            }
            let rule = C::rule(state);
            // What is called in the frame just built is followed by the frame pointer.
            let is_other_frame = C::has_frame_pointer(state) && C::IN_FRAME.map(C::rule) != Some(rule);
            if !rule.is_exact() || self.entry == Entry::InPrologue && is_other_frame {
                continue;
            }
            match rows.last_mut().filter(|last| last.range.end == *start && last.rule == rule) {
                Some(last) => last.range.end = end,
                None => rows.push(Recognised { range: *start..end, rule, kind: RecognisedKind::Function }),
            }
        }
        rows
    }
}

#[cfg(test)]
mod tests;
