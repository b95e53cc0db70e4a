//! `cargo xtask fuzz`: runs the targets of `fuzz/`.
//!
//! Their bodies are functions of the tests crate, and a plain test replays the committed corpus
//! through them, so that what the fuzzer once found stays found without a nightly compiler.

use anyhow::{Result, bail};

use crate::checkout::{command, output, run as run_command};
use crate::programs::find;

/// Fuzzes one target, or each in turn, for so many seconds.
pub(crate) fn run(target: Option<&str>, seconds: u64) -> Result<()> {
    if find("cargo-fuzz").is_none() {
        bail!("cargo-fuzz is missing: rustup toolchain install nightly && cargo install cargo-fuzz --locked");
    }
    let all = output(command("cargo").args(["+nightly", "fuzz", "list"]))?;
    for target in target.map_or_else(|| all.lines().collect(), |target| vec![target]) {
        println!("--- {target}, {seconds} s");
        run_command(command("cargo").args(["+nightly", "fuzz", "run", target, "--"]).args([
            &format!("-max_total_time={seconds}"),
            // Memory and time beyond which an input counts as a finding.
            "-rss_limit_mb=1024",
            "-timeout=10",
        ]))?;
    }
    Ok(())
}
