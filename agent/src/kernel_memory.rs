//! What tables cost in the kernel.

use std::convert::Infallible;

use windlass_schema::Table;

use crate::chunks::{ChunkSpace, MOST_TABLE_BYTES};
use crate::kernel::ChunkMaps;

/// Kernel memory of a set of tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Charge {
    /// Bytes of all maps together.
    pub bytes: u64,
    /// Bytes of the chunks that each table takes, in the order given; 0 for one that was not placed.
    pub per_table: Vec<u64>,
    /// The tables that were not placed, by their number in the order given, and why. `bytes` is without them.
    pub not_placed: Vec<(usize, String)>,
    /// Whether `bytes` was read from the kernel (`memlock` in each map's fdinfo) or, because BPF
    /// maps could not be made, computed from the same layout.
    pub measured: bool,
}

/// Loads all `tables` into maps as the agent does and reads what the kernel charges for them.
pub fn charge<'a>(tables: impl Iterator<Item = &'a [u8]>) -> Charge {
    let mut maps = ChunkMaps::create().ok();
    let mut space = ChunkSpace::new(MOST_TABLE_BYTES);
    let mut not_placed = Vec::new();
    let per_table = tables
        .enumerate()
        .map(|(number, file)| {
            let placed = match Table::parse(file) {
                Ok(table) => space.place(&table).map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            match &mut maps {
                Some(present) => {
                    if present.flush(&mut space).is_err() {
                        maps = None;
                    }
                }
                None => {
                    let Ok(()) = space.flush(|_| Ok::<(), Infallible>(()));
                }
            }
            match placed {
                Ok(placed) => placed.bytes,
                Err(reason) => {
                    not_placed.push((number, reason));
                    0
                }
            }
        })
        .collect();
    let measured = maps.and_then(|maps| maps.memlock_bytes().ok());
    Charge {
        bytes: measured.unwrap_or(space.used_bytes()),
        per_table,
        not_placed,
        measured: measured.is_some(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_placed_is_named() {
        let charge = charge([&b"no table"[..], b""].into_iter());
        assert_eq!(charge.per_table, [0, 0]);
        let numbers: Vec<_> = charge.not_placed.iter().map(|(number, _)| *number).collect();
        assert_eq!(numbers, [0, 1], "{charge:?}");
    }
}
