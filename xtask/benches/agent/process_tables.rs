//! The tables of one process in the maps of a loaded object, placed as the agent does it.

use std::collections::HashMap;

use anyhow::{Context as _, Result};
use aya::Ebpf;
use aya::maps::MapData;
use object::ReadRef as _;
use windlass_agent::chunks::ChunkSpace;
use windlass_agent::images::{Images, TableState};
use windlass_agent::kernel::{ChunkMaps, segments_of};
use windlass_agent::mapped_file::ImageSource;
use windlass_agent::process::{Content, plan, read_mappings};
use windlass_schema::maps::{CHUNK_BYTES, MAX_CHUNKS, MappingSegment, ProcessEntry, SegmentKey, names};
use windlass_schema::{BuildId, Table};
use windlass_unwind_compiler::compile;

#[derive(Clone, Copy)]
#[repr(transparent)]
struct Plain<T>(T);
// SAFETY: integers without padding.
unsafe impl aya::Pod for Plain<ProcessEntry> {}
// SAFETY: integers without padding.
unsafe impl aya::Pod for Plain<SegmentKey> {}
// SAFETY: integers without padding.
unsafe impl aya::Pod for Plain<MappingSegment> {}

/// The generation of the process's mappings: any but 0.
const GENERATION: u32 = 1;

/// Keeps the maps of chunks, which may be written again, open.
pub(crate) struct ProcessTables {
    _chunks: ChunkMaps,
}

impl ProcessTables {
    /// Compiles and places the tables of everything that a process maps, and states its mappings.
    pub(crate) fn place(bpf: &mut Ebpf, tgid: u32) -> Result<Self> {
        let mut images = Images::default();
        let mappings = read_mappings(tgid, &mut images)?;
        let mut space = ChunkSpace::new(u64::from(MAX_CHUNKS) * u64::from(CHUNK_BYTES));
        let mut placed = HashMap::new();
        for mapping in &mappings {
            let Content::Image { image, source, .. } = &mapping.content else { continue };
            let id = image.id.build_id();
            if placed.contains_key(&id) {
                continue;
            }
            let at = space.place(&Table::parse(&table_of(source, id)?)?)?;
            placed.insert(id, at);
            images.set_table(id, Some(TableState::Placed(at.header)));
        }
        let map = |bpf: &mut Ebpf, name| bpf.take_map(name).with_context(|| format!("no map {name}"));
        let mut chunks = ChunkMaps::from_map(map(bpf, names::CHUNKS)?)?;
        chunks.flush(&mut space)?;
        let (entry, segments) = segments_of(&plan(&mappings, &images), GENERATION);
        let mut of_process: aya::maps::HashMap<MapData, Plain<SegmentKey>, Plain<MappingSegment>> =
            map(bpf, names::MAPPINGS)?.try_into()?;
        for (number, segment) in segments.into_iter().enumerate() {
            of_process.insert(Plain(SegmentKey { tgid, segment: number as u32 }), Plain(segment), 0)?;
        }
        let mut processes: aya::maps::HashMap<MapData, u32, Plain<ProcessEntry>> =
            map(bpf, names::PROCESSES)?.try_into()?;
        processes.insert(tgid, Plain(entry), 0)?;
        Ok(Self { _chunks: chunks })
    }
}

fn table_of(source: &ImageSource, id: BuildId) -> Result<Vec<u8>> {
    let elf = source.read(|image| {
        let length = image.len().unwrap_or(0);
        image.read_bytes_at(0, length).map(<[u8]>::to_vec).ok()
    })?;
    let elf = elf.with_context(|| format!("read {}", source.shown_name()))?;
    Ok(compile(&elf, id).with_context(|| source.shown_name())?.table)
}
