//! `cargo xtask vm`: the real agent and its BPF program inside other kernels, checked by named stacks.
//!
//! That a program loads on one kernel says little about the next one: the verifier counts in another way, helpers are
//! missing, and what loads may still fail at work. So each kernel is booted in a machine of its own, without
//! KVM and without a disk: an initial file system holds `windlass` and a first process that profiles the bundled
//! workload and prints what came of it on the console, which is read and checked here. Kernels come as
//! packages from the Debian archive that this machine uses and are only unpacked, never installed. It takes
//! two minutes a kernel and a few hundred MB of packages, so it is no part of `cargo xtask test`.

mod guest;
mod initramfs;
mod machine;
mod package;
mod report;

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::checkout::{line_of, root};
use crate::programs::{self, Program};
pub(crate) use guest::GUEST_NAMES;
use guest::Guest;
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
    Program { name: "dpkg-deb", package: "dpkg", used_by: "kernels out of their packages" },
    Program { name: "apt-get", package: "apt", used_by: "packages of kernels" },
];

/// Rows, and what was left out or went wrong.
#[derive(Default)]
struct Outcome {
    rows: Vec<String>,
    skipped: Vec<String>,
    failures: Vec<String>,
}

/// Runs in each of `series`, on each of `guests`, and prints a row each. Fails if a stack was wrong or missing, or the
/// program refused; what cannot be had is skipped by name, or fails where it is `required`.
pub(crate) fn run(series: &[String], guests: &[String], seconds: u32, required: bool) -> Result<()> {
    let mut outcome = Outcome { rows: vec![Report::HEADING.to_owned()], ..Outcome::default() };
    for name in guests {
        let guest = Guest::named(name)?;
        if !programs::ensure(PROGRAMS, required)? || !guest.ensure(required)? {
            outcome.skipped.push(format!("{name}: programs are missing"));
            continue;
        }
        run_guest(guest, series, seconds, &mut outcome).with_context(|| name.clone())?;
    }
    let Outcome { rows, skipped, failures } = outcome;
    println!("---\n{}", rows.join("\n"));
    skipped.iter().for_each(|line| println!("skip  {line}"));
    failures.iter().for_each(|line| println!("FAIL  {line}"));
    if required && !skipped.is_empty() {
        bail!("kernels could not be had, and nothing may be skipped here");
    }
    if !failures.is_empty() {
        bail!("{} kernels failed", failures.len());
    }
    if skipped.is_empty() && series == DEFAULT_SERIES && guests == GUEST_NAMES {
        std::fs::write(root().join(PAGE), page(&rows)).with_context(|| format!("write {PAGE}"))?;
    }
    Ok(())
}

/// Runs in each of `series` on machines of one kind.
fn run_guest(guest: &Guest, series: &[String], seconds: u32, outcome: &mut Outcome) -> Result<()> {
    let folder = root().join(FOLDER).join(guest.name);
    std::fs::create_dir_all(&folder)?;
    let archive = match Archive::open(&folder, guest.debian) {
        Err(error) => {
            outcome.skipped.push(format!("{}: {error:#}", guest.name));
            return Ok(());
        }
        Ok(archive) => archive,
    };
    let initramfs = folder.join("initramfs.cpio");
    std::fs::write(&initramfs, file_system(guest, &folder)?).context("write the initial file system")?;
    for series in series {
        let kernel = match archive.kernel(series) {
            Ok(kernel) => kernel,
            Err(error) => {
                outcome.skipped.push(format!("{series}, {}: {error:#}", guest.name));
                continue;
            }
        };
        for turns in TURNS {
            println!("--- {series}, {}, {turns}: {}", guest.name, kernel.display());
            let console = machine::run(guest, &kernel, &initramfs, seconds, turns)?;
            let kept = folder.join(format!("console-{series}-{turns}.txt"));
            std::fs::write(&kept, &console)?;
            let report = Report::read(&console);
            outcome.rows.push(report.row(series));
            let findings = report.findings();
            if !findings.is_empty() {
                outcome.failures.push(format!(
                    "{series}, {}, {turns}: {} (all of it: {})",
                    guest.name,
                    findings.join("; "),
                    kept.display()
                ));
            }
        }
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
fn file_system(guest: &Guest, folder: &Path) -> Result<Vec<u8>> {
    let init = folder.join("init");
    guest.compile(INIT_SOURCE, &init).context("compile the guest's first process")?;
    let (built, workload) = guest.windlass()?;
    let windlass = folder.join("windlass");
    // Its debug information is most of it, and would be unpacked into the guest's memory.
    guest.strip(&built, &windlass)?;
    // The workload is inside `windlass`; its libraries are not.
    let mut files = guest.libraries(&[&windlass, &workload])?;
    files.extend([("/init".to_owned(), init), ("/windlass".to_owned(), windlass)]);
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
