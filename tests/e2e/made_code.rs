//! Names of code that processes make at run time, from what their compilers write down to the service's profile.

use std::io::Write as _;
use std::process::Command;
use std::time::{Duration, Instant};

use windlass_agent::BackendChoice;
use windlass_schema::http::ArtefactKind;
use windlass_tests::program::{checkout, program, run};
use windlass_tests::service::TestService;
use windlass_tests::skip::may_use_bpf;
use windlass_tests::stacks::{Frame, Stack, total};
use windlass_unwind_compiler::build_id_of;

use crate::live::profile_process;
use crate::mixed_stacks::Running;

/// What profiles show as the file of made code.
pub(crate) const MADE: &str = "[jit]";
/// Fewest samples of each function that a test waits for; each has a fifth of the time or more.
pub(crate) const MIN_SAMPLES: i64 = 10;

/// Samples of stacks in which some frame of made code fits.
fn samples_of(stacks: &[Stack], fits: impl Fn(&Frame) -> bool) -> i64 {
    total(stacks.iter().filter(|stack| stack.frames.iter().any(|frame| frame.image == MADE && fits(frame))))
}

#[tokio::test(flavor = "multi_thread")]
async fn javascript_by_perf_map() {
    let test = "made_code::javascript_by_perf_map";
    let Some(node) = program(test, "node") else { return };
    if !may_use_bpf(test) {
        return;
    }
    let service = TestService::start().await;
    // Beside functions that stay, one that is made anew all the time, so that places come to be used again.
    let script = service.folder().join("script.js");
    let source = "\
        function outermost(depth) { return depth > 0 ? outermost(depth - 1) + 1 : busyLoop() + renewed(); }\n\
        function busyLoop() { let sum = 0; for (let i = 0; i < 1e6; i++) sum = (sum * 31 + i) | 0; return sum; }\n\
        let number = 0;\n\
        function renewed() { number++; \
            return new Function('n', 'let s = ' + number + '; for (let i = 0; i < n; i++) s = (s * 7 + i) | 0; return s;')\
            (1000); }\n\
        for (;;) outermost(5);\n";
    std::fs::write(&script, source).expect("the script");
    let running = Running::start(
        Command::new(node)
            .args(["--perf-basic-prof", "--interpreted-frames-native-stack", "--no-turbo-inlining"])
            .arg(&script)
            // It logs into its folder.
            .current_dir(service.folder()),
    );
    let pid = running.id();
    let stacks = profile_process(&service, pid, BackendChoice::Bpf).await;
    drop(running);
    // It is node's to remove, and node was killed.
    let _ = std::fs::remove_file(format!("/tmp/perf-{pid}.map"));
    for function in ["outermost", "busyLoop"] {
        let named = samples_of(&stacks, |frame| {
            frame.function.contains(&format!("{function} ")) && frame.function.contains("script.js:")
        });
        assert!(named >= MIN_SAMPLES, "{function}: {named}\n{stacks:#?}");
    }
    // busyLoop is called by outermost, never the other way round.
    let frames = |stack: &Stack| -> Vec<bool> {
        let names = stack.frames.iter().map(|frame| frame.function.as_str());
        names.filter(|name| name.contains("script.js:")).map(|name| name.contains("busyLoop ")).collect()
    };
    for stack in &stacks {
        let later = frames(stack).into_iter().skip(1);
        assert!(!later.clone().any(|is_busy_loop| is_busy_loop), "{stack:#?}");
    }
    service.stop().await;
}

