//! Code of x86-64 that is known by its bytes: process entries, the trampolines of signals, prologues, what is between functions.

use windlass_schema::{Architecture, Rule};

use super::code::Machine;
use super::instruction::{Effect, MAX_BYTES, Operand, RBP, RSP, decode};
use super::{plt, stack_switch};
use crate::projection::SIGCONTEXT_OFFSET;
use crate::recognise::{Code, Linkage, Prologue, Trampoline};

/// xor ebp, ebp; and with 64 bits.
const ZEROED_FRAME_POINTER: [&[u8]; 4] =
    [&[0x31, 0xed], &[0x33, 0xed], &[0x48, 0x31, 0xed], &[0x48, 0x33, 0xed]];

/// Most instructions of a process entry in front of its call; C libraries take 4 to 12.
const MAX_ENTRY_INSTRUCTIONS: usize = 32;

/// mov rax, 15 with a sign-extended constant; syscall: `rt_sigreturn` (arch/x86/entry/syscalls/syscall_64.tbl).
pub(crate) const RT_SIGRETURN_OF_RAX: [u8; 9] = [0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05];

/// mov eax, 15; syscall.
const RT_SIGRETURN_OF_EAX: [u8; 7] = [0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05];

/// Whether a prefix makes another move of that one: REX, to another register, and that of words, of two bytes.
fn changes_move(prefix: &u8) -> bool {
    matches!(prefix, 0x40..=0x4f | 0x66)
}

const NOP: u8 = 0x90;

/// int3
const TRAP: u8 = 0xcc;

/// How far back a call would reach whose displacement ends in [`NOP`].
const CALL_ENDING_IN_NOP_BYTES: u64 = (0x100 - NOP as u64 - 1) << 24;

impl Code for Machine {
    const ARCHITECTURE: Architecture = Architecture::X86_64;
    const ALIGNMENT: u64 = 1;
    const CALL_BYTES: usize = 5;

    /// nop of one and of several bytes, int3, and what linkers leave zero.
    fn padding(code: &[u8]) -> Option<usize> {
        let prefixes = code.iter().take(MAX_BYTES).take_while(|byte| matches!(byte, 0x66 | 0x2e)).count();
        match code.get(prefixes..)? {
            [0x00 | 0xcc, ..] if prefixes == 0 => Some(1),
            [NOP, ..] | [0x0f, 0x1f, ..] => decode(code).map(|instruction| instruction.bytes),
            _ => None,
        }
    }

    /// The kernel and dynamic linkers jump there, and the code zeroes rbp for the walk to end (System V ABI for AMD64,
    /// 3.4.1): no function may, as rbp is its caller's.
    fn process_entry(code: &[u8]) -> Option<usize> {
        let mut at = 0;
        let mut is_zeroed = false;
        for _ in 0..MAX_ENTRY_INSTRUCTIONS {
            let rest = code.get(at..)?;
            let instruction = decode(rest)?;
            at += instruction.bytes;
            match instruction.effect {
                Effect::Branch(_) | Effect::Jump(_) | Effect::Return | Effect::Trap => return None,
                Effect::Call(_) => return is_zeroed.then_some(at),
                _ => is_zeroed |= ZEROED_FRAME_POINTER.iter().any(|bytes| rest.starts_with(bytes)),
            }
        }
        None
    }

    /// glibc's hands the stack with the program's arguments to what relocates the linker, and at last jumps to what that
    /// returned, the program's own entry: `mov %rsp, %rdi; call _dl_start; mov %rax, %r12; ...; call _dl_init; ...; jmp
    /// *%r12` (sysdeps/x86_64/dl-machine.h, `RTLD_START`). There is no way but the one, and it does not return.
    fn linker_entry(code: &[u8]) -> Option<usize> {
        let mut at = if code.starts_with(&ENDBR64) { ENDBR64.len() } else { 0 };
        if !code[at..].starts_with(&STACK_POINTER_TO_ARGUMENT) {
            return None;
        }
        let mut calls = 0;
        for _ in 0..MAX_ENTRY_INSTRUCTIONS {
            let rest = code.get(at..)?;
            let instruction = decode(rest)?;
            at += instruction.bytes;
            match instruction.effect {
                Effect::Jump(None) => return (calls > 0 && is_jump_by_register(rest)).then_some(at),
                Effect::Branch(_) | Effect::Jump(_) | Effect::Return | Effect::Trap => return None,
                Effect::Call(_) => calls += 1,
                _ => {}
            }
        }
        None
    }

