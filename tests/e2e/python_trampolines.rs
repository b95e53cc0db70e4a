//! Functions of Python by their names: CPython from 3.12 on calls each through code of its own making, if asked to.

use std::path::{Path, PathBuf};
use std::process::Command;

use windlass_agent::BackendChoice;
use windlass_tests::program::checkout;
use windlass_tests::service::TestService;
use windlass_tests::skip::{may_use_bpf, skip};
use windlass_tests::stacks::{Stack, total};

use crate::live::{assert_complete_but_for, profile_process};
use crate::made_code::{MADE, MIN_SAMPLES};
use crate::mixed_stacks::Running;

/// Calls of `down` to itself in `tests/programs/trampolines.py`.
const DEPTH: usize = 20;
/// Largest share of stacks that are not whole.
const MAX_CUT: f64 = 0.01;
/// Minor version of the first that writes perf maps, and of the first that writes jitdumps.
const PERF_MAP: u32 = 12;
const JITDUMP: u32 = 13;

/// Interpreters that may be new enough: in `PATH`, and those that pyenv keeps apart. Newest last.
fn interpreters() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&path).map(|folder| folder.join("python3"));
    let home = || Path::new(&std::env::var_os("HOME").unwrap_or_default()).join(".pyenv");
    let pyenv = std::env::var_os("PYENV_ROOT").map_or_else(home, PathBuf::from);
    let versions = std::fs::read_dir(pyenv.join("versions")).into_iter().flatten().flatten();
    in_path.chain(versions.map(|version| version.path().join("bin/python3"))).collect()
}

/// The newest interpreter that has trampolines, with its minor version; if there is none, `test` is skipped.
#[track_caller]
fn interpreter(test: &str) -> Option<(u32, PathBuf)> {
    let code = "import sys; sys.activate_stack_trampoline('perf'); print(sys.version_info.minor)";
    let minor = |path: &PathBuf| -> Option<u32> {
        let output = Command::new(path).args(["-I", "-S", "-c", code]).output().ok()?;
        String::from_utf8(output.stdout).ok()?.trim().parse().ok()
    };
    let newest = interpreters().into_iter().filter_map(|path| Some((minor(&path)?, path))).max();
    if newest.is_none() {
        skip(test, "no python3 of 3.12 or newer");
    }
    newest
}

#[tokio::test(flavor = "multi_thread")]
async fn named_and_whole() {
    let test = "python_trampolines::named_and_whole";
    let Some((minor, python)) = interpreter(test) else { return };
    if !may_use_bpf(test) {
        return;
    }
    let service = TestService::start().await;
    for (since, option) in [(PERF_MAP, "perf"), (JITDUMP, "perf_jit")] {
        if minor < since {
            continue;
        }
        let mut command = Command::new(&python);
        command.args(["-I", "-S", "-X", option]);
        let running = Running::start(command.arg(checkout().join("tests/programs/trampolines.py")));
        let pid = running.id();
        let stacks = profile_process(&service, pid, BackendChoice::Bpf).await;
        drop(running);
        // One of them is there.
        for file in [format!("/tmp/perf-{pid}.map"), format!("/tmp/jit-{pid}.dump")] {
            let _ = std::fs::remove_file(file);
        }
        assert_complete_but_for(MAX_CUT, &stacks);
        let mut whole = 0;
        for stack in stacks.iter().filter(|stack| stack.is_complete()) {
            let Some(functions) = functions(stack) else { continue };
            let all = [&["<module>", "outermost"][..], &["down"; DEPTH + 1], &["busy"]].concat();
            assert!(all.starts_with(&functions), "{functions:?}\n{stack:#?}");
            whole += if functions == all { stack.count } else { 0 };
        }
        assert!(whole >= MIN_SAMPLES, "{option}: {whole} of {}\n{stacks:#?}", total(&stacks));
    }
    service.stop().await;
}

/// The script's functions in a stack, from the outermost on. `None` if one has no name.
fn functions(stack: &Stack) -> Option<Vec<&str>> {
    let made = stack.frames.iter().rev().filter(|frame| frame.image.is_empty() || frame.image == MADE);
    let named: Option<Vec<_>> =
        made.map(|frame| frame.function.strip_prefix("py::")?.split_once(':')).collect();
    let of_script = named?.into_iter().filter(|(_, file)| file.ends_with("trampolines.py"));
    Some(of_script.map(|(name, _)| name).collect())
}
