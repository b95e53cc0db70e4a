//! The arithmetic coder: bits and their probabilities to bytes, and back.
//!
//! `low` and `high` bound the numbers that the bytes so far may begin, 32 bits at a time. A bit of
//! probability `p / 65536` takes the lower part of the range, `low..=middle`; top bytes on which both
//! ends agree are written. The decoder keeps the same range, and the 32 bits of the input that it is at.

/// What is common to both directions: to a model, encoding and decoding are one walk.
pub(super) trait Coder {
    /// Codes one bit that is set with probability `p` / 65536, 1 to 65535. A decoder ignores `bit` and
    /// gives the one that was encoded.
    fn bit(&mut self, p: u32, bit: bool) -> bool;
}

const TOP_BYTE: u32 = 0xff00_0000;

fn middle(low: u32, high: u32, p: u32) -> u32 {
    low + (u64::from(high - low) * u64::from(p) >> 16) as u32
}

/// Bits to bytes.
pub(super) struct Encoder {
    low: u32,
    high: u32,
    bytes: Vec<u8>,
}

impl Encoder {
    /// Appends to `bytes`.
    pub(super) fn new(bytes: Vec<u8>) -> Self {
        Self { low: 0, high: u32::MAX, bytes }
    }

    /// The bytes. The last ones are the fewest that, with zeros behind them, lie in the range.
    pub(super) fn finish(mut self) -> Vec<u8> {
        let kept = |bytes: u32| self.high & u32::MAX.checked_shl(32 - 8 * bytes).unwrap_or(0);
        let bytes = (0..=4).find(|bytes| kept(*bytes) >= self.low).unwrap_or(4);
        self.bytes.extend(&kept(bytes).to_be_bytes()[..bytes as usize]);
        while self.bytes.last() == Some(&0) {
            self.bytes.pop();
        }
        self.bytes
    }
}

impl Coder for Encoder {
    #[inline]
    fn bit(&mut self, p: u32, bit: bool) -> bool {
        let middle = middle(self.low, self.high, p);
        if bit {
            self.high = middle;
        } else {
            self.low = middle + 1;
        }
        while (self.low ^ self.high) & TOP_BYTE == 0 {
            self.bytes.push((self.high >> 24) as u8);
            self.low <<= 8;
            self.high = self.high << 8 | 0xff;
        }
        bit
    }
}

/// Bytes to bits. Behind the end there are zeros without end.
pub(super) struct Decoder<'a> {
    low: u32,
    high: u32,
    at: u32,
    rest: &'a [u8],
    /// Zeros read behind the end.
    pub(super) missing: usize,
}

impl<'a> Decoder<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        let mut decoder = Self { low: 0, high: u32::MAX, at: 0, rest: bytes, missing: 0 };
        for _ in 0..4 {
            decoder.at = decoder.at << 8 | decoder.next();
        }
        decoder
    }

    fn next(&mut self) -> u32 {
        match self.rest.split_first() {
            Some((byte, rest)) => {
                self.rest = rest;
                u32::from(*byte)
            }
            None => {
                self.missing += 1;
                0
            }
        }
    }
}

impl Coder for Decoder<'_> {
    #[inline]
    fn bit(&mut self, p: u32, _: bool) -> bool {
        let middle = middle(self.low, self.high, p);
        let bit = self.at <= middle;
        if bit {
            self.high = middle;
        } else {
            self.low = middle + 1;
        }
        while (self.low ^ self.high) & TOP_BYTE == 0 {
            self.low <<= 8;
            self.high = self.high << 8 | 0xff;
            self.at = self.at << 8 | self.next();
        }
        bit
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn decoding_inverts_encoding(bits in prop::collection::vec((1u32..65536, any::<bool>()), 0..2000)) {
            let mut encoder = Encoder::new(Vec::new());
            for (p, bit) in &bits {
                encoder.bit(*p, *bit);
            }
            let bytes = encoder.finish();
            let mut decoder = Decoder::new(&bytes);
            for (p, bit) in &bits {
                prop_assert_eq!(decoder.bit(*p, false), *bit);
            }
            prop_assert!(decoder.rest.is_empty());
        }
    }
}
