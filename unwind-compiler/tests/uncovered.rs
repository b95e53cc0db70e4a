//! Code without CFI in images that this machine's compilers and linkers make: what is recognised is what its
//! instructions say, and where there is CFI as well, what that says.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::path::{Path, PathBuf};
use std::process::Command;

use windlass_schema::{BuildId, ImageAddress, Rule, Table, UnsupportedReason};
use windlass_unwind_compiler::{Compiled, RecognisedKind, compile, verify};

const SOURCE: &str = r#"
#define NOINLINE __attribute__((noinline))
volatile int sink;
NOINLINE int leaf(int n) { return n * sink; }
NOINLINE int a(int n) { int x = leaf(n); return x + leaf(x); }
NOINLINE int b(int n) { int x = a(n); return x + a(x) + n; }
NOINLINE int c(int n) { int x = b(n); return x + b(x) + n; }
NOINLINE int d(int n) { int x = c(n); return x + c(x) + n; }
NOINLINE int e(int n) { int x = d(n); return x + d(x) + n; }
NOINLINE int f(int n) { int x = e(n); return x + e(x) + n; }
NOINLINE int g(int n) { int x = f(n); return x + f(x) + n; }
NOINLINE int h(int n) { int x = g(n); return x + g(x) + n; }
NOINLINE int i(int n) { int x = h(n); return x + h(x) + n; }
int main(int n, char **v) { return i(n) + i(n + 1); }
"#;

const NO_CFI: &[&str] = &["-O2", "-fno-asynchronous-unwind-tables", "-fno-unwind-tables", "-fno-exceptions"];

/// An image made of [`SOURCE`]; `None` if this machine lacks the compiler.
fn built(name: &str, compiler: &str, arguments: &[&str]) -> Option<Vec<u8>> {
    built_of(name, &[("c", SOURCE)], compiler, arguments)
}

/// An image made of these sources, by the ends of their names.
fn built_of(name: &str, sources: &[(&str, &str)], compiler: &str, arguments: &[&str]) -> Option<Vec<u8>> {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let image = folder.join(name);
    let mut command = Command::new(compiler);
    command.args(arguments).arg("-o").arg(&image);
    for (number, (end, source)) in sources.iter().enumerate() {
        let path = folder.join(format!("{name}-{number}.{end}"));
        std::fs::write(&path, source).unwrap();
        command.arg(path);
    }
    let built = command.output().ok()?;
    built.status.success().then(|| std::fs::read(&image).unwrap())
}

/// Compiles and verifies.
#[track_caller]
fn compiled(elf: &[u8]) -> Compiled {
    let compiled = compile(elf, BuildId::new(b"WINDLASS").unwrap()).unwrap();
    let verification = verify(elf, &Table::parse(&compiled.table).unwrap()).unwrap();
    assert_eq!(verification.wrong, 0, "{verification:#?}");
    compiled
}

/// Addresses of the symbols of functions, by name.
fn symbol(elf: &[u8], name: &str) -> std::ops::Range<u64> {
    use object::{Object as _, ObjectSymbol as _};
    let file = object::File::parse(elf).unwrap();
    let symbol = file.symbols().find(|symbol| symbol.name() == Ok(name)).unwrap();
    symbol.address()..symbol.address() + symbol.size()
}

/// Names and addresses of all functions' symbols with a size.
fn functions(elf: &[u8]) -> Vec<(String, std::ops::Range<u64>)> {
    use object::{Object as _, ObjectSymbol as _, SymbolKind};
    let file = object::File::parse(elf).unwrap();
    let functions = file.symbols().filter(|symbol| symbol.kind() == SymbolKind::Text && symbol.size() > 0);
    functions.map(|one| (one.name().unwrap().to_owned(), one.address()..one.address() + one.size())).collect()
}

