//! A place in bytes: the integers of DWARF, each checked against the end.

/// Reads forward. Every method gives `None` at the end of the bytes, or for a number that 64 bits do not hold.
#[derive(Clone, Copy)]
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    /// At `at` in `bytes`.
    pub(crate) const fn new(bytes: &'a [u8], at: usize) -> Self {
        Self { bytes, at }
    }

    /// Offset of the next byte.
    pub(crate) const fn position(&self) -> usize {
        self.at
    }

    /// Whether nothing is left.
    pub(crate) const fn is_at_end(&self) -> bool {
        self.at >= self.bytes.len()
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let array = *self.bytes.get(self.at..)?.first_chunk()?;
        self.at += N;
        Some(array)
    }

    /// The next `len` bytes.
    pub(crate) fn take(&mut self, len: u64) -> Option<&'a [u8]> {
        let end = self.at.checked_add(usize::try_from(len).ok()?)?;
        let taken = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(taken)
    }

    /// What is left.
    pub(crate) fn rest(&self) -> &'a [u8] {
        self.bytes.get(self.at..).unwrap_or_default()
    }

    pub(crate) fn u8(&mut self) -> Option<u8> {
        let byte = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// DWARF 5, 7.6.
    pub(crate) fn uleb128(&mut self) -> Option<u64> {
        let first = self.u8()?;
        if first < 0x80 {
            return Some(first.into());
        }
        let mut value = u64::from(first & 0x7f);
        let mut shift = 7;
        loop {
            let byte = self.u8()?;
            let bits = u64::from(byte & 0x7f);
            // The tenth byte has room for one bit.
            if shift == 63 && byte > 1 {
                return None;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
            shift += 7;
        }
    }

    /// DWARF 5, 7.6.
    pub(crate) fn sleb128(&mut self) -> Option<i64> {
        let mut value = 0u64;
        let mut shift = 0;
        loop {
            let byte = self.u8()?;
            if shift == 63 && byte != 0 && byte != 0x7f {
                return None;
            }
            value |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                if shift < 64 && byte & 0x40 != 0 {
                    value |= u64::MAX << shift;
                }
                return Some(value as i64);
            }
        }
    }

    /// The bytes up to a zero, which is read too.
    pub(crate) fn string(&mut self) -> Option<&'a [u8]> {
        let len = self.rest().iter().position(|byte| *byte == 0)?;
        let string = self.take(len as u64)?;
        self.at += 1;
        Some(string)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gimli::{EndianSlice, LittleEndian, Reader as _};
    use proptest::prelude::*;

    proptest! {
        /// The same numbers as gimli's, or none where it has none.
        #[test]
        fn leb128_is_gimlis(bytes in prop::collection::vec(prop_oneof![any::<u8>(), Just(0x80u8), Just(0xffu8)], 0..14)) {
            let mut peer = EndianSlice::new(&bytes, LittleEndian);
            prop_assert_eq!(Cursor::new(&bytes, 0).uleb128(), peer.read_uleb128().ok());
            let mut peer = EndianSlice::new(&bytes, LittleEndian);
            prop_assert_eq!(Cursor::new(&bytes, 0).sleb128(), peer.read_sleb128().ok());
        }
    }

    #[test]
    fn nothing_is_read_past_the_end() {
        let mut cursor = Cursor::new(&[1, 2, 3], 0);
        assert_eq!(
            (cursor.u32(), cursor.u16(), cursor.u16(), cursor.u8()),
            (None, Some(0x201), None, Some(3))
        );
        assert_eq!((cursor.take(u64::MAX), cursor.string(), cursor.is_at_end()), (None, None, true));
    }
}
