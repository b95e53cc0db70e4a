//! Small tables made by hand, cut off at each byte, and damaged.

use proptest::prelude::*;
use windlass_schema::{Rule, UnsupportedReason};

use super::*;

/// The magic of each version, and whether it has starts relative to `runtime.text`.
pub(super) const V116: u32 = 0xffff_fffa;
pub(super) const V118: u32 = 0xffff_fff0;
pub(super) const V120: u32 = 0xffff_fff1;

/// Where code begins in these tests.
pub(super) const TEXT: u64 = 0x40_1000;

const TOP_FRAME: u8 = 1;
const SP_WRITE: u8 = 2;
const ASM: u8 = 4;

/// Name, flags, bytes of code, depths.
type Described<'a> = (&'a str, u8, u32, &'a [u8]);

/// A table of these functions, one behind the other.
pub(super) fn table(magic: u32, functions: &[Described<'_>]) -> Vec<u8> {
    let is_old = magic == V116;
    let entry = |list: &mut Vec<u8>, value: u64| match is_old {
        true => list.extend(value.to_le_bytes()),
        false => list.extend((value as u32).to_le_bytes()),
    };
    let (mut names, mut depths) = (vec![0], vec![0]);
    let (mut list, mut descriptions) = (Vec::new(), Vec::new());
    let list_bytes = (2 * functions.len() + 1) * if is_old { 8 } else { 4 };
    let mut start = if is_old { TEXT } else { 0 };
    for (name, flag, bytes, function_depths) in functions {
        entry(&mut list, start);
        entry(&mut list, (list_bytes + descriptions.len()) as u64);
        entry(&mut descriptions, start);
        descriptions.extend((names.len() as u32).to_le_bytes());
        descriptions.extend([0; 8]);
        descriptions.extend((depths.len() as u32).to_le_bytes());
        descriptions.extend([0; 16]);
        if magic == V120 {
            descriptions.extend([0; 4]);
        }
        descriptions.extend([0, *flag, 0, 0]);
        names.extend(name.as_bytes());
        names.push(0);
        depths.extend(*function_depths);
        start += u64::from(*bytes);
    }
    entry(&mut list, start);
    let mut table = magic.to_le_bytes().to_vec();
    table.extend([0, 0, 1, 8]);
    table.extend((functions.len() as u64).to_le_bytes());
    table.extend([0; 8]);
    if !is_old {
        table.extend(TEXT.to_le_bytes());
    }
    let mut offset = table.len() + 40;
    // Compilation units and files, of which nothing is read, take a word each.
    for bytes in [names.len(), 8, 8, depths.len(), 0] {
        table.extend((offset as u64).to_le_bytes());
        offset += bytes;
    }
    for part in [names, vec![0; 16], depths, list, descriptions] {
        table.extend(part);
    }
    table
}

/// An image of x86-64.
fn image<'a>(table: &'a [u8], text: Option<u64>, code: &'a [GoCode<'a>]) -> GoImage<'a> {
    GoImage { architecture: Architecture::X86_64, table, text, code }
}

fn rows(table: &[u8], code: Option<&[u8]>) -> (Vec<String>, GoFunctions) {
    let code: Vec<_> = code.map(|bytes| GoCode { address: TEXT, bytes }).into_iter().collect();
    let mut rows = Vec::new();
    let image = image(table, None, &code);
    let report = for_each_row(&image, |range, rule| {
        let rule = match rule {
            GoRule::Rule(rule) => rule.to_string(),
            other => format!("{other:?}"),
        };
        rows.push(format!("{:x}..{:x} {rule}", range.start.wrapping_sub(TEXT), range.end - TEXT));
    });
    (rows, report.expect("the table is sound"))
}

#[track_caller]
fn check(table: &[u8], code: Option<&[u8]>, expect: &[&str]) {
    assert_eq!(rows(table, code).0, expect);
}

/// `push rbp; mov rbp, rsp; sub rsp, 16; nop; add rsp, 16; pop rbp; ret`
const PUSHES: [u8; 15] =
    [0x55, 0x48, 0x89, 0xe5, 0x48, 0x83, 0xec, 0x10, 0x90, 0x48, 0x83, 0xc4, 0x10, 0x5d, 0xc3];
