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
    general[3] = word(11);
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

/// What lies in front of a blob's code, which begins and ends at these offsets, with its frame complete there. The frame has so
/// many words.
fn header(at: usize, code: [usize; 2], complete: i32, frame_words: u32) -> (usize, Vec<u8>) {
    let [begin, end] = code.map(|at| CODE + at as u64);
    let length = (end - CODE - at as u64).div_ceil(128);
    let sizes = u64::from(complete as u32) << 32 | 0x160;
    // Of what is used a byte is written.
    let used = 0x1234_5601;
    let name = CODE + NAME as u64;
    let words = [length, used, 0, 0, sizes, u64::from(frame_words) << 32, begin, end, 0, 0, 0, 0, 0, 0, name];
    (at, words.iter().flat_map(|word| word.to_le_bytes()).collect())
}

/// Where a blob's name is.
const NAME: usize = 0xf0;

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

/// sub $8, %rsp; mov %rbp, (%rsp); mov %rsp, %rbp
const SMALLEST: &[u8] = &[0x48, 0x81, 0xec, 8, 0, 0, 0, 0x48, 0x89, 0x2c, 0x24, 0x48, 0x8b, 0xec, 0x90, 0x90];

/// sub $152, %rsp; mov %rbp, 144(%rsp); mov %rsp, %rbp; add $144, %rbp
const FAR: &[u8] = &[
    0x48, 0x81, 0xec, 152, 0, 0, 0, 0x48, 0x89, 0xac, 0x24, 144, 0, 0, 0, 0x48, 0x8b, 0xec, 0x48, 0x81, 0xc5,
    144, 0, 0, 0, 0x90,
];

/// The same that leaves rbp as it is.
fn without_frame_pointer(entry: &[u8]) -> Vec<u8> {
    let mut other = entry.to_vec();
    let at = other.windows(3).position(|bytes| bytes == [0x48, 0x8b, 0xec]).expect("it sets rbp");
    other.drain(at..at + 3);
    other
}

#[test]
fn compiled_methods_whatever_an_earlier_call_left_on_the_stack() {
    let frame = [&FRAME[..], &[(4, RETURN), (5, RETURN)]].concat();
    let own = Ok((RETURN, word(11), word(20)));
    for (entry, complete) in [
        (LARGE, 15),
        (LARGE, 18),
        (SMALL, 12),
        (SMALL, 19),
        (FAR, 25),
        // Behind the frame it looks whether a collector has changed the method.
        (LARGE, 35),
        (SMALL, 35),
        (SMALLEST, 35),
        (FAR, 51),
        (SMALLEST, -1),
    ] {
        // From word 1 on, and two more for the address and rbp.
        let (at, blob) = header(0x780, [0x800, 0x1f00], complete, 10);
        for distance in [0x40, 0x700, 0x16ff] {
            let code = [RETURN_ENTRY, (at, &blob[..]), (0x800, entry)];
            let memory = Memory::new(&code).with_stack(&frame);
            for exact in [true, false] {
                let found = caller(&memory, 0x1800 + distance, exact, word(1), word(9));
                assert_eq!(found, own, "{distance:#x} {exact}");
            }
            // A method that is not to be entered any more, and in which calls are under way.
            let left = [&[0xe9, 1, 2, 3, 4], &entry[5..]].concat();
            for (left, rbp) in [(&left, word(9)), (&without_frame_pointer(&left), 3)] {
                let memory = Memory::new(&[RETURN_ENTRY, (at, &blob), (0x800, left)]).with_stack(&frame);
                for exact in [true, false] {
                    let found = caller(&memory, 0x1800 + distance, exact, word(1), rbp);
                    assert_eq!(found, own, "{distance:#x} {exact} {rbp:#x}");
                }
            }
            // A jump table behind the header, where one would be of another.
            let table: Vec<u8> =
                [CODE + 0x810, CODE + 0x1f00].iter().flat_map(|at| at.to_le_bytes()).collect();
            let (at, blob) = header(0x680, [0x800, 0x1f00], complete, 10);
            let tabled = [RETURN_ENTRY, (at, &blob[..]), (0x7b0, &table), (0x800, entry)];
            let memory = Memory::new(&tabled).with_stack(&frame);
            assert_eq!(caller(&memory, 0x1800 + distance, true, word(1), word(9)), own);
            // Words of code in between, where one of a header would be.
            let word_of_code = (
                0x30 + (0x800 + distance as usize / 2 & !0x7f),
                &[5, 0, 0, 0, 0, 0, 0, 0, 0x90, 0, 0, 0, 0, 0, 0, 0x48][..],
            );
            if distance > 0x100 {
                let memory = Memory::new(&[&code[..], &[word_of_code]].concat()).with_stack(&frame);
                assert_eq!(caller(&memory, 0x1800 + distance, true, word(1), word(9)), own);
            }
            // Where rbp is anything, by the frame's size.
            let other = without_frame_pointer(entry);
            let memory = Memory::new(&[RETURN_ENTRY, (at, &blob), (0x800, &other)]).with_stack(&frame);
            for (exact, rbp) in [(true, 3), (false, 3), (true, word(6)), (false, word(6))] {
                let found = caller(&memory, 0x1800 + distance, exact, word(1), rbp);
                assert_eq!(found, own, "{distance:#x} {exact} {rbp:#x}");
            }
            // Between calls there may be more on the stack, and behind one, another's arguments.
            assert!(caller(&memory, 0x1800 + distance, true, word(0), word(9)).is_err());
            assert!(caller(&memory, 0x1800 + distance, false, word(0), word(9)).is_err());
        }
        // Without a header, or with one of other code: what is on the stack counts.
        let others = [
            header(0x780, [0x800, 0x820], complete, 10),
            header(0x790, [0x800, 0x1f00], complete, 10),
            header(0x780, [0x800, 0x1f00], complete, 0),
        ];
        for (at, blob) in others {
            let memory = Memory::new(&[RETURN_ENTRY, (at, &blob), (0x800, entry)]).with_stack(&frame);
            assert!(caller(&memory, 0x1840, true, word(1), word(9)).is_err());
        }
    }
}

