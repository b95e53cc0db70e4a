//! Unwind tables of this machine's largest ELF files: size in the kernel and on the wire, and compile
//! time, beside what stands against each.
//!
//! Peers publish the size of a row in their source, not what the kernel charges for it, and no compile
//! time. Here bytes are divided by rows, a row being a change of (CFA, return address, frame pointer);
//! the wire is held against zstd on `.eh_frame` itself, what one would send without a format; compiling
//! against gimli iterating over all rows of the same bytes and keeping nothing, the least that any
//! compiler on gimli can cost. Times are the best of several runs, both sides in turn.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

use gimli::{BaseAddresses, CieOrFde, EhFrame, LittleEndian, UnwindContext, UnwindSection};
use object::{Object, ObjectSection};
use windlass_schema::table::HEADER_BYTES;
use windlass_schema::{BuildId, maps};
use windlass_unwind_compiler::compile;

/// Runs of which the best counts.
const RUNS: usize = 3;
/// zstd's level for both wire forms: a table is compressed once and fetched by a fleet.
const ZSTD_LEVEL: i32 = 19;
/// Build-ID of the tables measured here, whose own matters to nothing.
const BUILD_ID: [u8; 20] = [0xab; 20];

/// Prefixes of file names that are looked for, with the folders that hold them.
const CANDIDATES: &[(&str, &str)] = &[
    ("/usr/lib/x86_64-linux-gnu", "libLLVM.so.22"),
    ("/usr/lib/x86_64-linux-gnu", "libLLVM-14.so.1"),
    ("/usr/lib/x86_64-linux-gnu", "libc.so.6"),
    ("/usr/lib/x86_64-linux-gnu", "libstdc++.so.6"),
    ("/usr/lib/x86_64-linux-gnu", "libcrypto.so.3"),
    ("/usr/lib/x86_64-linux-gnu", "libpython3.11.so"),
    ("/usr/bin", "gdb"),
    ("/usr/bin", "python3"),
    ("/usr/bin", "node"),
    ("/usr/local/bin", "node"),
];

/// One file, measured.
struct Measured {
    name: String,
    eh_frame_bytes: u64,
    rows: u64,
    kernel_bytes: u64,
    wire_bytes: u64,
    peer_wire_bytes: u64,
    exact_code: f64,
    compile_seconds: f64,
    gimli_seconds: f64,
}

fn main() {
    let mut files: Vec<PathBuf> =
        CANDIDATES.iter().filter_map(|(folder, prefix)| first_with(Path::new(folder), prefix)).collect();
    files.extend(rustc_driver());
    let mut all: Vec<_> = files
        .iter()
        .filter_map(|file| match measure(file) {
            Ok(measured) => Some(measured),
            Err(error) => {
                eprintln!("{}: {error}", file.display());
                None
            }
        })
        .collect();
    all.sort_by_key(|measured| std::cmp::Reverse(measured.rows));
    print_table(&all);
}

/// The first file in a folder whose name starts so.
fn first_with(folder: &Path, prefix: &str) -> Option<PathBuf> {
    let files = std::fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    let mut found: Vec<_> = files
        .filter(|file| file.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)))
        .collect();
    found.sort();
    found.into_iter().find(|file| file.is_file())
}

/// The compiler's library, the largest Rust binary that a developer has.
fn rustc_driver() -> Option<PathBuf> {
    let output = std::process::Command::new("rustc").arg("--print=sysroot").output().ok()?;
    let sysroot = String::from_utf8(output.stdout).ok()?;
    first_with(&Path::new(sysroot.trim()).join("lib"), "librustc_driver")
}