#[test]
fn the_compilers_own_start_files_are_recognised() {
    let Some(elf) = built("started", "cc", &["-O2"]) else { return };
    let compiled = compiled(&elf);
    let table = Table::parse(&compiled.table).unwrap();
    for name in
        ["frame_dummy", "register_tm_clones", "deregister_tm_clones", "__do_global_dtors_aux", "_init"]
    {
        let start = ImageAddress::new(symbol(&elf, name).start);
        assert!(table.rule(start).is_exact(), "{name} {}", table.rule(start));
    }
    assert!(compiled.report.recognised_bytes[&RecognisedKind::Function] > 100, "{:?}", compiled.report);
    assert!(compiled.report.uncovered_code_bytes < 1000, "{:?}", compiled.report);
    assert_eq!(compiled.report.frame_pointer_code_bytes, 0);
}

/// Two images of the same instructions, one of which has CFI: what is recognised in the one has to be what the other
/// states, but for rbp where it is both saved and unchanged. A function that nothing proves to be one stays unknown.
#[test]
fn functions_without_cfi_have_the_rows_that_their_cfi_would_give() {
    for (name, option) in [("kept", "-fno-omit-frame-pointer"), ("omitted", "-fomit-frame-pointer")] {
        let Some(with) = built(&format!("{name}-cfi"), "cc", &["-O2", option]) else { return };
        let without: Vec<_> = NO_CFI.iter().copied().chain([option]).collect();
        let without = built(name, "cc", &without).unwrap();
        let (with_table, table) = (compiled(&with).table, compiled(&without).table);
        let (with_table, table) = (Table::parse(&with_table).unwrap(), Table::parse(&table).unwrap());
        let mut same = 0;
        for function in ["leaf", "a", "b", "c", "i", "main"] {
            let (range, other) = (symbol(&without, function), symbol(&with, function));
            assert_eq!(range.end - range.start, other.end - other.start, "{function}");
            for at in 0..range.end - range.start {
                let rule = table.rule(ImageAddress::new(range.start + at));
                let stated = with_table.rule(ImageAddress::new(other.start + at));
                match (rule, stated) {
                    (Rule::NoCfi | Rule::Unsupported(UnsupportedReason::FramePointersOnly), _) => {}
                    (
                        Rule::Frame { cfa, return_address, .. },
                        Rule::Frame { cfa: of_cfi, return_address: also, .. },
                    ) if (cfa, return_address) == (of_cfi, also) => same += 1,
                    _ => panic!("{function}+{at:#x}: {rule}, CFI {stated}"),
                }
            }
        }
        assert!(same > 0, "{same}");
    }
}

#[test]
fn parts_of_functions_are_not_taken_for_functions() {
    let sources = [
        ("c", include_str!("parts/parts.c")),
        ("c", include_str!("parts/called.c")),
        ("S", include_str!("parts/start.S")),
    ];
    let common = ["-O1", "-freorder-blocks-and-partition", "-foptimize-sibling-calls", "-fno-pic", "-no-pie"];
    let arguments = |cfi| [&common[..], &["-nostdlib", cfi]].concat();
    let Some(with) = built_of("parts-cfi", &sources, "cc", &arguments("-fasynchronous-unwind-tables")) else {
        return;
    };
    let without = built_of("parts", &sources, "cc", &arguments("-fno-asynchronous-unwind-tables")).unwrap();
    let (with_table, table) = (compiled(&with).table, compiled(&without).table);
    let (with_table, table) = (Table::parse(&with_table).unwrap(), Table::parse(&table).unwrap());
    let mut same = 0;
    for (name, range) in functions(&without) {
        let other = symbol(&with, &name);
        assert_eq!(range.end - range.start, other.end - other.start, "{name}");
        for at in 0..range.end - range.start {
            let rule = table.rule(ImageAddress::new(range.start + at));
            let stated = with_table.rule(ImageAddress::new(other.start + at));
            if let Rule::Frame { cfa, return_address, .. } = rule {
                let is_stated = matches!(stated, Rule::Frame { cfa: of_cfi, return_address: also, .. }
                    if (cfa, return_address) == (of_cfi, also));
                assert!(is_stated, "{name}+{at:#x}: {rule}, CFI {stated}");
                same += 1;
            }
        }
    }
    assert!(same > 50, "{same}");
}

