//! How long is a frame of the walk in the kernel, and what is the least that its parts take?
//!
//! Peers give a program's time a sample, in which the machine's caches and everything around the walk have their part, or
//! nothing. Here the sampling program's own walk runs over this thread's stack, again and again, and stands beside a loop
//! for each thing that it cannot do without: reading user memory, looking up maps.

use std::arch::asm;
use std::ffi::c_void;
use std::hint::black_box;

use anyhow::{Context as _, Result};
use windlass_schema::StopReason;

use crate::process_tables::ProcessTables;
use crate::timing::{Measured, Timing};

/// Frames of the stacks that are walked: a shallow one (no fewer than a Rust program starts with), a usual one, that of the deep workload, a very deep one.
const FRAMES: [u64; 4] = [8, 32, 57, 128];
/// Walks of each stack.
const RUNS: usize = 3000;
/// Turns of a primitive's loop, and runs of the loop.
const TURNS: u64 = 4096;
const LOOPS: usize = 200;
/// What a walk is made of: programs, and what a turn of their loop does.
const PRIMITIVES: [(&str, &str); 8] = [
    ("windlass_time_read_8", "bpf_probe_read_user, 8 bytes"),
    ("windlass_time_read_16", "bpf_probe_read_user, 16 bytes"),
    ("windlass_time_read_64", "bpf_probe_read_user, 64 bytes"),
    ("windlass_time_read_256", "bpf_probe_read_user, 256 bytes"),
    ("windlass_time_scratch", "lookup in a per-CPU array"),
    ("windlass_time_chunk", "lookup of a chunk: a map of maps, an array"),
    ("windlass_time_process", "lookup in a hash, 4-byte key"),
    ("windlass_time_segment", "lookup in a hash, 8-byte key"),
];
/// A loop without anything in it.
const TURN: &str = "windlass_time_turn";
const WALK: &str = "windlass_time_walk";
/// Forgets the records that walks remember.
const FORGET: &str = "windlass_forget";

/// Registers of the frame from which a walk starts.
#[derive(Clone, Copy)]
struct Start {
    rip: u64,
    rsp: u64,
    rbp: u64,
}

/// What is to be done at the bottom of a stack.
type Bottom<'a> = &'a mut dyn FnMut(Start);

pub(crate) fn print() -> Result<()> {
    let mut timing = Timing::load()?;
    let _tables = ProcessTables::place(&mut timing.bpf, std::process::id())?;
    let turn = per_turn(&mut timing, TURN)?;
    let no_turns: Result<Vec<u64>> = (0..RUNS).map(|_| Ok(timing.run(TURN, &[0])?.ns)).collect();
    let clock = TimesNs::new(no_turns?);
    println!("### Walk in the kernel\n");
    println!("| stack | frames | ns a walk, best | median | ns a frame, best | median | each further |");
    println!("|---|---:|---:|---:|---:|---:|---:|");
    for (name, descend, forgets) in [
        ("one function", recurse as Descend, false),
        ("qsort and its callback", sort, false),
        ("the same, each record looked up once", sort, true),
    ] {
        let mut first = None;
        for frames in FRAMES {
            let (times, frames) = walks(&mut timing, descend, frames, forgets)?;
            let (best, median) = (times.best - clock.best, times.median - clock.best);
            let first = first.get_or_insert((frames, median));
            let slope = match frames - first.0 {
                0 => String::new(),
                more => format!("{:.1}", (median - first.1) / more as f64),
            };
            println!(
                "| {name} | {frames} | {best:.0} | {median:.0} | {:.1} | {:.1} | {slope} |",
                best / frames as f64,
                median / frames as f64
            );
        }
    }
    println!("\n| primitive | ns |\n|---|---:|\n| turn of bpf_loop | {turn:.1} |");
    for (program, what) in PRIMITIVES {
        println!("| {what} | {:.1} |", per_turn(&mut timing, program)? - turn);
    }
    println!(
        "\nThe walk of the sampling program, with what it does before and after, on a stack of this process that is in the \
         caches, of records that a walk before has looked up unless it says otherwise; {RUNS} runs of each, less what two \
         readings of the clock take ({:.0} ns). Primitives: loops of {TURNS} turns, best of {LOOPS}, less the empty turn.\n",
        clock.best
    );
    Ok(())
}

/// Nanoseconds of many runs.
struct TimesNs {
    best: f64,
    median: f64,
}

impl TimesNs {
    fn new(mut all: Vec<u64>) -> Self {
        all.sort_unstable();
        Self { best: all[0] as f64, median: all[all.len() / 2] as f64 }
    }
}