    /// In front of its call, glibc's entry has `main` in rdi, the first argument of `__libc_start_main`
    /// (sysdeps/x86_64/start.S).
    fn handed_over(entry: &[u8], address: u64) -> Option<u64> {
        let mut at = 0;
        let mut last = None;
        while let Some(rest) = entry.get(at..).filter(|rest| !rest.is_empty()) {
            let next = at + decode(rest)?.bytes;
            if next == entry.len() {
                return last;
            }
            last = match *rest {
                // lea of an address relative to rip; mov of a constant.
                [0x48, 0x8d, 0x3d, a, b, c, d, ..] => {
                    let behind = address.checked_add(next as u64)?;
                    Some(behind.wrapping_add_signed(i32::from_le_bytes([a, b, c, d]).into()))
                }
                [0x48, 0xc7, 0xc7, a, b, c, d, ..] => u64::try_from(i32::from_le_bytes([a, b, c, d])).ok(),
                _ => None,
            };
            at = next;
        }
        None
    }

    /// When a handler has returned, rsp is at the `ucontext` (arch/x86/kernel/signal_64.c, `rt_sigreturn`). Its return
    /// address is the trampoline's first byte, so that it is looked up one byte before: as in
    /// glibc's own CFI, that is a part of the trampoline if it is a nop.
    #[inline]
    fn trampoline(code: &[u8], at: usize, first_code: u64, address: u64) -> Option<Trampoline> {
        let (before, code) = code.split_at(at);
        let bytes = if code.starts_with(&RT_SIGRETURN_OF_RAX) {
            RT_SIGRETURN_OF_RAX.len()
        } else if code.starts_with(&RT_SIGRETURN_OF_EAX) && !before.last().is_some_and(changes_move) {
            RT_SIGRETURN_OF_EAX.len()
        } else {
            return None;
        };
        let is_nop = before.last() == Some(&NOP);
        // No call ends in that byte, which its own return would come to.
        let is_of_no_call = address.saturating_sub(first_code) < CALL_ENDING_IN_NOP_BYTES;
        Some(Trampoline {
            before: usize::from(is_nop && is_of_no_call),
            bytes,
            rule: Rule::Signal(SIGCONTEXT_OFFSET),
        })
    }

    fn coroutine_end(code: &[u8]) -> Option<usize> {
        stack_switch::coroutine_end(code)
    }

    fn prologue(code: &[u8]) -> Prologue {
        let mut at = 0;
        if code.starts_with(&ENDBR64) {
            at = ENDBR64.len();
        }
        let Some(first) = decode(&code[at..]) else { return Prologue::Unknown };
        match first.effect {
            Effect::Push(Some(RBP)) => {
                // Compilers schedule a few others in between.
                for _ in 0..MAX_PROLOGUE_INSTRUCTIONS {
                    let Some(instruction) = code.get(at..).and_then(decode) else { break };
                    at += instruction.bytes;
                    match instruction.effect {
                        Effect::Load(RBP, Operand::Register(RSP)) => return Prologue::FramePointer,
                        Effect::Call(_) | Effect::Jump(_) | Effect::Return | Effect::Trap => break,
                        _ => {}
                    }
                }
                Prologue::Other
            }
            Effect::Push(_) | Effect::Add(RSP, _) => Prologue::Other,
            _ => Prologue::Unknown,
        }
    }

    #[inline]
    fn linkage(code: &[u8], address: u64, is_section: bool) -> Option<Linkage> {
        plt::run(code, address, is_section)
    }

    /// Behind two traps: a single one may be what a call that does not return comes back to.
    fn is_padded(before: &[u8]) -> bool {
        before.ends_with(&[TRAP, TRAP])
    }

    fn call(code: &[u8], address: u64) -> Option<u64> {
        let [0xe8, a, b, c, d, ..] = *code else { return None };
        let next = address.wrapping_add(Self::CALL_BYTES as u64);
        Some(next.wrapping_add_signed(i32::from_le_bytes([a, b, c, d]).into()))
    }
}

/// mov %rsp, %rdi
const STACK_POINTER_TO_ARGUMENT: [u8; 3] = [0x48, 0x89, 0xe7];

/// Whether `code` begins with a jump to where a register points.
fn is_jump_by_register(code: &[u8]) -> bool {
    matches!(code, [0xff, 0xe0..=0xe7, ..] | [0x41, 0xff, 0xe0..=0xe7, ..])
}

/// endbr64
pub(super) const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];

/// Most instructions of a prologue up to `mov rbp, rsp`.
const MAX_PROLOGUE_INSTRUCTIONS: usize = 8;
