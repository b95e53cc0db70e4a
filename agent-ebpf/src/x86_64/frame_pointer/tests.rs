//! Walks through code that stands in memory of a JIT compiler, byte for byte.

use proptest::prelude::*;
use windlass_schema::maps::{
    Chunk, Location, MAX_CHUNKS, Mapping, MappingSegment, PROCESS_SEGMENTS, ProcessEntry, SEGMENT_SLOTS,
    SegmentKey, UNUSED_START, no_table,
};
use windlass_schema::record::REGISTERS;

use super::*;
use crate::memory::Tables;
use crate::walk::Walk;

mod code_objects;
mod doubts;
mod hotspot;
mod moved_frames;
mod trampolines;
mod wasm_modules;

const CODE: u64 = 0x1000;
const CODE_END: u64 = 0x3000;
/// Above the return address, at word 10, it is a multiple of 16, as psABI has it.
const STACK: u64 = 0x7008;
const WORDS: usize = 32;

/// Executable memory and a stack.
struct Memory {
    code: Vec<u8>,
    stack: [u64; WORDS],
    segment: MappingSegment,
    /// The first word of the page in front of the code.
    in_front: Option<u64>,
}

impl Memory {
    /// With these bytes of code at these offsets, and zeros otherwise.
    fn new(code: &[(usize, &[u8])]) -> Self {
        let mut bytes = vec![0; (CODE_END - CODE) as usize];
        for (at, piece) in code {
            bytes[*at..at + piece.len()].copy_from_slice(piece);
        }
        let mut segment = MappingSegment {
            starts: [UNUSED_START; SEGMENT_SLOTS],
            mappings: [Mapping::default(); SEGMENT_SLOTS],
        };
        segment.starts[0] = CODE;
        let image = no_table::location(StopReason::Jit);
        segment.mappings[0] = Mapping { end: CODE_END, bias: 0, image, generation: 1 };
        Self { code: bytes, stack: [0; WORDS], segment, in_front: None }
    }

    /// The same as code that keeps frame pointers.
    fn keeping(mut self, location: Location) -> Self {
        self.segment.mappings[0].image = location;
        self
    }

    fn with_stack(mut self, words: &[(usize, u64)]) -> Self {
        for (number, word) in words {
            self.stack[*number] = *word;
        }
        self
    }
}

impl StackMemory for Memory {
    fn words<const N: usize>(&self, address: u64) -> Option<[u64; N]> {
        let stack: Vec<u8> = self.stack.iter().flat_map(|word| word.to_le_bytes()).collect();
        let (start, bytes) = if address < STACK { (CODE, &self.code) } else { (STACK, &stack) };
        if address == CODE - 4096 {
            return self.in_front.map(|word| [word; N]);
        }
        let at = usize::try_from(address.checked_sub(start)?).ok()?;
        let bytes = bytes.get(at..at + 8 * N)?;
        Some(std::array::from_fn(|word| {
            u64::from_le_bytes(bytes[8 * word..8 * word + 8].try_into().expect("eight bytes"))
        }))
    }

    fn unreadable(&self, _: u64) -> StopReason {
        StopReason::StackRead
    }
}

impl Tables for Memory {
    fn chunk(&self, number: u32) -> Option<&Chunk> {
        assert!(number < MAX_CHUNKS, "no image here");
        None
    }

    fn segment(&self, _: SegmentKey) -> Option<&MappingSegment> {
        Some(&self.segment)
    }
}

/// The address of a word on the stack.
fn word(number: usize) -> u64 {
    STACK + 8 * number as u64
}

/// The caller, (rip, rsp, rbp), of the frame at `rip`; `exact` if it is the innermost one.
fn caller(memory: &Memory, rip: u64, exact: bool, rsp: u64, rbp: u64) -> Result<(u64, u64, u64), StopReason> {
    let mut general = [0; REGISTERS];
    (general[7], general[6]) = (rsp, rbp);
    let mut registers = Registers::innermost(general, rip);
    registers.exact = u32::from(exact);
    caller_of(memory, registers)
}