/// sub $8, %rsp, with one byte; mov %rbp, (%rsp): what takes away the frame of a compiled method that cannot go on begins so,
/// and its own may be gone, too.
#[test]
fn what_takes_frames_away_is_not_believed() {
    let (at, blob) = header(0x780, [0x800, 0x1f00], -1, 2);
    let entry = [0x48, 0x83, 0xec, 8, 0x48, 0x89, 0x2c, 0x24];
    let memory = Memory::new(&[RETURN_ENTRY, (at, &blob), (0x800, &entry)]).with_stack(&FRAME);
    for offset in [8, 0x40, 0x700] {
        assert_eq!(caller(&memory, 0x1800 + offset, true, word(9), 3), Err(StopReason::Jit), "{offset:#x}");
    }
}

/// Code that begins with `jmp`, and goes on like no method whose beginning was written over.
#[test]
fn a_jump_is_no_beginning() {
    let (at, blob) = header(0x780, [0x800, 0x1f00], 15, 10);
    let left = |entry: &[u8]| [&[0xe9, 1, 2, 3, 4], &entry[5..]].concat();
    let found = |code: &[u8]| {
        let memory = Memory::new(&[RETURN_ENTRY, (at, &blob), (0x800, code)]).with_stack(&FRAME);
        caller(&memory, 0x1840, true, word(1), 3)
    };
    for (entry, bytes) in [(LARGE, &[6, 7, 8, 9, 10][..]), (SMALL, &[5, 6, 7, 8, 9, 10])] {
        let code = without_frame_pointer(&left(entry));
        assert_eq!(found(&code), Ok((RETURN, word(11), word(20))));
        for byte in bytes {
            let mut other = code.clone();
            other[*byte] ^= 0x10;
            assert!(found(&other).is_err(), "{byte}");
        }
    }
}