/// Its depths: 0 for 1 byte, 8 for 7, 24 for 5, 8 for 1, 0 for 1.
const PUSHES_DEPTHS: [u8; 11] = [2, 1, 16, 7, 32, 5, 31, 1, 15, 1, 0];
/// `sub rsp, 24; mov [rsp + 16], rbp; lea rbp, [rsp + 16]; mov rbp, [rsp + 16]; add rsp, 24; ret`
const SUBTRACTS: [u8; 24] = [
    0x48, 0x83, 0xec, 0x18, 0x48, 0x89, 0x6c, 0x24, 0x10, 0x48, 0x8d, 0x6c, 0x24, 0x10, 0x48, 0x8b, 0x6c,
    0x24, 0x10, 0x48, 0x83, 0xc4, 0x18, 0xc3,
];
/// Its depths: 0 for 4 bytes, 24 for 19, 0 for 1.
const SUBTRACTS_DEPTHS: [u8; 7] = [2, 4, 48, 19, 47, 1, 0];

#[test]
fn prologues_of_both_eras_in_tables_of_each_version() {
    let pushes = [
        "0..1 cfa=rsp+8 ra=*(cfa-8) rbp=same",
        "1..8 cfa=rsp+16 ra=*(cfa-8) rbp=*(cfa-16)",
        "8..d cfa=rsp+32 ra=*(cfa-8) rbp=*(cfa-16)",
        "d..e cfa=rsp+16 ra=*(cfa-8) rbp=*(cfa-16)",
        "e..f cfa=rsp+8 ra=*(cfa-8) rbp=same",
    ];
    let subtracts = [
        "0..4 cfa=rsp+8 ra=*(cfa-8) rbp=same",
        "4..9 cfa=rsp+32 ra=*(cfa-8) rbp=same",
        "9..17 cfa=rsp+32 ra=*(cfa-8) rbp=*(cfa-16)",
        "17..18 cfa=rsp+8 ra=*(cfa-8) rbp=same",
    ];
    for magic in [V116, V118, V120] {
        let one = table(magic, &[("main.main", 0, 15, &PUSHES_DEPTHS)]);
        check(&one, Some(&PUSHES), &pushes);
        let one = table(magic, &[("main.main", 0, 24, &SUBTRACTS_DEPTHS)]);
        check(&one, Some(&SUBTRACTS), &subtracts);
    }
}

#[test]
fn without_code_the_table_tells_the_era() {
    let old = table(V118, &[("main.main", 0, 24, &SUBTRACTS_DEPTHS)]);
    check(
        &old,
        None,
        &[
            "0..4 cfa=rsp+8 ra=*(cfa-8) rbp=same",
            "4..9 cfa=rsp+32 ra=*(cfa-8) rbp=undefined",
            "9..17 cfa=rsp+32 ra=*(cfa-8) rbp=*(cfa-16)",
            "17..18 cfa=rsp+8 ra=*(cfa-8) rbp=same",
        ],
    );
    let new = table(V120, &[("main.main", 0, 15, &PUSHES_DEPTHS), ("main.leaf", 0, 1, &[2, 1, 0])]);
    let with_code = [&PUSHES[..], &[0xc3]].concat();
    assert_eq!(rows(&new, None), rows(&new, Some(&with_code)));
    // What is not compiled can do what it likes with rbp, and before Go 1.17 with rsp.
    let assembly = table(V120, &[("memmove", ASM, 1, &[2, 1, 0])]);
    check(&assembly, None, &["0..1 cfa=rsp+8 ra=*(cfa-8) rbp=undefined"]);
    check(&table(V116, &[("main.main", 0, 15, &PUSHES_DEPTHS)]), None, &["0..f unsupported stack_pointer"]);
}

#[test]
fn code_decides_what_assembly_does_with_rbp() {
    let leaf = table(V120, &[("memmove", ASM, 4, &[2, 4, 0])]);
    // mov rax, rbx; ret. mov rbp, rbx; ret. No instruction.
    check(&leaf, Some(&[0x48, 0x89, 0xd8, 0xc3]), &["0..4 cfa=rsp+8 ra=*(cfa-8) rbp=same"]);
    check(&leaf, Some(&[0x48, 0x89, 0xdd, 0xc3]), &["0..4 cfa=rsp+8 ra=*(cfa-8) rbp=undefined"]);
    check(&leaf, Some(&[0x06, 0x06, 0x06, 0x06]), &["0..4 cfa=rsp+8 ra=*(cfa-8) rbp=undefined"]);
    // push rbx is no prologue.
    let pushes = table(V120, &[("f", ASM, 3, &[2, 1, 16, 1, 15, 1, 0])]);
    check(
        &pushes,
        Some(&[0x53, 0x5b, 0xc3]),
        &[
            "0..1 cfa=rsp+8 ra=*(cfa-8) rbp=undefined",
            "1..2 cfa=rsp+16 ra=*(cfa-8) rbp=undefined",
            "2..3 cfa=rsp+8 ra=*(cfa-8) rbp=undefined",
        ],
    );
    // pop r9; push r9: the return address is in a register.
    let pops = table(V120, &[("f", ASM, 5, &[2, 2, 15, 2, 16, 1, 0])]);
    let below = "2..4 unsupported return_address";
    assert_eq!(rows(&pops, Some(&[0x41, 0x59, 0x41, 0x51, 0xc3])).0[1], below);
}

