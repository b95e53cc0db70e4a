//! One x86-64 instruction: how long it is, and what it may do to the two registers that unwinding needs.
//!
//! # Why this shape
//! A disassembler would bring a table for every mnemonic. What is asked here is less: where the next instruction
//! begins, where control may go, and whether rsp or rbp may be written. So lengths follow from the maps of opcodes
//! (Intel SDM volume 2, appendix A), and an operand is taken for written unless its instruction is known to only read
//! it: a doubt costs a rule, never makes a wrong one. An opcode outside the maps ends the decoding.

mod vectors;

use vectors::{is_of_vectors, vector};

/// Longest instruction in bytes (Intel SDM volume 2, 2.3.11).
pub(super) const MAX_BYTES: usize = 15;

pub(crate) const RAX: u8 = 0;
pub(crate) const RBX: u8 = 3;
pub(crate) const RSP: u8 = 4;
pub(crate) const RBP: u8 = 5;

/// Registers other than rsp and rbp that functions preserve (System V ABI for AMD64, figure 3.4): rbx, r12 to r15. Of all
/// instructions that are decoded, only `cpuid` writes one of them without naming it.
pub(crate) const PRESERVED: [u8; 5] = [RBX, 12, 13, 14, 15];

/// Segment prefix of thread-local storage.
const PREFIX_FS: u8 = 0x64;

/// An operand in memory: `[base + displacement]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Memory {
    /// `None` if it is not of this simple form: an index, rip, a segment.
    pub(crate) base: Option<u8>,
    pub(crate) displacement: i32,
}

/// The operand of a ModRM byte that may be in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operand {
    Register(u8),
    Memory(Memory),
}

/// What an instruction does, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// `push` of this register, 8 bytes, or of anything else.
    Push(Option<u8>),
    /// `pop` into this register, 8 bytes, or of anything else.
    Pop(Option<u8>),
    /// 8 bytes from the operand to the register.
    Load(u8, Operand),
    /// 8 bytes from the register to memory.
    Store(u8, Memory),
    /// Address of the operand to the register.
    Address(u8, Memory),
    /// 8 bytes of the operand subtracted from the register.
    Subtract(u8, Operand),
    /// A constant added to the register, 8 bytes.
    Add(u8, i32),
    /// Stores a constant in memory.
    StoreConstant,
    /// A call; from the end of the instruction, if the code says where to.
    Call(Option<i32>),
    /// A return.
    Return,
    /// rbp to rsp, and rbp popped.
    Leave,
    /// A jump; from the end of the instruction, if the code says where to.
    Jump(Option<i32>),
    /// A conditional jump.
    Branch(i32),
    /// A system call.
    SystemCall,
    /// Control does not pass.
    Trap,
    /// May write these registers among rsp and rbp, and others.
    Other { stack_pointer: bool, frame_pointer: bool },
}

/// A decoded instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Instruction {
    /// Its length in bytes.
    pub(crate) bytes: usize,
    pub(crate) effect: Effect,
    /// What it reads or writes in memory by a ModRM byte.
    pub(crate) memory: Option<Memory>,
    /// A bit for each register that it may write beside what `effect` says.
    others: u16,
}

impl Instruction {
    /// Whether it may write `register`, one of [`PRESERVED`].
    pub(crate) fn may_write(self, register: u8) -> bool {
        let by_effect = match self.effect {
            Effect::Pop(popped) => popped.is_none_or(|popped| popped == register),
            Effect::Load(to, _) | Effect::Address(to, _) | Effect::Subtract(to, _) | Effect::Add(to, _) => {
                to == register
            }
            _ => false,
        };
        by_effect || self.others >> (register & 15) & 1 != 0
    }
}

impl Effect {
    /// Whether rbp may be written.
    pub(crate) fn writes_frame_pointer(self) -> bool {
        match self {
            Self::Pop(register) => register.is_none_or(|register| register == RBP),
            Self::Load(register, _)
            | Self::Address(register, _)
            | Self::Subtract(register, _)
            | Self::Add(register, _) => register == RBP,
            Self::Other { frame_pointer, .. } => frame_pointer,
            Self::Leave => true,
            _ => false,
        }
    }
}

