//! The table: program, what it exercises, the stacks that it can have. Here those in C and C++ over glibc.

mod others;
mod without_cfi;

use windlass_schema::StopReason;
use windlass_schema::maps::MAX_USER_FRAMES;

use super::chain::Part::{self, Any, In, Is, Some, Times};
use super::chain::{Chain, MANY, Of};
use super::row::Program::Built;
use super::row::{Need, PLAIN, Row, Start, Stop, Why};

const LIBC: &[&str] = &["libc.so.6"];
const VDSO: &[&str] = &["[vdso]"];
/// What is around `main` in a program that is linked with glibc.
const MAIN: &[Part] = &[Is("main"), In(LIBC, 2, 2), Is("_start")];
/// What is around a thread's function: `start_thread`, `clone3`.
const THREAD: &[Part] = &[In(LIBC, 2, 2)];
/// The same where libc is linked in.
const STATIC_MAIN: &[Part] = &[
    Is("main"),
    Is("__libc_start_call_main"),
    Some(&["__libc_start_main", "__libc_start_main_impl"], 1, 1),
    Is("_start"),
];

const fn often(parts: &'static [Part], end: &'static [Part]) -> Chain {
    Chain { often: true, parts, end }
}

const fn seldom(parts: &'static [Part], end: &'static [Part]) -> Chain {
    Chain { often: false, parts, end }
}

const DESCENT: &[&str] = &["descend_odd", "descend_even"];
/// Pairs of calls that are more than a walk takes.
const TOO_MANY_PAIRS: usize = 600;
const TOO_MANY_PAIRS_TEXT: &str = "600";
const _: () = assert!(2 * TOO_MANY_PAIRS > MAX_USER_FRAMES);

const DEEP: Row = Row { program: Built("cc", &["deep.c"], &[]), ..PLAIN };
/// A program that is 57 deep.
const DEEP_57: Row =
    Row { arguments: &["26"], chains: &[often(&[Is("spin"), Times(DESCENT, 26)], MAIN)], ..DEEP };
const DEEP_57_STATIC: Row =
    Row { chains: &[often(&[Is("spin"), Times(DESCENT, 26)], STATIC_MAIN)], ..DEEP_57 };

const HANDLING: &[Of] = &[Of::Function("handler_spin"), Of::Function("handler"), Of::Image("libc.so.6")];
const SIGNALS: Row = Row { program: Built("cc", &["signals.c"], &[]), ..PLAIN };

const fn right(reason: StopReason, most: f64) -> Stop {
    Stop { reason, most, why: Why::Right }
}

/// Of processes that begin and end all the time. On a machine that is busy with nothing else, each is under one in a hundred;
/// what is new takes longer where the agent has to wait for a processor.
const NEW: &[Stop] = &[
    Stop { reason: StopReason::ProcessUnknown, most: 0.25, why: Why::New },
    Stop { reason: StopReason::MappingsChanged, most: 0.15, why: Why::New },
    Stop { reason: StopReason::NoMapping, most: 0.03, why: Why::New },
    // The memory of a process goes before its last sample.
    right(StopReason::StackRead, 0.05),
    // Behind the system call of `clone3` parent and child have other frames at the same addresses, and so no CFI.
    right(StopReason::NoCfi, 0.03),
    // The loader's lazy binding has its CFA in rbx, which walks do not keep.
    Stop { reason: StopReason::RegisterUnknown, most: 0.01, why: Why::Unrecognised },
];

/// The start and the end of processes that live for a short time: the loader and libc around each other, without `main`.
const LOADING: Chain = seldom(
    &[Any(
        &[
            Of::Image("ld-linux"),
            Of::Image("libc.so"),
            Of::Function("_init"),
            Of::Function("__do_global_dtors_aux"),
            Of::Function("_start"),
        ],
        1,
        40,
    )],
    &[],
);

/// All rows.
pub(crate) fn rows() -> impl Iterator<Item = &'static Row> {
    ROWS.iter().chain(without_cfi::ROWS).chain(others::ROWS)
}

