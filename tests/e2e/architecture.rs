//! The rules of the workspace's shape: which part may depend on which, and how files are named and sized.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use windlass_tests::program::{checkout, text};

/// The packages of the workspace that each of its packages may depend on, outside of tests.
const MAY_DEPEND_ON: &[(&str, &[&str])] = &[
    ("windlass-schema", &[]),
    ("windlass-unwind-compiler", &["windlass-schema"]),
    ("windlass-symbol-index", &["windlass-schema"]),
    ("windlass-agent-ebpf", &["windlass-schema"]),
    ("windlass-bpf", &["windlass-schema", "windlass-agent-ebpf"]),
    // Compiles no DWARF and knows no symbols.
    ("windlass-agent", &["windlass-schema", "windlass-agent-ebpf"]),
    ("windlass-debuginfod", &["windlass-schema", "windlass-unwind-compiler", "windlass-symbol-index"]),
    (
        "windlass",
        &[
            "windlass-schema",
            "windlass-unwind-compiler",
            "windlass-symbol-index",
            "windlass-agent-ebpf",
            "windlass-agent",
            "windlass-debuginfod",
            "windlass-workload",
        ],
    ),
    ("windlass-workload", &[]),
    // Which stacks the bundled program has.
    ("xtask", &["windlass-workload"]),
];
/// The one that may depend on all.
const TESTS: &str = "windlass-tests";
/// Names that say nothing about what a file answers.
const EMPTY_NAMES: &[&str] = &["util", "utils", "common", "shared", "helper", "helpers", "misc", "types"];
/// Most lines of a source file without its tests: what one person keeps in mind.
const MAX_LINES: usize = 500;
/// Folders that hold no sources of ours.
const NOT_SOURCES: &[&str] = &["target", ".git", "corpus", "artifacts"];

#[test]
fn dependency_runs_one_way() {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let metadata = text(
        Command::new(cargo)
            .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
            .current_dir(checkout()),
    );
    let metadata: serde_json::Value = serde_json::from_str(&metadata).expect("JSON of cargo metadata");
    let packages = metadata["packages"].as_array().expect("packages");
    let ours: BTreeSet<_> = packages.iter().filter_map(|package| package["name"].as_str()).collect();
    assert!(ours.len() > MAY_DEPEND_ON.len(), "every package of the rules is in the workspace: {ours:?}");
    for package in packages {
        let name = package["name"].as_str().expect("a name");
        if name == TESTS {
            continue;
        }
        let (_, may) = MAY_DEPEND_ON
            .iter()
            .find(|(of, _)| *of == name)
            .unwrap_or_else(|| panic!("say in MAY_DEPEND_ON what {name} may depend on"));
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            let on = dependency["name"].as_str().expect("a name");
            // Tests may look further: a dev-dependency ships with nothing.
            if ours.contains(on) && dependency["kind"] != "dev" {
                assert!(may.contains(&on), "{name} depends on {on}");
            }
        }
    }
}

#[test]
fn files_are_named_by_what_they_answer_and_fit_a_mind() {
    let files = sources(&checkout());
    assert!(files.len() > 50, "found {} sources only", files.len());
    for file in files {
        let stem = file.file_stem().expect("sources have names").to_string_lossy().into_owned();
        assert!(!EMPTY_NAMES.contains(&stem.as_str()), "{}: the name says nothing", file.display());
        let text = std::fs::read_to_string(&file).expect("sources are text");
        let lines = text.lines().take_while(|line| line.trim() != "#[cfg(test)]").count();
        assert!(lines <= MAX_LINES, "{} has {lines} lines without its tests", file.display());
    }
}

/// All Rust sources below a folder.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).expect("a folder of the checkout") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("entries have names").to_string_lossy().into_owned();
        if path.is_dir() && !NOT_SOURCES.contains(&name.as_str()) {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}