/// The instruction that `code` begins with, if it is whole and known.
pub(crate) fn decode(code: &[u8]) -> Option<Instruction> {
    let code = &code[..code.len().min(MAX_BYTES)];
    let mut at = 0;
    let (mut is_word, mut is_fs) = (false, false);
    let first = loop {
        match *code.get(at)? {
            0x66 => is_word = true,
            PREFIX_FS => is_fs = true,
            0xf0 | 0xf2 | 0xf3 | 0x2e | 0x3e => {}
            byte => break byte,
        }
        at += 1;
    };
    if matches!(first, 0xc4 | 0xc5 | 0x62) {
        return vector(code, at);
    }
    let rex = if first & 0xf0 == 0x40 { first } else { 0 };
    at += usize::from(rex != 0);
    // With REX.W, the other prefix is ignored (Intel SDM volume 2, 2.2.1.2).
    is_word &= rex & 8 == 0;
    let mut cursor = Cursor { code, at, rex, memory: None, is_of_bytes: rex == 0 };
    let opcode = cursor.byte()?;
    if opcode == 0x0f {
        return two_bytes(cursor);
    }
    // Elsewhere the lowest bit does not say that operands are of bytes.
    let is_of_bytes = opcode & 1 == 0 && !matches!(opcode, 0x50..=0x7f | 0x90..=0xaf | 0xb8..=0xbf);
    cursor.is_of_bytes &= is_of_bytes || matches!(opcode, 0xb1 | 0xb3 | 0xb5 | 0xb7);
    one_byte(cursor, opcode, Prefixes { is_word, is_fs })
}

/// Prefixes that change what an instruction of the one-byte map means.
#[derive(Clone, Copy)]
struct Prefixes {
    is_word: bool,
    is_fs: bool,
}

/// A place in an instruction.
#[derive(Clone, Copy)]
struct Cursor<'a> {
    code: &'a [u8],
    at: usize,
    rex: u8,
    memory: Option<Memory>,
    /// Whether operands may be bytes of registers, and there is no REX prefix.
    is_of_bytes: bool,
}

impl Cursor<'_> {
    fn byte(&mut self) -> Option<u8> {
        let byte = *self.code.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    /// A signed constant of 1 or 4 bytes.
    fn constant(&mut self, bytes: usize) -> Option<i32> {
        let value = self.code.get(self.at..self.at + bytes)?;
        self.at += bytes;
        match value {
            [byte] => Some(i32::from(*byte as i8)),
            _ => Some(i32::from_le_bytes(value.try_into().ok()?)),
        }
    }

    fn skip(&mut self, bytes: usize) -> Option<()> {
        self.at += bytes;
        (self.at <= self.code.len()).then_some(())
    }

    fn is_wide(&self) -> bool {
        self.rex & 8 != 0
    }

    /// Number of a register whose upper bit is this one of the REX prefix.
    fn extended(&self, low: u8, bit: u8) -> u8 {
        low & 7 | (self.rex >> bit & 1) << 3
    }

    /// The ModRM byte and what belongs to it: the register, or extension of the opcode, and the operand.
    fn operands(&mut self) -> Option<(u8, Operand)> {
        let modrm = self.byte()?;
        let (mode, low) = (modrm >> 6, modrm & 7);
        let register = self.extended(modrm >> 3, 2);
        if mode == 3 {
            return Some((register, Operand::Register(self.extended(low, 0))));
        }
        let mut base = Some(self.extended(low, 0));
        let mut is_wide = mode == 2;
        if low == 4 {
            let sib = self.byte()?;
            base = (self.extended(sib >> 3, 1) == 4).then(|| self.extended(sib, 0));
            if mode == 0 && sib & 7 == 5 {
                (base, is_wide) = (None, true);
            }
        } else if mode == 0 && low == 5 {
            (base, is_wide) = (None, true);
        }
        let displacement = match (is_wide, mode) {
            (true, _) => self.constant(4)?,
            (_, 1) => self.constant(1)?,
            _ => 0,
        };
        let memory = Memory { base, displacement };
        self.memory = Some(memory);
        Some((register, Operand::Memory(memory)))
    }

    fn end(self, effect: Effect) -> Option<Instruction> {
        Some(Instruction { bytes: self.at, effect, memory: self.memory, others: 0 })
    }

    /// The end of an instruction that may write `registers`.
    fn end_writing(self, registers: impl IntoIterator<Item = u8>) -> Option<Instruction> {
        let (mut stack_pointer, mut frame_pointer, mut others) = (false, false, 0);
        for register in registers {
            stack_pointer |= register == RSP;
            frame_pointer |= register == RBP;
            others |= 1 << (register & 15);
            // Without REX, these numbers may be of ah, ch, dh and bh (Intel SDM volume 2, table 3-1).
            others |= if self.is_of_bytes && matches!(register, 4..=7) { 1 << (register - 4) } else { 0 };
        }
        let effect = Effect::Other { stack_pointer, frame_pointer };
        Some(Instruction { others, ..self.end(effect)? })
    }
}

