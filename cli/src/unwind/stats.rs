//! `windlass unwind stats`: what tables cover and cost.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context as _;
use serde::Serialize;
use windlass_agent::kernel_memory::{Charge, charge};
use windlass_unwind_compiler::Report;

use super::corpus::{CorpusArgs, FailedFile, for_each_elf};
use crate::terminal::{percent, size};

/// Figures of one file, or of all.
#[derive(Clone, Debug, Default, Serialize)]
struct Figures {
    fdes: u64,
    cfi_rows: u64,
    rows: u64,
    eh_frame_bytes: u64,
    code_bytes: u64,
    uncovered_code_bytes: u64,
    recognised_bytes: BTreeMap<&'static str, u64>,
    frame_pointer_code_bytes: u64,
    kernel_bytes: u64,
    wire_bytes: u64,
    exact_rows: u64,
    exact_code_bytes: u64,
    unsupported: BTreeMap<&'static str, u64>,
    skipped_fdes: BTreeMap<&'static str, u64>,
    compile_seconds: f64,
}

#[derive(Serialize)]
struct FileFigures {
    path: PathBuf,
    /// Why the table is not in kernel memory, if it is not.
    not_placed: Option<String>,
    #[serde(flatten)]
    figures: Figures,
}

#[derive(Serialize)]
struct Total {
    files: usize,
    #[serde(flatten)]
    figures: Figures,
    /// Whether the kernel itself said what it charges.
    kernel_bytes_measured: bool,
    /// Files whose tables are not in `kernel_bytes`, for want of room.
    not_placed: usize,
    /// Rows of the tables that are: what `kernel_bytes` is for.
    placed_rows: u64,
}

#[derive(Serialize)]
struct Stats {
    total: Total,
    files: Vec<FileFigures>,
    failed_files: Vec<FailedFile>,
}

pub(super) fn run(args: &CorpusArgs) -> anyhow::Result<ExitCode> {
    let mut outcome = for_each_elf(args, "compiling", measure);
    let charge = charge(outcome.done.iter().map(|(_, (_, table))| &table[..]));
    for ((_, (figures, _)), bytes) in outcome.done.iter_mut().zip(&charge.per_table) {
        figures.kernel_bytes = *bytes;
    }
    let status = outcome.status(crate::DONE);
    if !args.json {
        outcome.print_failed();
    }
    let done = std::mem::take(&mut outcome.done);
    let files = done.into_iter().map(|(path, (figures, _))| FileFigures { path, not_placed: None, figures });
    let stats = Stats::new(files.collect(), charge, outcome.failed);
    let mut out = io::BufWriter::new(io::stdout().lock());
    if args.json {
        serde_json::to_writer(&mut out, &stats)?;
        writeln!(out)?;
    } else {
        stats.print(&mut out)?;
    }
    out.flush()?;
    Ok(status)
}

/// The figures of one file, and its table.
fn measure(elf: &[u8]) -> anyhow::Result<(Figures, Vec<u8>)> {
    let begin = Instant::now();
    let compiled = super::compile_unnamed(elf)?;
    let mut figures = Figures::of(&compiled.report);
    figures.compile_seconds = begin.elapsed().as_secs_f64();
    let wire = windlass_schema::wire::pack(&compiled.table).context("failed to pack the table")?;
    figures.wire_bytes = wire.len() as u64;
    Ok((figures, compiled.table))
}

impl Figures {
    fn of(report: &Report) -> Self {
        Self {
            fdes: report.fdes,
            cfi_rows: report.cfi_rows,
            rows: report.rows,
            eh_frame_bytes: report.eh_frame_bytes,
            code_bytes: report.code_bytes,
            uncovered_code_bytes: report.uncovered_code_bytes,
            recognised_bytes: report
                .recognised_bytes
                .iter()
                .map(|(kind, bytes)| (kind.as_str(), *bytes))
                .collect(),
            frame_pointer_code_bytes: report.frame_pointer_code_bytes,
            exact_rows: report.exact_rows,
            exact_code_bytes: report.exact_code_bytes,
            unsupported: report.unsupported.iter().map(|(reason, rows)| (reason.as_str(), *rows)).collect(),
            skipped_fdes: report.skipped_fdes.iter().map(|(reason, fdes)| (reason.as_str(), *fdes)).collect(),
            ..Self::default()
        }
    }

    /// Adds a file's figures, but for kernel memory, which tables share.
    fn add(&mut self, file: &Self) {
        self.fdes += file.fdes;
        self.cfi_rows += file.cfi_rows;
        self.rows += file.rows;
        self.eh_frame_bytes += file.eh_frame_bytes;
        self.code_bytes += file.code_bytes;
        self.uncovered_code_bytes += file.uncovered_code_bytes;
        self.frame_pointer_code_bytes += file.frame_pointer_code_bytes;
        self.wire_bytes += file.wire_bytes;
        self.exact_rows += file.exact_rows;
        self.exact_code_bytes += file.exact_code_bytes;
        self.compile_seconds += file.compile_seconds;
        for (sums, counts) in [
            (&mut self.recognised_bytes, &file.recognised_bytes),
            (&mut self.unsupported, &file.unsupported),
            (&mut self.skipped_fdes, &file.skipped_fdes),
        ] {
            for (reason, count) in counts {
                *sums.entry(reason).or_default() += count;
            }
        }
    }

