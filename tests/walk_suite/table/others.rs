//! Rows of other languages and C libraries, of assembly, and of programs that machines have.

use windlass_schema::StopReason;

use super::super::chain::Part::{self, Any, In, Is, Some, Times};
use super::super::chain::{MANY, Of};
use super::super::row::Program::{Built, Installed};
use super::super::row::{Need, PLAIN, Row, Stop, Why};
use super::{DESCENT, INSTALLING, LIBC, MAIN, often, right, seldom};

/// What `openssl speed` is in beside its own code.
const CRYPTO: &[Of] = &[Of::Image("libcrypto.so"), Of::Image("libc.so.6"), Of::Image("[vdso]")];
const OPENSSL: Row = Row {
    program: Installed("openssl"),
    chains: &[
        often(&[Any(CRYPTO, 1, MANY), In(&["openssl"], 5, 5), In(LIBC, 2, 2)], &[In(&["openssl"], 1, 1)]),
        seldom(&[In(&["openssl"], 1, 8), In(LIBC, 2, 2)], &[In(&["openssl"], 1, 1)]),
    ],
    ..PLAIN
};

/// Rust's standard library, and what it calls.
const STD: &[Of] = &[
    Of::Under("std::"),
    Of::Under("core::"),
    Of::Under("alloc::"),
    Of::Under("__rust"),
    Of::Under("rust_"),
    Of::Image("libgcc_s.so"),
    Of::Image("libc.so.6"),
    Of::Image("ld-linux-x86-64.so.2"),
];
/// What is around the function of a Rust program's thread.
const RUST_THREAD: &[Part] = &[Any(STD, 3, 3), In(LIBC, 2, 2)];
/// What is around its `main`, the one in C included.
const RUST_MAIN: &[Part] = &[Is("panics::main"), Any(STD, 3, 3), Is("main"), In(LIBC, 2, 2), Is("_start")];
const PANICS: Row = Row {
    chains: &[
        often(&[Is("spin"), Times(&["level"], 13), Any(STD, 0, 2), Is("round"), Is("forever")], RUST_THREAD),
        often(&[Is("spin"), Times(&["level"], 13), Any(STD, 0, 2), Is("round"), Is("forever")], RUST_MAIN),
        often(&[Is("clean"), Some(&["level"], 1, 13), Any(STD, 0, 2), Is("round"), Is("forever")], RUST_MAIN),
        seldom(
            &[Any(STD, 0, MANY), Some(&["level"], 0, 13), Any(STD, 0, MANY), Is("round"), Is("forever")],
            RUST_MAIN,
        ),
        seldom(
            &[Is("clean"), Some(&["level"], 1, 13), Any(STD, 0, 2), Is("round"), Is("forever")],
            RUST_THREAD,
        ),
        seldom(
            &[Any(STD, 0, MANY), Some(&["level"], 0, 13), Any(STD, 0, MANY), Is("round"), Is("forever")],
            RUST_THREAD,
        ),
        // As of C++'s exceptions: until libgcc has left its frame, what is around it is another function's.
        seldom(&[In(&["libgcc_s.so"], 1, 2), Some(&["level", "round"], 1, 14), In(&[""], 0, 1)], &[]),
    ],
    ..PLAIN
};

/// Go's scheduler, collector and allocator, with the packages and the assembly that they are made of; and the byte in front of
/// where signals return to, which has no name.
const RUNTIME: &[Of] = &[
    Of::Under("runtime."),
    Of::Under("runtime/"),
    Of::Under("internal/"),
    Of::Under("type:"),
    Of::Function("aeshashbody"),
    Of::Function("cmpbody"),
    Of::Function("gogo"),
    Of::Function("indexbytebody"),
    Of::Function("memeqbody"),
    Of::Under("go."),
    Of::Image("[vdso]"),
];

/// Interpreters load modules when they begin.
const PYTHON: &[Of] = &[
    Of::Image("python"),
    Of::Image("libpython"),
    Of::Image("libc.so.6"),
    Of::Image("libm.so.6"),
    Of::Image("ld-linux"),
];
const PERL: &[Of] = &[
    Of::Image("perl"),
    Of::Image("libperl"),
    Of::Image("libc.so.6"),
    Of::Image("libm.so.6"),
    Of::Image("ld-linux"),
];
const SHELL: &[Of] = &[Of::Image("bash"), Of::Image("libc.so.6"), Of::Image("ld-linux")];

const OPENBLAS: &str = "/usr/lib/x86_64-linux-gnu/libopenblas.so.0";
const BLAS: &[Of] = &[Of::Image("libopenblas"), Of::Image("libc.so.6")];
/// musl's libc is its loader as well.
const MUSL: &[&str] = &["libc.so"];
const MUSL_FILE: &str = "/lib/ld-musl-x86_64.so.1";

