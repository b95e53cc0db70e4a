//! `cargo xtask test`: every check, one line each with its time.
//!
//! All steps run even when one fails, so that one run tells everything; each failure says how to run
//! that step alone. Tests that cannot run here write their name and reason into the file that
//! `WINDLASS_SKIPPED` names, and the end of the report lists them.

use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::checkout::{cargo, run as run_command};
use crate::{ebpf, fixtures, licence, programs};

/// Names the file to which tests append what they skip, one `NAME: REASON` a line.
const SKIPPED_FILE: &str = "WINDLASS_SKIPPED";

/// The steps so far.
#[derive(Default)]
struct Report {
    lines: Vec<String>,
    failures: usize,
}

impl Report {
    fn step(&mut self, name: &str, rerun: &str, check: impl FnOnce() -> Result<()>) {
        println!("--- {name}: {rerun}");
        let start = Instant::now();
        let outcome = check();
        let seconds = start.elapsed().as_secs_f64();
        self.lines.push(match outcome {
            Ok(()) => format!("ok    {name:<12} {seconds:6.1} s"),
            Err(error) => {
                self.failures += 1;
                format!("FAIL  {name:<12} {seconds:6.1} s  {error:#}\n      run again: {rerun}")
            }
        });
    }

    fn cargo_step(&mut self, name: &str, words: &str, environment: &[(&str, &str)]) {
        let assignments: String =
            environment.iter().map(|(key, value)| format!("{key}='{value}' ")).collect();
        self.step(name, &format!("{assignments}cargo {words}"), || {
            run_command(cargo(words).envs(environment.iter().copied()))
        });
    }
}

/// Runs the suite. `ci`: nothing may be skipped. `fast`: see the command's help.
pub(crate) fn run(ci: bool, fast: bool) -> Result<()> {
    let mut report = Report::default();
    let skipped = tempfile::NamedTempFile::new().context("make a file for skipped tests")?;
    if !fast {
        let ensure = || {
            programs::ensure(programs::TEST_PROGRAMS, ci)?;
            programs::ensure_python_packages(ci)
        };
        report.step("programs", "cargo xtask test", ensure);
    }
    report.cargo_step("format", "fmt --all --check", &[]);
    report.step("fixtures", "cargo xtask fixtures --check", fixtures::check);
    report.step("licences", "cargo xtask licences", licence::check);
    // The BPF program compiles for its own target only: its step builds it.
    let lint = "clippy --workspace --all-targets --exclude windlass-bpf --locked -- -D warnings";
    report.cargo_step("clippy", lint, &[]);
    if !fast {
        // Module docs name private items on purpose, for who works on the code.
        let flags = "-D warnings -A rustdoc::private_intra_doc_links";
        report.cargo_step("doc", "doc --no-deps --locked", &[("RUSTDOCFLAGS", flags)]);
    }
    // End-to-end tests run the programs, so those are built first and together.
    report.cargo_step("build", "build --locked", &[]);
    report.step("test", "cargo test", || {
        let mut test = cargo("test --locked --no-fail-fast");
        test.env(SKIPPED_FILE, skipped.path());
        if ci {
            test.env("CI", "true");
        }
        run_command(&mut test)
    });
    if !fast {
        report.step("bpf", "cargo xtask build-ebpf --check", || {
            let not_compared = match ebpf::check() {
                Err(error) if !ci && error.is::<ebpf::NoToolchain>() => Some(error.to_string()),
                outcome => outcome?,
            };
            if let Some(reason) = not_compared {
                let before = std::fs::read_to_string(skipped.path())?;
                std::fs::write(skipped.path(), format!("{before}bpf: {reason}\n"))?;
            }
            Ok(())
        });
    }
    conclude(&report, &std::fs::read_to_string(skipped.path())?)
}

fn conclude(report: &Report, skipped: &str) -> Result<()> {
    println!("---");
    for line in &report.lines {
        println!("{line}");
    }
    for line in skipped.lines() {
        println!("skip  {line}");
    }
    let (all, failed) = (report.lines.len(), report.failures);
    println!("{} steps passed, {failed} failed, {} tests skipped", all - failed, skipped.lines().count());
    if failed > 0 {
        bail!("{failed} of {all} steps failed");
    }
    Ok(())
}
