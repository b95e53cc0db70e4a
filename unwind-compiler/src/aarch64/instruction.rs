//! One aarch64 instruction: where control may go, and what it may do to sp, x29 and x30.
//!
//! # Why this shape
//! As for x86-64: not what an instruction computes is asked, but which registers it may write and what it does to the
//! stack. Encodings come in groups by bits 25 to 28 (Arm ARM, C4.1); each group has its destination in the same
//! bits, so that a group is one line. An operand is taken for written unless its group only reads it, and what belongs
//! to no known group ends the decoding.

/// Bytes of an instruction.
pub(crate) const BYTES: usize = 4;

pub(crate) const X8: u8 = 8;
pub(crate) const X29: u8 = 29;
pub(crate) const X30: u8 = 30;
/// sp, where an encoding means it; else the zero register.
pub(crate) const SP: u8 = 31;

/// An access to memory at `[base + offset]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Access {
    pub(crate) is_load: bool,
    /// General registers, or those of SIMD and floating point.
    pub(crate) is_general: bool,
    /// In the order of their addresses; of one, or a pair.
    pub(crate) registers: [Option<u8>; 2],
    /// Of each.
    pub(crate) bytes: i32,
    pub(crate) base: u8,
    /// `None` if a register is added to the base.
    pub(crate) offset: Option<i32>,
    /// What is added to the base for good.
    pub(crate) change: i32,
}

/// What an instruction does, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    Access(Access),
    /// The second register plus a constant to the first, 8 bytes; 31 is sp in both.
    Add(u8, u8, i32),
    /// A call; from the instruction, if the code says where to.
    Call(Option<i32>),
    /// A return to x30.
    Return,
    /// A jump; from the instruction, if the code says where to.
    Jump(Option<i32>),
    /// A conditional jump.
    Branch(i32),
    /// A system call.
    SystemCall,
    /// Control does not pass.
    Trap,
    /// May write these registers; 31 is sp.
    Other([Option<u8>; 3]),
}

/// The instruction that `code` begins with, if it is whole and known.
pub(crate) fn decode(code: &[u8]) -> Option<Effect> {
    let word = u32::from_le_bytes(*code.first_chunk()?);
    match word >> 25 & 15 {
        // udf: the upper half is zero.
        0 if word >> 16 == 0 => Some(Effect::Trap),
        0b1000 | 0b1001 => constants(word),
        0b1010 | 0b1011 => branches(word),
        0b0100 | 0b0110 | 0b1100 | 0b1110 => memory(word),
        0b0101 | 0b1101 => {
            // add and sub with an extended register write sp; all others the zero register.
            let is_extended = word & 0x3f20_0000 == 0x0b20_0000;
            Some(other(destination(word, is_extended)))
        }
        0b0111 | 0b1111 => {
            // fmov and conversions to general registers, smov and umov.
            let is_general = word & 0x5f20_fc00 == 0x1e20_0000
                || word & 0x5f20_0000 == 0x1e00_0000
                || word & 0x9fe0_8400 == 0x0e00_0400;
            Some(other(if is_general { destination(word, false) } else { None }))
        }
        _ => None,
    }
}

fn other(written: Option<u8>) -> Effect {
    Effect::Other([written, None, None])
}

fn bits(word: u32, from: u32, count: u32) -> u32 {
    word >> from & ((1 << count) - 1)
}

fn register(word: u32, from: u32) -> u8 {
    bits(word, from, 5) as u8
}

/// A signed field, in units of `1 << shift` bytes.
fn signed(word: u32, from: u32, count: u32, shift: u32) -> i32 {
    ((word << (32 - from - count)) as i32 >> (32 - count)) << shift
}

/// Bits 0 to 4: the register that is written, if it is not the zero register.
fn destination(word: u32, is_stack_pointer: bool) -> Option<u8> {
    Some(register(word, 0)).filter(|number| *number != SP || is_stack_pointer)
}