pub(super) static ROWS: &[Row] = &[
    Row {
        name: "rust",
        exercises: "Rust with panic=abort, whose C main has no CFI",
        program: Built("rustc", &["panics.rs"], &["-Cpanic=abort"]),
        ..PANICS
    },
    Row {
        name: "panics",
        exercises: "Rust panics on their way to catch_unwind",
        program: Built("rustc", &["panics.rs"], &["-Cpanic=unwind"]),
        stops: INSTALLING,
        ..PANICS
    },
    Row {
        name: "go",
        exercises: "goroutines that hand over to each other",
        program: Built("go", &["goroutines.go"], &["-ldflags=-B 0x77616c6b73"]),
        chains: &[
            often(
                &[Is("main.spin"), Times(&["main.descend"], 20), Is("main.work"), Is("main.main.func1")],
                &[Is("runtime.goexit")],
            ),
            often(
                &[Is("main.spin"), Times(&["main.descend"], 20), Is("main.main"), Is("runtime.main")],
                &[Is("runtime.goexit")],
            ),
            seldom(
                &[
                    Any(RUNTIME, 1, MANY),
                    Some(&["main.spin"], 0, 1),
                    Some(&["main.descend"], 0, 20),
                    Is("main.work"),
                    Is("main.main.func1"),
                ],
                &[Is("runtime.goexit")],
            ),
            seldom(
                &[
                    Any(RUNTIME, 1, MANY),
                    Some(&["main.spin"], 0, 1),
                    Some(&["main.descend"], 0, 20),
                    Is("main.main"),
                    Is("runtime.main"),
                ],
                &[Is("runtime.goexit")],
            ),
            seldom(&[Any(RUNTIME, 1, MANY)], &[]),
        ],
        // What `systemstack` was called by is on another stack.
        stops: &[right(StopReason::UnsupportedRule, 0.03)],
        ..PLAIN
    },
    Row {
        name: "sha256",
        exercises: "OpenSSL's assembly: SHA-256",
        arguments: &["speed", "-seconds", "200", "-bytes", "16384", "sha256"],
        ..OPENSSL
    },
    Row {
        name: "aes",
        exercises: "OpenSSL's assembly: AES-GCM",
        arguments: &["speed", "-seconds", "200", "-evp", "aes-256-gcm"],
        ..OPENSSL
    },
    Row {
        name: "rsa",
        exercises: "OpenSSL's assembly: RSA",
        arguments: &["speed", "-seconds", "200", "rsa2048"],
        ..OPENSSL
    },
    Row {
        name: "blas",
        exercises: "OpenBLAS's assembly: dgemm",
        program: Built("cc", &["multiplied.c"], &[]),
        arguments: &[OPENBLAS],
        environment: &[("OPENBLAS_NUM_THREADS", "1")],
        needs: &[Need::File(OPENBLAS)],
        chains: &[often(&[Any(BLAS, 1, MANY), Is("multiply")], MAIN), seldom(&[Any(LOADING, 0, MANY)], MAIN)],
        // Its kernels align the stack pointer, keep the old one in rbx, and say so nowhere but in their code.
        known: &[OPENBLAS],
        ..PLAIN
    },
    Row {
        name: "musl",
        exercises: "musl's libc",
        program: Built("musl-gcc", &["deep.c"], &[]),
        arguments: &["26"],
        needs: &[Need::File(MUSL_FILE)],
        chains: &[often(&[Is("spin"), Times(DESCENT, 26), Is("main"), In(MUSL, 1, 1)], &[Is("_start")])],
        ..PLAIN
    },
    Row {
        name: "muslstatic",
        exercises: "musl's libc linked in",
        program: Built("musl-gcc", &["deep.c"], &["-static"]),
        arguments: &["26"],
        chains: &[often(
            &[Is("spin"), Times(DESCENT, 26), Is("main"), Is("libc_start_main_stage2")],
            &[Is("_start")],
        )],
        ..PLAIN
    },
    Row {
        name: "loaded",
        exercises: "two libraries loaded in turn at the same address",
        program: Built("cc", &["loaded.c"], &["-DCALLS=300"]),
        libraries: &[
            ("libfirst.so", &["-DNAME=first", "-DFRAME=4"]),
            ("libother.so", &["-DNAME=other", "-DFRAME=96"]),
        ],
        chains: &[
            often(&[Is("first_inner"), Is("first_outer"), Is("enter"), Is("load")], MAIN),
            often(&[Is("other_inner"), Is("other_outer"), Is("enter"), Is("load")], MAIN),
            seldom(&[Any(LOADING, 0, MANY), Is("load")], MAIN),
        ],
        stops: &[
            Stop { reason: StopReason::MappingsChanged, most: 0.2, why: Why::New },
            Stop { reason: StopReason::ProcessUnknown, most: 0.1, why: Why::New },
            Stop { reason: StopReason::NoMapping, most: 0.1, why: Why::New },
        ],
        ..PLAIN
    },
    Row {
        name: "python",
        exercises: "the Python interpreter",
        program: Installed("python3"),
        // Without what a machine has Python load whenever it starts.
        arguments: &[
            "-S",
            "-c",
            "def f(n): return sum(map(f, range(n))) + 1\nwhile True: f(7); sorted(range(999), key=lambda x: -x)",
        ],
        chains: &[often(&[Any(PYTHON, 8, MANY), In(LIBC, 2, 2)], &[Any(PYTHON, 1, 1)])],
        ..PLAIN
    },
    Row {
        name: "perl",
        exercises: "the Perl interpreter",
        program: Installed("perl"),
        arguments: &[
            "-e",
            "sub f { my $n = shift; $n < 2 ? 1 : f($n - 1) + f($n - 2) } while (1) { f(12); join ',', sort { $b <=> $a } map { s/1/2/r } 1..99 }",
        ],
        chains: &[often(&[Any(PERL, 3, MANY), In(LIBC, 2, 2)], &[Any(PERL, 1, 1)])],
        ..PLAIN
    },
    Row {
        name: "bash",
        exercises: "the shell",
        program: Installed("bash"),
        arguments: &[
            "-c",
            "f() { local n=$1; ((n > 0)) && f $((n - 1)); x=${x//a/b}$n; [[ ${#x} -gt 99 ]] && x=aaa; }; while :; do f 9; done",
        ],
        chains: &[often(&[Any(SHELL, 20, MANY), In(LIBC, 2, 2)], &[Any(SHELL, 1, 1)])],
        ..PLAIN
    },
];

const LOADING: &[Of] = &[
    Of::Image("ld-linux-x86-64.so.2"),
    Of::Image("libc.so.6"),
    Of::Image("libfirst.so"),
    Of::Image("libother.so"),
];
