//! Functions without names as bytes: where each starts and ends.
//!
//! A large stripped program has a million of them, and at two 64-bit addresses each they would take
//! more than all that has names. One after the other they need three bytes: neighbours are close and short. Every
//! [`BLOCK_EXTENTS`]th start is kept whole, so that a lookup is a binary search and the reading of one
//! block, in place. All integers are little-endian.
//!
//! ```text
//! block, 12 bytes; ascending by start
//! offset  size  field
//! 0       u64   start of its first function: image address
//! 8       u32   offset of its lengths
//!
//! lengths of a block: one number for each function and each gap between two, in order: the first
//! function's size in bytes, from its end to the start of the second, the second's size, and so on for
//! up to 64 functions; the last block's end with the section. Numbers are unsigned LEB128.
//! ```
//!
//! Lookup of address `x`: the last block with `start <= x`; along its lengths until a function ends
//! behind `x`. The answer is that function's start, if it is not behind `x`.
//!
//! For example functions from 0x1000 to 0x1020 and from 0x1030 to 0x1100:
//! ```text
//! 00 10 00 00 00 00 00 00  00 00 00 00    one block, its lengths at 0
//! 20  10  d0 01                           0x20 bytes of code, 0x10 between, 0xd0 bytes of code
//! ```

use gimli::{EndianSlice, LittleEndian, leb128};

use crate::range::Range;

/// Size of a block in bytes.
pub(crate) const BLOCK_BYTES: usize = 12;
/// Functions in each block but the last.
const BLOCK_EXTENTS: usize = 64;

/// The bytes of a table.
#[derive(Default)]
pub(crate) struct Encoded {
    pub(crate) blocks: Vec<u8>,
    pub(crate) lengths: Vec<u8>,
}

/// Lays out `extents`, disjoint and ascending; those whose lengths would lie beyond 4 GiB are left out.
pub(crate) fn encode(extents: &[Range]) -> Encoded {
    let mut encoded = Encoded::default();
    for block in extents.chunks(BLOCK_EXTENTS) {
        let Ok(offset) = u32::try_from(encoded.lengths.len()) else { break };
        let mut at = block[0].0;
        encoded.blocks.extend(at.to_le_bytes());
        encoded.blocks.extend(offset.to_le_bytes());
        for &(start, end) in block {
            if start != block[0].0 {
                push_number(&mut encoded.lengths, start - at);
            }
            push_number(&mut encoded.lengths, end - start);
            at = end;
        }
    }
    encoded
}

fn push_number(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

/// A table, read in place.
#[derive(Clone, Copy)]
pub(crate) struct ExtentTable<'a> {
    blocks: &'a [[u8; BLOCK_BYTES]],
    lengths: &'a [u8],
}

impl<'a> ExtentTable<'a> {
    /// A table over the bytes of its blocks (a multiple of [`BLOCK_BYTES`], the rest is ignored) and lengths.
    pub(crate) fn new(blocks: &'a [u8], lengths: &'a [u8]) -> Self {
        Self { blocks: blocks.as_chunks().0, lengths }
    }

    /// Whether the blocks ascend, as a lookup needs them to.
    pub(crate) fn is_sorted(&self) -> bool {
        self.blocks.is_sorted_by(|a, b| split(a).0 < split(b).0)
    }

    /// The start of the function that contains `address`.
    pub(crate) fn lookup(&self, address: u64) -> Option<u64> {
        let behind = self.blocks.partition_point(|block| split(block).0 <= address);
        let (mut start, offset) = split(self.blocks[..behind].last()?);
        let mut lengths = EndianSlice::new(self.lengths.get(offset as usize..)?, LittleEndian);
        for _ in 0..BLOCK_EXTENTS {
            let end = start.checked_add(leb128::read::unsigned(&mut lengths).ok()?)?;
            if address < end {
                return (start <= address).then_some(start);
            }
            start = end.checked_add(leb128::read::unsigned(&mut lengths).ok()?)?;
        }
        None
    }
}

/// Start and offset of a block.
fn split(block: &[u8; BLOCK_BYTES]) -> (u64, u32) {
    let [a, b, c, d, e, f, g, h, offset @ ..] = *block;
    (u64::from_le_bytes([a, b, c, d, e, f, g, h]), u32::from_le_bytes(offset))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::range::containing;

    #[test]
    fn worked_example() {
        let encoded = encode(&[(0x1000, 0x1020), (0x1030, 0x1100)]);
        assert_eq!(encoded.blocks, [0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(encoded.lengths, [0x20, 0x10, 0xd0, 1]);
    }

    proptest! {
        #[test]
        fn lookups_are_those_of_the_list(
            first in prop_oneof![0..100_u64, any::<u64>()],
            steps in prop::collection::vec((prop_oneof![0..3_u64, 0..300_u64, any::<u64>()], 1..5000_u64), 0..200)
        ) {
            let mut extents: Vec<Range> = Vec::new();
            let mut at = first;
            for (gap, size) in steps {
                let Some(start) = at.checked_add(gap) else { continue };
                let Some(end) = start.checked_add(size) else { continue };
                extents.push((start, end));
                at = end;
            }
            let encoded = encode(&extents);
            let table = ExtentTable::new(&encoded.blocks, &encoded.lengths);
            prop_assert!(table.is_sorted());
            for &(start, end) in &extents {
                for address in [start.wrapping_sub(1), start, start + (end - start) / 2, end - 1, end] {
                    let expect = containing(&extents, address).map(|extent| extent.0);
                    prop_assert_eq!(table.lookup(address), expect, "{:#x}", address);
                }
            }
        }

        #[test]
        fn any_bytes(
            blocks in prop::collection::vec(any::<u8>(), 0..100),
            lengths in prop::collection::vec(any::<u8>(), 0..300),
            address in any::<u64>()
        ) {
            let table = ExtentTable::new(&blocks, &lengths);
            if let Some(start) = table.lookup(address) {
                prop_assert!(start <= address);
            }
        }
    }
}