static ROWS: &[Row] = &[
    Row { name: "deep57", exercises: "57 frames, none with a frame pointer", ..DEEP_57 },
    Row {
        name: "deep121",
        exercises: "121 frames",
        arguments: &["58"],
        chains: &[often(&[Is("spin"), Times(DESCENT, 58)], MAIN)],
        ..DEEP
    },
    Row {
        name: "deep251",
        exercises: "251 frames",
        arguments: &["123"],
        chains: &[often(&[Is("spin"), Times(DESCENT, 123)], MAIN)],
        ..DEEP
    },
    Row {
        name: "deeper",
        exercises: "more frames than a walk takes",
        arguments: &[TOO_MANY_PAIRS_TEXT],
        chains: &[often(&[Is("spin"), Times(DESCENT, TOO_MANY_PAIRS)], MAIN)],
        stops: &[right(StopReason::FrameLimit, 1.0)],
        ..DEEP
    },
    Row {
        name: "static",
        exercises: "glibc linked in",
        program: Built("cc", &["deep.c"], &["-static"]),
        ..DEEP_57_STATIC
    },
    Row {
        name: "staticpie",
        exercises: "glibc linked in, at any address",
        program: Built("cc", &["deep.c"], &["-static-pie"]),
        ..DEEP_57_STATIC
    },
    Row {
        name: "nopie",
        exercises: "an executable at a fixed address",
        program: Built("cc", &["deep.c"], &["-no-pie"]),
        ..DEEP_57
    },
    Row {
        name: "sorted",
        exercises: "called back by libc's qsort",
        program: Built("cc", &["sorted.c"], &[]),
        chains: &[
            often(&[Is("weigh"), Is("compare"), In(LIBC, 2, 12), Is("sort")], MAIN),
            seldom(&[In(LIBC, 0, 12), Is("sort")], MAIN),
        ],
        ..PLAIN
    },
    Row {
        name: "exceptions",
        exercises: "C++ exceptions in flight: search, cleanup, landing pads",
        program: Built("g++", &["exceptions.cc"], &[]),
        chains: &[
            often(&[In(THROWING, 1, 16), Is("thrower"), Times(&["level"], 12), Is("catcher")], MAIN),
            often(&[Is("clean"), Some(&["level.cold"], 0, 1), Some(&["level"], 0, 12), Is("catcher")], MAIN),
            seldom(
                &[In(THROWING, 0, 16), Some(&["level.cold"], 0, 1), Some(&["level"], 0, 12), Is("catcher")],
                MAIN,
            ),
            seldom(&[In(THROWING, 0, 16), Some(&["catcher", "catcher.cold"], 1, 1)], MAIN),
            // The calls' entries in the program's linkage table.
            seldom(&[Some(THROWING_CALLS, 1, 1), Is("thrower"), Times(&["level"], 12), Is("catcher")], MAIN),
            seldom(
                &[
                    Some(THROWING_CALLS, 1, 1),
                    Some(&["level.cold"], 0, 1),
                    Some(&["level"], 0, 12),
                    Some(&["catcher", "catcher.cold"], 1, 1),
                ],
                MAIN,
            ),
            // libgcc has put what the landing pad's function saved, and then the landing pad, in place of its own saved registers
            // and return address, and not yet left the frames between (uw_install_context, libgcc/unwind-dw2.c): until then a
            // frame is taken for that of another function, and any frame may be missing or there twice.
            seldom(&[In(&["libgcc_s.so"], 1, 2), Some(INSTALLED, 1, 16)], MAIN),
        ],
        stops: INSTALLING,
        ..PLAIN
    },
    Row {
        name: "avx2",
        exercises: "realigned frames of AVX2 code, of constant and of variable size",
        program: Built("cc", &["realigned.c"], &["-mavx2"]),
        needs: &[Need::Cpu("avx2")],
        chains: REALIGNED,
        ..PLAIN
    },
    Row {
        name: "avx512",
        exercises: "realigned frames of AVX-512 code",
        program: Built("cc", &["realigned.c"], &["-mavx512f", "-DWIDTH=64"]),
        needs: &[Need::Cpu("avx512f")],
        chains: REALIGNED,
        ..PLAIN
    },
    Row {
        name: "signals",
        exercises: "signal handlers on a stack of their own, over 40 frames",
        chains: &[
            often(&[Is("spin"), Times(&["descend"], 40)], MAIN),
            often(
                &[Is("handler_spin"), Is("handler"), In(LIBC, 1, 1), Is("spin"), Times(&["descend"], 40)],
                MAIN,
            ),
            seldom(&[Is("handler_spin"), Is("handler"), In(LIBC, 1, 1), Some(&["descend"], 0, 40)], MAIN),
            // The kernel is about to put the registers back.
            seldom(&[In(LIBC, 1, 1), Some(&["spin"], 0, 1), Some(&["descend"], 0, 40)], MAIN),
        ],
        ..SIGNALS
    },
    Row {
        name: "jumps",
        exercises: "siglongjmp out of a handler on a stack of its own",
        arguments: &["jump"],
        chains: &[
            often(&[Is("spin"), Times(&["descend"], 40)], MAIN),
            often(
                &[Is("handler_spin"), Is("handler"), In(LIBC, 1, 1), Is("spin"), Times(&["descend"], 40)],
                MAIN,
            ),
            // The next signal is let in while the handler is left, as often as there is one.
            seldom(&[Any(HANDLING, 2, MANY), Some(&["spin"], 0, 1), Some(&["descend"], 0, 40)], MAIN),
            seldom(
                &[
                    In(LIBC, 0, 4),
                    Is("handler"),
                    In(LIBC, 1, 1),
                    Some(&["spin"], 0, 1),
                    Some(&["descend"], 0, 40),
                ],
                MAIN,
            ),
            seldom(&[In(LIBC, 0, 4)], MAIN),
        ],
        ..SIGNALS
    },
    Row {
        name: "vfork",
        exercises: "vfork: children on their parent's stack, then another program",
        program: Built("cc", &["vfork.c"], &[]),
        chains: &[
            often(&[Is("child_spin"), Times(&["launch"], 5)], MAIN),
            often(&[Is("parent_spin"), Times(&["launch"], 5)], MAIN),
            often(&[Is("spin"), Is("as_child")], MAIN),
            seldom(&[In(LIBC, 0, 3), Times(&["launch"], 5)], MAIN),
            LOADING,
        ],
        stops: NEW,
        ..PLAIN
    },
    Row {
        name: "contexts",
        exercises: "libc's coroutines: makecontext, swapcontext",
        program: Built("cc", &["contexts.c"], &[]),
        chains: &[
            often(&[Is("main_spin")], MAIN),
            often(&[Is("spin"), Times(&["descend"], 10), Is("fiber")], &[In(LIBC, 1, 1)]),
            seldom(&[In(LIBC, 0, 2), Times(&["descend"], 10), Is("fiber")], &[In(LIBC, 1, 1)]),
            seldom(&[In(LIBC, 0, 2)], MAIN),
        ],
        stops: &[
            // glibc's CFI is not right about `swapcontext` once it is on the other stack.
            right(StopReason::ZeroReturnAddress, 0.01),
            right(StopReason::NoMapping, 0.01),
            right(StopReason::NoAdvance, 0.01),
        ],
        ..PLAIN
    },
    Row {
        name: "fibers",
        exercises: "coroutines in assembly, with call frame information",
        program: Built("cc", &["fibers.c", "fibers.S"], &["-DSTART=fiber_start"]),
        chains: &[
            often(&[Is("main_spin")], MAIN),
            often(&[Is("spin"), Times(&["descend"], 10), Is("fiber")], &[Is("fiber_start")]),
            seldom(&[Is("switch_stacks"), Times(&["descend"], 10), Is("fiber")], &[Is("fiber_start")]),
            seldom(&[Is("switch_stacks")], MAIN),
        ],
        ..PLAIN
    },
    Row {
        name: "fibersbare",
        exercises: "coroutines in assembly without call frame information",
        program: Built("cc", &["fibers.c", "fibers.S"], &["-DSTART=fiber_start", "-DBARE"]),
        chains: &[
            often(&[Is("main_spin")], MAIN),
            often(&[Is("spin"), Times(&["descend"], 10), Is("fiber")], &[Is("fiber_start")]),
            seldom(&[Is("switch_stacks"), Times(&["descend"], 10), Is("fiber")], &[Is("fiber_start")]),
            seldom(&[Is("switch_stacks")], MAIN),
        ],
        // A call that does not return at the beginning of a function: nothing tells that this one was not called.
        stops: &[right(StopReason::NoCfi, 0.7)],
        ..PLAIN
    },
    Row {
        name: "fibersnone",
        exercises: "coroutines whose first function is jumped to with no return address",
        program: Built("cc", &["fibers.c", "fibers.S"], &["-DSTART=fiber"]),
        chains: &[
            often(&[Is("main_spin")], MAIN),
            often(&[Is("spin"), Times(&["descend"], 10), Is("fiber")], &[]),
            seldom(&[Is("switch_stacks"), Times(&["descend"], 10), Is("fiber")], &[]),
            seldom(&[Is("switch_stacks")], MAIN),
        ],
        // Zero is no caller, but no promise either that the stack ends.
        stops: &[right(StopReason::ZeroReturnAddress, 0.7)],
        ..PLAIN
    },
    Row {
        name: "threads",
        exercises: "24 threads, each at another depth",
        program: Built("cc", &["threads.c"], &["-pthread"]),
        chains: &[
            often(&[Is("spin"), Some(&["level"], 1, 24), Is("run")], THREAD),
            seldom(&[In(LIBC, 1, 3)], MAIN),
        ],
        ..PLAIN
    },
    Row {
        name: "clock",
        exercises: "the kernel's code in the process (vDSO)",
        program: Built("cc", &["clock.c"], &[]),
        chains: &[
            often(&[In(VDSO, 1, 2), In(LIBC, 1, 1), Is("ask")], MAIN),
            seldom(&[In(VDSO, 0, 2), In(LIBC, 0, 1), Is("ask")], MAIN),
        ],
        ..PLAIN
    },
    Row {
        name: "tails",
        exercises: "calls that are jumps",
        program: Built("cc", &["tails.c"], &["-foptimize-sibling-calls"]),
        chains: &[
            often(&[Is("spin"), Is("third")], MAIN),
            often(&[Is("spin"), Is("first")], MAIN),
            seldom(&[Is("second")], MAIN),
        ],
        ..PLAIN
    },
    Row {
        name: "large",
        exercises: "frames of 96 KiB and of 2 MiB",
        program: Built("cc", &["large.c"], &["-Wno-larger-than"]),
        chains: &[often(&[Is("spin"), Is("frame_of_96_kib"), Is("frame_of_2_mib")], MAIN)],
        ..PLAIN
    },
    Row { name: "deleted", exercises: "an executable whose file is gone", start: Start::Deleted, ..DEEP_57 },
    Row {
        name: "replaced",
        exercises: "an executable whose name another file has",
        start: Start::Replaced,
        ..DEEP_57
    },
    Row {
        name: "namespaces",
        exercises: "another mount and PID namespace",
        start: Start::InNamespaces,
        needs: &[Need::Root],
        ..DEEP_57
    },
    Row { name: "root", exercises: "another root", start: Start::InRoot, needs: &[Need::Root], ..DEEP_57 },
    Row {
        name: "brief",
        exercises: "processes of 50 ms",
        program: Built("cc", &["brief.c"], &[]),
        chains: &[
            often(&[Is("spin"), Is("work")], MAIN),
            seldom(&[In(VDSO, 0, 2), In(LIBC, 0, 1), Is("work")], MAIN),
            seldom(&[In(LIBC, 0, 8)], MAIN),
            LOADING,
        ],
        stops: NEW,
        ..PLAIN
    },
];

/// What a program calls to throw, to go on throwing and to catch.
const THROWING_CALLS: &[&str] =
    &["__cxa_allocate_exception", "__cxa_throw", "_Unwind_Resume", "__cxa_begin_catch", "__cxa_end_catch"];
/// Whose frames libgcc leaves for a landing pad.
const INSTALLED: &[&str] = &["thrower", "level", "level.cold", "catcher", "catcher.cold"];
/// While libgcc leaves its own frame for that of a landing pad, no CFI says where it is.
pub(crate) const INSTALLING: &[Stop] = &[
    right(StopReason::NoMapping, 0.01),
    right(StopReason::NoAdvance, 0.01),
    right(StopReason::ZeroReturnAddress, 0.01),
];
/// Where an exception is on its way.
const THROWING: &[&str] = &["libgcc_s.so", "libstdc++.so", "libc.so.6", "ld-linux-x86-64.so.2"];
const REALIGNED: &[Chain] = &[
    often(&[Is("spin"), Is("aligned_frame"), Is("variable_frame"), Is("many_arguments")], MAIN),
    // `memset` fills the frame.
    seldom(&[In(LIBC, 0, 1), Is("variable_frame"), Is("many_arguments")], MAIN),
];
