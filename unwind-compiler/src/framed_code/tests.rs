//! Functions as V8 makes them, put amid others that make a gap of them.

use windlass_schema::{Architecture, Rule};

use super::*;
use crate::x86_64::code::Machine;

const START: u64 = 0x10_0000;
/// Where the function is that is looked at.
const TRIED: u64 = START + 0x1_0000;

/// push %rbp; mov %rsp, %rbp; leave; ret
const WITH_FRAME: [u8; 6] = [0x55, 0x48, 0x89, 0xe5, 0xc9, 0xc3];

/// Code with `function` at [`TRIED`], and functions with a frame wherever else one may be.
fn gap(function: &[u8]) -> Vec<u8> {
    let mut code = vec![0xcc; *WIDE_BYTES.start() as usize];
    for start in (64..code.len()).step_by(64) {
        code[start..start + WITH_FRAME.len()].copy_from_slice(&WITH_FRAME);
    }
    let at = (TRIED - START) as usize;
    code[at..(at + function.len()).next_multiple_of(64)].fill(0xcc);
    code[at..at + function.len()].copy_from_slice(function);
    code
}

/// The rows at and behind [`TRIED`]: bytes from there, and the rule.
fn rows(code: &[u8], length: usize, starts: &Starts) -> Vec<String> {
    let bytes = CodeBytes::new(vec![(START, code)]);
    let found = framed_code::<Machine>(&bytes, &(START..START + code.len() as u64), starts);
    let found = found.expect("wide code that keeps frame pointers");
    assert!(found.is_sorted_by(|one, next| one.range.end <= next.range.start));
    let is_tried = |one: &&Recognised| (TRIED..TRIED + length as u64).contains(&one.range.start);
    let text = |one: &Recognised| {
        assert_eq!(Rule::of_record(one.rule.to_record(), Architecture::X86_64), Ok(one.rule));
        format!("{}..{} {}", one.range.start - TRIED, one.range.end - TRIED, one.rule)
    };
    found.iter().filter(is_tried).map(text).collect()
}

#[track_caller]
fn check(function: &[u8], expect: &[&str]) {
    assert_eq!(rows(&gap(function), function.len(), &Starts::default()), expect, "{function:x?}");
}

#[test]
fn a_frame_that_is_built_on_one_way_only() {
    // test $1, %al; jne +1; ret; push %rbp; mov %rsp, %rbp; push $34; sub $8, %rsp; call; mov %rbp, %rsp; pop %rbp; ret
    let mut code = vec![0xa8, 1, 0x75, 1, 0xc3, 0x55, 0x48, 0x89, 0xe5, 0x6a, 0x22, 0x48, 0x83, 0xec, 8];
    code.extend([0xe8, 0, 1, 0, 0, 0x48, 0x8b, 0xe5, 0x5d, 0xc3]);
    let expect = [
        "0..6 cfa=rsp+8 ra=*(cfa-8) rbp=same",
        "6..9 cfa=rsp+16 ra=*(cfa-8) rbp=*(cfa-16)",
        "9..24 cfa=rbp+16 ra=*(cfa-8) rbp=*(cfa-16)",
        "24..25 cfa=rsp+8 ra=*(cfa-8) rbp=same",
    ];
    check(&code, &expect);
    // What another way jumps to: with other depths, by the frame pointer. jne back to `mov %rbp, %rsp`
    code.splice(15..15, [0x75, 5]);
    let expect = ["9..26 cfa=rbp+16 ra=*(cfa-8) rbp=*(cfa-16)", "26..27 cfa=rsp+8 ra=*(cfa-8) rbp=same"];
    assert_eq!(rows(&gap(&code), code.len(), &Starts::default())[2..], expect);
}