fn measure(path: &Path) -> Result<Measured, Box<dyn std::error::Error>> {
    // SAFETY: installed programs are replaced, not written to, while this runs.
    let elf = unsafe { memmap2::Mmap::map(&File::open(path)?)? };
    let file = object::File::parse(&elf[..])?;
    let section = file.section_by_name(".eh_frame").ok_or("no .eh_frame")?;
    let (eh_frame, address) = (section.data()?, section.address());
    let text = file.section_by_name(".text").map_or(0, |text| text.address());
    let build_id = BuildId::new(&BUILD_ID)?;

    let mut compiled = compile(&elf, build_id)?;
    let (mut compile_seconds, mut gimli_seconds) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..RUNS {
        let start = Instant::now();
        compiled = compile(&elf, build_id)?;
        compile_seconds = compile_seconds.min(start.elapsed().as_secs_f64());
        let start = Instant::now();
        std::hint::black_box(iterate_rows(eh_frame, address, text));
        gimli_seconds = gimli_seconds.min(start.elapsed().as_secs_f64());
    }
    let report = &compiled.report;
    // What lies in the chunks: all but the file's header, which an image header stands for.
    let in_chunks = compiled.table.len() - HEADER_BYTES + size_of::<maps::ImageHeader>();
    Ok(Measured {
        name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        eh_frame_bytes: eh_frame.len() as u64,
        rows: report.rows,
        kernel_bytes: in_chunks as u64,
        wire_bytes: zstd::bulk::compress(&compiled.table, ZSTD_LEVEL)?.len() as u64,
        peer_wire_bytes: zstd::bulk::compress(eh_frame, ZSTD_LEVEL)?.len() as u64,
        exact_code: report.exact_code_bytes as f64 / report.code_bytes.max(1) as f64,
        compile_seconds,
        gimli_seconds,
    })
}

/// Iterates over the rows of every FDE and counts them; broken FDEs are passed over.
fn iterate_rows(eh_frame: &[u8], address: u64, text: u64) -> u64 {
    let section = EhFrame::new(eh_frame, LittleEndian);
    let bases = BaseAddresses::default().set_eh_frame(address).set_text(text);
    let mut context = UnwindContext::new();
    let (mut entries, mut rows) = (section.entries(&bases), 0);
    while let Ok(Some(entry)) = entries.next() {
        let CieOrFde::Fde(partial) = entry else { continue };
        let Ok(fde) = partial.parse(|section, bases, offset| section.cie_from_offset(bases, offset)) else {
            continue;
        };
        let Ok(mut table) = fde.rows(&section, &bases, &mut context) else { continue };
        while let Ok(Some(row)) = table.next_row() {
            rows += u64::from(std::hint::black_box(row).start_address() != 0);
        }
    }
    rows
}

fn print_table(all: &[Measured]) {
    println!(
        "| file | .eh_frame | rows | kernel bytes/row | wire, % of .eh_frame | zstd -{ZSTD_LEVEL} of .eh_frame, % | \
         exact, % of code | compile | gimli's rows | ratio |"
    );
    println!("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|");
    for file in all {
        let percent = |bytes: u64| 100.0 * bytes as f64 / file.eh_frame_bytes as f64;
        println!(
            "| {} | {:.2} MB | {} | {:.2} | {:.1} | {:.1} | {:.3} | {:.0} ms | {:.0} ms | {:.2} |",
            file.name,
            file.eh_frame_bytes as f64 / 1e6,
            file.rows,
            file.kernel_bytes as f64 / file.rows.max(1) as f64,
            percent(file.wire_bytes),
            percent(file.peer_wire_bytes),
            100.0 * file.exact_code,
            1e3 * file.compile_seconds,
            1e3 * file.gimli_seconds,
            file.compile_seconds / file.gimli_seconds,
        );
    }
    let sum = |of: fn(&Measured) -> u64| all.iter().map(of).sum::<u64>() as f64;
    let (eh_frame, rows) = (sum(|file| file.eh_frame_bytes), sum(|file| file.rows));
    let seconds = |of: fn(&Measured) -> f64| all.iter().map(of).sum::<f64>();
    println!(
        "\nTogether: {:.2} bytes a row in the kernel; {:.1} % of `.eh_frame` on the wire, where zstd alone takes {:.1} %; \
         {:.2} times gimli's time.",
        sum(|file| file.kernel_bytes) / rows,
        100.0 * sum(|file| file.wire_bytes) / eh_frame,
        100.0 * sum(|file| file.peer_wire_bytes) / eh_frame,
        seconds(|file| file.compile_seconds) / seconds(|file| file.gimli_seconds),
    );
    println!(
        "\nA row is a change of (CFA, return address, frame pointer). Kernel bytes count pages, dictionary, directory and \
         header of the image, not what the rounding of the last 64 KiB chunk leaves. Times: best of {RUNS}, in turn."
    );
}
