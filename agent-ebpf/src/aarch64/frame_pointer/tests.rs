//! Walks through code that stands in memory of a JIT compiler, instruction for instruction.

use proptest::prelude::*;
use windlass_schema::maps::{
    Chunk, MAX_CHUNKS, Mapping, MappingSegment, PROCESS_SEGMENTS, ProcessEntry, SEGMENT_SLOTS, SegmentKey,
    UNUSED_START, no_table,
};

use super::super::PAC_MASK;
use super::super::registers::REGISTERS;
use super::*;
use crate::memory::Tables;
use crate::walk::Walk;

const CODE: u64 = 0x1000;
const CODE_END: u64 = 0x4000;
const STACK: u64 = 0x7000;
const WORDS: usize = 32;
/// Some signature.
const SIGNED: u64 = 0x2b << 48;

const PACIASP: u32 = 0xd503_233f;
const AUTIASP: u32 = 0xd503_23bf;
/// stp x29, x30, [sp, -32]!, and ldp x29, x30, [sp], 32
const PUSH_32: u32 = 0xa9be_7bfd;
const POP_32: u32 = 0xa8c2_7bfd;
/// stp x29, x30, [sp, 16], and str x30, [sp, -16]!
const STORE_PAIR: u32 = 0xa901_7bfd;
const STORE_ALONE: u32 = 0xf81f_0ffe;
/// add x0, x0, 1
const ADD: u32 = 0x9100_0400;
/// bl, some way back, and blr x16
const BL: u32 = 0x97ff_fff0;
const BLR: u32 = 0xd63f_0200;
const RET: u32 = 0xd65f_03c0;
const NOP: u32 = 0xd503_201f;
const BRK: u32 = 0xd420_0000;

/// Executable memory and a stack.
struct Memory {
    code: Vec<u32>,
    stack: [u64; WORDS],
    segment: MappingSegment,
}

