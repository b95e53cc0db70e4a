//! How soon is a new process seen whole, and how much is seen of processes that end soon?

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use windlass_agent::backend::Sample;

use crate::busy::{Program, SHORT_NAME};
use crate::installed::Service;
use crate::watching;

const FREQUENCY_HZ: u32 = 97;
/// Images of which the first process is awaited.
const IMAGES: u8 = 9;
/// Longest wait for a complete stack.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long processes of a tenth of a second follow each other.
const SHORT: Duration = Duration::from_secs(20);
/// How long an agent may take until tables are there.
const SETTLE: Duration = Duration::from_secs(5);

/// Time from the start of a process of a new image to its first complete stack.
pub(crate) fn print_first() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let programs = Program::images(folder.path(), IMAGES)?;
    let service = Service::start(folder.path())?;
    let known = folder.path().join("known");
    println!("### New process to first complete stack\n\n| tables | median | longest |\n|---|---:|---:|");
    for (name, cache) in [
        ("nowhere: the agent sends a skeleton, the service compiles it", known.clone()),
        ("in the service", folder.path().join("empty")),
        ("in the disk cache", known),
    ] {
        let mut all = first_complete(&service, &cache, &programs)?;
        all.sort();
        let ms = |time: Duration| 1e3 * time.as_secs_f64();
        println!("| {name} | {:.0} ms | {:.0} ms |", ms(all[all.len() / 2]), ms(all[all.len() - 1]));
    }
    println!(
        "\n{IMAGES} programs of 57 frames, each an image of its own, one after the other under an agent at {FREQUENCY_HZ} Hz; \
         from before the process is started to the time of its first complete sample, with up to {} ms in which none is due.\n",
        1000 / FREQUENCY_HZ
    );
    Ok(())
}

fn first_complete(service: &Service, cache: &Path, programs: &[Program]) -> Result<Vec<Duration>> {
    let (agent, samples) = watching::start(service, cache, FREQUENCY_HZ)?;
    std::thread::sleep(SETTLE);
    let mut all = Vec::new();
    for program in programs {
        let start = monotonic_ns();
        let running = program.start_one()?;
        let is_sought = |sample: &Sample| {
            running.pids().contains(&sample.tgid) && sample.stop.is_complete() && sample.user.len() > 50
        };
        let sample = next(&samples, is_sought).context("no complete stack")?;
        all.push(Duration::from_nanos(sample.time_ns.saturating_sub(start)));
    }
    agent.stop()?;
    Ok(all)
}

/// The next sample that is sought.
fn next(samples: &Receiver<Sample>, is_sought: impl Fn(&Sample) -> bool) -> Option<Sample> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match samples.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(sample) if is_sought(&sample) => return Some(sample),
            Ok(_) => {}
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return None,
        }
    }
}

/// The clock of samples.
pub(crate) fn monotonic_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: fills the struct that it is given.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Samples of processes that run for a tenth of a second, beside those of perf at the same time.
pub(crate) fn print_short() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (program, data) = (Program::short(folder.path())?, folder.path().join("perf.data"));
    let service = Service::start(folder.path())?;
    let _running = program.start()?;
    let (agent, samples) = watching::start(&service, &folder.path().join("cache"), FREQUENCY_HZ)?;
    std::thread::sleep(SETTLE);
    let mut record = Command::new("perf");
    // The clock of samples, so that both count what fell into the same time.
    record.args(["record", "-q", "-k", "mono", "-F", &FREQUENCY_HZ.to_string(), "-a", "-o"]).arg(&data);
    record.args(["--", "sleep", &SHORT.as_secs().to_string()]).stdout(Stdio::null()).stderr(Stdio::null());
    let status = record.status().context("run perf")?;
    anyhow::ensure!(status.success(), "perf record: {status}");
    agent.stop()?;
    let perf = perf_times_ns(&data)?;
    let (first, last) = perf.first().zip(perf.last()).context("perf has no samples")?;
    let of_program: Vec<Sample> = samples
        .try_iter()
        .filter(|sample| sample.comm == SHORT_NAME && (*first..=*last).contains(&sample.time_ns))
        .collect();
    let perf = perf.len();
    let complete = of_program.iter().filter(|sample| sample.stop.is_complete()).count();
    println!("### Processes of 0.1 s\n\n| | samples | share of perf's |\n|---|---:|---:|");
    println!("| perf | {perf} | |");
    for (name, count) in [("agent", of_program.len()), ("agent, complete", complete)] {
        println!("| {name} | {count} | {:.1} % |", 100.0 * count as f64 / perf as f64);
    }
    let mut reasons = std::collections::BTreeMap::<_, usize>::new();
    for sample in of_program.iter().filter(|sample| !sample.stop.is_complete()) {
        *reasons.entry(sample.stop.as_str()).or_default() += 1;
    }
    println!(
        "\nOne after the other on each core, {} s, both profilers at {FREQUENCY_HZ} Hz. Not complete: {reasons:?}.\n",
        SHORT.as_secs()
    );
    Ok(())
}

/// When perf's samples of the program were taken, in order.
fn perf_times_ns(data: &Path) -> Result<Vec<u64>> {
    let mut script = Command::new("perf");
    script.args(["script", "--ns", "-F", "comm,time", "--comms", SHORT_NAME, "-i"]).arg(data);
    let text = script.stderr(Stdio::null()).output().context("run perf script")?.stdout;
    let mut times: Vec<u64> = String::from_utf8_lossy(&text).lines().filter_map(perf_time_ns).collect();
    times.sort_unstable();
    Ok(times)
}

/// `COMMAND SECONDS.NANOSECONDS:`
fn perf_time_ns(line: &str) -> Option<u64> {
    let (seconds, nanoseconds) = line.split_whitespace().last()?.strip_suffix(':')?.split_once('.')?;
    Some(seconds.parse::<u64>().ok()? * 1_000_000_000 + nanoseconds.parse::<u64>().ok()?)
}