    /// One line; `placed_rows` are those that kernel memory is for.
    fn print(&self, placed_rows: u64, name: &str, out: &mut impl io::Write) -> io::Result<()> {
        let bytes_per_row = self.kernel_bytes as f64 / placed_rows.max(1) as f64;
        writeln!(
            out,
            "{:>9} {:>9} {:>10} {bytes_per_row:>6.2} {:>10} {:>6.2} {:>9.4}  {name}",
            self.fdes,
            self.rows,
            size(self.kernel_bytes),
            size(self.wire_bytes),
            percent(self.wire_bytes, self.eh_frame_bytes),
            percent(self.exact_code_bytes, self.code_bytes),
        )
    }
}

impl FileFigures {
    /// Rows of the table if it is in kernel memory.
    fn placed_rows(&self) -> u64 {
        if self.not_placed.is_some() { 0 } else { self.figures.rows }
    }
}

impl Stats {
    /// The figures of `files`, in the order in which their tables were charged.
    fn new(mut files: Vec<FileFigures>, charge: Charge, failed_files: Vec<FailedFile>) -> Self {
        let not_placed = charge.not_placed.len();
        for (number, reason) in charge.not_placed {
            files[number].not_placed = Some(reason);
        }
        let mut figures = Figures::default();
        files.iter().for_each(|file| figures.add(&file.figures));
        figures.kernel_bytes = charge.bytes;
        let total = Total {
            files: files.len(),
            figures,
            kernel_bytes_measured: charge.measured,
            not_placed,
            placed_rows: files.iter().map(FileFigures::placed_rows).sum(),
        };
        Self { total, files, failed_files }
    }

    fn print(&self, out: &mut impl io::Write) -> io::Result<()> {
        writeln!(
            out,
            "{:>9} {:>9} {:>10} {:>6} {:>10} {:>6} {:>9}  file",
            "FDEs", "rows", "kernel", "B/row", "wire", "% CFI", "% exact"
        )?;
        for file in &self.files {
            file.figures.print(file.placed_rows(), &file.path.display().to_string(), out)?;
        }
        let total = &self.total;
        total.figures.print(total.placed_rows, &format!("total of {} files", total.files), out)?;
        let source = if total.kernel_bytes_measured { "read from the kernel" } else { "computed" };
        writeln!(out, "\ntotal kernel memory {source}; compiled in {:.2} s", total.figures.compile_seconds)?;
        if total.not_placed > 0 {
            writeln!(
                out,
                "{} of the tables are not placed, and left out of kernel memory and B/row: an agent has no room \
                 for all of these files at once",
                total.not_placed
            )?;
        }
        for file in &self.files {
            if let Some(reason) = &file.not_placed {
                writeln!(out, "not placed: {}: {reason}", file.path.display())?;
            }
        }
        writeln!(out, "bytes of code without CFI: {}", total.figures.uncovered_code_bytes)?;
        for (what, counts) in [
            ("recognised bytes of them", &total.figures.recognised_bytes),
            ("unsupported rows", &total.figures.unsupported),
            ("skipped FDEs", &total.figures.skipped_fdes),
        ] {
            for (reason, count) in counts {
                writeln!(out, "{what}: {count} {reason}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_table_that_is_not_placed_do_not_count() {
        let file = |rows, kernel_bytes| FileFigures {
            path: format!("{rows}").into(),
            not_placed: None,
            figures: Figures { rows, kernel_bytes, ..Figures::default() },
        };
        let charge = Charge {
            bytes: 1000,
            per_table: vec![900, 0],
            not_placed: vec![(1, "no room".to_owned())],
            measured: true,
        };
        let stats = Stats::new(vec![file(100, 900), file(900, 0)], charge, Vec::new());
        assert_eq!(
            (stats.total.not_placed, stats.total.placed_rows, stats.total.figures.rows),
            (1, 100, 1000)
        );
        let mut text = Vec::new();
        stats.print(&mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        let total = text.lines().find(|line| line.ends_with("total of 2 files")).unwrap();
        assert!(total.contains(" 10.00 "), "{total}");
        assert!(text.contains("not placed: 900: no room"), "{text}");
        let json = serde_json::to_value(&stats).unwrap();
        assert_eq!(
            (&json["total"]["not_placed"], &json["files"][1]["not_placed"]),
            (&1.into(), &"no room".into())
        );
    }
}
