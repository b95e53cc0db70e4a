//! Unwind tables beside what stands against them: size, exactness, compiling, loading, looking up.
//!
//! # Why this shape
//! Projects quote speeds from different machines and sizes from different programs. Here every figure stands
//! beside a peer that was measured in the same run over the same bytes, and every file of the machine
//! counts, not a choice of them. One module answers one question and prints one Markdown table; images are
//! compiled once for all of them. Arguments choose tables: `cargo bench --package xtask --bench unwind -- lookup load`.
//!
//! - [`large`], [`corpus`]: what tables cost and what they say, over [`measured`] and [`installed`] images
//! - [`load`], [`lookup`]: what an agent and its walks do with the largest
//! - [`heap`]: what compiling takes; [`sframe`]: the sizes of another format
//! - [`sections`]: what peers read; [`wire`]: what travels; [`best`]: how times are taken

mod best;
mod corpus;
mod heap;
mod installed;
mod large;
mod load;
mod lookup;
mod measured;
mod sections;
mod sframe;
mod wire;

use anyhow::{Context as _, Result};

use measured::Measured;

#[global_allocator]
static HEAP: heap::Counting = heap::Counting::new();

fn main() -> Result<()> {
    // Cargo itself passes `--bench`.
    let chosen: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let wants = |names: &[&str]| chosen.is_empty() || chosen.iter().any(|name| names.contains(&&name[..]));
    if wants(&["large", "corpus", "load", "lookup", "memory"]) {
        let mut refused = corpus::Refused::new();
        let all: Vec<Measured> = installed::images()
            .into_iter()
            .filter_map(|image| {
                Measured::new(image).map_err(|error| corpus::refuse(&mut refused, error)).ok()
            })
            .collect();
        if wants(&["large", "corpus"]) {
            let proofs = measured::prove(&all)?;
            large::print(&all, &proofs)?;
            corpus::print(&all, &proofs, &refused);
        }
        let largest = all.iter().max_by_key(|file| file.compiled.report.rows).context("no image here")?;
        if wants(&["load"]) {
            load::print(largest)?;
        }
        if wants(&["lookup"]) {
            lookup::print(largest)?;
        }
        if wants(&["memory"]) {
            heap::print(&all, &HEAP)?;
        }
    }
    if wants(&["sframe"]) {
        sframe::print()?;
    }
    Ok(())
}
