//! Programs that tests call: our own binaries, debuggers, compilers.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use crate::skip::skip;

/// Where a program of the machine is; if it is missing, `test` is skipped.
#[track_caller]
pub fn program(test: &str, name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file());
    if found.is_none() {
        skip(test, &format!("{name} is not installed"));
    }
    found
}

/// The folder with the packages for Python that `tests/programs/requirements.txt` names; if `name` is missing, `test` is skipped.
#[track_caller]
pub fn package_of_python(test: &str, name: &str) -> Option<PathBuf> {
    // xtask/src/programs.rs installs them.
    let folder = checkout().join("target/python-packages");
    let is_there = folder.join(name).is_dir();
    if !is_there {
        skip(test, &format!("Python's package {name} is not installed: cargo xtask test does that"));
    }
    is_there.then_some(folder)
}

/// A command of our own: `windlass` or one of the daemons, as cargo builds them.
///
/// # Panics
/// When they do not build.
pub fn windlass(name: &str) -> Command {
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| {
        // `cargo test` does not build other packages' binaries. The default members together, so that
        // features come out as in `cargo build` and nothing is compiled twice.
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let status = Command::new(cargo).args(["build", "--quiet"]).current_dir(checkout()).status();
        assert!(status.expect("cargo starts").success(), "the binaries do not build");
    });
    let test_binary = std::env::current_exe().expect("a test binary has a path");
    // target/debug/deps/e2e-HASH -> target/debug/NAME
    let folder = test_binary.parent().and_then(Path::parent).expect("test binaries lie in deps/");
    Command::new(folder.join(name))
}

/// The root of the checkout.
pub fn checkout() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().expect("this crate lies in the checkout").to_owned()
}

/// A committed ELF file of `fixtures/elf`.
pub fn fixture(name: &str) -> PathBuf {
    checkout().join("fixtures/elf").join(name)
}

/// Runs a command to its end and returns what it wrote.
///
/// # Panics
/// When it cannot be started, or ends with another code than one of `codes`.
#[track_caller]
pub fn run(command: &mut Command, codes: &[i32]) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("start {command:?}: {error}"));
    assert!(
        output.status.code().is_some_and(|code| codes.contains(&code)),
        "{command:?} ended with {}\nstdout: {}\nstderr: {}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    output
}

/// Runs a command that must succeed, and returns its standard output as text.
///
/// # Panics
/// As [`run`].
#[track_caller]
pub fn text(command: &mut Command) -> String {
    String::from_utf8_lossy(&run(command, &[0]).stdout).into_owned()
}
