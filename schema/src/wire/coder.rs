//! The entropy coder: choices and their probabilities to bytes, and back.
//!
//! # Why this shape
//! Asymmetric numeral systems (rANS): the decoder's step is one multiplication and no division, and a choice among
//! sixteen costs no more than one among two. The state is a number of 32 bits; a choice that has `size`
//! of [`ONE`] parts, from `start` on, multiplies it by `ONE / size`. The decoder undoes the encoder's last
//! step first, so the encoder keeps all choices and goes through them backwards.

/// Parts that a probability has.
pub(super) const ONE: u32 = 1 << ONE_SHIFT;
/// log2 of [`ONE`]: so that twice a difference of two probabilities is an `i16`.
const ONE_SHIFT: u32 = 14;
/// Choices of a symbol.
pub(super) const CHOICES: usize = 16;
/// Between two steps the state is at least this; it takes in 16 bits whenever it would fall below.
const LEAST_STATE: u32 = 1 << 16;
/// Most bits that are coded as they are in one step.
const PLAIN_BITS: u32 = 12;

/// Where the choices of a symbol start: choice `i` has the parts from `starts[i]` to below `starts[i + 1]`, at least
/// one. The first is 0 and the last, of no choice, [`ONE`].
pub(super) type Starts = [i16; CHOICES + 1];

/// What is common to both directions: to a model, encoding and decoding are one walk. A decoder
/// ignores what it is given to code and gives what was encoded.
pub(super) trait Coder {
    /// Codes a flag that is set with probability `p` / [`ONE`], 1 to `ONE` - 1.
    fn flag(&mut self, p: u32, flag: bool) -> bool;
    /// Codes a choice.
    fn symbol(&mut self, starts: &Starts, symbol: usize) -> usize;
    /// Codes the low `count` bits of `value`, each as probable as the other.
    fn bits(&mut self, count: u32, value: u32) -> u32;
    /// Whether something behind the end was read.
    fn is_past_end(&self) -> bool;
}

/// Choices to bytes.
#[derive(Default)]
pub(super) struct Encoder {
    /// Start and size of each choice.
    choices: Vec<(u16, u16)>,
}

impl Encoder {
    /// The bytes.
    pub(super) fn finish(self) -> Vec<u8> {
        let mut state = LEAST_STATE;
        let mut halves: Vec<u16> = Vec::new();
        for (start, size) in self.choices.into_iter().rev() {
            let size = u32::from(size);
            if u64::from(state) >= u64::from(size) << (32 - ONE_SHIFT) {
                halves.push(state as u16);
                state >>= 16;
            }
            state = (state / size << ONE_SHIFT) + state % size + u32::from(start);
        }
        let mut bytes = state.to_le_bytes().to_vec();
        bytes.extend(halves.into_iter().rev().flat_map(u16::to_le_bytes));
        bytes
    }
}

impl Coder for Encoder {
    fn is_past_end(&self) -> bool {
        false
    }

    fn flag(&mut self, p: u32, flag: bool) -> bool {
        self.choices.push(if flag { (0, p as u16) } else { (p as u16, (ONE - p) as u16) });
        flag
    }

    fn symbol(&mut self, starts: &Starts, symbol: usize) -> usize {
        self.choices.push((starts[symbol] as u16, (starts[symbol + 1] - starts[symbol]) as u16));
        symbol
    }

    fn bits(&mut self, count: u32, value: u32) -> u32 {
        let mut left = count;
        while left != 0 {
            let taken = left.min(PLAIN_BITS);
            left -= taken;
            let bits = value >> left & ((1 << taken) - 1);
            let size = ONE >> taken;
            self.choices.push(((bits * size) as u16, size as u16));
        }
        value
    }
}

/// Bytes to choices. Behind the end there are zeros without end.
#[derive(Clone)]
pub(super) struct Decoder<'a> {
    state: u32,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Decoder<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        let state = bytes.first_chunk().map_or(0, |state| u32::from_le_bytes(*state));
        Self { state, bytes, at: 4 }
    }

    /// Cuts off what is behind `len` bytes.
    pub(super) fn end_at(&mut self, len: usize) {
        self.bytes = &self.bytes[..len];
    }

    /// Whether all was read, and the state is what an encoder starts with.
    pub(super) fn is_at_end(&self) -> bool {
        self.at == self.bytes.len() && self.state == LEAST_STATE
    }

    #[inline(always)]
    fn take(&mut self, start: u32, size: u32) {
        // At most (2^18 - 1) * 2^14 + 2^14 - 1; for a state that no encoder made too.
        let state = size * (self.state >> ONE_SHIFT) + (self.state & (ONE - 1)) - start;
        // Whether more is needed is hard to foretell, so there is no branch on it.
        let needed = u32::from(state < LEAST_STATE);
        let half = match self.bytes.get(self.at..self.at + 2) {
            Some(half) => u32::from(u16::from_le_bytes([half[0], half[1]])),
            None => 0,
        };
        self.state = state << (16 * needed) | half & needed.wrapping_neg();
        self.at += 2 * needed as usize;
    }
}