/// How long a JVM may take to start and to compile two methods.
const MAX_START: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn java_by_perf_map() {
    let test = "made_code::java_by_perf_map";
    let (Some(java), Some(compiler)) = (program(test, "java"), program(test, "javac")) else { return };
    let Some(command) = program(test, "jcmd") else { return };
    if !may_use_bpf(test) {
        return;
    }
    let service = TestService::start().await;
    let source = service.folder().join("Deep.java");
    let text = "public class Deep { \
        static int busy() { int s = 0; for (int i = 0; i < 1000000; i++) s = s * 31 + i; return s; } \
        static int outer(int depth) { return depth > 0 ? outer(depth - 1) + 1 : busy(); } \
        public static void main(String[] a) { int s = 0; for (;;) s += outer(5); } }";
    std::fs::write(&source, text).expect("the source");
    run(Command::new(compiler).arg("-d").args([service.folder(), &source]), &[0]);
    let mut start = Command::new(java);
    // Both are compiled before they run, as functions of their own.
    start.args(["-XX:+PreserveFramePointer", "-Xcomp", "-XX:TieredStopAtLevel=1", "-XX:-Inline"]);
    start.args(["-XX:CompileCommand=quiet", "-XX:CompileCommand=compileonly,Deep::*", "-XX:+UseSerialGC"]);
    let running = Running::start(start.arg("-cp").arg(service.folder()).arg("Deep"));
    let pid = running.id();
    let (map, until) = (format!("/tmp/perf-{pid}.map"), Instant::now() + MAX_START);
    // Until the JVM listens, this fails.
    let is_written = || {
        let _ = Command::new(&command).args([&pid.to_string(), "Compiler.perfmap"]).output();
        std::fs::read_to_string(&map)
            .is_ok_and(|map| map.contains("Deep.busy()") && map.contains("Deep.outer(int)"))
    };
    while !is_written() {
        assert!(Instant::now() < until, "{:?}", std::fs::read_to_string(&map));
    }
    let stacks = profile_process(&service, pid, BackendChoice::Bpf).await;
    drop(running);
    std::fs::remove_file(&map).expect("the JVM wrote it");
    // One calls the other, six times in all, and is called by what is called once.
    let chain = |stack: &Stack| {
        let names =
            stack.frames.iter().filter(|frame| frame.image == MADE && frame.function.contains("Deep."));
        names.map(|frame| frame.function.contains("busy")).collect::<Vec<_>>()
    };
    for stack in &stacks {
        assert!(!chain(stack).into_iter().skip(1).any(|is_busy| is_busy), "{stack:#?}");
    }
    let whole = total(stacks.iter().filter(|stack| {
        let outer = chain(stack).into_iter().skip(1).filter(|is_busy| !is_busy).count();
        stack.is_complete() && chain(stack).first() == Some(&true) && outer == 6 + 1
    }));
    assert!(whole >= MIN_SAMPLES, "{whole}\n{stacks:#?}");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn code_in_one_place_and_moved_by_jitdump() {
    let test = "made_code::code_in_one_place_and_moved_by_jitdump";
    let Some(compiler) = program(test, "cc") else { return };
    if !may_use_bpf(test) {
        return;
    }
    let service = TestService::start().await;
    let (path, source) = (service.folder().join("jitdump"), checkout().join("tests/programs/jitdump.c"));
    run(Command::new(compiler).args(["-O2", "-Wl,--build-id", "-o"]).args([&path, &source]), &[0]);
    let elf = std::fs::read(&path).expect("the program");
    service.put(build_id_of(&elf).expect("a build-ID"), ArtefactKind::Executable, elf).await;
    let running = Running::start(Command::new(&path).arg(service.folder()));
    let stacks = profile_process(&service, running.id(), BackendChoice::Bpf).await;
    drop(running);
    for function in ["made::first", "made::second(int)"] {
        let named = samples_of(&stacks, |frame| frame.function == function);
        assert!(named >= MIN_SAMPLES, "{function}: {named}\n{stacks:#?}");
    }
    // Both were at one place at different times, and the second went on at another.
    let places = |function: &str| -> std::collections::BTreeSet<u64> {
        let frames = stacks.iter().flat_map(|stack| &stack.frames);
        frames.filter(|frame| frame.function == function).map(|frame| frame.address >> 12).collect()
    };
    let (first, second) = (places("made::first"), places("made::second(int)"));
    assert_eq!((first.len(), second.len()), (1, 2), "{stacks:#?}");
    assert!(first.is_subset(&second), "{first:x?} {second:x?}");
    service.stop().await;
}

/// A process that maps code and claims to have written its names, in ways that must not be believed.
#[tokio::test(flavor = "multi_thread")]
async fn what_others_wrote_is_not_believed() {
    let test = "made_code::what_others_wrote_is_not_believed";
    let Some(compiler) = program(test, "cc") else { return };
    if !may_use_bpf(test) {
        return;
    }
    let service = TestService::start().await;
    let path = crate::walks::build_jit(&compiler, service.folder());
    let running = Running::start(Command::new(&path).arg("again"));
    let (map, elsewhere) = (format!("/tmp/perf-{}.map", running.id()), service.folder().join("map"));
    let mut file = std::fs::File::create(&elsewhere).expect("a file");
    writeln!(file, "0 7fffffffffff believed").expect("a file");
    std::os::unix::fs::symlink(&elsewhere, &map).expect("a link");
    let stacks = profile_process(&service, running.id(), BackendChoice::Bpf).await;
    drop(running);
    std::fs::remove_file(&map).expect("the link is there");
    assert_eq!(samples_of(&stacks, |_| true), 0);
    assert!(!stacks.iter().flat_map(|stack| &stack.frames).any(|frame| frame.function == "believed"));
    service.stop().await;
}
