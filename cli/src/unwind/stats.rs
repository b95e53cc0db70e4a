//! `windlass unwind stats`: what tables cover and cost.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context as _;
use serde::Serialize;
use windlass_agent::kernel_memory::charge;
use windlass_unwind_compiler::Report;

use super::corpus::{CorpusArgs, FailedFile, for_each_elf};
use crate::terminal::{percent, size};

/// Level at which tables travel: they are compressed once and sent often.
const WIRE_ZSTD_LEVEL: i32 = 19;

/// Figures of one file, or of all.
#[derive(Clone, Debug, Default, Serialize)]
struct Figures {
    fdes: u64,
    cfi_rows: u64,
    rows: u64,
    eh_frame_bytes: u64,
    code_bytes: u64,
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
    let mut total = Figures::default();
    outcome.done.iter().for_each(|(_, (figures, _))| total.add(figures));
    total.kernel_bytes = charge.bytes;
    let files: Vec<_> =
        outcome.done.into_iter().map(|(path, (figures, _))| FileFigures { path, figures }).collect();
    let stats = Stats {
        total: Total { files: files.len(), figures: total, kernel_bytes_measured: charge.measured },
        files,
        failed_files: outcome.failed,
    };
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
    figures.wire_bytes = zstd::bulk::compress(&compiled.table, WIRE_ZSTD_LEVEL)
        .context("failed to compress the table")?
        .len() as u64;
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
        self.wire_bytes += file.wire_bytes;
        self.exact_rows += file.exact_rows;
        self.exact_code_bytes += file.exact_code_bytes;
        self.compile_seconds += file.compile_seconds;
        for (sums, counts) in
            [(&mut self.unsupported, &file.unsupported), (&mut self.skipped_fdes, &file.skipped_fdes)]
        {
            for (reason, count) in counts {
                *sums.entry(reason).or_default() += count;
            }
        }
    }

    fn print(&self, name: &str, out: &mut impl io::Write) -> io::Result<()> {
        let bytes_per_row = self.kernel_bytes as f64 / self.rows.max(1) as f64;
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

impl Stats {
    fn print(&self, out: &mut impl io::Write) -> io::Result<()> {
        writeln!(
            out,
            "{:>9} {:>9} {:>10} {:>6} {:>10} {:>6} {:>9}  file",
            "FDEs", "rows", "kernel", "B/row", "wire", "% CFI", "% exact"
        )?;
        for file in &self.files {
            file.figures.print(&file.path.display().to_string(), out)?;
        }
        let total = &self.total;
        total.figures.print(&format!("total of {} files", total.files), out)?;
        let source = if total.kernel_bytes_measured { "read from the kernel" } else { "computed" };
        writeln!(out, "\ntotal kernel memory {source}; compiled in {:.2} s", total.figures.compile_seconds)?;
        for (what, counts) in
            [("unsupported rows", &total.figures.unsupported), ("skipped FDEs", &total.figures.skipped_fdes)]
        {
            for (reason, count) in counts {
                writeln!(out, "{what}: {count} {reason}")?;
            }
        }
        Ok(())
    }
}
