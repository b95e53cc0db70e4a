//! Shapes: what FDEs with the same instructions share.
//!
//! # Why this shape
//! Compilers give two functions in three the instructions of another one, byte for byte, lengths of
//! advances included. So instructions are run, and rows divided into chains, once for each distinct
//! sequence, while the FDE is being read and its bytes are at hand; an FDE costs their hash, and what is left of it
//! is where it lies and the number of its shape.

use hashbrown::{DefaultHashBuilder, HashTable};
use std::hash::BuildHasher as _;
use windlass_schema::record::kind;
use windlass_schema::{Record, UnsupportedReason};

use crate::chains::{Chains, Link, Step};
use crate::elf::SectionKind;
use crate::entries::{Cie, Fde};
use crate::instructions::{Frame, run};
use crate::plain;
use crate::projection::record;

/// The number of a shape.
pub(crate) type ShapeNumber = u32;

/// Rows that some code has, from its start on.
#[derive(Clone, Copy, Debug)]
struct Shape {
    cie: u32,
    instructions: (u32, u32),
    /// Where its links end in `Shapes::links`.
    links_end: u32,
    facts: Facts,
}

/// What is known of the rows of a shape beside the rows.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Facts {
    /// Rows of CFI.
    pub(crate) cfi_rows: u32,
    /// Offset of the last row.
    reach: u32,
    /// Where several sources cover an address, those of the lowest rank count.
    pub(crate) rank: u8,
    /// Whether some instruction is malformed.
    pub(crate) is_malformed: bool,
    /// Whether it ends as what signal handlers return to.
    pub(crate) is_trampoline: bool,
    /// Whether the rows depend on where the function lies.
    is_placed: bool,
}

/// Rows in the making, of a function's first bytes.
struct Rows<'s> {
    steps: &'s mut Vec<Step>,
    length: u64,
    facts: Facts,
}

impl<'s> Rows<'s> {
    fn new(steps: &'s mut Vec<Step>, length: u64) -> Self {
        steps.clear();
        Self { steps, length, facts: Facts::default() }
    }

    /// Takes a row of CFI from `offset` on.
    #[inline]
    fn push(&mut self, offset: u64, record: Record) {
        if offset < self.length {
            self.facts.cfi_rows += 1;
            self.end(offset, record);
        }
    }

    /// From `offset` on this record holds.
    #[inline]
    fn end(&mut self, offset: u64, record: Record) {
        self.facts.reach = offset as u32;
        if self.steps.last().is_none_or(|last| last.record != record) {
            self.steps.push(Step { at: offset as u32, record });
        }
    }
}

/// The shapes of an image.
pub(crate) struct Shapes<'a> {
    pub(crate) chains: Chains,
    shapes: Vec<Shape>,
    links: Vec<Link>,
    numbers: HashTable<ShapeNumber>,
    hasher: DefaultHashBuilder,
    /// Memory for rows in the making and for states remembered.
    steps: Vec<Step>,
    remembered: Vec<Frame<'a>>,
}

/// FDEs to a shape, over a whole distribution.
const FDES_PER_SHAPE: usize = 4;

/// The instructions of an FDE.
fn instructions<'a>(cies: &[Cie<'a>], cie: u32, (at, len): (u32, u32)) -> &'a [u8] {
    &cies[cie as usize].data[at as usize..][..len as usize]
}

impl<'a> Shapes<'a> {
    /// For an image of about so many FDEs.
    pub(crate) fn new(fdes: usize) -> Self {
        let shapes = fdes / FDES_PER_SHAPE;
        Self {
            chains: Chains::default(),
            shapes: Vec::with_capacity(shapes),
            links: Vec::new(),
            numbers: HashTable::with_capacity(shapes),
            hasher: DefaultHashBuilder::default(),
            steps: Vec::new(),
            remembered: Vec::new(),
        }
    }

