//! The walk against framehop, gdb, and the book, over registers and memory of real threads.
//!
//! Unwinders are tried on programs that happen to run, and a wrong frame goes unnoticed as long as it
//! looks like one. Here real programs are stopped at moments of no one's choosing and one instruction after
//! the other, so that prologues, epilogues, lazy binding and signal frames get their turn; every frame must be
//! the one that an interpreter of the full CFI finds, and the one that framehop finds wherever framehop
//! can follow (see [`cfi::Cfi::framehop_follows`] for where it cannot). A stack may end early with its reason,
//! never elsewhere.

pub(crate) mod call_stack;
mod cfi;
pub(crate) mod comparison;
pub(crate) mod debugger;
mod images;
pub(crate) mod tracee;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use object::{Object as _, ObjectSymbol as _};
use windlass_schema::{ImageAddress, StopReason};
use windlass_tests::program::{checkout, fixture, program, run};
use windlass_workload::{EXECUTABLE_NAME, write_executable};

use crate::chunks::Random;
use call_stack::CallStack;
use comparison::{Comparison, Tally};
use debugger::stacks_in_gdb;
use images::ProcessImages;
use tracee::Tracee;

/// Threads of the workload.
const WORKLOAD_THREADS: usize = 3;
/// Moments at which the workload is stopped, and each of the other programs.
const WORKLOAD_MOMENTS: usize = 200;
const OTHER_MOMENTS: usize = 60;
/// Instructions that a thread is followed from each moment on.
const STEPS: usize = 12;
/// Longest time between two moments.
const BETWEEN_US: u64 = 6000;
/// Smallest share of walks that reach the end of the stack; other programs may have code without CFI.
const MIN_COMPLETE: f64 = 0.99;
const MIN_COMPLETE_OTHERS: f64 = 0.9;
/// Frames of the workload's deepest stacks, about.
const DEEP: usize = 95;
/// Instructions behind `leave` in the epilogue of an over-aligned frame.
const EPILOGUE_INSTRUCTIONS: usize = 2;
/// Most instructions that a program may take from `main` to its end. The fixture takes about 4,000.
const MAX_INSTRUCTIONS: usize = 100_000;
/// Frames of the deepest stack of `jit.c` that are its own: three for each level.
pub(crate) const JIT_FRAMES: usize = 60;
/// How often the workload is shown to gdb.
const GDB_MOMENTS: usize = 2;

/// Stops the threads of a program at random moments and follows each for a few instructions.
fn sample(tracee: &mut Tracee, path_end: &str, threads: &[i32], moments: usize) -> Comparison {
    let mut comparison = Comparison::new(tracee.pid(), path_end);
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for moment in 0..moments {
        std::thread::sleep(Duration::from_micros(random.below(BETWEEN_US)));
        let tid = threads[moment % threads.len()];
        let mut registers = tracee.interrupt(tid).expect("runs on until it is ended");
        comparison.images.refresh(tracee.pid());
        for step in 0..=STEPS {
            comparison.check(tid, tracee.memory(), registers);
            if step < STEPS {
                registers = tracee.step(tid).expect("runs on until it is ended");
            }
        }
        tracee.release(tid);
    }
    comparison
}

#[track_caller]
fn assert_complete(name: &str, tally: &Tally, least: f64) {
    let share = tally.complete as f64 / tally.walks as f64;
    assert!(share >= least, "{name}: {:.1} % of {} complete; {:?}", 100.0 * share, tally.walks, tally.cut);
    assert!(tally.by_framehop > 2 * tally.walks, "{name}: framehop followed {} steps", tally.by_framehop);
}

#[test]
fn workload_at_random_moments() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let path = write_executable(folder.path()).expect("write the workload");
    let mut tracee = Tracee::start(Command::new(path).arg("120"));
    let threads = tracee.trace(WORKLOAD_THREADS);
    let tally = sample(&mut tracee, EXECUTABLE_NAME, &threads, WORKLOAD_MOMENTS).tally;
    assert_complete("workload", &tally, MIN_COMPLETE);
    assert!(tally.deepest >= DEEP, "the deepest stack has {} frames", tally.deepest);
}