/// The register of an operand that is one.
fn register_of(operand: Operand) -> Option<u8> {
    match operand {
        Operand::Register(register) => Some(register),
        Operand::Memory(_) => None,
    }
}

/// The one-byte map (Intel SDM volume 2, table A-2).
fn one_byte(mut c: Cursor<'_>, opcode: u8, prefixes: Prefixes) -> Option<Instruction> {
    let constant_bytes = if prefixes.is_word { 2 } else { 4 };
    let is_plain = !prefixes.is_word && !prefixes.is_fs;
    match opcode {
        // add, or, adc, sbb, and, sub, xor, cmp.
        0x00..=0x3f if opcode & 7 < 4 => {
            let (register, operand) = c.operands()?;
            let is_compare = opcode & 0x38 == 0x38;
            match opcode & 3 {
                _ if is_compare => c.end_writing([]),
                3 if opcode == 0x2b && c.is_wide() && is_plain && register != RSP => {
                    c.end(Effect::Subtract(register, operand))
                }
                0 | 1 => c.end_writing(register_of(operand)),
                _ => c.end_writing([register]),
            }
        }
        0x00..=0x3f if opcode & 7 == 4 => c.skip(1).and_then(|()| c.end_writing([])),
        0x00..=0x3f if opcode & 7 == 5 => c.skip(constant_bytes).and_then(|()| c.end_writing([])),
        // Of words: they move rsp by 2 bytes.
        0x50..=0x57 | 0x9c if prefixes.is_word => None,
        0x50..=0x57 => c.end(Effect::Push(is_plain.then(|| c.extended(opcode, 0)))),
        0x58..=0x5f => c.end(Effect::Pop(is_plain.then(|| c.extended(opcode, 0)))),
        0x68 if !prefixes.is_word => c.skip(4).and_then(|()| c.end(Effect::Push(None))),
        0x6a if !prefixes.is_word => c.skip(1).and_then(|()| c.end(Effect::Push(None))),
        0x63 => c.operands().and_then(|(register, _)| c.end_writing([register])),
        0x69 => c
            .operands()
            .and_then(|(register, _)| c.skip(constant_bytes).and_then(|()| c.end_writing([register]))),
        0x6b => c.operands().and_then(|(register, _)| c.skip(1).and_then(|()| c.end_writing([register]))),
        0x70..=0x7f => c.constant(1).and_then(|to| c.end(Effect::Branch(to))),
        0x80 | 0x81 | 0x83 => arithmetic_with_constant(c, opcode, prefixes),
        0x84 | 0x85 => c.operands().and_then(|_| c.end_writing([])),
        0x86 | 0x87 => c.operands().and_then(|(register, operand)| {
            c.end_writing([Some(register), register_of(operand)].into_iter().flatten())
        }),
        0x88..=0x8b | 0x8d => moved(c, opcode, prefixes),
        0x91..=0x97 => c.end_writing([RAX, c.extended(opcode, 0)]),
        0x90 | 0x98 | 0x99 | 0x9b | 0xa4..=0xa7 | 0xaa..=0xaf | 0xf4 | 0xf5 | 0xf8..=0xfd => {
            c.end_writing([])
        }
        0x9c => c.end(Effect::Push(None)),
        // Into the flags.
        0x9d if is_plain => c.end(Effect::Add(RSP, 8)),
        // pop into memory. By rsp, that is counted from where it then is (Intel SDM volume 2, POP).
        0x8f if is_plain => {
            let (0, Operand::Memory(Memory { base, displacement })) = c.operands()? else { return None };
            let popped = if base == Some(RSP) { 8 } else { 0 };
            c.memory = Some(Memory { base, displacement: displacement.checked_add(popped)? });
            c.end(Effect::Add(RSP, 8))
        }
        0xa8 => c.skip(1).and_then(|()| c.end_writing([])),
        0xa9 => c.skip(constant_bytes).and_then(|()| c.end_writing([])),
        0xb0..=0xb7 => c.skip(1).and_then(|()| c.end_writing([c.extended(opcode, 0)])),
        0xb8..=0xbf => {
            let bytes = if c.is_wide() { 8 } else { constant_bytes };
            c.skip(bytes).and_then(|()| c.end_writing([c.extended(opcode, 0)]))
        }
        0xc0 | 0xc1 => {
            c.operands().and_then(|(_, operand)| c.skip(1).and_then(|()| c.end_writing(register_of(operand))))
        }
        0xd0..=0xd3 | 0xfe => c.operands().and_then(|(_, operand)| c.end_writing(register_of(operand))),
        // ret n: what it pops beside the address is the function's own arguments, above the CFA.
        0xc2 => c.skip(2).and_then(|()| c.end(Effect::Return)),
        0xc3 => c.end(Effect::Return),
        0xc9 if is_plain => c.end(Effect::Leave),
        0xc6 | 0xc7 => {
            let (_, operand) = c.operands()?;
            c.skip(if opcode == 0xc6 { 1 } else { constant_bytes })?;
            match operand {
                Operand::Memory(_) => c.end(Effect::StoreConstant),
                Operand::Register(register) => c.end_writing([register]),
            }
        }
        0xcc => c.end(Effect::Trap),
        // int3 in two bytes, as the Go assembler writes it.
        0xcd if c.byte()? == 3 => c.end(Effect::Trap),
        // x87, which writes no register of interest: fnstsw may write ax.
        0xd8..=0xdf => c.operands().and_then(|_| c.end_writing([])),
        0xe8 => c.constant(4).and_then(|to| c.end(Effect::Call(Some(to)))),
        0xe9 => c.constant(4).and_then(|to| c.end(Effect::Jump(Some(to)))),
        0xeb => c.constant(1).and_then(|to| c.end(Effect::Jump(Some(to)))),
        0xe3 => c.constant(1).and_then(|to| c.end(Effect::Branch(to))),
        0xf6 | 0xf7 => {
            let (extension, operand) = c.operands()?;
            // test has a constant; not and neg write; mul and div write rax and rdx.
            match extension & 7 {
                0 | 1 => {
                    c.skip(if opcode == 0xf6 { 1 } else { constant_bytes }).and_then(|()| c.end_writing([]))
                }
                2 | 3 => c.end_writing(register_of(operand)),
                _ => c.end_writing([]),
            }
        }
        0xff => {
            let (extension, operand) = c.operands()?;
            match extension & 7 {
                0 | 1 => c.end_writing(register_of(operand)),
                2 => c.end(Effect::Call(None)),
                4 => c.end(Effect::Jump(None)),
                6 if !prefixes.is_word => c.end(Effect::Push(None)),
                _ => None,
            }
        }
        _ => None,
    }
}

