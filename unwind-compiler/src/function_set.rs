//! The functions of code without CFI: from where they are followed, and which of them are believed.
//!
//! # Why this shape
//! What instructions do to a frame is certain, if only the frame is at the first of them. It is where a call leads; so
//! it is at `main`, whose address the process entry hands over, at `.init` and `.fini` and the words of `.init_array` and
//! its like, which the loader calls, and where a function that is believed calls or jumps to with that frame. A symbol says
//! less: compilers give one to the unlikely part of a function, which is jumped to with any frame (GCC's `.cold`). Such a
//! one is local: what has a global one, and comes to a return with the frame of its first instruction, is called.
//! Of a local one an instruction that returns is the proof, if control comes to it for certain,
//! as nothing returns with a frame of its own left; or a jump to where the frame is known
//! to be that one, as there is but one at an address. It is one if control comes to it: behind a call
//! that does not return lies what belongs elsewhere. Where any function jumps to with another frame is no start,
//! nor within a function that can be followed without that jump.

use std::collections::{BTreeSet, HashMap};
use std::marker::PhantomData;
use std::ops::Range;

use windlass_schema::{Record, Rule};

use crate::code_bytes::CodeBytes;
use crate::function_walk::{Budget, Function, Walk};
use crate::recognise::{Code, Starts};

/// Instructions that are followed for each byte of gaps: nearly all have several bytes, and functions share little of
/// their code.
const FOLLOWED_PER_BYTE: u64 = 1;

/// For how many bytes of gaps a row, a call or a jump is kept, or a function. Compiled code has half of that; this bounds
/// the memory for code that is made to have more.
const BYTES_PER_KEPT: u64 = 4;

/// What is followed and kept however little code there is.
const MIN_BUDGET: u64 = 1 << 12;

/// What came of following a function.
enum State {
    /// It cannot be followed.
    Refused,
    /// Nothing says that it starts there.
    Unproved(Box<Function>),
    Believed(Box<Function>),
}

/// The functions of gaps.
pub(crate) struct Functions<'s, 'a, C> {
    code: &'s CodeBytes<'a>,
    /// Sorted, disjoint.
    open: &'s [Range<u64>],
    starts: &'s Starts,
    /// Linkage tables, which are called: sorted, disjoint.
    linkage: Vec<Range<u64>>,
    budget: Budget,
    states: HashMap<u64, State>,
    /// Where functions without a proof jump to for certain, and their starts.
    jumping: BTreeSet<(u64, u64)>,
    /// Where functions jump to, refused or not, with another frame than that of a first instruction.
    entered: Vec<u64>,
    /// Functions that never return.
    endless: BTreeSet<u64>,
    architecture: PhantomData<C>,
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
            budget: Budget {
                instructions: bytes.saturating_mul(FOLLOWED_PER_BYTE).saturating_add(MIN_BUDGET),
                kept: (bytes / BYTES_PER_KEPT).saturating_add(MIN_BUDGET),
            },
            // Whatever the process starts with was not called.
            states: HashMap::from([(starts.process, State::Refused)]),
            jumping: BTreeSet::new(),
            entered: Vec::new(),
            endless: BTreeSet::new(),
            architecture: PhantomData,
        }
    }

    /// The rows of the functions that are believed, disjoint and in order. For the process entry's sake, `called` are
    /// called.
    pub(crate) fn follow(mut self, called: Vec<u64>) -> impl Iterator<Item = (Range<u64>, Rule)> {
        let starts = self.starts;
        self.endless = self.endless();
        called.into_iter().chain(starts.called.iter().copied()).for_each(|start| self.believe(start));
        // The symbol of the last function that is believed.
        let mut last = None;
        for start in starts.symbols.keys() {
            // Another name for a part of its code says nothing that its own does not.
            if self.states.contains_key(start) || last.is_some_and(|last| self.is_entry_of(last, *start)) {
                continue;
            }
            let Some(range) = self.open_at(*start) else { continue };
            let state = self.walk(*start, range);
            let mut is_proved = false;
            if let State::Unproved(function) = &state {
                let mut jumps = function.certain_jumps.iter();
                let is_called = function.may_return && starts.global.contains(start);
                is_proved = is_called || function.returns || jumps.any(|target| self.is_known(*target));
                self.jumping.extend(function.certain_jumps.iter().map(|target| (*target, *start)));
            }
            self.states.insert(*start, state);
            if is_proved {
                self.believe(*start);
                last = Some(*start);
            }
        }
        let believed = |state| match state {
            State::Believed(function) => Some(*function),
            State::Refused | State::Unproved(_) => None,
        };
        agreed::<C>(self.states.into_values().filter_map(believed).collect(), self.entered)
    }

    /// Functions with a symbol that control never returns from, whatever those that they call do.
    fn endless(&self) -> BTreeSet<u64> {
        let (mut budget, mut entered) = (self.budget, Vec::new());
        let mut endless = BTreeSet::new();
        let mut walked_to = 0;
        for (start, end) in &self.starts.symbols {
            let Some(range) = self.open_at(*start).filter(|range| *start >= walked_to && *end <= range.end)
            else {
                continue;
            };
            walked_to = *end;
            let Some(bytes) = self.code.get(&(range.start..*end)) else { continue };
            let none = BTreeSet::new();
            let walk = Walk::<C>::follow(*start..*end, bytes, true, &none, &mut budget, &mut entered);
            endless.extend(walk.is_some_and(|function| !function.may_return).then_some(*start));
        }
        endless
    }

    /// Whether the function that is believed to start at `start` has the frame of a first instruction at `address`.
    fn is_entry_of(&self, start: u64, address: u64) -> bool {
        match self.states.get(&start) {
            Some(State::Believed(function)) => function.is_entry::<C>(address),
            _ => false,
        }
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
            let Some(range) = self.open_at(start) else { continue };
            let state = match self.states.remove(&start) {
                Some(state) => state,
                None => self.walk(start, range),
            };
            let state = match state {
                State::Unproved(function) => {
                    pending.extend(function.calls.iter().chain(&function.jumps));
                    pending.extend(self.jumping.range((start, 0)..=(start, u64::MAX)).map(|(_, from)| from));
                    State::Believed(function)
                }
                state => state,
            };
            self.states.insert(start, state);
        }
    }

    /// From `start`, where a function may start, to the end of code that is looked at.
    fn open_at(&self, start: u64) -> Option<Range<u64>> {
        let behind = self.open.partition_point(|range| range.start <= start);
        let range = self.open[..behind].last().filter(|range| range.contains(&start))?;
        start.is_multiple_of(C::ALIGNMENT).then_some(start..range.end)
    }

    fn walk(&mut self, start: u64, range: Range<u64>) -> State {
        let end = self.starts.symbols.get(&start).copied().filter(|end| *end <= range.end);
        let range = start..end.unwrap_or(range.end);
        let Some(bytes) = self.code.get(&range) else { return State::Refused };
        let function = Walk::<C>::follow(
            range,
            bytes,
            end.is_some(),
            &self.endless,
            &mut self.budget,
            &mut self.entered,
        );
        function.map_or(State::Refused, |function| State::Unproved(Box::new(function)))
    }
}

