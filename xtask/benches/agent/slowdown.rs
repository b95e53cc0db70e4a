//! What does a busy program lose to each profiler?
//!
//! A profiler's own CPU time does not show what its interrupts take from the program that they interrupt. So the program
//! counts its turns. A machine's speed changes from minute to minute by more than is measured here: each round runs the
//! program alone, under the agent and under perf, right after each other, and what counts is the ratio within a round.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::busy::Program;
use crate::installed::{Service, start_agent};

const FREQUENCY_HZ: u32 = 997;
/// Rounds, and how long the program runs each time.
const ROUNDS: usize = 9;
const RUN: Duration = Duration::from_secs(3);
/// How long a profiler may take to sample at full rate, with its tables.
const SETTLE: Duration = Duration::from_secs(4);

pub(crate) fn print() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let program = Program::counting(folder.path(), RUN)?;
    let service = Service::start(folder.path())?;
    let (mut of_agent, mut of_perf, mut of_dwarf) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let alone = program.count()? as f64;
        let agent = start_agent(&service, folder.path(), FREQUENCY_HZ)?;
        std::thread::sleep(SETTLE);
        of_agent.push(1.0 - program.count()? as f64 / alone);
        drop(agent);
        of_perf.push(1.0 - under_perf(&program, folder.path(), "fp")? / alone);
        of_dwarf.push(1.0 - under_perf(&program, folder.path(), "dwarf")? / alone);
    }
    println!(
        "### What a busy program loses\n\n| at {FREQUENCY_HZ} Hz | median | least | most |\n|---|---:|---:|---:|"
    );
    for (name, mut losses) in [
        ("agent, whole stacks of 57 frames", of_agent),
        ("perf record --call-graph fp, 1 or 2 frames", of_perf),
        ("perf record --call-graph dwarf", of_dwarf),
    ] {
        losses.sort_by(f64::total_cmp);
        let percent = |loss: f64| format!("{:.2} %", 100.0 * loss);
        let (median, most) = (losses[losses.len() / 2], losses[losses.len() - 1]);
        println!("| {name} | {} | {} | {} |", percent(median), percent(losses[0]), percent(most));
    }
    println!(
        "\nTurns of the program of 57 frames, one on each core, in {} s, less than alone; {ROUNDS} rounds.\n",
        RUN.as_secs()
    );
    Ok(())
}

/// `perf record`; dropping it ends it.
struct Perf(Child);

impl Drop for Perf {
    fn drop(&mut self) {
        // SAFETY: the child has not been waited for, so the number is its own.
        unsafe { libc::kill(self.0.id() as libc::pid_t, libc::SIGINT) };
        // It fails only when it has ended already.
        let _ = self.0.wait();
    }
}

/// Turns of the program while perf records the machine.
fn under_perf(program: &Program, folder: &Path, call_graph: &str) -> Result<f64> {
    let data = folder.join("perf.data");
    let mut record = Command::new("perf");
    record.args(["record", "-q", "-F", &FREQUENCY_HZ.to_string(), "-a", "--call-graph", call_graph, "-o"]);
    let record = record.arg(&data).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let _perf = Perf(record.spawn().context("run perf")?);
    std::thread::sleep(Duration::from_secs(1));
    Ok(program.count()? as f64)
}