/// Data processing with a constant (C4.1.93).
fn constants(word: u32) -> Option<Effect> {
    let is_wide = word >> 31 != 0;
    let operation = bits(word, 29, 2);
    match bits(word, 23, 3) {
        // add and sub, and those that set flags.
        0b010 => {
            let value = (bits(word, 10, 12) << (12 * bits(word, 22, 1))) as i32;
            match (is_wide, operation) {
                (true, 0) => Some(Effect::Add(register(word, 0), register(word, 5), value)),
                (true, 2) => Some(Effect::Add(register(word, 0), register(word, 5), -value)),
                _ => Some(other(destination(word, operation & 1 == 0))),
            }
        }
        // adr and adrp; and, orr, eor, ands; mov; bit fields; extr.
        0b000 | 0b001 | 0b101..=0b111 => Some(other(destination(word, false))),
        0b100 => Some(other(destination(word, operation != 3))),
        _ => None,
    }
}

/// Branches, exceptions and system instructions (C4.1.94).
fn branches(word: u32) -> Option<Effect> {
    let far = signed(word, 0, 26, 2);
    let near = signed(word, 5, 19, 2);
    // With a signed address: braa, blraa, retaa and their like.
    let is_signed = word & 0xf800 == 0x0800;
    match word >> 24 {
        0x14..=0x17 => Some(Effect::Jump(Some(far))),
        0x94..=0x97 => Some(Effect::Call(Some(far))),
        0x54 | 0x34 | 0x35 | 0xb4 | 0xb5 => Some(Effect::Branch(near)),
        0x36 | 0x37 | 0xb6 | 0xb7 => Some(Effect::Branch(signed(word, 5, 14, 2))),
        0xd6 | 0xd7 => match bits(word, 21, 4) {
            0b0000 | 0b1000 if bits(word, 11, 10) == 0b11_1110_0000 || is_signed => Some(Effect::Jump(None)),
            0b0001 | 0b1001 if bits(word, 11, 10) == 0b11_1110_0000 || is_signed => Some(Effect::Call(None)),
            0b0010 if matches!(word, 0xd65f_03c0 | 0xd65f_0bff | 0xd65f_0fff) => Some(Effect::Return),
            _ => None,
        },
        0xd4 => match (bits(word, 21, 3), bits(word, 0, 5)) {
            (0, 1) => Some(Effect::SystemCall),
            (1 | 2, 0) => Some(Effect::Trap),
            _ => None,
        },
        0xd5 => match bits(word, 19, 5) {
            // Hints, signing of x30 among them, which leaves its lower bits; barriers; sys; msr.
            0b00000 if matches!(word & 0xffff_f01f, 0xd503_201f | 0xd503_301f) => Some(other(None)),
            0b00001..=0b00011 => Some(other(None)),
            0b00100..=0b00111 => Some(other(destination(word, false))),
            _ => None,
        },
        _ => None,
    }
}

/// Loads and stores (C4.1.96).
fn memory(word: u32) -> Option<Effect> {
    let is_vector = bits(word, 26, 1) != 0;
    let base = register(word, 5);
    match bits(word, 27, 3) {
        0b101 => pair(word, is_vector, base),
        0b111 => single(word, is_vector, base),
        // From an address near the instruction; prfm writes none.
        0b011 if bits(word, 24, 1) == 0 => {
            Some(other(destination(word, false).filter(|_| !is_vector && word >> 30 != 3)))
        }
        // casp writes two registers, of which it names one.
        0b001 if word & 0x8fa0_0000 == 0x0820_0000 => None,
        // Exclusive and ordered ones, compare and swap: which of the registers are written depends.
        0b001 if bits(word, 24, 3) == 0 && base != SP => {
            let written = [0, 10, 16].map(|from| Some(register(word, from)).filter(|number| *number != SP));
            Some(Effect::Other(written))
        }
        // Structures of SIMD.
        0b001 if is_vector && word >> 31 == 0 && base != SP => {
            Some(other((bits(word, 23, 1) != 0).then_some(base)))
        }
        _ => None,
    }
}

