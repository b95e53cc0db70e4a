//! Small tables made by hand, of aarch64.

use super::super::tests::{TEXT, V120, table};
use super::super::{GoCode, GoImage, for_each_row};
use super::*;

use windlass_schema::Architecture;

const SP_WRITE: u8 = 2;
const ASM: u8 = 4;

/// add x0, x0, 1, and ret, and bl .
const ADD: u32 = 0x9100_0400;
const RET: u32 = 0xd65f_03c0;
const BL: u32 = 0x9400_0000;
/// ldp x29, x30, [sp, -8], and sub x29, sp, 8
const RESTORE: u32 = 0xa97f_fbfd;
const SET_X29: u32 = 0xd100_23fd;

/// The rows of a function with this name, these flags and depths over instructions, and this code if there is any.
#[track_caller]
fn check(name: &str, flags: u8, depths: &[(u8, i32)], code: Option<&[u32]>, expect: &[&str]) {
    let (mut varints, mut last) = (Vec::new(), -1);
    for (instructions, depth) in depths {
        let change = depth - last;
        let zigzag = ((change << 1) ^ (change >> 31)) as u32;
        varints.extend([zigzag as u8 & 0x7f | 0x80, (zigzag >> 7) as u8 | 0x80, (zigzag >> 14) as u8]);
        varints.push(*instructions);
        last = *depth;
    }
    varints.push(0);
    let bytes = depths.iter().map(|(instructions, _)| u32::from(*instructions)).sum::<u32>() * 4;
    let mut table = table(V120, &[(name, flags, bytes, &varints)]);
    table[6] = 4;
    let code: Option<Vec<u8>> = code.map(|code| code.iter().flat_map(|word| word.to_le_bytes()).collect());
    let code: Vec<_> = code.iter().map(|bytes| GoCode { address: TEXT, bytes }).collect();
    let image = GoImage { architecture: Architecture::Aarch64, table: &table, text: None, code: &code };
    let mut rows = Vec::new();
    for_each_row(&image, |range, rule| {
        let GoRule::Rule(rule) = rule else { panic!("{rule:?}") };
        rows.push(format!("{:x}..{:x} {rule}", range.start - TEXT, range.end - TEXT));
    })
    .expect("a table of aarch64");
    assert_eq!(rows, expect);
    // Of another instruction set it is none.
    let other = GoImage { architecture: Architecture::X86_64, ..image };
    assert!(for_each_row(&other, |_, _| {}).is_err());
}

const LEAF: &str = "cfa=sp+0 ra=x30 x29=same";

#[test]
fn a_small_frame() {
    // str x30, [sp, -48]!
    let code = [ADD, 0xf81d_0ffe, STORE_X29, SET_X29, ADD, RESTORE, 0x9100_c3ff, RET];
    let depths = [(2, 0), (5, 48), (1, 0)];
    let expect = [
        &format!("0..8 {LEAF}"),
        "8..c cfa=sp+48 ra=*(cfa-48) x29=same",
        "c..1c cfa=sp+48 ra=*(cfa-48) x29=*(cfa-56)",
        &format!("1c..20 {LEAF}"),
    ];
    check("main.f", 0, &depths, Some(&code), &expect);
    check("main.f", ASM, &depths, Some(&code), &expect);
    // A skeleton has no code.
    check("main.f", 0, &depths, None, &expect);
    let unknown = "0..20 unsupported stack_switch";
    check("main.f", ASM, &depths, None, &[unknown]);
    check("main.f", SP_WRITE, &depths, Some(&code), &[unknown]);
}

#[test]
fn a_large_frame() {
    // sub x20, sp, 0x1000 and 0x10
    let code = [ADD, 0xd140_07f4, 0xd100_4294, STORE_PAIR, SET_SP, SET_X29, RESTORE, ADD, RET];
    let depths = [(5, 0), (3, 4112), (1, 0)];
    let expect = [
        &format!("0..14 {LEAF}"),
        "14..20 cfa=sp+4112 ra=*(cfa-4112) x29=*(cfa-4120)",
        &format!("20..24 {LEAF}"),
    ];
    check("main.f", 0, &depths, Some(&code), &expect);
    check("main.f", 0, &depths, None, &expect);
}

#[test]
fn assembly_that_does_as_it_likes() {
    let leaf = [ADD, ADD, RET];
    check("a", ASM, &[(3, 0)], Some(&leaf), &[&format!("0..c {LEAF}")]);
    // A call, another x29, another x30, and what is no instruction.
    for other in [BL, 0x9100_101d, 0xf940_03fe, 0x2000_0000] {
        let code = [ADD, other, RET];
        check("a", ASM, &[(3, 0)], Some(&code), &["0..c unsupported stack_switch"]);
    }
    // sub sp, sp, 48 without a store; x29 not stored; another depth
    let code = [0xd100_c3ff, ADD, 0x9100_c3ff, RET];
    let depths = [(1, 0), (2, 48), (1, 0)];
    let (first, last) = (format!("0..4 {LEAF}"), format!("c..10 {LEAF}"));
    check("a", ASM, &depths, Some(&code), &[&first, "4..c unsupported return_address", &last]);
    let code = [0xf81d_0ffe, ADD, 0xf843_07fe, RET];
    let lost = "4..c cfa=sp+48 ra=*(cfa-48) x29=undefined";
    check("a", ASM, &depths, Some(&code), &[&first, lost, &last]);
    let depths = [(1, 0), (1, 48), (1, 64), (1, 0)];
    let moved = "8..c unsupported return_address";
    check("a", ASM, &depths, Some(&code), &[&first, &lost.replace("..c", "..8"), moved, &last]);
}

#[test]
fn stacks_begin_and_are_interrupted() {
    let code = [ADD, RET];
    for (name, flags, expect) in [
        ("runtime.goexit", ASM | 1, "end"),
        ("_rt0_arm64_linux", ASM, "end"),
        ("runtime.sigtramp", 1, LEAF),
        ("runtime.sigpanic", 0, "unsupported signal_frame"),
        ("runtime.asyncPreempt", ASM, "unsupported signal_frame"),
    ] {
        check(name, flags, &[(2, 0)], Some(&code), &[&format!("0..8 {expect}")]);
    }
}
