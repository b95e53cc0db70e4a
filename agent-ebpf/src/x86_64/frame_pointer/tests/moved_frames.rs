//! Frames that move down the stack to make room for arguments, as Cranelift 0.119 has them move, and what only looks alike.

use super::*;

/// The first word of a module of wasmtime.
const HEADER: u64 = u64::from_le_bytes([0x7f, b'E', b'L', b'F', 2, 1, 1, 200]);

/// push %rbp; mov %rsp, %rbp; sub $0x20, %rsp; mov %rsp, %rbp; mov 0x20(%rsp), %r11; mov %r11, (%rsp);
/// mov 0x28(%rsp), %r11; mov %r11, 8(%rsp); sub $0x10, %rsp; xor %eax, %eax
const SMALL: &[u8] = &[
    0x55, 0x48, 0x89, 0xe5, 0x48, 0x83, 0xec, 0x20, 0x48, 0x89, 0xe5, 0x4c, 0x8b, 0x5c, 0x24, 0x20, 0x4c,
    0x89, 0x1c, 0x24, 0x4c, 0x8b, 0x5c, 0x24, 0x28, 0x4c, 0x89, 0x5c, 0x24, 8, 0x48, 0x83, 0xec, 0x10, 0x31,
    0xc0,
];
/// The same with displacements of four bytes, and the other encoding of `mov %rsp, %rbp`.
const LARGE: &[u8] = &[
    0x55, 0x48, 0x8b, 0xec, 0x48, 0x81, 0xec, 0x20, 0, 0, 0, 0x48, 0x8b, 0xec, 0x4c, 0x8b, 0x9c, 0x24, 0x20,
    0, 0, 0, 0x4c, 0x89, 0x1c, 0x24, 0x4c, 0x8b, 0x9c, 0x24, 0x28, 0, 0, 0, 0x4c, 0x89, 0x5c, 0x24, 8, 0x48,
    0x83, 0xec, 0x10, 0x31, 0xc0,
];

/// Which instructions begin where: behind the first `push`, the first `mov`, `sub`, the second `mov`, the four moves, and
/// the second `sub`.
const SMALL_AT: [u64; 9] = [1, 4, 8, 11, 16, 20, 25, 30, 34];
const LARGE_AT: [u64; 9] = [1, 4, 11, 14, 22, 26, 34, 39, 43];

/// The function at `start` in a module, or in other code; called when rsp was word 11. Its frame is at word 9 before it
/// moves, then at word 5.
fn memory(start: usize, code: &[u8], in_front: Option<u64>) -> Memory {
    let memory = Memory::new(&[CALL, (start, code)]).with_stack(&[
        (9, word(20)),
        (10, RETURN),
        (20, word(28)),
        (21, RETURN),
    ]);
    Memory { in_front, ..memory }
}

#[test]
fn every_instruction_of_a_frame_that_moves() {
    for (code, at) in [(SMALL, SMALL_AT), (LARGE, LARGE_AT)] {
        // Also at the first bytes of a mapping, and at each alignment behind them.
        for (start, in_front) in (0..32).flat_map(|start| [(start, None), (start, Some(HEADER))]) {
            let before = memory(start, code, in_front);
            let address = |number: usize| CODE + start as u64 + at[number];
            let built = Ok((RETURN, word(11), word(20)));
            assert_eq!(caller(&before, address(0), true, word(9), word(20)), built, "{start}");
            assert_eq!(caller(&before, address(1), true, word(9), word(9)), built, "{start}");
            assert_eq!(caller(&before, address(2), true, word(5), word(9)), built, "{start}");
            // What earlier calls have left where it goes: a frame of another, whole or in part.
            for stale in [[0, 0], [word(25), RETURN], [word(20), RETURN]] {
                let moving = memory(start, code, in_front).with_stack(&[(5, stale[0]), (6, stale[1])]);
                for number in 3..7 {
                    let found = caller(&moving, address(number), true, word(5), word(5));
                    assert_eq!(found, Err(StopReason::Jit), "{start} {number} {stale:x?}");
                }
            }
            let moved = memory(start, code, in_front).with_stack(&[(5, word(20)), (6, RETURN)]);
            let behind = caller(&moved, address(8), true, word(3), word(5));
            assert_eq!(behind, Ok((RETURN, word(7), word(20))), "{start}");
        }
    }
}

/// Where a function only keeps a frame pointer, rbp is rsp too.
#[test]
fn functions_that_allocate_nothing() {
    // push %rbp; mov %rsp, %rbp; mov %edi, %eax (9 times); mov %rbp, %rsp; pop %rbp; jmp
    for set in [[0x48, 0x89, 0xe5], [0x48, 0x8b, 0xec]] {
        let body = [0x89, 0xf8].repeat(9);
        let leaf = [&[0x55][..], &set, &body, &[0x48, 0x89, 0xec, 0x5d, 0xe9, 0, 0, 0, 0]].concat();
        // The second one is behind the first one's end, and its own prologue.
        let two = [&leaf[..], &leaf].concat();
        for (code, from) in [(&leaf, 0), (&two, leaf.len())] {
            for (start, in_front) in (0..16).flat_map(|start| [(start, None), (start, Some(HEADER))]) {
                let memory = memory(start, code, in_front);
                for at in (4..=22).step_by(2).chain([25]) {
                    let rip = CODE + (start + from + at) as u64;
                    let found = caller(&memory, rip, true, word(9), word(9));
                    assert_eq!(found, Ok((RETURN, word(11), word(20))), "{start} {at}");
                }
            }
        }
    }
}

/// mov %rbp, 0x10(%rsp); mov %rsp, %rbp; add $0x10, %rbp; nop
#[test]
fn a_frame_pointer_that_is_not_whole() {
    let code: &[u8] = &[
        0x55, 0x48, 0x89, 0xe5, 0x48, 0x89, 0x6c, 0x24, 0x10, 0x48, 0x8b, 0xec, 0x48, 0x83, 0xc5, 0x10, 0x90,
    ];
    let is_half = memory(0x400, code, None).with_stack(&[(7, word(25)), (8, RETURN)]);
    assert_eq!(caller(&is_half, CODE + 0x40c, true, word(7), word(7)), Err(StopReason::Jit));
    let is_whole = memory(0x400, code, None).with_stack(&[(7, word(25)), (8, 0)]);
    assert_eq!(caller(&is_whole, CODE + 0x410, true, word(7), word(9)), Ok((RETURN, word(11), word(20))));
}
