//! The kernel's maps that hold the chunks.
//!
//! Each system call that puts maps into a map of maps waits for a grace period of RCU, 7 to 20 ms here, so that no
//! running program still sees what was there (`maybe_wait_bpf_programs`, `kernel/bpf/syscall.c`). So the maps of all new
//! chunks are filled first and then put in by one call: a table of a million rows waits once and not twenty times.
//!
//! # Walks that run meanwhile
//! A map value can only be written whole, so a chunk is read, changed and written in place, while walks on other CPUs
//! read it. Where tables lie, the bytes written are those that are there: no reader can tell. Where
//! they differ, no walk reads: the place either was never named by any mapping, or it was a table's that no
//! process's mappings name any more, and [`ChunkMaps::wait_for_walks`] has returned since. A walk copies its process's
//! entry once and is one program run, so one that could still know the table began before that call, and the
//! call returns when all that began before it have ended. Replacing the chunk's map by another would not do instead: a
//! walk looks a chunk up at each frame, and would find the new rows by the old location.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use aya::maps::{Array, ArrayOfMaps, Map, MapData, MapError, MapType};
use aya_obj::generated::{bpf_attr, bpf_cmd};
use windlass_schema::maps::{CHUNK_BYTES, Chunk, MAX_CHUNKS, names};

use super::map_sizes::MapSizes;
use super::{HashMaps, LoadError, describe, load_object};
use crate::chunks::{ChunkSpace, ChunkWrite, empty_chunk};

/// Open files that the agent may need beside the chunks' maps: four for each CPU (a perf event, a ring of process events,
/// and as many again to spare), connections, files being read.
const OTHER_DESCRIPTORS: u64 = 1024;

/// The outer map and the chunks' maps. Each keeps its descriptor: the outer map would give it back only to who has
/// `CAP_SYS_ADMIN` (`BPF_MAP_GET_FD_BY_ID`).
pub struct ChunkMaps {
    outer: Map,
    /// Each a map of a single value: charged when it is needed and not before.
    chunks: HashMap<u32, Map>,
    /// Filled, and not yet in the outer map.
    fresh: Vec<(u32, Map)>,
    /// The chunk that is being changed.
    buffer: Box<Chunk>,
}

impl ChunkMaps {
    /// Empty chunk maps of their own, made as the program's are.
    pub fn create() -> Result<Self, LoadError> {
        let mut bpf = load_object(MapSizes::of_machine(1), HashMaps::Growing, None)?;
        let map = bpf
            .take_map(names::CHUNKS)
            .ok_or_else(|| LoadError::Refused(format!("the object has no map {}", names::CHUNKS)))?;
        Self::from_map(map)
    }

    /// The chunk maps of a loaded object, by its map [`names::CHUNKS`].
    pub fn from_map(mut outer: Map) -> Result<Self, LoadError> {
        outer_of(&mut outer).map_err(|error| LoadError::Refused(describe(&error)))?;
        allow_descriptors(u64::from(MAX_CHUNKS) + OTHER_DESCRIPTORS);
        Ok(Self { outer, chunks: HashMap::new(), fresh: Vec::new(), buffer: empty_chunk() })
    }

    /// Brings the kernel's chunks to what `space` holds.
    pub fn flush(&mut self, space: &mut ChunkSpace) -> Result<(), MapError> {
        let done = space.flush(|write| self.write(&write)).and_then(|()| self.publish());
        // What did not get in is made again, empty, when something is laid into it again.
        self.fresh.clear();
        done
    }

