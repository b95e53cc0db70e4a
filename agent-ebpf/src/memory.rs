//! What a walk reads from.

use windlass_schema::maps::{Chunk, MappingSegment, SegmentKey};
use windlass_schema::{ProcessAddress, Record, StopReason};

/// The memory of the thread being walked.
pub trait StackMemory {
    /// The `8 * N` bytes at `address`, as little-endian words. One read: in the kernel 16 bytes
    /// take a fifth longer than 8.
    fn words<const N: usize>(&self, address: u64) -> Option<[u64; N]>;

    /// The same where a frame of so many bytes saved registers and its return address, which its callers did a little
    /// further up.
    #[inline(always)]
    fn frame_words<const N: usize>(&self, address: u64, _frame_bytes: u64) -> Option<[u64; N]> {
        self.words(address)
    }

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

    /// The record that was [remembered](Self::remember) for a lookup address in mappings of this generation, if it still
    /// is.
    #[inline(always)]
    fn remembered(&self, _generation: u32, _address: ProcessAddress) -> Option<Record> {
        None
    }

    /// Takes note of the record of a lookup address.
    #[inline(always)]
    fn remember(&self, _generation: u32, _address: ProcessAddress, _record: Record) {}
}
