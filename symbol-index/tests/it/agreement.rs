//! Every function of compiled programs, at its first address and inside, compared with addr2line.

use std::path::{Path, PathBuf};

use windlass_schema::ImageAddress;
use windlass_schema::http::{Provenance, Unresolved};
use windlass_symbol_index::{Frame, Index, Input, build};

use crate::addr2line::{self, Line};
use crate::program::{Workshop, function_addresses, run};

/// Addresses inside each function besides its first.
const INNER_ADDRESSES: u64 = 12;

/// How names have to agree.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Names {
    Whole,
    /// Without scope, arguments and types. addr2line takes C++ names from DWARF or `.symtab` as it finds
    /// them, and demangles into other spellings than `symbolic`, which does not know every mangling.
    Base,
}

/// Looks up what `files` (debug, image) hold and compares it with what addr2line finds in `oracle`; returns
/// the most frames of one address.
#[track_caller]
fn check(debug: Option<&Path>, image: Option<&Path>, oracle: &Path, names: Names) -> usize {
    let read = |path: &Path| std::fs::read(path).unwrap();
    let (debug, image) = (debug.map(read), image.map(read));
    let input = Input { debug: debug.as_deref(), image: image.as_deref(), ..Input::default() };
    let bytes = build(input).unwrap();
    let index = Index::parse(&bytes).unwrap();

    let addresses = function_addresses(&read(oracle), INNER_ADDRESSES);
    assert!(addresses.len() > 20, "{} addresses", addresses.len());
    let mut deepest = 0;
    for (&address, expect) in addresses.iter().zip(addr2line::frames(oracle, &addresses)) {
        let frames = index.lookup(ImageAddress::new(address)).unwrap_or_default();
        let got: Vec<Line> = frames.iter().map(line).collect();
        let agree = got.len() == expect.len()
            && got.iter().zip(&expect).all(|(got, expect)| same_place(got, expect))
            && same_names(&got, &expect, names);
        assert!(agree, "{address:#x}\n  got    {got:?}\n  expect {expect:?}");
        deepest = deepest.max(got.len());
    }
    deepest
}

fn line(frame: &Frame<'_>) -> Line {
    let file = frame.file.as_deref().and_then(|path| path.rsplit('/').next());
    Line {
        function: frame.function.to_string(),
        file: file.unwrap_or_default().to_owned(),
        line: frame.line.unwrap_or(0),
    }
}

/// Where no line is known, addr2line names the compilation unit as the file.
fn same_place(got: &Line, expect: &Line) -> bool {
    got.line == expect.line && (got.file == expect.file || expect.line == 0)
}

fn same_names(got: &[Line], expect: &[Line], names: Names) -> bool {
    let chain = expect.len();
    let outermost = expect.last().map(|line| base(&line.function));
    got.iter().zip(expect).enumerate().all(|(depth, (got, expect))| match names {
        Names::Whole => without_clone_suffix(&got.function) == without_clone_suffix(&expect.function),
        Names::Base => {
            let expect = base(&expect.function);
            // addr2line may give an inlined function without a linkage name that of the function around it.
            let is_around = depth + 1 < chain && Some(&expect) == outermost.as_ref();
            got.function.starts_with("_Z") || base(&got.function) == expect || is_around
        }
    })
}

/// `name` without what tells a compiler's clone from the original.
fn without_clone_suffix(name: &str) -> &str {
    let name = name.split(" [clone").next().unwrap();
    let suffixes = [".part", ".cold", ".isra", ".constprop", ".llvm"];
    suffixes.iter().filter_map(|suffix| name.find(suffix)).min().map_or(name, |at| &name[..at])
}

/// The last part of a path, without arguments and types.
fn base(name: &str) -> String {
    let mut depth = 0_usize;
    let mut outside = String::new();
    for character in without_clone_suffix(name).chars() {
        match character {
            '<' | '(' | '{' => depth += 1,
            '>' | ')' | '}' => depth = depth.saturating_sub(1),
            _ if depth == 0 => outside.push(character),
            _ => {}
        }
    }
    outside.rsplit("::").next().unwrap().trim_end_matches(" const").to_owned()
}