/// cmp; je; nop; in front of the method: whether it is the one that is meant.
#[test]
fn a_method_that_looks_whether_it_is_meant() {
    let (at, blob) = header(0x780, [0x7f0 + 0x10, 0x1f00], 0x2f, 10);
    let memory = Memory::new(&[RETURN_ENTRY, (at, &blob), (0x820, LARGE)]).with_stack(&FRAME);
    for at in [0x1800, 0x1808, 0x1814, 0x181f, 0x1820] {
        assert_eq!(
            caller(&memory, at, true, word(10), word(20)),
            Ok((RETURN, word(11), word(20))),
            "{at:#x}"
        );
    }
}

#[test]
fn code_of_which_the_name_is_known() {
    let outer = word(20);
    let caller_by_name = |name: &'static [u8], exact, rsp, rbp, stack: &[(usize, u64)]| {
        let (at, blob) = header(0x780, [0x800, 0x1f00], -1, 0);
        // lea 8(%rsp), %rsp is no piece of the interpreter, and no function's beginning.
        let code = [RETURN_ENTRY, (at, &blob[..]), (NAME, name), (0x1800, &[0x48, 0x8d, 0x64, 0x24, 8])];
        let memory = Memory::new(&code).with_stack(&FRAME).with_stack(stack);
        caller(&memory, 0x2805, exact, rsp, rbp)
    };
    let called = Ok((RETURN, word(11), outer));
    for name in [b"vtable chunks\0", b"native signatu"] {
        assert_eq!(caller_by_name(name, true, word(10), outer, &[]), called);
        assert!(caller_by_name(name, false, word(10), outer, &[]).is_err());
    }
    assert!(caller_by_name(b"StubRoutines\0", true, word(10), outer, &[]).is_err());
    // The caller's rsp, the locals, and what is under evaluation.
    let frame = [(0, word(0)), (2, word(14)), (8, word(13))];
    let of_interpreter =
        |stack: &[(usize, u64)]| caller_by_name(b"Interpreter\0", false, word(0), word(9), stack);
    assert_eq!(of_interpreter(&frame), Ok((RETURN, word(13), outer)));
    assert!(caller_by_name(b"Interpreter\0", true, word(0), word(9), &frame).is_err());
    for number in 0..3 {
        let mut other = frame;
        other[number].1 = 0;
        assert!(of_interpreter(&other).is_err(), "{number}");
    }
}

/// push %rbp; mov %rsp, %rbp; ...; leave; ret, twice, and between them a stub without a frame.
#[test]
fn stubs_in_a_row() {
    let (at, blob) = header(0x780, [0x800, 0x1f00], -1, 0);
    let prologue = [0x55, 0x48, 0x8b, 0xec];
    let end = [0xc9, 0xc3, 0x0f, 0x1f, 0];
    let code = [
        RETURN_ENTRY,
        (at, &blob[..]),
        (NAME, b"StubRoutines (2)"),
        (0x820, &prologue),
        (0x8f0, &end),
        (0x920, &[0x90]),
        (0x960, &prologue),
        (0x9a8, &end),
        (0xa00, &end),
        (0xa48, &[0x48, 0x8b, 0x7d, 0xd8, 0x8b, 0x75, 0xe0, 0x83]),
    ];
    // Old return addresses are on the stack.
    let memory = Memory::new(&code).with_stack(&FRAME).with_stack(&[(4, RETURN)]);
    let own = Ok((RETURN, word(11), word(20)));
    // Behind an end, the stub that it is of goes on up to the next multiple of 32.
    for at in [0x1824, 0x1860, 0x18ef, 0x1964, 0x19a7, 0x19b8] {
        for exact in [true, false] {
            assert_eq!(caller(&memory, at, exact, word(1), word(9)), own, "{at:#x}");
        }
    }
    assert_eq!(caller(&memory, 0x1a48, false, word(1), word(9)), own);
    assert!(caller(&memory, 0x1a48, true, word(1), word(9)).is_err());
    for at in [0x18f2, 0x1920, 0x1950, 0x19c0, 0x1a20] {
        assert!(caller(&memory, at, true, word(1), word(9)).is_err(), "{at:#x}");
    }
}

