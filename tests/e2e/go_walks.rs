//! Walks through Go, C called by Go, and Go called by C.
//!
//! Such a stack is in two or more pieces of memory: a goroutine's own, and that of the thread, on which C runs. Debuggers
//! lose it where it changes from one to the other, so it is the program's own call chains that walks are held against; and
//! of the thread that keeps crossing, every frame's return address has to be one that a call has left.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use object::{Object as _, ObjectSymbol as _};
use windlass_agent_ebpf::memory::StackMemory as _;
use windlass_schema::{LoadBias, StopReason};
use windlass_tests::program::{checkout, program, run};

use crate::walks::comparison::{Comparison, Walked, lookup_address};
use crate::walks::tracee::Tracee;

const PROGRAM: &str = "stacks";
/// Longest wait until all goroutines are where they stay. It takes milliseconds; machines under load take more.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a thread runs on between two looks at it.
const SLICE: Duration = Duration::from_micros(300);
/// How often the thread that keeps crossing is looked at.
const CROSSINGS: usize = 300;

/// Where goroutines stay: the functions on their stacks, innermost first. `_cgo_*_` is a name that cgo makes up,
/// with a hash in it.
const STAYING: [&[&str]; 3] = [
    &[
        "c_spins",
        "c_calls",
        "_cgo_*_Cfunc_c_calls",
        "asmcgocall",
        "cgocall",
        "_Cfunc_c_calls",
        "inC",
        "goexit",
    ],
    &[
        "goSpins",
        "_cgoexp_*_goSpins",
        "cgocallbackg1",
        "cgocallbackg",
        "cgocallback",
        "crosscall2",
        "goSpins",
        "c_calls_back",
        "_cgo_*_Cfunc_c_calls_back",
        "asmcgocall",
        "cgocall",
        "_Cfunc_c_calls_back",
        "inGoFromC",
        "goexit",
    ],
    &["spinsDeep", "inGo", "goexit"],
];
/// How often `spinsDeep` is on its stack.
const DEPTH: usize = 21;

/// The functions of the program.
struct Functions {
    bias: LoadBias,
    /// Start, end, name.
    all: BTreeMap<u64, (u64, String)>,
}

impl Functions {
    fn of(path: &Path, bias: LoadBias) -> Self {
        let elf = std::fs::read(path).expect("a program");
        let elf = object::File::parse(&elf[..]).expect("ELF");
        let functions = elf.symbols().filter(|symbol| symbol.kind() == object::SymbolKind::Text);
        let named = |symbol: object::Symbol<'_, '_>| {
            let end = symbol.address() + symbol.size();
            (symbol.address(), (end, short(symbol.name().unwrap_or_default())))
        };
        Self { bias, all: functions.filter(|symbol| symbol.size() > 0).map(named).collect() }
    }

    /// The functions on a stack, innermost first, neighbours with one name once; and how many frames that are.
    fn on(&self, walked: &Walked) -> Vec<(String, usize)> {
        let mut names: Vec<(String, usize)> = Vec::new();
        for frame in &walked.frames {
            let address = lookup_address(frame).to_image(self.bias).get();
            let function = self.all.range(..=address).next_back().filter(|(_, (end, _))| address < *end);
            let name = function.map_or("elsewhere".to_owned(), |(_, (_, name))| name.clone());
            match names.last_mut() {
                Some((last, count)) if *last == name => *count += 1,
                _ => names.push((name, 1)),
            }
        }
        names
    }
}

/// A name without its package, its ABI and cgo's hash.
fn short(name: &str) -> String {
    let name = name.strip_suffix(".abi0").unwrap_or(name);
    for prefix in ["_cgo_", "_cgoexp_"] {
        if let Some((_, rest)) = name.strip_prefix(prefix).and_then(|rest| rest.split_once('_')) {
            return format!("{prefix}*_{rest}");
        }
    }
    name.rsplit_once('.').map_or(name, |(_, last)| last).to_owned()
}

/// Whether a call ends just before `address`: `call rel32`, or `call` of a register or memory in up to seven bytes.
fn is_behind_call(tracee: &Tracee, address: u64) -> bool {
    let before = tracee.memory().words(address - 8);
    let bytes: [u8; 8] = before.map_or([0; 8], |[word]| word.to_le_bytes());
    let is_indirect = |length: usize| {
        let call = &bytes[8 - length..];
        let call = if call[0] & 0xf0 == 0x40 { &call[1..] } else { call };
        call.len() >= 2 && call[0] == 0xff && call[1] >> 3 & 7 == 2
    };
    bytes[3] == 0xe8 || (2..=7).any(is_indirect)
}

fn build(test: &str, folder: &Path) -> Option<std::path::PathBuf> {
    let go = program(test, "go")?;
    let path = folder.join(PROGRAM);
    let mut build = Command::new(go);
    build.args(["build", "-o"]).arg(&path).arg(checkout().join("tests/programs/stacks.go"));
    build.env("CGO_ENABLED", "1").env("GOCACHE", folder.join("cache"));
    run(&mut build, &[0]);
    Some(path)
}