impl Coder for Decoder<'_> {
    #[inline(always)]
    fn is_past_end(&self) -> bool {
        self.at > self.bytes.len()
    }

    #[inline(always)]
    fn flag(&mut self, p: u32, _: bool) -> bool {
        let flag = self.state & (ONE - 1) < p;
        if flag {
            self.take(0, p);
        } else {
            self.take(p, ONE - p);
        }
        flag
    }

    #[inline(always)]
    fn symbol(&mut self, starts: &Starts, _: usize) -> usize {
        let at = (self.state & (ONE - 1)) as i16;
        // All sixteen are compared at once, without a branch.
        let mut reached = 0i16;
        for start in &starts[..CHOICES] {
            reached -= i16::from(*start > at);
        }
        let symbol = (reached + CHOICES as i16 - 1) as usize & (CHOICES - 1);
        self.take(starts[symbol] as u32, (starts[symbol + 1] - starts[symbol]) as u32);
        symbol
    }

    #[inline]
    fn bits(&mut self, count: u32, _: u32) -> u32 {
        let mut value = 0;
        let mut left = count;
        while left != 0 {
            let taken = left.min(PLAIN_BITS);
            left -= taken;
            let shift = ONE_SHIFT - taken;
            let bits = (self.state & (ONE - 1)) >> shift;
            self.take(bits << shift, 1 << shift);
            value = value << taken | bits;
        }
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Choice {
        Flag(u32, bool),
        Symbol(Starts, usize),
        Bits(u32, u32),
    }

    fn code<C: Coder>(coder: &mut C, choice: &Choice, known: bool) -> u32 {
        let given = |value: u32| if known { value } else { 0 };
        match *choice {
            Choice::Flag(p, flag) => coder.flag(p, known && flag).into(),
            Choice::Symbol(starts, symbol) => coder.symbol(&starts, given(symbol as u32) as usize) as u32,
            Choice::Bits(count, value) => coder.bits(count, given(value)),
        }
    }

    /// Starts of sixteen choices, each with a part at least.
    fn starts() -> impl Strategy<Value = Starts> {
        prop::collection::btree_set(1..ONE as i16, CHOICES - 1).prop_map(|inner| {
            let mut starts = [0; CHOICES + 1];
            for (start, inner) in starts[1..].iter_mut().zip(inner) {
                *start = inner;
            }
            starts[CHOICES] = ONE as i16;
            starts
        })
    }

    fn choice() -> impl Strategy<Value = Choice> {
        prop_oneof![
            (1..ONE, any::<bool>()).prop_map(|(p, flag)| Choice::Flag(p, flag)),
            (starts(), 0..CHOICES).prop_map(|(starts, symbol)| Choice::Symbol(starts, symbol)),
            (0u32..33, any::<u32>()).prop_map(|(count, value)| {
                Choice::Bits(count, value & u32::MAX.checked_shr(32 - count).unwrap_or(0))
            }),
        ]
    }

    proptest! {
        #[test]
        fn decoding_inverts_encoding(choices in prop::collection::vec(choice(), 0..300)) {
            let mut encoder = Encoder::default();
            let coded: Vec<u32> = choices.iter().map(|choice| code(&mut encoder, choice, true)).collect();
            let bytes = encoder.finish();
            let mut decoder = Decoder::new(&bytes);
            for (choice, coded) in choices.iter().zip(coded) {
                prop_assert_eq!(code(&mut decoder, choice, false), coded);
            }
            prop_assert!(decoder.is_at_end());
        }

        #[test]
        fn any_bytes_decode_to_something(bytes in prop::collection::vec(any::<u8>(), 0..100), choices in prop::collection::vec(choice(), 0..100)) {
            let mut decoder = Decoder::new(&bytes);
            for choice in &choices {
                code(&mut decoder, choice, false);
            }
        }
    }
}
