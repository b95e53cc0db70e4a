//! What a walk reads from.

use windlass_schema::StopReason;
use windlass_schema::maps::{Chunk, MappingSegment, SegmentKey};

/// The memory of the thread being walked.
pub trait StackMemory {
    /// The `8 * N` bytes at `address`, as little-endian words. One read: in the kernel it costs the same for 8
    /// bytes and for 16.
    fn words<const N: usize>(&self, address: u64) -> Option<[u64; N]>;

    /// The 8 bytes at `address`.
    #[inline(always)]
    fn word(&self, address: u64) -> Option<u64> {
        self.words::<1>(address).map(|[word]| word)
    }

    /// The stop reason when [`words`](Self::words) has nothing at `address`.
    fn unreadable(&self, address: u64) -> StopReason;
}

/// Where mappings and unwind tables lie.
pub trait Tables {
    /// The chunk with this number.
    fn chunk(&self, number: u32) -> Option<&Chunk>;

    /// A segment of a process's mappings.
    fn segment(&self, key: SegmentKey) -> Option<&MappingSegment>;
}
