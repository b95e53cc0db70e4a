//! Packing tables into chunks: which bytes go where, without touching a map.
//!
//! A table's pieces (pages, directory segments, dictionary, header) lie in 64 KiB chunks side by side with
//! those of many images, so that a small image costs its bytes and not a map. What is placed or
//! freed changes only the account of free bytes here (`room`); the bytes themselves go to whoever holds the
//! chunks, as writes to single places. No copy of a chunk is kept: on a host with a thousand images it would be as large as
//! what the kernel holds.

mod room;

use std::collections::{BTreeMap, HashMap};

use windlass_schema::Table;
use windlass_schema::maps::{
    CHUNK_BYTES, Chunk, DIRECTORY_SEGMENT_PAGES, DIRECTORY_SEGMENTS, GRANULE_BYTES, ImageHeader, Location,
    MAX_CHUNKS,
};

use crate::backend::PlaceError;
use room::{Extent, Room};

/// Size of the kernel's `struct bpf_array` without its elements, on Linux 6.x.
const ARRAY_MAP_BYTES: u64 = 320;
/// What the kernel charges for the map of maps that holds the chunks, in bytes: `array_map_mem_usage`,
/// `kernel/bpf/arraymap.c`.
pub const OUTER_MAP_BYTES: u64 = ARRAY_MAP_BYTES + 8 * MAX_CHUNKS as u64;
/// What the kernel charges for a chunk's map, in bytes.
pub const CHUNK_MAP_BYTES: u64 = ARRAY_MAP_BYTES + CHUNK_BYTES as u64;
/// What it charges for all chunks that there can be.
pub const MOST_TABLE_BYTES: u64 = OUTER_MAP_BYTES + MAX_CHUNKS as u64 * CHUNK_MAP_BYTES;

/// The chunks of a backend, as far as they are handed out.
pub struct ChunkSpace {
    budget_bytes: u64,
    room: Room,
    placed: HashMap<Location, Box<[Extent]>>,
    /// What was laid where since the last flush, by chunk.
    writes: BTreeMap<u32, Vec<(u32, Vec<u8>)>>,
}

/// Where a table was put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Its image header.
    pub header: Location,
    /// Bytes of chunks that it takes, rounding included.
    pub bytes: u64,
}

/// Changes of one chunk. A chunk that was not written before is empty: all zero.
pub struct ChunkWrite<'a> {
    /// The chunk.
    pub number: u32,
    pieces: &'a [(u32, Vec<u8>)],
}

impl ChunkWrite<'_> {
    /// Makes the changes.
    pub fn apply(&self, chunk: &mut Chunk) {
        for (offset, bytes) in self.pieces {
            chunk.0[*offset as usize..][..bytes.len()].copy_from_slice(bytes);
        }
    }
}

/// A chunk of zeros.
pub fn empty_chunk() -> Box<Chunk> {
    // Made on the heap: 64 KiB are too much for the stack of a thread with a small one.
    let zeroed = vec![0u64; CHUNK_BYTES as usize / 8].into_boxed_slice();
    let start = Box::into_raw(zeroed).cast::<Chunk>();
    // SAFETY: the allocation has CHUNK_BYTES bytes and 8-byte alignment, as `Chunk` has, and any bytes are a `Chunk`.
    unsafe { Box::from_raw(start) }
}

impl ChunkSpace {
    /// Chunks up to a budget in bytes, as the kernel charges them with the map that holds them.
    pub fn new(budget_bytes: u64) -> Self {
        let most_chunks = budget_bytes.saturating_sub(OUTER_MAP_BYTES) / CHUNK_MAP_BYTES;
        let most_chunks = u32::try_from(most_chunks).unwrap_or(u32::MAX).min(MAX_CHUNKS);
        Self { budget_bytes, room: Room::new(most_chunks), placed: HashMap::new(), writes: BTreeMap::new() }
    }

    /// What the kernel charges for the chunks in use and the map that holds them, in bytes.
    pub fn used_bytes(&self) -> u64 {
        OUTER_MAP_BYTES + u64::from(self.chunks()) * CHUNK_MAP_BYTES
    }

    /// What they may take, in bytes.
    pub fn budget_bytes(&self) -> u64 {
        self.budget_bytes
    }

    /// Chunks in use.
    pub fn chunks(&self) -> u32 {
        self.room.chunks()
    }

