//! The walk of aarch64 against gdb, over registers and stacks of a program that runs under an emulator.
//!
//! Unwinders for aarch64 are tried by hand on a machine at hand, or on recorded registers that nobody can make
//! again. Here the test suite's own machine compiles a program, runs it instruction by instruction under
//! `qemu-aarch64`, and walks the stack of each moment with tables compiled from the program. gdb knows the bits
//! of a signature only from the processor, and this emulator does not tell it; but the instructions that sign
//! do nothing on a processor without signatures. So gdb looks at the same program on such a one: same
//! instructions, same stacks, and the frames must be the same.

mod emulator;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;

use object::elf::PF_X;
use object::{Object as _, ObjectSection as _, ObjectSegment as _, ObjectSymbol as _};
use windlass_agent::backend::PlacedMapping;
use windlass_agent::chunks::{ChunkSpace, MOST_TABLE_BYTES};
use windlass_agent::kernel::segments_of;
use windlass_agent_ebpf::aarch64::{Registers, step};
use windlass_agent_ebpf::walk::Walk;
use windlass_schema::maps::{MAX_USER_FRAMES, Mapping, ProcessEntry, SegmentKey};
use windlass_schema::{BuildId, Register, Rule, StopReason, Table};
use windlass_tests::program::{checkout, program, run, text};
use windlass_tests::skip::skip;
use windlass_unwind_compiler::compile;

use crate::chunks::PlainMaps;
use emulator::{Emulator, Frame, Stop};

/// A processor that does not sign, and one that does, without the vector registers of variable size that gdb
/// cannot find in this emulator's signal frames.
const WITHOUT_SIGNATURES: &str = "cortex-a72";
const WITH_SIGNATURES: &str = "max,sve=off,sme=off,pauth-impdef=on";
/// Where the kernel puts the registers x0 to x30, sp and pc, from the stack pointer of a signal's trampoline:
/// behind `siginfo` (128 bytes), `ucontext` up to `sigcontext` (176), and its `fault_address`
/// (arch/arm64/kernel/signal.c, `struct rt_sigframe`).
const SIGNAL_REGISTERS: i16 = 128 + 176 + 8;
/// Fewest moments at which each program must have been looked at; there are about 550.
const MIN_STOPS: usize = 400;
/// One in so many walks at most may end early, with a reason that the test knows.
const MAX_EARLY: usize = 8;
/// The process's number in the maps: any.
const TGID: u32 = 1;
const SP: usize = Register::SP.number() as usize;

/// The functions to whose first instruction the program runs on when it is in a library's code. From there on
/// each of its instructions is looked at.
const ENTRIES: &[&str] = &[
    "leaf",
    "body",
    "variable",
    "large",
    "huge",
    "several_ends",
    "many_registers",
    "on_fault",
    "in_thread",
    "x30_alone",
    "pair_at_the_top",
    "return_address_in_x10",
    "leaf_of_x10",
    "frame_on_x9",
    "fault",
    "fault_resumed",
];

/// The program, compiled, as the emulator and the walk need it.
struct Program {
    path: PathBuf,
    functions: Vec<(String, Range<u64>)>,
    /// The program's own signal trampoline.
    restorer: Range<u64>,
    maps: PlainMaps,
    entry: ProcessEntry,
}

/// How a walk went.
struct Walked {
    frames: Vec<Frame>,
    stop: StopReason,
    /// Frames left by the rule for signal frames, which the table did not state.
    signals: usize,
}

impl Program {
    fn compile(compiler: &Path, folder: &Path, flags: &[&str]) -> Self {
        let path = folder.join("program");
        let sources = ["aarch64.c", "aarch64.S"].map(|name| checkout().join("tests/programs").join(name));
        run(Command::new(compiler).args(["-static", "-O2", "-o"]).arg(&path).args(flags).args(sources), &[0]);
        let bytes = std::fs::read(&path).expect("a compiled program");
        let elf = object::File::parse(&bytes[..]).expect("ELF");
        let functions: Vec<_> = elf
            .symbols()
            .filter(|symbol| symbol.kind() == object::SymbolKind::Text && symbol.size() > 0)
            .filter_map(|symbol| {
                let range = symbol.address()..symbol.address() + symbol.size();
                Some((symbol.name().ok()?.to_owned(), range))
            })
            .collect();
        let restorer = functions.iter().find(|(name, _)| name == "kernel_like_restorer");
        let restorer = restorer.expect("a trampoline").1.clone();
        let (maps, entry) = mapped(&bytes, &elf);
        Self { path, functions, restorer, maps, entry }
    }

