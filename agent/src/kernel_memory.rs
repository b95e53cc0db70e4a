//! What tables cost in the kernel.

use std::convert::Infallible;

use windlass_schema::Table;
use windlass_schema::maps::{CHUNK_BYTES, MAX_CHUNKS};

use crate::chunks::ChunkSpace;
use crate::kernel::ChunkMaps;

/// Kernel memory of a set of tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Charge {
    /// Bytes of all maps together.
    pub bytes: u64,
    /// Bytes of the chunks that each table takes, in the order given; 0 for one that did not fit.
    pub per_table: Vec<u64>,
    /// Whether `bytes` was read from the kernel (`memlock` in each map's fdinfo) or, because BPF
    /// maps could not be made, computed from the same layout.
    pub measured: bool,
}

/// Size of the kernel's `struct bpf_array` without its elements, on Linux 6.x.
const ARRAY_MAP_BYTES: u64 = 320;

/// Loads all `tables` into maps as the agent does and reads what the kernel charges for them.
pub fn charge<'a>(tables: impl Iterator<Item = &'a [u8]>) -> Charge {
    let mut maps = ChunkMaps::create().ok();
    let mut space = ChunkSpace::new(u64::from(MAX_CHUNKS) * u64::from(CHUNK_BYTES));
    let per_table = tables
        .map(|file| {
            let placed = Table::parse(file).ok().and_then(|table| space.place(&table).ok());
            match &mut maps {
                Some(present) => {
                    if space.flush(|number, chunk, last| present.write(number, chunk, last)).is_err() {
                        maps = None;
                    }
                }
                None => {
                    let Ok(()) = space.flush(|_, _, _| Ok::<(), Infallible>(()));
                }
            }
            placed.map_or(0, |placed| placed.bytes)
        })
        .collect();
    let computed = ARRAY_MAP_BYTES
        + 8 * u64::from(MAX_CHUNKS)
        + space.used_bytes() / u64::from(CHUNK_BYTES) * (ARRAY_MAP_BYTES + u64::from(CHUNK_BYTES));
    let measured = maps.and_then(|maps| maps.memlock_bytes().ok());
    Charge { bytes: measured.unwrap_or(computed), per_table, measured: measured.is_some() }
}
