//! The kernel's maps that hold the chunks.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use aya::maps::{Array, ArrayOfMaps, Map, MapData, MapError, MapType};
use windlass_schema::maps::{CHUNK_BYTES, Chunk, names};

use super::{LoadError, describe, load_object};

/// The outer map, and those chunk maps that may be written again. The outer map holds a reference to
/// each chunk's map, so no descriptor is needed to keep one alive.
pub struct ChunkMaps {
    outer: Map,
    /// Each a map of a single value: charged when it is needed and not before.
    writable: HashMap<u32, Map>,
    chunk_memlock_bytes: u64,
}

impl ChunkMaps {
    /// Empty chunk maps of their own, made as the program's are.
    pub fn create() -> Result<Self, LoadError> {
        let mut bpf = load_object()?;
        let map = bpf
            .take_map(names::CHUNKS)
            .ok_or_else(|| LoadError::Refused(format!("the object has no map {}", names::CHUNKS)))?;
        Self::from_map(map)
    }

    pub(super) fn from_map(mut outer: Map) -> Result<Self, LoadError> {
        outer_of(&mut outer).map_err(|error| LoadError::Refused(describe(&error)))?;
        Ok(Self { outer, writable: HashMap::new(), chunk_memlock_bytes: 0 })
    }

    /// Replaces the content of a chunk, making its map at the first write; `last` if no other
    /// write of it will follow.
    pub fn write(&mut self, number: u32, chunk: &Chunk, last: bool) -> Result<(), MapError> {
        let mut map = match self.writable.remove(&number) {
            Some(map) => map,
            None => self.create_chunk(number)?,
        };
        let content: &[u8; CHUNK_BYTES as usize] = &chunk.0;
        Array::<&mut MapData, [u8; CHUNK_BYTES as usize]>::try_from(&mut map)?.set(0, content, 0)?;
        if !last {
            self.writable.insert(number, map);
        }
        Ok(())
    }

    fn create_chunk(&mut self, number: u32) -> Result<Map, MapError> {
        let shape = aya_obj::Map::new_from_params(MapType::Array as u32, 4, CHUNK_BYTES, 1, 0);
        let data = MapData::create(shape, "windlass_chunk", None)?;
        outer_of(&mut self.outer)?.set(number, &data, 0)?;
        // Never a reason to fail: the figure is for reports.
        self.chunk_memlock_bytes += memlock_bytes(data.fd().as_fd()).unwrap_or(u64::from(CHUNK_BYTES));
        Ok(Map::Array(data))
    }

    /// What the kernel charges for all of these maps together.
    pub fn memlock_bytes(&self) -> std::io::Result<u64> {
        let Map::ArrayOfMaps(data) = &self.outer else {
            return Err(std::io::Error::other("the chunk map is no array of maps"));
        };
        Ok(memlock_bytes(data.fd().as_fd())? + self.chunk_memlock_bytes)
    }
}

fn outer_of(map: &mut Map) -> Result<ArrayOfMaps<&mut MapData, MapData>, MapError> {
    ArrayOfMaps::try_from(map)
}

/// The `memlock` line of a map's fdinfo: the bytes that the kernel charges for it.
fn memlock_bytes(map: BorrowedFd<'_>) -> std::io::Result<u64> {
    let path = format!("/proc/self/fdinfo/{}", map.as_raw_fd());
    let text = std::fs::read_to_string(path)?;
    text.lines()
        .find_map(|line| line.strip_prefix("memlock:")?.trim().parse().ok())
        .ok_or_else(|| std::io::Error::other("fdinfo of a BPF map has no memlock line"))
}
