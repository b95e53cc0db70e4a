//! Do the BPF programs keep to the stack that every kernel gives them?
//!
//! A program, the function that a helper calls for it and what that calls share 512 bytes (`check_max_stack_depth`,
//! kernel/bpf/verifier.c of Linux 6.1): of each function the deepest byte that it reaches, rounded up to 32, added along each chain of
//! calls. Newer kernels load more than that, as they may give each function of a perf event's program a stack of its own (6.13): that
//! a program loads there says nothing of older ones.
//!
//! ```text
//! windlass_sample    64 bytes ->  64 ┐
//! turn              408 bytes -> 416 ┴ 480
//! ```
//!
//! Three registers that an inlined `bpf_loop` keeps are put below that when all is counted, and so they do not count.
//!
//! The objects are linked as the agent does it, by aya-obj, and read as the kernel reads them. How deep a function reaches is taken from
//! its instructions in the order in which they stand: a pointer into the stack counts where it is made, and again, with
//! its displacement, where it is used.

use std::collections::{BTreeSet, HashSet};
use std::fmt;

use aya_obj::Object;
use aya_obj::generated::{
    BPF_ADD, BPF_ALU64, BPF_CALL, BPF_JMP, BPF_LD, BPF_LDX, BPF_MOV, BPF_PSEUDO_CALL, BPF_PSEUDO_FUNC,
    BPF_ST, BPF_STX, BPF_SUB, BPF_X, bpf_insn,
};

const OBJECTS: [(&str, &[u8]); 2] = [
    ("windlass.bpf.o", include_bytes!("../../bpf/windlass.bpf.o")),
    ("windlass-aarch64.bpf.o", include_bytes!("../../bpf/windlass-aarch64.bpf.o")),
];

/// Bytes of stack that a chain of functions has (`MAX_BPF_STACK`, include/linux/filter.h).
const STACK_BYTES: u32 = 512;
/// Functions of a chain, at most (`MAX_CALL_FRAMES`, include/linux/bpf_verifier.h).
const MAX_FUNCTIONS: usize = 8;
/// What the bytes of each function are rounded up to.
const ROUNDED_TO_BYTES: u32 = 32;
/// The register that points at the end of a function's stack.
const FRAME: usize = 10;

/// A function of a linked program.
struct Function {
    name: String,
    stack_bytes: u32,
    /// Which functions it calls, or passes to a helper that does, by number.
    calls: BTreeSet<usize>,
}

/// A program with all functions that it needs; the first is its own.
struct Linked {
    functions: Vec<Function>,
}

/// Functions of which each calls the next, with what the kernel counts for each.
#[derive(Debug, Default)]
struct Chain {
    functions: Vec<(String, u32)>,
}

impl Chain {
    fn bytes(&self) -> u32 {
        self.functions.iter().map(|(_, bytes)| bytes).sum()
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes of stack:", self.bytes())?;
        self.functions.iter().try_for_each(|(name, bytes)| write!(f, "\n    {bytes:>4}  {name}"))
    }
}

impl Linked {
    /// Of a program's instructions. `name` says what the function is called that lies there.
    fn new(instructions: &[bpf_insn], name: impl Fn(&[bpf_insn]) -> String) -> Self {
        let calls: Vec<(usize, usize)> = calls(instructions).collect();
        let starts: BTreeSet<usize> = calls.iter().map(|(_, callee)| *callee).chain([0]).collect();
        let starts: Vec<usize> = starts.into_iter().collect();
        let number = |at: usize| starts.partition_point(|start| *start <= at) - 1;
        let functions = starts.iter().enumerate().map(|(index, start)| {
            let end = starts.get(index + 1).copied().unwrap_or(instructions.len());
            let body = &instructions[*start..end];
            let own = calls.iter().filter(|(caller, _)| number(*caller) == index);
            Function {
                name: name(body),
                stack_bytes: stack_bytes(body),
                calls: own.map(|(_, callee)| number(*callee)).collect(),
            }
        });
        Self { functions: functions.collect() }
    }

    /// The chain that takes most stack, of those that begin with a function.
    fn deepest(&self, number: usize, callers: usize) -> Chain {
        let function = &self.functions[number];
        assert!(callers < MAX_FUNCTIONS, "more than {MAX_FUNCTIONS} calls deep: {}", function.name);
        let callees = function.calls.iter().map(|callee| self.deepest(*callee, callers + 1));
        let mut deepest = callees.max_by_key(Chain::bytes).unwrap_or_default();
        let counted = function.stack_bytes.max(1).next_multiple_of(ROUNDED_TO_BYTES);
        deepest.functions.insert(0, (function.name.clone(), counted));
        deepest
    }
}

