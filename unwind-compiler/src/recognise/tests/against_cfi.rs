//! What is recognised against what CFI says: all code of images that have CFI, as if they had none.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use windlass_schema::{BuildId, CfaRule, FramePointerRule, ImageAddress, Table};

use super::*;
use crate::compile::{compile, uncovered};
use crate::elf::Image;
use crate::framed_code::framed_code;

/// How many bytes of code have a frame by both, and the places where the frames are not the same.
#[derive(Debug, Default)]
struct Compared {
    same: u64,
    different: Vec<String>,
}

/// Whether two rules find one frame in one way. By two registers, or where one says that the frame pointer is unchanged
/// and the other where it is saved, they do not speak of the same: as much as they both say.
fn agree(one: Rule, other: Rule) -> Option<bool> {
    let (
        Rule::Frame { cfa, return_address, frame_pointer },
        Rule::Frame { cfa: other_cfa, return_address: other_address, frame_pointer: other_pointer },
    ) = (one, other)
    else {
        return None;
    };
    let is_same = match (cfa, other_cfa) {
        (CfaRule::Offset(one, offset), CfaRule::Offset(other, other_offset)) if one == other => {
            offset == other_offset
        }
        (CfaRule::Plt { .. }, CfaRule::Plt { .. }) => cfa == other_cfa,
        _ => return None,
    };
    let is_saved_elsewhere = match (frame_pointer, other_pointer) {
        (FramePointerRule::AtCfa(one), FramePointerRule::AtCfa(other)) => one != other,
        _ => false,
    };
    Some(is_same && return_address == other_address && !is_saved_elsewhere)
}

fn compared(elf: &[u8]) -> Compared {
    let image = Image::parse(elf).unwrap();
    let code = image.code_bytes();
    let mut gaps = Vec::new();
    code.gaps([], |gap| gaps.push(gap));
    let starts = image.starts(&gaps);
    let compiled = compile(elf, BuildId::new(b"WINDLASS").unwrap()).unwrap();
    let table = Table::parse(&compiled.table).unwrap();
    // Rows of the table that CFI does not say.
    let without = uncovered(&image).recognised;
    let mut compared = Compared::default();
    let known = known(image.architecture, &code, &gaps, &starts);
    for one in recognise(image.architecture, &code, &gaps, &starts, &known) {
        for address in one.range.clone() {
            let behind = without.partition_point(|without| without.range.end <= address);
            if without.get(behind).is_some_and(|without| without.range.contains(&address)) {
                continue;
            }
            let stated = table.rule(ImageAddress::new(address));
            match agree(one.rule, stated) {
                Some(true) => compared.same += 1,
                Some(false) => {
                    compared.different.push(format!("{address:#x}: {}, CFI {stated}", one.rule));
                }
                None => {}
            }
        }
    }
    compared
}

/// Says that `test` cannot run here and why, past the capture of the test harness. In CI nothing may be skipped.
#[track_caller]
fn skip(test: &str, reason: &str) {
    let is_ci = std::env::var("CI").is_ok_and(|ci| ci == "true" || ci == "1");
    assert!(!is_ci, "skipped in CI: {test}: {reason}");
    writeln!(std::io::stderr(), "skipped: {test}: {reason}").unwrap();
}

/// At least `bytes` of the image at `path` are recognised as its CFI says, and none otherwise.
#[track_caller]
fn check(path: &Path, bytes: u64) {
    let elf = std::fs::read(path).unwrap();
    let Compared { same, different } = compared(&elf);
    let first = &different[..different.len().min(20)];
    assert!(different.is_empty(), "{}: {} bytes, as {first:#?}", path.display(), different.len());
    assert!(same >= bytes, "{}: {same} bytes", path.display());
}

#[test]
fn fixtures() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/elf");
    for (name, bytes) in [("frames", 1), ("inlined", 1), ("small", 1)] {
        check(&folder.join(name), bytes);
    }
}

#[test]
fn libraries_of_this_machine() {
    for (name, bytes) in [("libc.so.6", 5000), ("libcrypto.so.3", 5000), ("libstdc++.so.6", 5000)] {
        let folders = ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64"];
        let paths = folders.map(|folder| Path::new(folder).join(name));
        let mut there = paths.iter().filter(|path| path.exists()).peekable();
        if there.peek().is_none() {
            skip("libraries_of_this_machine", name);
        }
        there.for_each(|path| check(path, bytes));
    }
}

