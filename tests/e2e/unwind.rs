//! `windlass unwind` against the CFI of fixtures and of the machine's own libraries.

use std::path::{Path, PathBuf};

use serde_json::Value;
use windlass_schema::{Rule, Table};
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
fn a_skeleton_compiles_to_what_the_whole_says_by_cfi() {
    for path in
        ["inlined", "frames", "broken-fde", "small-plain"].map(fixture).into_iter().chain([libc_path()])
    {
        let whole = std::fs::read(&path).expect("read the ELF file");
        let skeleton = windlass_agent::skeleton::skeleton(&whole[..]).expect("an ELF file has a skeleton");
        // Its point: no code. Fixtures have hardly any to leave out.
        assert!(whole.len() < 1 << 20 || 2 * skeleton.len() < whole.len(), "{} bytes", skeleton.len());
        let build_id = build_id_of(&whole).expect("these have build-IDs");
        assert_eq!(build_id_of(&skeleton), Some(build_id), "{}", path.display());
        let compiled = |elf: &[u8]| compile(elf, build_id).expect("these compile");
        let (of_skeleton, of_whole) = (compiled(&skeleton), compiled(&whole));
        let covered = |report: &Report| (report.code_bytes, report.exact_code_bytes, report.cfi_rows);
        assert_eq!(covered(&of_skeleton.report), covered(&of_whole.report), "{}", path.display());
        assert!(of_skeleton.report.recognised_bytes.is_empty(), "{}: there is no code", path.display());
        let part = Table::parse(&of_skeleton.table).expect("a compiled table");
        let table = Table::parse(&of_whole.table).expect("a compiled table");
        // What has no CFI is known of the whole alone, by its instructions.
        let mut recognised = 0;
        for (address, _) in part.rows().chain(table.rows()) {
            match (part.rule(address), table.rule(address)) {
                (Rule::NoCfi, rule) => recognised += u64::from(rule != Rule::NoCfi),
                (rule, whole) => assert_eq!(rule, whole, "{} at {address:?}", path.display()),
            }
        }
        assert_eq!(recognised == 0, of_whole.report.recognised_bytes.is_empty(), "{}", path.display());
    }
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