/// call; pop: a stub takes what was pushed for it.
#[test]
fn more_on_the_stack_than_a_frame() {
    let (at, blob) = header(0x780, [0x800, 0x1f00], 15, 10);
    let large = without_frame_pointer(LARGE);
    let code =
        [RETURN_ENTRY, (at, &blob[..]), (0x800, &large), (0x840, &[0x57, 0xe8, 1, 2, 3, 4, 0x58, 0x5f])];
    let memory = Memory::new(&code).with_stack(&FRAME);
    for (at, exact) in [(0x1841, true), (0x1846, true), (0x1846, false), (0x1847, true)] {
        assert_eq!(caller(&memory, at, exact, word(1), 3), Err(StopReason::Jit), "{at:#x}");
    }
    assert_eq!(caller(&memory, 0x1848, false, word(1), 3), Ok((RETURN, word(11), word(20))));
}

#[test]
fn the_way_into_a_compiled_method_and_out() {
    let (large, small) = (header(0x780, [0x800, 0x880], 15, 10), header(0x880, [0x900, 0xa00], 12, 4));
    let smallest = header(0xa00, [0xa80, 0xb00], -1, 2);
    let code = [
        RETURN_ENTRY,
        (large.0, &large.1[..]),
        (0x800, LARGE),
        (0x830, END),
        (small.0, &small.1),
        (0x900, SMALL),
        (smallest.0, &smallest.1),
        (0xa80, SMALLEST),
    ];
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
        (0x1a80, word(10), outer),
        (0x1a87, word(9), outer),
        (0x1a8b, word(9), outer),
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
    let code = [RETURN_ENTRY, (large.0, &large.1[..]), (0x800, LARGE), (0x820, &others[..])];
    let memory = Memory::new(&code).with_stack(&FRAME).with_stack(&[(3, RETURN), (6, RETURN)]);
    for at in [0x1826, 0x182d, 0x1832] {
        assert_eq!(caller(&memory, at, true, word(1), word(9)), Ok((RETURN, word(11), outer)), "{at:#x}");
    }
}

/// leave; cmpq $0, 8(%r15); jne; ret; jmp: how a method ends that called native code.
const NATIVE_END: &[u8] =
    &[0xc9, 0x49, 0x81, 0x7f, 8, 0, 0, 0, 0, 0x0f, 0x85, 1, 0, 0, 0, 0xc3, 0xe9, 1, 2, 3, 4];
/// The same with a comparison of five bytes.
const SHORT_NATIVE_END: &[u8] =
    &[0xc9, 0x49, 0x83, 0x7f, 8, 0, 0x0f, 0x85, 1, 0, 0, 0, 0xc3, 0xe9, 1, 2, 3, 4];

/// Where rbp is the caller's, what is in front of the code and of the stack is no reason to believe it.
#[test]
fn the_end_of_a_compiled_native_method() {
    let outer = word(20);
    let (at, blob) = header(0x780, [0x800, 0x900], 15, 10);
    let frame = |end: &[u8]| {
        Memory::new(&[RETURN_ENTRY, (at, &blob), (0x800, LARGE), (0x840, end)]).with_stack(&FRAME)
    };
    for (end, offsets) in [(NATIVE_END, [1, 9, 15, 16]), (SHORT_NATIVE_END, [1, 6, 12, 13])] {
        assert_eq!(caller(&frame(end), 0x1840, true, word(2), word(9)), Ok((RETURN, word(11), outer)));
        for offset in offsets {
            let found = caller(&frame(end), 0x1840 + offset, true, word(10), outer);
            assert_eq!(found, Ok((RETURN, word(11), outer)), "{offset}");
        }
    }
    // With a word or an instruction that is another there is no telling.
    for (byte, offsets) in [(0, &[1, 9, 16][..]), (3, &[1, 9, 16]), (4, &[1, 9, 16]), (15, &[16])] {
        let mut end = NATIVE_END.to_vec();
        end[byte] = 0x90;
        for offset in offsets {
            let found = caller(&frame(&end), 0x1840 + offset, true, word(10), outer);
            assert!(found.is_err(), "{byte} {offset}: {found:x?}");
        }
    }
}

