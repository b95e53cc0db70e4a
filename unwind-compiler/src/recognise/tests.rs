//! Instructions written by hand, and any others.

use proptest::prelude::*;
use windlass_schema::Architecture::{Aarch64, X86_64};

use super::*;

mod against_cfi;
mod bases;

const START: u64 = 0x1000;

/// What is recognised of one section of code.
fn found(architecture: Architecture, code: &[u8], starts: &Starts) -> Vec<Recognised> {
    let code = CodeBytes::new(vec![(START, code)]);
    let mut gaps = Vec::new();
    code.gaps([], |gap| gaps.push(gap));
    recognise(architecture, &code, &gaps, starts, &known(architecture, &code, &gaps, starts))
}

/// Each line of `expect` is `start..end kind rule`, in bytes from the section's start.
#[track_caller]
fn check(architecture: Architecture, code: &[u8], starts: &Starts, expect: &[&str]) {
    let text = |one: Recognised| {
        let Range { start, end } = one.range;
        format!("{}..{} {} {}", start - START, end - START, one.kind.as_str(), one.rule)
    };
    let found: Vec<_> = found(architecture, code, starts).into_iter().map(text).collect();
    assert_eq!(found, expect);
}

fn called(at: u64) -> Starts {
    Starts { process: u64::MAX, called: BTreeSet::from([START + at]), ..Starts::default() }
}