/// The same of the frame with these registers.
fn caller_of(memory: &Memory, registers: Registers) -> Result<(u64, u64, u64), StopReason> {
    let mut first = [UNUSED_START; PROCESS_SEGMENTS];
    first[0] = CODE;
    let mut walk = Walk::new(7, ProcessEntry { generation: 1, segments: 1, first }, registers);
    loop {
        walk.advance(memory, memory)?;
        if walk.is_at_frame() {
            let after = walk.registers;
            assert_eq!((after.exact, after.known), (0, 1 << 7 | 1 << 6));
            return Ok((after.rip, after.general[7], after.general[6]));
        }
    }
}

/// `call` of five bytes that ends at 0x1100: a caller.
const CALL: (usize, &[u8]) = (0xfb, &[0xe8, 0, 1, 0, 0]);
const RETURN: u64 = 0x1100;

/// push %rbp; mov %rsp, %rbp; push %rbx; mov %edi, %eax; pop %rbx; pop %rbp; ret
const WITH_FRAME: (usize, &[u8]) = (0x200, &[0x55, 0x48, 0x89, 0xe5, 0x53, 0x89, 0xf8, 0x5b, 0x5d, 0xc3]);

/// The stack in `WITH_FRAME`, which `CALL` has called: rsp is word 10 at its first instruction.
fn called() -> Memory {
    let stack = [(8, 0xb), (9, word(20)), (10, RETURN), (20, word(28)), (21, RETURN)];
    Memory::new(&[CALL, WITH_FRAME]).with_stack(&stack)
}

#[test]
fn every_instruction_of_a_function_with_a_frame() {
    let memory = called();
    let expect = Ok((RETURN, word(11), word(20)));
    let outer = word(20);
    for (at, rsp, rbp) in [
        (0x1200, word(10), outer),
        (0x1201, word(9), outer),
        (0x1204, word(9), word(9)),
        (0x1205, word(8), word(9)),
        (0x1207, word(8), word(9)),
        (0x1208, word(9), word(9)),
        (0x1209, word(10), outer),
    ] {
        assert_eq!(caller(&memory, at, true, rsp, rbp), expect, "{at:#x}");
    }
    // At the mapping's start there is nothing in front to read.
    let first = Memory { stack: memory.stack, ..Memory::new(&[(0, WITH_FRAME.1), CALL]) };
    for (at, rsp, rbp) in [
        (0x1000, word(10), outer),
        (0x1001, word(9), outer),
        (0x1004, word(9), word(9)),
        (0x1005, word(8), word(9)),
        (0x1008, word(9), word(9)),
    ] {
        assert_eq!(caller(&first, at, true, rsp, rbp), expect, "{at:#x}");
    }
    // As a caller, behind an instruction of its body.
    assert_eq!(caller(&memory, 0x1207, false, word(8), word(9)), expect);
}

#[test]
fn both_encodings_and_leave() {
    // push %rbp; mov %rsp, %rbp; sub $16, %rsp; nop; leave; ret
    let code = (0x200, &[0x55, 0x48, 0x8b, 0xec, 0x48, 0x83, 0xec, 0x10, 0x90, 0xc9, 0xc3][..]);
    let memory = Memory::new(&[CALL, code]).with_stack(&[(9, word(20)), (10, RETURN)]);
    let expect = Ok((RETURN, word(11), word(20)));
    for (at, rsp, rbp) in [
        (0x1200, word(10), word(20)),
        (0x1201, word(9), word(20)),
        (0x1204, word(9), word(9)),
        (0x1208, word(7), word(9)),
        (0x1209, word(7), word(9)),
        (0x120a, word(10), word(20)),
    ] {
        assert_eq!(caller(&memory, at, true, rsp, rbp), expect, "{at:#x}");
    }
}

