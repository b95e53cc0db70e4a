//! Rests: what is left of chains from some row on, each kept once, and the ways to begin it.
//!
//! # Why this shape
//! Which entries state a chain best is a question of what to begin with and of how best to state what is left; and
//! epilogues of different functions end alike. So rests, not chains, are what choices are made for, each once; a rest
//! names the one behind its first row, and all rests are numbered behind those that they lead to, so that
//! one pass over the numbers answers a question about all chains.

use hashbrown::{DefaultHashBuilder, HashTable};
use std::hash::BuildHasher as _;
use windlass_schema::Record;
use windlass_schema::record::kind;

use crate::chains::{Chains, Step};
use crate::run::Run;

/// The number of a rest. Those of the rests that it leads to are lower.
pub(crate) type RestNumber = u32;

/// The rest of no rows.
pub(crate) const NOTHING: RestNumber = 0;

/// The last rows of some chains.
#[derive(Clone, Copy)]
struct Rest {
    /// What is left behind the first row.
    next: RestNumber,
    /// Bytes from the first row to the last.
    span: u32,
    /// Where its choices end in [`Rests::choices`]. The first is the first row as it is.
    choices_end: u32,
}

/// A way to begin a rest: by this record, which leaves another rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Choice {
    /// Its number in [`Rests::records`].
    pub(crate) record: u32,
    pub(crate) rest: RestNumber,
}

/// All rests of all chains.
pub(crate) struct Rests {
    /// All records in question.
    pub(crate) records: Vec<Record>,
    rests: Vec<Rest>,
    choices: Vec<Choice>,
    /// For each chain, all of it.
    wholes: Vec<RestNumber>,
}

impl Rests {
    /// Those of the chains that are in use. Without `has_runs`, each row is to stand alone.
    pub(crate) fn of(chains: &Chains, is_used: impl Fn(usize) -> bool, has_runs: bool) -> Self {
        let nothing = Rest { next: NOTHING, span: 0, choices_end: 0 };
        let mut rests =
            Self { records: Vec::new(), rests: vec![nothing], choices: Vec::new(), wholes: Vec::new() };
        let mut maker = Maker::new(chains);
        for chain in 0..chains.len() {
            // One that is placed nowhere was divided, or has become longer.
            let steps = if is_used(chain) { chains.steps(chain as u32) } else { &[] };
            let whole = (0..steps.len())
                .rev()
                .fold(NOTHING, |next, index| maker.rest(&mut rests, &steps[index..], next, has_runs));
            rests.wholes.push(whole);
        }
        rests
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.rests.len()
    }

    /// The numbers of all but that of no rows.
    pub(crate) fn numbers(&self) -> std::ops::Range<RestNumber> {
        NOTHING + 1..self.rests.len() as RestNumber
    }

    /// For each chain, the rest that is all of it; that of no rows for a chain that is not in use.
    pub(crate) fn wholes(&self) -> &[RestNumber] {
        &self.wholes
    }

    fn key(&self, number: RestNumber) -> Key {
        let Rest { next, span, .. } = self.rests[number as usize];
        (self.choices(number)[0].record, span, next)
    }

    /// What is left of a rest behind its first row.
    pub(crate) fn next(&self, rest: RestNumber) -> RestNumber {
        self.rests[rest as usize].next
    }

    /// Bytes from its first row to its last.
    pub(crate) fn span(&self, rest: RestNumber) -> u32 {
        self.rests[rest as usize].span
    }

    /// The ways to begin a rest, of runs the longer behind the shorter: none for that of no rows.
    pub(crate) fn choices(&self, number: RestNumber) -> &[Choice] {
        let number = number as usize;
        let start = if number == 0 { 0 } else { self.rests[number - 1].choices_end };
        &self.choices[start as usize..self.rests[number].choices_end as usize]
    }
}

/// Of the runs of each kind that begin a rest, so many are in question, the longest. Measured: of the entries
/// that are best, one in ten is a shorter run, and tables are 0.02% larger without those.
const LONGEST_RUNS: usize = 2;

/// What tells rests apart: the record of the first row, the span, and what is left behind that row.
type Key = (u32, u32, RestNumber);

/// What finds the number of a record and of a rest.
struct Maker {
    records: HashTable<u32>,
    rests: HashTable<RestNumber>,
    hasher: DefaultHashBuilder,
    /// Memory for runs.
    runs: Vec<Record>,
}

impl Maker {
    /// For all rests of these chains: three rows of four begin one of their own, and as many records are in question.
    fn new(chains: &Chains) -> Self {
        let expected = chains.all_steps() / 4 * 3;
        Self {
            records: HashTable::with_capacity(expected),
            rests: HashTable::with_capacity(expected),
            hasher: DefaultHashBuilder::default(),
            runs: Vec::new(),
        }
    }

    /// The rest of these rows, given that behind the first.
    fn rest(&mut self, all: &mut Rests, steps: &[Step], next: RestNumber, has_runs: bool) -> RestNumber {
        let span = steps[steps.len() - 1].at - steps[0].at;
        let record = self.record(&mut all.records, steps[0].record);
        let hasher = self.hasher.clone();
        let hash =
            |(record, span, next): Key| hasher.hash_one((u64::from(record) << 32 | u64::from(next), span));
        let key = (record, span, next);
        if let Some(known) = self.rests.find(hash(key), |number| all.key(*number) == key) {
            return *known;
        }
        all.choices.push(Choice { record, rest: next });
        for kind in if has_runs { &[kind::PUSH_RUN, kind::POP_RUN][..] } else { &[] } {
            self.runs.clear();
            runs_at(steps, *kind, |run| self.runs.push(run));
            let shorter = self.runs.len().saturating_sub(LONGEST_RUNS);
            let mut rest = next;
            for index in 0..self.runs.len() {
                rest = all.next(rest);
                if index >= shorter {
                    let record = self.record(&mut all.records, self.runs[index]);
                    all.choices.push(Choice { record, rest });
                }
            }
        }
        let number = all.rests.len() as RestNumber;
        all.rests.push(Rest { next, span, choices_end: all.choices.len() as u32 });
        self.rests.insert_unique(hash(key), number, |number| hash(all.key(*number)));
        number
    }

    fn record(&mut self, records: &mut Vec<Record>, record: Record) -> u32 {
        let hash = |record: Record| self.hasher.hash_one(record.0);
        if let Some(number) = self.records.find(hash(record), |number| records[*number as usize] == record) {
            return *number;
        }
        let number = records.len() as u32;
        records.push(record);
        self.records.insert_unique(hash(record), number, |number| hash(records[*number as usize]));
        number
    }
}

/// Calls `found` with the record of each run of 2, 3, ... rows that begins `rows`.
fn runs_at(rows: &[Step], kind: u8, mut found: impl FnMut(Record)) {
    let Some(mut run) = Run::begin(rows[0].record, kind) else { return };
    for row in &rows[1..] {
        if !run.extend(u64::from(row.at - rows[0].at), row.record) {
            return;
        }
        found(run.to_record());
    }
}
