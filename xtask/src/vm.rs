//! `cargo xtask vm`: the real agent and its BPF program inside other kernels, checked by named stacks.
//!
//! That a program loads on one kernel says little about the next one: the verifier counts in another way, helpers are
//! missing, and what loads may still fail at work. So each kernel is booted in a machine of its own, without
//! KVM and without a disk: an initial file system holds `windlass` and a first process that profiles the bundled
//! workload and prints what came of it on the console, which is read and checked here. Kernels come as
//! packages from the Debian archive that this machine uses and are only unpacked, never installed. It takes
//! two minutes a kernel and a few hundred MB of packages, so it is no part of `cargo xtask test`.

mod initramfs;
mod machine;
mod package;
mod report;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::checkout::{cargo, command, line_of, output, root, run as run_command};
use crate::programs::{self, Program};
use package::Archive;
use report::Report;

/// Series of kernels to run in: Debian 12's, 13's, and the newest long-term one.
pub(crate) const DEFAULT_SERIES: [&str; 3] = ["6.1", "6.12", "6.18"];
/// How walks make their turns, as the agent's variable for that says it: as the kernel can, and as those before 5.17.
const TURNS: [&str; 2] = ["probed", "without-loop"];
/// The page that has the table of the series that are run unless others are named.
const PAGE: &str = "docs/kernels.md";
/// Where packages, kernels and consoles are kept between runs.
const FOLDER: &str = "target/vm";
/// The guest's first process.
const INIT_SOURCE: &str = "xtask/src/vm/init.c";
/// Certificates of authorities, without which the HTTP client does not start.
const CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";

const PROGRAMS: &[Program] = &[
    Program { name: "qemu-system-x86_64", package: "qemu-system-x86", used_by: "machines for other kernels" },
    Program { name: "cc", package: "gcc", used_by: "the first process of those machines" },
    Program { name: "strip", package: "binutils", used_by: "the initial file system of those machines" },
    Program { name: "dpkg-deb", package: "dpkg", used_by: "kernels out of their packages" },
    Program { name: "apt-get", package: "apt", used_by: "packages of kernels" },
];

/// Runs in each of `series`, and prints a row each. Fails if a stack was wrong or missing, or the program refused;
/// what cannot be had is skipped by name, or fails where it is `required`.
pub(crate) fn run(series: &[String], seconds: u32, required: bool) -> Result<()> {
    if !programs::ensure(PROGRAMS, required)? {
        println!("skip  vm: programs are missing");
        return Ok(());
    }
    let folder = root().join(FOLDER);
    std::fs::create_dir_all(&folder)?;
    let archive = match Archive::open(&folder) {
        Err(error) if !required => {
            println!("skip  vm: {error:#}");
            return Ok(());
        }
        opened => opened?,
    };
    let initramfs = folder.join("initramfs.cpio");
    std::fs::write(&initramfs, file_system(&folder)?).context("write the initial file system")?;
    let mut rows = vec![Report::HEADING.to_owned()];
    let mut failures = Vec::new();
    let mut skipped = Vec::new();
    for series in series {
        let kernel = match archive.kernel(series) {
            Ok(kernel) => kernel,
            Err(error) => {
                skipped.push(format!("{series}: {error:#}"));
                continue;
            }
        };
        for turns in TURNS {
            println!("--- {series}, {turns}: {}", kernel.display());
            let console = machine::run(&kernel, &initramfs, seconds, turns)?;
            let kept = folder.join(format!("console-{series}-{turns}.txt"));
            std::fs::write(&kept, &console)?;
            let report = Report::read(&console);
            rows.push(report.row(series));
            let findings = report.findings();
            if !findings.is_empty() {
                let findings = findings.join("; ");
                failures.push(format!("{series}, {turns}: {findings} (all of it: {})", kept.display()));
            }
        }
    }
    println!("---\n{}", rows.join("\n"));
    skipped.iter().for_each(|line| println!("skip  {line}"));
    failures.iter().for_each(|line| println!("FAIL  {line}"));
    if required && !skipped.is_empty() {
        bail!("kernels could not be had, and nothing may be skipped here");
    }
    if !failures.is_empty() {
        bail!("{} kernels failed", failures.len());
    }
    if skipped.is_empty() && series == DEFAULT_SERIES {
        std::fs::write(root().join(PAGE), page(&rows)).with_context(|| format!("write {PAGE}"))?;
    }
    Ok(())
}

/// The page with these rows.
fn page(rows: &[String]) -> String {
    let version = line_of("git", &["describe", "--always", "--dirty"]);
    let date = line_of("date", &["--utc", "+%Y-%m-%d"]);
    let emulator = line_of("qemu-system-x86_64", &["--version"]);
    let emulator = emulator.lines().next().unwrap_or_default();
    format!(
        "{}\n\nWindlass {version}; {date}; {emulator}.\n\n{}\n",
        include_str!("vm/page.md").trim_end(),
        rows.join("\n")
    )
}

/// The guest's files, as an archive that a kernel unpacks.
fn file_system(folder: &Path) -> Result<Vec<u8>> {
    let init = folder.join("init");
    run_command(
        command("cc")
            .args(["-static", "-O2", "-Wall", "-Wextra", "-Werror", "-o"])
            .arg(&init)
            .arg(INIT_SOURCE),
    )
    .context("compile the guest's first process")?;
    let windlass = folder.join("windlass");
    // Its debug information is most of it, and would be unpacked into the guest's memory.
    run_command(command("strip").arg("-o").arg(&windlass).arg(built_windlass()?))?;
    let workload = windlass_workload::write_executable(folder)?;
    let mut files = vec![("/init".to_owned(), init), ("/windlass".to_owned(), windlass.clone())];
    // The workload is inside `windlass`; its libraries are not.
    for library in libraries(&[&windlass, &workload])? {
        files.push((library.clone(), PathBuf::from(library)));
    }
    if Path::new(CERTIFICATES).exists() {
        files.push((CERTIFICATES.to_owned(), CERTIFICATES.into()));
    }
    let mut archive = initramfs::Archive::default();
    for (path, file) in &files {
        let content = std::fs::read(file).with_context(|| format!("read {}", file.display()))?;
        archive.add_executable(path, &content).with_context(|| format!("add {path}"))?;
    }
    archive.finish()
}

/// Builds `windlass` as users do, and says where it is.
fn built_windlass() -> Result<PathBuf> {
    let messages = output(&mut cargo("build --release --locked --bin windlass --message-format=json"))?;
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == "windlass")
        .find_map(|message| Some(PathBuf::from(message["executable"].as_str()?)))
        .context("cargo names no executable for windlass")
}

/// Paths of the libraries and of the dynamic loader that these programs need.
fn libraries(programs: &[&Path]) -> Result<Vec<String>> {
    let mut paths = Vec::new();
    for program in programs {
        let listed = output(command("ldd").arg(program))?;
        paths.extend(listed.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned));
    }
    paths.sort();
    paths.dedup();
    Ok(paths)
}
