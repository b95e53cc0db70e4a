//! Barriers of a collector that moves objects, as OpenJDK 17's two compilers make them.

use super::*;

/// sub $32, %rsp; mov %r10, 24(%rsp); vmovdqu %ymm1, (%rsp); lea 16(%r9), %rsi; call: how a collector's barrier begins.
const SAVING: [&[u8]; 5] = [
    &[0x48, 0x83, 0xec, 32],
    &[0x4c, 0x89, 0x54, 0x24, 24],
    &[0xc5, 0xfe, 0x7f, 0x0c, 0x24],
    &[0x49, 0x8d, 0x71, 0x10],
    &[0xe8, 1, 2, 3, 4],
];
/// mov %rax, %rcx; and what may be loaded, in all encodings: mov (%rsp), %rdx; mov 24(%rsp), %r10; mov 256(%rsp), %rbx;
/// vmovdqu (%rsp), %ymm1; vmovdqu 16(%rsp), %xmm9; kmovq 8(%rsp), %k1; vmovdqu64 128(%rsp), %zmm2; movdqu 16(%rsp), %xmm1;
/// movdqu 256(%rsp), %xmm9; vzeroupper.
const RESTORING: [&[u8]; 11] = [
    &[0x48, 0x8b, 0xc8],
    &[0x48, 0x8b, 0x14, 0x24],
    &[0x4c, 0x8b, 0x54, 0x24, 24],
    &[0x48, 0x8b, 0x9c, 0x24, 0, 1, 0, 0],
    &[0xc5, 0xfe, 0x6f, 0x0c, 0x24],
    &[0xc5, 0x7a, 0x6f, 0x4c, 0x24, 16],
    &[0xc4, 0xe1, 0xf8, 0x90, 0x4c, 0x24, 8],
    &[0x62, 0xf1, 0xfe, 0x48, 0x6f, 0x54, 0x24, 2],
    &[0xf3, 0x0f, 0x6f, 0x4c, 0x24, 16],
    &[0xf3, 0x44, 0x0f, 0x6f, 0x8c, 0x24, 0, 1, 0, 0],
    &[0xc5, 0xf8, 0x77],
];
/// add $32, %rsp; jmp, in two encodings each.
const FREEING: [[&[u8]; 2]; 2] =
    [[&[0x48, 0x83, 0xc4, 32], &[0xe9, 1, 2, 3, 4]], [&[0x48, 0x81, 0xc4, 32, 0, 0, 0], &[0xeb, 0x80]]];

/// Below the frame lies what a barrier keeps there, and old return addresses where the caller's would be without.
#[test]
fn a_barrier_in_a_compiled_method() {
    let (at, blob) = header(0x780, [0x800, 0x1f00], 15, 6);
    let large = without_frame_pointer(LARGE);
    let own = Ok((RETURN, word(11), word(20)));
    for freeing in FREEING {
        let barrier = [&SAVING[..], &RESTORING, &freeing].concat();
        let bytes = barrier.concat();
        let code = [RETURN_ENTRY, (at, &blob[..]), (0x800, &large), (0x900, &bytes)];
        let memory = Memory::new(&code).with_stack(&FRAME).with_stack(&[(5, word(20)), (6, RETURN)]);
        let mut rip = 0x1900;
        for (number, instruction) in barrier.iter().enumerate() {
            let is_inside = number != 0 && number + 1 != barrier.len();
            let found = caller(&memory, rip, true, if is_inside { word(1) } else { word(5) }, 3);
            if (1..SAVING.len()).contains(&number) {
                assert_eq!(found, Err(StopReason::Jit), "{number}");
            } else {
                assert_eq!(found, own, "{number}");
            }
            rip += instruction.len() as u64;
        }
        let returned = 0x1900 + SAVING.concat().len() as u64;
        assert_eq!(caller(&memory, returned, false, word(1), 3), own);
        // Behind all of it there is the frame alone again.
        assert_eq!(caller(&memory, rip + 8, true, word(5), 3), own);
    }
}