    /// The function at the instruction that a frame is in.
    fn function(&self, frame: &Frame, is_innermost: bool) -> &str {
        let address = if is_innermost { frame.pc } else { frame.pc - 1 };
        let found = self.functions.iter().find(|(_, range)| range.contains(&address));
        found.map_or("", |(name, _)| name)
    }

    /// Walks a stack. What the table cannot say of a signal's trampoline, which is the kernel's, is said here.
    fn walk(&self, stop: &Stop, pac_mask: u64) -> Walked {
        let innermost = Registers { pac_mask, ..Registers::innermost(stop.general, stop.pc) };
        let mut walk = Walk::new(TGID, self.entry, innermost);
        let mut walked = Walked { frames: Vec::new(), stop: StopReason::FrameLimit, signals: 0 };
        while walked.frames.len() < MAX_USER_FRAMES {
            let frame = Frame { pc: walk.registers.pc, sp: walk.registers.general[SP] };
            walked.frames.push(frame);
            let Err(reason) = walk.advance(&self.maps, &stop.stack) else { continue };
            let is_trampoline = match reason {
                // The emulator's own trampoline is the only code outside of the program.
                StopReason::NoMapping => true,
                StopReason::UnsupportedRule => self.restorer.contains(&frame.pc),
                _ => false,
            };
            let signal = Rule::Signal(SIGNAL_REGISTERS).to_record();
            if !is_trampoline || step(&mut walk.registers, signal, &stop.stack).is_err() {
                walked.stop = reason;
                break;
            }
            walked.signals += 1;
        }
        walked
    }

    fn print(&self, frames: &[Frame]) -> String {
        let line = |(number, frame): (usize, &Frame)| {
            format!("  {:#x} sp {:#x} {}\n", frame.pc, frame.sp, self.function(frame, number == 0))
        };
        frames.iter().enumerate().map(line).collect()
    }

    /// Whether a walk may end here.
    fn is_right_end(&self, walked: &Walked) -> bool {
        let last = walked.frames.last().expect("a walk records its first frame");
        let is_innermost = walked.frames.len() == 1;
        let function = self.function(last, is_innermost);
        match walked.stop {
            // The program's first instructions, and those of a thread.
            StopReason::EndOfStack => ["_start", "thread_start", "__clone", "__clone3"].contains(&function),
            // A register that the function it called may have changed.
            StopReason::RegisterUnknown => function == "return_address_in_x10" && !is_innermost,
            _ => false,
        }
    }
}

/// The program's executable memory, as the kernel's maps would have it.
fn mapped(bytes: &[u8], elf: &object::File<'_>) -> (PlainMaps, ProcessEntry) {
    // A table holds its build-ID but does not depend on it.
    let build_id = BuildId::new(&[0xab; 20]).expect("20 bytes are a build-ID");
    let table = compile(bytes, build_id).expect("an aarch64 image").table;
    let mut space = ChunkSpace::new(MOST_TABLE_BYTES);
    let image = space.place(&Table::parse(&table).expect("a compiled table")).expect("one image fits").header;
    let mut maps = PlainMaps::default();
    maps.flush(&mut space);
    let is_executable =
        |flags| matches!(flags, object::SegmentFlags::Elf { p_flags, .. } if p_flags & PF_X == PF_X);
    let mappings: Vec<_> = elf
        .segments()
        .filter(|segment| is_executable(segment.flags()))
        .map(|segment| PlacedMapping {
            start: segment.address(),
            mapping: Mapping { end: segment.address() + segment.size(), bias: 0, image, generation: 0 },
        })
        .collect();
    let (entry, segments) = segments_of(&mappings, 1);
    for (segment, content) in (0..).zip(segments) {
        maps.segments.insert(SegmentKey { tgid: TGID, segment }, content);
    }
    (maps, entry)
}

