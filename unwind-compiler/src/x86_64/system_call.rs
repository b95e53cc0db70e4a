//! Which system call an instruction makes, and which of them do not come back as functions do.

/// System calls behind which the child has another stack, or shares this one, or there is none: `rt_sigreturn`,
/// `clone`, `vfork`, `clone3` (arch/x86/entry/syscalls/syscall_64.tbl).
pub(super) const SWITCHING_SYSTEM_CALLS: [u32; 4] = [15, 56, 58, 435];

/// System calls that do not return, as some functions do not: `exit`, `exit_group` (the same table).
pub(super) const ENDING_SYSTEM_CALLS: [u32; 2] = [60, 231];

/// The constant in eax behind the instruction that `code` begins with; `None` but for instructions that are known to
/// leave it.
pub(super) fn number(code: &[u8], number: Option<u32>) -> Option<u32> {
    let (rex, code) = match code {
        [rex @ 0x40..=0x4f, rest @ ..] => (*rex, rest),
        _ => (0, code),
    };
    let has_other = |bit: u8| rex >> bit & 1 != 0;
    match *code {
        [0xb8, a, b, c, d, ..] if !has_other(0) && !has_other(3) => Some(u32::from_le_bytes([a, b, c, d])),
        [0xc7, 0xc0, a, b, c, d, ..] if !has_other(0) => Some(u32::from_le_bytes([a, b, c, d])),
        [0x31 | 0x33, 0xc0, ..] if !has_other(0) && !has_other(2) => Some(0),
        // push, jumps, cmp and test.
        [0x50..=0x57 | 0x70..=0x7f | 0xe9 | 0xeb | 0x38..=0x3b | 0x84 | 0x85, ..]
        | [0x0f, 0x80..=0x8f, ..] => number,
        // pop and mov of a constant.
        [opcode @ (0x58..=0x5f | 0xb8..=0xbf), ..] => number.filter(|_| opcode & 7 != 0 || has_other(0)),
        // To the operand of add, or, and, sub, xor, mov.
        [0x01 | 0x09 | 0x21 | 0x29 | 0x31 | 0x81 | 0x83 | 0x89 | 0xc7, modrm, ..] => {
            number.filter(|_| modrm < 0xc0 || modrm & 7 != 0 || has_other(0))
        }
        // To the register.
        [0x03 | 0x0b | 0x23 | 0x2b | 0x33 | 0x63 | 0x8b | 0x8d, modrm, ..] => {
            number.filter(|_| modrm >> 3 & 7 != 0 || has_other(2))
        }
        _ => None,
    }
}
