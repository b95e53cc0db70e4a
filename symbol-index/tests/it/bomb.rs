//! Compressed sections that become far more than their file: refused before they cost memory.

use std::path::PathBuf;
use std::process::Command;

use object::{Object, ObjectSection};
use windlass_schema::ImageAddress;
use windlass_schema::http::{Provenance, Unresolved};
use windlass_symbol_index::{Index, Input, build};

use crate::program::{Workshop, function_addresses, run};

/// Zero bytes in each section of the bomb.
const SECTION_BYTES: u64 = 64 << 20;
/// What a process may take that refuses it, in KiB: half of one of its sections.
const MAX_PEAK_KIB: u64 = SECTION_BYTES / 2 / 1024;
/// Names the bomb to a second process of this test, whose memory is that of one `build`.
const BOMB_VARIABLE: &str = "WINDLASS_TEST_BOMB";

/// A shared object with the function `code` and three sections of zeros, as `compression` packs them.
fn bomb(workshop: &Workshop, compression: &str) -> PathBuf {
    let code = ".text\n.globl code\n.type code, @function\ncode: nop\nend:\n.size code, end - code\n";
    let sections = ["info", "abbrev", "str"]
        .map(|name| format!(".section .debug_{name},\"\",@progbits\n.zero {SECTION_BYTES}\n"))
        .concat();
    let (source, object) = (workshop.path("bomb.s"), workshop.path("bomb.so"));
    std::fs::write(&source, format!("{code}{sections}")).unwrap();
    run(Command::new("cc").args(["-shared", "-nostdlib", "-o"]).arg(&object).arg(&source));
    workshop.objcopy(&object, &[&format!("--compress-debug-sections={compression}")], compression)
}

/// The symbol is found, and whatever is not found is put down to the DWARF.
#[track_caller]
fn check_refused(elf: &[u8]) {
    let bytes = build(Input { debug: Some(elf), ..Input::default() }).unwrap();
    let index = Index::parse(&bytes).unwrap();
    let frames = index.lookup(ImageAddress::new(function_addresses(elf, 0)[0])).unwrap();
    assert_eq!((frames.len(), frames[0].provenance), (1, Provenance::Symtab));
    assert_eq!(index.lookup(ImageAddress::new(1)), Err(Unresolved::BrokenDebuginfo));
}

/// The most memory that this process had, in KiB.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    peak.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Builds the index of the bomb at `path` in a process of its own.
#[track_caller]
fn check_in_a_process(path: &std::path::Path) {
    run(Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "bomb::is_refused_and_costs_no_memory", "--nocapture"])
        .env(BOMB_VARIABLE, path));
}

#[test]
fn is_refused_and_costs_no_memory() {
    if let Some(path) = std::env::var_os(BOMB_VARIABLE) {
        check_refused(&std::fs::read(path).unwrap());
        let peak = peak_kib();
        assert!(peak < MAX_PEAK_KIB, "peak of {peak} KiB, expected less than {MAX_PEAK_KIB}");
        return;
    }
    let workshop = Workshop::new();
    for compression in ["zlib", "zlib-gnu", "zstd"] {
        let path = bomb(&workshop, compression);
        assert!(path.metadata().unwrap().len() < SECTION_BYTES / 200);
        check_in_a_process(&path);
    }
}

/// Headers that state little in front of data that becomes much.
#[test]
fn is_bounded_by_what_its_headers_state() {
    /// Offset of `ch_size` in an `Elf64_Chdr`.
    const CH_SIZE: usize = 8;
    let workshop = Workshop::new();
    for compression in ["zlib", "zstd"] {
        let path = bomb(&workshop, compression);
        let mut elf = std::fs::read(&path).unwrap();
        let file = object::File::parse(&*elf).unwrap();
        let debug = file.sections().filter(|section| section.name().unwrap().starts_with(".debug_"));
        let headers: Vec<usize> = debug.map(|section| section.file_range().unwrap().0 as usize).collect();
        assert_eq!(headers.len(), 3);
        for header in headers {
            elf[header + CH_SIZE..][..8].copy_from_slice(&100_u64.to_le_bytes());
        }
        let path = workshop.path("lying");
        std::fs::write(&path, elf).unwrap();
        check_in_a_process(&path);
    }
}
