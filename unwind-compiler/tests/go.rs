//! Go executables, stripped and not: every row against `.debug_frame`, which the linker writes from the same
//! depths by another path. `WINDLASS_GO_BINARIES` lists executables, separated by colons, to compare instead of
//! a program that is built here with `go`; without `go` there is nothing to compare, and the test says so.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::path::{Path, PathBuf};
use std::process::Command;

use windlass_schema::{BuildId, FramePointerRule, ImageAddress, Rule, Table};
use windlass_unwind_compiler::{Compiled, SkipReason, compile, verify};

fn compiled(elf: &[u8]) -> Compiled {
    compile(elf, BuildId::new(b"WINDLASS").unwrap()).unwrap()
}

/// Builds the program with these flags of the linker. `None` without `go`.
fn build(folder: &Path, name: &str, linker_flags: &str) -> Option<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/sources/go_stacks.go");
    let program = folder.join(name);
    let mut go = Command::new("go");
    go.args(["build", "-ldflags", linker_flags, "-o"]).arg(&program).arg(source);
    go.env("CGO_ENABLED", "1").env("GOFLAGS", "-mod=mod").env("GOCACHE", folder.join("cache"));
    match go.output() {
        Ok(output) => {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Some(program)
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => panic!("go: {error}"),
    }
}

#[track_caller]
fn check(path: &Path) -> Compiled {
    let elf = std::fs::read(path).unwrap();
    let compiled = compiled(&elf);
    let table = Table::parse(&compiled.table).unwrap();
    let verification = verify(&elf, &table).unwrap();
    assert_eq!(verification.wrong, 0, "{}: {:#?}", path.display(), verification.disagreements);
    let report = &compiled.report;
    assert!(report.go_functions > 0 && report.rows > 1000, "{}: {report:#?}", path.display());
    let exact = report.exact_code_bytes as f64 / report.code_bytes as f64;
    // What signals interrupt, and the switches of stacks, are marked: half a percent of a small program.
    assert!(exact > 0.995, "{}: {exact}", path.display());
    compiled
}

/// Of a version or for an instruction set that is not known: what `.debug_frame` says counts, which is nothing of the
/// frame pointer.
#[track_caller]
fn unread_tables_are_reported(path: &Path) {
    let elf = std::fs::read(path).unwrap();
    let is_header = |at: &usize| matches!(elf[*at..], [0xf0 | 0xf1, 0xff, 0xff, 0xff, 0, 0, 1, 8, ..]);
    let header = (0..elf.len() - 8).find(is_header).unwrap();
    // A magic to come, and aarch64 as e_machine.
    for (at, byte) in [(header, 0x02), (18, 183)] {
        let mut other = elf.clone();
        other[at] = byte;
        let Compiled { table, report } = compiled(&other);
        let table = Table::parse(&table).unwrap();
        assert_eq!(verify(&other, &table).unwrap().wrong, 0);
        assert_eq!((report.go_functions, report.skipped_fdes.get(&SkipReason::GoTable)), (0, Some(&1)));
        let is_known = |rule| matches!(rule, Rule::Frame { frame_pointer, .. } if frame_pointer != FramePointerRule::Undefined);
        // C code has CFI that says.
        let [known, all] = table.rows().fold([0, 0], |[known, all], (address, _)| {
            [known + u64::from(is_known(table.rule(address))), all + 1]
        });
        assert!(known * 10 < all, "{known} of {all} rows know the frame pointer");
    }
}

#[test]
fn go_code_is_covered_and_right() {
    if let Some(paths) = std::env::var_os("WINDLASS_GO_BINARIES") {
        for path in std::env::split_paths(&paths) {
            check(&path);
        }
        return;
    }
    let folder = std::env::temp_dir().join(format!("windlass-go-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let whole = build(&folder, "whole", "");
    let stripped = build(&folder, "stripped", "-s -w");
    let (Some(whole), Some(stripped)) = (whole, stripped) else {
        eprintln!("skipped: there is no go to build a program with");
        return;
    };
    unread_tables_are_reported(&whole);
    let (whole, stripped) = (check(&whole), check(&stripped));
    let (whole, stripped) = (Table::parse(&whole.table).unwrap(), Table::parse(&stripped.table).unwrap());
    // Stripping takes away nothing of what rows are made of.
    let mut rows = 0;
    for (address, _) in whole.rows() {
        let address = ImageAddress::new(address.get());
        if whole.rule(address) != Rule::NoCfi {
            assert_eq!(stripped.rule(address), whole.rule(address), "{address}");
            rows += 1;
        }
    }
    assert!(rows > 1000, "{rows} rows");
    std::fs::remove_dir_all(&folder).unwrap();
}
