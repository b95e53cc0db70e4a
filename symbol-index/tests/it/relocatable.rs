//! Files that are not linked, as kernel modules are not: code by the name of its section, compared with addr2line.

use std::path::Path;

use object::{Object, ObjectSection, ObjectSymbol, SymbolKind};
use windlass_schema::ImageAddress;
use windlass_schema::http::{Provenance, Unresolved};
use windlass_schema::kernel_module::{MODULE_TEXT, section_start};
use windlass_symbol_index::{Index, Input, build};

use crate::addr2line::{self, Line};
use crate::program::{Workshop, run};

/// Bytes of an entry of a list of relocations.
const RELA_BYTES: usize = 24;
const PLACED: [&str; 5] = [".text", ".text.unlikely", ".noinstr.text", ".init.text", ".exit.text"];

fn index(debug: Option<&Path>, image: Option<&Path>) -> Vec<u8> {
    let read = |path: &Path| std::fs::read(path).unwrap();
    let (debug, image) = (debug.map(read), image.map(read));
    build(Input { debug: debug.as_deref(), image: image.as_deref(), ..Input::default() }).unwrap()
}

/// Offsets of a section at which functions are, and their names.
fn offsets(elf: &[u8], section: &str) -> Vec<(u64, String)> {
    let file = object::File::parse(elf).unwrap();
    let number = file.section_by_name(section).unwrap().index();
    let functions = file.symbols().filter(|symbol| {
        symbol.kind() == SymbolKind::Text && symbol.section_index() == Some(number) && symbol.size() > 0
    });
    functions
        .flat_map(|symbol| {
            let name = symbol.name().unwrap().to_owned();
            (symbol.address()..symbol.address() + symbol.size()).map(move |offset| (offset, name.clone()))
        })
        .collect()
}

/// Compares what `bytes` say of each byte of each section with what addr2line says of `oracle`; returns the most
/// frames of one address.
#[track_caller]
fn check(bytes: &[u8], oracle: &Path) -> usize {
    let index = Index::parse(bytes).unwrap();
    let elf = std::fs::read(oracle).unwrap();
    let mut deepest = 0;
    for section in PLACED {
        let start = section_start(section).unwrap();
        let offsets: Vec<u64> = offsets(&elf, section).into_iter().map(|(offset, _)| offset).collect();
        assert!(offsets.len() >= 8, "{section} has {} bytes", offsets.len());
        for (offset, expect) in offsets.iter().zip(addr2line::frames_in(oracle, section, &offsets)) {
            let frames = index.lookup(ImageAddress::new(start + offset)).unwrap();
            assert!(frames.iter().all(|frame| frame.provenance == Provenance::Dwarf));
            let got = frames.iter().map(|frame| Line {
                function: frame.function.to_string(),
                file: frame.file.as_deref().unwrap().rsplit('/').next().unwrap().to_owned(),
                line: frame.line.unwrap_or(0),
            });
            assert_eq!(got.collect::<Vec<_>>(), expect, "{section}+{offset:#x}");
            deepest = deepest.max(expect.len());
        }
    }
    deepest
}

#[test]
fn every_address_of_every_section() {
    for arguments in [&["-gdwarf-5"][..], &["-gdwarf-4"], &["-g", "-gz=zlib"], &["-g", "-ffunction-sections"]]
    {
        let workshop = Workshop::new();
        let mut module = workshop.compile("module.c", &[&["-c"], arguments].concat());
        if arguments.contains(&"-ffunction-sections") {
            // As the kernel's own script for modules puts them together.
            let (script, linked) = (workshop.path("module.lds"), workshop.path("linked"));
            let sections = "SECTIONS { .text 0 : { *(.text .text.lookup .text.lookup_all) } }\n";
            std::fs::write(&script, sections).unwrap();
            run(std::process::Command::new("ld")
                .args(["-r", "-T"])
                .arg(script)
                .arg(&module)
                .arg("-o")
                .arg(&linked));
            module = linked;
        }
        assert!(check(&index(Some(&module), None), &module) > 1, "{arguments:?}");
    }
}