/// rbp is the caller's: to believe it is to lose the caller.
#[test]
fn a_function_without_a_frame_has_no_caller() {
    // xor %eax, %eax; inc %eax; ret
    let leaf: &[u8] = &[0x31, 0xc0, 0xff, 0xc0, 0xc3];
    let with_frame = WITH_FRAME.1;
    let before_leaf = |last: &[u8]| Memory::new(&[CALL, (0x200, with_frame), (0x20a, last), (0x210, leaf)]);
    let stack = [(10, RETURN), (20, word(28)), (21, RETURN)];
    for (padding, reason) in [
        // int3
        (&[0xcc; 6][..], StopReason::Jit),
        // nop: the return address is on the stack.
        (&[0x90; 6], StopReason::Jit),
        (&[0x66, 0x0f, 0x1f, 0x44, 0, 0], StopReason::Jit),
        // The whole between them is code.
        (&[0xff, 0xc0, 0xff, 0xc0, 0xff, 0xc0], StopReason::FramePointer),
    ] {
        let memory = before_leaf(padding).with_stack(&stack);
        assert_eq!(caller(&memory, 0x1212, true, word(10), word(20)), Err(reason), "{padding:x?}");
        // Its last instruction leaves no doubt.
        let by_return = caller(&memory, 0x1214, true, word(10), word(20));
        assert_eq!(by_return, Ok((RETURN, word(11), word(20))));
    }
    let alone = Memory::new(&[CALL, (0x210, leaf)]).with_stack(&stack);
    assert_eq!(caller(&alone, 0x1212, true, word(10), word(20)), Err(StopReason::Jit));
}

/// musl's vfork and V8's functions that move arguments.
#[test]
fn a_return_address_in_a_register_is_not_passed_over() {
    // nops up to: pop %rdx; mov $58, %eax; syscall; push %rdx; ret
    let vfork: &[u8] = &[0x5a, 0xb8, 58, 0, 0, 0, 0x0f, 0x05, 0x52, 0xc3];
    let memory = Memory::new(&[CALL, WITH_FRAME, (0x20a, &[0x90; 6]), (0x210, vfork)]);
    let memory = memory.with_stack(&[(20, word(28)), (21, RETURN)]);
    for (at, reason) in [(0x1211, StopReason::Jit), (0x1216, StopReason::Jit), (0x1218, StopReason::Jit)] {
        assert_eq!(caller(&memory, at, true, word(11), word(20)), Err(reason), "{at:#x}");
    }
}

/// V8's function that builds the frame of another: pop %r15; push %rbp; mov %rsp, %rbp; push %rsi; push %r15; ret
#[test]
fn a_frame_that_is_built_for_the_caller() {
    let builder: &[u8] = &[0x41, 0x5f, 0x55, 0x48, 0x89, 0xe5, 0x56, 0x41, 0x57, 0xc3];
    for start in 0x200..0x210 {
        let memory = Memory::new(&[CALL, (start, builder)]).keeping(no_table::FRAME_POINTERS);
        let memory =
            memory.with_stack(&[(8, 0xb), (9, word(20)), (10, RETURN), (20, word(28)), (21, RETURN)]);
        let at = CODE + start as u64;
        for (offset, rsp, rbp) in
            [(2, word(10), word(20)), (3, word(9), word(20)), (6, word(9), word(9)), (7, word(8), word(9))]
        {
            let found = caller(&memory, at + offset, true, rsp, rbp);
            assert_eq!(found, Err(StopReason::FramePointer), "{start:#x} {offset}");
        }
        // Its last instruction, with the address back on the stack.
        let memory = memory.with_stack(&[(7, RETURN)]);
        assert_eq!(caller(&memory, at + 9, true, word(7), word(9)), Ok((RETURN, word(8), word(9))));
    }
}

#[test]
fn a_body_behind_an_epilogue_needs_a_clean_stack() {
    // The early way out of a function, then 0x20b: mov %edi, %eax; call
    let rest = (0x20a, &[0x89, 0xf8, 0xe8, 0, 0, 0, 0][..]);
    let memory = |words: &[(usize, u64)]| Memory::new(&[CALL, WITH_FRAME, rest]).with_stack(words);
    let frame = [(9, word(20)), (10, RETURN), (6, CODE + 0x300), (7, word(30))];
    let expect = Ok((RETURN, word(11), word(20)));
    for (exact, at) in [(true, 0x120a), (true, 0x120c), (false, 0x1211)] {
        assert_eq!(caller(&memory(&frame), at, exact, word(5), word(9)), expect, "{at:#x}");
        // What an earlier call left there may be the return address of a function without a frame.
        let left = [&frame[..], &[(6, RETURN)]].concat();
        let found = caller(&memory(&left), at, exact, word(5), word(9));
        assert_eq!(found, Err(StopReason::FramePointer), "{at:#x}");
    }
}

