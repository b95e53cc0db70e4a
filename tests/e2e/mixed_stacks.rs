//! Stacks that leave tables for code without any, and come back to them, walked in the kernel.
//!
//! Profilers that show compiled JavaScript show a name or two of it and no caller, and nobody misses what is not there.
//! Here the stacks have to reach the end, with as many frames as the programs are known to have.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use windlass_agent::BackendChoice;
use windlass_schema::StopReason;
use windlass_schema::http::ArtefactKind;
use windlass_tests::program::{program, run};
use windlass_tests::service::TestService;
use windlass_tests::skip::{may_use_bpf, skip};
use windlass_tests::stacks::{Frame, Stack, total};
use windlass_unwind_compiler::build_id_of;

use crate::live::{assert_complete, assert_rightly_complete, profile_process};
use crate::walks::{JIT_FRAMES, build_jit};

/// A process that is ended when dropped.
pub(crate) struct Running(Child);

impl Running {
    pub(crate) fn start(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("the program starts"))
    }

    pub(crate) fn id(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// How many of the frames are in no image.
fn frames_without_image(stack: &Stack) -> usize {
    stack.frames.iter().filter(|frame| frame.image.is_empty()).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn c_and_code_without_an_image_in_turn() {
    let test = "mixed_stacks::c_and_code_without_an_image_in_turn";
    let Some(compiler) = program(test, "cc") else { return };
    if !may_use_bpf(test) {
        return;
    }
    let service = TestService::start().await;
    let path = build_jit(&compiler, service.folder());
    let elf = std::fs::read(&path).expect("the program");
    service.put(build_id_of(&elf).expect("a build-ID"), ArtefactKind::Executable, elf).await;
    let running = Running::start(Command::new(&path).arg("again"));
    let stacks = profile_process(&service, running.0.id(), BackendChoice::Bpf).await;
    assert_complete(&stacks);
    // level, and two frames in memory, for each level; then level(0), and what it has called.
    let mut levels = vec!["level"; JIT_FRAMES / 3 + 1];
    levels.extend(["descend", "main"]);
    let has_all = |stack: &Stack| {
        stack.frames_of(&levels).is_some() && frames_without_image(stack) >= JIT_FRAMES / 3 * 2
    };
    let innermost = |stack: &Stack, is: &dyn Fn(&Frame) -> bool| {
        stack.is_complete() && has_all(stack) && stack.frames.first().is_some_and(is)
    };
    assert!(stacks.iter().any(|stack| innermost(stack, &|frame| frame.function == "compute")), "{stacks:#?}");
    assert!(stacks.iter().any(|stack| innermost(stack, &|frame| frame.image.is_empty())), "{stacks:#?}");
    service.stop().await;
}

/// Levels of the recursion in JavaScript.
const JAVASCRIPT_FRAMES: usize = 50;

#[tokio::test(flavor = "multi_thread")]
async fn compiled_javascript() {
    let test = "mixed_stacks::compiled_javascript";
    let Some(node) = program(test, "node") else { return };
    if !may_use_bpf(test) {
        return;
    }
    let service = TestService::start().await;
    // With each function as code of its own, as the optimising compiler would not leave it.
    let source = format!(
        "function down(depth) {{ if (depth > 0) return down(depth - 1) + 1; \
         let sum = 0; for (let i = 0; i < 1e6; i++) sum = (sum * 31 + i) | 0; return sum; }} \
         for (;;) down({JAVASCRIPT_FRAMES});"
    );
    let running = Running::start(Command::new(node).args(["--always-sparkplug", "--no-opt", "-e", &source]));
    let stacks = profile_process(&service, running.0.id(), BackendChoice::Bpf).await;
    assert_rightly_complete(&stacks);
    let deep = |stack: &&Stack| stack.is_complete() && frames_without_image(stack) >= JAVASCRIPT_FRAMES;
    assert!(stacks.iter().any(|stack| deep(&stack)), "{stacks:#?}");
    service.stop().await;
}

/// Levels of the recursion in Java.
const JAVA_FRAMES: usize = 50;
/// Smallest share of samples with all of them, and largest of complete ones with fewer: nearly all time goes into the innermost.
const MIN_DEEP: f64 = 0.97;
const MAX_SHALLOW: f64 = 0.02;

/// How often the address is there that is there most often in a row.
fn longest_run(stack: &Stack) -> usize {
    let runs = stack.frames.chunk_by(|one, other| one.address == other.address);
    runs.map(<[Frame]>::len).max().unwrap_or_default()
}

/// Java's stacks: libjvm, what it made to call Java, the interpreter or a compiler's code. There are no names: a method that
/// calls itself from one place has one return address, so that a frame left out or doubled shows in their number.
#[tokio::test(flavor = "multi_thread")]
async fn java_interpreted_and_compiled() {
    let test = "mixed_stacks::java_interpreted_and_compiled";
    let (Some(java), Some(compiler)) = (program(test, "java"), program(test, "javac")) else { return };
    if !may_use_bpf(test) {
        return;
    }
    let service = TestService::start().await;
    let source = service.folder().join("Down.java");
    let text = format!(
        "public class Down {{ static int down(int depth) {{ if (depth > 0) return down(depth - 1) + 1; \
         int sum = 0; for (int i = 0; i < 1000000; i++) sum = sum * 31 + i; return sum; }} \
         public static void main(String[] a) {{ int sum = 0; for (;;) sum += down({JAVA_FRAMES}); }} }}"
    );
    std::fs::write(&source, text).expect("the source");
    run(Command::new(compiler).arg("-d").args([service.folder(), &source]), &[0]);
    // The interpreter comes back to one place whoever calls, `main` as well.
    for (mode, keeps, frames) in [
        ("-Xint", true, JAVA_FRAMES + 1),
        ("-XX:TieredStopAtLevel=1", true, JAVA_FRAMES),
        ("-XX:-TieredCompilation", true, JAVA_FRAMES),
        ("-XX:TieredStopAtLevel=1", false, JAVA_FRAMES),
        ("-XX:-TieredCompilation", false, JAVA_FRAMES),
    ] {
        let kept = if keeps { "-XX:+PreserveFramePointer" } else { "-XX:-PreserveFramePointer" };
        // With each call as a frame of its own.
        let mut command = Command::new(&java);
        command
            .args([kept, mode, "-XX:-Inline", "-XX:+UseSerialGC", "-cp"])
            .arg(service.folder())
            .arg("Down");
        let running = Running::start(&mut command);
        let mut stacks = profile_process(&service, running.0.id(), BackendChoice::Bpf).await;
        assert_rightly_complete(&stacks);
        // The others, of compilers and collectors, have names of their own.
        stacks.retain(|stack| stack.thread == "java");
        let (complete, cut): (Vec<_>, Vec<_>) = stacks.iter().partition(|stack| stack.is_complete());
        let (deep, shallow): (Vec<_>, Vec<_>) =
            complete.into_iter().partition(|stack| longest_run(stack) == frames);
        let share = |some: &[&Stack]| total(some.iter().copied()) as f64 / total(&stacks) as f64;
        assert!(share(&shallow) <= MAX_SHALLOW, "{kept} {mode}: {shallow:#?}");
        assert!(share(&deep) >= MIN_DEEP, "{kept} {mode}: {} of {}: {cut:#?}", deep.len(), stacks.len());
    }
    service.stop().await;
}

/// Methods whose frames differ in kind, of two compilers and of the interpreter, by turns: with exceptions, locks, native
/// methods, string and array stubs, and calls through interfaces.
const MIXED_JAVA: &str = "\
    import java.util.*;\n\
    public class Mixed {\n\
      interface Shape { double area(); }\n\
      static class A implements Shape { double r = 1; public double area() { return r * 3; } }\n\
      static class B implements Shape { double a = 2; public double area() { return a * a; } }\n\
      static class C extends A { public double area() { return r + 1; } }\n\
      static Shape[] shapes = { new A(), new B(), new C() };\n\
      static double calls(int n) { double s = 0; for (int i = 0; i < n; i++) s += shapes[i % 3].area(); return s; }\n\
      static int thrower(int i) { if ((i & 7) == 0) throw new IllegalStateException(); return i; }\n\
      static int exceptions(int n) { int s = 0; for (int i = 0; i < n; i++) \
        try { s += thrower(i); } catch (IllegalStateException e) { s--; } return s; }\n\
      static synchronized int locked(int i) { return i + 1; }\n\
      static int locks(int n) { int s = 0; for (int i = 0; i < n; i++) s = locked(s); return s; }\n\
      static int strings(int n) { StringBuilder b = new StringBuilder(); \
        for (int i = 0; i < n; i++) { b.append(i).append(' '); if (b.length() > 4000) b.setLength(0); } return b.length(); }\n\
      static int sorts(int n) { Integer[] a = new Integer[n]; for (int i = 0; i < n; i++) a[i] = (i * 7919) % n; \
        Arrays.sort(a, Comparator.reverseOrder()); return a[0]; }\n\
      static long natives(int n) { long s = 0; for (int i = 0; i < n; i++) s += System.nanoTime(); return s; }\n\
      static double all() { return calls(20000) + exceptions(1000) + locks(20000) + strings(3000) + sorts(3000) \
        + natives(3000); }\n\
      public static void main(String[] a) { double s = 0; for (;;) s += all(); }\n\
    }\n";
/// Smallest share of the samples of such methods with their whole stack: what is left is in stubs that build no frame.
const MIN_COMPLETE_OF_MIXED: f64 = 0.97;

#[tokio::test(flavor = "multi_thread")]
async fn java_of_all_kinds() {
    let test = "mixed_stacks::java_of_all_kinds";
    let (Some(java), Some(compiler)) = (program(test, "java"), program(test, "javac")) else { return };
    if !may_use_bpf(test) {
        return;
    }
    let service = TestService::start().await;
    let source = service.folder().join("Mixed.java");
    std::fs::write(&source, MIXED_JAVA).expect("the source");
    run(Command::new(compiler).arg("-d").args([service.folder(), &source]), &[0]);
    for mode in ["-XX:TieredStopAtLevel=1", "-XX:-TieredCompilation"] {
        let mut command = Command::new(&java);
        command.args(["-XX:+PreserveFramePointer", mode, "-XX:+UseSerialGC", "-cp"]);
        let running = Running::start(command.arg(service.folder()).arg("Mixed"));
        let mut stacks = profile_process(&service, running.0.id(), BackendChoice::Bpf).await;
        assert_rightly_complete(&stacks);
        stacks.retain(|stack| stack.thread == "java");
        let complete = total(stacks.iter().filter(|stack| stack.is_complete()));
        let share = complete as f64 / total(&stacks) as f64;
        stacks.retain(|stack| !stack.is_complete());
        assert!(share >= MIN_COMPLETE_OF_MIXED, "{mode}: {share}: {stacks:#?}");
    }
    service.stop().await;
}

/// A list's references are loaded again and again, while another thread has a collector move what they refer to.
const MOVED_JAVA: &str = "\
    public class Moved {\n\
      static class Node { Node next, other; int value; }\n\
      static int sum(Node n) { int s = 0; while (n != null) { s += n.value; if (n.other != null) s += n.other.value; n = n.next; } return s; }\n\
      static int down(int depth, Node n) { if (depth > 0) return down(depth - 1, n) + 1; \
        int s = 0; for (int i = 0; i < 20; i++) s += sum(n); return s; }\n\
      public static void main(String[] a) {\n\
        Node list = null; for (int i = 0; i < 20000; i++) { Node n = new Node(); n.next = n.other = list; list = n; }\n\
        Thread t = new Thread(() -> { for (;;) System.gc(); }, \"collections\"); t.setDaemon(true); t.start();\n\
        int s = 0; for (;;) s += down(DEPTH, list); }\n\
    }\n";

/// Smallest share of samples with all frames, and largest of complete ones with fewer: at each collection the thread is stopped
/// at any instruction, and its stack gone through on its way back.
const MIN_DEEP_OF_MOVED: f64 = 0.9;
const MAX_SHALLOW_OF_MOVED: f64 = 0.05;

/// A collector's barrier saves registers below the frame of a method that keeps no frame pointer, which has that many frames
/// all the same.
#[tokio::test(flavor = "multi_thread")]
async fn java_while_objects_move() {
    let test = "mixed_stacks::java_while_objects_move";
    let (Some(java), Some(compiler)) = (program(test, "java"), program(test, "javac")) else { return };
    if !may_use_bpf(test) {
        return;
    }
    let collector = "-XX:+UseZGC";
    let has_it = Command::new(&java).args([collector, "-version"]).output().expect("java runs").status;
    if !has_it.success() {
        skip(test, "this java has no ZGC");
        return;
    }
    let service = TestService::start().await;
    let source = service.folder().join("Moved.java");
    std::fs::write(&source, MOVED_JAVA.replace("DEPTH", &JAVA_FRAMES.to_string())).expect("the source");
    run(Command::new(compiler).arg("-d").args([service.folder(), &source]), &[0]);
    for mode in ["-XX:TieredStopAtLevel=1", "-XX:-TieredCompilation"] {
        let mut command = Command::new(&java);
        command.args([collector, mode, "-XX:-PreserveFramePointer", "-XX:-Inline", "-Xmx256m", "-cp"]);
        let running = Running::start(command.arg(service.folder()).arg("Moved"));
        let mut stacks = profile_process(&service, running.0.id(), BackendChoice::Bpf).await;
        assert_rightly_complete(&stacks);
        stacks.retain(|stack| stack.thread == "java");
        let (complete, cut): (Vec<_>, Vec<_>) = stacks.iter().partition(|stack| stack.is_complete());
        let (deep, shallow): (Vec<_>, Vec<_>) =
            complete.into_iter().partition(|stack| longest_run(stack) == JAVA_FRAMES);
        let share = |some: &[&Stack]| total(some.iter().copied()) as f64 / total(&stacks) as f64;
        assert!(share(&shallow) <= MAX_SHALLOW_OF_MOVED, "{mode}: {shallow:#?}");
        assert!(share(&deep) >= MIN_DEEP_OF_MOVED, "{mode}: {cut:#?}");
        let is_barrier = |stack: &&&Stack| {
            stack.frames.iter().any(|frame| frame.function.contains("ZBarrierSetRuntime::load_barrier"))
        };
        let barriers = |some: &[&Stack]| total(some.iter().filter(is_barrier).copied());
        let whole = barriers(&deep);
        assert!(whole > 10 * (barriers(&shallow) + barriers(&cut)), "{mode}: {whole}: {shallow:#?} {cut:#?}");
    }
    service.stop().await;
}

/// What LuaJIT interprets is walked by its CFI. What it compiled has none that can be read, and keeps no frame pointer: such
/// a walk ends with that for a reason.
#[tokio::test(flavor = "multi_thread")]
async fn lua_interpreted_and_compiled() {
    let test = "mixed_stacks::lua_interpreted_and_compiled";
    let Some(lua) = program(test, "luajit") else { return };
    if !may_use_bpf(test) {
        return;
    }
    let service = TestService::start().await;
    let source = "local function busy(n) local s = 0 for i = 1, n do s = s + i end return s end \
                  while true do busy(1e6) end";
    for (mode, is_compiled) in [("-joff", false), ("-jon", true)] {
        let running = Running::start(Command::new(&lua).args([mode, "-e", source]));
        let stacks = profile_process(&service, running.0.id(), BackendChoice::Bpf).await;
        assert_rightly_complete(&stacks);
        let is_made = |stack: &&Stack| stack.frames.first().is_some_and(|frame| frame.image.is_empty());
        let (made, others): (Vec<_>, Vec<_>) = stacks.iter().partition(is_made);
        assert!(made.iter().all(|stack| stack.stop == Some(StopReason::Jit)), "{made:#?}");
        let complete = total(others.iter().copied().filter(|stack| stack.is_complete()));
        assert!(if is_compiled { !made.is_empty() } else { complete > 0 }, "{stacks:#?}");
    }
    service.stop().await;
}

/// Longest wait for Java's compiler.
const COMPILED: Duration = Duration::from_secs(60);

/// A compiled native method's frame is left before it returns: whoever called it is there all the same. Names tell it from its
/// caller.
#[tokio::test(flavor = "multi_thread")]
async fn java_calling_native_methods() {
    let test = "mixed_stacks::java_calling_native_methods";
    let programs = (program(test, "java"), program(test, "javac"), program(test, "jcmd"));
    let (Some(java), Some(compiler), Some(jcmd)) = programs else { return };
    if !may_use_bpf(test) {
        return;
    }
    let service = TestService::start().await;
    let source = service.folder().join("Native.java");
    let text = "public class Native { static long memory(Runtime r) { return r.freeMemory() + 1; } \
         static long call(Runtime r) { long sum = 0; for (int i = 0; i < 1000; i++) sum += memory(r); return sum; } \
         public static void main(String[] a) { Runtime r = Runtime.getRuntime(); long sum = 0; for (;;) sum += call(r); } }";
    std::fs::write(&source, text).expect("the source");
    run(Command::new(compiler).arg("-d").args([service.folder(), &source]), &[0]);
    let mut command = Command::new(&java);
    command
        .args(["-XX:+PreserveFramePointer", "-XX:TieredStopAtLevel=1", "-XX:-Inline", "-XX:+UseSerialGC"])
        .arg("-cp")
        .arg(service.folder())
        .arg("Native");
    let running = Running::start(&mut command);
    let map = format!("/tmp/perf-{}.map", running.id());
    let start = Instant::now();
    let is_compiled = || {
        // It fails until Java listens.
        let _ = Command::new(&jcmd).args([&running.id().to_string(), "Compiler.perfmap"]).output();
        let names = std::fs::read_to_string(&map).unwrap_or_default();
        ["Native.call(", "Native.memory(", "Runtime.freeMemory("].iter().all(|name| names.contains(name))
    };
    while !is_compiled() {
        assert!(start.elapsed() < COMPILED, "nothing is compiled");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let stacks = profile_process(&service, running.id(), BackendChoice::Bpf).await;
    drop(running);
    let _ = std::fs::remove_file(&map);
    assert_rightly_complete(&stacks);
    let is = |frame: Option<&Frame>, name: &str| frame.is_some_and(|frame| frame.function.contains(name));
    let native = stacks.iter().filter(|stack| stack.is_complete() && is(stack.frames.first(), "freeMemory"));
    let (whole, short): (Vec<_>, Vec<_>) =
        native.partition(|stack| is(stack.frames.get(1), "memory") && is(stack.frames.get(2), "call"));
    assert!(!whole.is_empty(), "{stacks:#?}");
    assert!(short.is_empty(), "{short:#?}");
    service.stop().await;
}

/// Functions that do little but call and return, from the outermost on.
const CALL_CHAIN: [&str; 4] = ["outermost", "middle", "inner", "leaf"];
/// Each calls the next; the last in every way there is, with fewer and more arguments than it takes.
const CALLS: &str = "\
    let count = 0;\n\
    function leaf(a, b) { count = (count + a) | 0; return count; }\n\
    function inner(n) { for (let i = 0; i < 1000; i++) { leaf(i); leaf(i, 1, 2, 3); leaf.apply(null, [i]); \
        leaf.call(null, i, 2); leaf(...[i, 2]); new leaf(i); } }\n\
    function middle(n) { [n].forEach(inner); }\n\
    function outermost() { middle.bind(null, 1)(); }\n\
    for (;;) outermost();\n";

/// The functions of the script that `stack` passes through, from the outermost on. `None` if the name of one is not known.
fn javascript(stack: &Stack) -> Option<Vec<&str>> {
    let made = stack.frames.iter().rev().filter(|frame| frame.image.is_empty() || frame.image == "[jit]");
    let mut functions = Vec::new();
    for frame in made {
        let name = frame.function.as_str();
        let (_, name) = name.split_once(':').filter(|(kind, _)| *kind == "JS")?;
        let (name, place) = name.split_once(' ')?;
        if place.contains("calls.js:") {
            functions.push(name.trim_start_matches(['~', '^', '+', '*']));
        }
    }
    Some(functions)
}

/// Samples fall everywhere: on prologues, returns, and where arguments are moved.
#[tokio::test(flavor = "multi_thread")]
async fn calls_of_javascript() {
    let test = "mixed_stacks::calls_of_javascript";
    let Some(node) = program(test, "node") else { return };
    if !may_use_bpf(test) {
        return;
    }
    let service = TestService::start().await;
    let script = service.folder().join("calls.js");
    std::fs::write(&script, CALLS).expect("the script");
    for tier in [&["--no-opt", "--always-sparkplug"][..], &["--no-turbo-inlining"]] {
        let running = Running::start(
            Command::new(&node)
                .args(["--perf-basic-prof", "--interpreted-frames-native-stack"])
                .args(tier)
                .arg(&script)
                // It logs into its folder.
                .current_dir(service.folder()),
        );
        let pid = running.id();
        let stacks = profile_process(&service, pid, BackendChoice::Bpf).await;
        drop(running);
        // It is node's to remove, and node was killed.
        let _ = std::fs::remove_file(format!("/tmp/perf-{pid}.map"));
        assert_complete(&stacks);
        let mut is_met = [false; CALL_CHAIN.len()];
        for stack in stacks.iter().filter(|stack| stack.is_complete()) {
            let Some(functions) = javascript(stack) else { continue };
            // The script itself has no name.
            let called: Vec<&str> = functions.into_iter().filter(|name| !name.is_empty()).collect();
            assert!(CALL_CHAIN.starts_with(&called), "{called:?}\n{stack:#?}");
            if let Some(last) = called.len().checked_sub(1) {
                is_met[last] = true;
            }
        }
        assert!(is_met[2] && is_met[3], "{is_met:?}\n{stacks:#?}");
    }
    service.stop().await;
}
