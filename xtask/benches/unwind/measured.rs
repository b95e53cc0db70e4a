//! The figures of one image: what its table costs, what it says, and whether that is right.
//!
//! Times are taken one image after the other with the machine to themselves; the proof against a DWARF
//! interpreter and what compresses come afterwards, on all cores.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context as _, Result};
use windlass_agent::chunks::{ChunkSpace, MOST_TABLE_BYTES};
use windlass_schema::Table;
use windlass_unwind_compiler::{CompileError, Compiled, Verification, compile, verify};

use crate::best::{Best, RUNS};
use crate::installed::Image;
use crate::wire::{compress, wire_form};

/// An image, its table, and how long that and its peer took.
pub(crate) struct Measured {
    pub(crate) image: Image,
    pub(crate) eh_frame_bytes: u64,
    pub(crate) compiled: Compiled,
    pub(crate) compile: Best,
    /// gimli's iteration over the same rows.
    pub(crate) gimli: Best,
    /// Rows that it met.
    pub(crate) gimli_rows: u64,
}

/// What takes no timing.
pub(crate) struct Proof {
    pub(crate) verification: Verification,
    pub(crate) wire_bytes: u64,
    /// zstd of `.eh_frame`.
    pub(crate) peer_wire_bytes: u64,
}

impl Measured {
    /// Compiles an image and times it beside gimli.
    pub(crate) fn new(image: Image) -> Result<Self, CompileError> {
        // Untimed: brings the file into memory.
        let compiled = compile(image.elf(), image.build_id)?;
        let sections = image.sections();
        let eh_frame_bytes = sections.eh_frame.data.len() as u64;
        let (mut compile_time, mut gimli, mut gimli_rows) = (Best::new(), Best::new(), 0);
        for _ in 0..RUNS {
            // The table is dropped outside.
            let _table = compile_time.time(|| compile(image.elf(), image.build_id))?;
            gimli_rows = gimli.time(|| sections.iterate_rows());
        }
        Ok(Self { image, eh_frame_bytes, compiled, compile: compile_time, gimli, gimli_rows })
    }

    /// Bytes of chunks that the table takes: pages, dictionary, directory and header, each rounded up.
    pub(crate) fn kernel_bytes(&self) -> Result<u64> {
        let mut space = ChunkSpace::new(MOST_TABLE_BYTES);
        Ok(space.place(&Table::parse(&self.compiled.table)?)?.bytes)
    }

    fn prove(&self) -> Result<Proof> {
        let table = Table::parse(&self.compiled.table)?;
        Ok(Proof {
            verification: verify(self.image.elf(), &table)?,
            wire_bytes: wire_form(&self.compiled.table)?.len() as u64,
            peer_wire_bytes: compress(self.image.sections().eh_frame.data)?.len() as u64,
        })
    }
}

/// Proves every table, on all cores, the largest first so that none is left working alone at the end.
pub(crate) fn prove(all: &[Measured]) -> Result<Vec<Proof>> {
    let mut order: Vec<usize> = (0..all.len()).collect();
    order.sort_by_key(|number| std::cmp::Reverse(all[*number].eh_frame_bytes));
    let (next, proofs) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = || {
        while let Some(number) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
            let measured = &all[*number];
            let proof = measured.prove().with_context(|| measured.image.path.display().to_string());
            proofs.lock().expect("no worker panics holding it").push((*number, proof));
        }
    };
    std::thread::scope(|scope| {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        (0..cores).for_each(|_| drop(scope.spawn(work)));
    });
    let mut proofs = proofs.into_inner().expect("no worker panics holding it");
    proofs.sort_by_key(|(number, _)| *number);
    proofs.into_iter().map(|(_, proof)| proof).collect()
}