/// leave; pop %rdi; mov %r11, %rsp; jmp *%rdi. And pop %rbp; pop %rdx; jmp *%r10, or *%rcx.
#[test]
fn ends_that_pop_the_return_address() {
    let native = [0xc9, 0x5f, 0x49, 0x8b, 0xe3, 0xff, 0xe7];
    let (far, near) = ([0x5d, 0x5a, 0x41, 0xff, 0xe2], [0x5d, 0x5a, 0xff, 0xe1]);
    let (at, blob) = header(0x780, [0x800, 0x900], 15, 10);
    let code = [
        RETURN_ENTRY,
        (at, &blob[..]),
        (0x800, LARGE),
        (0x840, &native[..]),
        (0x860, &far[..]),
        (0x880, &near[..]),
    ];
    let memory = Memory::new(&code).with_stack(&FRAME);
    let (outer, sender) = (word(20), word(13));
    // (rsp, rdx, rdi) at each, and the caller's rsp.
    for (at, [rsp, rdx, rdi], expect) in [
        (0x1841, [word(10), 0, 0], word(11)),
        (0x1842, [word(11), 0, RETURN], sender),
        (0x1845, [sender, 0, RETURN], sender),
        (0x1861, [word(10), 0, 0], word(11)),
        (0x1862, [word(11), RETURN, 0], word(11)),
        (0x1881, [word(10), 0, 0], word(11)),
        (0x1882, [word(11), RETURN, 0], word(11)),
    ] {
        let mut general = [0; REGISTERS];
        [general[7], general[1], general[5], general[6], general[11]] = [rsp, rdx, rdi, outer, sender];
        let found = caller_of(&memory, Registers::innermost(general, at));
        assert_eq!(found, Ok((RETURN, expect, outer)), "{at:#x}");
    }
}

/// A frame that is being built or left, by instructions that nothing is known of: its rsp is not aligned.
#[test]
fn a_method_with_an_unaligned_stack_is_not_believed() {
    // add $16, %rsp; pop %rbp; nop
    let end = [0x48, 0x83, 0xc4, 16, 0x5d, 0x90];
    let (at, blob) = header(0x780, [0x800, 0x900], 15, 10);
    let code = [RETURN_ENTRY, (at, &blob[..]), (0x800, LARGE), (0x840, &end)];
    let memory = Memory::new(&code).with_stack(&FRAME);
    assert_eq!(caller(&memory, 0x1845, true, word(10), word(20)), Err(StopReason::FramePointer));
    assert_eq!(caller(&memory, 0x1840, true, word(1), word(9)), Ok((RETURN, word(11), word(20))));
}

/// Another compiler biases rbp: at rsp + 16 is nothing of its own.
#[test]
fn a_raised_frame_pointer_is_where_rbp_was_saved() {
    let outer = word(20);
    let stack = [&FRAME[..], &[(6, RETURN), (7, word(20)), (8, RETURN)]].concat();
    let found = |code: &[u8], at: u64, rsp: u64, rbp: u64| {
        let memory = Memory::new(&[RETURN_ENTRY, (0x400, code)]).with_stack(&stack);
        caller(&memory, 0x1400 + at, true, rsp, rbp)
    };
    assert_eq!(found(SMALL, 15, word(7), word(7)), Ok((RETURN, word(11), outer)));
    assert_eq!(found(SMALL, 12, word(7), outer), Ok((RETURN, word(11), outer)));
    // push %rbp; mov %rsp, %rbp; add $16, %rbp
    let raised = [0x55, 0x48, 0x8b, 0xec, 0x48, 0x83, 0xc5, 16, 0x90];
    assert_eq!(found(&raised, 4, word(5), word(5)), Ok((RETURN, word(7), 0)));
    // Less is taken; rbp is saved elsewhere; it is raised by another number, and by -112.
    for (byte, other) in [(3, 32), (11, 8), (18, 8), (18, 0x90)] {
        let mut code = SMALL.to_vec();
        code[byte] = other;
        for (at, rbp) in [(12, outer), (15, word(5))] {
            let found = found(&code, at, word(5), rbp);
            assert!(found.is_err(), "{byte} {at}: {found:x?}");
        }
    }
}

mod barrier;