/// Where instructions call a function of the program or have one called, and which: the number of its first instruction.
fn calls(instructions: &[bpf_insn]) -> impl Iterator<Item = (usize, usize)> {
    instructions.iter().enumerate().filter_map(|(at, instruction)| {
        let source = u32::from(instruction.src_reg());
        let code = u32::from(instruction.code);
        let is_call = code == BPF_JMP | BPF_CALL && source == BPF_PSEUDO_CALL;
        let is_passed = code == BPF_LD | LOAD_64 && source == BPF_PSEUDO_FUNC;
        let callee = (at + 1).checked_add_signed(instruction.imm as isize)?;
        (is_call || is_passed).then_some((at, callee))
    })
}

/// What makes `BPF_LD` a load of a number of 64 bits, in two instructions (`BPF_IMM | BPF_DW`).
const LOAD_64: u32 = 0x18;
/// The bits of an instruction's code that say what kind it is, and which of the calculating ones.
const CLASS: u32 = 7;
const OPERATION: u32 = 0xf0;

/// How far down a function's instructions reach from the end of its stack, in bytes.
fn stack_bytes(instructions: &[bpf_insn]) -> u32 {
    // What each register that points into the stack is away from its end.
    let mut offsets = [None; FRAME + 1];
    offsets[FRAME] = Some(0i32);
    let mut deepest = 0;
    for instruction in instructions {
        let code = u32::from(instruction.code);
        let (to, from) = (usize::from(instruction.dst_reg()), usize::from(instruction.src_reg()));
        let reached = match code & CLASS {
            BPF_LDX => offsets[from].map(|offset| offset + i32::from(instruction.off)),
            BPF_ST | BPF_STX => offsets[to].map(|offset| offset + i32::from(instruction.off)),
            _ => None,
        };
        match code & CLASS {
            BPF_ALU64 => {
                let is_of_register = code & BPF_X != 0;
                offsets[to] = match code & OPERATION {
                    BPF_MOV if is_of_register => offsets[from],
                    // An index, which counts from where the pointer is.
                    BPF_ADD if is_of_register => offsets[to].or(offsets[from]),
                    BPF_ADD => offsets[to].map(|offset| offset.saturating_add(instruction.imm)),
                    BPF_SUB if !is_of_register => {
                        offsets[to].map(|offset| offset.saturating_sub(instruction.imm))
                    }
                    _ => None,
                };
            }
            BPF_JMP if code & OPERATION == BPF_CALL => offsets[..=5].fill(None),
            BPF_ST | BPF_STX | BPF_JMP | JMP_32 => {}
            _ => offsets[to] = None,
        }
        let lowest = offsets.into_iter().chain([reached]).flatten().min();
        deepest = deepest.max(-lowest.unwrap_or(0));
    }
    deepest as u32
}

/// Jumps that compare 32 bits (`BPF_JMP32`).
const JMP_32: u32 = 6;

/// The programs of an object, by name, linked as the agent links them.
fn programs(bytes: &[u8]) -> Vec<(String, Vec<bpf_insn>, Linked)> {
    let mut object = Object::parse(bytes).expect("an object");
    // Functions as they were before others were put behind them, by what linking does not change.
    let codes = |body: &[bpf_insn]| {
        let is_number = |of: &bpf_insn| u32::from(of.code) == BPF_LD | LOAD_64;
        let code =
            |of: &bpf_insn| (of.code, of.dst_reg(), if is_number(of) { 0 } else { of.src_reg() }, of.off);
        body.iter().map(code).collect::<Vec<_>>()
    };
    let names: Vec<_> = object
        .functions
        .values()
        .map(|function| (codes(&function.instructions), function.name.clone()))
        .collect();
    let sections: HashSet<usize> = object.functions.keys().map(|(section, _)| *section).collect();
    object.relocate_calls(&sections).expect("calls of known functions");
    let name = |body: &[bpf_insn]| {
        let codes = codes(body);
        let found = names.iter().find(|(of, _)| *of == codes);
        found.map_or_else(|| "unknown".to_owned(), |(_, name)| name.clone())
    };
    let linked = object.programs.iter().map(|(program, key)| {
        let instructions = object.functions[&key.function_key()].instructions.clone();
        let linked = Linked::new(&instructions, name);
        (program.clone(), instructions, linked)
    });
    linked.collect()
}

#[test]
fn no_chain_of_calls_needs_more_stack_than_older_kernels_give() {
    for (object, bytes) in OBJECTS {
        let programs = programs(bytes);
        assert_eq!(programs.len(), 2, "with bpf_loop and without, in {object}");
        for (program, _, linked) in programs {
            let deepest = linked.deepest(0, 0);
            println!("{object}: {deepest}");
            assert!(deepest.functions.len() > 1, "{program} has something called: {deepest}");
            assert!(deepest.bytes() <= STACK_BYTES, "{program} of {object} needs {deepest}");
        }
    }
}

