//! What serving costs: `windlassd` and elfutils' `debuginfod` over the same files, in turn, on this machine.
//!
//! # Why this shape
//! A server's requests a second on another machine say nothing, and on a shared one little unless its peer is
//! measured in the same minutes. So both run all the time, each row asks one and then the other, five times, and
//! states medians. Arguments choose tables: `cargo xtask bench service load start`.
//!
//! - [`load`]: the generator of requests, one thread, with its own cost
//! - [`files`]: what is served; [`servers`]: who serves it
//! - [`rows`]: files, misses, sections; a large file and memory
//! - [`wire`]: bytes to a client that takes zstd
//! - [`start`]: with a million build-IDs on record

mod files;
mod load;
mod rows;
mod servers;
mod start;
mod wire;

use anyhow::{Context as _, Result};

use crate::files::Files;

fn main() -> Result<()> {
    // Cargo itself passes `--bench`.
    let chosen: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let wants = |name: &str| chosen.is_empty() || chosen.iter().any(|word| word == name);
    let version =
        servers::elfutils_version().context("no elfutils debuginfod (Debian: package debuginfod)")?;
    let built =
        ["windlassd", "windlass-agent"].map(servers::program).into_iter().collect::<Result<Vec<_>>>()?;
    let folder = tempfile::tempdir()?;
    let files = Files::collect(&built)?;
    if wants("load") || wants("wire") {
        let ours = servers::stocked_windlassd(&folder.path().join("windlassd"), &files)?;
        if wants("load") {
            let theirs = servers::stocked_elfutils(folder.path(), &files)?;
            ours.check(&files)?;
            theirs.check(&files)?;
            rows::print(&ours, &theirs, &files, &version)?;
        }
        if wants("wire") {
            wire::print(&ours, &files)?;
        }
    }
    if wants("start") {
        start::print(&folder.path().join("started"), &files)?;
    }
    Ok(())
}