    /// The shape of `fde`.
    pub(crate) fn of(&mut self, cies: &[Cie<'a>], fde: &Fde) -> ShapeNumber {
        let number = self.shared(cies, fde);
        let Facts { reach, is_placed, .. } = self.shapes[number as usize].facts;
        if reach < fde.length && !is_placed {
            return number;
        }
        // Rows that depend on its place, or reach behind its end: for this FDE alone.
        self.make(cies, fde, fde.length.into())
    }

    /// The shape of all FDEs with the instructions of `fde`.
    fn shared(&mut self, cies: &[Cie<'a>], fde: &Fde) -> ShapeNumber {
        let key = (fde.cie, instructions(cies, fde.cie, fde.instructions));
        let hash = self.hasher.hash_one(key);
        let shapes = &self.shapes;
        let key_of = |number: &ShapeNumber| {
            let shape = &shapes[*number as usize];
            (shape.cie, instructions(cies, shape.cie, shape.instructions))
        };
        if let Some(number) = self.numbers.find(hash, |number| key_of(number) == key) {
            return *number;
        }
        // Rows past 4 GiB are in no FDE that a table reaches.
        let number = self.make(cies, fde, 1 << 32);
        let (shapes, hasher) = (&self.shapes, &self.hasher);
        let key_of = |number: &ShapeNumber| {
            let shape = &shapes[*number as usize];
            (shape.cie, instructions(cies, shape.cie, shape.instructions))
        };
        self.numbers.insert_unique(hash, number, |number| hasher.hash_one(key_of(number)));
        number
    }

    /// Makes the shape of `fde` by its first `length` bytes.
    fn make(&mut self, cies: &[Cie<'a>], fde: &Fde, length: u64) -> ShapeNumber {
        let cie = &cies[fde.cie as usize];
        let rank = match cie.kind {
            SectionKind::EhFrame => 0,
            SectionKind::DebugFrame => 2,
        };
        let bytes = instructions(cies, fde.cie, fde.instructions);
        let steps = &mut self.steps;
        let mut rows = Rows::new(steps, length);
        let is_plain = cie.plain.is_some_and(|initial| {
            plain::run(bytes, initial, |offset, record| rows.push(offset, record)).is_some()
        });
        if !is_plain {
            rows = Rows::new(steps, length);
            // Expressions are run for it, which no advance changes.
            let mut last = Record::NO_CFI;
            let visit = |offset: u64, row: &Frame<'a>, is_changed: bool| {
                if is_changed {
                    last = record(cie, row);
                }
                rows.push(offset, last);
            };
            let ran = run(cie, fde.instructions, fde.start, &mut self.remembered, visit);
            if let Some(offset) = ran.malformed_from.filter(|offset| *offset < length) {
                rows.end(offset, Record::unsupported(UnsupportedReason::Malformed));
                rows.facts.is_malformed = true;
            }
            rows.facts.is_placed = ran.is_placed;
        }
        let facts = rows.facts;
        let last = self.steps.last();
        let is_trampoline = last.is_some_and(|last| last.record.kind() == kind::SIGNAL);
        let facts = Facts { rank, is_trampoline, ..facts };
        self.chains.divide(&self.steps, |link| self.links.push(link));
        self.add(fde.cie, fde.instructions, facts)
    }

    /// A shape for code that has these rows, by a source of this rank other than CFI.
    pub(crate) fn of_steps(&mut self, steps: &[Step], rank: u8) -> ShapeNumber {
        self.chains.divide(steps, |link| self.links.push(link));
        self.add(u32::MAX, (0, 0), Facts { rank, ..Facts::default() })
    }

    /// Adds the shape of the last links.
    fn add(&mut self, cie: u32, instructions: (u32, u32), facts: Facts) -> ShapeNumber {
        self.shapes.push(Shape { cie, instructions, links_end: self.links.len() as u32, facts });
        self.shapes.len() as u32 - 1
    }

    /// What is known of a shape.
    pub(crate) fn facts(&self, number: ShapeNumber) -> &Facts {
        &self.shapes[number as usize].facts
    }

    /// The chains of all shapes, which are complete.
    pub(crate) fn finish(self) -> (Links, Chains) {
        let ends = self.shapes.iter().map(|shape| (shape.links_end, shape.facts.rank)).collect();
        (Links { links: self.links, ends }, self.chains)
    }
}

/// The chains of each shape.
pub(crate) struct Links {
    links: Vec<Link>,
    /// For each shape: where its links end, and its rank.
    ends: Vec<(u32, u8)>,
}

impl Links {
    /// The chains of a shape, and its rank.
    pub(crate) fn of(&self, number: ShapeNumber) -> (&[Link], u8) {
        let number = number as usize;
        let start = if number == 0 { 0 } else { self.ends[number - 1].0 };
        let (end, rank) = self.ends[number];
        (&self.links[start as usize..end as usize], rank)
    }
}
