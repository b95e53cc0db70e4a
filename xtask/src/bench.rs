//! `cargo xtask bench`: runs a benchmark and puts its table into `docs/benchmarks.md`.
//!
//! A figure without the machine, the versions and the peer beside it tells nothing, so each table
//! carries them, is measured in one run, and is written by the program that measured it.

use anyhow::{Context, Result};

use crate::checkout::{cargo, line_of, output, root};

/// The tables there are; each is a benchmark of this crate, which prints its table.
pub(crate) const NAMES: [&str; 1] = ["unwind"];

/// Where the tables go.
const PAGE: &str = "docs/benchmarks.md";

/// Measures one table and writes it.
pub(crate) fn run(name: &str) -> Result<()> {
    let table = output(&mut cargo(&format!("bench --quiet --locked --package xtask --bench {name}")))?;
    print!("{table}");
    let path = root().join(PAGE);
    std::fs::create_dir_all(root().join("docs"))?;
    let page = std::fs::read_to_string(&path).unwrap_or_else(|_| {
        "# Benchmarks\n\nWritten by `cargo xtask bench`, with the machine beside each table.\n".to_owned()
    });
    let section = format!("{}\n{table}", circumstances(name));
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
        "`cargo xtask bench {name}` on {cpu}, {cores} cores, Linux {}; {}; Windlass {}; {}.\n",
        line_of("uname", &["-r"]),
        line_of("rustc", &["--version"]),
        line_of("git", &["describe", "--always", "--dirty"]),
        line_of("date", &["--utc", "+%Y-%m-%d"]),
    )
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