#[test]
fn goroutines_that_stay_and_cross() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let Some(path) = build("go_walks::goroutines_that_stay_and_cross", folder.path()) else { return };
    // Signals that preempt goroutines have frames of their own, which are cut short with a reason.
    let mut command = Command::new(&path);
    command.env("GODEBUG", "asyncpreemptoff=1").env("GOGC", "off").env("GOMAXPROCS", "8");
    let mut tracee = Tracee::start(&mut command);
    // One for each of four goroutines, and the first.
    tracee.wait_for_threads(1 + STAYING.len() + 1);
    let start = Instant::now();
    let threads = loop {
        let threads = tracee.trace_all();
        let comparison = Comparison::new(tracee.pid(), PROGRAM);
        let (bias, _) = comparison.images.program(PROGRAM).expect("a process maps its program");
        let functions = Functions::of(&path, bias);
        let innermost = |tid: &i32, tracee: &mut Tracee| {
            let registers = tracee.interrupt(*tid)?;
            let walked = comparison.walk(tracee.memory(), registers);
            tracee.release(*tid);
            Some((*tid, functions.on(&walked)))
        };
        let stacks: Vec<_> = threads.iter().filter_map(|tid| innermost(tid, &mut tracee)).collect();
        let stays = |chain: &&[&str]| {
            stacks.iter().any(|(_, stack)| stack.last().is_some_and(|_| stack[0].0 == chain[0]))
        };
        if STAYING.iter().all(stays) {
            break threads;
        }
        assert!(start.elapsed() < PATIENCE, "{stacks:?}");
        std::thread::sleep(SLICE);
    };
    let mut comparison = Comparison::new(tracee.pid(), PROGRAM);
    let (bias, _) = comparison.images.program(PROGRAM).expect("a process maps its program");
    let functions = Functions::of(&path, bias);
    let mut found = [false; STAYING.len()];
    let mut crossing = None;
    for tid in threads {
        let Some(registers) = tracee.interrupt(tid) else { continue };
        comparison.images.refresh(tracee.pid());
        let walked = comparison.walk(tracee.memory(), registers);
        let stack = functions.on(&walked);
        for (chain, found) in STAYING.iter().zip(&mut found) {
            let last = chain.len() - 2;
            if stack.iter().rev().nth(1).is_some_and(|(name, _)| *name == chain[last]) {
                let names: Vec<&str> = stack.iter().map(|(name, _)| &name[..]).collect();
                assert_eq!((&names[..], walked.stop), (*chain, StopReason::EndOfStack));
                let depth = stack.iter().find(|(name, _)| name == "spinsDeep").map(|(_, count)| *count);
                assert!(depth.is_none_or(|depth| depth == DEPTH), "{stack:?}");
                *found = true;
            }
        }
        if stack.iter().any(|(name, _)| name == "crossing") {
            crossing = Some(tid);
        }
        tracee.release(tid);
    }
    assert_eq!(found, [true; STAYING.len()]);
    cross(&mut tracee, &comparison, &functions, crossing.expect("its stack is found"));
}

/// Looks at a thread again and again while it crosses between Go and C.
fn cross(tracee: &mut Tracee, comparison: &Comparison, functions: &Functions, tid: i32) {
    let mut complete = 0;
    let mut cut: BTreeMap<(StopReason, String), usize> = BTreeMap::new();
    let start = Instant::now();
    let mut looks = 0;
    while looks < CROSSINGS {
        assert!(start.elapsed() < PATIENCE, "{looks} of {CROSSINGS} looks, {cut:?}");
        std::thread::sleep(SLICE);
        let registers = tracee.interrupt(tid).expect("it runs on");
        let walked = comparison.walk(tracee.memory(), registers);
        let stack = functions.on(&walked);
        // Taken off its processor by Go's scheduler, which runs on a stack to which no rule leads back.
        if stack[0].0 == "futex" && !walked.stop.is_complete() {
            tracee.release(tid);
            continue;
        }
        looks += 1;
        if walked.stop.is_complete() {
            complete += 1;
            let outermost: Vec<&str> = stack.iter().rev().take(2).map(|(name, _)| &name[..]).collect();
            assert_eq!(outermost, ["goexit", "crossing"], "{stack:?}");
            // `goexit` is returned to, and was never called.
            for frame in &walked.frames[1..walked.frames.len() - 1] {
                assert!(is_behind_call(tracee, frame.rip), "no call before {:#x}\n{stack:#?}", frame.rip);
            }
        } else {
            let at = stack.last().map(|(name, _)| name.clone()).unwrap_or_default();
            *cut.entry((walked.stop, at)).or_default() += 1;
        }
        tracee.release(tid);
    }
    // Between the stacks, for a few instructions, neither has a frame that a rule could name.
    assert!(complete * 100 >= CROSSINGS * 95, "{complete} of {CROSSINGS} complete, {cut:#?}");
    let is_marked = |stop: &StopReason| matches!(stop, StopReason::UnsupportedRule);
    assert!(cut.keys().all(|(stop, _)| is_marked(stop)), "{cut:#?}");
}
