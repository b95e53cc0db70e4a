//! `cargo xtask fixtures`: the committed ELF files and their manifest.
//!
//! Fixtures that a build script makes differ on every machine, and a test that fails on one of them
//! only there is no help (blazesym's habit). These are committed; the manifest is their recipe, and
//! its hashes tell when a file and its recipe part ways. It is a table that people read as well:
//! `| file | command | sha256 |`.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::checkout::{command, line_of, root, run};

/// Largest fixture in bytes, so that the repository stays small.
const MAX_FILE_BYTES: usize = 64 * 1024;
/// What precedes the compiler's name in the manifest.
const BUILT_BY: &str = "Built by: ";

/// Those whose versions the manifest names.
const TOOLS: [&str; 3] = ["gcc", "ld", "aarch64-linux-gnu-gcc"];

fn folder() -> PathBuf {
    root().join("fixtures")
}

/// A row of the manifest.
struct Row<'a> {
    file: &'a str,
    command: &'a str,
    sha256: &'a str,
}

/// The row that a line of the manifest is, if it is one.
fn row(line: &str) -> Option<Row<'_>> {
    let mut cells = line.strip_prefix("| elf/")?.splitn(3, " | ");
    let file = &line[2..2 + "elf/".len() + cells.next()?.len()];
    let command = cells.next()?.trim_matches('`');
    Some(Row { file, command, sha256: cells.next()?.trim_end_matches('|').trim() })
}

fn manifest() -> Result<String> {
    std::fs::read_to_string(folder().join("MANIFEST.md")).context("read fixtures/MANIFEST.md")
}

/// The hash of a fixture, and a complaint if it is too large.
fn hash(file: &str) -> Result<String> {
    let bytes = std::fs::read(folder().join(file)).with_context(|| format!("read fixtures/{file}"))?;
    if bytes.len() > MAX_FILE_BYTES {
        bail!("fixtures/{file} has {} bytes, more than {MAX_FILE_BYTES}", bytes.len());
    }
    Ok(Sha256::digest(&bytes).iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a String does not fail");
        text
    }))
}

/// Compares the files with the manifest, in both directions.
pub(crate) fn check() -> Result<()> {
    let manifest = manifest()?;
    let rows: Vec<_> = manifest.lines().filter_map(row).collect();
    let mut wrong = Vec::new();
    for row in &rows {
        if hash(row.file)? != row.sha256 {
            wrong.push(format!("{} has another hash", row.file));
        }
    }
    for entry in std::fs::read_dir(folder().join("elf")).context("list fixtures/elf")? {
        let file = format!("elf/{}", entry?.file_name().to_string_lossy());
        if !rows.iter().any(|row| row.file == file) {
            wrong.push(format!("{file} is not in the manifest"));
        }
    }
    if rows.is_empty() || !wrong.is_empty() {
        bail!("fixtures/MANIFEST.md lists {} files; {}", rows.len(), wrong.join(", "));
    }
    println!("{} fixtures are those of the manifest", rows.len());
    Ok(())
}

/// Runs every command of the manifest, in its order, and writes the new hashes.
pub(crate) fn rebuild() -> Result<()> {
    let mut text = String::new();
    for line in manifest()?.lines() {
        if let Some(row) = row(line) {
            println!("{}", row.command);
            run(command("sh").current_dir(folder()).args(["-c", row.command]))?;
            writeln!(text, "| {} | `{}` | {} |", row.file, row.command, hash(row.file)?)?;
        } else if line.starts_with(BUILT_BY) {
            let version = |tool| line_of(tool, &["--version"]).lines().next().unwrap_or_default().to_owned();
            writeln!(text, "{BUILT_BY}{}", TOOLS.map(version).join("; "))?;
        } else {
            writeln!(text, "{line}")?;
        }
    }
    std::fs::write(folder().join("MANIFEST.md"), text).context("write fixtures/MANIFEST.md")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_manifest() {
        let found = row("| elf/a.debug | `objcopy a b` | 00ff |").unwrap();
        assert_eq!((found.file, found.command, found.sha256), ("elf/a.debug", "objcopy a b", "00ff"));
        assert!(row("| file | command | sha256 |").is_none());
        assert!(row("|---|---|---|").is_none());
    }
}
