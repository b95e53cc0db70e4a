//! Symbols in contexts that are found by their hash.
//!
//! Contexts that meet in a row share it: that costs a little size and never exactness, for both sides
//! meet alike.

use super::coder::Coder;
use super::mixing::{Belief, Counter, Row, code};

/// An odd number near 2^64 divided by the golden ratio: multiplying by it spreads what differs.
pub(super) const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

/// The hash of several numbers.
#[inline(always)]
pub(super) fn hash<const M: usize>(numbers: [u64; M]) -> u64 {
    numbers.iter().fold(0, |hash: u64, number| (hash.rotate_left(23) ^ number).wrapping_mul(SPREAD))
}

/// Codes one kind of symbol in `N` contexts.
pub(super) struct Symbols<const N: usize> {
    tables: [Vec<Row>; N],
    beliefs: [Belief; N],
    /// 64 less the base-two logarithm of the rows.
    shifts: [u32; N],
}

impl<const N: usize> Symbols<N> {
    /// With `2^row_bits` rows for each context.
    pub(super) fn new(row_bits: [u32; N]) -> Self {
        Self {
            tables: row_bits.map(|bits| vec![Row::NEW; 1 << bits]),
            beliefs: core::array::from_fn(|_| Belief::new()),
            shifts: row_bits.map(|bits| 64 - bits),
        }
    }

    /// Codes a symbol, in the step `step` of something larger. The contexts go from the most general to the most particular.
    #[inline(always)]
    pub(super) fn code<C: Coder>(
        &mut self,
        coder: &mut C,
        contexts: [u64; N],
        step: u64,
        symbol: usize,
    ) -> usize {
        let mut tables = self.tables.iter_mut();
        let rows = core::array::from_fn(|at| {
            let row = (contexts[at] ^ step).wrapping_mul(SPREAD) >> self.shifts[at];
            &mut tables.next().expect("there are N tables")[row as usize]
        });
        code(coder, rows, &mut self.beliefs, symbol)
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

    /// With first guesses in 1/65536.
    pub(super) fn with(contexts: usize, guess: impl Fn(usize) -> u32) -> Self {
        Self { counters: (0..contexts).map(|context| Counter::guessed(guess(context))).collect() }
    }

    #[inline(always)]
    pub(super) fn code<C: Coder>(&mut self, coder: &mut C, context: usize, flag: bool) -> bool {
        self.counters[context].code(coder, flag)
    }
}