/// What the emulator is told of the program, so that it stops where the test wants to look.
fn emulator(program: &Program, gdb: PathBuf, qemu: PathBuf) -> Emulator {
    let bytes = std::fs::read(&program.path).expect("a compiled program");
    let elf = object::File::parse(&bytes[..]).expect("ELF");
    let symbol = |name: &str| {
        elf.symbols().find(|symbol| symbol.name() == Ok(name)).unwrap_or_else(|| panic!("no symbol {name}"))
    };
    let stepped = elf.section_by_name("stepped").expect("the functions to step through");
    let stack = symbol("thread_stack");
    Emulator {
        qemu,
        gdb,
        program: program.path.clone(),
        breakpoints: ENTRIES.iter().map(|name| symbol(name).address()).collect(),
        stepped: stepped.address()..stepped.address() + stepped.size(),
        thread_stack_end: stack.address() + stack.size(),
    }
}

/// The compiler, the debugger and the emulator; if one is missing, `test` is skipped.
#[track_caller]
fn tools(test: &str) -> Option<[PathBuf; 3]> {
    let compiler = program(test, "aarch64-linux-gnu-gcc")?;
    let (gdb, qemu) = (program(test, "gdb-multiarch")?, program(test, "qemu-aarch64")?);
    // A compiler that knows the file prints where it is.
    let library = text(Command::new(&compiler).arg("-print-file-name=libc.a"));
    if !Path::new(library.trim()).is_absolute() {
        skip(test, "the C library for aarch64 is not installed");
        return None;
    }
    Some([compiler, gdb, qemu])
}

/// At each moment, on both processors, the walk finds the frames that gdb finds.
fn every_instruction(test: &str, flags: &[&str]) {
    let Some([compiler, gdb, qemu]) = tools(test) else { return };
    let folder = tempfile::tempdir().expect("temporary folder");
    let program = Program::compile(&compiler, folder.path(), flags);
    let emulator = emulator(&program, gdb, qemu);
    let truth = emulator.run(WITHOUT_SIGNATURES, true);
    let signed = emulator.run(WITH_SIGNATURES, false);
    assert!(truth.len() >= MIN_STOPS, "{} stops", truth.len());
    assert_eq!(truth.len(), signed.len(), "the program goes another way where addresses are signed");
    let (mut signals, mut early, mut needs_mask) = (0, 0, 0);
    for (theirs, signed) in truth.iter().zip(&signed) {
        for stop in [theirs, signed] {
            let walked = program.walk(stop, windlass_agent_ebpf::aarch64::PAC_MASK);
            let same = walked.frames.len() <= theirs.frames.len()
                && walked.frames.iter().zip(&theirs.frames).all(|(ours, frame)| {
                    (ours.pc, stop.place(ours.sp)) == (frame.pc, theirs.place(frame.sp))
                });
            let is_whole = walked.frames.len() == theirs.frames.len();
            assert!(
                same && program.is_right_end(&walked) && (is_whole || !walked.stop.is_complete()),
                "{:?} behind\n{}gdb:\n{}",
                walked.stop,
                program.print(&walked.frames),
                program.print(&theirs.frames)
            );
            signals += walked.signals;
            early += usize::from(!walked.stop.is_complete());
        }
        needs_mask += usize::from(!program.walk(signed, 0).stop.is_complete());
    }
    // Both trampolines were passed, from each instruction of the handler and of what it calls.
    assert!(signals > 100, "{signals} signal frames");
    // The two instructions of `leaf_of_x10` at least, on both processors.
    let walks = 2 * truth.len();
    assert!(early >= 4 && early < walks / MAX_EARLY, "{early} of {walks} stacks end early");
    // Nearly every function but the leaves signs its return address.
    assert!(needs_mask > MIN_STOPS / 2, "{needs_mask} of {} stacks have signed addresses", signed.len());
}

/// Frame records, frames of variable size and large ones, a signal in a leaf, the start of a thread.
#[test]
fn every_instruction_of_frames_with_frame_pointers() {
    every_instruction(
        "aarch64::every_instruction_of_frames_with_frame_pointers",
        &["-mbranch-protection=standard"],
    );
}

/// The same by the stack pointer, with leaves that sign too, and by the other key.
#[test]
fn every_instruction_of_frames_without_frame_pointers() {
    every_instruction(
        "aarch64::every_instruction_of_frames_without_frame_pointers",
        &["-fomit-frame-pointer", "-mbranch-protection=pac-ret+leaf+b-key", "-DB_KEY"],
    );
}
