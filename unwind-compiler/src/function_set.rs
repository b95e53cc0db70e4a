//! The functions of code without CFI: from where they are followed, and which of them are believed.
//!
//! # Why this shape
//! What instructions do to a frame is certain, if only the frame is at the first of them. It is where a call leads; so
//! it is at `.init` and `.fini` and the words of `.init_array` and its like, which the loader calls, and where a function
//! that is believed calls or jumps to with that frame. A symbol says less: compilers give one to the
//! unlikely part of a function, which is jumped to with any frame (GCC's `.cold`). From there on an instruction that
//! returns is the proof, as nothing returns with a frame of its own left; or a jump to where the frame is known
//! to be that one, as there is but one at an address.

use std::collections::HashMap;
use std::ops::Range;

use windlass_schema::{Record, Rule, UnsupportedReason};

use crate::code_bytes::CodeBytes;
use crate::function_walk::{Function, Walk};
use crate::rows::{Interval, merge};
use crate::uncovered::{Code, Starts};

/// Instructions that are followed for each byte of gaps: functions share little of their code.
const FOLLOWED_PER_BYTE: u64 = 4;

/// What came of following a function.
enum State {
    /// It cannot be followed.
    Refused,
    /// Nothing says that it starts there.
    Unproved(Function),
    Believed(Function),
}

/// The functions of gaps.
pub(crate) struct Functions<'s, 'a, C> {
    code: &'s CodeBytes<'a>,
    /// Sorted, disjoint.
    open: &'s [Range<u64>],
    starts: &'s Starts,
    /// Linkage tables, which are called: sorted, disjoint.
    linkage: Vec<Range<u64>>,
    budget: u64,
    states: HashMap<u64, State>,
    /// Functions without a proof by where they jump to.
    jumping: HashMap<u64, Vec<u64>>,
    architecture: std::marker::PhantomData<C>,
}

impl<'s, 'a, C: Code> Functions<'s, 'a, C> {
    pub(crate) fn new(
        code: &'s CodeBytes<'a>,
        open: &'s [Range<u64>],
        starts: &'s Starts,
        linkage: Vec<Range<u64>>,
    ) -> Self {
        let bytes: u64 = open.iter().map(|range| range.end - range.start).sum();
        Self {
            code,
            open,
            starts,
            linkage,
            budget: bytes.saturating_mul(FOLLOWED_PER_BYTE),
            // Whatever the process starts with was not called.
            states: HashMap::from([(starts.process, State::Refused)]),
            jumping: HashMap::new(),
            architecture: std::marker::PhantomData,
        }
    }

    /// The rows of the functions that are believed. The process entry calls `called`.
    pub(crate) fn follow(mut self, called: Option<u64>) -> Vec<(Range<u64>, Rule)> {
        let starts = self.starts;
        called.into_iter().chain(starts.called.iter().copied()).for_each(|start| self.believe(start));
        for start in starts.symbols.keys() {
            if self.states.contains_key(start) {
                continue;
            }
            let state = self.walk(*start);
            let mut is_proved = false;
            if let State::Unproved(function) = &state {
                is_proved = function.returns || function.jumps.iter().any(|target| self.is_known(*target));
                for target in &function.jumps {
                    self.jumping.entry(*target).or_default().push(*start);
                }
            }
            self.states.insert(*start, state);
            if is_proved {
                self.believe(*start);
            }
        }
        let believed = |state| match state {
            State::Believed(function) => Some(function),
            State::Refused | State::Unproved(_) => None,
        };
        agreed::<C>(self.states.into_values().filter_map(believed).collect())
    }

    /// Whether a function is known to start there.
    fn is_known(&self, start: u64) -> bool {
        let behind = self.linkage.partition_point(|range| range.end <= start);
        matches!(self.states.get(&start), Some(State::Believed(_)))
            || self.linkage.get(behind).is_some_and(|range| range.contains(&start))
    }

    /// A function starts at `start`, and so do others.
    fn believe(&mut self, start: u64) {
        let mut pending = vec![start];
        while let Some(start) = pending.pop() {
            let state = match self.states.remove(&start) {
                Some(state) => state,
                None => self.walk(start),
            };
            let state = match state {
                State::Unproved(function) => {
                    pending.extend(function.calls.iter().chain(&function.jumps));
                    pending.extend(self.jumping.remove(&start).unwrap_or_default());
                    State::Believed(function)
                }
                state => state,
            };
            self.states.insert(start, state);
        }
    }

    fn walk(&mut self, start: u64) -> State {
        let behind = self.open.partition_point(|range| range.start <= start);
        let range = behind.checked_sub(1).map(|at| &self.open[at]).filter(|range| range.contains(&start));
        let Some(range) = range.filter(|_| start.is_multiple_of(C::ALIGNMENT)) else { return State::Refused };
        let end = self.starts.symbols.get(&start).copied().filter(|end| *end <= range.end);
        let range = start..end.unwrap_or(range.end);
        let Some(bytes) = self.code.get(&range) else { return State::Refused };
        let function = Walk::<C>::follow(range, bytes, end.is_some(), &mut self.budget);
        function.map_or(State::Refused, State::Unproved)
    }
}

/// The rows of functions, but for those that another one contradicts: which of them is wrong is not known.
fn agreed<C: Code>(mut functions: Vec<Function>) -> Vec<(Range<u64>, Rule)> {
    let entry = C::rule(C::ENTRY).to_record();
    // What a function says of those that it calls and jumps to: their first instruction's frame.
    let claims = |function: &Function| -> Vec<Interval> {
        let starts = function.calls.iter().chain(&function.jumps);
        let claim = |start: &u64| {
            Some(Interval { start: *start, end: start.checked_add(1)?, rank: 0, record: entry })
        };
        starts.filter_map(claim).chain(function.rows.iter().copied()).collect()
    };
    let contradiction = Record::unsupported(UnsupportedReason::Overlap);
    let doubtful = ranges(functions.iter().flat_map(claims).collect());
    let doubtful: Vec<Range<u64>> =
        doubtful.into_iter().filter(|(_, record)| *record == contradiction).map(|(range, _)| range).collect();
    if !doubtful.is_empty() {
        functions.retain(|function| {
            !claims(function).iter().any(|row| {
                let behind = doubtful.partition_point(|range| range.end <= row.start);
                doubtful.get(behind).is_some_and(|range| range.start < row.end)
            })
        });
    }
    let rows = ranges(functions.into_iter().flat_map(|function| function.rows).collect());
    let rule = |record| Rule::of_record(record, C::ARCHITECTURE).ok();
    rows.into_iter().filter_map(|(range, record)| Some((range, rule(record)?))).collect()
}

/// What intervals say of each address, or that they contradict each other.
fn ranges(intervals: Vec<Interval>) -> Vec<(Range<u64>, Record)> {
    let rows = merge(intervals);
    let ends: Vec<u64> = rows.iter().skip(1).map(|row| row.address).collect();
    rows.into_iter().zip(ends).map(|(row, end)| (row.address..end, row.record)).collect()
}
