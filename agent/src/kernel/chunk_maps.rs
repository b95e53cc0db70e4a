//! The kernel's maps that hold the chunks.
//!
//! Each system call that puts maps into a map of maps waits for a grace period of RCU, 7 to 20 ms here, so that no
//! running program still sees what was there (`maybe_wait_bpf_programs`, `kernel/bpf/syscall.c`). So the maps of all new
//! chunks are filled first and then put in by one call: a table of a million rows waits once and not twenty times.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use aya::maps::{Array, ArrayOfMaps, Map, MapData, MapError, MapType};
use aya_obj::generated::{bpf_attr, bpf_cmd};
use windlass_schema::maps::{CHUNK_BYTES, Chunk, names};

use super::{LoadError, describe, load_object};
use crate::chunks::ChunkSpace;

/// The outer map, and those chunk maps that may be written again. The outer map holds a reference to
/// each chunk's map, so no descriptor is needed to keep one alive.
pub struct ChunkMaps {
    outer: Map,
    /// Each a map of a single value: charged when it is needed and not before.
    writable: HashMap<u32, Map>,
    /// Filled, and not yet in the outer map.
    fresh: Vec<FreshChunk>,
    chunk_memlock_bytes: u64,
}

/// A chunk's map that the outer map does not hold yet.
struct FreshChunk {
    number: u32,
    map: Map,
    /// Whether its content will not change any more.
    last: bool,
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
        Ok(Self { outer, writable: HashMap::new(), fresh: Vec::new(), chunk_memlock_bytes: 0 })
    }

    /// Brings the kernel's chunks to what `space` holds.
    pub fn flush(&mut self, space: &mut ChunkSpace) -> Result<(), MapError> {
        space.flush(|number, chunk, last| self.write(number, chunk, last))?;
        self.publish()
    }

    /// Replaces the content of a chunk, making its map at the first write; `last` if no other
    /// write of it will follow.
    fn write(&mut self, number: u32, chunk: &Chunk, last: bool) -> Result<(), MapError> {
        let content: &[u8; CHUNK_BYTES as usize] = &chunk.0;
        let put = |map: &mut Map| {
            Array::<&mut MapData, [u8; CHUNK_BYTES as usize]>::try_from(map)?.set(0, content, 0)
        };
        if let Some(fresh) = self.fresh.iter_mut().find(|fresh| fresh.number == number) {
            fresh.last = last;
            return put(&mut fresh.map);
        }
        if let Some(map) = self.writable.get_mut(&number) {
            put(map)?;
            if last {
                self.writable.remove(&number);
            }
            return Ok(());
        }
        let shape = aya_obj::Map::new_from_params(MapType::Array as u32, 4, CHUNK_BYTES, 1, 0);
        let mut map = Map::Array(MapData::create(shape, "windlass_chunk", None)?);
        put(&mut map)?;
        self.fresh.push(FreshChunk { number, map, last });
        Ok(())
    }

    /// Puts the fresh chunks into the outer map.
    fn publish(&mut self) -> Result<(), MapError> {
        if self.fresh.is_empty() {
            return Ok(());
        }
        if let Err(error) = self.put_in_one_call() {
            // Linux before 5.15 has no such call for maps of maps.
            tracing::debug!(%error, chunks = self.fresh.len(), "chunks are put in one by one");
            for fresh in &self.fresh {
                outer_of(&mut self.outer)?.set(fresh.number, data_of(&fresh.map)?, 0)?;
            }
        }
        for fresh in self.fresh.drain(..) {
            // Never a reason to fail: the figure is for reports.
            let charged = data_of(&fresh.map).ok().and_then(|data| memlock_bytes(data.fd().as_fd()).ok());
            self.chunk_memlock_bytes += charged.unwrap_or(u64::from(CHUNK_BYTES));
            if !fresh.last {
                self.writable.insert(fresh.number, fresh.map);
            }
        }
        Ok(())
    }

    /// `BPF_MAP_UPDATE_BATCH` (bpf(2)), which the library that loads our program does not offer.
    fn put_in_one_call(&self) -> io::Result<()> {
        let outer = outer_data(&self.outer)?;
        let keys: Vec<u32> = self.fresh.iter().map(|fresh| fresh.number).collect();
        let descriptors = self.fresh.iter().map(|fresh| {
            let data = data_of(&fresh.map).map_err(io::Error::other)?;
            Ok(data.fd().as_fd().as_raw_fd())
        });
        let values: Vec<i32> = descriptors.collect::<io::Result<_>>()?;
        // SAFETY: all bytes zero are a value of this union of plain data.
        let mut attributes: bpf_attr = unsafe { std::mem::zeroed() };
        attributes.batch.keys = keys.as_ptr() as u64;
        attributes.batch.values = values.as_ptr() as u64;
        attributes.batch.count = keys.len() as u32;
        attributes.batch.map_fd = outer.fd().as_fd().as_raw_fd() as u32;
        // SAFETY: `keys` and `values` live until the call returns and have `count` elements of the
        // map's sizes, four bytes each; the kernel writes nothing but `count`.
        let status = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                bpf_cmd::BPF_MAP_UPDATE_BATCH,
                &raw mut attributes,
                size_of::<bpf_attr>(),
            )
        };
        if status < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// What the kernel charges for all of these maps together.
    pub fn memlock_bytes(&self) -> io::Result<u64> {
        Ok(memlock_bytes(outer_data(&self.outer)?.fd().as_fd())? + self.chunk_memlock_bytes)
    }
}

fn outer_of(map: &mut Map) -> Result<ArrayOfMaps<&mut MapData, MapData>, MapError> {
    ArrayOfMaps::try_from(map)
}

fn outer_data(map: &Map) -> io::Result<&MapData> {
    match map {
        Map::ArrayOfMaps(data) => Ok(data),
        _ => Err(io::Error::other("the chunk map is no array of maps")),
    }
}

fn data_of(map: &Map) -> Result<&MapData, MapError> {
    match map {
        Map::Array(data) => Ok(data),
        _ => Err(MapError::InvalidMapType { map_type: MapType::Array as u32 }),
    }
}

/// The `memlock` line of a map's fdinfo: the bytes that the kernel charges for it.
fn memlock_bytes(map: BorrowedFd<'_>) -> io::Result<u64> {
    let path = format!("/proc/self/fdinfo/{}", map.as_raw_fd());
    let text = std::fs::read_to_string(path)?;
    text.lines()
        .find_map(|line| line.strip_prefix("memlock:")?.trim().parse().ok())
        .ok_or_else(|| io::Error::other("fdinfo of a BPF map has no memlock line"))
}