#[test]
fn a_frame_pointer_that_leads_nowhere() {
    let memory = called();
    for (rsp, rbp, reason) in [
        (word(9), word(8), StopReason::Jit),
        (word(8), word(9) + 4, StopReason::Jit),
        // Farther up than is searched.
        (word(8), 0x10_0000, StopReason::FramePointer),
        // Saved there is 0.
        (word(8), word(12), StopReason::FramePointer),
    ] {
        assert_eq!(caller(&memory, 0x1205, true, rsp, rbp), Err(reason), "{rbp:#x}");
    }
    for address in [0, RETURN - 1, RETURN + 8, CODE_END, u64::MAX] {
        let memory = called().with_stack(&[(10, address)]);
        let found = caller(&memory, 0x1205, true, word(8), word(9));
        assert_eq!(found, Err(StopReason::FramePointer), "{address:#x}");
        let found = caller(&memory, 0x1200, true, word(10), word(20));
        assert_eq!(found, Err(StopReason::FramePointer), "{address:#x}");
    }
}

#[test]
fn a_search_has_an_end() {
    let memory = called();
    let near = CODE + 0x200 + MAX_CODE_BYTES;
    let body = caller(&memory, near, false, word(8), word(9));
    assert_eq!(body, Ok((RETURN, word(11), word(20))));
    assert_eq!(caller(&memory, near + 8, false, word(8), word(9)), Err(StopReason::Jit));
    // Nor does it leave the mapping.
    let first = Memory::new(&[]);
    assert_eq!(caller(&first, CODE + 24, false, word(8), word(9)), Err(StopReason::Jit));
    let mut code = Search { left: 1, ..Search::START };
    let mut general = [0; REGISTERS];
    (general[7], general[6]) = (word(8), word(9));
    let registers = Registers::innermost(general, 0x1207);
    let jit = CodeWithoutTable {
        start: CODE,
        keeps_frame_pointers: false,
        is_jit: true,
        is_of_known_jit: false,
        unproved: StopReason::Jit,
    };
    assert_eq!(registers.look_for_caller(&mut code, &jit, &memory), Ok(None));
    assert_eq!(registers.look_for_caller(&mut code, &jit, &memory), Err(StopReason::FramePointer));
}

/// In memory of the known compiler: of an image, not all code is known to keep frame pointers.
#[test]
fn callers_of_the_known_compiler_need_no_search() {
    let registers = |exact| {
        let mut general = [0; REGISTERS];
        (general[7], general[6]) = (word(8), word(9));
        Registers { exact, ..Registers::innermost(general, 0x1300) }
    };
    let code = |is_jit| CodeWithoutTable {
        start: CODE,
        keeps_frame_pointers: true,
        is_jit,
        is_of_known_jit: is_jit,
        unproved: StopReason::FramePointer,
    };
    let expect =
        Candidate { address: RETURN, stack_pointer: word(11), frame_pointer: word(20), is_caller: true };
    // A frame of a kind, twice its number, or with a context; then what no such frame has there.
    for (below, of_jit) in [
        (2, Some(expect)),
        (2 * 40, Some(expect)),
        (0x37b5_1a10_d709, Some(expect)),
        (0, None),
        (3, None),
        (0x37b5_1a10_d708, None),
        (RETURN, None),
        (1 << 47 | 1, None),
    ] {
        let memory = called().with_stack(&[(8, below)]);
        let found = |exact, is_jit| {
            registers(exact).look_for_caller(&mut Search { ..Search::START }, &code(is_jit), &memory)
        };
        assert_eq!(found(0, true), Ok(of_jit), "{below:#x}");
        assert_eq!(found(0, false), Ok(None), "{below:#x}");
        // The innermost one may be in a prologue.
        assert_eq!(found(1, true), Ok(None), "{below:#x}");
    }
}