/// `pop %r10; lea (%rsp, %rcx, 8), %rsp; push %r10; ret`
#[test]
fn arguments_dropped_below_the_return_address() {
    let code = [0x41, 0x5a, 0x48, 0x8d, 0x24, 0xcc, 0x41, 0x52, 0xc3];
    let mut of_function = WITH_FRAME[..5].to_vec();
    of_function.extend(code);
    let expect = [
        "0..1 cfa=rsp+8 ra=*(cfa-8) rbp=same",
        "1..4 cfa=rsp+16 ra=*(cfa-8) rbp=*(cfa-16)",
        "4..5 cfa=rbp+16 ra=*(cfa-8) rbp=*(cfa-16)",
        "5..7 cfa=rsp+8 ra=*(cfa-8) rbp=same",
        "7..13 cfa=rsp+0 ra=r10 rbp=same",
        "13..14 cfa=rsp+8 ra=*(cfa-8) rbp=same",
    ];
    check(&of_function, &expect);
    // An instruction that may write the register: mov %rax, %r10. Behind it, nothing is known.
    let mut written = of_function.clone();
    written.splice(7..7, [0x49, 0x89, 0xc2]);
    let mut known = expect[..4].to_vec();
    known.push("7..10 cfa=rsp+0 ra=r10 rbp=same");
    check(&written, &known);
}

#[test]
fn what_returns_with_another_frame_is_not_believed() {
    // push %rax; ret
    check(&[0x50, 0xc3], &[]);
    // A frame, of which something stays: push %rbp; mov %rsp, %rbp; pop %rbp; push %rax; ret
    check(&[0x55, 0x48, 0x89, 0xe5, 0x5d, 0x50, 0xc3], &[]);
    // Nothing but traps, and no code.
    check(&[0x90, 0xcc], &[]);
    check(&[0x06, 0xc3], &[]);
}

/// V8's function that ends those of baseline code: sub %ecx, -8(%rbp); jge +2; push %rax; pop %rax; mov %rbp, %rsp; pop %rbp;
/// pop %r8; lea (%rsp, %rbx, 8), %rsp; push %r8; ret
#[test]
fn a_frame_that_another_function_has_built() {
    let mut code = vec![0x29, 0x4d, 0xf8, 0x7d, 2, 0x50, 0x58, 0x48, 0x8b, 0xe5, 0x5d];
    code.extend([0x41, 0x58, 0x48, 0x8d, 0x24, 0xdc, 0x41, 0x50, 0xc3]);
    let expect = [
        "0..11 cfa=rbp+16 ra=*(cfa-8) rbp=*(cfa-16)",
        "11..13 cfa=rsp+8 ra=*(cfa-8) rbp=same",
        "13..19 cfa=rsp+0 ra=r8 rbp=same",
        "19..20 cfa=rsp+8 ra=*(cfa-8) rbp=same",
    ];
    check(&code, &expect);
    // What returns on one of its ways as it was called has not been entered with it.
    code[5..7].copy_from_slice(&[0xc3, 0x90]);
    check(&code, &["0..6 cfa=rsp+8 ra=*(cfa-8) rbp=same", "7..10 cfa=rsp+8 ra=*(cfa-8) rbp=same"]);
}

/// V8's function that baseline code calls in its prologue: mov (%rdi), %r8; pop %r15; push %rbp; mov %rsp, %rbp; push %rsi;
/// push %r15; ret
#[test]
fn a_frame_that_is_built_for_the_caller() {
    let code = [0x4c, 0x8b, 7, 0x41, 0x5f, 0x55, 0x48, 0x89, 0xe5, 0x56, 0x41, 0x57, 0xc3];
    let expect = [
        "0..5 cfa=rsp+16 ra=*(cfa-8) rbp=same",
        "5..6 cfa=rsp+8 ra=*(cfa-8) rbp=same",
        "6..9 cfa=rsp+16 ra=*(cfa-8) rbp=*(cfa-16)",
        "9..13 cfa=rbp+16 ra=*(cfa-8) rbp=*(cfa-16)",
    ];
    check(&code, &expect);
    // Without a prologue there is no telling: pop %r15; push %r15; ret is as good as nothing.
    check(&[0x41, 0x5f, 0x41, 0x57, 0x41, 0x57, 0xc3], &[]);
}