/// mov between registers and memory, and lea.
fn moved(mut c: Cursor<'_>, opcode: u8, prefixes: Prefixes) -> Option<Instruction> {
    let (register, operand) = c.operands()?;
    let is_plain = c.is_wide() && !prefixes.is_word && !prefixes.is_fs;
    match (opcode, operand) {
        (0x89, Operand::Memory(memory)) if is_plain => c.end(Effect::Store(register, memory)),
        (0x89, Operand::Register(to)) if is_plain => c.end(Effect::Load(to, Operand::Register(register))),
        (0x8b, _) if is_plain => c.end(Effect::Load(register, operand)),
        (0x8d, Operand::Memory(memory)) if is_plain => c.end(Effect::Address(register, memory)),
        (0x88 | 0x89, _) => c.end_writing(register_of(operand)),
        (_, _) => c.end_writing([register]),
    }
}

/// Group 1: add, or, adc, sbb, and, sub, xor, cmp with a constant.
fn arithmetic_with_constant(mut c: Cursor<'_>, opcode: u8, prefixes: Prefixes) -> Option<Instruction> {
    let (extension, operand) = c.operands()?;
    let value = match (opcode, prefixes.is_word) {
        (0x81, true) => c.skip(2).map(|()| 0)?,
        (0x81, false) => c.constant(4)?,
        _ => c.constant(1)?,
    };
    let is_plain = c.is_wide() && !prefixes.is_word && opcode != 0x80;
    match (extension & 7, operand) {
        (7, _) => c.end_writing([]),
        (0, Operand::Register(register)) if is_plain => c.end(Effect::Add(register, value)),
        (5, Operand::Register(register)) if is_plain => match value.checked_neg() {
            Some(value) => c.end(Effect::Add(register, value)),
            None => c.end_writing([register]),
        },
        _ => c.end_writing(register_of(operand)),
    }
}

