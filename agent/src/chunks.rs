//! Packing tables into chunks: which bytes go where, without touching a map.
//!
//! A table's pieces (pages, directory segments, dictionary, header) are laid one behind the other
//! into 64 KiB chunks, those of many images side by side, so that a small image costs its bytes and not
//! a map. A map value can only be written whole, so the chunks that still have room keep a shadow
//! here; a full one is written a last time and forgotten. At most four are open: what is
//! left at the end of the others is lost, 0.3% on a whole machine's images.

use windlass_schema::Table;
use windlass_schema::maps::{
    CHUNK_BYTES, Chunk, DIRECTORY_SEGMENT_PAGES, DIRECTORY_SEGMENTS, GRANULE_BYTES, ImageHeader, Location,
};

use crate::backend::PlaceError;

/// Most chunks that have room left, and so 256 KiB of shadows.
const OPEN_CHUNKS: usize = 4;

/// A chunk that is still being filled.
struct OpenChunk {
    number: u32,
    used: u32,
    changed: bool,
    shadow: Box<Chunk>,
}

/// The chunks of a backend, as far as they are handed out.
pub struct ChunkSpace {
    budget_chunks: u32,
    next: u32,
    open: Vec<OpenChunk>,
    full: Vec<(u32, Box<Chunk>)>,
}

/// Where a table was put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Its image header.
    pub header: Location,
    /// Bytes of chunks that it takes, rounding included.
    pub bytes: u64,
}

fn empty_chunk() -> Box<Chunk> {
    // Made on the heap: 64 KiB are too much for the stack of a thread with a small one.
    let zeroed = vec![0u64; CHUNK_BYTES as usize / 8].into_boxed_slice();
    let start = Box::into_raw(zeroed).cast::<Chunk>();
    // SAFETY: the allocation has CHUNK_BYTES bytes and 8-byte alignment, as `Chunk` has, and any bytes are a `Chunk`.
    unsafe { Box::from_raw(start) }
}

impl ChunkSpace {
    /// Chunks up to a budget in bytes.
    pub fn new(budget_bytes: u64) -> Self {
        let budget_chunks = u32::try_from(budget_bytes / u64::from(CHUNK_BYTES)).unwrap_or(u32::MAX);
        Self {
            budget_chunks: budget_chunks.min(windlass_schema::maps::MAX_CHUNKS),
            next: 0,
            open: Vec::new(),
            full: Vec::new(),
        }
    }

    /// Bytes of the chunks in use.
    pub fn used_bytes(&self) -> u64 {
        u64::from(self.next) * u64::from(CHUNK_BYTES)
    }

    /// Puts a table into the chunks, whole or not at all.
    pub fn place(&mut self, table: &Table<'_>) -> Result<Placed, PlaceError> {
        let wanted_bytes: u64 = piece_sizes(table).map(|bytes| u64::from(rounded(bytes))).sum();
        // Every chunk but the open ones could lose up to a piece at its end: ask for room with that lost.
        let largest = piece_sizes(table).map(rounded).max().unwrap_or(0);
        let usable = u64::from(CHUNK_BYTES - largest.min(CHUNK_BYTES / 2));
        let more = wanted_bytes.div_ceil(usable);
        let free = u64::from(self.budget_chunks - self.next);
        let fits_open = self.open.iter().any(|chunk| u64::from(CHUNK_BYTES - chunk.used) >= wanted_bytes);
        if more > free && !fits_open {
            return Err(PlaceError::Budget {
                used_bytes: self.used_bytes(),
                budget_bytes: u64::from(self.budget_chunks) * u64::from(CHUNK_BYTES),
                wanted_bytes,
            });
        }
        let mut header = ImageHeader {
            base: table.base().get(),
            pages: table.page_count(),
            dictionary: self.put(table.dictionary()),
            directory: [Location::NOWHERE; DIRECTORY_SEGMENTS],
        };
        for (index, segment) in header.directory.iter_mut().enumerate() {
            let first = index as u32 * DIRECTORY_SEGMENT_PAGES;
            let end = table.page_count().min(first + DIRECTORY_SEGMENT_PAGES);
            if first >= end {
                break;
            }
            let locations: Vec<u8> = (first..end)
                .map(|page| table.page(page).map_or(Location::NOWHERE, |bytes| self.put(bytes)))
                .flat_map(|location| location.0.to_le_bytes())
                .collect();
            *segment = self.put(&locations);
        }
        Ok(Placed { header: self.put(&header_bytes(&header)), bytes: wanted_bytes })
    }

    /// Hands every chunk changed since the last call to `write`: its number, its content, and whether
    /// this was its last change.
    pub fn flush<E>(&mut self, mut write: impl FnMut(u32, &Chunk, bool) -> Result<(), E>) -> Result<(), E> {
        while let Some((number, shadow)) = self.full.last() {
            write(*number, shadow, true)?;
            self.full.pop();
        }
        for chunk in self.open.iter_mut().filter(|chunk| chunk.changed) {
            write(chunk.number, &chunk.shadow, false)?;
            chunk.changed = false;
        }
        Ok(())
    }

    /// Lays `bytes` into the fullest open chunk that has room, or a new one.
    fn put(&mut self, bytes: &[u8]) -> Location {
        let size = rounded(bytes.len() as u32);
        let best = (0..self.open.len())
            .filter(|index| self.open[*index].used + size <= CHUNK_BYTES)
            .max_by_key(|index| self.open[*index].used);
        let index = best.unwrap_or_else(|| self.open_chunk());
        let chunk = &mut self.open[index];
        let at = chunk.used as usize;
        chunk.shadow.0[at..at + bytes.len()].copy_from_slice(bytes);
        chunk.used += size;
        chunk.changed = true;
        Location::new(chunk.number, at as u32)
    }

    /// Opens a chunk, closing the fullest if too many are open.
    fn open_chunk(&mut self) -> usize {
        if self.open.len() == OPEN_CHUNKS {
            let fullest = (0..OPEN_CHUNKS).max_by_key(|index| self.open[*index].used).unwrap_or(0);
            let chunk = self.open.swap_remove(fullest);
            self.full.push((chunk.number, chunk.shadow));
        }
        // Location 0 means nowhere, so the first granule of chunk 0 stays empty.
        let used = if self.next == 0 { GRANULE_BYTES } else { 0 };
        self.open.push(OpenChunk { number: self.next, used, changed: true, shadow: empty_chunk() });
        self.next += 1;
        self.open.len() - 1
    }
}

fn rounded(bytes: u32) -> u32 {
    bytes.next_multiple_of(GRANULE_BYTES)
}

/// Sizes of all pieces of a table.
fn piece_sizes(table: &Table<'_>) -> impl Iterator<Item = u32> {
    let pages = table.page_count();
    let directory = (0..pages.div_ceil(DIRECTORY_SEGMENT_PAGES))
        .map(move |segment| 4 * (pages - segment * DIRECTORY_SEGMENT_PAGES).min(DIRECTORY_SEGMENT_PAGES));
    let bodies = (0..pages).filter_map(|page| table.page(page)).map(|bytes| bytes.len() as u32);
    [table.dictionary().len() as u32, size_of::<ImageHeader>() as u32]
        .into_iter()
        .chain(directory)
        .chain(bodies)
}

/// The header as the program reads it.
fn header_bytes(header: &ImageHeader) -> Vec<u8> {
    let mut bytes = header.base.to_le_bytes().to_vec();
    bytes.extend(header.pages.to_le_bytes());
    bytes.extend(header.dictionary.0.to_le_bytes());
    bytes.extend(header.directory.iter().flat_map(|location| location.0.to_le_bytes()));
    bytes
}
