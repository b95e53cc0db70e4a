//! How soon is a host with many processes seen whole, and what do many short ones do to the agent?

use std::collections::HashSet;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use windlass_agent::backend::Sample;

use crate::busy::Program;
use crate::installed::Service;
use crate::kernel_figures::process_memory;
use crate::new_processes::monotonic_ns;
use crate::watching;

const FREQUENCY_HZ: u32 = 97;
/// Images, and processes of each: 300 processes.
const IMAGES: u8 = 30;
const EACH: u8 = 10;
/// How long an agent is watched after its start.
const WATCHED: Duration = Duration::from_secs(20);
/// The share of samples that is to be complete.
const WHOLE: f64 = 0.99;
/// Short processes, and the time within which they are started one after the other.
const SHORT: u32 = 10_000;
const MINUTE: Duration = Duration::from_secs(60);
/// How long the agent has before and after them.
const SETTLE: Duration = Duration::from_secs(8);

/// Time from an agent's start among 300 processes until their samples are complete.
pub(crate) fn print_start() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let running = Program::sleepers(folder.path(), IMAGES, EACH)?;
    let pids: HashSet<u32> = running.pids().into_iter().collect();
    let service = Service::start(folder.path())?;
    let known = folder.path().join("known");
    println!(
        "### Start among {} processes\n\n| tables | 99 % complete from | samples of the first 5 s | of them complete |",
        pids.len()
    );
    println!("|---|---:|---:|---:|");
    for (name, cache) in [
        ("nowhere: the agent sends skeletons, the service compiles them", known.clone()),
        ("in the service", folder.path().join("empty")),
        ("in the disk cache", known),
    ] {
        let start_ns = monotonic_ns();
        let (agent, samples) = watching::start(&service, &cache, FREQUENCY_HZ)?;
        std::thread::sleep(WATCHED);
        agent.stop()?;
        let mut of_processes: Vec<(Duration, bool)> = samples
            .try_iter()
            .filter(|sample| pids.contains(&sample.tgid))
            .map(|sample| {
                (Duration::from_nanos(sample.time_ns.saturating_sub(start_ns)), sample.stop.is_complete())
            })
            .collect();
        of_processes.sort_unstable();
        let first = &of_processes[..of_processes.partition_point(|(time, _)| *time < Duration::from_secs(5))];
        let complete = first.iter().filter(|(_, complete)| *complete).count();
        println!(
            "| {name} | {:.1} s | {} | {:.1} % |",
            whole_from(&of_processes).context("never whole")?.as_secs_f64(),
            first.len(),
            100.0 * complete as f64 / first.len() as f64
        );
    }
    println!(
        "\n{IMAGES} images of 57 frames, {EACH} processes of each, which together keep a core or so busy, at {FREQUENCY_HZ} Hz; from \
         before the program is loaded to the earliest time from which on, for {} s, each second's samples are {:.0} % complete.\n",
        WATCHED.as_secs(),
        100.0 * WHOLE
    );
    Ok(())
}

/// The earliest time from which on the samples of each second are complete, but for one in a hundred.
fn whole_from(samples: &[(Duration, bool)]) -> Option<Duration> {
    let is_whole = |from: usize| {
        let end = samples[from].0 + Duration::from_secs(1);
        let second = &samples[from..samples.partition_point(|(time, _)| *time < end)];
        second.iter().filter(|(_, complete)| *complete).count() as f64 >= WHOLE * second.len() as f64
    };
    // The last second is shorter with each sample, and says less.
    let last = samples.last()?.0.saturating_sub(Duration::from_secs(1));
    let seconds = ..samples.partition_point(|(time, _)| *time <= last);
    let broken = (0..samples[seconds].len()).rev().find(|from| !is_whole(*from));
    samples.get(broken.map_or(0, |from| from + 1)).map(|(time, _)| *time)
}

/// What 10,000 processes a minute do to the agent, and to the samples of another program.
pub(crate) fn print_storm() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let service = Service::start(folder.path())?;
    let program = Program::images(folder.path(), 1)?.remove(0);
    let steady = program.start_one()?;
    let (agent, samples, turns) =
        watching::start_with_turns(&service, &folder.path().join("cache"), FREQUENCY_HZ)?;
    std::thread::sleep(SETTLE);
    let (entries, memory) = (turns.entries(SETTLE / 8), process_memory(std::process::id())?.0);
    samples.try_iter().for_each(drop);
    let (start, mut of_steady) = (Instant::now(), Vec::new());
    let is_steady = |sample: &Sample| steady.pids().contains(&sample.tgid);
    for number in 0..SHORT {
        std::thread::sleep((MINUTE * number / SHORT).saturating_sub(start.elapsed()));
        Command::new("true").stdout(Stdio::null()).status().context("run true")?;
        of_steady.extend(samples.try_iter().filter(is_steady).map(|sample| sample.stop.is_complete()));
    }
    let (took, work) = (start.elapsed(), turns.longest_work());
    std::thread::sleep(SETTLE);
    samples.try_iter().for_each(drop);
    let (entries_after, memory_after) = (turns.entries(SETTLE / 8), process_memory(std::process::id())?.0);
    let lost = agent.stop()?.lost_samples;
    let complete = of_steady.iter().filter(|complete| **complete).count();
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    println!("### {SHORT} processes a minute\n\n| | before | after |\n|---|---:|---:|");
    println!("| entries of processes in the kernel | {entries} | {entries_after} |");
    println!(
        "| RSS of this process, the agent in it | {:.1} MiB | {:.1} MiB |",
        mib(memory),
        mib(memory_after)
    );
    println!(
        "\n`true`, {SHORT} times in {:.0} s, beside a program of 57 frames of which {complete} of {} samples were complete \
         meanwhile; {lost} samples lost; the agent's loop was never away from its events for longer than {:.0} ms.\n",
        took.as_secs_f64(),
        of_steady.len(),
        1e3 * work.as_secs_f64()
    );
    Ok(())
}
