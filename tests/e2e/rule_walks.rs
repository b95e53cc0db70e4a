//! A walk out of code that needs each rule of an unwind table.
//!
//! Programs that happen to run seldom stop where a rule is needed that they have once in a thousand
//! functions; an unwinder can get it wrong for years. So `tests/programs` has a function for each, and each is
//! stopped there in a thread of its own: where it stays (`rules.S`), or followed to the n-th instruction for
//! every n (`followed.S`). Each stack must be what the program says it is (the functions by name, the stack
//! pointer that `enter` noted), what the CFI says, and what gdb finds.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use object::{Object as _, ObjectSymbol as _};
use windlass_agent_ebpf::memory::StackMemory as _;
use windlass_agent_ebpf::x86_64::Registers;
use windlass_schema::record::{DWARF_RBP, DWARF_RSP};
use windlass_schema::{ImageAddress, LoadBias, StopReason};
use windlass_tests::program::{checkout, program, run};

use crate::walks::call_stack::CallStack;
use crate::walks::comparison::{Comparison, Walked, lookup_address};
use crate::walks::debugger::{GdbFrame, stacks_in_gdb};
use crate::walks::tracee::Tracee;

/// Longest wait until a thread stops. All share the processors until they do.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a thread that has not come to its stop runs on.
const SLICE: Duration = Duration::from_micros(200);
/// `jmp .`, where a thread stays.
const STOP: u64 = 0xfeeb;
const STOP_BYTES: u64 = 2;
/// The functions at the end of each thread's stack, behind that of a case.
const OUTER: [&str; 2] = ["enter", "run"];

const RSP: usize = DWARF_RSP as usize;
const RBP: usize = DWARF_RBP as usize;

/// Where cases stop: the functions of the program on the stack up to the one that is run, innermost first.
const STOPPED: &[&[&str]] = &[
    &["cfa_near"],
    &["cfa_far"],
    &["cfa_in_rbp"],
    &["cfa_in_rax"],
    &["cfa_in_rdx"],
    &["cfa_in_rcx"],
    &["cfa_in_rbx"],
    &["cfa_in_rsi"],
    &["cfa_in_rdi"],
    &["cfa_in_r8"],
    &["cfa_in_r9"],
    &["cfa_in_r10"],
    &["cfa_in_r11"],
    &["cfa_in_r12"],
    &["cfa_in_r13"],
    &["cfa_in_r14"],
    &["cfa_in_r15"],
    &["on_invalid_instruction", "cfa_in_rbx_at_fault"],
    &["cfa_at_rsp"],
    &["cfa_below_rsp"],
    &["cfa_at_rbp"],
    &["cfa_at_rbx"],
    &["cfa_at_rsp_minus"],
    &["cfa_behind_r9_words"],
    &["return_in_rdi"],
    &["return_in_rdi_above"],
    &["on_invalid_instruction", "return_in_rdi_at_fault"],
    &["return_elsewhere"],
    &["return_above_rbp"],
    &["rbp_elsewhere"],
    &["on_invalid_instruction", "fault_after_push"],
    &["on_invalid_instruction", "fault_at_first_byte"],
    // Twice, for the stack of the signal below the thread's and above.
    &["on_segmentation_fault", "fault_before_other_stack"],
    &["on_segmentation_fault", "fault_before_other_stack"],
    &["on_invalid_instruction", "on_division", "fault_in_handler"],
    &["on_invalid_instruction", "on_division", "fault_in_handler"],
    &["cfa_near", "call_at_the_end"],
];

/// The same for stacks that end before `enter`, and why.
const CUT: &[(&[&str], StopReason)] = &[
    (&["return_undefined"], StopReason::EndOfStack),
    (&["uncovered"], StopReason::FramePointer),
    (&["cfa_unsupported"], StopReason::UnsupportedRule),
    (&["rbp_in_register"], StopReason::UnsupportedRule),
    (&["rbp_at_rsp"], StopReason::UnsupportedRule),
    // A walk keeps rsp and rbp alone from frame to frame.
    (&["cfa_near", "cfa_in_rbx_of_caller"], StopReason::RegisterUnknown),
    (&["cfa_near", "return_in_rbx_of_caller"], StopReason::RegisterUnknown),
    (&["rbp_undefined", "enter"], StopReason::RegisterUnknown),
];