/// LLVM's CFI is late by the instructions between `add rsp, 8` and a conditional jump: one byte in ten thousand.
#[test]
fn an_image_with_symbols() {
    let Compared { same, different } = compared(&std::fs::read(std::env::current_exe().unwrap()).unwrap());
    assert!(same > 5000 && different.len() as u64 * 1000 <= same, "{same} bytes, but not {different:#?}");
}

/// Symbols of parts that are jumped to with several frames, some behind a call that does not return.
#[cfg(target_arch = "x86_64")]
#[test]
fn parts_of_functions() {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parts");
    let image: PathBuf = std::env::temp_dir().join(format!("windlass-parts-{}", std::process::id()));
    let options =
        ["-O1", "-freorder-blocks-and-partition", "-foptimize-sibling-calls", "-fno-pic", "-no-pie"];
    let Ok(built) = Command::new("cc")
        .args(options)
        .args(["-fasynchronous-unwind-tables", "-nostdlib", "-o"])
        .arg(&image)
        .args(["parts.c", "called.c", "start.S"].map(|name| sources.join(name)))
        .output()
    else {
        return skip("parts_of_functions", "no cc");
    };
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    check(&image, 50);
    std::fs::remove_file(&image).unwrap();
}

/// As [`agree`], where code keeps frame pointers: then CFI, too, has the frame by that register as soon as it is set.
fn agree_on_frame_pointer(one: Rule, stated: Rule) -> Option<bool> {
    match (one, stated) {
        (Rule::Frame { cfa, .. }, Rule::Frame { cfa: stated_cfa, .. }) if cfa != stated_cfa => Some(false),
        (one, stated) => agree(one, stated),
    }
}

/// What `framed_code` says of all code of an image with CFI, as if it had none.
fn framed_compared(elf: &[u8], starts: impl Fn(Starts) -> Starts) -> Compared {
    let image = Image::parse(elf).unwrap();
    let code = image.code_bytes();
    let mut gaps = Vec::new();
    code.gaps([], |gap| gaps.push(gap));
    let starts = starts(image.starts(&gaps));
    let compiled = compile(elf, BuildId::new(b"WINDLASS").unwrap()).unwrap();
    let table = Table::parse(&compiled.table).unwrap();
    let mut compared = Compared::default();
    let framed = gaps.iter().filter_map(|gap| framed_code::<x86_64::code::Machine>(&code, gap, &starts));
    for one in framed.flatten() {
        for address in one.range.clone() {
            let stated = table.rule(ImageAddress::new(address));
            match agree_on_frame_pointer(one.rule, stated) {
                Some(true) => compared.same += 1,
                Some(false) => {
                    compared.different.push(format!("{address:#x}: {}, CFI {stated}", one.rule));
                }
                None => {}
            }
        }
    }
    compared
}

/// A program that keeps frame pointers, linked by LLD as rustc does for x86-64, which puts traps between functions: by its symbols and, as if it
/// were stripped, by those traps alone.
#[cfg(target_arch = "x86_64")]
#[test]
fn code_with_frame_pointers() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/framed/words.rs");
    let image: PathBuf = std::env::temp_dir().join(format!("windlass-framed-{}", std::process::id()));
    let options =
        ["-Copt-level=2", "-Cpanic=abort", "-Cforce-frame-pointers=yes", "-Cforce-unwind-tables=yes"];
    let built = Command::new("rustc")
        .args(options)
        .args(["--edition", "2024", "-o"])
        .args([&image, &source])
        .output()
        .expect("rustc, which has built this test");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let elf = std::fs::read(&image).unwrap();
    std::fs::remove_file(&image).unwrap();
    let stripped = |starts: Starts| Starts { symbols: BTreeMap::new(), ..starts };
    for (compared, bytes) in
        [(framed_compared(&elf, |starts| starts), 150_000), (framed_compared(&elf, stripped), 100_000)]
    {
        let Compared { same, different } = compared;
        let first = &different[..different.len().min(20)];
        assert!(different.is_empty(), "{} bytes, as {first:#?}", different.len());
        assert!(same >= bytes, "{same} bytes");
    }
}
