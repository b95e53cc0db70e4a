//! `windlass unwind` against the CFI of fixtures and of the machine's own libraries.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::Value;
use windlass_tests::program::{fixture, run, text, windlass};
use windlass_unwind_compiler::{Report, build_id_of, compile};

/// The libc that this test runs on.
pub(crate) fn libc_path() -> PathBuf {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
    let line = maps.lines().find(|line| line.contains("/libc.so") || line.contains("/libc-"));
    Path::new(line.and_then(|line| line.split_whitespace().nth(5)).expect("this test uses a libc")).to_owned()
}

#[track_caller]
fn json(text: &[u8]) -> Value {
    serde_json::from_slice(text).unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(text)))
}

#[test]
fn every_row_of_fixtures_and_libc_is_what_the_cfi_says() {
    let mut verify = windlass("windlass");
    verify.args(["unwind", "verify", "--json"]).arg(libc_path());
    verify.args(["inlined", "frames", "no-build-id", "small", "object.o"].map(fixture));
    let report = json(&run(&mut verify, &[0]).stdout);
    assert_eq!(report["wrong"], 0, "{report}");
    assert_eq!(report["files"], 6, "{report}");
    // A libc has tens of thousands of rows; each is checked at two addresses or more.
    assert!(report["rows_checked"].as_u64() > Some(10_000), "{report}");
    assert!(report["addresses_checked"].as_u64() >= report["rows_checked"].as_u64(), "{report}");
    assert!(report["unsupported"].is_object() && report["failed_files"] == Value::Array(vec![]), "{report}");
}

#[test]
fn a_broken_fde_costs_that_fde_alone() {
    let stats = text(windlass("windlass").args(["unwind", "stats", "--json"]).arg(fixture("broken-fde")));
    let total = &json(stats.as_bytes())["total"];
    let broken = 3;
    let skipped = total["skipped_fdes"].as_object().expect("skipped_fdes by reason");
    assert_eq!(skipped.values().filter_map(Value::as_u64).sum::<u64>(), broken, "{total}");
    // push, pop and the end of `good`, and at least one row of `_start`.
    assert!(total["exact_rows"].as_u64() >= Some(4), "{total}");
    let dump = text(windlass("windlass").args(["unwind", "dump"]).arg(fixture("broken-fde")));
    assert!(dump.contains("cfa=rsp+16"), "`good` pushes a word:\n{dump}");
    let verified =
        run(windlass("windlass").args(["unwind", "verify", "--json"]).arg(fixture("broken-fde")), &[0]);
    assert_eq!(json(&verified.stdout)["wrong"], 0);
}

#[test]
fn statistics_have_the_documented_keys() {
    let stats = text(
        windlass("windlass").args(["unwind", "stats", "--json"]).arg(fixture("frames")).arg(libc_path()),
    );
    let stats = json(stats.as_bytes());
    for key in [
        "files",
        "fdes",
        "cfi_rows",
        "rows",
        "eh_frame_bytes",
        "code_bytes",
        "kernel_bytes",
        "wire_bytes",
        "exact_rows",
        "exact_code_bytes",
    ] {
        assert!(stats["total"][key].as_u64() > Some(0), "{key}: {}", stats["total"]);
    }
    let total = &stats["total"];
    assert!(total["compile_seconds"].as_f64() > Some(0.0), "{total}");
    assert!(total["unsupported"].is_object() && total["skipped_fdes"].is_object(), "{total}");
    assert_eq!(stats["files"].as_array().map(Vec::len), Some(2));
    assert!(total["exact_rows"].as_u64() <= total["rows"].as_u64(), "{total}");
}

#[test]
fn a_table_file_answers_as_its_elf_file() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let table = folder.path().join("frames.wlut");
    run(windlass("windlass").args(["unwind", "compile"]).arg(fixture("frames")).arg("-o").arg(&table), &[0]);
    let of = |file: &Path| text(windlass("windlass").args(["unwind", "dump"]).arg(file));
    let dump = of(&table);
    assert_eq!(dump, of(&fixture("frames")));
    // The over-aligned frame: its CFA is behind a pointer.
    assert!(dump.contains("cfa=*("), "{dump}");
}