/// As V8's bytecode handlers that call nothing, where no table says so: what is at rsp may as well be what an earlier
/// call has left, as behind traps within a function.
#[test]
fn padding_proves_nothing() {
    // movsx; mov; jmp *%rcx
    let leaf: &[u8] = &[0x4b, 0x0f, 0xbe, 0x44, 0x0c, 0x01, 0x48, 0x8b, 0x54, 0xc5, 0x00, 0xff, 0xe1];
    for content in
        [no_table::FRAME_POINTERS, no_table::JIT_FRAME_POINTERS, no_table::location(StopReason::FramePointer)]
    {
        let code = Memory::new(&[CALL, WITH_FRAME, (0x20a, &[0xcc; 6]), (0x210, leaf)]).keeping(content);
        let memory = code.with_stack(&[(9, RETURN), (10, RETURN), (20, word(28)), (21, RETURN)]);
        for at in [0x1216, 0x121b] {
            let found = caller(&memory, at, true, word(10), word(20));
            assert_eq!(found, Err(StopReason::FramePointer), "{at:#x}");
        }
    }
}

/// V8's baseline code calls a function that builds the frame.
#[test]
fn compiled_code_without_a_prologue_needs_a_clean_stack() {
    let body: &[u8] = &[0xe8, 0, 0, 0, 0, 0x48, 0x8b, 0x45, 0xf8];
    let stack = [(7, 77), (8, 2), (9, word(20)), (10, RETURN)];
    let memory = Memory::new(&[CALL, (0x210, body)]).with_stack(&stack);
    let memory = memory.keeping(no_table::JIT_FRAME_POINTERS);
    let expect = Ok((RETURN, word(11), word(20)));
    assert_eq!(caller(&memory, 0x1219, true, word(6), word(9)), expect);
    assert_eq!(caller(&memory, 0x1219, false, word(6), word(9)), expect);
    let left = memory.with_stack(&[(7, RETURN)]);
    assert_eq!(caller(&left, 0x1219, true, word(6), word(9)), Err(StopReason::FramePointer));
    // In a caller it is what an earlier call has left.
    assert_eq!(caller(&left, 0x1219, false, word(6), word(9)), expect);
    let unknown = left.with_stack(&[(7, 77)]).keeping(no_table::location(StopReason::Jit));
    assert_eq!(caller(&unknown, 0x1219, true, word(6), word(9)), Err(StopReason::Jit));
}

/// Another compiler's code has called C code, and keeps no frame: rbp is still V8's, in a frame of a kind.
#[test]
fn code_of_another_compiler_beside_the_known_one() {
    let other: &[u8] = &[0xe8, 0, 0, 0, 0, 0x48, 0x83, 0xc4, 8, 0xc3];
    let stack = [(5, RETURN), (8, 2), (9, word(20)), (10, RETURN), (20, word(28)), (21, RETURN)];
    let memory = Memory::new(&[CALL, (0x210, other)]).with_stack(&stack);
    let memory = memory.keeping(no_table::ANY_JIT_FRAME_POINTERS);
    for at in [word(4), word(5)] {
        assert_eq!(caller(&memory, 0x1215, false, at, word(9)), Err(StopReason::FramePointer));
        assert_eq!(caller(&memory, 0x1215, true, at, word(9)), Err(StopReason::FramePointer));
    }
    // What may be V8's own where nothing else can be the caller.
    assert_eq!(caller(&memory, 0x1215, false, word(6), word(9)), Ok((RETURN, word(11), word(20))));
    assert_eq!(caller(&memory, 0x1215, true, word(6), word(9)), Err(StopReason::FramePointer));
}

#[test]
fn calls() {
    #[track_caller]
    fn check(code: &[u8], expect: bool) {
        let mut bytes = [0x90; 8];
        bytes[8 - code.len()..].copy_from_slice(code);
        assert_eq!(ends_with_call(u64::from_le_bytes(bytes)), expect, "{code:x?}");
    }
    check(&[0xe8, 1, 2, 3, 4], true);
    // call *%rax, *%r11; *(%rcx); *8(%rcx); *0x1234(%rcx); *(%rsp); *8(%rsp); *0x1234(%rsp); *0x1234(%rip); *0x1234
    for code in [
        &[0xff, 0xd0][..],
        &[0x41, 0xff, 0xd3],
        &[0xff, 0x11],
        &[0xff, 0x51, 8],
        &[0xff, 0x91, 0x34, 0x12, 0, 0],
        &[0xff, 0x14, 0x24],
        &[0xff, 0x54, 0x24, 8],
        &[0xff, 0x94, 0x24, 0x34, 0x12, 0, 0],
        &[0xff, 0x15, 0x34, 0x12, 0, 0],
        &[0xff, 0x14, 0x25, 0x34, 0x12, 0, 0],
    ] {
        check(code, true);
    }
    // jmp *%rax; push (%rcx); inc %eax; jmp; nothing
    for code in [&[0xff, 0xe0][..], &[0xff, 0x31], &[0xff, 0xc0], &[0xe9, 0, 0, 0, 0], &[]] {
        check(code, false);
    }
}

