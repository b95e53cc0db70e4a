//! DWARF that no compiler writes, made with the assembler.

use std::fmt::Write;
use std::process::Command;

use windlass_schema::ImageAddress;
use windlass_schema::http::{Provenance, Unresolved};
use windlass_symbol_index::{Index, Input, build};

use crate::program::{Workshop, run};

/// A shared object with one function `code` at the symbol of that name, described by a unit whose DIEs are
/// `dies`: abbreviation 2 is a subprogram of the code with a name, 3 an inlined call over all of the
/// code with its origin, 4 a subprogram of the code with a specification and no name; 2 and 3 have children.
fn shared_object(dies: &str) -> Vec<u8> {
    let code =
        ".text\n.globl code\n.type code, @function\ncode: nop; nop; nop; nop\nend:\n.size code, end - code\n";
    let abbreviations = "\
        .byte 1, 0x11, 1, 0x11, 0x01, 0x12, 0x07, 0, 0\n\
        .byte 2, 0x2e, 1, 0x03, 0x08, 0x11, 0x01, 0x12, 0x07, 0, 0\n\
        .byte 3, 0x1d, 1, 0x31, 0x13, 0x11, 0x01, 0x12, 0x07, 0, 0\n\
        .byte 4, 0x2e, 0, 0x47, 0x13, 0x11, 0x01, 0x12, 0x07, 0, 0\n\
        .byte 0\n";
    let assembly = format!(
        "{code}.section .debug_abbrev,\"\",@progbits\n{abbreviations}\
        .section .debug_info,\"\",@progbits\nunit: .long unit_end - unit_start\n\
        unit_start: .short 4\n.long 0\n.byte 8\n.byte 1\n.quad code, end - code\n{dies}.byte 0\nunit_end:\n"
    );
    let workshop = Workshop::new();
    let (source, object) = (workshop.path("crafted.s"), workshop.path("crafted.so"));
    std::fs::write(&source, assembly).unwrap();
    run(Command::new("cc").args(["-shared", "-nostdlib", "-o"]).arg(&object).arg(&source));
    std::fs::read(object).unwrap()
}

/// Provenance and number of the frames at the function.
#[track_caller]
fn look_up(elf: &[u8]) -> (Provenance, usize) {
    let bytes = build(Input { debug: Some(elf), ..Input::default() }).unwrap();
    let index = Index::parse(&bytes).unwrap();
    let address = crate::program::function_addresses(elf, 0)[0];
    let frames = index.lookup(ImageAddress::new(address)).unwrap();
    let nowhere = index.lookup(ImageAddress::new(1)).unwrap_err();
    let read = frames[0].provenance == Provenance::Dwarf;
    assert_eq!(nowhere, if read { Unresolved::NoSymbolAtAddress } else { Unresolved::BrokenDebuginfo });
    (frames[0].provenance, frames.len())
}

fn subprogram(children: &str) -> String {
    format!("function: .byte 2\n.asciz \"described\"\n.quad code, end - code\n{children}.byte 0\n")
}

fn nested_calls(depth: usize) -> String {
    let mut calls = String::new();
    for _ in 0..depth {
        writeln!(calls, ".byte 3\n.long function - unit\n.quad code, end - code").unwrap();
    }
    calls + &".byte 0\n".repeat(depth)
}

#[test]
fn ordinary() {
    assert_eq!(look_up(&shared_object(&subprogram(""))), (Provenance::Dwarf, 1));
}

#[test]
fn specifications_in_a_circle() {
    let links = [("a", "b"), ("b", "c"), ("c", "a")];
    let circle: String = links
        .map(|(from, to)| format!("{from}: .byte 4\n.long {to} - unit\n.quad code, end - code\n"))
        .concat();
    assert_eq!(look_up(&shared_object(&circle)), (Provenance::Symtab, 1));
}

#[test]
fn calls_inlined_without_end() {
    assert_eq!(look_up(&shared_object(&subprogram(&nested_calls(390)))).0, Provenance::Dwarf);
    assert_eq!(look_up(&shared_object(&subprogram(&nested_calls(100_000)))), (Provenance::Symtab, 1));
}