#[test]
fn a_skeleton_compiles_to_the_table_of_the_whole() {
    let mut recognised = BTreeSet::new();
    let (mut compared, mut others) = (0, Vec::new());
    let of_machine = sample_of_machine().into_iter().chain([libc_path()]);
    for path in ["inlined", "frames", "small", "small-plain"].map(fixture).into_iter().chain(of_machine) {
        let whole = std::fs::read(&path).expect("read the ELF file");
        if !is_compared(&whole) {
            continue;
        }
        let Ok(skeleton) = windlass_agent::skeleton::skeleton(&whole[..]) else { continue };
        let build_id = build_id_of(&skeleton).expect("a skeleton says who it is of");
        let compiled = |elf: &[u8]| compile(elf, build_id);
        let (Ok(of_skeleton), Ok(of_whole)) = (compiled(&skeleton), compiled(&whole)) else { continue };
        let kinds = |report: &Report| report.recognised_bytes.clone();
        if of_skeleton.table != of_whole.table {
            others.push((path, kinds(&of_skeleton.report), kinds(&of_whole.report)));
        }
        recognised.extend(kinds(&of_whole.report).into_keys().map(|kind| kind.as_str()));
        compared += 1;
    }
    assert!(others.is_empty(), "{compared} files, other tables of {}: {others:#?}", others.len());
    assert!(compared > 8 && recognised.len() > 2, "{compared} files, {recognised:?}");
}

/// Whether it is an image of which the skeleton says all. Of Go code it does not have the data that tells where the table of
/// functions counts from; and nothing runs what is not linked.
fn is_compared(elf: &[u8]) -> bool {
    const TYPE_OFFSET: usize = 16;
    const ET_REL: u8 = 1;
    let is_linked = elf.starts_with(b"\x7fELF") && elf.get(TYPE_OFFSET) != Some(&ET_REL);
    is_linked && !elf.windows(GO_TABLE.len()).any(|bytes| bytes == GO_TABLE)
}

const GO_TABLE: &[u8] = b".gopclntab\0";

/// Libraries and programs of the machine: those in which most is recognised, and some of all the others, or all with
/// `WINDLASS_ALL_FILES=1`.
fn sample_of_machine() -> Vec<PathBuf> {
    const FOLDERS: [&str; 3] = ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/bin"];
    const KNOWN: [&str; 6] = [
        "/lib64/ld-linux-x86-64.so.2",
        "/lib/ld-musl-x86_64.so.1",
        "/usr/lib/x86_64-linux-gnu/libcrypto.so.3",
        "/usr/lib/x86_64-linux-gnu/libgmp.so.10",
        "/usr/bin/python3",
        "/usr/bin/node",
    ];
    const ONE_IN: usize = 40;
    const MAX_BYTES: u64 = 4 << 20;
    let entries = FOLDERS.iter().flat_map(std::fs::read_dir).flatten().flatten();
    let all = std::env::var_os("WINDLASS_ALL_FILES").is_some();
    let is_small =
        |path: &PathBuf| path.metadata().is_ok_and(|file| file.is_file() && (all || file.len() <= MAX_BYTES));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(is_small).collect();
    files.sort();
    let some = files.into_iter().step_by(if all { 1 } else { ONE_IN });
    KNOWN.map(PathBuf::from).into_iter().filter(|path| path.exists()).chain(some).collect()
}

#[test]
fn a_compressed_module_is_called_one() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let module = folder.path().join("nfs.ko.xz");
    std::fs::write(&module, b"\xfd7zXZ\0\0\x04 and more").expect("write a file");
    let error = |command: &str, path: &Path| {
        let run = run(windlass("windlass").args(["unwind", command]).arg(path), &[2]);
        String::from_utf8(run.stderr).expect("messages are text")
    };
    for command in ["dump", "stats", "verify"] {
        let message = error(command, &module);
        assert!(message.contains("compressed by xz") && message.contains("`xz -dk FILE`"), "{message}");
    }
    // In a tree too, where text files and the like are passed over.
    assert!(error("verify", folder.path()).contains("nfs.ko.xz: a file compressed by xz"));
}