impl Memory {
    /// With these instructions at these addresses, and zeros otherwise.
    fn new(code: &[(u64, &[u32])]) -> Self {
        let mut instructions = vec![0; ((CODE_END - CODE) / INSTRUCTION) as usize];
        for (at, piece) in code {
            let at = ((at - CODE) / INSTRUCTION) as usize;
            instructions[at..at + piece.len()].copy_from_slice(piece);
        }
        let mut segment = MappingSegment {
            starts: [UNUSED_START; SEGMENT_SLOTS],
            mappings: [Mapping::default(); SEGMENT_SLOTS],
        };
        segment.starts[0] = CODE;
        let image = no_table::location(StopReason::Jit);
        segment.mappings[0] = Mapping { end: CODE_END, bias: 0, image, generation: 1 };
        Self { code: instructions, stack: [0; WORDS], segment }
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
        let bytes: Vec<u8> = if address < STACK {
            self.code.iter().flat_map(|word| word.to_le_bytes()).collect()
        } else {
            self.stack.iter().flat_map(|word| word.to_le_bytes()).collect()
        };
        let at = usize::try_from(address.checked_sub(if address < STACK { CODE } else { STACK })?).ok()?;
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

/// A frame at `pc`, with x29, x30 and sp.
#[derive(Clone, Copy, Debug)]
struct Frame {
    pc: u64,
    is_innermost: bool,
    sp: u64,
    x29: u64,
    x30: u64,
}

/// Its caller, (pc, sp, x29).
fn caller(memory: &Memory, frame: Frame) -> Result<(u64, u64, u64), StopReason> {
    let mut general = [0; REGISTERS];
    general[DWARF_SP as usize] = frame.sp;
    general[DWARF_X29 as usize] = frame.x29;
    general[DWARF_X30 as usize] = frame.x30;
    let mut registers = Registers::innermost(general, frame.pc);
    if !frame.is_innermost {
        (registers.exact, registers.known) = (0, 1 << DWARF_SP | 1 << DWARF_X29);
    }
    let mut first = [UNUSED_START; PROCESS_SEGMENTS];
    first[0] = CODE;
    let mut walk = Walk::new(7, ProcessEntry { generation: 1, segments: 1, first }, registers);
    loop {
        walk.advance(memory, memory)?;
        if walk.is_at_frame() {
            let after = walk.registers;
            assert_eq!((after.exact, after.known), (0, 1 << DWARF_SP | 1 << DWARF_X29));
            return Ok((after.pc, after.general[DWARF_SP as usize], after.general[DWARF_X29 as usize]));
        }
    }
}

/// A call that ends at 0x1100: a caller.
const CALL: (u64, &[u32]) = (0x10fc, &[BL]);
const RETURN: u64 = 0x1100;

const WITH_FRAME: &[u32] = &[PACIASP, PUSH_32, SET_X29, ADD, BLR, ADD, POP_32, AUTIASP, RET];
const START: u64 = 0x1200;

/// The stack in `WITH_FRAME`, which `CALL` has called: sp is word 10 at its first instruction.
fn called(code: &[u32]) -> Memory {
    let stack = [(6, word(20)), (7, SIGNED | RETURN), (20, word(28)), (21, RETURN)];
    Memory::new(&[CALL, (START, code)]).with_stack(&stack)
}

fn in_body(pc: u64) -> Frame {
    Frame { pc, is_innermost: true, sp: word(6), x29: word(6), x30: SIGNED | RETURN }
}

#[test]
fn every_instruction_of_a_function_with_a_frame() {
    let memory = called(WITH_FRAME);
    let expect = Ok((RETURN, word(10), word(20)));
    let outer = Frame { sp: word(10), x29: word(20), ..in_body(START) };
    let behind_call = Frame { x30: START + 20, ..in_body(START) };
    for frame in [
        Frame { x30: RETURN, ..outer },
        Frame { pc: START + 4, ..outer },
        Frame { pc: START + 8, x29: word(20), ..in_body(START) },
        in_body(START + 12),
        in_body(START + 16),
        Frame { pc: START + 20, ..behind_call },
        Frame { pc: START + 24, ..behind_call },
        Frame { pc: START + 32, x30: RETURN, ..outer },
    ] {
        assert_eq!(caller(&memory, frame), expect, "{frame:x?}");
    }
    // Where x30 is there and signed, nothing is known of what is behind.
    assert_eq!(caller(&memory, Frame { pc: START + 28, ..outer }), Err(StopReason::Jit));
    let as_caller = Frame { is_innermost: false, x30: 0, ..in_body(START + 20) };
    assert_eq!(caller(&memory, as_caller), expect);
}

/// x29 is the caller's: to believe it is to lose the caller.
#[test]
fn a_leaf_behind_a_function_has_no_caller() {
    for end in
        [&[BL][..], &[BL, NOP], &[BL, BRK], &[BL, 0], &[POP_32, RET], &[POP_32, 0x1400_0010], &[0xd65f_0bff]]
    {
        let code = [&[PUSH_32, SET_X29, ADD], end, &[ADD, ADD, ADD, RET]].concat();
        let memory = called(&code);
        let leaf = START + INSTRUCTION * (code.len() as u64 - 2);
        // Called from elsewhere, x29 is of `CALL`'s function.
        let frame = Frame { pc: leaf, is_innermost: true, sp: word(6), x29: word(20), x30: 0x3100 };
        assert_eq!(caller(&memory, frame), Err(StopReason::Jit), "{end:x?}");
    }
}

/// Of a caller's own prologue nothing may be in between but what its function does.
#[test]
fn a_caller_that_stores_x30_in_another_way_is_not_left() {
    let callers = |code: &[u32]| {
        let memory = called(code);
        let pc = START + INSTRUCTION * code.len() as u64;
        caller(&memory, Frame { is_innermost: false, x30: 0, ..in_body(pc) })
    };
    let expect = Ok((RETURN, word(10), word(20)));
    assert_eq!(callers(&[PUSH_32, SET_X29, ADD, BL]), expect);
    // An early return, and padding in front of a loop.
    assert_eq!(callers(&[PUSH_32, SET_X29, POP_32, RET, NOP, BL]), expect);
    for store in [STORE_PAIR, STORE_ALONE, PUSH_32, 0xa9bf_53fe, 0xa9bf_7bf3] {
        let code = [PUSH_32, SET_X29, POP_32, RET, store, ADD, BL];
        assert_eq!(callers(&code), Err(StopReason::Jit), "{store:x}");
    }
    // Too far, and without any.
    let far = [&[PUSH_32, SET_X29][..], &[ADD; 1024], &[BL]].concat();
    assert_eq!(callers(&far), Err(StopReason::Jit));
    assert_eq!(callers(&[ADD, ADD, BL]), Err(StopReason::Jit));
}

#[test]
fn what_is_no_frame_record_is_not_followed() {
    let memory = called(WITH_FRAME);
    let body = in_body(START + 12);
    for x29 in [word(5), word(6) + 4] {
        assert_eq!(caller(&memory, Frame { x29, ..body }), Err(StopReason::FramePointer));
    }
    let unreadable = Frame { x29: word(WORDS), x30: START + 20, ..body };
    assert_eq!(caller(&memory, unreadable), Err(StopReason::StackRead));
    // A return address that no call precedes, and one out of executable memory.
    for address in [RETURN + 4, RETURN + 1, CODE_END + 0x100, 0] {
        let memory = called(WITH_FRAME).with_stack(&[(7, address)]);
        let frame = Frame { x30: address, ..body };
        assert!(caller(&memory, frame).is_err(), "{address:#x}");
    }
}

#[test]
fn instructions_by_their_bits() {
    // ldp x29, x30; ldp x19, x29; ldp x30, x19; ldp x19, x30; ldr x30, x30 behind, x29 in front; by a register; ldnp
    for load in [
        0xa941_7bfd,
        0xa941_77f3,
        0xa941_4ffe,
        0xa941_7bf3,
        0xf940_0bfe,
        0xf841_07fe,
        0xf85f_0ffd,
        0xf861_681d,
        0xa840_7bfd,
    ] {
        assert!(is_one_of(load, LOADS) && !is_one_of(load, STORES), "{load:x}");
    }
    // str x30; str x30 in front; stp x29, x30; stp x30, x20; stp x19, x30
    for store in [0xf900_0bfe, STORE_ALONE, STORE_PAIR, 0xa9bf_53fe, 0xa9bf_7bf3, PUSH_32] {
        assert!(is_one_of(store, STORES) && !is_one_of(store, LOADS), "{store:x}");
    }
    // br x16; ret; ret x3; retaa; retab; braa x1, x2; braaz x3; brk 1; udf 0; nop
    for end in [
        0xd61f_0200,
        RET,
        0xd65f_0060,
        0xd65f_0bff,
        0xd65f_0fff,
        0xd71f_0822,
        0xd61f_087f,
        0xd420_0020,
        0,
        NOP,
    ] {
        assert!(is_one_of(end, ENDS) && !is_one_of(end, CALLS), "{end:x}");
    }
    // bl; blr x16; blraa x1, x2; blraaz x1
    for call in [BL, BLR, 0xd73f_0822, 0xd63f_083f] {
        assert!(is_one_of(call, CALLS) && !is_one_of(call, ENDS), "{call:x}");
    }
    // ldp x1, x2; ldr x3; stp x1, x2; add; mov x29, sp; paciasp
    for other in [0xa940_0be1, 0xf940_0be3, 0xa900_0be1, ADD, SET_X29, PACIASP] {
        let is_known = is_one_of(other, LOADS) || is_one_of(other, STORES) || is_one_of(other, ENDS);
        assert!(!is_known && !is_one_of(other, CALLS), "{other:x}");
    }
    assert_eq!((record_bytes(PUSH_32), record_bytes(POP_32), record_bytes(0xa9bf_7bfd)), (32, 32, 16));
}

proptest! {
    /// Whatever the code and the stack: a caller is behind a call, and its frame is above.
    #[test]
    fn a_caller_is_plausible(
        code in prop::collection::vec(
            prop::sample::select(vec![ADD, BL, BLR, RET, NOP, PUSH_32, SET_X29, POP_32, PACIASP, STORE_ALONE]),
            64,
        ),
        stack in prop::collection::vec(0u64..256, WORDS),
        at in 0u64..64,
        is_innermost in any::<bool>(),
        registers in prop::collection::vec(0u64..32, 3),
    ) {
        // Each word points into the code or to another word.
        let value = |word: u64| if word < 64 { CODE + 4 * word } else { STACK + 8 * (word % 32) };
        let words: Vec<_> = stack.iter().enumerate().map(|(at, word)| (at, value(*word))).collect();
        let memory = Memory::new(&[(CODE, &code)]).with_stack(&words);
        let (sp, x29) = (STACK + 8 * registers[0], STACK + 8 * registers[1]);
        let frame = Frame { pc: CODE + 4 * at, is_innermost, sp, x29, x30: CODE + 4 * registers[2] };
        if let Ok((pc, caller_sp, _)) = caller(&memory, frame) {
            let before = memory.code[((pc - CODE) / 4 - 1) as usize];
            prop_assert!([BL, BLR].contains(&before) && caller_sp >= sp && pc & PAC_MASK == 0);
        }
    }
}
