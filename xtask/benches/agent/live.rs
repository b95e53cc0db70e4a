//! What do a sample and the agent's process cost while programs run, and what does `perf record` beside them?
//!
//! A figure of an idle machine says little: the program then samples the idle task, and the agent sleeps. So every core is
//! busy, and both profilers watch the same programs one after the other.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use windlass_schema::maps::names;

use crate::busy::Program;
use crate::installed::{Service, start_agent};
use crate::kernel_figures::{
    BpfStats, maps_memory, process_memory, process_time, program_time, written_bytes,
};

/// How long an agent may take until tables are there, and how long is measured.
const SETTLE: Duration = Duration::from_secs(8);
const MEASURE: Duration = Duration::from_secs(20);
/// Frequencies: that of the comparison, and the default.
const FREQUENCIES_HZ: [u32; 2] = [97, 19];
/// Functions in which a complete stack ends, as perf names them.
const OUTERMOST: [&str; 5] = ["_start", "__clone3", "clone3", "__GI___clone3", "__clone"];

/// What an agent costs beside one program.
struct Cost {
    bpf_us_a_sample: f64,
    samples: u64,
    share: f64,
    rss_mib: f64,
    peak_mib: f64,
    kernel_mib: f64,
    written_mb: f64,
}

pub(crate) fn print() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let programs = Program::all(folder.path())?;
    let service = Service::start(folder.path())?;
    let _stats = BpfStats::enable()?;
    println!("### On busy programs\n");
    println!(
        "| one on each core | Hz | BPF time a sample | samples | agent, share of a core | RSS | peak | kernel memory | written |"
    );
    println!("|---|---:|---:|---:|---:|---:|---:|---:|---:|");
    for frequency_hz in FREQUENCIES_HZ {
        for program in &programs {
            let cost = agent_cost(program, &service, folder.path(), frequency_hz)?;
            println!(
                "| {} | {frequency_hz} | {:.2} µs | {} | {:.2} % | {:.1} MiB | {:.1} MiB | {:.1} MiB | {:.2} MB |",
                program.name,
                cost.bpf_us_a_sample,
                cost.samples,
                100.0 * cost.share,
                cost.rss_mib,
                cost.peak_mib,
                cost.kernel_mib,
                cost.written_mb
            );
        }
    }
    println!(
        "\nOver {} s after {} s to settle. BPF time: `run_time_ns` over `run_cnt` of the program, everything in it. Share: \
         user and system time of the agent's process, which ships what it samples; written: by it, to its spool and the service. \
         Kernel memory: of its BPF maps, with the tables of everything that ran.\n",
        MEASURE.as_secs(),
        SETTLE.as_secs()
    );
    Ok(())
}

fn agent_cost(program: &Program, service: &Service, folder: &Path, frequency_hz: u32) -> Result<Cost> {
    let _running = program.start()?;
    let agent = start_agent(service, folder, frequency_hz)?;
    std::thread::sleep(SETTLE);
    let (bpf, process, written) =
        (program_time(agent.pid(), names::PROGRAM)?, process_time(agent.pid())?, written_bytes(agent.pid())?);
    let start = Instant::now();
    std::thread::sleep(MEASURE);
    let elapsed = start.elapsed();
    let (bpf_after, process_after) = (program_time(agent.pid(), names::PROGRAM)?, process_time(agent.pid())?);
    let (rss, peak) = process_memory(agent.pid())?;
    let samples = bpf_after.1 - bpf.1;
    Ok(Cost {
        bpf_us_a_sample: (bpf_after.0 - bpf.0).as_secs_f64() * 1e6 / samples as f64,
        samples,
        share: (process_after - process).as_secs_f64() / elapsed.as_secs_f64(),
        rss_mib: rss as f64 / f64::from(1 << 20),
        peak_mib: peak as f64 / f64::from(1 << 20),
        kernel_mib: maps_memory(agent.pid())? as f64 / f64::from(1 << 20),
        written_mb: (written_bytes(agent.pid())? - written) as f64 / 1e6,
    })
}

/// `perf record` on the same programs.
pub(crate) fn print_perf() -> Result<()> {
    let folder = tempfile::tempdir()?;
    println!("### `perf record -F 99 -a --call-graph dwarf` on the same programs\n");
    println!(
        "| one on each core | CPU, share of a core | written | samples | complete |\n|---|---:|---:|---:|---:|"
    );
    for program in Program::all(folder.path())? {
        let running = program.start()?;
        std::thread::sleep(Duration::from_secs(1));
        let data = folder.path().join("perf.data");
        let before = children_time();
        let mut record = Command::new("perf");
        record.args(["record", "-q", "-F", "99", "-a", "--call-graph", "dwarf", "-o"]).arg(&data);
        record
            .args(["--", "sleep", &MEASURE.as_secs().to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let status = record.status().context("run perf")?;
        anyhow::ensure!(status.success(), "perf record: {status}");
        let cpu = children_time() - before;
        let bytes = std::fs::metadata(&data)?.len();
        let pids = running.pids();
        drop(running);
        let (samples, complete) = complete_stacks(&data, &pids)?;
        println!(
            "| {} | {:.2} % | {:.1} MB | {samples} | {:.1} % |",
            program.name,
            100.0 * cpu.as_secs_f64() / MEASURE.as_secs_f64(),
            bytes as f64 / 1e6,
            100.0 * complete as f64 / samples.max(1) as f64
        );
    }
    println!(
        "\nOver {} s. CPU of `perf record` itself, without `perf script`, which unwinds and names. Complete: stacks of the \
         program that end in the function where its process or thread began.\n",
        MEASURE.as_secs()
    );
    Ok(())
}

/// User and system time of all children that were waited for, and of theirs.
fn children_time() -> Duration {
    // SAFETY: all bytes zero are a value of this plain struct, which the call fills.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage);
        usage
    };
    let time =
        |time: libc::timeval| Duration::from_micros(time.tv_sec as u64 * 1_000_000 + time.tv_usec as u64);
    time(usage.ru_utime) + time(usage.ru_stime)
}

/// Stacks of some processes in perf's data, and those of them that are complete.
pub(crate) fn complete_stacks(data: &Path, pids: &[u32]) -> Result<(u64, u64)> {
    let mut script = Command::new("perf");
    let pids = pids.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    script.args(["script", "-F", "comm,ip,sym", "--pid", &pids, "-i"]).arg(data);
    let output = script.stderr(Stdio::null()).output().context("run perf script")?;
    let text = String::from_utf8_lossy(&output.stdout);
    // A stack is a line with the command's name, a line for each frame, an empty line.
    let outermost = text.split("\n\n").filter_map(|stack| {
        let last = stack.trim_end().lines().last()?;
        last.split_whitespace().nth(1)
    });
    let (mut all, mut complete) = (0, 0);
    for name in outermost {
        all += 1;
        complete += u64::from(OUTERMOST.contains(&name));
    }
    Ok((all, complete))
}
