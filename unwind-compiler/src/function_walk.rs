//! The rows of a function that no CFI covers, from its instructions.
//!
//! # Why this shape
//! At a function's first instruction the frame is known: a call has just been made. Each instruction moves the stack
//! pointer by a constant, or establishes the frame pointer, or the function is given up. So the frame is known at each
//! instruction that control reaches from there, and known twice: a return, or a jump out of the function, has
//! to find the frame as it was at the first instruction. What follows a call that does not return would be taken
//! for a part of the function; so where its end is not known, every way has to come to such a check. And what is
//! reached only behind a call may not be reached at all, or from elsewhere: it proves nothing of the first
//! instruction, and with a jump that may lead there, by a table, the function is left. One doubt,
//! and the whole function is left without rows: an unknown instruction, two frames at one address, a way that
//! runs out of the code.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use windlass_schema::Rule;

use crate::rows::Interval;

/// Most instructions of a function that is followed. Functions are of a thousand at most, but for a few.
const MAX_INSTRUCTIONS: usize = 1 << 14;

/// What compilers align functions to, and not those parts that are seldom run.
const FUNCTION_ALIGNMENT: u64 = 16;

/// What may still be done and kept for an image.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    /// Instructions to follow.
    pub(crate) instructions: u64,
    /// Rows, calls and jumps to keep, and functions.
    pub(crate) kept: u64,
}

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

    /// In front of the first one of code that is jumped to in the frame of another, which it leaves; if there may be some.
    const IN_FRAME: Option<Self::State>;

    /// In front of the first one of a function that is called in a prologue, to build the frame of its caller; if there may be some.
    const IN_PROLOGUE: Option<Self::State>;

    /// What is known where control comes from two places. `None` if the frames differ.
    fn join(one: Self::State, other: Self::State) -> Option<Self::State>;

    /// The instruction that `code` begins with, at `address`. `None` if it is unknown, or if nothing is known of the
    /// frame behind it.
    fn step(code: &[u8], address: u64, state: Self::State) -> Option<Step<Self::State>>;

    /// Whether the frame is known by the frame pointer.
    fn has_frame_pointer(state: Self::State) -> bool;

    /// Whether the instruction that `code` begins with has an operand in the frame, by a frame pointer that points to where
    /// the caller's is saved.
    fn uses_frame(_code: &[u8], _state: Self::State) -> bool {
        false
    }

    /// Whether the stack pointer is aligned as it has to be, if `code` begins with a call.
    fn is_aligned(_code: &[u8], _state: Self::State) -> bool {
        true
    }

    /// Length of the instruction that `code` begins with, at `address`, and where control goes behind it.
    fn passes(code: &[u8], address: u64) -> Option<(usize, Flow)>;

    /// The rule of a frame.
    fn rule(state: Self::State) -> Rule;
}

/// A function whose every way was followed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Function {
    pub(crate) rows: Vec<Interval>,
    /// Whether control comes for certain to where it returns, which nothing does with a frame of its own left.
    pub(crate) returns: bool,
    /// Whether control comes to where it returns, or jumps elsewhere, if all that it calls returns.
    pub(crate) may_return: bool,
    /// Where its calls lead.
    pub(crate) calls: Vec<u64>,
    /// Where its jumps lead outside of it, with the frame of its first instruction.
    pub(crate) jumps: Vec<u64>,
    /// Those of its jumps that control comes to for certain.
    pub(crate) certain_jumps: Vec<u64>,
}

impl Function {
    /// Itself with each of its targets once, if there is room for it.
    fn kept(mut self, budget: &mut Budget) -> Option<Self> {
        for targets in [&mut self.calls, &mut self.jumps, &mut self.certain_jumps] {
            targets.sort_unstable();
            targets.dedup();
            targets.shrink_to_fit();
        }
        self.rows.shrink_to_fit();
        let targets = self.calls.len() + self.jumps.len() + self.certain_jumps.len();
        budget.kept = budget.kept.checked_sub((self.rows.len() + targets + 1) as u64)?;
        Some(self)
    }

    /// Whether the frame at `address` is that of a first instruction.
    pub(crate) fn is_entry<F: Frames>(&self, address: u64) -> bool {
        let behind = self.rows.partition_point(|row| row.end <= address);
        let row = self.rows.get(behind).filter(|row| row.start <= address);
        row.is_some_and(|row| row.record == F::rule(F::ENTRY).to_record())
    }

    /// Its first address.
    pub(crate) fn start(&self) -> u64 {
        self.rows.first().map_or(0, |row| row.start)
    }

    /// Behind its last instruction.
    pub(crate) fn end(&self) -> u64 {
        self.rows.last().map_or(0, |row| row.end)
    }
}

/// What is known in front of an instruction, and of it.
#[derive(Clone, Copy)]
struct Met<S> {
    state: S,
    /// Whether a way leads there on which no call has to return: what is called may not.
    is_certain: bool,
    /// Where it ends, once it has been looked at.
    end: Option<u64>,
}

/// A function under way.
pub(crate) struct Walk<'a, F: Frames> {
    /// Addresses that it may extend to, and their code.
    range: Range<u64>,
    code: &'a [u8],
    /// Whether `range` ends with the function.
    is_bounded: bool,
    /// Functions that never return.
    endless: &'a BTreeSet<u64>,
    /// Each instruction that control reaches.
    met: BTreeMap<u64, Met<F::State>>,
    pending: Vec<u64>,
    /// Whether it has a jump to an address that the code does not say.
    leaves: bool,
    function: Function,
    /// Where control jumps to outside of `range`, refused or not, with another frame than that of a first instruction.
    entered: &'a mut Vec<u64>,
}

