//! What differs between guests by their instruction set: the emulator, the compiler, where libraries are.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::checkout::{cargo, command, output, run};
use crate::programs::{self, Program};

/// Guests of one instruction set.
pub(super) struct Guest {
    /// As the kernel's `uname -m` says it.
    pub(super) name: &'static str,
    /// As Debian says it.
    pub(super) debian: &'static str,
    /// The emulator.
    pub(super) emulator: &'static str,
    /// The machine and its processor, for the emulator.
    pub(super) machine: &'static [&'static str],
    /// The machine's console, for the kernel.
    pub(super) console: &'static str,
    compiler: &'static str,
    strip: &'static str,
    /// For which `rustc` compiles, where that is not its own host.
    target: Option<&'static str>,
    programs: &'static [Program],
}

/// Those that there are.
static GUESTS: [Guest; 2] = [
    Guest {
        name: "x86_64",
        debian: "amd64",
        emulator: "qemu-system-x86_64",
        machine: &["-cpu", "max"],
        console: "ttyS0",
        compiler: "cc",
        strip: "strip",
        target: None,
        programs: &[
            Program {
                name: "qemu-system-x86_64",
                package: "qemu-system-x86",
                used_by: "machines for other kernels",
            },
            Program { name: "cc", package: "gcc", used_by: "the first process of those machines" },
            Program {
                name: "strip",
                package: "binutils",
                used_by: "the initial file system of those machines",
            },
        ],
    },
    Guest {
        name: "aarch64",
        debian: "arm64",
        emulator: "qemu-system-aarch64",
        // Pointers are signed by a function that takes the emulator a tenth of the time of the architecture's own.
        machine: &["-machine", "virt", "-cpu", "max,pauth-impdef=on"],
        console: "ttyAMA0",
        compiler: "aarch64-linux-gnu-gcc",
        strip: "aarch64-linux-gnu-strip",
        target: Some("aarch64-unknown-linux-gnu"),
        programs: &[
            Program {
                name: "qemu-system-aarch64",
                package: "qemu-system-arm",
                used_by: "machines for kernels of aarch64",
            },
            Program {
                name: "aarch64-linux-gnu-gcc",
                // The compiler's package only recommends the C library.
                package: "gcc-aarch64-linux-gnu libc6-dev-arm64-cross",
                used_by: "all programs of those machines",
            },
            Program {
                name: "aarch64-linux-gnu-g++",
                package: "g++-aarch64-linux-gnu",
                used_by: "a demangler in those machines",
            },
            Program {
                name: "aarch64-linux-gnu-strip",
                package: "binutils-aarch64-linux-gnu",
                used_by: "the initial file system of those machines",
            },
            Program { name: "readelf", package: "binutils", used_by: "the libraries of those machines" },
        ],
    },
];

/// Their names.
pub(crate) const GUEST_NAMES: [&str; 2] = [GUESTS[0].name, GUESTS[1].name];

