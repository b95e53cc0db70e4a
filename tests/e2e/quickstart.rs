//! `windlass quickstart`: one command, nothing else installed, and what it leaves is what it says.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use windlass_schema::pprof::Profile;
use windlass_tests::program::{program, run, text, windlass};
use windlass_tests::service::decode;
use windlass_tests::skip::{bpf_is_permitted, may_sample_own_processes};
use windlass_tests::stacks::{stacks, total};

use crate::live::{assert_complete, assert_expected};

#[test]
fn one_command_gives_a_profile_of_this_machine() {
    if !may_sample_own_processes("quickstart::one_command_gives_a_profile_of_this_machine") {
        return;
    }
    let folder = tempfile::tempdir().expect("temporary folder");
    let mut quickstart = windlass("windlass");
    quickstart.args(["quickstart", "--seconds", "5", "--json"]).current_dir(folder.path());
    let output = run(&mut quickstart, &[0]);
    let summary: Value = serde_json::from_slice(&output.stdout).expect("JSON alone on standard output");
    // Copied stacks are for those who may not use BPF, never a quiet second best.
    let mode = if bpf_is_permitted() { "bpf" } else { "user" };
    assert_eq!(summary["mode"], mode, "{summary}");
    check_counts(&summary);
    check_functions(&summary);
    let profile = check_outputs(&summary, folder.path());
    check_workload(&summary, &profile, workload_pid(&output.stderr));
    check_with_pprof(&folder.path().join(summary["outputs"]["pprof"].as_str().expect("outputs: pprof")));
}

/// The reader that everyone has takes the file, and finds the same functions in it.
#[track_caller]
fn check_with_pprof(file: &Path) {
    let Some(go) = program("quickstart::one_command_gives_a_profile_of_this_machine", "go") else { return };
    let mut pprof = Command::new(go);
    pprof.args(["tool", "pprof", "-top", "-nodecount=1000"]).arg(file);
    // It keeps settings in its user's folders.
    pprof.env("HOME", file.parent().expect("a file has a folder")).env("XDG_CONFIG_HOME", "");
    let shown = text(&mut pprof);
    for name in windlass_workload::EXPECTED[0].functions {
        assert!(shown.lines().any(|line| line.contains(name)), "{name} is not in\n{shown}");
    }
}

/// The process of its own workload, as it says: others of the same name may run on the machine.
#[track_caller]
fn workload_pid(stderr: &[u8]) -> u32 {
    let text = String::from_utf8_lossy(stderr);
    let pid = text.lines().find_map(|line| line.split_once("workload runs as process ")?.1.parse().ok());
    pid.unwrap_or_else(|| panic!("no process of the workload in {text}"))
}

/// The workload's stacks are all there, inlined functions with them, and nearly all of them are whole.
#[track_caller]
fn check_workload(summary: &Value, profile: &Profile, pid: u32) {
    let of_workload: Vec<_> =
        stacks(profile).into_iter().filter(|stack| stack.pid == i64::from(pid)).collect();
    assert_eq!(u64::try_from(total(&of_workload)), Ok(count(&summary["workload"]["samples"])), "{summary}");
    assert_expected(&of_workload);
    assert_complete(&of_workload);
}

fn count(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no count"))
}

#[track_caller]
fn check_counts(summary: &Value) {
    let reasons = summary["stop_reasons"].as_object().expect("stop_reasons");
    assert!(count(&summary["samples"]) > 0, "{summary}");
    assert_eq!(reasons.values().map(count).sum::<u64>(), count(&summary["samples"]), "{summary}");
    for reason in reasons.keys() {
        assert!(windlass_schema::StopReason::from_name(reason).is_some(), "stop reason {reason}");
    }
    let (samples, complete) =
        (count(&summary["workload"]["samples"]), count(&summary["workload"]["complete"]));
    assert!(samples > 0 && complete <= samples, "{summary}");
}

/// The workload is the busiest program of an idle machine, and every file and line of it is known.
#[track_caller]
fn check_functions(summary: &Value) {
    let functions = summary["functions"].as_array().expect("functions");
    let expected = windlass_workload::EXPECTED[0];
    let found = functions
        .iter()
        .find(|function| expected.functions.iter().any(|name| function["function"] == *name))
        .unwrap_or_else(|| panic!("none of {:?} in {functions:?}", expected.functions));
    assert!(found["file"].as_str().is_some_and(|file| !file.is_empty()), "{found}");
    assert!(count(&found["line"]) > 0, "{found}");
    assert!(count(&found["total"]) >= count(&found["self"]), "{found}");
}

#[track_caller]
fn check_outputs(summary: &Value, folder: &Path) -> Profile {
    let read = |key: &str| {
        let path =
            PathBuf::from(summary["outputs"][key].as_str().unwrap_or_else(|| panic!("outputs: {key}")));
        std::fs::read(folder.join(&path)).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    let profile = decode(&read("pprof"));
    let in_profile: i64 = profile.sample.iter().filter_map(|sample| sample.value.first()).sum();
    assert_eq!(u64::try_from(in_profile), Ok(count(&summary["samples"])), "samples of the profile");

    let folded = String::from_utf8(read("folded")).expect("folded stacks are text");
    let in_folded: u64 = folded
        .lines()
        .map(|line| line.rsplit_once(' ').expect("STACK COUNT").1.parse::<u64>().expect("a count"))
        .sum();
    assert_eq!(in_folded, count(&summary["samples"]), "samples of the folded stacks");

    let html = String::from_utf8(read("html")).expect("a page is text");
    for attribute in ["src=", "href="] {
        for (at, _) in html.match_indices(attribute) {
            let value = html[at + attribute.len()..].trim_start_matches(['"', '\'']);
            assert!(
                !["http:", "https:", "//"].iter().any(|prefix| value.starts_with(prefix)),
                "the page loads {}",
                &value[..value.len().min(60)]
            );
        }
    }
    profile
}