/// mov %rsp, %r8; lea (, %rbx, 8), %r10; sub %r10, %rsp; xor %r11d, %r11d; the loop; lea (%rsp, %r9, 8), %r8; jmp *%rcx
#[test]
fn a_return_address_that_is_moved() {
    let mut code =
        vec![0x49, 0x89, 0xe0, 0x4c, 0x8d, 0x14, 0xdd, 0, 0, 0, 0, 0x49, 0x2b, 0xe2, 0x45, 0x33, 0xdb];
    code.extend([
        0x4f, 0x8b, 0x14, 0xd8, 0x4e, 0x89, 0x14, 0xdc, 0x49, 0xff, 0xc3, 0x4d, 0x3b, 0xd9, 0x7c, 0xf0,
    ]);
    code.extend([0x4e, 0x8d, 0x04, 0xcc, 0xff, 0xe1]);
    let symbols = BTreeMap::from([(TRIED, TRIED + code.len() as u64)]);
    let starts = Starts { symbols, ..Starts::default() };
    // From the loop's first instruction on, it may have been copied.
    let expect = [
        "0..14 cfa=rsp+8 ra=*(cfa-8) rbp=same",
        "14..17 cfa=r8+8 ra=*(cfa-8) rbp=same",
        "37..39 cfa=rsp+8 ra=*(cfa-8) rbp=same",
    ];
    assert_eq!(rows(&gap(&code), code.len(), &starts), expect);
    // With the loop's condition first: jmp +11, and jle.
    let mut jumping = code.clone();
    jumping.splice(17..17, [0xeb, 11]);
    jumping[33] = 0x7e;
    let symbols = BTreeMap::from([(TRIED, TRIED + jumping.len() as u64)]);
    let expect = [
        "0..14 cfa=rsp+8 ra=*(cfa-8) rbp=same",
        "14..19 cfa=r8+8 ra=*(cfa-8) rbp=same",
        "39..41 cfa=rsp+8 ra=*(cfa-8) rbp=same",
    ];
    assert_eq!(rows(&gap(&jumping), jumping.len(), &Starts { symbols, ..Starts::default() }), expect);
    // With the register written that says where it was: xor %r8d, %r8d.
    code[14..17].copy_from_slice(&[0x45, 0x33, 0xc0]);
    assert_eq!(rows(&gap(&code), code.len(), &starts), Vec::<String>::new());
}

/// A block behind traps is no function: the one in front jumps there, in its frame.
#[test]
fn blocks_behind_padding_belong_to_the_function_that_jumps_there() {
    // push %rbp; mov %rsp, %rbp; jne block; leave; ret; traps; block: mov %rdx, -48(%rbp); leave; ret
    let mut code = vec![0x55, 0x48, 0x89, 0xe5, 0x75, 0x1a, 0xc9, 0xc3];
    code.resize(32, 0xcc);
    code.extend([0x48, 0x89, 0x55, 0xd0, 0xc9, 0xc3]);
    let found = rows(&gap(&code), code.len(), &Starts::default());
    let block = ["32..37 cfa=rbp+16 ra=*(cfa-8) rbp=*(cfa-16)", "37..38 cfa=rsp+8 ra=*(cfa-8) rbp=same"];
    assert_eq!(found[found.len() - 2..], block);
    assert_eq!(found.len(), 6);
    // Nor is it where a symbol covers it, by whatever jump it is reached.
    code[4..6].fill(0x90);
    let symbols = BTreeMap::from([(TRIED, TRIED + code.len() as u64)]);
    let named = rows(&gap(&code), code.len(), &Starts { symbols, ..Starts::default() });
    assert_eq!(named.len(), 4, "{named:?}");
}

/// A function and, behind its call, another one.
fn followed_by(function: &[u8]) -> Vec<u8> {
    // push %rbp; mov %rsp, %rbp; push %rbx; push %rax; call
    let mut code = vec![0x55, 0x48, 0x89, 0xe5, 0x53, 0x50, 0xe8, 0, 1, 0, 0];
    code.extend(function);
    code
}

