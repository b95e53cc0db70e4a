//! Which of eight bytes of code are a certain one? All asked at once.
//!
//! The verifier goes through a loop over bytes once for each, and along both sides of each branch in it. Sums and masks over a word
//! are a line to it.

/// All bits of each byte but the highest.
const LOW_BITS: u64 = each(0x7f);

/// Eight times the byte.
pub(super) const fn each(byte: u64) -> u64 {
    byte * 0x0101_0101_0101_0101
}

/// The highest bit of each byte that is the same in both.
#[inline(always)]
pub(super) const fn same(one: u64, other: u64) -> u64 {
    let differs = one ^ other;
    !((differs & LOW_BITS).wrapping_add(LOW_BITS) | differs | LOW_BITS)
}

/// The highest bit of each of `bytes` that is this one.
#[inline(always)]
pub(super) const fn is(bytes: u64, byte: u64) -> u64 {
    same(bytes, each(byte))
}

/// All bits of the first `count` bytes, which may be more than there are.
#[inline(always)]
pub(super) const fn first(count: u64) -> u64 {
    if count < 8 { (1 << (8 * count)) - 1 } else { u64::MAX }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn each_byte_is_asked_on_its_own(word in any::<u64>(), byte in any::<u8>(), at in 0usize..8, count in 0u64..12) {
            let mut bytes = word.to_le_bytes();
            bytes[at] = byte;
            let expect = bytes.map(|other| if other == byte { 0x80 } else { 0 });
            prop_assert_eq!(is(u64::from_le_bytes(bytes), byte.into()).to_le_bytes(), expect);
            let masks: [u8; 8] = std::array::from_fn(|at| if (at as u64) < count { 0xff } else { 0 });
            prop_assert_eq!(first(count).to_le_bytes(), masks);
        }
    }
}
