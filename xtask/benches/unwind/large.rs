//! What do the tables of large files cost, and how long does compiling one take?
//!
//! Peers publish the size of a row in their source, not what the kernel charges for it, and no compile
//! time. Here bytes are divided by rows, a row being a change of (CFA, return address, frame pointer);
//! the wire is held against zstd on `.eh_frame` itself, what one would send without a format; compiling
//! against gimli iterating over all rows of the same bytes and keeping nothing, the least that any
//! compiler on gimli can cost.

use anyhow::Result;

use crate::best::RUNS;
use crate::measured::{Measured, Proof};
use crate::wire::ZSTD_LEVEL;

/// What the names of the files in the table start with: the largest that machines have, and libraries that
/// every process maps.
const NAMES: [&str; 16] = [
    "chromium",
    "gdb",
    "libLLVM",
    "libc.so.6",
    "libclang-cpp.so",
    "libcrypto.so.3",
    "libpython3.11.so",
    "librustc_driver",
    "libstdc++.so.6",
    "libtensorflow",
    "libwebkit2gtk",
    "libxul",
    "node",
    "python3.11",
    "cc1plus",
    "firefox-bin",
];
/// Most files for one name: a machine with nine interpreters would fill the table with them.
const VERSIONS: usize = 5;
/// Fewest rows: some of these names belong to small launchers as well.
const MIN_ROWS: u64 = 10_000;

/// The files of the table, the largest first.
pub(crate) fn large(all: &[Measured]) -> Vec<usize> {
    let rows = |number: &usize| std::cmp::Reverse(all[*number].compiled.report.rows);
    let mut chosen = Vec::new();
    for name in NAMES {
        let is_one = |file: &Measured| {
            let name_is_whole = |rest: &str| !rest.starts_with(|next: char| next.is_alphanumeric());
            file.compiled.report.rows >= MIN_ROWS
                && file.image.name().strip_prefix(name).is_some_and(name_is_whole)
        };
        let mut versions: Vec<usize> = (0..all.len()).filter(|number| is_one(&all[*number])).collect();
        versions.sort_by_key(rows);
        chosen.extend(versions.into_iter().take(VERSIONS));
    }
    chosen.sort_by_key(rows);
    chosen
}

pub(crate) fn print(all: &[Measured], proofs: &[Proof]) -> Result<()> {
    println!("### Large files\n");
    println!(
        "| file | .eh_frame | rows | kernel bytes/row | wire, % of .eh_frame | zstd -{ZSTD_LEVEL} of .eh_frame, % | \
         exact, % of rows | exact, % of code | compile | MB/s | gimli's rows | compile / gimli |"
    );
    println!("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|");
    let chosen = large(all);
    for number in &chosen {
        let (file, proof) = (&all[*number], &proofs[*number]);
        let report = &file.compiled.report;
        let megabytes = file.eh_frame_bytes as f64 / 1e6;
        let percent = |part: u64, whole: u64| 100.0 * part as f64 / whole.max(1) as f64;
        println!(
            "| {} | {megabytes:.2} MB | {} | {:.2} | {:.1} | {:.1} | {:.3} | {:.3} | {:.1} ms | {:.0} | {:.1} ms | {:.2} |",
            file.image.name(),
            report.rows,
            file.kernel_bytes()? as f64 / report.rows.max(1) as f64,
            percent(proof.wire_bytes, file.eh_frame_bytes),
            percent(proof.peer_wire_bytes, file.eh_frame_bytes),
            percent(report.exact_rows, report.rows),
            percent(report.exact_code_bytes, report.code_bytes),
            file.compile.ms(),
            megabytes / file.compile.seconds(),
            file.gimli.ms(),
            file.compile.seconds() / file.gimli.seconds(),
        );
    }
    let sum = |of: &dyn Fn(usize) -> f64| chosen.iter().map(|number| of(*number)).sum::<f64>();
    let eh_frame = sum(&|number| all[number].eh_frame_bytes as f64);
    println!(
        "\nTogether {:.1} % of `.eh_frame` on the wire, where zstd alone takes {:.1} %; {:.2} times gimli's time. \
         Kernel bytes count pages, dictionary, directory and header of the image, each rounded up, not what is left \
         at the end of 64 KiB chunks. gimli iterates over the rows of the same bytes and keeps nothing. At most \
         {VERSIONS} files of a name. Times: best of {RUNS}, in turn.\n",
        100.0 * sum(&|number| proofs[number].wire_bytes as f64) / eh_frame,
        100.0 * sum(&|number| proofs[number].peer_wire_bytes as f64) / eh_frame,
        sum(&|number| all[number].compile.seconds()) / sum(&|number| all[number].gimli.seconds()),
    );
    Ok(())
}