/// Functions that are followed from their stop to the n-th instruction behind it for each n up to this one,
/// at which a call has returned.
const FOLLOWED: &[(&str, usize)] = &[
    ("follow_saving", 19),
    ("follow_with_frame_pointer", 14),
    ("follow_with_leave", 7),
    ("follow_pushing_arguments", 23),
    ("follow_remembering", 17),
    ("follow_tail_calling", 13),
    ("follow_hot", 14),
    ("follow_realigning", 15),
];
/// Up to the loader's code that binds a function, some way into its frame in rbx.
const BINDING: &[(&str, usize)] = &[("follow_binding", 14)];
/// Up to the system call of glibc's vfork. Without `endbr64` in front it comes one earlier, and is not made.
const VFORK: &[(&str, usize)] = &[("follow_vfork", 4)];
/// The instruction behind the `leave` of an over-aligned frame, and that behind it: CFI says of rbp there
/// what is no longer so, and the walk has to do without.
const LOST_RBP: (&str, std::ops::RangeInclusive<usize>) = ("follow_realigning", 13..=14);

/// gdb 13 shows no frame at all of a thread in which the CFA of one cannot be had ("value has been optimized
/// out"). What the walk must find the CFI and the program's own functions say.
const REFUSED_BY_GDB: &str = "rbp_undefined";

/// What a thread is to do, and what must be on its stack.
#[derive(Clone, Debug)]
struct Case {
    function: &'static str,
    /// Instructions that it is followed from its stop on; `None` if it stays there.
    followed: Option<usize>,
    /// Functions of the program on the stack, innermost first, where it stays.
    functions: Vec<&'static str>,
    stop: StopReason,
}

fn stopped_cases() -> Vec<Case> {
    let whole = STOPPED.iter().map(|inner| (inner, StopReason::EndOfStack, &OUTER[..]));
    let cut = CUT.iter().map(|(inner, stop)| (inner, *stop, &[][..]));
    let case = |(inner, stop, outer): (&&[&'static str], StopReason, &[&'static str])| Case {
        function: inner.iter().rfind(|name| **name != "enter").expect("a function"),
        followed: None,
        functions: [inner, outer].concat(),
        stop,
    };
    whole.chain(cut).map(case).collect()
}

