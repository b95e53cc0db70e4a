//! Shapes: what FDEs with the same instructions share.
//!
//! # Why this shape
//! Compilers give four functions in five the instructions of another one, byte for byte, lengths of
//! advances included. So instructions are run, and rows divided into chains, once for each distinct
//! sequence, and an FDE costs the hash of its bytes.

use hashbrown::{DefaultHashBuilder, HashTable};
use std::hash::BuildHasher as _;
use windlass_schema::{Record, UnsupportedReason};

use crate::chains::{Chains, Link, Step};
use crate::entries::{Cie, Fde};
use crate::instructions::run;
use crate::projection::record;

/// The rows of an FDE, from its start.
#[derive(Default)]
pub(crate) struct FdeRows {
    /// Changes of the record.
    pub(crate) steps: Vec<Step>,
    /// Rows of CFI, and the offset of the last.
    pub(crate) cfi_rows: u64,
    reach: u64,
    /// Whether some instruction is malformed.
    pub(crate) is_malformed: bool,
    /// Whether they depend on where the function lies.
    is_placed: bool,
}

impl FdeRows {
    /// The rows of the whole of `fde`.
    pub(crate) fn of(cie: &Cie<'_>, fde: &Fde) -> Self {
        let mut rows = Self::default();
        rows.run(cie, fde, fde.length.into());
        rows
    }

    /// Runs the instructions of `fde` over its first `length` bytes.
    fn run(&mut self, cie: &Cie<'_>, fde: &Fde, length: u64) {
        self.steps.clear();
        (self.cfi_rows, self.reach) = (0, 0);
        let ran = run(cie, fde.instructions, fde.start, |offset, row| {
            if offset < length {
                self.cfi_rows += 1;
                self.reach = offset;
                self.push(offset, record(cie, row));
            }
        });
        let malformed_from = ran.malformed_from.filter(|offset| *offset < length);
        if let Some(offset) = malformed_from {
            self.reach = offset;
            self.push(offset, Record::unsupported(UnsupportedReason::Malformed));
        }
        self.is_malformed = malformed_from.is_some();
        self.is_placed = ran.is_placed;
    }

    fn push(&mut self, offset: u64, record: Record) {
        if self.steps.last().is_none_or(|last| last.record != record) {
            self.steps.push(Step { at: offset as u32, record });
        }
    }
}

/// A shape: rows that any FDE longer than their reach has at its start.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    cie: u32,
    instructions: (u32, u32),
    /// Links in `Shapes::links`.
    links: (u32, u32),
    /// Offset of the last row.
    pub(crate) reach: u32,
    pub(crate) cfi_rows: u64,
    pub(crate) is_malformed: bool,
    /// Not for other FDEs, and its links are not there.
    is_placed: bool,
}

/// The shapes of an image.
pub(crate) struct Shapes {
    shapes: Vec<Shape>,
    links: Vec<Link>,
    /// Memory for the rows of a shape in the making.
    rows: FdeRows,
    numbers: HashTable<u32>,
    hasher: DefaultHashBuilder,
}

/// FDEs to a shape, over a whole distribution.
const FDES_PER_SHAPE: usize = 4;

impl Shapes {
    /// For an image of so many FDEs.
    pub(crate) fn new(fdes: usize) -> Self {
        let shapes = fdes / FDES_PER_SHAPE;
        Self {
            shapes: Vec::with_capacity(shapes),
            links: Vec::new(),
            rows: FdeRows::default(),
            numbers: HashTable::with_capacity(shapes),
            hasher: DefaultHashBuilder::default(),
        }
    }

    /// The shape of `fde` and its chains; `None` if its rows have to be made for itself: they depend on its
    /// place or reach behind its end.
    pub(crate) fn of(
        &mut self,
        cies: &[Cie<'_>],
        fde: &Fde,
        chains: &mut Chains,
    ) -> Option<(Shape, &[Link])> {
        let bytes = |cie: u32, (at, len): (u32, u32)| &cies[cie as usize].data[at as usize..][..len as usize];
        let key = (fde.cie, bytes(fde.cie, fde.instructions));
        let hash = self.hasher.hash_one(key);
        let shapes = &self.shapes;
        let key_of = |number: &u32| {
            let shape = &shapes[*number as usize];
            (shape.cie, bytes(shape.cie, shape.instructions))
        };
        let number = match self.numbers.find(hash, |number| key_of(number) == key) {
            Some(number) => *number,
            None => {
                let shape = Self::make(&mut self.links, &mut self.rows, cies, fde, chains);
                let number = self.shapes.len() as u32;
                let hasher = &self.hasher;
                self.numbers.insert_unique(hash, number, |number| hasher.hash_one(key_of(number)));
                self.shapes.push(shape);
                number
            }
        };
        let shape = self.shapes[number as usize];
        let links = &self.links[shape.links.0 as usize..shape.links.1 as usize];
        (!shape.is_placed && shape.reach < fde.length).then_some((shape, links))
    }

    fn make(
        links: &mut Vec<Link>,
        rows: &mut FdeRows,
        cies: &[Cie<'_>],
        fde: &Fde,
        chains: &mut Chains,
    ) -> Shape {
        // Rows past 4 GiB are in no FDE that a table reaches.
        rows.run(&cies[fde.cie as usize], fde, 1 << 32);
        let first = links.len() as u32;
        if !rows.is_placed {
            chains.divide(&rows.steps, |link| links.push(link));
        }
        Shape {
            cie: fde.cie,
            instructions: fde.instructions,
            links: (first, links.len() as u32),
            reach: rows.reach as u32,
            cfi_rows: rows.cfi_rows,
            is_malformed: rows.is_malformed,
            is_placed: rows.is_placed,
        }
    }
}