proptest! {
    /// Against the same written with slices. Bytes are few, so that pairs of them come up.
    #[test]
    fn signs_are_found(
        bytes in prop::collection::vec(prop::sample::select(SIGNIFICANT), 16),
        start in 0..16u64,
        prologue in prop::option::of((0..8usize, any::<bool>())),
    ) {
        let mut bytes = bytes;
        if let Some((at, second)) = prologue {
            let code = if second { [0x55, 0x48, 0x8b, 0xec] } else { [0x55, 0x48, 0x89, 0xe5] };
            bytes[at..at + 4].copy_from_slice(&code);
        }
        let bits = |is: &dyn Fn(usize) -> bool| (0..8).filter(|at| is(*at)).fold(0, |bits, at| bits | 0x80 << (8 * at));
        let is_last = |at: usize| (start + at as u64 + 1).is_multiple_of(16);
        let expect = Signs {
            prologues: bits(&|at| {
                matches!(bytes[at..at + 4], [0x55, 0x48, 0x89, 0xe5] | [0x55, 0x48, 0x8b, 0xec])
            }),
            doubts: bits(&|at| {
                let epilogue = match bytes[at..at + 2] {
                    // Not `mov 8(%rbp), %rbx`.
                    [0x5d, next] if next % 4 != 0 || (0x40..0x50).contains(&next) => true,
                    [byte, 0x5d] => matches!(byte, 0xe5 | 0xec),
                    [byte, 0xc9] => !matches!(byte, 0x31 | 0x33 | 0x84 | 0x85),
                    _ => false,
                };
                let does_not_return = match bytes[at..] {
                    [0xe8 | 0xe9, ..] if is_last(at + 4) => true,
                    [0xff, 0x15 | 0x25, ..] if is_last(at + 5) => true,
                    [0xeb, ..] | [0x0f, 0x0b, ..] if is_last(at + 1) => true,
                    _ => matches!(bytes[at], 0xf4) && is_last(at),
                };
                epilogue || does_not_return || is_last(at) && matches!(bytes[at], 0x90 | 0)
            }),
            ends: bits(&|at| match bytes[at] {
                0xc3 => is_last(at) || matches!(bytes[at + 1], 0xcc | 0x90 | 0x0f | 0x66 | 0x2e),
                0xcc => is_last(at),
                _ => false,
            }),
            traps: bits(&|at| is_last(at + 1) && bytes[at..at + 2] == [0xcc, 0xcc]),
        };
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let signs = Signs::of(word(0), word(8), start);
        prop_assert_eq!(signs, expect);
        // Behind the last prologue.
        let from = (0..8).rev().find(|at| signs.prologues >> (8 * at + 7) & 1 != 0).map_or(0, |at| at + 1);
        if from > 0 {
            prop_assert_eq!(signs.last_prologue(), from as u64 - 1);
        }
        let behind = |signs: u64| (from..8).any(|at| signs >> (8 * at) & 0x80 != 0);
        let seen = u64::from(behind(expect.doubts)) | u64::from(behind(expect.ends)) << 1;
        prop_assert_eq!(signs.seen(), seen);
    }
}

const SIGNIFICANT: &[u8] = &[
    0x55, 0x48, 0x89, 0xe5, 0x8b, 0xec, 0x5d, 0xc9, 0xc3, 0xc2, 0xcc, 0x90, 0, 0x31, 0xff, 0x0f, 0xe9, 0x66,
    0xe8, 0xeb, 0x0b, 0xf4, 0x15, 0x25, 0xf8,
];
