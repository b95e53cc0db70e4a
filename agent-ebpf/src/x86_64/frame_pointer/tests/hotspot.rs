//! HotSpot's code, as OpenJDK 17 makes it.

use super::*;

/// What the interpreter comes back to, at 0x1100: mov -0x10(%rbp), %rsp; movq $0, -0x10(%rbp); mov -0x40(%rbp), %r13;
/// mov -0x38(%rbp), %r14. No call is in front of it.
const RETURN_ENTRY: (usize, &[u8]) = (
    0x100,
    &[
        0x48, 0x8b, 0x65, 0xf0, 0x48, 0xc7, 0x45, 0xf0, 0, 0, 0, 0, 0x4c, 0x8b, 0x6d, 0xc0, 0x4c, 0x8b, 0x75,
        0xc8,
    ],
);

/// The rest of a piece of the interpreter: movzbl 1(%r13), %ebx; inc %r13; mov table, %r10; jmp *(%r10, %rbx, 8).
const NEXT: &[u8] = &[
    0x41, 0x0f, 0xb6, 0x5d, 1, 0x49, 0xff, 0xc5, 0x49, 0xba, 1, 2, 3, 4, 5, 6, 0, 0, 0x41, 0xff, 0x24, 0xda,
];

/// A method's way in: mov 8(%rbx), %rdx; pop %rax; lea -8(%rsp, %rcx, 8), %r14; test %edx, %edx; push %rax; push %rbp;
/// mov %rsp, %rbp.
const ENTRY: &[u8] =
    &[0x48, 0x8b, 0x53, 8, 0x58, 0x4c, 0x8d, 0x74, 0xcc, 0xf8, 0x85, 0xd2, 0x50, 0x55, 0x48, 0x8b, 0xec];

/// And out: leave; pop %r13; mov %rbx, %rsp; jmp *%r13.
const LEAVE: &[u8] = &[0xc9, 0x41, 0x5d, 0x48, 0x8b, 0xe3, 0x41, 0xff, 0xe5];

/// The frame in which word 9 has the caller's rbp.
const FRAME: [(usize, u64); 4] = [(9, word_at(20)), (10, RETURN), (20, word_at(28)), (21, RETURN)];

const fn word_at(number: usize) -> u64 {
    STACK + 8 * number as u64
}

/// The innermost frame's caller, with these values in (rax, r13, rsp, rbp).
fn innermost(memory: &Memory, rip: u64, values: [u64; 4]) -> Result<(u64, u64, u64), StopReason> {
    let mut general = [0; REGISTERS];
    [general[0], general[13], general[7], general[6]] = values;
    caller_of(memory, Registers::innermost(general, rip))
}

#[test]
fn each_instruction_of_the_interpreter() {
    let memory = |piece: &[u8]| Memory::new(&[RETURN_ENTRY, (0x400, piece)]).with_stack(&FRAME);
    let own = Ok((RETURN, word(11), word(20)));
    for at in [0, 5, 8, 18] {
        assert_eq!(innermost(&memory(NEXT), 0x1400 + at, [0, 0, word(2), word(9)]), own, "{at}");
    }
    // A return address on the stack is the interpreter's own, of a call it is about to make: mov %r13, -0x10(%rbp).
    let calls = memory(&[0x4c, 0x89, 0x6d, 0xf0, 0xff, 0x63, 0x50]).with_stack(&[(2, RETURN)]);
    assert_eq!(innermost(&calls, 0x1400, [0, 0, word(2), word(9)]), own);
    // Behind a byte that may return, only the stack says so.
    let behind_return = [&[0xc3][..], NEXT].concat();
    let is_called = memory(&[&[0x90], &behind_return[..]].concat());
    assert_eq!(innermost(&is_called, 0x1400, [0, 0, word(2), word(9)]), own);
    let is_called = is_called.with_stack(&[(2, RETURN)]);
    assert_eq!(innermost(&is_called, 0x1400, [0, 0, word(2), word(9)]), Err(StopReason::FramePointer));
    // jmp *%rax: what is behind is another piece. A table by an address relative to rip is a compiled method's.
    let other = [&[0x90, 0xff, 0xe0][..], NEXT].concat();
    assert_eq!(innermost(&memory(&other), 0x1400, [0, 0, word(2), word(9)]), Err(StopReason::Jit));
    let table = [0x4c, 0x8d, 0x15, 0, 0, 0, 0, 0x41, 0xff, 0x24, 0xda];
    assert_eq!(innermost(&memory(&table), 0x1400, [0, 0, word(2), word(9)]), Err(StopReason::Jit));
}

