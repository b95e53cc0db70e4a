//! Stacks that go from Python through wasmtime to WebAssembly and back, whole and with the names that wasmtime writes down.

use std::process::Command;

use windlass_agent::BackendChoice;
use windlass_tests::program::{checkout, package_of_python, program};
use windlass_tests::service::TestService;
use windlass_tests::skip::may_use_bpf;
use windlass_tests::stacks::{Stack, total};

use crate::live::{assert_complete_but_for, profile_process};
use crate::made_code::{MADE, MIN_SAMPLES};
use crate::mixed_stacks::Running;

/// Calls of `down` to itself in `tests/programs/wasm.py`.
const DEPTH: usize = 20;
/// Largest share of stacks that are not whole.
const MAX_CUT: f64 = 0.01;
/// What may be called at the bottom, from the outermost on.
const AT_BOTTOM: &[&[&str]] = &[
    &["calls", "leaf"],
    &["fills", "wasmtime_builtin_memory_fill"],
    &["fills", "wasmtime_builtin_memory_grow"],
    &["signatures[0]::wasm_to_array_trampoline"],
];

/// The module's functions in a stack, from the outermost on. `None` if one has no name.
fn functions(stack: &Stack) -> Option<Vec<&str>> {
    let made = stack.frames.iter().rev().filter(|frame| frame.image.is_empty() || frame.image == MADE);
    made.map(|frame| (frame.image == MADE).then_some(frame.function.as_str())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn named_and_whole_between_native_frames() {
    let test = "web_assembly::named_and_whole_between_native_frames";
    let (Some(python), Some(packages)) = (program(test, "python3"), package_of_python(test, "wasmtime"))
    else {
        return;
    };
    if !may_use_bpf(test) {
        return;
    }
    let service = TestService::start().await;
    let script = checkout().join("tests/programs/wasm.py");
    for (profiler, optimisation) in [("perfmap", "speed"), ("jitdump", "none")] {
        let mut command = Command::new(&python);
        command.args(["-I", "-S"]).arg(&script).arg(&packages).args([profiler, optimisation]);
        // The jitdump is written there.
        let running = Running::start(command.current_dir(service.folder()));
        let pid = running.id();
        let stacks = profile_process(&service, pid, BackendChoice::Bpf).await;
        drop(running);
        // Not there with a jitdump.
        let _ = std::fs::remove_file(format!("/tmp/perf-{pid}.map"));
        assert_complete_but_for(MAX_CUT, &stacks);
        let complete = || stacks.iter().filter(|stack| stack.is_complete());
        for stack in complete() {
            assert_chain(stack);
        }
        let samples = |fits: &dyn Fn(&Stack) -> bool| total(complete().filter(|stack| fits(stack)));
        for name in ["calls", "fills"] {
            let named = samples(&|stack| functions(stack).is_some_and(|names| names.contains(&name)));
            assert!(named >= MIN_SAMPLES, "{profiler}: {name}: {named}\n{stacks:#?}");
        }
        let served = samples(&|stack| {
            let is_native = stack.frames.first().is_some_and(|frame| frame.image != MADE);
            is_native && functions(stack).is_some_and(|names| names.contains(&"bottom"))
        });
        assert!(served >= MIN_SAMPLES, "{profiler}: {served}\n{stacks:#?}");
    }
    service.stop().await;
}

/// The functions of a whole stack are those that call each other, each as often as it does, and the runtime called the first.
fn assert_chain(stack: &Stack) {
    let Some(names) = functions(stack) else { return };
    let Some(outermost) = stack.frames.iter().rposition(|frame| frame.image == MADE) else { return };
    let runtime = stack.frames.get(outermost + 1).expect("no walk ends in the module");
    assert!(runtime.image.ends_with("/_libwasmtime.so"), "{stack:#?}");
    let (entry, called) = names.split_first().expect("there is an outermost one");
    assert!(entry.contains("array_to_wasm_trampoline"), "{stack:#?}");
    let descent = [&["run"][..], &["down"; DEPTH + 1], &["bottom"]].concat();
    let is_whole = AT_BOTTOM.iter().any(|last| [&descent[..], last].concat().starts_with(called));
    assert!(is_whole, "{called:?}\n{stack:#?}");
}
