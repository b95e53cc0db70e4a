//! Instructions over vector registers: which of them write a general register?

use super::{Cursor, Instruction, register_of};

/// Whether an instruction of this map, by any prefix, writes vector registers or memory only. The others either write
/// a general one (cvtss2si, movmskps, movd, pextrw, pmovmskb, pextrb and its like) or may (crc32, andn, rorx).
pub(super) fn is_of_vectors(map: u8, opcode: u8) -> bool {
    match map {
        1 => matches!(
            opcode,
            0x10..=0x17 | 0x28..=0x2b | 0x2e | 0x2f | 0x51..=0x76 | 0x7c | 0x7d | 0x7f | 0xc2 | 0xc4 | 0xc6 | 0xd0..=0xd6 | 0xd8..=0xfe
        ),
        2 => opcode < 0xf0,
        3 => !matches!(opcode, 0x14..=0x17 | 0xf0),
        _ => false,
    }
}

/// Instructions with a VEX or EVEX prefix (Intel SDM volume 2, 2.3 and 2.7).
pub(super) fn vector(code: &[u8], at: usize) -> Option<Instruction> {
    let (prefix, map_at, opcode_at) = match *code.get(at)? {
        0xc5 => (0xc5, None, at + 2),
        0xc4 => (0xc4, Some(at + 1), at + 3),
        _ => (0x62, Some(at + 1), at + 4),
    };
    let map = match map_at {
        Some(place) => code.get(place)? & if prefix == 0x62 { 7 } else { 31 },
        None => 1,
    };
    let opcode = *code.get(opcode_at)?;
    // The upper bits of register numbers, inverted.
    let rex = map_at.map_or(0, |place| !code[place] >> 5);
    let mut c = Cursor { code, at: opcode_at + 1, rex, memory: None, is_of_bytes: false };
    let constant_bytes = match (map, opcode) {
        // vzeroupper, which has no operands.
        (1, 0x77) => return c.end_writing([]),
        (1, 0x70..=0x73 | 0xc2 | 0xc4..=0xc6) | (3, _) => 1,
        // cmpccxadd, which writes a general register.
        (2, 0xe0..=0xef) => return None,
        (1 | 2, _) => 0,
        _ => return None,
    };
    let (register, operand) = c.operands()?;
    c.skip(constant_bytes)?;
    if is_of_vectors(map, opcode) {
        return c.end_writing([]);
    }
    if (map, opcode) == (1, 0x7e) {
        return c.end_writing(register_of(operand));
    }
    // Upper bits of register numbers are elsewhere than in REX: any register with these low bits is in doubt. So is
    // the one that the prefix names (vvvv), which andn, bextr and their like in map 2 and 3 write.
    let named = match prefix {
        0xc5 => *code.get(at + 1)?,
        _ => *code.get(at + 2)?,
    };
    let named = !(named >> 3) & 15;
    let low = [Some(register), register_of(operand)].into_iter().flatten();
    c.end_writing(low.flat_map(|register| [register & 7, register | 8]).chain([named]))
}