/// A case for each instruction.
fn followed_cases(functions: &[(&'static str, usize)]) -> Vec<Case> {
    let case = |function, at| {
        let lost = LOST_RBP.0 == function && LOST_RBP.1.contains(&at);
        let stop = if lost { StopReason::RegisterUnknown } else { StopReason::EndOfStack };
        Case { function, followed: Some(at), functions: Vec::new(), stop }
    };
    functions.iter().flat_map(|(name, count)| (0..=*count).map(move |at| case(*name, at))).collect()
}

/// The program, linked so; `None` where there is no compiler.
fn build(test: &str, folder: &Path, linked: &str) -> Option<PathBuf> {
    let compiler = program(test, "cc")?;
    let path = folder.join("rules");
    let sources = checkout().join("tests/programs");
    let mut command = Command::new(compiler);
    command.args(["-O2", "-fomit-frame-pointer", "-pthread", "-rdynamic", linked, "-o"]).arg(&path);
    let files = ["rules.c", "rules.S", "followed.S"].map(|name| sources.join(name));
    run(command.args(files).arg("-ldl"), &[0]);
    Some(path)
}

/// The program, and functions of it that each come to a stop where a rule is needed and stay there.
pub(crate) fn build_for_every_rule(test: &str, folder: &Path) -> Option<(PathBuf, Vec<&'static str>)> {
    let functions = stopped_cases().iter().map(|case| case.function).collect();
    Some((build(test, folder, "-Wl,-z,lazy")?, functions))
}

/// What a thread notes of itself: its number, and its stack pointer in `enter`.
#[derive(Clone, Copy, Debug)]
struct Entry {
    tid: i32,
    rsp: u64,
}

/// The program's functions and its threads' notes.
struct Program {
    bias: LoadBias,
    /// First address, first address behind, and name of each function.
    functions: Vec<(u64, u64, String)>,
    /// Address of `entries`.
    entries: u64,
}

impl Program {
    fn read(path: &Path, bias: LoadBias) -> Self {
        let elf = std::fs::read(path).expect("a program");
        let elf = object::File::parse(&elf[..]).expect("ELF");
        let (mut functions, mut entries) = (Vec::new(), None);
        for symbol in elf.symbols() {
            let (start, name) = (symbol.address(), symbol.name().unwrap_or_default());
            if name == "entries" {
                entries = Some(start);
            } else if symbol.size() > 0 && symbol.kind() == object::SymbolKind::Text {
                functions.push((start, start + symbol.size(), name.to_owned()));
            }
        }
        Self { bias, functions, entries: entries.expect("a symbol of the program") }
    }

    /// The function of a frame, if it is one of the program's.
    fn function(&self, frame: &Registers) -> Option<&str> {
        let address = lookup_address(frame).to_image(self.bias).get();
        let at = self.functions.iter().find(|(start, end, _)| (*start..*end).contains(&address));
        at.map(|(.., name)| &name[..])
    }

    /// The note of the `index`th case's thread.
    fn entry(&self, tracee: &Tracee, index: usize) -> Entry {
        let at = ImageAddress::new(self.entries + 16 * index as u64).to_process(self.bias).get();
        let [tid, rsp] = tracee.memory().words(at).expect("an array of the program");
        Entry { tid: tid as i32, rsp }
    }
}

/// Waits until every thread has made its note.
fn wait_for_entries(program: &Program, tracee: &Tracee, count: usize) -> Vec<Entry> {
    let start = Instant::now();
    loop {
        let entries: Vec<_> = (0..count).map(|index| program.entry(tracee, index)).collect();
        if entries.iter().all(|entry| entry.rsp != 0) {
            return entries;
        }
        assert!(start.elapsed() < PATIENCE, "threads do not start");
        std::thread::sleep(SLICE);
    }
}

/// Lets a thread run on until it is at its stop.
fn settle(tracee: &mut Tracee, tid: i32) -> Registers {
    let start = Instant::now();
    loop {
        let registers = tracee.interrupt(tid).expect("no thread ends");
        if tracee.memory().word(registers.rip).is_some_and(|code| code & 0xffff == STOP) {
            return registers;
        }
        assert!(start.elapsed() < PATIENCE, "thread {tid} does not stop, {registers:x?}");
        tracee.release(tid);
        std::thread::sleep(SLICE);
    }
}

/// Follows a thread from its stop to its `count`th instruction from there, and says what calls and returns
/// have made of the stack.
fn follow(tracee: &mut Tracee, tid: i32, at_stop: &Walked, count: usize) -> (Registers, CallStack) {
    let mut registers = at_stop.frames[0];
    let mut truth = CallStack::of(&at_stop.frames);
    for at in 0..count {
        let before = registers;
        if at == 0 {
            registers = tracee.jump(tid, before.rip + STOP_BYTES);
            continue;
        }
        // The stop of the whole program may be told of first.
        while registers.rip == before.rip {
            registers = tracee.step(tid).expect("no thread ends");
        }
        truth.step(&before, &registers, false, tracee.memory());
    }
    (registers, truth)
}

/// Takes a thread to the place of its case, walks its stack and compares it with what is known of it.
fn reach(
    tracee: &mut Tracee,
    comparison: &mut Comparison,
    program: &Program,
    entry: Entry,
    case: &Case,
) -> Walked {
    let registers = settle(tracee, entry.tid);
    let at_stop = comparison.check(entry.tid, tracee.memory(), registers);
    let Some(count) = case.followed else {
        let functions: Vec<_> = at_stop.frames.iter().filter_map(|frame| program.function(frame)).collect();
        let print = || format!("{case:?}\n{}", comparison.print(&at_stop));
        assert_eq!((&functions, at_stop.stop), (&case.functions, case.stop), "{}", print());
        assert!(has_enter_right(program, &at_stop, entry), "{}", print());
        return at_stop;
    };
    let (registers, calls) = follow(tracee, entry.tid, &at_stop, count);
    let walked = comparison.check(entry.tid, tracee.memory(), registers);
    let print = || format!("{case:?}\n{}\n{calls:x?}", comparison.print(&walked));
    assert_eq!(walked.stop, case.stop, "{}", print());
    // What vfork has popped into a register is on no stack.
    if !is_within_vfork(program, case, &at_stop, &registers) {
        assert!(calls.has(&walked.frames, walked.stop.is_complete()), "{}", print());
    }
    assert!(has_enter_right(program, &walked, entry), "{}", print());
    walked
}

/// Whether vfork has taken its return address from the stack.
fn is_within_vfork(program: &Program, case: &Case, at_stop: &Walked, registers: &Registers) -> bool {
    let is_popped = registers.general[RSP] == at_stop.frames[0].general[RSP];
    case.function == VFORK[0].0 && program.function(registers).is_none() && is_popped
}

/// Whether the frame of `enter`, if the walk came to it, has the registers noted there, or else lacks rbp and is
/// the last. A frame inside that were wrong would have led to others.
fn has_enter_right(program: &Program, walked: &Walked, entry: Entry) -> bool {
    let is_enter = |frame: &&Registers| program.function(frame) == Some("enter");
    let Some(enter) = walked.frames.iter().find(is_enter) else {
        return !walked.stop.is_complete() || walked.frames.len() == 1;
    };
    let has_rbp = enter.known >> RBP & 1 != 0;
    let is_last = walked.frames.last() == Some(enter);
    enter.general[RSP] == entry.rsp && if is_last { !has_rbp } else { enter.general[RBP] == entry.rsp }
}

/// Compares what gdb finds with a walk, as far as that goes: addresses, and the stack pointers of callers.
#[track_caller]
fn compare_with_gdb(case: &str, walked: &Walked, theirs: &[GdbFrame]) {
    let count = walked.frames.len();
    let differ = || format!("{case}\n{:x?}\ngdb: {theirs:x?}", walked.frames);
    assert!(theirs.len() >= count, "{}", differ());
    assert!(theirs.len() == count || !walked.stop.is_complete(), "{}", differ());
    let ours = walked.frames.iter().map(|frame| frame.rip);
    assert!(ours.eq(theirs[..count].iter().map(|frame| frame.rip)), "{}", differ());
    let ours = walked.frames[1..].iter().map(|frame| frame.general[RSP]);
    assert!(ours.eq(theirs[..count - 1].iter().map(|frame| frame.cfa)), "{}", differ());
}

/// Runs a program with a thread for each case, and compares the stacks of all.
fn check(test: &str, linked: &str, cases: &[Case]) {
    let Some(gdb) = program(test, "gdb") else { return };
    let folder = tempfile::tempdir().expect("temporary folder");
    let Some(path) = build(test, folder.path(), linked) else { return };
    let mut tracee = Tracee::start(Command::new(&path).args(cases.iter().map(|case| case.function)));
    let threads = tracee.wait_for_threads(cases.len() + 1).len();
    let mut comparison = Comparison::new(tracee.pid(), "/rules");
    let (bias, _) = comparison.images.program("/rules").expect("a process maps its program");
    let program = Program::read(&path, bias);
    let entries = wait_for_entries(&program, &tracee, cases.len());
    tracee.freeze();
    tracee.trace(threads);
    let (pid, main) = (tracee.pid(), tracee.interrupt(tracee.pid()).expect("a stopped thread"));
    let main = comparison.check(pid, tracee.memory(), main);
    assert_eq!(main.stop, StopReason::EndOfStack, "{}", comparison.print(&main));
    let walks: Vec<_> = cases
        .iter()
        .zip(entries)
        .map(|(case, entry)| (case, entry.tid, reach(&mut tracee, &mut comparison, &program, entry, case)))
        .collect();
    tracee.detach();
    let stacks = stacks_in_gdb(&gdb, pid);
    for (case, tid, walked) in walks.iter().filter(|(case, ..)| case.function != REFUSED_BY_GDB) {
        let theirs = stacks.get(tid).unwrap_or_else(|| panic!("gdb shows no thread {tid}"));
        compare_with_gdb(&format!("{case:?}"), walked, theirs);
    }
    compare_with_gdb("main", &main, &stacks[&pid]);
}

#[test]
fn out_of_code_that_needs_each_rule() {
    check("rule_walks::out_of_code_that_needs_each_rule", "-Wl,-z,lazy", &stopped_cases());
}

#[test]
fn out_of_every_instruction_of_a_function() {
    let mut cases = followed_cases(FOLLOWED);
    cases.extend(followed_cases(VFORK));
    check("rule_walks::out_of_every_instruction_of_a_function", "-Wl,-z,lazy", &cases);
}

#[test]
fn out_of_lazy_binding() {
    for linked in ["-Wl,-z,lazy", "-Wl,-z,lazy,-z,ibtplt"] {
        check("rule_walks::out_of_lazy_binding", linked, &followed_cases(BINDING));
    }
}