#[track_caller]
fn check_whole(arguments: &[&str]) {
    let workshop = Workshop::new();
    let program = workshop.compile("shapes.c", arguments);
    let deepest = check(Some(&program), None, &program, Names::Whole);
    assert!(deepest >= 3, "no inlined frames");
}

#[test]
fn position_independent_executable() {
    check_whole(&["-g", "-pie", "-fPIE"]);
}

#[test]
fn executable_at_fixed_address() {
    check_whole(&["-g", "-no-pie"]);
}

#[test]
fn shared_object() {
    check_whole(&["-g", "-shared", "-fPIC"]);
}

#[test]
fn executable_in_the_upper_half() {
    let base = "-Wl,-Ttext-segment=0xffffffff81000000,--unresolved-symbols=ignore-all,-e,main";
    check_whole(&["-g", "-nostdlib", "-static", "-no-pie", "-fno-pic", "-mcmodel=kernel", base]);
}

#[test]
fn dwarf_versions() {
    for version in ["-gdwarf-2", "-gdwarf-3", "-gdwarf-4", "-gdwarf-5"] {
        check_whole(&["-gno-strict-dwarf", version]);
    }
}

#[test]
fn compressed_sections() {
    let workshop = Workshop::new();
    let program = workshop.compile("shapes.c", &["-g"]);
    for compression in ["zlib", "zlib-gnu", "zstd"] {
        let option = format!("--compress-debug-sections={compression}");
        let compressed = workshop.objcopy(&program, &[&option], compression);
        assert_ne!(std::fs::read(&compressed).unwrap(), std::fs::read(&program).unwrap());
        assert!(check(Some(&compressed), None, &program, Names::Whole) >= 3);
    }
}

#[test]
fn split_debug_file() {
    let workshop = Workshop::new();
    let program = workshop.compile("shapes.c", &["-g"]);
    let debug = workshop.objcopy(&program, &["--only-keep-debug"], "debug");
    let stripped = workshop.objcopy(&program, &["--strip-all"], "stripped");
    assert!(check(Some(&debug), None, &program, Names::Whole) >= 3);
    assert!(check(Some(&debug), Some(&stripped), &program, Names::Whole) >= 3);
    assert!(check(None, Some(&program), &program, Names::Whole) >= 3, "DWARF in the image");
    assert!(check(Some(&stripped), Some(&program), &program, Names::Whole) >= 3, "debug without DWARF");
}

#[test]
fn templates_and_lambdas() {
    let workshop = Workshop::new();
    let program = workshop.compile("shapes.cpp", &["-g"]);
    assert!(check(Some(&program), None, &program, Names::Base) >= 6);
}

#[test]
fn rust_with_full_debuginfo() {
    let workshop = Workshop::new();
    let program = workshop.compile("shapes.rs", &["-g"]);
    assert!(check(Some(&program), None, &program, Names::Whole) >= 6);
}

#[test]
fn rust_with_line_tables_only() {
    let workshop = Workshop::new();
    let program = workshop.compile("shapes.rs", &["-Cdebuginfo=line-tables-only"]);
    assert!(check(Some(&program), None, &program, Names::Base) >= 6);
}

/// C and Rust in one executable. What addr2line says of it goes for whole names.
#[test]
fn bundled_workload() {
    let workshop = Workshop::new();
    let program = windlass_workload::write_executable(&workshop.path(".")).unwrap();
    assert!(check(Some(&program), None, &program, Names::Whole) >= 6);
}