impl Guest {
    /// That of this name.
    pub(super) fn named(name: &str) -> Result<&'static Self> {
        let names = || GUESTS.iter().map(|guest| guest.name).collect::<Vec<_>>().join(" and ");
        GUESTS
            .iter()
            .find(|guest| guest.name == name)
            .with_context(|| format!("no {name}: there are {}", names()))
    }

    /// Makes sure of what it takes to build for it and to run it, or says what lacks; fails where it is `required`.
    pub(super) fn ensure(&self, required: bool) -> Result<bool> {
        if std::env::consts::ARCH != "x86_64" {
            ensure!(!required, "guests are built and run on x86-64");
            println!("guests are built and run on x86-64");
            return Ok(false);
        }
        if !programs::ensure(self.programs, required)? {
            return Ok(false);
        }
        match self.target.map(ensure_target) {
            Some(Err(error)) if !required => {
                println!("{error:#}: without it, machines for kernels of {} are skipped", self.name);
                Ok(false)
            }
            Some(outcome) => outcome.map(|()| true),
            None => Ok(true),
        }
    }

    /// Compiles a C program that needs no library at run time.
    pub(super) fn compile(&self, source: &str, executable: &Path) -> Result<()> {
        run(command(self.compiler)
            .args(["-static", "-O2", "-Wall", "-Wextra", "-Werror", "-o"])
            .arg(executable)
            .arg(source))
    }

    /// Writes `program` without its debug information.
    pub(super) fn strip(&self, program: &Path, to: &Path) -> Result<()> {
        run(command(self.strip).arg("-o").arg(to).arg(program))
    }

    /// Builds `windlass` as users do, and says where it is, and where the bundled workload.
    pub(super) fn windlass(&self) -> Result<(PathBuf, PathBuf)> {
        let mut build = cargo("build --release --locked --bin windlass --message-format=json");
        if let Some(target) = self.target {
            let linker = format!("CARGO_TARGET_{}_LINKER", target.to_uppercase().replace('-', "_"));
            build.args(["--target", target]).env(linker, self.compiler);
        }
        let messages = output(&mut build)?;
        let messages: Vec<_> = messages
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .collect();
        let windlass = messages
            .iter()
            .filter(|message| message["target"]["name"] == "windlass")
            .find_map(|message| Some(PathBuf::from(message["executable"].as_str()?)))
            .context("cargo names no executable for windlass")?;
        // The folder of the build script that compiled it.
        let workload = messages
            .iter()
            .filter(|message| message["reason"] == "build-script-executed")
            .filter_map(|message| message["out_dir"].as_str())
            .map(|folder| Path::new(folder).join(windlass_workload::EXECUTABLE_NAME))
            .find(|path| path.is_file())
            .context("cargo names no folder with the workload")?;
        Ok((windlass, workload))
    }

    /// The libraries and the dynamic loader that these programs need: the path in the guest, and here.
    pub(super) fn libraries(&self, programs: &[&Path]) -> Result<Vec<(String, PathBuf)>> {
        let mut paths = if self.target.is_none() { native(programs)? } else { self.foreign(programs)? };
        paths.sort();
        paths.dedup();
        Ok(paths)
    }

    /// Those of another instruction set: the compiler's.
    fn foreign(&self, programs: &[&Path]) -> Result<Vec<(String, PathBuf)>> {
        let mut paths = Vec::new();
        let mut unread: Vec<_> = programs.iter().map(|program| program.to_path_buf()).collect();
        while let Some(file) = unread.pop() {
            for name in needed(&file)? {
                // Where the loader looks without being told, and where it is itself.
                let path = format!("/lib/{name}");
                if paths.iter().any(|(known, _)| *known == path) {
                    continue;
                }
                let printed = output(command(self.compiler).arg(format!("-print-file-name={name}")))?;
                let library = PathBuf::from(printed.trim());
                ensure!(library.is_absolute(), "{} knows no {name}", self.compiler);
                unread.push(library.clone());
                paths.push((path, library));
            }
        }
        Ok(paths)
    }
}

/// Makes sure of the standard library for `target`.
fn ensure_target(target: &str) -> Result<()> {
    let printed = output(command("rustc").args(["--print", "target-libdir", "--target", target]))?;
    let is_there = || std::fs::read_dir(printed.trim()).is_ok_and(|mut files| files.next().is_some());
    if is_there() {
        return Ok(());
    }
    if programs::find("rustup").is_some() {
        run(command("rustup").args(["target", "add", target]))?;
    }
    if !is_there() {
        bail!("rustc has no standard library for {target}");
    }
    Ok(())
}

/// What the loader of this machine finds.
fn native(programs: &[&Path]) -> Result<Vec<(String, PathBuf)>> {
    let mut paths = Vec::new();
    for program in programs {
        let listed = output(command("ldd").arg(program))?;
        let words = listed.split_whitespace().filter(|word| word.starts_with('/'));
        paths.extend(words.map(|path| (path.to_owned(), PathBuf::from(path))));
    }
    Ok(paths)
}

/// Names of the libraries that a program or a library needs, from lines as
/// `0x0000000000000001 (NEEDED)             Shared library: [libc.so.6]`.
fn needed(file: &Path) -> Result<Vec<String>> {
    let listed = output(command("readelf").args(["--dynamic", "--wide"]).arg(file))?;
    let names = listed.lines().filter(|line| line.contains("(NEEDED)")).filter_map(|line| {
        let (_, rest) = line.split_once('[')?;
        Some(rest.split_once(']')?.0.to_owned())
    });
    Ok(names.collect())
}
