//! A function of wide code without CFI, followed instruction by instruction.
//!
//! Each instruction is decoded when control comes to it, and once more for each state in which it does; what it does is kept with
//! it, as which calls return, what the function is and what its rows are is asked only when all have been met.

use std::collections::BTreeMap;
use std::ops::Range;

use super::{Entered, Followed, MAX_INSTRUCTIONS};
use crate::function_walk::{Budget, Flow, is_entry};
use crate::recognise::{Code, Prologue, Recognised};
use crate::report::RecognisedKind;

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
    /// What it does in this state, once it has been looked at.
    passed: Option<Passed<S>>,
    /// Whether a way leads from there to where the frame is seen to be this function's.
    comes_back: bool,
    /// Whether a way leads there on which each call is seen to return.
    is_sure: bool,
}

impl<S> Met<S> {
    /// Where it ends.
    fn end(&self) -> Option<u64> {
        self.passed.as_ref().map(|passed| passed.next)
    }
}

/// An instruction that was looked at.
#[derive(Clone, Copy)]
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
pub(super) enum Entry {
    /// By a call, or a jump that stands for one.
    Called,
    /// By a jump in the frame of a function that it leaves.
    InFrame,
    /// By a call in a prologue, to build the frame.
    InPrologue,
}

/// A function that is followed.
pub(super) struct Walk<'a, C: Code> {
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
    pub(super) fn follow(range: Range<u64>, code: &'a [u8], budget: &mut Budget) -> Option<Followed> {
        Self::follow_from(Entry::Called, C::ENTRY, range, code, budget)
    }

    /// As [`follow`](Self::follow), if control comes there in this way, with this frame.
    pub(super) fn follow_from(
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
            self.met.insert(address, Met { way, passed: None, comes_back: false, is_sure: false });
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
        self.met.entry(address).and_modify(|met| met.passed = Some(passed));
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
            let Some(passed) = met.passed else { continue };
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
            let Some(passed) = met.passed else { continue };
            let is_call = matches!(passed.flow, Flow::Call(_));
            let goes_there =
                |target: &u64| !is_call || self.met.get(target).is_some_and(|met| met.comes_back);
            pending.extend(passed.targets().filter(goes_there));
        }
    }

    /// Marks what leads to one of `to` on `ways`, which are sorted, through states like that.
    fn come_back(&mut self, ways: &[(u64, u64)], mut to: Vec<u64>, is_through: fn(C::State) -> bool) {
        while let Some(address) = to.pop() {
            let Some(met) = self.met.get_mut(&address) else { continue };
            // What leads to what was marked before was so, too, through all states and these.
            if met.comes_back || !met.way.state.is_some_and(is_through) {
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
            followed.is_refuted |= is_sure && (*address < met_to || met.passed.is_none());
            met_to = met.end().filter(|_| is_sure).unwrap_or(met_to);
            self.judge(*address, met, &mut followed);
        }
        followed.rows = self.rows(followed.may_switch || self.has_other_ways());
        followed
    }

    /// Adds what the instruction at `address` says of the function.
    fn judge(&self, address: u64, met: &Met<C::State>, followed: &mut Followed) {
        let Some(passed) = met.passed else { return };
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
        let met = self.met.iter().map(|(start, met)| (*start, met.end()));
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
            let (Some(state), Some(end)) = (met.way.state, met.end()) else { continue };
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