/// The function at the start of the symbol `name` of `symbols`, in the index of `image`.
fn function_at(image: &Path, symbols: &Path, name: &str) -> Result<(String, Provenance), Unresolved> {
    let nm = run(std::process::Command::new("nm").arg(symbols));
    let nm = String::from_utf8(nm).unwrap();
    let line = nm.lines().find(|line| line.split(' ').next_back() == Some(name)).unwrap();
    let address = u64::from_str_radix(line.split(' ').next().unwrap(), 16).unwrap();
    let image = std::fs::read(image).unwrap();
    let bytes = build(Input { image: Some(&image), ..Input::default() }).unwrap();
    let index = Index::parse(&bytes).unwrap();
    let frames = index.lookup(ImageAddress::new(address))?;
    assert_eq!(frames.len(), 1);
    assert_eq!((&frames[0].file, frames[0].line), (&None, None));
    Ok((frames[0].function.to_string(), frames[0].provenance))
}

fn stripped(workshop: &Workshop, option: &str) -> (PathBuf, PathBuf) {
    let program = workshop.compile("shapes.c", &["-g", "-rdynamic", "-DALIASES"]);
    let stripped = workshop.objcopy(&program, &[option], "stripped");
    (program, stripped)
}

#[test]
fn symtab_only() {
    let workshop = Workshop::new();
    let program = workshop.compile("shapes.c", &["-g"]);
    let without_dwarf = workshop.objcopy(&program, &["--strip-debug"], "stripped");
    assert_eq!(check(Some(&without_dwarf), None, &without_dwarf, Names::Whole), 1);

    let (program, stripped) = stripped(&workshop, "--strip-debug");
    let at = |name| function_at(&stripped, &program, name).unwrap();
    assert_eq!(at("compare"), ("compare".to_owned(), Provenance::Symtab));
    assert_eq!(at("weak_digest"), ("digest".to_owned(), Provenance::Symtab), "of aliases, global and short");
}

#[test]
fn dynsym_only() {
    let workshop = Workshop::new();
    let (program, stripped) = stripped(&workshop, "--strip-all");
    let at = |name| function_at(&stripped, &program, name);
    assert_eq!(at("main"), Ok(("main".to_owned(), Provenance::Dynsym)));
    assert_eq!(at("weak_digest"), Ok(("digest".to_owned(), Provenance::Dynsym)));
    assert_eq!(at("compare"), Err(Unresolved::NoSymbolAtAddress), "static functions have no dynamic symbol");
}

#[test]
fn nothing_left() {
    let workshop = Workshop::new();
    let program = workshop
        .compile("shapes.c", &["-g", "-nostdlib", "-static", "-Wl,--unresolved-symbols=ignore-all,-e,main"]);
    let stripped = workshop.objcopy(&program, &["--strip-all"], "stripped");
    assert_eq!(function_at(&stripped, &program, "main"), Err(Unresolved::NoSymbols));
}

#[test]
fn names_come_demangled_with_their_linkage_names() {
    let workshop = Workshop::new();
    let program = workshop.compile("shapes.cpp", &["-g"]);
    let elf = std::fs::read(&program).unwrap();
    for strip in [false, true] {
        let stripped = strip.then(|| std::fs::read(workshop.objcopy(&program, &["-g"], "stripped")).unwrap());
        let bytes =
            build(Input { debug: Some(stripped.as_ref().unwrap_or(&elf)), ..Input::default() }).unwrap();
        let index = Index::parse(&bytes).unwrap();
        let hidden = function_addresses(&elf, 0).into_iter().find_map(|address| {
            let frame = index.lookup(ImageAddress::new(address)).ok()?.pop()?;
            frame
                .function
                .contains("hidden")
                .then(|| (frame.function.to_string(), frame.linkage_name.map(String::from)))
        });
        let (function, linkage_name) = hidden.unwrap();
        assert_eq!(function, "shapes::(anonymous namespace)::hidden(int, char const*)");
        assert_eq!(linkage_name.as_deref(), Some("_ZN6shapes12_GLOBAL__N_16hiddenEiPKc"));
    }
}