/// The programs as they would be with the registers that the kernel saved on their stack, not in a map.
#[test]
fn a_program_that_reaches_further_down_is_told() {
    for (program, mut instructions, linked) in programs(OBJECTS[0].1) {
        let before = linked.deepest(0, 0);
        let store = instructions.iter_mut().find(|instruction| {
            u32::from(instruction.code) & CLASS == BPF_STX && usize::from(instruction.dst_reg()) == FRAME
        });
        store.expect("a program that stores to its stack").off = -192;
        let after = Linked::new(&instructions, |_| program.clone()).deepest(0, 0);
        let own = after.functions[0].1;
        assert_eq!(own, 192, "{after}");
        assert_eq!(after.bytes(), before.bytes() - before.functions[0].1 + own, "{before}, {after}");
        assert!(after.bytes() > STACK_BYTES, "{after}");
    }
}

/// An instruction.
fn instruction(code: u32, to: u8, from: u8, off: i16, imm: i32) -> bpf_insn {
    let registers = bpf_insn::new_bitfield_1(to, from);
    bpf_insn { code: code as u8, _bitfield_align_1: [], _bitfield_1: registers, off, imm }
}

#[track_caller]
fn check(instructions: &[bpf_insn], expect: u32) {
    assert_eq!(stack_bytes(instructions), expect);
}

#[test]
fn pointers_into_the_stack_are_followed() {
    let frame = FRAME as u8;
    let copy = |to, from| instruction(BPF_ALU64 | BPF_MOV | BPF_X, to, from, 0, 0);
    let add = |to, imm| instruction(BPF_ALU64 | BPF_ADD, to, 0, 0, imm);
    let call = instruction(BPF_JMP | BPF_CALL, 0, 0, 0, 1);
    // *(u64 *)(to + off) = from, and the other way.
    let store = |to, off| instruction(BPF_STX | 0x78, to, 1, off, 0);
    let load = |from, off| instruction(BPF_LDX | 0x78, 1, from, off, 0);
    check(&[], 0);
    check(&[store(frame, -8)], 8);
    check(&[load(frame, -24), store(frame, -8)], 24);
    // A number of 32 bits at an odd place.
    check(&[instruction(BPF_ST | 0x60, frame, 0, -12, 0)], 12);
    // What a helper is passed counts as it is.
    check(&[copy(2, frame), add(2, -88), call], 88);
    check(&[copy(2, frame), add(2, 88), instruction(BPF_ALU64 | BPF_SUB, 2, 0, 0, 128), call], 40);
    // Further down from a copy, in a register that calls leave as it is; not so in one that they do not.
    check(&[copy(6, frame), add(6, -40), call, store(6, -16)], 56);
    check(&[copy(2, frame), add(2, -40), call, store(2, -16)], 40);
    // An element.
    let index = instruction(BPF_ALU64 | BPF_ADD | BPF_X, 6, 3, 0, 0);
    check(&[copy(6, frame), add(6, -64), index, store(6, -8)], 72);
    // Of a map's value, and behind a pointer that is no more.
    check(&[store(0, -64), copy(6, frame), copy(6, 0), add(6, -64)], 0);
    check(&[copy(6, frame), instruction(BPF_LD | LOAD_64, 6, 0, 0, 0), add(6, -64)], 0);
}

/// As Linux 6.1 refused it: a program of 192 bytes, a function for its turns of 376, and one that this calls.
#[test]
fn functions_that_helpers_call_count_with_the_program() {
    let frame = FRAME as u8;
    let exit = instruction(BPF_JMP | 0x90, 0, 0, 0, 0);
    let store = |off| instruction(BPF_STX | 0x78, frame, 1, off, 0);
    let passed = instruction(BPF_LD | LOAD_64, 2, BPF_PSEUDO_FUNC as u8, 0, 4);
    let call = |imm| instruction(BPF_JMP | BPF_CALL, 0, BPF_PSEUDO_CALL as u8, 0, imm);
    let instructions = [
        passed,
        instruction(0, 0, 0, 0, 0),
        store(-180),
        call(4),
        exit,
        // Of each turn.
        store(-376),
        call(1),
        exit,
        // Of both.
        exit,
    ];
    let linked = Linked::new(&instructions, |body| format!("of {}", body.len()));
    let chain = linked.deepest(0, 0);
    assert_eq!(
        chain.to_string(),
        "608 bytes of stack:\n     192  of 5\n     384  of 3\n      32  of 1",
        "{chain}"
    );
}
