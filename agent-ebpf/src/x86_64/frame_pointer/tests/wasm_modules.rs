//! Modules of wasmtime, as its version 50 lays them out.

use super::*;

/// The first bytes of their header.
const HEADER: u64 = u64::from_le_bytes([0x7f, b'E', b'L', b'F', 2, 1, 1, 200]);

/// push %rbp; mov %rsp, %rbp; sub $0x20, %rsp; ret's byte in an operand; call; mov (%rsp), %rbx; add $0x20, %rsp;
/// mov %rbp, %rsp; pop %rbp; ret
const FUNCTION: &[u8] = &[
    0x55, 0x48, 0x89, 0xe5, 0x48, 0x83, 0xec, 0x20, 0xb8, 0xc9, 0x5d, 0, 0, 0xe8, 0, 0, 0, 0, 0x48, 0x8b,
    0x1c, 0x24, 0x48, 0x83, 0xc4, 0x20, 0x48, 0x89, 0xec, 0x5d, 0xc3,
];
/// Behind the call, and the function's first and last instruction.
const BEHIND_CALL: u64 = 0x1412;
const START: u64 = 0x1400;
const END: u64 = 0x141e;

/// Called when rsp was word 11: in its frame rbp is word 9 and rsp word 5.
fn called() -> Memory {
    let stack = [(9, word(20)), (10, RETURN), (20, word(28)), (21, RETURN)];
    let memory = Memory::new(&[CALL, (0x400, FUNCTION)]).with_stack(&stack);
    Memory { in_front: Some(HEADER), ..memory }
}

#[test]
fn a_caller_whose_frame_holds_a_return_address_of_before() {
    let expect = Ok((RETURN, word(11), word(20)));
    let memory = called().with_stack(&[(6, RETURN)]);
    assert_eq!(caller(&memory, BEHIND_CALL, false, word(5), word(9)), expect);
    // Of another compiler's code that would be too much doubt.
    for in_front in [None, Some(0), Some(HEADER ^ 200 << 56)] {
        let other = Memory { in_front, ..called().with_stack(&[(6, RETURN)]) };
        assert_eq!(caller(&other, BEHIND_CALL, false, word(5), word(9)), Err(StopReason::FramePointer));
    }
    // Also where V8 is in the same process.
    let beside_v8 = called().with_stack(&[(6, RETURN)]).keeping(no_table::ANY_JIT_FRAME_POINTERS);
    assert_eq!(caller(&beside_v8, BEHIND_CALL, false, word(5), word(9)), expect);
}

#[test]
fn the_innermost_frame() {
    let expect = Ok((RETURN, word(11), word(20)));
    let (outer, own) = (word(20), word(9));
    for (at, rsp, rbp) in [
        (START, word(10), outer),
        (START + 1, word(9), outer),
        (START + 4, word(9), own),
        (BEHIND_CALL, word(5), own),
        (END - 1, word(9), own),
        (END, word(10), outer),
    ] {
        assert_eq!(caller(&called(), at, true, rsp, rbp), expect, "{at:#x}");
    }
    // Where a word may be its return address, rbp may be the caller's.
    let doubtful = called().with_stack(&[(6, RETURN)]);
    assert_eq!(caller(&doubtful, BEHIND_CALL, true, word(5), own), Err(StopReason::FramePointer));
}

/// A function's prologue is further in front than a search goes.
#[test]
fn a_large_function() {
    let nops = [0x40; 0x1200];
    let memory = |in_front| Memory {
        in_front,
        ..Memory::new(&[CALL, (0x400, &FUNCTION[..8]), (0x408, &nops)])
            .with_stack(&[(9, word(20)), (10, RETURN)])
    };
    let expect = Ok((RETURN, word(11), word(20)));
    for exact in [false, true] {
        assert_eq!(caller(&memory(Some(HEADER)), 0x2500, exact, word(5), word(9)), expect);
        assert_eq!(caller(&memory(None), 0x2500, exact, word(5), word(9)), Err(StopReason::Jit));
    }
}
