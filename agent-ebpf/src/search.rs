//! From an address to the record that tells how to leave its frame.
//!
//! ```text
//! process address -> segment -> mapping -> image header -> directory -> page -> record
//!                    8 starts   7 probes                               8 probes
//! ```
//! Probes stay inside one map value each and compare by the sign of a difference: the BPF verifier
//! follows both sides of every branch, so a loop without branches is verified in a line. What is greater is taken off;
//! to add what is not would be the same, and a branch: BPF has no instruction for what LLVM makes of that.

use core::hint::black_box;

use windlass_schema::maps::{
    ChunkPage, DIRECTORY_SEGMENT_PAGES, DIRECTORY_SEGMENT_SHIFT, DIRECTORY_SEGMENTS, ImageHeader, Location,
    MappingSegment, ProcessEntry, SEGMENT_SLOTS,
};
use windlass_schema::page::{PAGE_SHIFT, search};
use windlass_schema::{ImageAddress, Record, StopReason};

use crate::memory::Tables;

/// 1 if `a < b`, else 0, for values below 2^63.
#[inline(always)]
const fn below(a: u64, b: u64) -> u64 {
    a.wrapping_sub(b) >> 63
}

/// The number of the segment that would hold `address`, if the process has one.
#[inline(always)]
pub fn segment_of(process: &ProcessEntry, address: u64) -> Option<u32> {
    let mut after = process.first.len() as u64;
    for first in &process.first {
        after -= below(address, *first);
    }
    if after == 0 { None } else { Some(after as u32 - 1) }
}

/// The slot of the last mapping that starts at or before `address`.
#[inline(always)]
pub fn slot_of(segment: &MappingSegment, address: u64) -> Option<usize> {
    // All bits are set, and each probe clears its own or leaves it. The compiler would leave out the mask; but the verifier of
    // Linux 6.1 knows nothing of what `|` and `^` make of two values that it does not know.
    let mask = black_box(SEGMENT_SLOTS - 1);
    let mut after = SEGMENT_SLOTS - 1;
    let mut shift = SEGMENT_SLOTS.ilog2();
    while shift != 0 {
        shift -= 1;
        let start = segment.starts[(after ^ 1 << shift) & mask & (SEGMENT_SLOTS - 1)];
        after ^= (below(address, start) as usize) << shift;
    }
    if after == 0 { None } else { Some((after - 1) & mask & (SEGMENT_SLOTS - 1)) }
}

/// Reads the header of the image at `location`.
#[inline(always)]
pub fn image_header<T: Tables>(tables: &T, location: Location) -> Option<ImageHeader> {
    let chunk = tables.chunk(location.chunk())?;
    let at = location.offset();
    let counts = chunk.double(at + 8);
    let mut directory = [Location::NOWHERE; DIRECTORY_SEGMENTS];
    for (index, segment) in directory.iter_mut().enumerate() {
        *segment = Location(chunk.word(at + 16 + 4 * index as u32));
    }
    Some(ImageHeader {
        base: chunk.double(at),
        pages: counts as u32,
        dictionary: Location((counts >> 32) as u32),
        directory,
    })
}

/// The plain record that holds at `address` of the image with this header.
#[inline(always)]
pub fn record_at<T: Tables>(
    tables: &T,
    image: &ImageHeader,
    address: ImageAddress,
) -> Result<Record, StopReason> {
    let offset = address.get().wrapping_sub(image.base);
    let number = offset >> PAGE_SHIFT;
    if number >= u64::from(image.pages) {
        return Ok(Record::NO_CFI);
    }
    let number = number as u32;
    let segment = image.directory[(number >> DIRECTORY_SEGMENT_SHIFT) as usize & (DIRECTORY_SEGMENTS - 1)];
    let entry_at = segment.offset() + 4 * (number & (DIRECTORY_SEGMENT_PAGES - 1));
    let page = Location(tables.chunk(segment.chunk()).ok_or(StopReason::TableCorrupt)?.word(entry_at));
    if page == Location::NOWHERE {
        return Ok(Record::NO_CFI);
    }
    let chunk = tables.chunk(page.chunk()).ok_or(StopReason::TableCorrupt)?;
    let Some(hit) = search(&ChunkPage { chunk, offset: page.offset() }, offset as u32 & 0xffff) else {
        return Ok(Record::NO_CFI);
    };
    let dictionary = tables.chunk(image.dictionary.chunk()).ok_or(StopReason::TableCorrupt)?;
    Ok(Record(dictionary.double(image.dictionary.offset() + 8 * hit.record)).at(hit.distance))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use windlass_schema::maps::{Mapping, PROCESS_SEGMENTS, SEGMENT_MAPPINGS, UNUSED_START};

    use super::*;

    proptest! {
        #[test]
        fn slot_is_that_of_a_linear_search(
            starts in prop::collection::btree_set(0u64..1 << 47, 0..=SEGMENT_MAPPINGS),
            address in 0u64..1 << 48,
            near in any::<prop::sample::Index>(),
            delta in -1i64..=1,
        ) {
            let mut segment =
                MappingSegment { starts: [UNUSED_START; SEGMENT_SLOTS], mappings: [Mapping::default(); SEGMENT_SLOTS] };
            for (slot, start) in starts.iter().enumerate() {
                segment.starts[slot] = *start;
            }
            let mut addresses = [address; 2];
            if !starts.is_empty() {
                addresses[1] = starts.iter().nth(near.index(starts.len())).unwrap().saturating_add_signed(delta);
            }
            for address in addresses {
                let linear = starts.iter().filter(|start| **start <= address).count().checked_sub(1);
                prop_assert_eq!(slot_of(&segment, address), linear);
            }
        }

        #[test]
        fn segment_is_that_of_a_linear_search(
            starts in prop::collection::btree_set(0u64..1 << 47, 0..=PROCESS_SEGMENTS),
            address in 0u64..1 << 48,
        ) {
            let mut process = ProcessEntry { generation: 0, segments: 0, first: [UNUSED_START; PROCESS_SEGMENTS] };
            for (slot, start) in starts.iter().enumerate() {
                process.first[slot] = *start;
            }
            let linear = starts.iter().filter(|start| **start <= address).count().checked_sub(1);
            prop_assert_eq!(segment_of(&process, address).map(|segment| segment as usize), linear);
        }
    }
}
