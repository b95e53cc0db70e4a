//! Rows of a function of aarch64, whose calls leave the return address in x30.
//!
//! # Why this shape
//! The table's depth is exact here too, but where x29 and x30 are saved is the prologue's to say
//! (cmd/internal/obj/arm64/obj7.go, `preprocess`). With `N` the function's depth behind it:
//!
//! ```text
//! N up to 240                     more
//! str x30, [sp, -N]!              sub x20, sp, N
//! stur x29, [sp, -8]              stp x29, x30, [x20, -8]
//! sub x29, sp, 8                  mov sp, x20
//! ```
//! So at depth `N`, cfa = sp + N, ra = *(cfa - N), and the caller's x29 is at cfa - N - 8, below the stack pointer, in a word that
//! no callee takes. At depth 0, cfa = sp, and the return address is in x30, which a call has changed only where the stack is
//! grown: there the runtime puts it back (`morestack`, runtime/asm_arm64.s).
//!
//! Functions that write the stack pointer go from one stack to another, and are unsupported. So are functions in assembly of which there
//! is no code, as in a skeleton: one without a frame may keep its return address where it likes. And so are those that signal handlers
//! make interrupted code appear to have called: they push x30 as it was then, of which the code's own rows know nothing
//! (`preparePanic` and `pushCall`, runtime/signal_arm64.go).

use windlass_schema::{CfaRule, FramePointerRule, Register, ReturnAddressRule, Rule, UnsupportedReason};

use super::table::{Function, Span, Table};
use super::{FunctionRow, GoRule, begins_stack, is_entered_by_interruption};
use crate::aarch64::instruction::{BYTES, Effect, X29, X30, decode};

/// Most bytes of a frame whose x30 is stored by an instruction that moves sp too.
const MAX_SMALL_BYTES: i32 = 0xf0;
/// str x30, [sp, -N]!: bits that count, and what they are; N is in bits 12 to 20.
const PUSH_X30: (u32, u32) = (0xffe0_0fff, 0xf800_0ffe);
/// stur x29, [sp, -8]
const STORE_X29: u32 = 0xf81f_83fd;
/// stp x29, x30, [x20, -8], and mov sp, x20
const STORE_PAIR: u32 = 0xa93f_fa9d;
const SET_SP: u32 = 0x9100_029f;

/// What the prologue is known to save.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Saved {
    /// The depth behind it.
    depth: i32,
    /// How far into the function x29 is saved; `None` if nothing is known of it.
    frame_pointer: Option<u32>,
}

/// Appends the rows of `function`.
pub(super) fn rules(
    table: &Table<'_>,
    function: &Function<'_>,
    spans: &[Span],
    code: Option<&[u8]>,
    rows: &mut Vec<FunctionRow>,
) {
    let whole = spans.first().map_or(0, |span| span.start)..spans.last().map_or(0, |span| span.end);
    let mut push = |rule| rows.push((whole.clone(), GoRule::Rule(rule)));
    let is_first = if table.has_flags() { function.is_top_frame() } else { begins_stack(function) };
    // The kernel calls sigtramp for code that a signal interrupted.
    if is_first && !function.is_named("runtime.sigtramp") || function.is_named("_rt0_arm64_linux") {
        let is_named = !function.name.is_empty();
        return push(if is_named { Rule::End } else { Rule::Unsupported(UnsupportedReason::StackSwitch) });
    }
    if is_entered_by_interruption(function) {
        return push(Rule::Unsupported(UnsupportedReason::SignalFrame));
    }
    let is_compiled = table.marks_assembly() && !function.is_assembly();
    if !table.has_flags() || function.writes_stack_pointer() || !is_compiled && uses_links(spans, code) {
        return push(Rule::Unsupported(UnsupportedReason::StackSwitch));
    }
    let saved = spans.iter().find(|span| span.depth != Some(0)).and_then(|span| {
        let depth = span.depth.filter(|depth| *depth > 0)?;
        match code {
            Some(code) => prologue(code, span.start, depth),
            None => is_compiled.then(|| compiled(span.start, depth)),
        }
    });
    for span in spans {
        let from = saved.and_then(|saved| saved.frame_pointer).unwrap_or(0).clamp(span.start, span.end);
        for range in [span.start..from, from..span.end] {
            if !range.is_empty() {
                rows.push((range.clone(), GoRule::Rule(rule(range.start, span.depth, saved))));
            }
        }
    }
}