#[test]
fn functions_that_begin_a_stack_have_no_caller() {
    let check_one = |magic, name, flags, expect: &str| {
        check(&table(magic, &[(name, flags, 2, &[2, 2, 0])]), Some(&[0x90, 0xc3]), &[expect]);
    };
    let frame = "0..2 cfa=rsp+8 ra=*(cfa-8) rbp=same";
    check_one(V120, "runtime.goexit", TOP_FRAME | ASM, "0..2 end");
    check_one(V116, "runtime.goexit", 0, "0..2 end");
    check_one(V120, "runtime.goexit", ASM, frame);
    check_one(V120, "", TOP_FRAME | ASM, "0..2 unsupported stack_pointer");
    check_one(V120, "_rt0_amd64", ASM, "0..2 end");
    // The kernel calls it for a signal, and the trampoline leads on.
    check_one(V120, "runtime.sigtramp", TOP_FRAME | ASM, frame);
}

#[test]
fn signals_and_what_they_inject() {
    let code = [0xc3, 0xcc, 0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05, 0xcc, 0xc3];
    let functions: [Described<'_>; 3] = [
        ("f", 0, 2, &[2, 1, 0]),
        ("runtime.sigreturn", ASM, 10, &[2, 10, 0]),
        ("runtime.sigpanic", 0, 1, &[2, 1, 0]),
    ];
    let one = table(V120, &functions);
    let (rows, _) = rows(&one, Some(&code));
    assert_eq!(rows[1], "1..c signal context=sp+40");
    assert_eq!(rows[2], "c..d Interrupted(cfa=rsp+8 ra=*(cfa-8) rbp=same)");
}

/// As in Go 1.27: `push rbp; mov rbp, rsp; mov rdx, rsp; mov rsp, [rsi + 56]; sub rsp, 16; and rsp, -16;
/// mov [rsp + 8], rdi; call; mov rdi, [rsp + 8]; mov rsi, [rdi + 8]; sub rsi, [rsp]; mov fs:[-8], rdi; mov rsp, rsi;
/// pop rbp; ret`
const SWITCHES: [u8; 60] = [
    0x55, 0x48, 0x89, 0xe5, 0x48, 0x89, 0xe2, 0x48, 0x8b, 0x66, 0x38, 0x48, 0x83, 0xec, 0x10, 0x48, 0x83,
    0xe4, 0xf0, 0x48, 0x89, 0x7c, 0x24, 0x08, 0xe8, 0, 0, 0, 0, 0x48, 0x8b, 0x7c, 0x24, 0x08, 0x48, 0x8b,
    0x77, 0x08, 0x48, 0x2b, 0x34, 0x24, 0x64, 0x48, 0x89, 0x3c, 0x25, 0xf8, 0xff, 0xff, 0xff, 0x48, 0x89,
    0xf4, 0x5d, 0xc3, 0xcc, 0xcc, 0xcc, 0xcc,
];