/// push %rax; sub $16, %rsp; mov %rcx, 8(%rsp); call; add $16, %rsp; mov %rax, %rdi; pop %rax; jmp
#[test]
fn a_barrier_that_pushes_first() {
    let (at, blob) = header(0x780, [0x800, 0x1f00], 15, 6);
    let large = without_frame_pointer(LARGE);
    let barrier = [
        0x50, 0x48, 0x83, 0xec, 16, 0x48, 0x89, 0x4c, 0x24, 8, 0xe8, 1, 2, 3, 4, 0x48, 0x83, 0xc4, 16, 0x48,
        0x8b, 0xf8, 0x58, 0xe9, 1, 2, 3, 4,
    ];
    let code = [RETURN_ENTRY, (at, &blob[..]), (0x800, &large), (0x900, &barrier)];
    let memory = Memory::new(&code).with_stack(&FRAME).with_stack(&[(6, word(20)), (7, RETURN)]);
    let own = Ok((RETURN, word(11), word(20)));
    assert_eq!(caller(&memory, 0x190f, false, word(2), 3), own);
    for (offset, rsp) in [(1, word(4)), (5, word(2)), (15, word(2)), (19, word(4)), (22, word(4))] {
        assert!(caller(&memory, 0x1900 + offset, true, rsp, 3).is_err(), "{offset}");
    }
    assert_eq!(caller(&memory, 0x1917, true, word(5), 3), own);
}

/// mov 8(%rsp), %r10; add $32, %rsp; pop %rbp: the method's own end; and what is no end of a barrier's either.
#[test]
fn what_only_begins_like_a_barriers_end() {
    let (at, blob) = header(0x780, [0x800, 0x1f00], 15, 10);
    let large = without_frame_pointer(LARGE);
    let restore = [0x4c, 0x8b, 0x54, 0x24, 8];
    for end in [
        &[0x48, 0x83, 0xc4, 64, 0x5d, 0xe9, 1, 2, 3, 4][..],
        &[0x48, 0x83, 0xc4, 0x80, 0xe9, 1, 2, 3, 4],
        &[0x48, 0x81, 0xc4, 0x80, 0xff, 0xff, 0xff, 0xe9, 1, 2, 3, 4],
        &[0x48, 0x83, 0xec, 32, 0xe9, 1, 2, 3, 4],
        &[0x4c, 0x8b, 0x54, 0x25, 8, 0x48, 0x83, 0xc4, 32, 0xe9, 1, 2, 3, 4],
        &[0x4c, 0x89, 0x54, 0x24, 8, 0x48, 0x83, 0xc4, 32, 0xe9, 1, 2, 3, 4],
        &[0xe9, 1, 2, 3, 4],
    ] {
        let bytes = [&restore[..], end].concat();
        let code = [RETURN_ENTRY, (at, &blob[..]), (0x800, &large), (0x900, &bytes)];
        let memory = Memory::new(&code).with_stack(&FRAME);
        for exact in [true, false] {
            let found = caller(&memory, 0x1900, exact, word(1), 3);
            assert_eq!(found, Ok((RETURN, word(11), word(20))), "{end:x?} {exact}");
        }
    }
}

/// What C1's code calls to see to a reference: a stub with a frame whose size is not said, full of what was in registers.
#[test]
fn a_stub_whose_frame_has_no_size() {
    let (at, blob) = header(0x780, [0x800, 0x900], -1, u32::MAX);
    let found = |beginning: &[u8], exact| {
        let memory = Memory::new(&[RETURN_ENTRY, (at, &blob), (0x800, beginning)]);
        let memory = memory.with_stack(&FRAME).with_stack(&[(4, RETURN)]);
        caller(&memory, 0x1850, exact, word(1), word(9))
    };
    let prologue: &[u8] = &[0x55, 0x48, 0x8b, 0xec];
    assert_eq!(found(prologue, false), Ok((RETURN, word(11), word(20))));
    // It may have left its frame again.
    assert_eq!(found(prologue, true), Err(StopReason::FramePointer));
    // push %rax; push %rbp; mov %rsp, %rbp
    assert_eq!(found(&[0x50, 0x55, 0x48, 0x8b, 0xec], false), Err(StopReason::FramePointer));
}