/// The rule so far into the function, at this depth.
fn rule(place: u32, depth: Option<i32>, saved: Option<Saved>) -> Rule {
    let frame = |depth, return_address, frame_pointer| Rule::Frame {
        cfa: CfaRule::Offset(Register::SP, depth),
        return_address,
        frame_pointer,
    };
    match (depth, saved) {
        (None, _) => Rule::Unsupported(UnsupportedReason::Malformed),
        (Some(0), _) => frame(0, ReturnAddressRule::Register(Register::X30), FramePointerRule::Same),
        (Some(depth), Some(saved)) if depth == saved.depth => {
            let frame_pointer = match (saved.frame_pointer, depth.checked_add(8)) {
                (Some(from), _) if place < from => FramePointerRule::Same,
                (Some(_), Some(below)) => FramePointerRule::AtCfa(-below),
                _ => FramePointerRule::Undefined,
            };
            frame(depth, ReturnAddressRule::AtCfa(-depth), frame_pointer)
        }
        _ => Rule::Unsupported(UnsupportedReason::ReturnAddress),
    }
}

/// What the prologue saves that ends at `at`, with this depth behind it.
fn prologue(code: &[u8], at: u32, depth: i32) -> Option<Saved> {
    let (before, behind) = code.split_at_checked(usize::try_from(at).ok()?)?;
    let instruction = |bytes: &[u8; BYTES]| u32::from_le_bytes(*bytes);
    let last = |number: usize| before.rchunks_exact(BYTES).nth(number)?.first_chunk().map(instruction);
    let next = behind.first_chunk().map(instruction);
    let first = last(0)?;
    let pushed = (first << 11) as i32 >> 23;
    if first & PUSH_X30.0 == PUSH_X30.1 && pushed == -depth {
        let frame_pointer = (next == Some(STORE_X29)).then_some(at + BYTES as u32);
        return Some(Saved { depth, frame_pointer });
    }
    (first == SET_SP && last(1)? == STORE_PAIR).then_some(Saved { depth, frame_pointer: Some(at) })
}

/// The same of a function that is compiled: they all have one.
fn compiled(at: u32, depth: i32) -> Saved {
    let store = if depth <= MAX_SMALL_BYTES { BYTES as u32 } else { 0 };
    Saved { depth, frame_pointer: Some(at + store) }
}

/// Whether a function in assembly may have something else in x29 or x30 where it has no frame.
fn uses_links(spans: &[Span], code: Option<&[u8]>) -> bool {
    let Some(code) = code else { return true };
    let frameless = spans.iter().filter(|span| span.depth == Some(0));
    frameless
        .flat_map(|span| code.get(span.start as usize..span.end as usize).unwrap_or_default().chunks(BYTES))
        .any(|bytes| match decode(bytes) {
            Some(Effect::Access(access)) => {
                access.is_load && access.is_general && holds_link(access.registers)
            }
            Some(Effect::Add(to, ..)) => holds_link([Some(to), None]),
            Some(Effect::Other([first, second, third])) => {
                holds_link([first, second]) || holds_link([third, None])
            }
            Some(Effect::Call(_)) | None => true,
            Some(
                Effect::Return | Effect::Jump(_) | Effect::Branch(_) | Effect::SystemCall | Effect::Trap,
            ) => false,
        })
}

fn holds_link(registers: [Option<u8>; 2]) -> bool {
    registers.iter().flatten().any(|register| [X29, X30].contains(register))
}

#[cfg(test)]
mod tests;
