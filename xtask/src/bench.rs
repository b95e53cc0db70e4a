//! `cargo xtask bench`: runs a benchmark and puts its tables into `docs/benchmarks.md`.
//!
//! A figure without the machine, the versions and the peer beside it tells nothing, so each section
//! carries them, is measured in one run, and is written by the program that measured it.

use anyhow::{Context, Result};

use crate::checkout::{cargo, line_of, output, root, run as run_command};
use crate::ebpf;

/// The sections there are; each is a benchmark of this crate, which prints its tables as Markdown, with headings
/// below the section's.
pub(crate) const NAMES: [&str; 3] = ["agent", "service", "unwind"];

/// Tells the benchmark of the agent where the object is whose programs time the walk.
const TIMING_OBJECT: &str = "WINDLASS_BENCH_TIMING_OBJECT";

/// The programs that it starts.
const PROGRAMS: &str = "--package windlass-agent --package windlass-debuginfod --bins";

/// Where the tables go.
const PAGE: &str = "docs/benchmarks.md";

/// Packages that benchmarks measure against.
const PEERS: [&str; 3] = ["framehop", "gimli", "zstd"];

/// Measures one section and writes it; of chosen tables, as the benchmark calls them, only prints them.
pub(crate) fn run(name: &str, chosen: &[String]) -> Result<()> {
    let mut bench = cargo(&format!("bench --quiet --locked --package xtask --bench {name}"));
    if ["agent", "service"].contains(&name) {
        run_command(&mut cargo(&format!("build --quiet --release --locked {PROGRAMS}")))?;
    }
    if name == "agent" {
        bench.env(TIMING_OBJECT, ebpf::build_timing()?);
    }
    bench.arg("--").args(chosen);
    let tables = output(&mut bench)?;
    print!("{tables}");
    if !chosen.is_empty() {
        return Ok(());
    }
    let path = root().join(PAGE);
    std::fs::create_dir_all(root().join("docs"))?;
    let page = std::fs::read_to_string(&path).unwrap_or_else(|_| {
        "# Benchmarks\n\nWritten by `cargo xtask bench`, with the machine beside each section.\n".to_owned()
    });
    let section = format!("{}\n{tables}", circumstances(name));
    std::fs::write(&path, replace_section(&page, name, &section)).with_context(|| format!("write {PAGE}"))
}

/// The machine, the versions and the date, as a line.
fn circumstances(name: &str) -> String {
    let cpu_info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpu_info
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown CPU", |(_, model)| model);
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    format!(
        "`cargo xtask bench {name}` on {cpu}, {cores} cores, Linux {}; {}; {}; Windlass {}; {}.\n",
        line_of("uname", &["-r"]),
        line_of("rustc", &["--version"]),
        peers(),
        line_of("git", &["describe", "--always", "--dirty"]),
        line_of("date", &["--utc", "+%Y-%m-%d"]),
    )
}

/// The peers and their versions, as the lock file has them for this crate.
fn peers() -> String {
    let tree =
        "tree --locked --offline --package xtask --edges normal,dev --depth 1 --prefix none --format {p}";
    let tree = output(&mut cargo(tree)).unwrap_or_default();
    let is_peer = |line: &&str| line.split(' ').next().is_some_and(|name| PEERS.contains(&name));
    let peers: Vec<_> = tree.lines().filter(is_peer).collect();
    if peers.is_empty() { "peers of unknown versions".to_owned() } else { peers.join(", ") }
}

/// The page with the section `## name` replaced, or appended.
fn replace_section(page: &str, name: &str, body: &str) -> String {
    let heading = format!("\n## {name}\n");
    let (before, rest) = page.split_once(&heading).unwrap_or((page, ""));
    let after = rest.find("\n## ").map_or("", |at| &rest[at..]);
    format!("{before}{heading}\n{}\n{after}", body.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_is_replaced_and_the_others_stay() {
        let page = "# T\n\n## a\n\nold\n\n## b\n\nkept\n";
        assert_eq!(replace_section(page, "a", "new"), "# T\n\n## a\n\nnew\n\n## b\n\nkept\n");
        assert_eq!(replace_section("# T\n", "a", "new"), "# T\n\n## a\n\nnew\n");
    }
}