fn pair(word: u32, is_vector: bool, base: u8) -> Option<Effect> {
    let size = bits(word, 30, 2);
    let is_load = bits(word, 22, 1) != 0;
    let shift = match (is_vector, size) {
        (true, 0..=2) => 2 + size,
        // The other of size 1 is stgp: 8 bytes of each register, and 16 to the offset's unit.
        (false, 0) => 2,
        (false, 1) if is_load => 2,
        (false, 2) => 3,
        _ => return None,
    };
    let value = signed(word, 15, 7, shift);
    let (offset, change) = match bits(word, 23, 2) {
        0 | 2 => (value, 0),
        1 => (0, value),
        _ => (value, value),
    };
    Some(Effect::Access(Access {
        is_load,
        is_general: !is_vector,
        registers: [Some(register(word, 0)), Some(register(word, 10))],
        bytes: 1 << shift,
        base,
        offset: Some(offset),
        change,
    }))
}

fn single(word: u32, is_vector: bool, base: u8) -> Option<Effect> {
    let (size, operation) = (bits(word, 30, 2), bits(word, 22, 2));
    let shift = if is_vector { (operation >> 1) << 2 | size } else { size };
    let (offset, change) = match (bits(word, 24, 2), bits(word, 21, 1), bits(word, 10, 2)) {
        (1, ..) => (Some((bits(word, 10, 12) << shift) as i32), 0),
        (0, 0, 0 | 2) => (Some(signed(word, 12, 9, 0)), 0),
        (0, 0, 1) => (Some(0), signed(word, 12, 9, 0)),
        (0, 0, 3) => (Some(signed(word, 12, 9, 0)), signed(word, 12, 9, 0)),
        (0, 1, 2) => (None, 0),
        // 64 bytes from or to eight registers, of which it names one.
        (0, 1, 0) if size == 3 && matches!(bits(word, 12, 4), 0b1001..=0b1011 | 0b1101) => return None,
        // Atomic: loads into one register what it was, and stores.
        (0, 1, 0) if !is_vector && base != SP => return Some(other(destination(word, false))),
        _ => return None,
    };
    // prfm.
    if !is_vector && size == 3 && operation >= 2 {
        return (change == 0).then_some(other(None));
    }
    Some(Effect::Access(Access {
        is_load: if is_vector { operation & 1 != 0 } else { operation != 0 },
        is_general: !is_vector,
        registers: [Some(register(word, 0)), None],
        bytes: 1 << shift.min(4),
        base,
        offset,
        change,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(word: u32, effect: Option<Effect>) {
        assert_eq!(decode(&word.to_le_bytes()), effect, "{word:#x}");
    }

    #[test]
    fn pairs_in_memory_and_of_registers() {
        let access = |is_load, bytes, change| {
            let registers = [Some(X29), Some(X30)];
            let (base, offset) = (SP, Some(change));
            Some(Effect::Access(Access { is_load, is_general: true, registers, bytes, base, offset, change }))
        };
        // stp x29, x30, [sp, -32]!; ldpsw x29, x30, [sp, -16]!; stgp x29, x30, [sp, -64]!
        check(0xa9be_7bfd, access(false, 8, -32));
        check(0x69fe_7bfd, access(true, 4, -16));
        check(0x69be_7bfd, None);
        // casp x28, x29, x2, x3, [x0], and of words; cas x28, x2, [x0]; ldxp x28, x29, [x0]
        check(0x483c_7c02, None);
        check(0x083c_7c02, None);
        check(0xc8bc_7c02, Some(Effect::Other([Some(2), None, Some(28)])));
        check(0xc87f_741c, Some(Effect::Other([Some(28), Some(X29), None])));
        // ld64b x22, [x0]; st64bv x1, x2, [x0]; ldadd x1, x29, [x0]
        check(0xf83f_d016, None);
        check(0xf821_b002, None);
        check(0xf821_001d, Some(Effect::Other([Some(X29), None, None])));
    }
}