#[test]
fn the_interpreter_as_a_caller() {
    let memory = Memory::new(&[RETURN_ENTRY]).with_stack(&FRAME);
    assert_eq!(caller(&memory, RETURN, false, word(2), word(9)), Ok((RETURN, word(11), word(20))));
}

#[test]
fn the_way_into_an_interpreted_method_and_out() {
    let memory = Memory::new(&[RETURN_ENTRY, (0x400, ENTRY), (0x500, LEAVE)]).with_stack(&FRAME);
    let (outer, junk) = (word(20), 0x1234);
    // The address is on the stack, if r13 says that the interpreter was there; then it is in rax.
    for (at, values) in [
        (0x1400, [junk, word(11), word(10), outer]),
        (0x1404, [junk, word(11), word(10), outer]),
        (0x1405, [RETURN, word(11), word(11), outer]),
        (0x140c, [RETURN, word(11), word(11), outer]),
        (0x140d, [RETURN, word(11), word(10), outer]),
        (0x1500, [junk, junk, word(2), word(9)]),
        (0x1501, [junk, junk, word(10), outer]),
    ] {
        let found = innermost(&memory, at, values).map(|(rip, _, rbp)| (rip, rbp));
        assert_eq!(found, Ok((RETURN, outer)), "{at:#x}");
    }
    assert_eq!(innermost(&memory, 0x1400, [junk, junk, word(10), outer]), Err(StopReason::Jit));
    assert_eq!(innermost(&memory, 0x1405, [junk, word(11), word(11), outer]), Err(StopReason::FramePointer));
    for at in [0x1503, 0x1506] {
        let found = innermost(&memory, at, [junk, RETURN, word(11), outer]);
        assert_eq!(found, Ok((RETURN, word(11), outer)), "{at:#x}");
    }
}

/// A header: two addresses, one behind the other.
const HEADER: &[u8] = &[0, 1, 2, 3, 4, 0x7f, 0, 0, 0, 5, 6, 7, 8, 0x7f, 0, 0];

/// mov %eax, -0x14000(%rsp); push %rbp; mov %rsp, %rbp; sub $48, %rsp
const LARGE: &[u8] =
    &[0x89, 0x84, 0x24, 0, 0xc0, 0xfe, 0xff, 0x55, 0x48, 0x8b, 0xec, 0x48, 0x83, 0xec, 48, 0x90];

/// sub $24, %rsp; mov %rbp, 16(%rsp); mov %rsp, %rbp; add $16, %rbp
const SMALL: &[u8] = &[
    0x48, 0x81, 0xec, 24, 0, 0, 0, 0x48, 0x89, 0x6c, 0x24, 16, 0x48, 0x8b, 0xec, 0x48, 0x83, 0xc5, 16, 0x90,
];

/// add $16, %rsp; pop %rbp; cmp 0x340(%r15), %rsp; ja; ret; and the way to wait: mov n, %r10; mov %r10, 0x358(%r15); jmp
const END: &[u8] = &[
    0x48, 0x83, 0xc4, 16, 0x5d, 0x49, 0x3b, 0xa7, 0x40, 3, 0, 0, 0x0f, 0x87, 1, 0, 0, 0, 0xc3, 0x49, 0xba,
    0x35, 0x18, 0, 0, 0, 0, 0, 0, 0x4d, 0x89, 0x97, 0x58, 3, 0, 0, 0xe9, 1, 2, 3, 4,
];

