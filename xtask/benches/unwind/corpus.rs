//! What do the tables of everything on the machine cost together, and what is wrong or missing in them?
//!
//! A table of chosen files says what a format can do; all files together say what it costs a host, and find
//! the rule that nobody thought of. The proof is a DWARF interpreter at every row, and the memory is what
//! the kernel charges for the maps.

use std::collections::BTreeMap;

use windlass_agent::kernel_memory::charge;
use windlass_schema::UnsupportedReason;
use windlass_schema::maps::{CHUNK_BYTES, MAX_CHUNKS};
use windlass_unwind_compiler::{CompileError, Report};

use crate::best::RUNS;
use crate::measured::{Measured, Proof};
use crate::wire::ZSTD_LEVEL;

/// Tables that are charged at once, in bytes: three quarters of what the chunks hold, because what does
/// not fit into the end of a chunk is lost.
const GROUP_BYTES: usize = MAX_CHUNKS as usize * CHUNK_BYTES as usize / 4 * 3;
/// Rows from which on a file counts as large: below, what every table has outweighs its rows.
const LARGE_ROWS: u64 = 100_000;

/// Why files have no table, and how many there are.
pub(crate) type Refused = BTreeMap<String, usize>;

/// Counts a file that has no table.
pub(crate) fn refuse(refused: &mut Refused, error: CompileError) {
    *refused.entry(error.to_string()).or_default() += 1;
}

/// Sums over the corpus.
#[derive(Default)]
struct Sums {
    eh_frame_bytes: u64,
    fdes: u64,
    cfi_rows: u64,
    gimli_rows: u64,
    rows: u64,
    exact_rows: u64,
    code_bytes: u64,
    exact_code_bytes: u64,
    unsupported: BTreeMap<&'static str, u64>,
    skipped: BTreeMap<&'static str, u64>,
    compile_seconds: f64,
    gimli_seconds: f64,
    /// Of the files whose rows come of CFI; see [`is_of_cfi`].
    cfi_bytes: u64,
    cfi_seconds: f64,
    cfi_gimli_seconds: f64,
    wire_bytes: u64,
    peer_wire_bytes: u64,
    addresses_checked: u64,
    wrong: u64,
}

impl Sums {
    fn of(all: &[Measured], proofs: &[Proof]) -> Self {
        let mut sums = Self::default();
        for (file, proof) in all.iter().zip(proofs) {
            sums.add_report(&file.compiled.report);
            sums.eh_frame_bytes += file.eh_frame_bytes;
            sums.gimli_rows += file.gimli_rows;
            sums.compile_seconds += file.compile.seconds();
            sums.gimli_seconds += file.gimli.seconds();
            if is_of_cfi(&file.compiled.report) {
                sums.cfi_bytes += file.eh_frame_bytes;
                sums.cfi_seconds += file.compile.seconds();
                sums.cfi_gimli_seconds += file.gimli.seconds();
            }
            sums.wire_bytes += proof.wire_bytes;
            sums.peer_wire_bytes += proof.peer_wire_bytes;
            sums.addresses_checked += proof.verification.addresses_checked;
            sums.wrong += proof.verification.wrong;
        }
        sums
    }

    /// What the table says of code without CFI by a mark is no row that could be exact.
    fn stated_rows(&self) -> u64 {
        let marks = self.unsupported.get(UnsupportedReason::FramePointersOnly.as_str());
        self.rows - marks.copied().unwrap_or_default()
    }

    fn add_report(&mut self, report: &Report) {
        self.fdes += report.fdes;
        self.cfi_rows += report.cfi_rows;
        self.rows += report.rows;
        self.exact_rows += report.exact_rows;
        self.code_bytes += report.code_bytes;
        self.exact_code_bytes += report.exact_code_bytes;
        for (reason, rows) in &report.unsupported {
            *self.unsupported.entry(reason.as_str()).or_default() += rows;
        }
        for (reason, fdes) in &report.skipped_fdes {
            *self.skipped.entry(reason.as_str()).or_default() += fdes;
        }
    }
}

/// Whether nearly all that was compiled is CFI: no Go function table, and little code that has none.
fn is_of_cfi(report: &Report) -> bool {
    report.go_functions == 0 && report.uncovered_code_bytes * 20 <= report.code_bytes
}

/// Kernel memory of all tables.
struct Charged {
    bytes: u64,
    groups: usize,
    measured: bool,
    not_placed: Vec<String>,
}