#[test]
fn a_switched_stack_is_found_by_what_restores_it() {
    let described: Described<'_> = ("runtime.asmcgocall", ASM | SP_WRITE, 60, &[2, 1, 16, 54, 15, 1, 0]);
    let one = table(V120, &[described]);
    let expect = [
        "0..1 cfa=rsp+8 ra=*(cfa-8) rbp=same",
        "1..4 cfa=rsp+16 ra=*(cfa-8) rbp=*(cfa-16)",
        "4..7 cfa=rsp+16 ra=*(cfa-8) rbp=*(cfa-16)",
        "7..b cfa=rsp+16 ra=*(cfa-8) rbp=*(cfa-16)",
        "b..f OtherStack",
        "f..13 OtherStack",
        "13..18 OtherStack",
    ];
    let call = "SavedDepth { g: 8, depth: 0, cfa: 16, frame_pointer: AtCfa(-16) }";
    let (rows_of_all, _) = rows(&one, Some(&SWITCHES));
    assert_eq!(rows_of_all[..7], expect);
    assert!(rows_of_all[7..13].iter().all(|row| row.ends_with(call)), "{rows_of_all:?}");
    assert_eq!(
        rows_of_all[13..],
        ["36..37 cfa=rsp+16 ra=*(cfa-8) rbp=*(cfa-16)", "37..38 cfa=rsp+8 ra=*(cfa-8) rbp=same"]
    );
    check(&one, None, &["0..38 unsupported stack_pointer"]);
    // Any other instruction in place of a restoring one, and the way back is unknown.
    let mut other = SWITCHES;
    other[0x29] = 0x34;
    other[0x28] = 0x2b;
    other[0x27] = 0x2b;
    assert!(!rows(&one, Some(&other)).0.concat().contains("SavedDepth"));
    // rbp written behind the prologue: no way back either. mov rbp, rsi instead of mov rdx, rsp.
    let mut lost = SWITCHES;
    lost[4..7].copy_from_slice(&[0x48, 0x89, 0xf5]);
    assert!(!rows(&one, Some(&lost)).0.concat().contains("OtherStack"));
}

#[test]
fn a_call_that_never_returns_has_no_caller() {
    // mov rsp, [r14 + 56]; push rax; call r12; pop rax; ret
    let code = [0x49, 0x8b, 0x66, 0x38, 0x50, 0x41, 0xff, 0xd4, 0x58, 0xc3];
    let depths = [2, 5, 16, 4, 15, 1, 0];
    let flags = ASM | SP_WRITE;
    let (rows_of_mcall, _) = rows(&table(V120, &[("runtime.mcall", flags, 10, &depths)]), Some(&code));
    assert_eq!(rows_of_mcall[..2], ["0..4 cfa=rsp+8 ra=*(cfa-8) rbp=same", "4..5 end"]);
    let (rows_of_other, _) = rows(&table(V120, &[("runtime.other", flags, 10, &depths)]), Some(&code));
    assert_eq!(rows_of_other[1], "4..5 unsupported stack_pointer");
}

#[test]
fn a_fault_costs_one_function() {
    let functions: [Described<'_>; 4] = [
        // Depths behind the end of the function; none; cut off by the end of all.
        ("a", 0, 4, &[2, 2, 16, 100, 0]),
        ("b", 0, 4, &[2, 4, 0]),
        ("c", 0, 4, &[2, 0, 0]),
        ("d", 0, 4, &[2, 4, 0]),
    ];
    let code = [0xc3; 16];
    let (rows, report) = rows(&table(V120, &functions), Some(&code));
    let frame = "cfa=rsp+8 ra=*(cfa-8)";
    let unsupported = Rule::Unsupported(UnsupportedReason::Malformed);
    assert_eq!(
        rows,
        [
            format!("0..2 {frame} rbp=undefined"),
            format!("2..4 {unsupported}"),
            format!("4..8 {frame} rbp=same"),
            format!("8..c {unsupported}"),
            format!("c..10 {frame} rbp=same"),
        ]
    );
    assert_eq!(report.functions, 4);
    assert_eq!(report.skipped, BTreeMap::from([(GoSkip::Depths, 2)]));
}

#[test]
fn depths_that_functions_share_are_not_read_without_end() {
    // 400 functions, each with the same 300 spans.
    let depths: Vec<u8> = [2, 1]
        .into_iter()
        .chain((0..300).flat_map(|number| [if number % 2 == 0 { 16 } else { 15 }, 1]))
        .chain([0])
        .collect();
    let functions: Vec<Described<'_>> = (0..400).map(|_| ("f", 0, 400, &depths[..])).collect();
    let mut shared = table(V120, &functions);
    let (_, report) = rows(&shared, None);
    assert_eq!((report.functions, report.skipped.len()), (400, 0));
    // All at the depths of the first, and those of the others cut out.
    let part = |table: &[u8], number: usize| {
        usize::try_from(u64::from_le_bytes(table[32 + 8 * number..][..8].try_into().expect("8 bytes")))
            .expect("an offset in the table")
    };
    let (at, list) = (part(&shared, 3), part(&shared, 4));
    let removed = list - at - 1 - depths.len();
    for number in 0..400 {
        let description = list + 801 * 4 + 44 * number;
        shared[description + 16..][..4].copy_from_slice(&1u32.to_le_bytes());
    }
    shared.drain(at + 1 + depths.len()..list);
    shared[64..72].copy_from_slice(&((list - removed) as u64).to_le_bytes());
    let (_, report) = rows(&shared, None);
    assert!(report.skipped[&GoSkip::Budget] > 300, "{report:?}");
}