#[test]
fn compiled_methods_whatever_an_earlier_call_left_on_the_stack() {
    let frame = [&FRAME[..], &[(4, RETURN), (5, RETURN)]].concat();
    let own = Ok((RETURN, word(11), word(20)));
    for entry in [LARGE, SMALL] {
        for (distance, expect) in [(0x20, own), (0x700, own)] {
            let code = [RETURN_ENTRY, (0x700, HEADER), (0x800, entry)];
            let memory = Memory::new(&code).with_stack(&frame);
            for exact in [true, false] {
                let found = caller(&memory, 0x1800 + distance, exact, word(3), word(9));
                assert_eq!(found, expect, "{distance:#x} {exact}");
            }
            // In another piece of code, and without a header: what is on the stack counts.
            let between = [&code[..], &[(0x810, HEADER)]].concat();
            for code in [&between[..], &[RETURN_ENTRY, (0x800, entry)]] {
                let memory = Memory::new(code).with_stack(&frame);
                assert!(caller(&memory, 0x1800 + distance, true, word(3), word(9)).is_err());
            }
        }
        // Without a frame pointer rbp may be anything.
        let mut other = entry.to_vec();
        let at = other.windows(3).position(|bytes| bytes == [0x48, 0x8b, 0xec]).expect("it sets rbp");
        other[at + 1] = 0x83;
        let memory = Memory::new(&[RETURN_ENTRY, (0x700, HEADER), (0x800, &other)]).with_stack(&FRAME);
        for exact in [true, false] {
            assert_eq!(caller(&memory, 0x1840, exact, word(3), word(9)), Err(StopReason::Jit));
        }
    }
}

#[test]
fn the_way_into_a_compiled_method_and_out() {
    let code = [RETURN_ENTRY, (0x700, HEADER), (0x800, LARGE), (0x900, SMALL), (0x830, END)];
    let memory = Memory::new(&code).with_stack(&FRAME);
    let outer = word(20);
    for (at, rsp, rbp) in [
        (0x1800, word(10), outer),
        (0x1807, word(10), outer),
        (0x1808, word(9), outer),
        (0x180b, word(9), word(9)),
        (0x1900, word(10), outer),
        (0x1907, word(7), outer),
        (0x190c, word(7), outer),
        (0x190f, word(7), word(7)),
        (0x1834, word(9), word(9)),
        (0x1835, word(10), outer),
        (0x183c, word(10), outer),
        (0x1842, word(10), outer),
        (0x1843, word(10), outer),
        (0x184d, word(10), outer),
        (0x1854, word(10), outer),
    ] {
        assert_eq!(caller(&memory, at, true, rsp, rbp), Ok((RETURN, word(11), outer)), "{at:#x}");
    }
    // pop %rbp; jmp. And what is stored for another reason: mov %r10, 0x118(%r15); jmp; mov %rbp, 16(%rsp)
    let others = [
        0x5d, 0xe9, 1, 2, 3, 4, 0x4d, 0x89, 0x97, 0x18, 1, 0, 0, 0xe9, 1, 2, 3, 4, 0x48, 0x89, 0x6c, 0x24, 16,
    ];
    let code = [RETURN_ENTRY, (0x700, HEADER), (0x800, LARGE), (0x820, &others[..])];
    let memory = Memory::new(&code).with_stack(&FRAME).with_stack(&[(3, RETURN), (6, RETURN)]);
    assert_eq!(caller(&memory, 0x1821, true, word(10), outer), Err(StopReason::Jit));
    for at in [0x1826, 0x182d, 0x1832] {
        assert_eq!(caller(&memory, at, true, word(3), word(9)), Ok((RETURN, word(11), outer)), "{at:#x}");
    }
}