#[test]
fn a_split_debug_file_lies_as_its_module_does() {
    let workshop = Workshop::new();
    let module = workshop.compile("module.c", &["-c", "-g"]);
    let debug = workshop.objcopy(&module, &["--only-keep-debug"], "debug");
    let plain = workshop.objcopy(&module, &["--strip-debug"], "plain");
    let (module, debug, plain) = (module.as_path(), debug.as_path(), plain.as_path());
    for (debug, image) in [(Some(debug), None), (Some(debug), Some(plain)), (None, Some(module))] {
        check(&index(debug, image), module);
    }

    let bytes = index(None, Some(plain));
    let names = Index::parse(&bytes).unwrap();
    let elf = std::fs::read(module).unwrap();
    for section in PLACED {
        for (offset, expect) in offsets(&elf, section) {
            let frames = names.lookup(ImageAddress::new(section_start(section).unwrap() + offset)).unwrap();
            assert_eq!((&*frames[0].function, frames.len()), (expect.as_str(), 1), "{section}+{offset:#x}");
            assert_eq!(frames[0].provenance, Provenance::Symtab);
        }
    }
}

#[test]
fn what_has_no_place_has_no_name() {
    let workshop = Workshop::new();
    let module = workshop.compile("module.c", &["-c", "-g"]);
    let bytes = index(Some(&module), None);
    let index = Index::parse(&bytes).unwrap();
    let elf = std::fs::read(&module).unwrap();
    assert!(!offsets(&elf, ".text.of_its_own").is_empty());
    for (start, bytes) in [(0, MODULE_TEXT), (1 << 62, 64), ((1 << 62) + MODULE_TEXT, 64), (1 << 32, 64)] {
        for address in start..start + bytes {
            let found = index.lookup(ImageAddress::new(address));
            assert_eq!(found, Err(Unresolved::NoSymbolAtAddress), "{address:#x}");
        }
    }
    let size = object::File::parse(&*elf).unwrap().section_by_name(".text").unwrap().size();
    let behind = index.lookup(ImageAddress::new(MODULE_TEXT + size));
    assert_eq!(behind, Err(Unresolved::NoSymbolAtAddress));
}

#[test]
fn damaged_relocations() {
    let workshop = Workshop::new();
    let module = workshop.compile("module.c", &["-c", "-g"]);
    let whole = std::fs::read(&module).unwrap();
    let file = object::File::parse(&*whole).unwrap();
    let lists = file.sections().filter(|section| section.name().unwrap().starts_with(".rela.debug_"));
    let ranges: Vec<_> = lists.filter_map(|section| section.file_range()).collect();
    assert!(ranges.len() >= 3, "{}", ranges.len());
    for (start, bytes) in ranges {
        for entry in (start..start + bytes).step_by(RELA_BYTES) {
            for (at, with) in
                [(entry + 3, 0xff), (entry, 0x01), (entry + 8, 0xee), (entry + 12, 0xff), (entry + 20, 0x7f)]
            {
                let mut damaged = whole.clone();
                damaged[at as usize] = with;
                let bytes = build(Input { debug: Some(&damaged), ..Input::default() }).unwrap();
                let index = Index::parse(&bytes).unwrap();
                // Symbols have relocations of no kind.
                assert!(index.lookup(ImageAddress::new(MODULE_TEXT)).is_ok(), "{at:#x}");
            }
        }
    }
}

#[test]
fn of_two_sections_with_one_name_none_has_a_place() {
    let workshop = Workshop::new();
    let (source, twice) = (workshop.path("twice.s"), workshop.path("twice.o"));
    let function = |name: &str, section: &str| {
        format!(".section {section}\n.type {name},@function\n{name}: .skip 16\n.size {name}, 16\n")
    };
    let text = function("first", ".exit.text,\"ax\",@progbits,unique,1")
        + &function("second", ".exit.text,\"ax\",@progbits,unique,2")
        + &function("only", ".init.text,\"ax\",@progbits");
    std::fs::write(&source, text).unwrap();
    run(std::process::Command::new("cc").arg("-c").arg(&source).arg("-o").arg(&twice));
    let bytes = index(None, Some(&twice));
    let index = Index::parse(&bytes).unwrap();
    let at = |section| index.lookup(ImageAddress::new(section_start(section).unwrap() + 4));
    assert_eq!(at(".exit.text"), Err(Unresolved::NoSymbolAtAddress));
    assert_eq!(at(".init.text").unwrap()[0].function, "only");
}