    /// Changes a chunk, making its map at the first time.
    fn write(&mut self, write: &ChunkWrite<'_>) -> Result<(), MapError> {
        if let Some(map) = self.chunks.get_mut(&write.number) {
            read_value(data_of(map)?, &mut self.buffer)?;
            write.apply(&mut self.buffer);
            return put_value(map, &self.buffer);
        }
        self.buffer.0.fill(0);
        write.apply(&mut self.buffer);
        let shape = aya_obj::Map::new_from_params(MapType::Array as u32, 4, CHUNK_BYTES, 1, 0);
        let mut map = Map::Array(MapData::create(shape, "windlass_chunk", None)?);
        put_value(&mut map, &self.buffer)?;
        self.fresh.push((write.number, map));
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
            for (number, map) in &self.fresh {
                outer_of(&mut self.outer)?.set(*number, data_of(map)?, 0)?;
            }
        }
        self.chunks.extend(self.fresh.drain(..));
        Ok(())
    }

    /// Returns when every walk that was under way at the call has ended: puts a map into the place in which it is.
    /// The kernel waits in any update of a map of maps, since Linux 4.20; see the head of this file.
    pub fn wait_for_walks(&mut self) -> Result<(), MapError> {
        match self.chunks.iter().next() {
            Some((number, map)) => outer_of(&mut self.outer)?.set(*number, data_of(map)?, 0),
            // Without chunks there is nothing that a walk could read.
            None => Ok(()),
        }
    }

    /// Reads a chunk back from the kernel.
    pub fn read(&self, number: u32) -> io::Result<Box<Chunk>> {
        let map = self.chunks.get(&number).ok_or(io::ErrorKind::NotFound)?;
        let mut chunk = empty_chunk();
        read_value(data_of(map).map_err(io::Error::other)?, &mut chunk).map_err(io::Error::other)?;
        Ok(chunk)
    }

    /// `BPF_MAP_UPDATE_BATCH` (bpf(2)), which the library that loads our program does not offer.
    fn put_in_one_call(&self) -> io::Result<()> {
        let outer = outer_data(&self.outer)?;
        let keys: Vec<u32> = self.fresh.iter().map(|(number, _)| *number).collect();
        let descriptors = self.fresh.iter().map(|(_, map)| {
            let data = data_of(map).map_err(io::Error::other)?;
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
        unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_BATCH, &mut attributes) }
    }

    /// What the kernel charges for all of these maps together.
    pub fn memlock_bytes(&self) -> io::Result<u64> {
        let mut sum = memlock_bytes(outer_data(&self.outer)?.fd().as_fd())?;
        for map in self.chunks.values() {
            sum += memlock_bytes(data_of(map).map_err(io::Error::other)?.fd().as_fd())?;
        }
        Ok(sum)
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

fn put_value(map: &mut Map, chunk: &Chunk) -> Result<(), MapError> {
    let content: &[u8; CHUNK_BYTES as usize] = &chunk.0;
    Array::<&mut MapData, [u8; CHUNK_BYTES as usize]>::try_from(map)?.set(0, content, 0)
}

/// Reads a chunk's map: `BPF_MAP_LOOKUP_ELEM` (bpf(2)), for which the library would take 64 KiB of stack.
fn read_value(map: &MapData, chunk: &mut Chunk) -> Result<(), MapError> {
    let key = 0u32;
    // SAFETY: all bytes zero are a value of this union of plain data.
    let mut attributes: bpf_attr = unsafe { std::mem::zeroed() };
    attributes.__bindgen_anon_2.map_fd = map.fd().as_fd().as_raw_fd() as u32;
    attributes.__bindgen_anon_2.key = &raw const key as u64;
    attributes.__bindgen_anon_2.__bindgen_anon_1.value = &raw mut chunk.0 as u64;
    // SAFETY: `key` and `chunk` live until the call returns; a chunk's map has values of the size of `chunk`.
    unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attributes) }.map_err(MapError::IoError)
}

/// bpf(2) where nothing but success matters.
///
/// # Safety
/// What `attributes` points to must be as `command` wants it.
unsafe fn bpf(command: bpf_cmd, attributes: &mut bpf_attr) -> io::Result<()> {
    let (attributes, bytes) = (&raw mut *attributes, size_of::<bpf_attr>());
    // SAFETY: `attributes` lives until the call returns and is `bytes` long; the rest is the caller's.
    let status = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, bytes) };
    if status < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Raises this process's limit of open files to `wanted`, or as far as it may.
fn allow_descriptors(wanted: u64) {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` lives during both calls, of which the first fills it.
    let allowed = unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) != 0 || limit.rlim_cur >= wanted {
            return;
        }
        limit.rlim_cur = wanted.min(limit.rlim_max);
        libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) == 0
    };
    if !allowed || limit.rlim_cur < wanted {
        tracing::warn!(
            allowed = limit.rlim_cur,
            wanted,
            "unwind tables are kept in a file descriptor for each 64 KiB: allow more open files (ulimit -n) if tables \
             are refused"
        );
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
