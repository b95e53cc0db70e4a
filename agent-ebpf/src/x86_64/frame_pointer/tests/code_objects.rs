//! The innermost frame in functions that V8 made, as node 20 has them, byte for byte.

use super::*;

/// Where the function starts: aligned as V8 aligns.
const START: u64 = 0x1400;
/// Its `Code` object.
const OBJECT: u64 = 0x1800;

/// mov -8(%rcx), %rbx; testb $1, 0x35(%rbx); jne ..; push %rbp; mov %rsp, %rbp; push %rsi; push %rdi; push %rax;
/// sub $0x10, %rsp; mov $2, %eax; mov -0x18(%rbp), %rcx; mov %rbp, %rsp; pop %rbp; cmp $1, %rcx; jg ..; ret $8;
/// pop %r10; lea (%rsp, %rcx, 8), %rsp; push %r10; ret; mov $1, %eax; int3
const OPTIMISED: &[u8] = &[
    0x48, 0x8b, 0x59, 0xf8, 0xf6, 0x43, 0x35, 0x01, 0x0f, 0x85, 0, 1, 0, 0, 0x55, 0x48, 0x89, 0xe5, 0x56,
    0x57, 0x50, 0x48, 0x83, 0xec, 0x10, 0xb8, 2, 0, 0, 0, 0x48, 0x8b, 0x4d, 0xe8, 0x48, 0x8b, 0xe5, 0x5d,
    0x48, 0x83, 0xf9, 0x01, 0x7f, 0x03, 0xc2, 0x08, 0x00, 0x41, 0x5a, 0x48, 0x8d, 0x24, 0xcc, 0x41, 0x52,
    0xc3, 0xb8, 1, 0, 0, 0, 0xcc,
];

/// xor %ebx, %ebx; mov $.., %r12; call ..; mov %rax, (%rbp): up to the call, a function without a frame.
const BASELINE: &[u8] = &[
    0x33, 0xdb, 0x49, 0xbc, 9, 0xd7, 0x10, 0x1a, 0xb5, 0x37, 0, 0, 0xe8, 0xef, 0x17, 0, 0, 0x48, 0x89, 0x45,
    0,
];

/// mov $32, %ebx; mov $.., %r12; call *..(%r13); mov %rax, (%rbp)
const BASELINE_FAR: &[u8] = &[
    0xbb, 0x20, 0, 0, 0, 0x49, 0xbc, 9, 0xd7, 0x10, 0x1a, 0xb5, 0x37, 0, 0, 0x41, 0xff, 0x95, 0xf0, 0x4e, 0,
    0, 0x48, 0x89, 0x45, 0,
];

/// jmp 0x20; sub $4, %rcx; and at 0x20 push %rbp; mov %rsp, %rbp; push %rbx
const EXPRESSION: &[u8] = &[
    0xe9, 0x1b, 0, 0, 0, 0x48, 0x83, 0xe9, 0x04, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0x55, 0x48, 0x89, 0xe5, 0x53,
];

/// `function` as V8 has it on its heap, called by `CALL` when rsp was word 11, and in its frame rbp is word 9 and
/// rsp word 4. Each word of the frame looks like a return address, as those do that calls before have left.
fn called_object(function: &[u8]) -> Memory {
    let (map, object) = ((OBJECT + 0x101).to_le_bytes(), (OBJECT + 1).to_le_bytes());
    let (before, at) = ((START - CODE) as usize, (OBJECT - CODE) as usize);
    let start = START.to_le_bytes();
    let code = [
        CALL,
        WITH_FRAME,
        (before - 16, &map[..]),
        (before - 8, &object[..]),
        (before, function),
        (at + 0x28, &start[..]),
    ];
    let left = [4, 5, 6, 7, 8].map(|number| (number, RETURN));
    let stack = [(9, word(20)), (10, RETURN), (20, word(28)), (21, RETURN)];
    Memory::new(&code).keeping(no_table::JIT_FRAME_POINTERS).with_stack(&left).with_stack(&stack)
}

const IN_FRAME: (u64, u64) = (4, 9);

/// The caller at each of these offsets, with rsp and rbp at these words, is the one that made the call.
#[track_caller]
fn check(function: &[u8], frames: &[(u64, (u64, u64))]) {
    let memory = called_object(function);
    for (offset, (rsp, rbp)) in frames {
        let found = caller(&memory, START + offset, true, word(*rsp as usize), word(*rbp as usize));
        let address_and_frame = found.map(|(rip, _, rbp)| (rip, rbp));
        assert_eq!(address_and_frame, Ok((RETURN, word(20))), "{offset:#x}");
    }
}

