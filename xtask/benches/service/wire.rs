//! Bytes on the wire to a client that takes zstd, as libdebuginfod of the distributions does.

use anyhow::{Result, ensure};

use crate::files::{Files, Served};
use crate::load::get;
use crate::servers::Server;

/// The table.
pub(crate) fn print(ours: &Server, files: &Files) -> Result<()> {
    println!("### Bytes to a client that takes zstd\n");
    println!("| files | identity MB | zstd MB | % |\n|---|---:|---:|---:|");
    row(ours, "programs as a build leaves them, with debug information", &files.built)?;
    row(ours, "installed programs of 30 to 200 KB, stripped", &files.mixed)?;
    println!();
    Ok(())
}

fn row(server: &Server, name: &str, files: &[Served]) -> Result<()> {
    let (mut identity, mut wire) = (0, 0);
    for file in files {
        let (status, body) = get(server.address, &file.path("executable"), "zstd")?;
        ensure!(status == 200 && zstd::decode_all(&body[..])? == file.content, "another content");
        identity += file.content.len();
        wire += body.len();
    }
    let share = wire as f64 / identity as f64 * 100.0;
    println!("| {name} | {:.1} | {:.1} | {share:.1} |", identity as f64 / 1e6, wire as f64 / 1e6);
    Ok(())
}