/// The two-byte map and the three-byte maps behind it (Intel SDM volume 2, tables ).
fn two_bytes(mut c: Cursor<'_>) -> Option<Instruction> {
    let opcode = c.byte()?;
    // setcc, cmpxchg, xadd.
    c.is_of_bytes &= matches!(opcode, 0x90..=0x9f | 0xb0 | 0xc0);
    let mut map = 1;
    let mut inner = opcode;
    let constant_bytes = match opcode {
        0x05 => return c.end(Effect::SystemCall),
        0x0b => return c.end(Effect::Trap),
        // 0x0e: femms.
        0x01 | 0x0e | 0x31 | 0x77 | 0xa2 => {
            // xgetbv and rdtscp have their ModRM byte for an opcode.
            if opcode == 0x01 && !matches!(c.byte()?, 0xd0 | 0xf9) {
                return None;
            }
            // cpuid
            return c.end_writing((opcode == 0xa2).then_some(RBX));
        }
        0x80..=0x8f => return c.constant(4).and_then(|to| c.end(Effect::Branch(to))),
        0xc8..=0xcf => return c.end_writing([c.extended(opcode, 0)]),
        0x38 | 0x3a => {
            (map, inner) = (if opcode == 0x38 { 2 } else { 3 }, c.byte()?);
            usize::from(opcode == 0x3a)
        }
        0x70..=0x73 | 0xa4 | 0xac | 0xba | 0xc2 | 0xc4..=0xc6 => 1,
        0x0d
        | 0x10..=0x17
        | 0x18..=0x1f
        | 0x28..=0x2f
        | 0x40..=0x6f
        | 0x74..=0x76
        | 0x7c..=0x7f
        | 0x90..=0x9f => 0,
        0xa3 | 0xa5 | 0xab | 0xad..=0xb1 | 0xb3 | 0xb6..=0xb8 | 0xbb..=0xc1 | 0xc3 | 0xc7 | 0xd0..=0xfe => 0,
        _ => return None,
    };
    let (register, operand) = c.operands()?;
    c.skip(constant_bytes)?;
    // The shadow stack pointer is read by what else is a nop; groups 8, 9 and 15 extend the opcode by a register's
    // number (Intel SDM volume 2, table A-6).
    if map == 1 && matches!(opcode, 0x1e | 0xae | 0xba | 0xc7) {
        return c.end_writing(register_of(operand));
    }
    // movd and movq from vector registers.
    if (map, opcode) == (1, 0x7e) {
        return c.end_writing(register_of(operand));
    }
    // A nop of several bytes and prefetches name no register that they write.
    if matches!((map, opcode), (1, 0x0d | 0x18..=0x1f)) || is_of_vectors(map, inner) {
        return c.end_writing([]);
    }
    c.end_writing([Some(register), register_of(operand)].into_iter().flatten())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(code: &[u8], effect: Effect) {
        let decoded = decode(code).map(|instruction| (instruction.bytes, instruction.effect));
        assert_eq!(decoded, Some((code.len(), effect)));
        for bytes in 0..code.len() {
            assert_eq!(decode(&code[..bytes]), None, "cut to {bytes}");
        }
    }

    fn at(base: u8, displacement: i32) -> Memory {
        Memory { base: Some(base), displacement }
    }

    const NEITHER: Effect = Effect::Other { stack_pointer: false, frame_pointer: false };
    const FRAME_POINTER: Effect = Effect::Other { stack_pointer: false, frame_pointer: true };

    #[test]
    fn what_prologues_and_stack_switches_are_made_of() {
        check(&[0x55], Effect::Push(Some(RBP)));
        check(&[0x41, 0x55], Effect::Push(Some(13)));
        check(&[0x5d], Effect::Pop(Some(RBP)));
        check(&[0x48, 0x89, 0xe5], Effect::Load(RBP, Operand::Register(RSP)));
        check(&[0x48, 0x83, 0xec, 0x10], Effect::Add(RSP, -16));
        check(&[0x48, 0x83, 0xec, 0x80], Effect::Add(RSP, 128));
        check(&[0x48, 0x81, 0xc4, 0, 1, 0, 0], Effect::Add(RSP, 256));
        check(&[0x48, 0x89, 0x6c, 0x24, 0x28], Effect::Store(RBP, at(RSP, 40)));
        check(&[0x48, 0x8d, 0x6c, 0x24, 0x28], Effect::Address(RBP, at(RSP, 40)));
        check(&[0x48, 0x8b, 0x66, 0x38], Effect::Load(RSP, Operand::Memory(at(6, 56))));
        check(&[0x48, 0x2b, 0x34, 0x24], Effect::Subtract(6, Operand::Memory(at(RSP, 0))));
        check(&[0x48, 0x83, 0xe4, 0xf0], Effect::Other { stack_pointer: true, frame_pointer: false });
        check(&[0xbd, 0, 0, 0, 0], FRAME_POINTER);
        check(&[0xff, 0xd7], Effect::Call(None));
        check(&[0xe8, 4, 1, 0, 0], Effect::Call(Some(260)));
        check(&[0xc9], Effect::Leave);
        // popf; pop 8(%rbx); ret 16
        check(&[0x9d], Effect::Add(RSP, 8));
        check(&[0x8f, 0x43, 8], Effect::Add(RSP, 8));
        check(&[0xc2, 16, 0], Effect::Return);
        assert_eq!(decode(&[0x8f, 0x44, 0x24, 8]).unwrap().memory, Some(at(RSP, 16)));
        assert_eq!(decode(&[0x8f, 0xc0]), None);
        check(&[0x6a, 1], Effect::Push(None));
        check(&[0x68, 1, 2, 3, 4], Effect::Push(None));
        check(&[0xff, 0xe0], Effect::Jump(None));
        check(&[0x0f, 0x05], Effect::SystemCall);
        check(&[0x0f, 0x84, 4, 1, 0, 0], Effect::Branch(260));
        // mov rdi, fs:[-8]; mov fs:[-8], rsi
        check(&[0x64, 0x48, 0x8b, 0x3c, 0x25, 0xf8, 0xff, 0xff, 0xff], NEITHER);
        check(&[0x64, 0x48, 0x89, 0x34, 0x25, 0xf8, 0xff, 0xff, 0xff], NEITHER);
        check(&[0xc5, 0xf8, 0x77], NEITHER);
        // movups [rdi + 16], xmm5; pmovmskb ebp, xmm0; vpmovmskb ebp, ymm0; andn ebp, eax, ecx
        check(&[0x0f, 0x11, 0x6f, 0x10], NEITHER);
        check(&[0x66, 0x0f, 0xd7, 0xe8], FRAME_POINTER);
        check(&[0xc5, 0xfd, 0xd7, 0xe8], FRAME_POINTER);
        check(&[0xc4, 0xe2, 0x78, 0xf2, 0xe9], FRAME_POINTER);
        check(&[0x66, 0x0f, 0x1f, 0x44, 0, 0], NEITHER);
        // endbr64; rdsspq rbp; bt $5, eax; lfence; notrack jmp *rax
        check(&[0xf3, 0x0f, 0x1e, 0xfa], NEITHER);
        check(&[0xf3, 0x48, 0x0f, 0x1e, 0xcd], FRAME_POINTER);
        check(&[0x0f, 0xba, 0xe0, 5], NEITHER);
        check(&[0x0f, 0xae, 0xe8], NEITHER);
        check(&[0x3e, 0xff, 0xe0], Effect::Jump(None));
        check(&[0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8], NEITHER);
        assert_eq!(decode(&[0x06, 0, 0, 0]), None);
    }

    #[test]
    fn operands_of_words_and_wide_ones() {
        // push ax; push word [rax]; pushfw; push $1 of a word
        for code in [&[0x66, 0x50][..], &[0x66, 0xff, 0x30], &[0x66, 0x9c], &[0x66, 0x6a, 1]] {
            assert_eq!(decode(code), None, "{code:x?}");
        }
        check(&[0x66, 0x58], Effect::Pop(None));
        check(&[0xff, 0x30], Effect::Push(None));
        // REX.W takes precedence: add rsp, 72; mov qword [rax], 1; push rax
        check(&[0x66, 0x48, 0x81, 0xc4, 72, 0, 0, 0], Effect::Add(RSP, 72));
        check(&[0x66, 0x48, 0xc7, 0, 1, 0, 0, 0], Effect::StoreConstant);
        check(&[0x66, 0x48, 0x50], Effect::Push(Some(RAX)));
        // add ax, 72; mov word [rax], 1
        check(&[0x66, 0x05, 72, 0], NEITHER);
        check(&[0x66, 0xc7, 0, 1, 0], Effect::StoreConstant);
    }

    #[test]
    fn what_writes_a_general_register_by_vector_prefixes() {
        // cmpoxadd [rax], ebp, ecx
        assert_eq!(decode(&[0xc4, 0xe2, 0x71, 0xe0, 0x28]), None);
        // vaesdeclast xmm5, xmm1, [rax]
        check(&[0xc4, 0xe2, 0x71, 0xdf, 0x28], NEITHER);
    }

    #[test]
    fn writes_of_registers_that_functions_preserve() {
        for (code, expect) in [
            // mov bh, 1; mov dil, 1; mov edi, 1; xchg r12b, al; sete bh; cmove edi, eax
            (&[0xb7, 1][..], &[RBX][..]),
            (&[0x40, 0xb7, 1], &[]),
            (&[0xbf, 1, 0, 0, 0], &[]),
            (&[0x41, 0x86, 0xc4], &[12]),
            (&[0x0f, 0x94, 0xc7], &[RBX]),
            (&[0x0f, 0x44, 0xf8], &[]),
            // add bh, al; add [rdi], bh; add bh, [rdi]; neg bh; shl bh, 1; mov bh, [rdi]
            (&[0x00, 0xc7], &[RBX]),
            (&[0x00, 0x3f], &[]),
            (&[0x02, 0x3f], &[RBX]),
            (&[0xf6, 0xdf], &[RBX]),
            (&[0xd0, 0xe7], &[RBX]),
            (&[0x8a, 0x3f], &[RBX]),
            // cpuid; pop r13; lea rbx, [rbx + 8]; add r14, 8; sub r15, [rax]; mov r15, rax
            (&[0x0f, 0xa2], &[RBX]),
            (&[0x41, 0x5d], &[13]),
            (&[0x48, 0x8d, 0x5b, 8], &[RBX]),
            (&[0x49, 0x83, 0xc6, 8], &[14]),
            (&[0x4c, 0x2b, 0x38], &[15]),
            (&[0x49, 0x89, 0xc7], &[15]),
            // vpmovmskb r13d, ymm0; vmovd r12d, xmm5; andn ebx, eax, ecx
            (&[0xc5, 0x7d, 0xd7, 0xe8], &[13]),
            (&[0xc4, 0xc1, 0x79, 0x7e, 0xec], &[12]),
            (&[0xc4, 0xe2, 0x78, 0xf2, 0xd9], &[RBX]),
        ] {
            let instruction = decode(code).expect("it is known");
            assert_eq!(instruction.bytes, code.len());
            for register in PRESERVED {
                let is_expected = expect.contains(&register);
                // A vector prefix leaves the upper bit in doubt.
                let is_doubtful = matches!(code[0], 0xc4 | 0xc5) && expect.contains(&(register ^ 8));
                let may = instruction.may_write(register);
                assert!(may == is_expected || may && is_doubtful, "{code:x?} {register}");
            }
        }
    }

    #[test]
    fn memory_by_vector_prefixes() {
        // vmovups [r12 + 12], xmm7; vmovups [rsp + 12], xmm7; haddps xmm0, xmm1; movd [rax + 16], mm4; femms
        let memory = |code: &[u8]| decode(code).expect("it is known").memory;
        assert_eq!(memory(&[0xc4, 0xc1, 0x78, 0x11, 0x7c, 0x24, 12]), Some(at(12, 12)));
        assert_eq!(memory(&[0xc5, 0xf8, 0x11, 0x7c, 0x24, 12]), Some(at(RSP, 12)));
        check(&[0xf2, 0x0f, 0x7c, 0xec], NEITHER);
        check(&[0x0f, 0x7e, 0x60, 0x10], NEITHER);
        check(&[0x0f, 0x7e, 0xc5], FRAME_POINTER);
        check(&[0x0f, 0x0e], NEITHER);
    }
}