/// Symbols: bytes from the section's start, and how many.
fn symbols(symbols: &[(u64, u64)]) -> Starts {
    let ends = symbols.iter().map(|(at, bytes)| (START + at, START + at + bytes));
    Starts { process: u64::MAX, symbols: ends.collect(), ..Starts::default() }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[test]
fn x86_64_process_entry_and_what_it_calls() {
    // xor rbp, rbp; mov rdi, rsp; lea rsi, [rip]; and rsp, -16; call +10; hlt
    let mut code = vec![0x48, 0x31, 0xed, 0x48, 0x89, 0xe7, 0x48, 0x8d, 0x35, 0, 0, 0, 0];
    code.extend([0x48, 0x83, 0xe4, 0xf0, 0xe8, 10, 0, 0, 0, 0xf4]);
    code.resize(32, 0xcc);
    // push rax; pop rax; ret
    code.extend([0x50, 0x58, 0xc3]);
    let starts = Starts { process: START, ..Starts::default() };
    let expect = [
        "0..22 process_entry end",
        "32..33 function cfa=rsp+8 ra=*(cfa-8) rbp=same",
        "33..34 function cfa=rsp+16 ra=*(cfa-8) rbp=same",
        "34..35 function cfa=rsp+8 ra=*(cfa-8) rbp=same",
    ];
    check(X86_64, &code, &starts, &expect);
    // Elsewhere it may be anything, and a symbol of what was not called makes no function of it.
    check(X86_64, &code, &called(200), &[]);
    code[17] = 0xe9;
    check(X86_64, &code, &starts, &[]);
    code[17] = 0xe8;
    code[1] = 0x89;
    check(X86_64, &code, &starts, &[]);
    // push rbp; ret at the process entry.
    check(X86_64, &[0x50, 0x58, 0xc3], &Starts { process: START, ..symbols(&[(0, 3)]) }, &[]);
}

/// glibc's dynamic linker calls before it zeroes rbp, and leaves by a jump.
#[test]
fn x86_64_entry_of_the_dynamic_linker() {
    // mov rdi, rsp; call; mov r12, rax; mov r13, rsp; and rsp, -16; xor ebp, ebp; call; mov rsp, r13; jmp r12
    let mut code = vec![0x48, 0x89, 0xe7, 0xe8, 0xf8, 0x0b, 0, 0, 0x49, 0x89, 0xc4, 0x49, 0x89, 0xe5];
    code.extend([0x48, 0x83, 0xe4, 0xf0, 0x31, 0xed, 0xe8, 0xf0, 0x9e, 0xfe, 0xff]);
    code.extend([0x4c, 0x89, 0xec, 0x41, 0xff, 0xe4]);
    let starts = Starts { process: START, ..Starts::default() };
    check(X86_64, &code, &starts, &["0..31 process_entry end"]);
    check(X86_64, &code, &called(200), &[]);
    // A branch, a return, or a jump by memory: there may be a caller.
    for other in [[0x74, 0xe4, 0x90], [0x90, 0x90, 0xc3], [0x41, 0xff, 0x20]] {
        code[28..].copy_from_slice(&other);
        check(X86_64, &code, &starts, &[]);
    }
}

#[test]
fn x86_64_main_that_the_process_entry_hands_over() {
    // push rbx; call -6; pop rbx; ret: its return is behind a call, and proves nothing.
    let main = [0x53, 0xe8, 0xfa, 0xff, 0xff, 0xff, 0x5b, 0xc3];
    let expect = [
        "24..25 function cfa=rsp+8 ra=*(cfa-8) rbp=same",
        "25..31 function cfa=rsp+16 ra=*(cfa-8) rbp=same",
        "31..32 function cfa=rsp+8 ra=*(cfa-8) rbp=same",
    ];
    let starts = Starts { process: START, ..symbols(&[(24, 8)]) };
    // lea rdi, [rip+13]; mov rdi, 0x1018; lea rsi, [rip+13]: to behind the entry, in another register.
    let relative = [0x48, 0x8d, 0x3d, 15, 0, 0, 0];
    let constant = [0x48, 0xc7, 0xc7, 0x18, 0x10, 0, 0];
    let other = [0x48, 0x8d, 0x35, 15, 0, 0, 0];
    for (first, expect) in [(relative, &expect[..]), (constant, &expect), (other, &[])] {
        // xor ebp, ebp; ...; call [rip]; hlt
        let mut code: Vec<u8> = [0x31, 0xed].into_iter().chain(first).collect();
        code.extend([0xff, 0x15, 0, 0, 0, 0, 0xf4]);
        code.resize(24, 0xcc);
        code.extend(main);
        let bytes = CodeBytes::new(vec![(START, &code[..])]);
        // CFI covers the entry.
        let behind = START + 16..START + 32;
        let gaps = std::slice::from_ref(&behind);
        let found = recognise(X86_64, &bytes, gaps, &starts, &known(X86_64, &bytes, gaps, &starts));
        let text = |one: &Recognised| {
            format!(
                "{}..{} {} {}",
                one.range.start - START,
                one.range.end - START,
                one.kind.as_str(),
                one.rule
            )
        };
        assert_eq!(found.iter().map(text).collect::<Vec<_>>(), expect);
    }
}

#[test]
fn x86_64_lazy_linkage() {
    let mut code = vec![0xff, 0x35, 1, 2, 3, 4, 0xff, 0x25, 1, 2, 3, 4, 0x0f, 0x1f, 0x40, 0];
    for (number, to) in [(0, 0xe0), (1, 0xd0)] {
        code.extend([0xff, 0x25, 1, 2, 3, 4, 0x68, number, 0, 0, 0, 0xe9, to, 0xff, 0xff, 0xff]);
    }
    let expect = [
        "0..6 linkage_table cfa=rsp+16 ra=*(cfa-8) rbp=same",
        "6..16 linkage_table cfa=rsp+24 ra=*(cfa-8) rbp=same",
        "16..48 linkage_table cfa=rsp+8+8*((rip&15)>=11) ra=*(cfa-8) rbp=same",
    ];
    check(X86_64, &code, &called(200), &expect);
    // An entry that leads elsewhere is none.
    code[12 + 16] = 0xe1;
    check(X86_64, &code, &called(200), &[]);
    // With IBT: endbr64; push n; bnd jmp; nop
    let mut code = vec![0xff, 0x35, 1, 2, 3, 4, 0xf2, 0xff, 0x25, 1, 2, 3, 4, 0x0f, 0x1f, 0];
    code.extend([0xf3, 0x0f, 0x1e, 0xfa, 0x68, 0, 0, 0, 0, 0xf2, 0xe9, 0xe1, 0xff, 0xff, 0xff, 0x90]);
    let expect = [
        "0..6 linkage_table cfa=rsp+16 ra=*(cfa-8) rbp=same",
        "6..16 linkage_table cfa=rsp+24 ra=*(cfa-8) rbp=same",
        "16..32 linkage_table cfa=rsp+8+8*((rip&15)>=9) ra=*(cfa-8) rbp=same",
    ];
    check(X86_64, &code, &called(200), &expect);
}

#[test]
fn x86_64_linkage_of_mold_and_without_laziness() {
    let mut code = vec![0xf3, 0x0f, 0x1e, 0xfa, 0x41, 0x53, 0xff, 0x35, 1, 2, 3, 4, 0xff, 0x25, 1, 2, 3, 4];
    code.resize(32, 0xcc);
    code.extend([0xf3, 0x0f, 0x1e, 0xfa, 0x41, 0xbb, 0, 0, 0, 0, 0xff, 0x25, 1, 2, 3, 4]);
    let expect = [
        "0..6 linkage_table cfa=rsp+8 ra=*(cfa-8) rbp=same",
        "6..12 linkage_table cfa=rsp+16 ra=*(cfa-8) rbp=same",
        "12..32 linkage_table cfa=rsp+24 ra=*(cfa-8) rbp=same",
        "32..48 linkage_table cfa=rsp+8 ra=*(cfa-8) rbp=same",
    ];
    check(X86_64, &code, &called(200), &expect);
    let section = [0xff, 0x25, 1, 2, 3, 4, 0x66, 0x90, 0xff, 0x25, 1, 2, 3, 4, 0x66, 0x90];
    check(X86_64, &section, &called(200), &["0..16 linkage_table cfa=rsp+8 ra=*(cfa-8) rbp=same"]);
    // Amid other code the same bytes may be the end of a function with a frame.
    let amid: Vec<u8> = section.into_iter().chain([0x0f, 0x0b]).collect();
    check(X86_64, &amid, &called(200), &[]);
}

#[test]
fn trampolines() {
    let signal = |range: &str, at: u64| format!("{range} signal_trampoline signal context=sp+{at}");
    let long = [0x0f, 0x1f, 0, 0x90, 0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05];
    check(X86_64, &long, &called(200), &[&signal("3..13", 40)]);
    let short = [0xc3, 0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05];
    check(X86_64, &short, &called(200), &[&signal("1..8", 40)]);
    let other = [0x90, 0xb8, 0x0e, 0, 0, 0, 0x0f, 0x05];
    check(X86_64, &other, &called(200), &[]);
    // mov r8d, 15; syscall: what number it has, eax says. And mov ax, 15; add [rax], al; syscall.
    for prefix in [0x41, 0x66] {
        check(X86_64, &[prefix, 0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05], &called(200), &[]);
    }
    // nop; mov x8, 139; svc 0
    let arm = words(&[0xd503_201f, 0xd280_1168, 0xd400_0001]);
    check(Aarch64, &arm, &called(200), &[&signal("3..12", 312)]);
}

#[test]
fn x86_64_functions_are_followed_to_their_end() {
    // push rbp; mov rbp, rsp; sub rsp, 16; test eax, eax; je +2; and rsp, -16 ...; leave; ret
    let code = [0x55, 0x48, 0x89, 0xe5, 0x48, 0x83, 0xec, 16, 0x85, 0xc0, 0x74, 2, 0x31, 0xc0, 0xc9, 0xc3];
    let expect = [
        "0..1 function cfa=rsp+8 ra=*(cfa-8) rbp=same",
        "1..4 function cfa=rsp+16 ra=*(cfa-8) rbp=*(cfa-16)",
        "4..15 function cfa=rbp+16 ra=*(cfa-8) rbp=*(cfa-16)",
        "15..16 function cfa=rsp+8 ra=*(cfa-8) rbp=same",
    ];
    check(X86_64, &code, &symbols(&[(0, 16)]), &expect);
    check(X86_64, &code, &called(0), &expect);
    // A jump to where no instruction of the function starts.
    let mut into = code;
    into[11] = 1;
    check(X86_64, &into, &called(0), &[]);
    // One that leaves with the frame established.
    into[11] = 16;
    check(X86_64, &into, &called(0), &[]);
}

#[test]
fn x86_64_functions_that_are_in_doubt_are_left() {
    let alone = |code: &[u8]| {
        let starts = Starts { called: BTreeSet::from([START]), ..symbols(&[(0, code.len() as u64)]) };
        check(X86_64, code, &starts, &[]);
    };
    // pop rax, which was the return address; ret
    alone(&[0x58, 0xc3]);
    // push rbp; mov [rsp], rax; pop rbp; ret: not what was saved.
    alone(&[0x55, 0x48, 0x89, 0x04, 0x24, 0x5d, 0xc3]);
    // mov rsp, rdi; ret
    alone(&[0x48, 0x89, 0xfc, 0xc3]);
    // push rax; ret
    alone(&[0x50, 0xc3]);
    // mov ebp, 0; ret
    alone(&[0xbd, 0, 0, 0, 0, 0xc3]);
    // A way into what is no instruction; and one that runs out of the function.
    alone(&[0x74, 1, 0xc3, 0x06]);
    alone(&[0x90, 0x90]);
    // sub rsp, 8; call +0: what is called is the next instruction.
    alone(&[0x48, 0x83, 0xec, 8, 0xe8, 0, 0, 0, 0, 0x48, 0x83, 0xc4, 8, 0xc3]);
}

#[test]
fn a_symbol_of_a_part_is_no_function() {
    // mov rax, rdi; jmp into the middle: GCC's .cold. At 16: push rbx; nop; jmp back to 0
    let mut code = vec![0x48, 0x89, 0xf8, 0xeb, 12];
    code.resize(16, 0xcc);
    code.extend([0x53, 0x90, 0xeb, 0xec]);
    check(X86_64, &code, &symbols(&[(0, 5)]), &[]);
    // Where it jumps to a function that returns, that has no frame of its own to begin with.
    code.truncate(16);
    code.extend([0x90, 0x90, 0xc3]);
    let both =
        ["0..5 function cfa=rsp+8 ra=*(cfa-8) rbp=same", "17..19 function cfa=rsp+8 ra=*(cfa-8) rbp=same"];
    check(X86_64, &code, &symbols(&[(0, 5), (17, 2)]), &both);
    let reversed: Vec<u8> = [0x90, 0xc3].into_iter().chain([0xeb, 0xfc]).collect();
    check(X86_64, &reversed, &symbols(&[(0, 2), (2, 2)]), &["0..4 function cfa=rsp+8 ra=*(cfa-8) rbp=same"]);
}

#[test]
fn what_follows_a_call_that_may_not_return_proves_nothing() {
    // f at 0: test edi, edi; je to the part's jump; sub rsp, 40; cmp edi, 7; je to the part; add rsp, 40; ret.
    let mut code = vec![0x85, 0xff, 0x74, 40, 0x48, 0x83, 0xec, 40, 0x83, 0xff, 7, 0x74, 21];
    code.extend([0x48, 0x83, 0xc4, 40, 0xc3]);
    code.resize(32, 0xcc);
    // note at 32, a function: ret. At 34, the part of f: mov edi, 3; call 32, which does not return here; jmp note.
    code.extend([0xc3, 0xcc, 0xbf, 3, 0, 0, 0, 0xe8, 0xf4, 0xff, 0xff, 0xff, 0xeb, 0xf2]);
    check(X86_64, &code, &symbols(&[(32, 1), (34, 12)]), &[&whole_row(32, 33)]);
    // Nor does a return there, nor behind a system call that ends the process: mov eax, 60; syscall; ret
    let exit = [0xb8, 60, 0, 0, 0, 0x0f, 0x05, 0xc3];
    check(X86_64, &exit, &symbols(&[(0, 8)]), &[]);
    check(X86_64, &[0xe8, 9, 0, 0, 0, 0xc3], &symbols(&[(0, 6)]), &[]);
    // What is called is a function all the same; and another way to the return is a proof: je over the call.
    check(X86_64, &exit, &called(0), &[&whole_row(0, 8)]);
    let around = [0x74, 5, 0xe8, 9, 0, 0, 0, 0xc3];
    check(X86_64, &around, &symbols(&[(0, 8)]), &[&whole_row(0, 8)]);
}

#[test]
fn a_jump_by_a_table_may_lead_behind_a_call_that_does_not_return() {
    // call +9; jmp rax. And je over the call.
    check(X86_64, &[0xe8, 9, 0, 0, 0, 0xff, 0xe0], &called(0), &[]);
    let bounded = Starts { called: BTreeSet::from([START]), ..symbols(&[(0, 9)]) };
    check(X86_64, &[0x74, 5, 0xe8, 9, 0, 0, 0, 0xff, 0xe0], &bounded, &[&whole_row(0, 9)]);
    check(X86_64, &[0x74, 7, 0xe8, 9, 0, 0, 0, 0x90, 0xc3, 0xff, 0xe0], &called(0), &[]);
    check(X86_64, &[0x90, 0xff, 0xe0], &called(0), &[&whole_row(0, 3)]);
}

#[test]
fn where_another_frame_jumps_to_is_no_function() {
    // f, unknown as it ends, at 0: push rbx; jne to 8. At 4, 7 and 8: nop; nop; ret.
    let code = [0x53, 0x75, 5, 0x06, 0x90, 0x90, 0xc3, 0x90, 0x90, 0xc3];
    let starts = Starts { called: [START, START + 4, START + 7].into(), ..symbols(&[(0, 4)]) };
    check(X86_64, &code, &starts, &[&whole_row(4, 7)]);
    // Without the push, it is the frame of a function.
    let code = [0x90, 0x75, 5, 0x06, 0x90, 0x90, 0xc3, 0x90, 0x90, 0xc3];
    check(X86_64, &code, &starts, &[&whole_row(4, 10)]);
}

#[test]
fn functions_that_contradict_each_other_are_left() {
    // push rbx; (called: pop rbx; ret is the end of the one, and what another symbol claims to be a function)
    let code = [0x53, 0x90, 0x5b, 0xc3, 0xc3];
    let whole = [
        "0..1 function cfa=rsp+8 ra=*(cfa-8) rbp=same",
        "1..3 function cfa=rsp+16 ra=*(cfa-8) rbp=same",
        "3..4 function cfa=rsp+8 ra=*(cfa-8) rbp=same",
    ];
    check(X86_64, &code, &symbols(&[(0, 4)]), &whole);
    // Called, and it jumps to the second instruction with no frame.
    let jumping = [0x53, 0x90, 0x90, 0x5b, 0xc3, 0xeb, 0xfa];
    let starts = Starts { called: BTreeSet::from([START + 5]), ..symbols(&[(0, 5)]) };
    check(X86_64, &jumping, &starts, &[]);
    // To where there is none to begin with.
    let starts = Starts { called: BTreeSet::from([START + 3]), ..symbols(&[(0, 4)]) };
    check(X86_64, &code, &starts, &whole);
}

#[test]
fn x86_64_what_coroutines_return_to() {
    // nop; mov rsp, rbx; mov rdi, [rsp]; test rdi, rdi; je; call; mov rdi, rax; call; hlt
    let mut code =
        vec![0x0f, 0x1f, 0x40, 0, 0x48, 0x89, 0xdc, 0x48, 0x8b, 0x3c, 0x24, 0x48, 0x85, 0xff, 0x74, 8];
    code.extend([0xe8, 0, 1, 0, 0, 0x48, 0x89, 0xc7, 0xe8, 0, 2, 0, 0, 0xf4]);
    check(X86_64, &code, &called(200), &["3..30 coroutine_end end"]);
    // Behind what may end in a call; and where it returns.
    let mut behind = code.clone();
    behind[3] = 0x90;
    behind[0..3].copy_from_slice(&[0x31, 0xc0, 0xc3]);
    check(X86_64, &behind, &called(200), &[]);
    code[29] = 0xc3;
    check(X86_64, &code, &called(200), &[]);
}

#[test]
fn x86_64_switches_of_stacks() {
    // push rbp; push rbx; mov [rdi], rsp; mov rsp, rsi; pop rbx; pop rbp; ret
    let code = [0x55, 0x53, 0x48, 0x89, 0x27, 0x48, 0x89, 0xf4, 0x5b, 0x5d, 0xc3];
    let expect = [
        "0..1 function cfa=rsp+8 ra=*(cfa-8) rbp=same",
        "1..2 function cfa=rsp+16 ra=*(cfa-8) rbp=*(cfa-16)",
        "2..9 function cfa=rsp+24 ra=*(cfa-8) rbp=*(cfa-16)",
        "9..10 function cfa=rsp+16 ra=*(cfa-8) rbp=*(cfa-16)",
        "10..11 function cfa=rsp+8 ra=*(cfa-8) rbp=same",
    ];
    check(X86_64, &code, &symbols(&[(0, 11)]), &expect);
    // To a stack that another function left.
    let mut other = code;
    other[8] = 0x90;
    check(X86_64, &other, &symbols(&[(0, 11)]), &[]);
}

#[test]
fn global_symbols_that_return_are_functions() {
    let global = |code: &[u8], expect: &[&str]| {
        let starts = Starts { global: BTreeSet::from([START]), ..symbols(&[(0, code.len() as u64)]) };
        check(X86_64, code, &starts, expect);
    };
    global(&[0xe8, 9, 0, 0, 0, 0xc3], &[&whole_row(0, 6)]);
    // Where a coroutine starts: call; ud2.
    global(&[0xe8, 9, 0, 0, 0, 0x0f, 0x0b], &[]);
}

/// musl's functions around `main`: one that jumps to where a register was pointed to, which calls one that never returns.
#[test]
fn x86_64_what_is_jumped_to_by_a_register_and_does_not_return() {
    // push rax; call 32; and at 16: lea rax, [0]; xor edx, edx; jmp rax
    let mut code = vec![0x50, 0xe8, 26, 0, 0, 0];
    code.resize(16, 0xcc);
    code.extend([0x48, 0x8d, 0x05, 0xe9, 0xff, 0xff, 0xff, 0x31, 0xd2, 0xff, 0xe0]);
    code.resize(32, 0xcc);
    // At 32: mov eax, 231; syscall; jmp 32
    code.extend([0xb8, 0xe7, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7]);
    let starts = Starts { global: BTreeSet::from([START + 16, START + 32]), ..symbols(&[(16, 11), (32, 9)]) };
    check(X86_64, &code, &starts, &[&whole_row(16, 27)]);
    // push rdx; pop rdx: the register is known to be as it was.
    code[23..25].copy_from_slice(&[0x52, 0x5a]);
    let rows = found(X86_64, &code, &starts);
    let starts_of_rows: Vec<u64> = rows.iter().map(|one| one.range.start - START).collect();
    assert_eq!(starts_of_rows, [0, 1, 16, 24, 25, 32]);
    check(X86_64, &code, &symbols(&[(16, 11), (32, 9)]), &[]);
}

fn whole_row(start: u64, end: u64) -> String {
    format!("{start}..{end} function cfa=rsp+8 ra=*(cfa-8) rbp=same")
}

#[test]
fn behind_a_system_call_the_stack_is_this_one_if_its_number_says_so() {
    // mov eax, n; mov r10, rcx; syscall; ret
    let call = |number: u8| [0xb8, number, 0, 0, 0, 0x49, 0x89, 0xca, 0x0f, 0x05, 0xc3];
    check(X86_64, &call(39), &called(0), &[&whole_row(0, 11)]);
    check(X86_64, &call(56), &called(0), &[]);
    // mov eax, [rdi] in place of mov r10, rcx: any number.
    let mut any = call(39);
    any[5..8].copy_from_slice(&[0x8b, 0x07, 0x90]);
    check(X86_64, &any, &called(0), &[]);
    let arm = |number: u32| words(&[0xd280_0008 | number << 5, 0xd400_0001, 0xd65f_03c0]);
    check(Aarch64, &arm(172), &called(0), &["0..12 function cfa=sp+0 ra=x30 x29=same"]);
    check(Aarch64, &arm(220), &called(0), &[]);
}

#[test]
fn aarch64_process_entry_linkage_and_functions() {
    // mov x29, 0; mov x30, 0; mov x0, sp; bl +2 instructions; udf; ret
    let code = words(&[0xd280_001d, 0xd280_001e, 0x9100_03e0, 0x9400_0002, 0, 0xd65f_03c0]);
    let starts = Starts { process: START, ..Starts::default() };
    check(Aarch64, &code, &starts, &["0..16 process_entry end", "20..24 function cfa=sp+0 ra=x30 x29=same"]);
    // stp x16, x30, [sp, -16]!; adrp x16; ldr x17; add x16; br x17; nops; and an entry
    let mut code = vec![0xa9bf_7bf0, 0x9000_0010, 0xf940_0211, 0x9100_0210, 0xd61f_0220];
    code.extend([0xd503_201f; 3]);
    code.extend([0x9000_0010, 0xf940_0211, 0x9100_0210, 0xd61f_0220]);
    let expect = [
        "0..4 linkage_table cfa=sp+0 ra=x30 x29=same",
        "4..32 linkage_table cfa=sp+16 ra=*(cfa-8) x29=same",
        "32..48 linkage_table cfa=sp+0 ra=x30 x29=same",
    ];
    check(Aarch64, &words(&code), &called(200), &expect);
    // paciasp; stp x29, x30, [sp, -32]!; mov x29, sp; blr x0; ldp x29, x30, [sp], 32; retaa
    let code = [0xd503_233f, 0xa9be_7bfd, 0x9100_03fd, 0xd63f_0000, 0xa8c2_7bfd, 0xd65f_0bff];
    let expect = [
        "0..8 function cfa=sp+0 ra=x30 x29=same",
        "8..12 function cfa=sp+32 ra=*(cfa-24) x29=*(cfa-32)",
        "12..20 function cfa=x29+32 ra=*(cfa-24) x29=*(cfa-32)",
        "20..24 function cfa=sp+0 ra=x30 x29=same",
    ];
    check(Aarch64, &words(&code), &called(0), &expect);
    // ldp x29, x30, [sp], 16 does not undo it; and x29 for something else without saving it.
    check(Aarch64, &words(&[0xa9be_7bfd, 0xa8c1_7bfd, 0xd65f_03c0]), &called(0), &[]);
    check(Aarch64, &words(&[0xd280_001d, 0xd65f_03c0]), &called(0), &[]);
}

/// Code of which each byte would be a row, and of several functions: what is kept is in proportion to it.
#[test]
fn rows_are_kept_in_proportion_to_the_code() {
    const FUNCTION_BYTES: usize = 16_001;
    let mut code = Vec::new();
    let mut starts = symbols(&[]);
    for number in 0..8 {
        let first = START + code.len() as u64;
        // push rax; pop rax
        code.extend([0x50, 0x58].repeat(FUNCTION_BYTES / 2));
        code.push(0xc3);
        let end = START + code.len() as u64;
        for at in 0..6 {
            starts.symbols.insert(first + 2 * at, end);
            starts.called.extend((number % 2 == 0).then_some(first + 2 * at));
        }
    }
    let rows = found(X86_64, &code, &starts).len();
    assert!(FUNCTION_BYTES <= rows && rows < code.len() / 3, "{rows}");
}

#[test]
fn padding_is_known() {
    let is_padding = |architecture, bytes: &[u8]| {
        let code = CodeBytes::new(vec![(START, bytes)]);
        super::is_padding(architecture, &code, &(START..START + bytes.len() as u64))
    };
    assert!(is_padding(X86_64, &[0x66, 0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0, 0x66, 0x90, 0x90, 0xcc, 0, 0]));
    assert!(!is_padding(X86_64, &[0x66, 0x90, 0xc3]));
    assert!(!is_padding(X86_64, &[0xf3, 0x0f, 0x1e, 0xfa]));
    assert!(is_padding(Aarch64, &words(&[0xd503_201f, 0])));
    assert!(!is_padding(Aarch64, &words(&[0xd65f_03c0])));
}

/// Instructions that matter, so that random code gets far.
fn instruction() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        proptest::collection::vec(any::<u8>(), 1..6),
        proptest::sample::select(vec![
            vec![0x55],
            vec![0x5d],
            vec![0x48, 0x89, 0xe5],
            vec![0xc9],
            vec![0xc3],
            vec![0x74, 1],
            vec![0xeb, 0xfc],
            vec![0xe8, 3, 0, 0, 0],
            vec![0xff, 0x25, 0, 0, 0, 0],
            vec![0xff, 0x35, 0, 0, 0, 0],
            0xa9bf_7bfd_u32.to_le_bytes().to_vec(),
            0xa8c1_7bfd_u32.to_le_bytes().to_vec(),
            0xd65f_03c0_u32.to_le_bytes().to_vec(),
            0x9100_03fd_u32.to_le_bytes().to_vec(),
        ]),
    ]
}

proptest! {
    #[test]
    fn any_code_gives_rows_in_order_within_it(
        code in proptest::collection::vec(instruction(), 0..40),
        at in proptest::collection::vec((0u64..100, 0u64..100), 0..6),
        is_arm in any::<bool>(),
    ) {
        let code = code.concat();
        let starts = Starts { process: START + 3, called: at.iter().map(|(at, _)| START + at).collect(), ..symbols(&at) };
        let mut end = START;
        for one in found(if is_arm { Aarch64 } else { X86_64 }, &code, &starts) {
            prop_assert!(end <= one.range.start && one.range.start < one.range.end && one.rule.is_exact());
            end = one.range.end;
        }
        prop_assert!(end <= START + code.len() as u64);
    }
}