#[test]
fn an_image_that_keeps_frame_pointers_says_so_where_nothing_else_is_known() {
    let mut marked = Vec::new();
    for (name, option) in [("fp", "-fno-omit-frame-pointer"), ("no-fp", "-fomit-frame-pointer")] {
        let arguments: Vec<_> = NO_CFI.iter().copied().chain([option, "-nostdlib", "-Wl,-e,main"]).collect();
        let Some(elf) = built(name, "cc", &arguments) else { return };
        let compiled = compiled(&elf);
        let report = &compiled.report;
        assert_eq!(report.fdes, 0, "{report:?}");
        // The entry is not called, and so is not followed; all else is.
        let entry = ImageAddress::new(symbol(&elf, "main").start);
        let rule = Table::parse(&compiled.table).unwrap().rule(entry);
        marked.push(rule);
        // The padding behind the leaf is of no function that is seen to keep one.
        let padding = symbol(&elf, "a").start - symbol(&elf, "leaf").end;
        let rest = report.uncovered_code_bytes - report.recognised_bytes[&RecognisedKind::Function] - padding;
        let by_frame_pointers = if option == "-fno-omit-frame-pointer" { rest } else { 0 };
        assert_eq!(report.frame_pointer_code_bytes, by_frame_pointers, "{report:?}");
    }
    assert_eq!(marked, [Rule::Unsupported(UnsupportedReason::FramePointersOnly), Rule::NoCfi]);
}

#[test]
fn images_of_other_linkers_and_libraries() {
    for (name, compiler, arguments, kinds) in [
        ("lld", "cc", &["-fuse-ld=lld"][..], &[RecognisedKind::LinkageTable][..]),
        ("mold", "cc", &["-fuse-ld=mold"], &[RecognisedKind::LinkageTable]),
        ("musl", "musl-gcc", &["-static"], &[RecognisedKind::ProcessEntry]),
        ("aarch64", "aarch64-linux-gnu-gcc", &["-O2"], &[RecognisedKind::LinkageTable]),
        (
            "aarch64-bti",
            "aarch64-linux-gnu-gcc",
            &["-O2", "-mbranch-protection=standard"],
            &[RecognisedKind::LinkageTable],
        ),
    ] {
        let Some(elf) = built(name, compiler, arguments) else { continue };
        let report = compiled(&elf).report;
        for kind in kinds.iter().chain([&RecognisedKind::Function]) {
            assert!(report.recognised_bytes.contains_key(kind), "{name}: {kind:?} {report:?}");
        }
    }
}

#[test]
fn no_bytes_of_code_are_nothing_to_recognise() {
    let Some(elf) = built("skeleton", "cc", &["-O2"]) else { return };
    let stripped = Path::new(env!("CARGO_TARGET_TMPDIR")).join("skeleton.debug");
    let image = Path::new(env!("CARGO_TARGET_TMPDIR")).join("skeleton");
    let keep = Command::new("objcopy").arg("--only-keep-debug").arg(image).arg(&stripped).status();
    assert!(compiled(&elf).report.uncovered_code_bytes > 0);
    if keep.is_ok_and(|status| status.success()) {
        let report = compiled(&std::fs::read(stripped).unwrap()).report;
        assert_eq!((report.uncovered_code_bytes, report.recognised_bytes.len()), (0, 0));
    }
}

/// A static program without CFI, wide as a runtime, which brings its C library.
const WIDE: &str = r#"
.text
.globl _start
_start: xor %ebp, %ebp
    lea main(%rip), %rdi
    call framed
    hlt
    nop
restore: mov $15, %rax
    syscall
main: push %rax
    call framed
    pop %rcx
    ret
.p2align 4, 0xcc
framed:
.rept 16384
    push %rbp
    mov %rsp, %rbp
    leave
    ret
    .p2align 5, 0xcc
.endr
.globl restore, main
"#;

