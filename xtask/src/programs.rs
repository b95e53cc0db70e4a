//! Programs that tests and chores call, and how to get them.
//!
//! A test whose program lacks says so by name instead of passing in silence; in CI a lack is a
//! failure. As root on Debian the lacking packages are installed, elsewhere they are named.

use std::path::PathBuf;

use anyhow::{Result, bail};

use crate::checkout::{command, root, run};

/// A program, its Debian package, and what is skipped without it.
pub(crate) struct Program {
    /// Name in `PATH`.
    pub(crate) name: &'static str,
    /// Debian package, or several separated by spaces.
    pub(crate) package: &'static str,
    /// Who calls it.
    pub(crate) used_by: &'static str,
}

/// What the tests call.
pub(crate) const TEST_PROGRAMS: &[Program] = &[
    Program { name: "cc", package: "gcc", used_by: "the bundled workload, and programs that tests compile" },
    Program { name: "gdb", package: "gdb", used_by: "the debuginfod tests" },
    Program { name: "debuginfod-find", package: "debuginfod", used_by: "the debuginfod tests" },
    Program { name: "eu-addr2line", package: "elfutils", used_by: "the debuginfod tests" },
    Program { name: "strip", package: "binutils", used_by: "the debuginfod and symbol tests" },
    Program { name: "clang", package: "clang", used_by: "the test of uploads of sources" },
    Program { name: "jq", package: "jq", used_by: "the test of the examples for CI" },
    Program { name: "script", package: "bsdutils", used_by: "the test of uploads on a terminal" },
    Program { name: "g++", package: "g++", used_by: "the symbol tests" },
    Program { name: "curl", package: "curl", used_by: "the test of README's commands" },
    Program { name: "go", package: "golang-go", used_by: "the test that `go tool pprof` reads a profile" },
    Program {
        name: "python3",
        package: "python3",
        used_by: "the tests of walks and of the second table reader",
    },
    Program { name: "pip3", package: "python3-pip", used_by: "the installation of Python's packages" },
    Program { name: "node", package: "nodejs", used_by: "the tests of code that is made at run time" },
    Program { name: "javac", package: "default-jdk-headless", used_by: "the test of Java's stacks" },
    Program { name: "luajit", package: "luajit", used_by: "the test of LuaJIT's stacks" },
    Program { name: "perl", package: "perl", used_by: "the tests of walks" },
    Program { name: "openssl", package: "openssl", used_by: "the tests of walks" },
    Program { name: "musl-gcc", package: "musl-tools", used_by: "the tests of walks" },
    Program { name: "unshare", package: "util-linux", used_by: "the tests of walks" },
    Program {
        // A library: as an absolute path, which no folder changes.
        name: "/usr/lib/x86_64-linux-gnu/libopenblas.so.0",
        package: "libopenblas0-pthread",
        used_by: "the tests of walks",
    },
    Program {
        name: "aarch64-linux-gnu-gcc",
        // The compiler's package only recommends the C library.
        package: "gcc-aarch64-linux-gnu libc6-dev-arm64-cross",
        used_by: "the tests of walks of aarch64",
    },
    Program { name: "qemu-aarch64", package: "qemu-user", used_by: "the tests of walks of aarch64" },
    Program { name: "gdb-multiarch", package: "gdb-multiarch", used_by: "the tests of walks of aarch64" },
];

/// Where a program is, if it is: `PATH`, then cargo's folder of installed programs.
pub(crate) fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain([cargo_home().join("bin")])
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

/// Cargo's folder.
pub(crate) fn cargo_home() -> PathBuf {
    std::env::var_os("CARGO_HOME").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cargo"),
        PathBuf::from,
    )
}

/// Whether Debian packages can be installed from here.
pub(crate) fn can_install() -> bool {
    // `id -u` keeps this crate free of unsafe code and of another dependency.
    let root = crate::checkout::output(command("id").arg("-u")).is_ok_and(|id| id.trim() == "0");
    root && find("apt-get").is_some()
}

/// Installs Debian packages.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    println!("installing {}", packages.join(" "));
    let apt = || {
        let mut apt = command("apt-get");
        apt.env("DEBIAN_FRONTEND", "noninteractive").arg("-qq");
        apt
    };
    // An outdated list of packages may do, so only the installation decides.
    if let Err(error) = run(apt().arg("update")) {
        println!("could not refresh the list of packages: {error:#}");
    }
    run(apt().args(["install", "-y", "--no-install-recommends"]).args(packages))
}

/// Makes sure of `programs`, or says what will be skipped; fails where they are `required`. Whether all are there.
pub(crate) fn ensure(programs: &[Program], required: bool) -> Result<bool> {
    let lacking = || programs.iter().filter(|program| find(program.name).is_none());
    let mut packages: Vec<_> = lacking().flat_map(|program| program.package.split(' ')).collect();
    packages.dedup();
    if !packages.is_empty() && can_install() {
        install(&packages)?;
    }
    for program in lacking() {
        println!(
            "{} is missing (Debian package {}): without it, {} are skipped",
            program.name, program.package, program.used_by
        );
    }
    let complete = lacking().next().is_none();
    if required && !complete {
        bail!("programs are missing, and nothing may be skipped here");
    }
    Ok(complete)
}

/// What the tests take from PyPI, each with the hash of its content.
const PYTHON_PACKAGES: &str = "tests/programs/requirements.txt";
/// Where the tests look for it.
const PYTHON_FOLDER: &str = "target/python-packages";

/// Makes sure of the packages for Python, or says what will be skipped; fails where they are `required`.
pub(crate) fn ensure_python_packages(required: bool) -> Result<()> {
    let (list, folder) = (root().join(PYTHON_PACKAGES), root().join(PYTHON_FOLDER));
    let (wanted, installed) = (std::fs::read(&list)?, folder.join("requirements.txt"));
    if std::fs::read(&installed).is_ok_and(|list| list == wanted) {
        return Ok(());
    }
    // pip would leave what is there.
    if folder.is_dir() {
        std::fs::remove_dir_all(&folder)?;
    }
    let mut pip = command("pip3");
    // Nothing is built, and nothing of the machine's own Python changes.
    pip.args(["install", "--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes"]);
    pip.args(["--root-user-action", "ignore", "--disable-pip-version-check"]);
    let outcome = run(pip.arg("--target").arg(&folder).arg("-r").arg(&list));
    match outcome {
        // Written last: what is there is whole.
        Ok(()) => Ok(std::fs::write(installed, wanted)?),
        Err(error) if required => Err(error),
        Err(error) => {
            println!("{error:#}: without Python's packages, the test of WebAssembly's stacks is skipped");
            Ok(())
        }
    }
}
