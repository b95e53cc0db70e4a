//! Which stacks are seen whole?
//!
//! "Complete" is what a profiler says of itself. So the programs have stacks of which the number of frames is known, from
//! `_start` on, and a stack counts only if it has them all; of node, whose frames nobody counts, those that the walk
//! followed to the end. `perf record --call-graph dwarf`, which copies 8 KiB of each stack and unwinds later, samples the same
//! processes at the same time.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::Receiver;
use std::time::Duration;

use anyhow::{Context as _, Result};
use windlass_agent::backend::Sample;

use crate::busy::Program;
use crate::installed::Service;
use crate::live::complete_stacks;
use crate::watching;

const FREQUENCY_HZ: u32 = 97;
/// How long an agent may take until tables are there, and how long is sampled.
const SETTLE: Duration = Duration::from_secs(5);
const MEASURE: Duration = Duration::from_secs(15);
/// Depths of the programs that have a known one.
const DEPTHS: [(&str, u32); 3] = [("57 frames", 57), ("121 frames", 121), ("250 frames", 250)];

pub(crate) fn print() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let service = Service::start(folder.path())?;
    println!(
        "### Complete stacks\n\n| program | agent: samples | complete | perf dwarf: samples | complete |"
    );
    println!("|---|---:|---:|---:|---:|");
    for (name, frames) in DEPTHS {
        let program = Program::deep(folder.path(), name, frames)?;
        measure(&program, Some(frames as usize), &service, folder.path())?;
    }
    if let Some(node) = Program::node() {
        measure(&node, None, &service, folder.path())?;
    }
    println!(
        "\nOne program on each core, {} s, both profilers at the same time. Complete: with every frame down to `_start`; of node, \
         all that end where a thread or process began.\n",
        MEASURE.as_secs()
    );
    Ok(())
}

fn measure(program: &Program, frames: Option<usize>, service: &Service, folder: &Path) -> Result<()> {
    let running = program.start()?;
    let (agent, samples) = watching::start(service, &folder.join("cache"), FREQUENCY_HZ)?;
    std::thread::sleep(SETTLE);
    samples.try_iter().for_each(drop);
    let data = folder.join("perf.data");
    let mut record = Command::new("perf");
    record.args(["record", "-q", "-F", "99", "-a", "--call-graph", "dwarf", "-o"]).arg(&data);
    record.args(["--", "sleep", &MEASURE.as_secs().to_string()]).stdout(Stdio::null()).stderr(Stdio::null());
    let status = record.status().context("run perf")?;
    anyhow::ensure!(status.success(), "perf record: {status}");
    let pids = running.pids();
    let (ours, complete) = count(&samples, &pids, frames);
    agent.stop()?;
    drop(running);
    let (theirs, theirs_complete) = complete_stacks(&data, &pids)?;
    let percent = |part: u64, whole: u64| 100.0 * part as f64 / whole.max(1) as f64;
    println!(
        "| {} | {ours} | {:.2} % | {theirs} | {:.2} % |",
        program.name,
        percent(complete, ours),
        percent(theirs_complete, theirs)
    );
    Ok(())
}

/// Samples of some processes, and those of them that are complete, with as many user frames if that is known.
fn count(samples: &Receiver<Sample>, pids: &[u32], frames: Option<usize>) -> (u64, u64) {
    let (mut all, mut complete) = (0, 0);
    for sample in samples.try_iter().filter(|sample| pids.contains(&sample.tgid)) {
        all += 1;
        let has_frames = frames.is_none_or(|frames| sample.user.len() == frames);
        complete += u64::from(sample.stop.is_complete() && has_frames);
    }
    (all, complete)
}