/// Programs of the machine at work; what is not there is skipped.
#[test]
fn other_programs_at_random_moments() {
    let test = "walks::other_programs_at_random_moments";
    let python = "def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)\n\
        while True: sorted(range(500), key=lambda n: fib(n % 9)); eval('1 + ' * 50 + '1')";
    let perl = "sub fib { my $n = shift; $n < 2 ? $n : fib($n - 1) + fib($n - 2) } \
        while (1) { my @a = sort { fib($a % 9) <=> fib($b % 9) } 1 .. 100; \"@a\" =~ /(\\d+ )*99/; }";
    let bash = "fib() { if ((n < 2)); then r=1; else ((n--, 1)); fib; fi; }; while :; do n=9; fib; done";
    for (name, arguments) in [
        ("python3", &["-c", python][..]),
        ("perl", &["-e", perl]),
        ("bash", &["-c", bash]),
        ("gzip", &["-9", "-c", "/dev/zero"]),
        ("openssl", &["speed", "-seconds", "60", "rsa2048"]),
    ] {
        let Some(path) = machine_program(test, name) else { continue };
        let mut tracee = Tracee::start(Command::new(&path).args(arguments));
        // Behind its start: then it does what it is told.
        std::thread::sleep(Duration::from_millis(100));
        let threads = tracee.trace(1);
        let path = std::fs::read_link(format!("/proc/{}/exe", tracee.pid())).expect("its program");
        let name = path.file_name().expect("a file").to_string_lossy().into_owned();
        let tally = sample(&mut tracee, &name, &threads[..1], OTHER_MOMENTS).tally;
        assert_complete(&name, &tally, MIN_COMPLETE_OTHERS);
    }
}

/// The system's own program rather than a script in front of it.
fn machine_program(test: &str, name: &str) -> Option<std::path::PathBuf> {
    let system = Path::new("/usr/bin").join(name);
    if system.is_file() { Some(system) } else { program(test, name) }
}

/// Follows a program from a function to its end, one instruction after the other. Besides the other proofs,
/// every frame must be one that a call, or a signal, left on the stack.
fn follow_every_instruction(path: &Path, from: &str) -> Tally {
    let name = format!("/{}", path.file_name().expect("a file").to_string_lossy());
    let mut tracee = Tracee::start_stopped(&mut Command::new(path));
    let pid = tracee.pid();
    let elf = std::fs::read(path).expect("a program");
    let elf = object::File::parse(&elf[..]).expect("ELF");
    let first = elf.symbols().find(|symbol| symbol.name() == Ok(from)).expect("a function of the program");
    let (bias, _) = ProcessImages::read(pid).program(&name).expect("a process maps its program");
    let mut registers = tracee.run_to(ImageAddress::new(first.address()).to_process(bias).get());
    // The loader is done by now, all libraries are mapped.
    let mut comparison = Comparison::new(pid, &name);
    let at_first = comparison.check(pid, tracee.memory(), registers);
    let mut truth = CallStack::of(&at_first.frames);
    for _ in 0..MAX_INSTRUCTIONS {
        let signal = tracee.has_signal(pid);
        let Some(after) = tracee.step(pid) else { return comparison.tally };
        if after.rip == registers.rip && tracee.has_signal(pid) {
            // Stopped to be given a signal: nothing has run.
            continue;
        }
        truth.step(&registers, &after, signal, tracee.memory());
        registers = after;
        let walked = comparison.check(pid, tracee.memory(), registers);
        assert!(
            truth.has(&walked.frames, walked.stop.is_complete()),
            "{}\n{truth:x?}",
            comparison.print(&walked)
        );
    }
    panic!("{} does not end", path.display());
}

/// Every instruction from `main` to the end: over-aligned and variable frames, lazy binding of each function,
/// a signal handler on a stack of its own.
#[test]
fn every_instruction_of_hard_frames() {
    let tally = follow_every_instruction(&fixture("frames"), "main");
    assert_rightly_cut(&tally);
    // The handler returns through a signal frame, and the over-aligned frame's CFA is in memory.
    assert!(tally.beyond_framehop > 100, "{} steps", tally.beyond_framehop);
}

/// The same where every function has a frame pointer. GCC's CFI says of an over-aligned frame that rbp is saved
/// where rbp points, and says so still when `leave` has made it the caller's: who believes it skips a frame.
#[test]
fn every_instruction_of_hard_frames_with_frame_pointers() {
    let test = "walks::every_instruction_of_hard_frames_with_frame_pointers";
    let Some(compiler) = program(test, "cc") else { return };
    let folder = tempfile::tempdir().expect("temporary folder");
    let (source, path) = (folder.path().join("nested.c"), folder.path().join("nested"));
    let fixture = checkout().join("fixtures/sources/frames.c");
    let nested = format!(
        "#define main inner\n#include \"{}\"\n#undef main\n\
        __attribute__((noinline)) int outer(int argc, char **argv) {{ return inner(argc, argv) + 1; }}\n\
        int main(int argc, char **argv) {{ return outer(argc, argv) - 1; }}\n",
        fixture.display()
    );
    std::fs::write(&source, nested).expect("write a source");
    run(Command::new(compiler).args(["-O2", "-fno-omit-frame-pointer", "-o"]).args([&path, &source]), &[0]);
    let tally = follow_every_instruction(&path, "main");
    assert_rightly_cut(&tally);
}

