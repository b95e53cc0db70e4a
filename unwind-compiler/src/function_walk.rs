//! The rows of a function that no CFI covers, from its instructions.
//!
//! # Why this shape
//! At a function's first instruction the frame is known: a call has just been made. Each instruction moves the stack
//! pointer by a constant, or establishes the frame pointer, or the function is given up. So the frame is known at each
//! instruction that control reaches from there, and known twice: a return, or a jump out of the function, has
//! to find the frame as it was at the first instruction. What follows a call that does not return would be taken
//! for a part of the function; so where its end is not known, every way has to come to such a check. One doubt,
//! and the whole function is left without rows: an unknown instruction, two frames at one address, a way that
//! runs out of the code.

use std::collections::BTreeMap;
use std::ops::Range;

use windlass_schema::Rule;

use crate::rows::Interval;

/// Most instructions of a function that is followed. Functions are of a thousand at most, but for a few.
const MAX_INSTRUCTIONS: usize = 1 << 14;

/// Where control goes behind an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    /// To the next one.
    Next,
    /// To the next one once a function has returned, which starts at this address if the code says so.
    Call(Option<u64>),
    /// To the next one or to this address.
    Branch(u64),
    /// To this address.
    Jump(u64),
    /// Back to the caller.
    Return,
    /// To an address that the code does not say.
    Leave,
    /// Nowhere.
    Trap,
}

/// An instruction, and the frame behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Step<S> {
    /// Length in bytes.
    pub(crate) bytes: usize,
    pub(crate) flow: Flow,
    pub(crate) behind: S,
}

/// What an instruction set says of frames.
pub(crate) trait Frames {
    /// What is known of the frame in front of an instruction.
    type State: Copy + PartialEq;

    /// In front of a function's first one.
    const ENTRY: Self::State;

    /// What is known where control comes from two places. `None` if the frames differ.
    fn join(one: Self::State, other: Self::State) -> Option<Self::State>;

    /// The instruction that `code` begins with, at `address`. `None` if it is unknown, or if nothing is known of the
    /// frame behind it.
    fn step(code: &[u8], address: u64, state: Self::State) -> Option<Step<Self::State>>;

    /// The rule of a frame.
    fn rule(state: Self::State) -> Rule;
}

/// A function whose every way was followed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Function {
    pub(crate) rows: Vec<Interval>,
    /// Whether it returns, which nothing does with a frame of its own left.
    pub(crate) returns: bool,
    /// Where its calls lead.
    pub(crate) calls: Vec<u64>,
    /// Where its jumps lead outside of it, with the frame of its first instruction.
    pub(crate) jumps: Vec<u64>,
}

/// A function under way.
pub(crate) struct Walk<'a, F: Frames> {
    /// Addresses that it may extend to, and their code.
    range: Range<u64>,
    code: &'a [u8],
    /// Whether `range` ends with the function.
    is_bounded: bool,
    /// The frame in front of each instruction met, and its end once it has been looked at.
    met: BTreeMap<u64, (F::State, Option<u64>)>,
    pending: Vec<u64>,
    function: Function,
}

impl<'a, F: Frames> Walk<'a, F> {
    /// Follows the function at the start of `range`, which `code` is the code of. With `is_bounded`, the function
    /// ends where `range` does. Takes each instruction from `budget`.
    pub(crate) fn follow(
        range: Range<u64>,
        code: &'a [u8],
        is_bounded: bool,
        budget: &mut u64,
    ) -> Option<Function> {
        let start = range.start;
        let (met, pending) = (BTreeMap::new(), Vec::new());
        let mut walk = Self { range, code, is_bounded, met, pending, function: Function::default() };
        walk.meet(start, F::ENTRY)?;
        while let Some(address) = walk.pending.pop() {
            *budget = budget.checked_sub(1)?;
            walk.pass(address)?;
        }
        let rows = walk.rows()?;
        Some(Function { rows, ..walk.function })
    }

    /// Control comes to `address` with this frame.
    fn meet(&mut self, address: u64, state: F::State) -> Option<()> {
        match self.met.get(&address) {
            Some((known, end)) => {
                let joined = F::join(*known, state)?;
                if joined != *known {
                    let end = *end;
                    self.met.insert(address, (joined, end));
                    self.pending.push(address);
                }
                Some(())
            }
            None if self.met.len() < MAX_INSTRUCTIONS => {
                self.met.insert(address, (state, None));
                self.pending.push(address);
                Some(())
            }
            None => None,
        }
    }

    /// Takes the instruction at `address`.
    fn pass(&mut self, address: u64) -> Option<()> {
        let offset = usize::try_from(address.checked_sub(self.range.start)?).ok()?;
        let (state, _) = *self.met.get(&address)?;
        let step = F::step(self.code.get(offset..)?, address, state)?;
        let next = address.checked_add(step.bytes as u64)?;
        self.met.insert(address, (state, Some(next)));
        match step.flow {
            Flow::Next => self.meet(next, step.behind),
            Flow::Call(target) => {
                // The address of the next instruction is taken that way, and popped: no call.
                if target == Some(next) {
                    return None;
                }
                self.function.calls.extend(target);
                if self.is_bounded && next == self.range.end {
                    Some(())
                } else {
                    self.meet(next, step.behind)
                }
            }
            Flow::Branch(target) => {
                self.meet(next, step.behind)?;
                self.go(target, step.behind)
            }
            // A way that only ever goes back comes to no check.
            Flow::Jump(target) if !self.is_bounded && (self.range.start..=address).contains(&target) => None,
            Flow::Jump(target) => self.go(target, step.behind),
            Flow::Return => {
                self.function.returns = true;
                self.check(step.behind)
            }
            Flow::Leave => self.check(step.behind),
            Flow::Trap => self.is_bounded.then_some(()),
        }
    }

    /// Control jumps to `target`: within the function, or to another one, which then returns in place of this one.
    fn go(&mut self, target: u64, state: F::State) -> Option<()> {
        if self.range.contains(&target) {
            return self.meet(target, state);
        }
        self.function.jumps.push(target);
        self.check(state)
    }

    /// Control leaves the function with this frame: that of its first instruction.
    fn check(&self, state: F::State) -> Option<()> {
        F::join(F::ENTRY, state).map(|_| ())
    }

    /// What was met, if no two instructions share a byte.
    fn rows(&self) -> Option<Vec<Interval>> {
        let mut rows: Vec<Interval> = Vec::new();
        let mut met_to = self.range.start;
        for (start, (state, end)) in &self.met {
            let end = (*end)?;
            if *start < met_to || end > self.range.end {
                return None;
            }
            met_to = end;
            let record = F::rule(*state).to_record();
            match rows.last_mut().filter(|last| last.end == *start && last.record == record) {
                Some(last) => last.end = end,
                None => rows.push(Interval { start: *start, end, rank: 0, record }),
            }
        }
        Some(rows)
    }
}