#[test]
fn what_is_behind_a_call_that_does_not_return_is_another_function() {
    let rows_of_first = [
        "0..1 cfa=rsp+8 ra=*(cfa-8) rbp=same",
        "1..4 cfa=rsp+16 ra=*(cfa-8) rbp=*(cfa-16)",
        "4..11 cfa=rbp+16 ra=*(cfa-8) rbp=*(cfa-16)",
    ];
    // With a frame; without one, that jumps elsewhere or calls; a loop.
    check(&followed_by(&WITH_FRAME), &rows_of_first);
    check(&followed_by(&[0x55, 0x48, 0x89, 0xe5, 0x48, 0x89, 0x45, 0xf8, 0xc9, 0xc3]), &rows_of_first);
    check(&followed_by(&[0x48, 0x8b, 0x07, 0xff, 0x20]), &rows_of_first);
    check(&followed_by(&[0x48, 0x89, 0xf8, 0xe8, 0, 1, 0, 0, 0xcc]), &rows_of_first);
    check(&followed_by(&[0xf3, 0x90, 0xeb, 0xfc]), &rows_of_first);
    check(&followed_by(&[0x31, 0xc0, 0xc3]), &rows_of_first);
}

#[test]
fn a_call_returns_to_what_uses_the_frame_or_undoes_it() {
    let rows = |code: &[u8]| rows(&gap(code), code.len(), &Starts::default());
    // mov -8(%rbp), %rbx; leave; ret
    let end = [0x48, 0x8b, 0x5d, 0xf8, 0xc9, 0xc3];
    let code = followed_by(&end);
    let all = ["4..16 cfa=rbp+16 ra=*(cfa-8) rbp=*(cfa-16)", "16..17 cfa=rsp+8 ra=*(cfa-8) rbp=same"];
    assert_eq!(rows(&code)[2..], all);
    // A call behind it that does not return: nop; mov -8(%rbp), %rdi; call
    let code = followed_by(&[0x90, 0x48, 0x8b, 0x7d, 0xf8, 0xe8, 0, 1, 0, 0, 0xcc]);
    assert_eq!(rows(&code)[2..], ["4..21 cfa=rbp+16 ra=*(cfa-8) rbp=*(cfa-16)"]);
}

/// What GCC and LLVM call unlikely they put where nothing is aligned.
#[test]
fn functions_that_symbols_name_start_anywhere() {
    let mut code = vec![0x55, 0x48, 0x89, 0xe5, 0xe8, 0, 1, 0, 0];
    let second = TRIED + code.len() as u64;
    code.extend(WITH_FRAME);
    let symbols = BTreeMap::from([(TRIED, second), (second, second + 6)]);
    let found = rows(&gap(&code), code.len(), &Starts { symbols, ..Starts::default() });
    let rows_of_second = [
        "9..10 cfa=rsp+8 ra=*(cfa-8) rbp=same",
        "10..13 cfa=rsp+16 ra=*(cfa-8) rbp=*(cfa-16)",
        "13..14 cfa=rbp+16 ra=*(cfa-8) rbp=*(cfa-16)",
        "14..15 cfa=rsp+8 ra=*(cfa-8) rbp=same",
    ];
    assert_eq!(found[3..], rows_of_second, "{found:?}");
    assert_eq!(found.len(), 7);
}

/// A jump to an address that the code does not say proves a start only if no function in front may switch to it.
#[test]
fn a_handler_behind_what_may_switch() {
    // movzbl; jmp *%rcx
    let handler = [0x0f, 0xb6, 0x1c, 0x0f, 0xff, 0xe1];
    check(&handler, &["0..6 cfa=rsp+8 ra=*(cfa-8) rbp=same"]);
    // push %rbp; mov %rsp, %rbp; jmp *%rax, and traps
    let mut code = vec![0x55, 0x48, 0x89, 0xe5, 0xff, 0xe0];
    code.resize(64, 0xcc);
    code.extend(handler);
    let found = rows(&gap(&code), code.len(), &Starts::default());
    assert_eq!(found.len(), 3, "{found:?}");
    let symbols = BTreeMap::from([(TRIED + 64, TRIED + 70)]);
    let found = rows(&gap(&code), code.len(), &Starts { symbols, ..Starts::default() });
    assert_eq!(found.len(), 4, "{found:?}");
}