#[test]
fn every_instruction_of_optimised_code() {
    let (entered, pushed) = ((10, 20), (9, 20));
    check(OPTIMISED, &[(0, entered), (4, entered), (8, entered), (14, entered), (15, pushed)]);
    check(OPTIMISED, &[18, 19, 20, 21, 25, 30].map(|offset| (offset, IN_FRAME)));
    check(OPTIMISED, &[(34, IN_FRAME), (37, (9, 9))]);
    check(OPTIMISED, &[38, 42, 44, 47].map(|offset| (offset, entered)));
    check(OPTIMISED, &[(53 + 2, entered), (56, IN_FRAME), (61, IN_FRAME)]);
    // With the return address in r10, and other words where it was.
    let memory = called_object(OPTIMISED).with_stack(&[(10, 7), (11, 7), (12, 7)]);
    for (offset, rsp) in [(49, 11), (53, 12)] {
        let mut general = [0; REGISTERS];
        (general[7], general[6], general[10]) = (word(rsp), word(20), RETURN);
        let found = caller_of(&memory, Registers::innermost(general, START + offset));
        assert_eq!(found, Ok((RETURN, word(rsp), word(20))), "{offset}");
    }
}

#[test]
fn baseline_code_has_its_frame_behind_a_call() {
    let entered = (10, 20);
    check(BASELINE, &[(0, entered), (2, entered), (12, entered), (17, IN_FRAME)]);
    check(BASELINE_FAR, &[(0, entered), (5, entered), (15, entered), (22, IN_FRAME)]);
}

#[test]
fn regular_expressions_jump_to_where_they_build_a_frame() {
    let (entered, pushed) = ((10, 20), (9, 20));
    check(EXPRESSION, &[(0, entered), (0x20, entered), (0x21, pushed), (5, IN_FRAME), (0x24, IN_FRAME)]);
}

/// What is not certain to be the start of a function is looked at as code of any compiler: what calls have left on the
/// stack is too much doubt.
#[test]
fn an_object_has_to_hold_the_start() {
    let stop = Err(StopReason::FramePointer);
    let in_frame = |memory: &Memory, offset| caller(memory, START + offset, true, word(4), word(9));
    let before = (START - CODE) as usize;
    let held = (OBJECT - CODE) as usize + 0x28;
    for (at, bytes) in [(held, START + 64), (before - 8, OBJECT), (before - 8, 1 << 48 | 1), (before - 16, 0)]
    {
        let mut memory = called_object(BASELINE);
        memory.code[at..at + 8].copy_from_slice(&bytes.to_le_bytes());
        assert_eq!(in_frame(&memory, 17), stop, "{at:#x}");
    }
    // Functions that begin in another way.
    assert_eq!(in_frame(&called_object(&[0x90, 0x33, 0xdb]), 3), stop);
    let mut memory = called_object(EXPRESSION);
    memory.code[before + 0x20] = 0x90;
    assert_eq!(in_frame(&memory, 5), stop);
}

/// Behind `pop %rbp` there is no telling, but for instructions that are known.
#[test]
fn an_unknown_end_is_too_much_doubt() {
    let mut function = OPTIMISED.to_vec();
    // cmp %rcx, %rax instead of cmp $1, %rcx
    function[38..42].copy_from_slice(&[0x48, 0x3b, 0xc1, 0x90]);
    let memory = called_object(&function);
    assert_eq!(caller(&memory, START + 38, true, word(10), word(20)), Err(StopReason::FramePointer));
    assert_eq!(caller(&memory, START + 41, true, word(10), word(20)), Err(StopReason::FramePointer));
}

/// mov (%r8, %r11, 8), %r10; mov %r10, (%rsp, %r11, 8); inc %r11; cmp %r9, %r11; jl back
const COPYING: &[u8] =
    &[0x4f, 0x8b, 0x14, 0xd8, 0x4e, 0x89, 0x14, 0xdc, 0x49, 0xff, 0xc3, 0x4d, 0x3b, 0xd9, 0x7c, 0xf0];

/// In a built-in function, the return address is where r8 points until the first word has been copied.
#[test]
fn a_return_address_that_is_copied() {
    let at = (START - CODE) as usize;
    let memory = |code: &[u8]| {
        let memory = Memory::new(&[CALL, WITH_FRAME, (at, code)])
            .keeping(no_table::location(StopReason::FramePointer));
        memory.with_stack(&[(20, word(28)), (21, RETURN)])
    };
    let found = |memory: &Memory, offset: u64, counted: u64| {
        let mut general = [0; REGISTERS];
        (general[7], general[6], general[8], general[11]) = (word(4), word(20), word(6), counted);
        caller_of(memory, Registers::innermost(general, START + offset))
    };
    let (old, new) = (memory(COPYING).with_stack(&[(6, RETURN)]), memory(COPYING).with_stack(&[(4, RETURN)]));
    for offset in [0, 4, 8, 11, 14] {
        assert_eq!(found(&old, offset, 0), Ok((RETURN, word(7), word(20))), "{offset}");
        assert_eq!(found(&new, offset, 1), Ok((RETURN, word(5), word(20))), "{offset}");
        assert_eq!(found(&old, offset, 1), Err(StopReason::FramePointer), "{offset}");
        assert_eq!(found(&new, offset, 0), Err(StopReason::FramePointer), "{offset}");
    }
    // Other loops: another register counts up, or is jumped by.
    for (byte, other) in [(3, 0xd0), (7, 0xd4), (10, 0xc2), (12, 0x39), (15, 0xef)] {
        let mut code = COPYING.to_vec();
        code[byte] = other;
        let old = memory(&code).with_stack(&[(6, RETURN)]);
        assert_eq!(found(&old, 0, 0), Err(StopReason::FramePointer), "{byte}");
    }
}
