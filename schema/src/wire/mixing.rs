//! Probabilities: counters that learn, and a mixer that learns whom to believe.
//!
//! A counter holds the share of ones among the bits seen in a context, the first few at once and later ones
//! by less and less. For each bit several contexts have one. Each counter's probability `p` is stretched to
//! `ln(p / (1 - p))`, the stretched ones are added up with weights, and the sum is squashed back; then each
//! weight moves in the direction that would have made the bit more probable. All numbers are integers, so that
//! every machine computes the same ones.

/// Stretched values are in 1/256, from -2047 to 2047.
const STRETCHED_END: i32 = 2047;
/// Parts that a probability has: 1/65536.
const ONE: u32 = 1 << 16;

/// exp(1/256).
const E_TO_A_256TH: f64 = 1.003_913_889_338_347_6;

/// `65536 / (1 + exp(-x / 256))` for x from -2047 to 2047, at index x + 2047, rounded down, 16 to 65520.
const SQUASHED: [u16; 4095] = {
    let mut table = [0; 4095];
    // exp(x / 256) for x >= 0; below 0, the probability is that of the other bit.
    let mut power = 1.0;
    let mut x = 0;
    while x <= STRETCHED_END as usize {
        let p = (65536.0 * power / (1.0 + power)) as u32;
        let p = if p > 65520 { 65520 } else { p };
        table[2047 + x] = p as u16;
        table[2047 - x] = (ONE - p) as u16;
        power *= E_TO_A_256TH;
        x += 1;
    }
    table
};

/// The least x with a `SQUASHED` of at least p, by p / 16.
const STRETCHED: [i16; 4096] = {
    let mut table = [0; 4096];
    let mut x = 0;
    let mut p = 0;
    while p < 4096 {
        while x < 4094 && (SQUASHED[x] as usize) < 16 * p {
            x += 1;
        }
        table[p] = x as i16 - STRETCHED_END as i16;
        p += 1;
    }
    table
};

/// Probability of a one in the upper 22 bits, bits seen in the lower 10.
#[derive(Clone, Copy)]
pub(super) struct Counter(u32);

/// Bits after which a counter forgets as fast as it learns.
const LIMIT: u32 = 64;

/// How far a counter moves towards its n-th bit: 65536 / (n + 1.6).
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

    /// Probability in 1/65536, 16 to 65520.
    pub(super) fn p(self) -> u32 {
        (self.0 >> 16).clamp(16, 65520)
    }

    pub(super) fn seen(self) -> u32 {
        self.0 & 0x3ff
    }

    pub(super) fn update(&mut self, bit: bool) {
        let (p, seen) = (self.0 >> 10, self.seen());
        let step = STEPS[seen as usize];
        let p = if bit {
            p + (u64::from((1 << 22) - 1 - p) * u64::from(step) >> 16) as u32
        } else {
            p - (u64::from(p) * u64::from(step) >> 16) as u32
        };
        self.0 = p << 10 | (seen + 1).min(LIMIT);
    }

    /// Stretched probability, less of it for a counter that has seen little.
    fn input(self) -> i32 {
        const TRUST: [i32; 4] = [0, 10, 13, 16];
        i32::from(STRETCHED[(self.0 >> 20) as usize]) * TRUST[self.seen().min(3) as usize] >> 4
    }
}

/// Weights in 1/65536, for each class of bits its own.
pub(super) struct Mixer<const N: usize> {
    weights: Vec<[i32; N]>,
}

/// What a weight starts with: a third.
const FIRST_WEIGHT: i32 = 22_938;
/// Weights stay below this: 32.
const WEIGHT_END: i32 = 1 << 21;

impl<const N: usize> Mixer<N> {
    pub(super) fn new(classes: usize) -> Self {
        Self { weights: vec![[FIRST_WEIGHT; N]; classes] }
    }

    /// Codes a bit by what the counters say of it, and lets all of them learn from it.
    #[inline]
    pub(super) fn bit<C: super::coder::Coder>(
        &mut self,
        coder: &mut C,
        counters: [&mut Counter; N],
        bit: bool,
    ) -> bool {
        let inputs: [i32; N] = core::array::from_fn(|at| counters[at].input());
        // How much the two most particular contexts have seen, which is how much they are worth.
        let grade = |at: usize| match counters[at].seen() {
            0 => 0,
            1..4 => 1,
            _ => 2,
        };
        let weights = &mut self.weights[3 * grade(N - 2) + grade(N - 1)];
        let sum: i64 = inputs.iter().zip(&*weights).map(|(x, w)| i64::from(*x) * i64::from(*w)).sum();
        let x = (sum >> 16).clamp(-i64::from(STRETCHED_END), i64::from(STRETCHED_END)) as i32;
        let p = u32::from(SQUASHED[(x + STRETCHED_END) as usize]);
        let bit = coder.bit(p, bit);
        let error = if bit { (ONE - 1 - p) as i32 } else { -(p as i32) };
        for (weight, x) in weights.iter_mut().zip(inputs) {
            *weight = (*weight + (x * error >> 14)).clamp(-WEIGHT_END, WEIGHT_END);
        }
        for counter in counters {
            counter.update(bit);
        }
        bit
    }
}