#[test]
fn narrow_code_and_such_without_frames_is_left() {
    let known = |code: &[u8]| {
        let bytes = CodeBytes::new(vec![(START, code)]);
        framed_code::<Machine>(&bytes, &(START..START + code.len() as u64), &Starts::default()).is_some()
    };
    let code = gap(&WITH_FRAME);
    assert!(known(&code));
    assert!(!known(&code[64..]));
    assert!(!known(&vec![0xcc; code.len()]));
    // sub $32, %rsp; add $32, %rsp; ret
    let mut others = code;
    for start in (64..others.len()).step_by(640) {
        others[start..start + 9].copy_from_slice(&[0x48, 0x83, 0xec, 0x20, 0x48, 0x83, 0xc4, 0x20, 0xc3]);
    }
    assert!(!known(&others));
}

#[test]
fn what_is_kept_and_done_has_bounds() {
    // A function of one instruction to a byte.
    let mut long = WITH_FRAME[..4].to_vec();
    long.resize(MAX_INSTRUCTIONS + 4, 0x90);
    long.extend(&WITH_FRAME[4..]);
    check(&long, &[]);
    long.drain(4..8);
    assert_eq!(rows(&gap(&long[..]), long.len(), &Starts::default()).len(), 4);
    // And a gap of many functions.
    let code = gap(&WITH_FRAME).repeat(1 + (WIDE_BYTES.end() / WIDE_BYTES.start()) as usize);
    let known = |length: u64| {
        let bytes = CodeBytes::new(vec![(START, &code)]);
        framed_code::<Machine>(&bytes, &(START..START + length), &Starts::default()).is_some()
    };
    assert!(known(*WIDE_BYTES.start()));
    assert!(!known(*WIDE_BYTES.end() + 1));
}

/// Whether a gap is known with that budget, and what is left of it.
fn with_budget(code: &[u8], mut budget: Budget) -> (bool, Budget) {
    let bytes = CodeBytes::new(vec![(START, code)]);
    let gap = START..START + code.len() as u64;
    let is_known = within::<Machine>(&bytes, &gap, &Starts::default(), &mut budget).is_some();
    (is_known, budget)
}

#[test]
fn nothing_is_known_of_code_that_is_not_followed_to_the_end() {
    let code = gap(&WITH_FRAME);
    let all = Budget { instructions: code.len() as u64, kept: code.len() as u64 };
    let (is_known, left) = with_budget(&code, all);
    assert!(is_known);
    let used = Budget { instructions: all.instructions - left.instructions, kept: all.kept - left.kept };
    assert!(with_budget(&code, used).0);
    assert!(!with_budget(&code, Budget { instructions: used.instructions - 1, ..used }).0);
    assert!(!with_budget(&code, Budget { kept: used.kept - 1, ..used }).0);
}

/// Jumps over thousands of functions, too far for those to be parts.
#[test]
fn functions_that_are_jumped_over_are_not_counted_one_by_one() {
    let mut code = gap(&WITH_FRAME);
    code.resize(8 * code.len(), 0xcc);
    let functions = code.len() / 64;
    for start in (64..code.len()).step_by(64) {
        let target = (start + code.len() / 2) % code.len() / 64 * 64 + 1;
        // push %rbp; mov %rsp, %rbp; jmp
        code[start..start + 5].copy_from_slice(&[0x55, 0x48, 0x89, 0xe5, 0xe9]);
        let displacement = target as i32 - (start as i32 + 9);
        code[start + 5..start + 9].copy_from_slice(&displacement.to_le_bytes());
    }
    let all = Budget { instructions: 8 * functions as u64, kept: code.len() as u64 };
    let (is_known, left) = with_budget(&code, all);
    assert!(is_known, "{left:?}");
}

/// Of any bytes that are changed: no panic, and rows that are disjoint and within the code.
#[test]
fn no_code_panics() {
    let mut code = gap(&WITH_FRAME);
    let mut state = 1u64;
    for _ in 0..40 {
        for _ in 0..64 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let at = (state >> 20) as usize % code.len();
            code[at] = (state >> 56) as u8;
        }
        let bytes = CodeBytes::new(vec![(START, &code)]);
        let found = framed_code::<Machine>(&bytes, &(START..START + code.len() as u64), &Starts::default());
        assert!(found.is_none_or(|found| found.is_sorted_by(|one, next| one.range.end <= next.range.start)));
    }
}