#[test]
fn headers_of_no_use() {
    let good = table(V120, &[("f", 0, 1, &[2, 1, 0])]);
    let parse = |table: &[u8]| for_each_row(&image(table, None, &[]), |_, _| {}).unwrap_err();
    let with = |at: usize, value: u8| {
        let mut table = good.clone();
        table[at] = value;
        table
    };
    assert_eq!(parse(&with(0, 0)), GoTableError::Magic(0xffff_ff00));
    assert_eq!(parse(&with(6, 4)), GoTableError::Architecture { quantum: 4, pointer: 8 });
    assert_eq!(parse(&with(15, 255)), GoTableError::Truncated);
    let mut unplaced = good.clone();
    unplaced[24..32].fill(0);
    assert_eq!(parse(&unplaced), GoTableError::NoText);
    let mut at = 0;
    for_each_row(&image(&unplaced, Some(0x5000), &[]), |range, _| at = range.start)
        .expect("a place from elsewhere will do");
    assert_eq!(at, 0x5000);
}

#[test]
fn a_table_is_found_among_other_data() {
    let good = table(V118, &[("f", 0, 1, &[2, 1, 0])]);
    let mut data = V118.to_le_bytes().to_vec();
    data.resize(64, 0);
    data.extend(&good);
    assert_eq!(find_table(&data), Some(64));
    assert_eq!(find_table(&data[..64]), None);
    assert_eq!(find_table(&data[1..]), None);
}

/// A table with all there is, and its code.
fn everything(magic: u32) -> (Vec<u8>, Vec<u8>) {
    let flags = ASM | SP_WRITE;
    let functions: [Described<'_>; 4] = [
        ("main.main", 0, 15, &PUSHES_DEPTHS),
        ("main.old", 0, 24, &SUBTRACTS_DEPTHS),
        ("runtime.asmcgocall", flags, 60, &[2, 1, 16, 54, 15, 1, 0]),
        ("runtime.goexit", TOP_FRAME | ASM, 1, &[2, 1, 0]),
    ];
    (table(magic, &functions), [&PUSHES[..], &SUBTRACTS, &SWITCHES, &[0x90]].concat())
}

/// Rows are in order and inside the functions, whatever the input.
fn survives(table: &[u8], code: &[u8]) {
    let segments = [GoCode { address: TEXT, bytes: code }];
    for code in [&segments[..], &[]] {
        let mut end = 0;
        let _ = for_each_row(&image(table, Some(TEXT), code), |range, _| {
            assert!(end <= range.start && range.start < range.end, "{range:#x?} behind {end:#x}");
            end = range.end;
        });
    }
    let _ = find_table(table);
    let _ = text_start(table, 0, [(0, 0), (160, 0)].into_iter());
}

#[test]
fn cut_off_at_each_byte() {
    for magic in [V116, V118, V120] {
        let (table, code) = everything(magic);
        for bytes in 0..table.len() {
            survives(&table[..bytes], &code);
        }
        for bytes in 0..code.len() {
            survives(&table, &code[..bytes]);
        }
    }
}

proptest! {
    #[test]
    fn damage_is_survived(
        version in 0usize..3,
        table_damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        code_damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
    ) {
        let (mut table, mut code) = everything([V116, V118, V120][version]);
        for (data, damage) in [(&mut table, table_damage), (&mut code, code_damage)] {
            for (place, value) in damage {
                let place = place.index(data.len());
                data[place] = value;
            }
        }
        survives(&table, &code);
    }

    #[test]
    fn any_bytes_are_an_instruction_or_not(code in proptest::collection::vec(any::<u8>(), 0..20)) {
        if let Some(instruction) = crate::x86_64::instruction::decode(&code) {
            prop_assert!((1..=15).contains(&instruction.bytes) && instruction.bytes <= code.len());
        }
    }
}