/// Every instruction of code in anonymous memory that has frame pointers and nothing else, of the C that it calls, and of
/// the C that calls it.
#[test]
fn every_instruction_of_code_without_an_image() {
    let test = "walks::every_instruction_of_code_without_an_image";
    let Some(compiler) = program(test, "cc") else { return };
    let folder = tempfile::tempdir().expect("temporary folder");
    let path = build_jit(&compiler, folder.path());
    let tally = follow_every_instruction(&path, "descend");
    assert_rightly_cut(&tally);
    assert!(tally.deepest > JIT_FRAMES, "the deepest stack has {} frames", tally.deepest);
}

/// Builds the program whose stacks alternate between C and code in anonymous memory.
pub(crate) fn build_jit(compiler: &Path, folder: &Path) -> PathBuf {
    let (path, source) = (folder.join("jit"), checkout().join("tests/programs/jit.c"));
    let mut command = Command::new(compiler);
    run(command.args(["-O2", "-fomit-frame-pointer", "-Wl,--build-id", "-o"]).args([&path, &source]), &[0]);
    path
}

/// A walk may be cut short in the loader's lazy binding, whose CFA is in a register that walks do not keep (rbx), and
/// in two instructions of `realigned`'s epilogue. Not in code without CFI, which a compiler links in to start a program.
#[track_caller]
fn assert_rightly_cut(tally: &Tally) {
    let mut others = 0;
    for ((stop, place), count) in &tally.cut {
        match stop {
            StopReason::RegisterUnknown if place.contains("/ld-linux") => {}
            _ => others += count,
        }
    }
    assert!(others <= EPILOGUE_INSTRUCTIONS, "{:?}", tally.cut);
    assert!(tally.complete > 500, "{} of {} walks are complete", tally.complete, tally.walks);
}

/// Every frame that gdb finds in every thread, inlined ones folded into theirs: its address and its CFA.
#[test]
fn same_frames_as_gdb() {
    let Some(gdb) = program("walks::same_frames_as_gdb", "gdb") else { return };
    let folder = tempfile::tempdir().expect("temporary folder");
    let path = write_executable(folder.path()).expect("write the workload");
    for moment in 0..GDB_MOMENTS as u64 {
        let mut tracee = Tracee::start(Command::new(&path).arg("120"));
        tracee.wait_for_threads(WORKLOAD_THREADS);
        std::thread::sleep(Duration::from_millis(15 + 20 * moment));
        tracee.freeze();
        let threads = tracee.trace(WORKLOAD_THREADS);
        let mut comparison = Comparison::new(tracee.pid(), EXECUTABLE_NAME);
        let walks: Vec<_> = threads
            .iter()
            .map(|tid| {
                let registers = tracee.interrupt(*tid).expect("a stopped thread");
                (*tid, comparison.check(*tid, tracee.memory(), registers))
            })
            .collect();
        tracee.detach();
        let stacks = stacks_in_gdb(&gdb, tracee.pid());
        for (tid, walked) in walks {
            let theirs = stacks.get(&tid).unwrap_or_else(|| panic!("gdb shows no thread {tid}"));
            let ours: Vec<u64> = walked.frames.iter().map(|frame| frame.rip).collect();
            let addresses: Vec<u64> = theirs.iter().map(|frame| frame.rip).collect();
            // A thread that has not run yet stands behind `clone3`'s system call, where neither CFI nor instructions say
            // whether this is the new thread or the one that made it; gdb takes the word at rsp, 0, for a frame.
            if walked.stop == StopReason::NoCfi && ours.len() == 1 && addresses == [ours[0], 0] {
                continue;
            }
            assert_eq!(ours, addresses, "thread {tid}\n{}", comparison.print(&walked));
            // A frame's CFA is its caller's stack pointer.
            let ours = walked.frames[1..].iter().map(|frame| frame.general[7]);
            assert!(ours.eq(theirs[..theirs.len() - 1].iter().map(|frame| frame.cfa)), "{theirs:x?}");
        }
    }
}
