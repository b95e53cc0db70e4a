//! `windlass unwind verify`: tables against a DWARF interpreter, every row.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use serde::Serialize;
use windlass_schema::Table;
use windlass_unwind_compiler::Verification;

use super::corpus::{CorpusArgs, FailedFile, for_each_elf};

#[derive(Default, Serialize)]
struct Proof {
    files: usize,
    fdes: u64,
    rows_checked: u64,
    addresses_checked: u64,
    wrong: u64,
    unsupported: BTreeMap<&'static str, u64>,
    /// Rows of code without CFI, which no interpreter checks.
    recognised: BTreeMap<&'static str, u64>,
    disagreements: Vec<FileDisagreement>,
    failed_files: Vec<FailedFile>,
}

/// An address at which a table and its image disagree; the first ones of each file.
#[derive(Serialize)]
struct FileDisagreement {
    path: PathBuf,
    address: String,
    table: String,
    image: String,
}

pub(super) fn run(args: &CorpusArgs) -> anyhow::Result<ExitCode> {
    let outcome = for_each_elf(args, "verifying", |elf| {
        let compiled = super::compile_unnamed(elf)?;
        let table = Table::parse(&compiled.table).context("the compiled table is malformed")?;
        Ok(windlass_unwind_compiler::verify(elf, &table)?)
    });
    let mut proof = Proof::default();
    outcome.done.iter().for_each(|(path, verification)| proof.add(path.clone(), verification));
    let status = outcome.status(if proof.wrong > 0 { crate::FINDINGS } else { crate::DONE });
    if !args.json {
        outcome.print_failed();
    }
    proof.failed_files = outcome.failed;
    let mut out = io::BufWriter::new(io::stdout().lock());
    if args.json {
        serde_json::to_writer(&mut out, &proof)?;
        writeln!(out)?;
    } else {
        proof.print(&mut out)?;
    }
    out.flush()?;
    Ok(status)
}

impl Proof {
    fn add(&mut self, path: PathBuf, file: &Verification) {
        self.files += 1;
        self.fdes += file.fdes;
        self.rows_checked += file.rows_checked;
        self.addresses_checked += file.addresses_checked;
        self.wrong += file.wrong;
        for (reason, rows) in &file.unsupported {
            *self.unsupported.entry(reason.as_str()).or_default() += rows;
        }
        for (kind, rows) in &file.recognised {
            *self.recognised.entry(kind.as_str()).or_default() += rows;
        }
        self.disagreements.extend(file.disagreements.iter().map(|found| FileDisagreement {
            path: path.clone(),
            address: found.address.to_string(),
            table: found.table.to_string(),
            image: found.image.clone(),
        }));
    }

    fn print(&self, out: &mut impl io::Write) -> io::Result<()> {
        for found in &self.disagreements {
            writeln!(out, "{} {}: table {}", found.path.display(), found.address, found.table)?;
            writeln!(out, "    image {}", found.image)?;
        }
        writeln!(
            out,
            "{} files, {} FDEs, {} rows at {} addresses: {} wrong, {} unsupported",
            self.files,
            self.fdes,
            self.rows_checked,
            self.addresses_checked,
            self.wrong,
            self.unsupported.values().sum::<u64>(),
        )?;
        for (reason, rows) in &self.unsupported {
            writeln!(out, "unsupported rows: {rows} {reason}")?;
        }
        for (kind, rows) in &self.recognised {
            writeln!(out, "rows without CFI: {rows} {kind}")?;
        }
        Ok(())
    }
}
