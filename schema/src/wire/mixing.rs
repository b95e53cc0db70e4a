//! Probabilities: what contexts have seen, and how far each is believed.
//!
//! A flag has a counter: the share of those that were set. A symbol has a row in each of several contexts: sixteen starts,
//! moved towards each symbol that comes, far at first and then less and less. The rows of a symbol are blended from the
//! most general to the most particular one, each by how far it is believed: rows that have seen as much have been
//! better or worse than the blend before them. All numbers are integers, so that every machine computes the same ones,
//! and sixteen of them are one or two operations of a machine's vector unit.

use super::coder::{CHOICES, Coder, ONE, Starts};

/// A flag's probability, in 1/65536, in the upper 22 bits; flags seen in the lower 10.
#[derive(Clone, Copy)]
pub(super) struct Counter(u32);

/// Flags after which a counter forgets as fast as it learns.
const LIMIT: u32 = 64;

/// How far a counter moves towards its n-th flag: 65536 / (n + 1.6).
const STEPS: [u32; LIMIT as usize + 1] = {
    let mut table = [0; LIMIT as usize + 1];
    let mut n = 0;
    while n <= LIMIT as usize {
        table[n] = (655_360 / (10 * n + 16)) as u32;
        n += 1;
    }
    table
};

impl Counter {
    pub(super) const NEW: Self = Self(1 << 31);

    /// One that starts with a guess in 1/65536, as if it had seen this many flags.
    pub(super) fn guessed(p: u32) -> Self {
        const SEEN: u32 = 8;
        Self(p.min(65535) << 16 | SEEN)
    }

    /// Codes a flag and learns from it.
    #[inline(always)]
    pub(super) fn code<C: Coder>(&mut self, coder: &mut C, flag: bool) -> bool {
        let flag = coder.flag((self.0 >> 18).clamp(4, ONE - 4), flag);
        let (p, seen) = (self.0 >> 10, self.0 & 0x3ff);
        let step = STEPS[seen as usize];
        let p = if flag {
            p + (u64::from((1 << 22) - 1 - p) * u64::from(step) >> 16) as u32
        } else {
            p - (u64::from(p) * u64::from(step) >> 16) as u32
        };
        self.0 = p << 10 | (seen + 1).min(LIMIT);
        flag
    }
}

/// What a context has seen of a symbol: in the first place how many symbols, and behind it where its other choices start.
#[derive(Clone, Copy)]
#[repr(align(32))]
pub(super) struct Row([i16; CHOICES]);

/// Symbols after which a row forgets as fast as it learns.
const SEEN_LIMIT: i16 = 62;
/// Numbers of symbols that are told apart: a power of two above [`SEEN_LIMIT`].
const SEEN: usize = 64;

/// How far a row moves towards a symbol, by how many it has seen: 2^-n. Found by trying.
const RATES: [u8; SEEN] = {
    let mut table = [0; SEEN];
    let mut seen = 0;
    while seen < SEEN {
        table[seen] = match seen {
            0 => 1,
            1..=3 => 2,
            4..=12 => 3,
            13..=30 => 4,
            31..=58 => 5,
            _ => 6,
        };
        seen += 1;
    }
    table
};

/// Where the choices start for a row that has seen nothing but this symbol: each choice keeps a part at least.
const TARGETS: [[i16; CHOICES]; CHOICES] = {
    let mut table = [[0; CHOICES]; CHOICES];
    let mut symbol = 0;
    while symbol < CHOICES {
        let mut at = 1;
        while at < CHOICES {
            let skipped = if at > symbol { ONE as usize - CHOICES } else { 0 };
            table[symbol][at] = (at + skipped) as i16;
            at += 1;
        }
        symbol += 1;
    }
    table
};

impl Row {
    /// Every choice alike.
    pub(super) const NEW: Self = {
        let mut starts = [0; CHOICES];
        let mut at = 1;
        while at < CHOICES {
            starts[at] = (at * ONE as usize / CHOICES) as i16;
            at += 1;
        }
        Self(starts)
    };

    #[inline(always)]
    fn starts(&self) -> Starts {
        let mut starts = [0; CHOICES + 1];
        starts[1..CHOICES].copy_from_slice(&self.0[1..]);
        starts[CHOICES] = ONE as i16;
        starts
    }

    #[inline(always)]
    fn seen(&self) -> i16 {
        self.0[0]
    }

    #[inline(always)]
    fn learn(&mut self, symbol: usize) {
        let seen = self.seen();
        let rate = RATES[seen as usize % SEEN];
        for (start, target) in self.0.iter_mut().zip(TARGETS[symbol % CHOICES]) {
            *start += (target - *start) >> rate;
        }
        self.0[0] = (seen + 1).min(SEEN_LIMIT);
    }
}

/// How far a row is believed over a more general one, by what it has seen; in 1/32768.
#[derive(Clone)]
pub(super) struct Belief([i16; SEEN]);

impl Belief {
    pub(super) fn new() -> Self {
        Self(core::array::from_fn(|seen| (32767 * seen / (seen + 1)) as i16))
    }
}

/// Codes a symbol by rows from the most general to the most particular, and lets all of them learn.
#[inline(always)]
pub(super) fn code<C: Coder, const N: usize>(
    coder: &mut C,
    rows: [&mut Row; N],
    beliefs: &mut [Belief; N],
    symbol: usize,
) -> usize {
    // What each row says, and what it comes to together with those before it.
    let own: [Starts; N] = core::array::from_fn(|at| rows[at].starts());
    let mut blends = [own[0]; N];
    for at in 1..N {
        let weight = i32::from(beliefs[at].0[rows[at].seen() as usize % SEEN]);
        for choice in 0..CHOICES {
            let before = blends[at - 1][choice];
            let difference = 2 * (own[at][choice] - before);
            blends[at][choice] = before + (i32::from(difference) * weight >> 16) as i16;
        }
    }
    let symbol = coder.symbol(&blends[N - 1], symbol);
    let size = |starts: &Starts| starts[symbol + 1] - starts[symbol];
    for at in 1..N {
        let belief = &mut beliefs[at].0[rows[at].seen() as usize % SEEN];
        let is_better = size(&own[at]) > size(&blends[at - 1]);
        let target = 32767 & -i16::from(is_better);
        *belief += (target - *belief) >> 6;
    }
    for row in rows {
        row.learn(symbol);
    }
    symbol
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Else a choice could not be coded.
        #[test]
        fn every_choice_keeps_a_part(symbols in prop::collection::vec(0..CHOICES, 0..500)) {
            let mut row = Row::NEW;
            for symbol in symbols {
                row.learn(symbol);
                let starts = row.starts();
                prop_assert!(starts.windows(2).all(|pair| pair[0] < pair[1]), "{:?}", starts);
            }
        }
    }

    #[test]
    fn a_row_learns_what_repeats() {
        let mut row = Row::NEW;
        (0..20).for_each(|_| row.learn(5));
        let starts = row.starts();
        assert!(i32::from(starts[6] - starts[5]) > ONE as i32 * 9 / 10, "{starts:?}");
    }
}