#[test]
fn wide_code_that_keeps_frame_pointers_has_an_entry_and_trampolines() {
    if !cfg!(target_arch = "x86_64") {
        println!("wide_code_that_keeps_frame_pointers_has_an_entry_and_trampolines: skipped, x86-64 only");
        return;
    }
    let Some(elf) = built_of("wide", &[("S", WIDE)], "cc", &["-nostdlib", "-static"]) else {
        println!("wide_code_that_keeps_frame_pointers_has_an_entry_and_trampolines: skipped, no cc");
        return;
    };
    let compiled = compiled(&elf);
    let table = Table::parse(&compiled.table).unwrap();
    let rule = |name: &str, offset: u64| table.rule(ImageAddress::new(symbol(&elf, name).start + offset));
    assert_eq!(rule("_start", 0), Rule::End);
    assert!(matches!(rule("restore", 0), Rule::Signal(_)));
    assert_eq!(rule("main", 1).to_string(), "cfa=rsp+16 ra=*(cfa-8) rbp=same");
    let bytes: u64 = compiled.report.recognised_bytes.values().sum();
    assert!(bytes >= 16384 * 6, "{:?}", compiled.report);
}

/// glibc's `makecontext` gives `__start_context` as a return address, which is looked up in the padding in front of it.
#[test]
fn coroutines_end_in_padding_in_front_of_cfi() {
    let source = |name: &str, last: &str| {
        format!(
            ".globl {name}\n.type {name}, @function\n{name}: .cfi_startproc\nlea start(%rip), %rdi\nmov %rdi, (%rsi)\nret\n\
             .cfi_endproc\n.size {name}, . - {name}\n.p2align 4\n.type start, @function\nstart: .cfi_startproc\n\
             mov %rbx, %rsp\nmov (%rsp), %rdi\ntest %rdi, %rdi\nje 1f\ncall {name}\nmov %rax, %rdi\n\
             1: call {name}\n{last}\n.cfi_endproc\n.size start, . - start\n"
        )
    };
    for (library, name, last, expect) in [
        ("libc.so.6", "makecontext", "hlt", Rule::End),
        ("libc.so.6", "other", "hlt", Rule::NoCfi),
        ("libc.so.6", "makecontext", "ret", Rule::NoCfi),
        ("libother.so", "makecontext", "hlt", Rule::NoCfi),
    ] {
        let file = format!("coroutines-{library}-{name}-{last}");
        let soname = format!("-Wl,-soname,{library},--default-symver");
        let source = source(name, last);
        let Some(elf) = built_of(&file, &[("s", &source)], "cc", &["-shared", "-nostdlib", &soname]) else {
            return;
        };
        let compiled = compiled(&elf);
        let start = symbol(&elf, "start").start;
        let table = Table::parse(&compiled.table).unwrap();
        assert_eq!(table.rule(ImageAddress::new(start - 1)), expect, "{file}");
        assert_ne!(table.rule(ImageAddress::new(start - 2)), Rule::End, "{file}");
        assert_ne!(table.rule(ImageAddress::new(start)), Rule::End, "{file}");
    }
}

/// The kernel is about to put the registers back: the system call, the last instruction under CFI, is done, and rsp unchanged.
#[test]
fn behind_the_system_call_that_returns_from_a_signal_handler() {
    let test = "behind_the_system_call_that_returns_from_a_signal_handler";
    if !cfg!(target_arch = "x86_64") {
        println!("{test}: skipped, x86-64 only");
        return;
    }
    let source = "#include <signal.h>\nstruct sigaction it; int main() { return sigaction(1, &it, 0); }";
    let Some(elf) = built_of("restores", &[("c", source)], "cc", &["-static"]) else {
        println!("{test}: skipped, no cc or no static libc");
        return;
    };
    let table = compiled(&elf).table;
    let table = Table::parse(&table).unwrap();
    let restore = symbol(&elf, "__restore_rt").start;
    let rule = |offset: u64| table.rule(ImageAddress::new(restore + offset));
    // mov $15, %rax; syscall: nine bytes.
    assert!(matches!(rule(0), Rule::Signal(_)));
    assert_eq!((rule(9), rule(10)), (rule(0), Rule::NoCfi));
}
