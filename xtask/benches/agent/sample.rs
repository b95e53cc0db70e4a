//! How long does the sampling program take for a sample of a program that is known?
//!
//! On a whole machine, its time is that of samples of whatever runs, of idle CPUs as well. Here it samples the threads of one
//! program and nothing else, with that program's tables in its maps, so that the figure is of these stacks, however
//! busy the machine is; what else the caches hold is as programs leave it between two samples.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use aya::Ebpf;
use aya::maps::RingBuf;
use aya::programs::PerfEvent;
use aya::programs::perf_event::{PerfEventConfig, PerfEventScope, SamplePolicy, SoftwareEvent};
use windlass_agent::process::living_threads;
use windlass_schema::StopReason;
use windlass_schema::maps::{SampleHeader, names};

use crate::busy::Program;
use crate::kernel_figures::{BpfStats, program_time};
use crate::process_tables::ProcessTables;
use crate::timing::load_object;

const FREQUENCY_HZ: u64 = 97;
/// How long a program may take to get to its usual stacks, and how long it is sampled.
const SETTLE: Duration = Duration::from_secs(1);
const MEASURE: Duration = Duration::from_secs(10);
/// How often samples are read: as often as an agent does that nothing wakes.
const READ: Duration = Duration::from_millis(100);

/// What samples of a program came to.
struct Sampled {
    samples: u64,
    time: Duration,
    user_frames: u64,
    complete: u64,
    verified_instructions: u32,
}

pub(crate) fn print() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let _stats = BpfStats::enable()?;
    println!("### A sample of a known program\n");
    println!("| program | samples | complete | frames | BPF time a sample |\n|---|---:|---:|---:|---:|");
    let mut verified = 0;
    for program in Program::all(folder.path())? {
        let sampled = sample(&program)?;
        let samples = sampled.samples as f64;
        println!(
            "| {} | {samples} | {:.1} % | {:.1} | {:.2} µs |",
            program.name,
            100.0 * sampled.complete as f64 / samples,
            sampled.user_frames as f64 / samples,
            sampled.time.as_secs_f64() * 1e6 / samples
        );
        verified = sampled.verified_instructions;
    }
    println!(
        "\n{} s each at {FREQUENCY_HZ} Hz, of that program's threads alone; the whole sampling program with the record it puts \
         into the ring: `run_time_ns` over `run_cnt`. The verifier goes through {verified} instructions of it.\n",
        MEASURE.as_secs()
    );
    Ok(())
}

fn sample(program: &Program) -> Result<Sampled> {
    let running = program.start_one()?;
    std::thread::sleep(SETTLE);
    let pid = running.pids()[0];
    let mut bpf = load_object()?;
    // While all of its maps are open.
    let verified_instructions = load(&mut bpf)?;
    let _tables = ProcessTables::place(&mut bpf, pid)?;
    let ring = bpf.take_map(names::SAMPLES).with_context(|| format!("no map {}", names::SAMPLES))?;
    let mut ring = RingBuf::try_from(ring)?;
    attach(&mut bpf, pid)?;
    let (mut user_frames, mut complete) = (0, 0);
    let end = Instant::now() + MEASURE;
    while Instant::now() < end {
        std::thread::sleep(READ);
        while let Some(bytes) = ring.next() {
            let Some((header, _)) = bytes.split_first_chunk::<{ size_of::<SampleHeader>() }>() else {
                continue;
            };
            // SAFETY: the bytes are as many as a header has, which any are; the read is unaligned.
            let header = unsafe { header.as_ptr().cast::<SampleHeader>().read_unaligned() };
            user_frames += u64::from(header.user_frames);
            complete += u64::from(StopReason::try_from(header.stop).is_ok_and(StopReason::is_complete));
        }
    }
    let (time, samples) = program_time(std::process::id(), names::PROGRAM)?;
    Ok(Sampled { samples, time, user_frames, complete, verified_instructions })
}

fn sampling_program(bpf: &mut Ebpf) -> Result<&mut PerfEvent> {
    let program =
        bpf.program_mut(names::PROGRAM).with_context(|| format!("no program {}", names::PROGRAM))?;
    Ok(program.try_into()?)
}

/// Loads the sampling program; the instructions that the verifier went through.
fn load(bpf: &mut Ebpf) -> Result<u32> {
    let program = sampling_program(bpf)?;
    program.load()?;
    Ok(program.info()?.verified_instruction_count().unwrap_or(0))
}

/// Samples the threads that a process has.
fn attach(bpf: &mut Ebpf, pid: u32) -> Result<()> {
    let program = sampling_program(bpf)?;
    for tid in living_threads(pid) {
        program.attach(
            PerfEventConfig::Software(SoftwareEvent::CpuClock),
            PerfEventScope::OneProcess { pid: tid, cpu: None },
            SamplePolicy::Frequency(FREQUENCY_HZ),
            false,
        )?;
    }
    Ok(())
}