/// Nanoseconds of one turn of a primitive's loop.
fn per_turn(timing: &mut Timing, program: &str) -> Result<f64> {
    let words = [1u64; 32];
    let mut best = u64::MAX;
    for _ in 0..LOOPS {
        best = best.min(timing.run(program, &[TURNS, black_box(words.as_ptr()) as u64, 0])?.ns);
    }
    Ok(best as f64 / TURNS as f64)
}

/// Puts so many levels on the stack and calls what is to be done at the bottom.
type Descend = fn(u64, Bottom<'_>) -> u64;

/// Times of walks of a stack that `descend` makes, of about so many frames, and how many they are.
fn walks(timing: &mut Timing, descend: Descend, frames: u64, forgets: bool) -> Result<(TimesNs, u64)> {
    let (none, one) = (walk_once(timing, descend, 0)?.frames, walk_once(timing, descend, 1)?.frames);
    let levels = frames.saturating_sub(none).div_ceil(one - none);
    let mut all = Ok(Vec::with_capacity(RUNS));
    let mut seen = 0;
    descend(levels, &mut |start| {
        for _ in 0..RUNS {
            let forgotten = if forgets { timing.run(FORGET, &[]).map(drop) } else { Ok(()) };
            match (forgotten.and_then(|()| run_walk(timing, start)), &mut all) {
                (Ok(measured), Ok(all)) => {
                    seen = measured.frames;
                    all.push(measured.ns);
                }
                (Err(error), all) => *all = Err(error),
                _ => {}
            }
        }
    });
    Ok((TimesNs::new(all?), seen))
}

fn walk_once(timing: &mut Timing, descend: Descend, levels: u64) -> Result<Measured> {
    let mut result = None;
    descend(levels, &mut |start| result = Some(run_walk(timing, start)));
    result.context("nothing was called at the bottom")?
}

/// Walks from `start`; an error unless the walk is complete.
fn run_walk(timing: &mut Timing, start: Start) -> Result<Measured> {
    let measured = timing.run(WALK, &[start.rip, start.rsp, start.rbp])?;
    let stop = u8::try_from(measured.stop).ok().and_then(|code| StopReason::try_from(code).ok());
    anyhow::ensure!(
        stop.is_some_and(StopReason::is_complete),
        "a walk ended after {} frames: {stop:?}",
        measured.frames
    );
    Ok(measured)
}

/// Calls `bottom` with the registers of this frame, which stays until it returns.
#[inline(never)]
fn at_bottom(bottom: Bottom<'_>) {
    let (rip, rsp, rbp): (u64, u64, u64);
    // SAFETY: registers are copied, nothing else.
    unsafe {
        asm!("lea {0}, [rip]", "mov {1}, rsp", "mov {2}, rbp", out(reg) rip, out(reg) rsp, out(reg) rbp,
            options(nomem, nostack, preserves_flags));
    }
    bottom(Start { rip, rsp, rbp });
    black_box(rip);
}

/// Levels of one frame each, all of one function.
#[inline(never)]
fn recurse(levels: u64, bottom: Bottom<'_>) -> u64 {
    if levels == 0 {
        at_bottom(bottom);
        return 0;
    }
    // The addition keeps the call from becoming a jump.
    black_box(recurse(levels - 1, bottom)) + 1
}

/// What a callback of `qsort` goes on with.
struct Level<'a, 'b> {
    levels: u64,
    bottom: Bottom<'a>,
    done: &'b mut bool,
}

/// Levels of several frames each, in two images in turn: `qsort` of two elements, whose callback does the next.
#[inline(never)]
fn sort(levels: u64, bottom: Bottom<'_>) -> u64 {
    if levels == 0 {
        at_bottom(bottom);
        return 0;
    }
    let mut done = false;
    let mut level = Level { levels: levels - 1, bottom, done: &mut done };
    let mut elements = [&raw mut level; 2];
    // SAFETY: two elements of a pointer's size; the callback gets pointers to them.
    unsafe {
        libc::qsort(elements.as_mut_ptr().cast(), 2, size_of::<*mut Level<'_, '_>>(), Some(compare));
    }
    black_box(levels)
}

/// Goes one level deeper the first time.
unsafe extern "C" fn compare(left: *const c_void, _right: *const c_void) -> i32 {
    // SAFETY: elements point to a level that lives until the sort is done, and nothing else uses it meanwhile.
    let level = unsafe { &mut **left.cast::<*mut Level<'_, '_>>() };
    if !std::mem::replace(level.done, true) {
        sort(level.levels, level.bottom);
    }
    0
}
