//! Where the return address is while a function moves it, to make room for arguments behind it.
//!
//! V8's functions that pass arguments on copy what is on the stack downwards, the return address first, when there are fewer of
//! them than the function takes (src/builtins/x64/builtins-x64.cc, `Generate_AllocateSpaceAndShiftExistingArguments`; src/codegen/x64/
//! macro-assembler-x64.cc, `InvokePrologue`):
//!
//! ```text
//!     mov %rsp, %r8;  lea (, %rbx, 8), %r10;  sub %r10, %rsp
//!     ..                              the return address is at r8
//! 1:  mov (%r8, %r11, 8), %r10;  mov %r10, (%rsp, %r11, 8);  inc %r11;  cmp ..;  jl 1b
//!     lea (%rsp, %r9, 8), %r8         it is at rsp: who gives up where it was must have another
//! ```
//!
//! In the loop it is at one place or the other, as the register that counts says, which no rule can state.

use super::instruction::{Effect, Instruction, Operand, RBP, RSP};

/// How far the return address has been moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shift {
    /// Not at all. This register holds where it is, if one is known to.
    None(Option<u8>),
    /// rsp has been moved below it; it is where this register points.
    Begun(u8),
    /// It is being copied from where this register points.
    Copying(u8),
}

impl Shift {
    /// What is known where control comes from two places.
    pub(super) fn join(one: Self, other: Self) -> Option<Self> {
        match (one, other) {
            _ if one == other => Some(one),
            (Self::None(_), Self::None(_)) => Some(Self::None(None)),
            (Self::Begun(from), Self::Copying(to)) | (Self::Copying(from), Self::Begun(to)) => {
                (from == to).then_some(Self::Copying(to))
            }
            _ => None,
        }
    }

    /// Behind an instruction that `code` begins with, in front of which rsp points at the return address if `is_on_top`. `None` if
    /// that is nowhere, as far as is known.
    pub(super) fn behind(self, instruction: Instruction, code: &[u8], is_on_top: bool) -> Option<Self> {
        match (self, instruction.effect) {
            (Self::None(_), Effect::Load(to, Operand::Register(RSP))) if is_on_top && to != RBP => {
                Some(Self::None(Some(to)))
            }
            (Self::None(Some(at)), _) if is_on_top && moves_stack_pointer(code) => Some(Self::Begun(at)),
            (Self::None(at), _) => Some(Self::None(at.filter(|at| keeps(code, *at)))),
            (Self::Begun(at) | Self::Copying(at), effect) if touches_stack(effect) || !keeps(code, at) => {
                let gives_up = matches!(effect, Effect::Address(to, of) if to == at && of.base.is_none());
                (gives_up && matches!(self, Self::Copying(_))).then_some(Self::None(None))
            }
            (Self::Begun(at) | Self::Copying(at), Effect::Store(..)) => Some(Self::Copying(at)),
            // To a loop's start, from its condition, which is looked at first. There is a word to copy at least.
            (Self::Begun(at), Effect::Branch(to)) if to < 0 => Some(Self::Copying(at)),
            (shift, _) => Some(shift),
        }
    }
}

/// Whether `code` begins with `sub` of a register from rsp.
fn moves_stack_pointer(code: &[u8]) -> bool {
    matches!(code, [0x48 | 0x49, 0x2b, 0xe0..=0xe7, ..])
}

/// Whether an instruction may write rsp or rbp, or leave the function.
fn touches_stack(effect: Effect) -> bool {
    match effect {
        Effect::Load(to, _) | Effect::Address(to, _) | Effect::Subtract(to, _) | Effect::Add(to, _) => {
            to == RSP || to == RBP
        }
        Effect::Other { stack_pointer, frame_pointer } => stack_pointer || frame_pointer,
        Effect::Store(..) | Effect::Branch(_) | Effect::Jump(Some(_)) => false,
        _ => true,
    }
}

/// Whether the instruction that `code` begins with is known to leave a register as it is.
pub(super) fn keeps(code: &[u8], register: u8) -> bool {
    let (rex, code) = match code {
        [rex @ 0x40..=0x4f, rest @ ..] => (*rex, rest),
        _ => (0, code),
    };
    let is_other_operand = |modrm: u8| modrm < 0xc0 || modrm & 7 | (rex & 1) << 3 != register;
    let is_other_register = |modrm: u8| modrm >> 3 & 7 | (rex & 4) << 1 != register;
    match *code {
        // cmp, test, jumps, push
        [0x38..=0x3d | 0x84 | 0x85 | 0x70..=0x7f | 0xe9 | 0xeb | 0x50..=0x57, ..]
        | [0x0f, 0x80..=0x8f, ..] => true,
        // To the operand of add, or, and, sub, xor, mov, shifts.
        [0x01 | 0x09 | 0x21 | 0x29 | 0x31 | 0x89 | 0x81 | 0x83 | 0xc7 | 0xc1 | 0xd1 | 0xd3, modrm, ..] => {
            is_other_operand(modrm)
        }
        // inc, dec; test of a constant
        [0xff, modrm, ..] if modrm & 0x30 == 0 => is_other_operand(modrm),
        [0xf6 | 0xf7, modrm, ..] => modrm & 0x38 == 0,
        // To the register: add, or, and, sub, xor, mov; movsx, lea; movzx, movsx
        [0x03 | 0x0b | 0x23 | 0x2b | 0x33 | 0x63 | 0x8b | 0x8d, modrm, ..]
        | [0x0f, 0xb6 | 0xb7 | 0xbe | 0xbf, modrm, ..] => is_other_register(modrm),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_instruction_may_write() {
        for (code, written) in [
            // xor %r11d, %r11d; inc %r11; mov (%r8, %r11, 8), %r10; lea (%rsp, %r9, 8), %r8
            (&[0x45, 0x33, 0xdb][..], 11),
            (&[0x49, 0xff, 0xc3], 11),
            (&[0x4f, 0x8b, 0x14, 0xd8], 10),
            (&[0x4e, 0x8d, 0x04, 0xcc], 8),
            // sub %rax, %rbx; movzwl 0x29(%rcx), %ecx; shl $32, %rbx
            (&[0x48, 0x2b, 0xd8], 3),
            (&[0x0f, 0xb7, 0x49, 0x29], 1),
            (&[0x48, 0xc1, 0xe3, 0x20], 3),
        ] {
            for register in 0..16 {
                assert_eq!(keeps(code, register), register != written, "{code:x?} {register}");
            }
        }
        // mov %r10, (%rsp, %r11, 8); cmp %r9, %r11; jl
        for code in [&[0x4e, 0x89, 0x14, 0xdc][..], &[0x4d, 0x3b, 0xd9], &[0x7c, 0xf0]] {
            assert!((0..16).all(|register| keeps(code, register)), "{code:x?}");
        }
        // Whatever else there is: xchg, call, pop.
        for code in [&[0x87, 0xd9][..], &[0xe8, 0, 0, 0, 0], &[0x58], &[0x66, 0x89, 0xc1], &[]] {
            assert!((0..16).all(|register| !keeps(code, register)), "{code:x?}");
        }
    }
}
