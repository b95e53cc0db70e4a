//! Functions that lost their names: their extents against those that readelf prints, and what is at them.

use std::path::Path;
use std::process::Command;

use windlass_schema::ImageAddress;
use windlass_schema::http::Unresolved;
use windlass_symbol_index::{Index, Input, build};

use crate::program::{Workshop, run};

/// Start and end of each FDE, as readelf prints them.
fn extents(elf: &Path) -> Vec<(u64, u64)> {
    let text = run(Command::new("readelf").args(["-W", "--debug-dump=frames"]).arg(elf));
    let text = String::from_utf8(text).unwrap();
    let range = |line: &str| {
        let (start, end) = line.split_once(" FDE ")?.1.split_once("pc=")?.1.trim().split_once("..")?;
        Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
    };
    text.lines().filter_map(range).collect()
}

/// Start and end of each function with a name and a size in one of the symbol tables.
fn named(elf: &Path) -> Vec<(u64, u64)> {
    let text = run(Command::new("readelf").args(["-W", "--syms", "--dyn-syms"]).arg(elf));
    let text = String::from_utf8(text).unwrap();
    let range = |line: &str| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [_, value, size, "FUNC", _, _, section, _, ..] = fields[..] else { return None };
        section.parse::<u32>().ok()?;
        let start = u64::from_str_radix(value, 16).ok()?;
        Some((start, start + size.parse::<u64>().ok()?))
    };
    text.lines().filter_map(range).collect()
}

/// Checks the functions of `image`, some of which `names` says to be named, and returns how many are not.
#[track_caller]
fn check(input: Input<'_>, image: &Path, names: &[(u64, u64)]) -> usize {
    let bytes = build(input).unwrap();
    let index = Index::parse(&bytes).unwrap();
    let mut unnamed = 0;
    let extents = extents(image);
    assert!(extents.len() >= 4, "{} FDEs", extents.len());
    for (start, end) in extents {
        let is_named = names.iter().any(|name| name.0 <= start && end <= name.1);
        unnamed += usize::from(!is_named);
        for address in [start, start + (end - start) / 2, end - 1].map(ImageAddress::new) {
            let expect = Some(ImageAddress::new(start)).filter(|_| !is_named);
            assert_eq!(index.function_at(address), expect, "{address} in {start:#x} to {end:#x}");
            assert_eq!(index.lookup(address).is_ok(), is_named, "{address}");
        }
    }
    for address in [0, 1, u64::MAX] {
        assert_eq!(index.function_at(ImageAddress::new(address)), None);
    }
    unnamed
}

#[track_caller]
fn check_stripped(source: &str, arguments: &[&str], unnamed: std::ops::RangeInclusive<usize>) {
    let workshop = Workshop::new();
    let program = workshop.compile(source, arguments);
    let stripped = workshop.objcopy(&program, &["--strip-all"], "stripped");
    let image = std::fs::read(&stripped).unwrap();
    let input = Input { image: Some(&image), ..Input::default() };
    let found = check(input, &stripped, &named(&stripped));
    assert!(unnamed.contains(&found), "{found} functions without names");
}

#[test]
fn some_names_left() {
    check_stripped("shapes.c", &["-rdynamic"], 2..=10);
    check_stripped("shapes.cpp", &["-rdynamic"], 4..=200);
    check_stripped("shapes.c", &["-shared", "-fPIC"], 2..=10);
}

#[test]
fn no_names_left() {
    let alone = ["-nostdlib", "-static", "-Wl,--unresolved-symbols=ignore-all,-e,main"];
    check_stripped("shapes.c", &alone, 4..=10);
    // Addresses that do not fit 32 bits, and blocks of functions.
    let above = "-Wl,-Ttext-segment=0xffffffff81000000";
    let upper = [&alone[..], &["-no-pie", "-fno-pic", "-mcmodel=kernel", above]].concat();
    check_stripped("shapes.c", &upper, 4..=10);
    check_stripped("shapes.rs", &["-Cstrip=symbols"], 200..=5000);
}

#[test]
fn names_from_another_file() {
    let workshop = Workshop::new();
    let program = workshop.compile("shapes.c", &["-g"]);
    let stripped = workshop.objcopy(&program, &["--strip-all"], "stripped");
    let debug = workshop.objcopy(&program, &["--only-keep-debug"], "debug");
    let [whole, image, debug] = [&program, &stripped, &debug].map(|path| std::fs::read(path).unwrap());
    let both = Input { debug: Some(&debug), image: Some(&image), ..Input::default() };
    let alone = Input { debug: Some(&whole), ..Input::default() };
    // The stubs of calls into libraries have no symbol in either.
    assert!(check(both, &stripped, &named(&program)) <= 3);
    assert!(check(alone, &stripped, &named(&program)) <= 3);
}

/// What cannot be read of one file does not take the functions of the other.
#[test]
fn beside_an_unreadable_file() {
    let workshop = Workshop::new();
    let program = workshop
        .compile("shapes.c", &["-nostdlib", "-static", "-Wl,--unresolved-symbols=ignore-all,-e,main"]);
    let stripped = workshop.objcopy(&program, &["--strip-all"], "stripped");
    let image = std::fs::read(&stripped).unwrap();
    let input = Input { debug: Some(b"no elf"), image: Some(&image), ..Input::default() };
    assert!(check(input, &stripped, &[]) >= 4);
    let without = workshop.objcopy(&program, &["--strip-all", "-R", ".eh_frame"], "without");
    let without = std::fs::read(without).unwrap();
    assert!(build(Input { debug: Some(b"no elf"), image: Some(&without), ..Input::default() }).is_err());
}

/// A label of unknown size, in front of a function whose name was stripped, does not lend it its name.
#[test]
fn labels_do_not_reach_into_functions() {
    let workshop = Workshop::new();
    let (source, object) = (workshop.path("label.s"), workshop.path("label.so"));
    let assembly = ".globl label\nlabel: nop\n.cfi_startproc\nnop\nnop\n.cfi_endproc\nnop\n";
    std::fs::write(&source, assembly).unwrap();
    run(Command::new("cc").args(["-shared", "-nostdlib", "-o"]).arg(&object).arg(&source));
    let [(start, end)] = extents(&object)[..] else { panic!("one FDE") };
    let elf = std::fs::read(object).unwrap();
    let bytes = build(Input { image: Some(&elf), ..Input::default() }).unwrap();
    let index = Index::parse(&bytes).unwrap();
    let look = |address| {
        let address = ImageAddress::new(address);
        let name = index.lookup(address).map(|frames| frames[0].function.to_string());
        (name, index.function_at(address).map(ImageAddress::get))
    };
    assert_eq!(look(start - 1), (Ok("label".to_owned()), None));
    for inside in start..end {
        assert_eq!(look(inside), (Err(Unresolved::NoSymbolAtAddress), Some(start)));
    }
    assert_eq!(look(end), (Err(Unresolved::NoSymbolAtAddress), None));
}