fn charged(all: &[Measured]) -> Charged {
    let mut charged = Charged { bytes: 0, groups: 0, measured: true, not_placed: Vec::new() };
    let mut rest = all;
    while !rest.is_empty() {
        let ends = rest.iter().scan(0, |bytes, file| {
            *bytes += file.compiled.table.len();
            Some(*bytes)
        });
        let (group, behind) = rest.split_at(ends.take_while(|end| *end <= GROUP_BYTES).count().max(1));
        let charge = charge(group.iter().map(|file| &file.compiled.table[..]));
        charged.bytes += charge.bytes;
        charged.groups += 1;
        charged.measured &= charge.measured;
        let name =
            |(number, why): &(usize, String)| format!("{}: {why}", group[*number].image.path.display());
        charged.not_placed.extend(charge.not_placed.iter().map(name));
        rest = behind;
    }
    charged
}

pub(crate) fn print(all: &[Measured], proofs: &[Proof], refused: &Refused) {
    let (sums, charged) = (Sums::of(all, proofs), charged(all));
    let megabytes = sums.eh_frame_bytes as f64 / 1e6;
    let percent = |part: u64, whole: u64| 100.0 * part as f64 / whole.max(1) as f64;
    println!("### Corpus\n\n| every image of the machine | |\n|---|---:|");
    println!("| files | {} |", all.len());
    println!("| .eh_frame | {megabytes:.1} MB |");
    println!("| FDEs | {} |", sums.fdes);
    println!("| rows | {} |", sums.rows);
    println!("| addresses compared with gimli's interpreter | {} |", sums.addresses_checked);
    println!("| wrong | {} |", sums.wrong);
    println!("| exact, % of rows | {:.5} |", percent(sums.exact_rows, sums.stated_rows()));
    println!("| exact, % of code bytes | {:.5} |", percent(sums.exact_code_bytes, sums.code_bytes));
    println!("| rows unsupported | {} |", counts(&sums.unsupported));
    println!("| FDEs skipped | {} |", counts(&sums.skipped));
    let how = if charged.measured { "fdinfo memlock" } else { "computed: BPF maps are not permitted" };
    println!("| kernel memory of all tables ({how}) | {:.2} MB |", charged.bytes as f64 / 1e6);
    println!("| kernel bytes a row | {:.3} |", charged.bytes as f64 / sums.rows.max(1) as f64);
    println!("| worst file of {LARGE_ROWS} rows and more, kernel bytes a row | {} |", worst(all));
    println!("| wire, % of .eh_frame | {:.2} |", percent(sums.wire_bytes, sums.eh_frame_bytes));
    println!(
        "| zstd -{ZSTD_LEVEL} of .eh_frame, % | {:.2} |",
        percent(sums.peer_wire_bytes, sums.eh_frame_bytes)
    );
    let cfi_megabytes = sums.cfi_bytes as f64 / 1e6;
    println!(
        "| compile, files of CFI ({cfi_megabytes:.1} MB) | {:.0} MB/s |",
        cfi_megabytes / sums.cfi_seconds
    );
    println!("| gimli's rows, the same files | {:.0} MB/s |", cfi_megabytes / sums.cfi_gimli_seconds);
    println!("| compile / gimli, the same files, times | {:.2} |", sums.cfi_seconds / sums.cfi_gimli_seconds);
    println!("| compile, all files, with Go's tables and code without CFI | {:.2} s |", sums.compile_seconds);
    println!(
        "\nLinked 64-bit ELF files with an `.eh_frame`, each build-ID once; without a table: {}. MB/s are of `.eh_frame`, \
         summed over the files, best of {RUNS} each, in turn and alone; files of CFI are those without a Go function table \
         and with at most a twentieth of their code outside FDEs. Marks of code that can be walked by frame pointers only are \
         no rows here that could be exact. Groups of tables whose memory was charged at once: {}, each with \
         an outer map of its own{}. gimli meets {:.1} % of the rows that the compiler reads.\n",
        counts(refused),
        charged.groups,
        if charged.not_placed.is_empty() {
            String::new()
        } else {
            format!("; not placed: {}", charged.not_placed.join(", "))
        },
        percent(sums.gimli_rows, sums.cfi_rows),
    );
}

/// The large file whose rows take most.
fn worst(all: &[Measured]) -> String {
    let large = all.iter().filter(|file| file.compiled.report.rows >= LARGE_ROWS);
    let per_row = |file: &Measured| Some(file.kernel_bytes().ok()? as f64 / file.compiled.report.rows as f64);
    large
        .filter_map(|file| Some((per_row(file)?, file.image.name())))
        .max_by(|(left, _), (right, _)| left.total_cmp(right))
        .map_or("none".to_owned(), |(bytes, name)| format!("{bytes:.2} ({name})"))
}

fn counts<K: std::fmt::Display, V: std::fmt::Display>(counts: &BTreeMap<K, V>) -> String {
    let each: Vec<_> = counts.iter().map(|(what, count)| format!("{what} {count}")).collect();
    if each.is_empty() { "none".to_owned() } else { each.join(", ") }
}
