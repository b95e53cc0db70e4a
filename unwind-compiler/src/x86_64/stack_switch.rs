//! Code of x86-64 that leaves one stack for another.
//!
//! Coroutines switch stacks in few instructions, in assembly and mostly without CFI. Two shapes leave no doubt: what pops
//! registers and returns does so on whatever stack it is; and what takes its stack from a register and never returns has no
//! caller.

use std::collections::BTreeMap;
use std::ops::Range;

use windlass_schema::coroutines::MAX_MAKECONTEXT_BYTES;

use super::code::WORD;
use super::instruction::{Effect, Operand, RBP, RBX, RSP, decode};
use crate::code_bytes::CodeBytes;

/// Most instructions between a switch of stacks and the return on the other one: six registers are kept.
const MAX_INSTRUCTIONS_TO_RETURN: usize = 16;
/// Most bytes of what a coroutine's function returns to: glibc's have 25, and 60 with shadow stacks.
const MAX_COROUTINE_END_BYTES: usize = 128;
/// hlt, which no process may.
const HALT: u8 = 0xf4;

/// A frame that pops and a return leave, by bytes below its CFA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PoppedFrame {
    /// Where rsp points in front of them.
    pub(super) depth: i32,
    /// Where the caller's rbp is popped from, if it is.
    pub(super) saved: Option<i32>,
}

/// The frame in front of `code`, if that pops registers and returns.
pub(super) fn popped_frame(code: &[u8]) -> Option<PoppedFrame> {
    let (mut at, mut popped, mut place) = (0, 0, None);
    for _ in 0..MAX_INSTRUCTIONS_TO_RETURN {
        let instruction = decode(code.get(at..)?)?;
        at += instruction.bytes;
        match instruction.effect {
            Effect::Pop(Some(RBP)) if place.is_some() => return None,
            Effect::Pop(Some(RBP)) => place = Some(popped),
            Effect::Pop(Some(register)) if register != RSP => {}
            Effect::Return if popped > 0 => {
                let depth = WORD + popped;
                return Some(PoppedFrame { depth, saved: place.map(|place| depth - place) });
            }
            _ => return None,
        }
        popped += WORD;
    }
    None
}

/// Bytes of what a coroutine's function returns to, if `code` begins with that. What makes its stack from a register that
/// calls preserve has nothing of its caller's, and what then comes to nothing but traps goes nowhere. glibc's
/// `__start_context`: `mov %rbx, %rsp; mov (%rsp), %rdi; test %rdi, %rdi; je; call; mov %rax, %rdi; call; hlt`
/// (sysdeps/unix/sysv/linux/x86_64/__start_context.S).
pub(super) fn coroutine_end(code: &[u8]) -> Option<usize> {
    let first = decode(code)?;
    let Effect::Load(RSP, Operand::Register(RBX | RBP | 12..=15)) = first.effect else { return None };
    let code = &code[..code.len().min(MAX_COROUTINE_END_BYTES)];
    let (mut calls, mut met, mut pending) = (0, BTreeMap::new(), vec![first.bytes]);
    while let Some(at) = pending.pop() {
        if met.contains_key(&at) {
            continue;
        }
        let instruction = decode(code.get(at..)?)?;
        let next = at + instruction.bytes;
        met.insert(at, next);
        let target = |to: i32| next.checked_add_signed(isize::try_from(to).ok()?);
        match instruction.effect {
            Effect::Return | Effect::Jump(None) | Effect::Load(RSP, _) | Effect::Leave => return None,
            Effect::Trap => {}
            _ if code[at] == HALT => {}
            Effect::Jump(Some(to)) => pending.push(target(to)?),
            Effect::Branch(to) => pending.extend([target(to)?, next]),
            effect => {
                calls += usize::from(matches!(effect, Effect::Call(_)));
                pending.push(next);
            }
        }
    }
    // One after the other, without a gap.
    let mut end = first.bytes;
    for (start, next) in met {
        if start != end {
            return None;
        }
        end = next;
    }
    (calls > 0).then_some(end)
}

/// Bytes of `lea` of an address relative to rip.
const RELATIVE_LEA_BYTES: usize = 7;

/// Where a coroutine's function returns to that libc's `makecontext`, with its code at these addresses, puts on a new stack
/// as a return address. Of the addresses that it takes, the others are of no code, or of other code.
pub(crate) fn returned_to(code: &CodeBytes<'_>, makecontext: &Range<u64>) -> Option<u64> {
    let bytes = code.get(makecontext).filter(|bytes| bytes.len() as u64 <= MAX_MAKECONTEXT_BYTES)?;
    let starts = makecontext.start + RELATIVE_LEA_BYTES as u64..;
    let mut taken = bytes.windows(RELATIVE_LEA_BYTES).zip(starts).filter_map(|(lea, next)| match *lea {
        [0x48 | 0x4c, 0x8d, modrm, a, b, c, d] if modrm & 0xc7 == 5 => {
            Some(next.wrapping_add_signed(i32::from_le_bytes([a, b, c, d]).into()))
        }
        _ => None,
    });
    taken.find(|address| code.from(*address).and_then(coroutine_end).is_some())
}