    /// Puts a table into the chunks, whole or not at all.
    pub fn place(&mut self, table: &Table<'_>) -> Result<Placed, PlaceError> {
        let sizes = piece_sizes(table);
        let wanted_bytes = sizes.iter().map(|bytes| u64::from(*bytes)).sum();
        let taken = self.room.take(&sizes).ok_or(PlaceError::Budget {
            used_bytes: self.used_bytes(),
            budget_bytes: self.budget_bytes,
            wanted_bytes,
        })?;
        let mut places = taken.iter().copied();
        let mut put = |bytes: Vec<u8>| {
            let place =
                places.next().expect("one for each of the pieces, which come in the order of their sizes");
            debug_assert_eq!(place.bytes, rounded(bytes.len() as u32));
            if place.bytes > 0 {
                self.writes.entry(place.chunk).or_default().push((place.offset, bytes));
            }
            Location::from(place)
        };
        let mut header = ImageHeader {
            base: table.base().get(),
            pages: table.page_count(),
            dictionary: put(table.dictionary().to_vec()),
            directory: [Location::NOWHERE; DIRECTORY_SEGMENTS],
        };
        for (pages, segment) in segments(table).zip(&mut header.directory) {
            let locations: Vec<u8> = pages
                .map(|page| table.page(page).map_or(Location::NOWHERE, |bytes| put(bytes.to_vec())))
                .flat_map(|location| location.0.to_le_bytes())
                .collect();
            *segment = put(locations);
        }
        let header = put(header_bytes(&header));
        self.placed.insert(header, merged(taken));
        Ok(Placed { header, bytes: wanted_bytes })
    }

    /// How many of the placed tables `candidates` would have to be freed, from the first on, for `table` to fit;
    /// `None` if all of them do not help.
    pub fn to_free(&self, table: &Table<'_>, candidates: &[Location]) -> Option<usize> {
        let sizes = piece_sizes(table);
        let wanted_bytes: u64 = sizes.iter().map(|bytes| u64::from(*bytes)).sum();
        let mut room = self.room.clone();
        let mut free_bytes = room.free_bytes();
        let mut extents = candidates.iter().map(|header| self.placed.get(header));
        let mut freed = 0;
        loop {
            if free_bytes >= wanted_bytes && room.take(&sizes).is_some() {
                return Some(freed);
            }
            for extent in extents.next()?.into_iter().flatten() {
                room.give_back(*extent);
                free_bytes += u64::from(extent.bytes);
            }
            freed += 1;
        }
    }

    /// Frees what the table with this header takes; the next one placed may overwrite it.
    pub fn free(&mut self, header: Location) {
        for extent in self.placed.remove(&header).into_iter().flatten() {
            self.room.give_back(extent);
        }
    }

    /// Hands what changed since the last call to `write`, chunk by chunk. After an error the rest is not
    /// written and not kept.
    pub fn flush<E>(&mut self, mut write: impl FnMut(ChunkWrite<'_>) -> Result<(), E>) -> Result<(), E> {
        let writes = std::mem::take(&mut self.writes);
        writes.iter().try_for_each(|(number, pieces)| write(ChunkWrite { number: *number, pieces }))
    }
}

fn rounded(bytes: u32) -> u32 {
    bytes.next_multiple_of(GRANULE_BYTES)
}

/// The pages of each directory segment.
fn segments(table: &Table<'_>) -> impl Iterator<Item = std::ops::Range<u32>> {
    let pages = table.page_count();
    (0..pages.div_ceil(DIRECTORY_SEGMENT_PAGES)).map(move |segment| {
        let first = segment * DIRECTORY_SEGMENT_PAGES;
        first..pages.min(first + DIRECTORY_SEGMENT_PAGES)
    })
}

/// Sizes of all pieces of a table in the order in which they are put: dictionary; pages and directory of
/// each segment; header.
fn piece_sizes(table: &Table<'_>) -> Vec<u32> {
    let mut sizes = vec![rounded(table.dictionary().len() as u32)];
    for pages in segments(table) {
        let directory = 4 * pages.len() as u32;
        sizes.extend(pages.filter_map(|page| table.page(page)).map(|bytes| rounded(bytes.len() as u32)));
        sizes.push(rounded(directory));
    }
    sizes.push(rounded(size_of::<ImageHeader>() as u32));
    sizes
}

/// The same bytes in as few extents as they make: a small table is one.
fn merged(mut extents: Vec<Extent>) -> Box<[Extent]> {
    extents.retain(|extent| extent.bytes > 0);
    extents.sort();
    extents.dedup_by(|next, last| {
        let is_behind = (next.chunk, next.offset) == (last.chunk, last.offset + last.bytes);
        if is_behind {
            last.bytes += next.bytes;
        }
        is_behind
    });
    extents.into()
}

/// The header as the program reads it.
fn header_bytes(header: &ImageHeader) -> Vec<u8> {
    let mut bytes = header.base.to_le_bytes().to_vec();
    bytes.extend(header.pages.to_le_bytes());
    bytes.extend(header.dictionary.0.to_le_bytes());
    bytes.extend(header.directory.iter().flat_map(|location| location.0.to_le_bytes()));
    bytes
}
