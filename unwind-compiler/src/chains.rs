//! Chains: the pieces of a function's rows within which runs can be, each kept once.
//!
//! # Why this shape
//! A million rows are some ten thousand chains, over and over: `push rbp; mov rbp, rsp`, the pops
//! before a `ret`. Which entries state a chain best depends on how often its records occur in the image, not on where
//! it lies. So a chain is found once, numbered, and weighed once, and the image is a list of
//! places with chain numbers.

use hashbrown::{DefaultHashBuilder, HashTable};
use std::hash::{BuildHasher as _, Hash, Hasher};
use windlass_schema::Record;

use crate::run::links;

/// From `at` bytes behind the chain's first row on, up to the next step, `record` holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) at: u32,
    pub(crate) record: Record,
}

impl Hash for Step {
    /// One word, which is half the time of two.
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.record.0.rotate_left(self.at));
    }
}

/// The number of a chain.
pub(crate) type ChainNumber = u32;

/// A chain of a function.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Link {
    /// Bytes from the function's start to the chain's first row.
    pub(crate) at: u32,
    pub(crate) chain: ChainNumber,
    /// Bytes from the chain's first row to its last.
    pub(crate) span: u32,
}

/// All chains of an image.
#[derive(Default)]
pub(crate) struct Chains {
    steps: Vec<Step>,
    /// Where the steps of each chain end.
    ends: Vec<u32>,
    numbers: HashTable<ChainNumber>,
    hasher: DefaultHashBuilder,
    /// Chains that end with the end of coverage, by the chain before it and the bytes to it.
    ended: hashbrown::HashMap<(ChainNumber, u32), Option<ChainNumber>>,
    scratch: Vec<Step>,
}

impl Chains {
    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    /// How many steps they have together.
    pub(crate) fn all_steps(&self) -> usize {
        self.steps.len()
    }

    /// The steps of a chain: at least one, the first at 0.
    pub(crate) fn steps(&self, number: ChainNumber) -> &[Step] {
        steps_of(&self.steps, &self.ends, number)
    }

    /// The number of the chain with these steps.
    pub(crate) fn number(&mut self, steps: &[Step]) -> ChainNumber {
        let hash = self.hasher.hash_one(steps);
        let (all, ends) = (&self.steps, &self.ends);
        if let Some(number) = self.numbers.find(hash, |number| steps_of(all, ends, *number) == steps) {
            return *number;
        }
        let number = self.ends.len() as ChainNumber;
        self.steps.extend_from_slice(steps);
        self.ends.push(self.steps.len() as u32);
        let (all, ends, hasher) = (&self.steps, &self.ends, &self.hasher);
        self.numbers.insert_unique(hash, number, |number| hasher.hash_one(steps_of(all, ends, *number)));
        number
    }

    /// The chain of one row.
    pub(crate) fn single(&mut self, record: Record) -> ChainNumber {
        self.number(&[Step { at: 0, record }])
    }

    /// `chain`, and `distance` bytes from its start the end of coverage, if one run can hold both.
    pub(crate) fn ended(&mut self, chain: ChainNumber, distance: u32) -> Option<ChainNumber> {
        if let Some(known) = self.ended.get(&(chain, distance)) {
            return *known;
        }
        let last = *self.steps(chain).last()?;
        let ended = links(last.record, u64::from(distance - last.at), Record::NO_CFI).then(|| {
            let end = Step { at: distance, record: Record::NO_CFI };
            let steps: Vec<Step> = self.steps(chain).iter().copied().chain([end]).collect();
            self.number(&steps)
        });
        self.ended.insert((chain, distance), ended);
        ended
    }

    /// Divides rows, given as bytes from some place on and records, into chains; calls `found` with each.
    pub(crate) fn divide(&mut self, rows: &[Step], mut found: impl FnMut(Link)) {
        let mut rest = rows;
        let mut scratch = std::mem::take(&mut self.scratch);
        while let Some(first) = rest.first() {
            let linked =
                |pair: &[Step]| links(pair[0].record, u64::from(pair[1].at - pair[0].at), pair[1].record);
            let len = 1 + rest.windows(2).take_while(|pair| linked(pair)).count();
            let (chain, behind) = rest.split_at(len);
            scratch.clear();
            scratch.extend(chain.iter().map(|step| Step { at: step.at - first.at, record: step.record }));
            found(Link { at: first.at, chain: self.number(&scratch), span: chain[len - 1].at - first.at });
            rest = behind;
        }
        self.scratch = scratch;
    }
}

fn steps_of<'a>(steps: &'a [Step], ends: &[u32], number: ChainNumber) -> &'a [Step] {
    let number = number as usize;
    let start = if number == 0 { 0 } else { ends[number - 1] };
    &steps[start as usize..ends[number] as usize]
}