/// What a function says of the frame at some addresses.
struct Claim {
    start: u64,
    end: u64,
    record: Record,
    function: u32,
    /// Or that another one starts there.
    is_row: bool,
}

/// The rows of functions, but for those that another one contradicts: which of them is wrong is not known. At
/// `entered`, some have another frame than that of a first instruction.
fn agreed<C: Code>(
    mut functions: Vec<Function>,
    mut entered: Vec<u64>,
) -> impl Iterator<Item = (Range<u64>, Rule)> {
    entered.sort_unstable();
    functions.retain(|function| {
        let behind = entered.partition_point(|target| *target < function.start());
        entered.get(behind).is_none_or(|target| *target >= function.end())
    });
    let mut is_doubtful = vec![false; functions.len()];
    let mut claims = claims(functions, C::rule(C::ENTRY).to_record());
    claims.sort_unstable_by_key(|claim| claim.start);
    mark_contradictions(&claims, &mut is_doubtful);
    claims.retain(|claim| claim.is_row && !is_doubtful[claim.function as usize]);
    // Those that share an address say the same.
    claims.dedup_by(|next, last| {
        let is_one = next.start <= last.end && next.record == last.record;
        last.end = if is_one { last.end.max(next.end) } else { last.end };
        is_one
    });
    let rule = |record| Rule::of_record(record, C::ARCHITECTURE).ok();
    claims.into_iter().filter_map(move |claim| Some((claim.start..claim.end, rule(claim.record)?)))
}

/// What functions say: their rows; and of those that they call and jump to the frame of a first instruction, `entry`.
fn claims(functions: Vec<Function>, entry: Record) -> Vec<Claim> {
    let count = |one: &Function| one.rows.len() + one.calls.len() + one.jumps.len();
    let mut claims = Vec::with_capacity(functions.iter().map(count).sum());
    for (number, function) in functions.into_iter().enumerate() {
        let Function { rows, calls, jumps, .. } = function;
        let function = number as u32;
        claims.extend(rows.into_iter().map(|row| Claim {
            start: row.start,
            end: row.end,
            record: row.record,
            function,
            is_row: true,
        }));
        claims.extend(calls.into_iter().chain(jumps).filter_map(|start| {
            Some(Claim { start, end: start.checked_add(1)?, record: entry, function, is_row: false })
        }));
    }
    claims
}

/// Marks the functions of which a claim shares an address with one that says something else. `claims` are sorted.
fn mark_contradictions(claims: &[Claim], is_doubtful: &mut [bool]) {
    // The claims that reach furthest, of two records: one of them is another than any claim's.
    let mut furthest: [Option<(u64, Record)>; 2] = [None; 2];
    for claim in claims {
        let other = furthest.iter().flatten().find(|(_, record)| *record != claim.record);
        is_doubtful[claim.function as usize] |= other.is_some_and(|(end, _)| *end > claim.start);
        let same = furthest.iter().position(|one| one.is_none_or(|(_, record)| record == claim.record));
        let same = same.unwrap_or(1);
        if furthest[same].is_none_or(|(end, _)| end < claim.end) {
            furthest[same] = Some((claim.end, claim.record));
        }
        if furthest[0].map(|(end, _)| end) < furthest[1].map(|(end, _)| end) {
            furthest.swap(0, 1);
        }
    }
    // The same with what follows: the next ones, of two records.
    let mut next: [Option<(u64, Record)>; 2] = [None; 2];
    for claim in claims.iter().rev() {
        let other = next.iter().flatten().find(|(_, record)| *record != claim.record);
        is_doubtful[claim.function as usize] |= other.is_some_and(|(start, _)| *start < claim.end);
        if next[0].is_some_and(|(_, record)| record != claim.record) {
            next[1] = next[0];
        }
        next[0] = Some((claim.start, claim.record));
    }
}