impl<'a, F: Frames> Walk<'a, F> {
    /// Follows the function at the start of `range`, which `code` is the code of. With `is_bounded`, the function
    /// ends where `range` does. `endless` functions never return. Takes each instruction and what it gives from `budget`.
    /// Appends to `entered` where it jumps to that is no function's start.
    pub(crate) fn follow(
        range: Range<u64>,
        code: &'a [u8],
        is_bounded: bool,
        endless: &'a BTreeSet<u64>,
        budget: &mut Budget,
        entered: &'a mut Vec<u64>,
    ) -> Option<Function> {
        let start = range.start;
        let (met, pending, function) = (BTreeMap::new(), Vec::new(), Function::default());
        let mut walk =
            Self { range, code, is_bounded, endless, met, pending, leaves: false, function, entered };
        walk.meet(start, F::ENTRY, true)?;
        while let Some(address) = walk.pending.pop() {
            budget.instructions = budget.instructions.checked_sub(1)?;
            walk.pass(address)?;
        }
        // Without a return to prove it, what lies behind a call may be a part of another one, as those are not aligned.
        let is_proved = walk.is_bounded || walk.function.may_return;
        if !is_proved && !walk.range.start.is_multiple_of(FUNCTION_ALIGNMENT) {
            return None;
        }
        // Its table may lead behind a call that does not return, with another frame.
        if walk.leaves && walk.met.values().any(|met| !met.is_certain) {
            return None;
        }
        walk.function.rows = walk.rows()?;
        walk.function.kept(budget)
    }

    /// Control comes to `address` with this frame.
    fn meet(&mut self, address: u64, state: F::State, is_certain: bool) -> Option<()> {
        let is_full = self.met.len() >= MAX_INSTRUCTIONS;
        match self.met.get_mut(&address) {
            Some(known) => {
                let state = F::join(known.state, state)?;
                let is_certain = known.is_certain || is_certain;
                if (state, is_certain) != (known.state, known.is_certain) {
                    (known.state, known.is_certain) = (state, is_certain);
                    self.pending.push(address);
                }
                Some(())
            }
            None if !is_full => {
                self.met.insert(address, Met { state, is_certain, end: None });
                self.pending.push(address);
                Some(())
            }
            None => None,
        }
    }

    /// Takes the instruction at `address`.
    fn pass(&mut self, address: u64) -> Option<()> {
        let offset = usize::try_from(address.checked_sub(self.range.start)?).ok()?;
        let met = self.met.get_mut(&address)?;
        let code = self.code.get(offset..)?;
        let step = F::step(code, address, met.state)?;
        let next = address.checked_add(step.bytes as u64)?;
        met.end = Some(next);
        let Met { state, is_certain, .. } = *met;
        match step.flow {
            Flow::Next => self.meet(next, step.behind, is_certain),
            Flow::Call(target) => {
                // The address of the next instruction is taken that way, and popped: no call.
                if target == Some(next) {
                    return None;
                }
                // Behind a call that does not return lies another function, or a part of one: as a rule with
                // another frame.
                if !self.is_bounded && !F::is_aligned(code, state) {
                    return None;
                }
                self.function.calls.extend(target);
                let is_last = self.is_bounded && next == self.range.end;
                if is_last || target.is_some_and(|target| self.endless.contains(&target)) {
                    Some(())
                } else {
                    self.meet(next, step.behind, false)
                }
            }
            Flow::Branch(target) => {
                self.go(target, step.behind, is_certain)?;
                self.meet(next, step.behind, is_certain)
            }
            // A way that only ever goes back comes to no check.
            Flow::Jump(target) if !self.is_bounded && (self.range.start..=address).contains(&target) => None,
            Flow::Jump(target) => self.go(target, step.behind, is_certain),
            Flow::Return => {
                self.function.may_return = true;
                self.function.returns |= is_certain;
                is_entry::<F>(step.behind).then_some(())
            }
            Flow::Leave => {
                self.leaves = true;
                self.function.may_return = true;
                is_entry::<F>(step.behind).then_some(())
            }
            Flow::Trap => self.is_bounded.then_some(()),
        }
    }

    /// Control jumps to `target`: within the function, or to another one, which then returns in place of this one.
    fn go(&mut self, target: u64, state: F::State, is_certain: bool) -> Option<()> {
        if self.range.contains(&target) {
            return self.meet(target, state, is_certain);
        }
        if !is_entry::<F>(state) {
            self.entered.push(target);
            return None;
        }
        self.function.may_return = true;
        self.function.jumps.push(target);
        self.function.certain_jumps.extend(is_certain.then_some(target));
        Some(())
    }

    /// What was met, if no two instructions share a byte.
    fn rows(&self) -> Option<Vec<Interval>> {
        let mut rows: Vec<Interval> = Vec::new();
        let mut met_to = self.range.start;
        for (start, Met { state, end, .. }) in &self.met {
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

/// Whether a frame is that of a function's first instruction.
pub(crate) fn is_entry<F: Frames>(state: F::State) -> bool {
    F::join(F::ENTRY, state).is_some()
}
