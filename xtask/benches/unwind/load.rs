//! How long does a table take from what travelled to what the kernel reads?
//!
//! An agent that compiles has to read `.eh_frame` and interpret all of it before the first walk. Here user
//! space unpacks, checks, and copies pages as they came; the steps are those of the agent, in its order. Unpacking
//! takes most of the time; it runs on all cores. The kernel's part is to make the maps, to copy, and to wait once until no
//! program runs that could still see what was in their place (`maybe_wait_bpf_programs`, `kernel/bpf/syscall.c`).

use anyhow::Result;
use windlass_agent::chunks::{ChunkSpace, MOST_TABLE_BYTES};
use windlass_agent::kernel::ChunkMaps;
use windlass_schema::Table;

use crate::best::{Best, RUNS};
use crate::measured::Measured;
use crate::wire::{ZSTD_LEVEL, compress, decompress, from_wire, wire_form};

/// Times of the steps, ours and the peer's.
struct Steps {
    unpack: Best,
    check: Best,
    place: Best,
    /// `None` where BPF maps are not permitted.
    write: Option<Best>,
    chunks: usize,
    decompress: Best,
    rows: Best,
}

pub(crate) fn print(largest: &Measured) -> Result<()> {
    let wire = wire_form(&largest.compiled.table)?;
    let steps = measure(largest, &wire)?;
    let written = steps.write.map_or("not permitted".to_owned(), |write| format!("{:.1} ms", write.ms()));
    let ours = [Some(steps.unpack), Some(steps.check), Some(steps.place), steps.write];
    let ours: f64 = ours.into_iter().flatten().map(Best::ms).sum();
    let peer = steps.decompress.ms() + steps.rows.ms();
    println!("### Load\n\n| {} | |\n|---|---:|", largest.image.name());
    println!(
        "| rows; table; wire | {}; {:.2} MB; {:.2} MB |",
        largest.compiled.report.rows,
        largest.compiled.table.len() as f64 / 1e6,
        wire.len() as f64 / 1e6
    );
    println!("| unpack | {:.1} ms |", steps.unpack.ms());
    println!("| check | {:.1} ms |", steps.check.ms());
    println!("| place into chunks | {:.1} ms |", steps.place.ms());
    println!("| make and write maps of {} chunks | {written} |", steps.chunks);
    println!("| all steps | {ours:.1} ms |");
    let million = ours * 1.2e6 / largest.compiled.report.rows as f64;
    println!("| all steps, for each 1.2 million rows | {million:.1} ms |");
    println!("| peer: zstd -{ZSTD_LEVEL} decompression of .eh_frame | {:.1} ms |", steps.decompress.ms());
    println!("| peer: gimli's rows | {:.1} ms |", steps.rows.ms());
    println!("| peer, both | {peer:.1} ms |");
    println!("| load / peer | {:.2} |", ours / peer);
    println!(
        "\nFrom the wire form in memory to BPF maps, as the agent does it. The peer is what an agent that compiles by itself \
         does at least, before it makes, sorts or writes a row. Best of {RUNS} for each step, in turn.\n"
    );
    Ok(())
}

fn measure(largest: &Measured, wire: &[u8]) -> Result<Steps> {
    let new = Best::new();
    let mut steps = Steps {
        unpack: new,
        check: new,
        place: new,
        write: Some(new),
        chunks: 0,
        decompress: new,
        rows: new,
    };
    let sections = largest.image.sections();
    let compressed = compress(sections.eh_frame.data)?;
    for _ in 0..RUNS {
        let table = steps.unpack.time(|| from_wire(wire))?;
        anyhow::ensure!(table == largest.compiled.table, "the wire form gives another table");
        let checked = steps.check.time(|| Table::parse(&table))?;
        let mut space = ChunkSpace::new(MOST_TABLE_BYTES);
        steps.place.time(|| space.place(&checked).map(drop))?;
        steps.chunks = space.chunks() as usize;
        match (ChunkMaps::create(), &mut steps.write) {
            (Ok(mut maps), Some(best)) => best.time(|| maps.flush(&mut space))?,
            _ => steps.write = None,
        }
        let eh_frame = steps.decompress.time(|| decompress(&compressed))?;
        steps.rows.time(|| sections.with_eh_frame(&eh_frame).iterate_rows());
    }
    Ok(steps)
}
