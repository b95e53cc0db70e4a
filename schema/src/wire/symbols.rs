//! Symbols of four to sixteen bits, coded bit by bit from the top in several contexts.
//!
//! The counters of a context lie in a table by its hash, sixteen in a row for each four bits of a symbol.
//! Contexts that meet in a row share it: that costs a little size and never exactness, for both sides
//! meet alike.

use super::coder::Coder;
use super::mixing::{Counter, Mixer};

/// Counters in a row: those of the fifteen nodes of a tree of four bits, and one unused.
const ROW: usize = 16;

/// Codes one kind of symbol in `N` contexts.
pub(super) struct Symbols<const N: usize> {
    tables: [Vec<Counter>; N],
    mixer: Mixer<N>,
    /// 64 less the base-two logarithm of the rows.
    shift: u32,
}

/// An odd number near 2^64 divided by the golden ratio: multiplying by it spreads what differs.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

/// The hash of several numbers.
pub(super) fn hash<const M: usize>(numbers: [u64; M]) -> u64 {
    numbers.iter().fold(0, |hash: u64, number| (hash.rotate_left(23) ^ number).wrapping_mul(SPREAD))
}

impl<const N: usize> Symbols<N> {
    /// With `2^row_bits` rows for each context.
    pub(super) fn new(row_bits: u32) -> Self {
        Self {
            tables: core::array::from_fn(|_| vec![Counter::NEW; ROW << row_bits]),
            mixer: Mixer::new(9),
            shift: 64 - row_bits,
        }
    }

    /// Codes a symbol of `4 * nibbles` bits. The last two contexts are the most particular ones.
    pub(super) fn code<C: Coder>(
        &mut self,
        coder: &mut C,
        contexts: [u64; N],
        nibbles: u32,
        symbol: u32,
    ) -> u32 {
        let mut coded = 1;
        for nibble in (0..nibbles).rev() {
            let rows: [usize; N] = core::array::from_fn(|at| {
                let hash = (contexts[at] ^ u64::from(coded)).wrapping_mul(SPREAD);
                (hash >> self.shift) as usize * ROW
            });
            let mut node = 1;
            for bit in (0..4).rev() {
                let bit = symbol >> (4 * nibble + bit) & 1 != 0;
                let mut tables = self.tables.iter_mut();
                let counters = core::array::from_fn(|at| {
                    let table = tables.next().expect("there are N tables");
                    &mut table[rows[at] + node]
                });
                node = node << 1 | usize::from(self.mixer.bit(coder, counters, bit));
            }
            coded = coded << 4 | (node as u32 & 15);
        }
        coded & ((1 << (4 * nibbles)) - 1)
    }
}

/// Codes yes or no in one context of a few.
pub(super) struct Flags {
    counters: Vec<Counter>,
}

impl Flags {
    pub(super) fn new(contexts: usize) -> Self {
        Self { counters: vec![Counter::NEW; contexts] }
    }

    pub(super) fn code<C: Coder>(&mut self, coder: &mut C, context: usize, flag: bool) -> bool {
        let counter = &mut self.counters[context];
        let flag = coder.bit(counter.p(), flag);
        counter.update(flag);
        flag
    }
}
