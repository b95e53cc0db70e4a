//! Rows of a function that moves its stack pointer by constants only: all that are compiled, most in assembly.
//!
//! # Why this shape
//! For these the table's depth is exact at each instruction: the garbage collector walks by it. It says nothing about
//! rbp, which peers take to be saved as soon as there is a frame, or not at all. Where it is saved follows from the
//! prologue, of which the assembler has one shape in each era; so its bytes are looked for where the depth first grows,
//! and rbp counts as saved only behind them. A compiled function leaves rbp alone otherwise (`FPReg` in
//! cmd/compile/internal/ssa/regalloc.go); one in assembly may use it, before or behind.

use windlass_schema::{CfaRule, FramePointerRule, Register, ReturnAddressRule, Rule, UnsupportedReason};

use super::table::{Function, Span, Table};
use super::{FunctionRow, GoRule};
pub(super) use crate::projection::SIGCONTEXT_OFFSET;
use crate::x86_64::by_bytes::RT_SIGRETURN_OF_RAX;
use crate::x86_64::instruction::decode;

/// From the CFA to where a prologue saves rbp: behind the return address.
pub(super) const SAVED_FRAME_POINTER: FramePointerRule = FramePointerRule::AtCfa(-16);

/// `lea rbp, [rsp - 16]`: before Go 1.21 a call of `duffzero` or `duffcopy` sets up a frame by hand, even
/// where the function has none (`bpduff1`, cmd/internal/obj/x86/asm6.go).
const DUFF_FRAME: [u8; 5] = [0x48, 0x8d, 0x6c, 0x24, 0xf0];

/// The prologue that compiled functions have where there is no code to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    /// `push rbp`, from Go 1.21.
    Push,
    /// `sub rsp, N`, before.
    Subtract,
    /// Code says, or nothing does.
    Unknown,
}

/// Most stack that a `Push` prologue takes at first, in bytes: rbp.
const PUSHED_BYTES: i32 = 8;

/// The style of a table's compiled functions: they all have the same. With `push`, the first depth is 8 in each.
pub(super) fn style(table: &Table<'_>) -> Style {
    if !table.marks_assembly() {
        return Style::Unknown;
    }
    let mut style = Style::Unknown;
    let mut budget = table.depth_budget();
    let mut spans = Vec::new();
    for function in (0..table.function_count()).filter_map(|index| table.function(index).ok()) {
        spans.clear();
        if function.is_assembly() || table.depths(&function, &mut budget, &mut spans).is_err() {
            continue;
        }
        let mut depths = spans.iter().filter_map(|span| span.depth).skip_while(|depth| *depth == 0);
        match depths.next() {
            None => {}
            Some(PUSHED_BYTES) if depths.next().is_some_and(|depth| depth > PUSHED_BYTES) => {
                style = Style::Push
            }
            Some(PUSHED_BYTES) => {}
            Some(_) => return Style::Subtract,
        }
    }
    style
}

/// Whether this is all of the code that returns from a signal handler. Unwinders of C know the trampoline by these
/// bytes, so Go's has them (`sigreturn__sigaction`, runtime/sys_linux_amd64.s).
pub(super) fn is_signal_trampoline(code: &[u8]) -> bool {
    code.starts_with(&RT_SIGRETURN_OF_RAX)
}

/// Where a function saves rbp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Saved {
    /// Behind this many bytes of the function, wherever the stack is not empty; elsewhere rbp is the caller's.
    Behind(u32),
    /// As above, but whether it is still the caller's from the first address to the second is unknown.
    Between(u32, u32),
    /// The function has no frame, and rbp is the caller's throughout.
    Never,
    /// Unknown.
    Unknown,
}

impl Saved {
    /// Where the rule may change within one depth.
    fn changes(self) -> [u32; 2] {
        match self {
            Self::Behind(from) => [from, from],
            Self::Between(from, to) => [from, to],
            Self::Never | Self::Unknown => [0, 0],
        }
    }

    /// The rule at an address of the function.
    fn at(self, place: u32, depth: Option<i32>) -> FramePointerRule {
        match self {
            Self::Never => FramePointerRule::Same,
            Self::Unknown => FramePointerRule::Undefined,
            Self::Behind(from) | Self::Between(from, _) if place < from || depth == Some(0) => {
                FramePointerRule::Same
            }
            Self::Between(_, to) if place < to => FramePointerRule::Undefined,
            Self::Behind(_) | Self::Between(..) => SAVED_FRAME_POINTER,
        }
    }
}

/// Appends the rows of `function`.
pub(super) fn rules(
    table: &Table<'_>,
    function: &Function<'_>,
    spans: &[Span],
    code: Option<&[u8]>,
    style: Style,
    rows: &mut Vec<FunctionRow>,
) {
    let is_compiled = table.marks_assembly() && !function.is_assembly();
    let saved = saved(is_compiled, spans, code, style);
    for span in spans {
        let [from, to] = saved.changes().map(|place| place.clamp(span.start, span.end));
        for range in [span.start..from, from..to, to..span.end] {
            if !range.is_empty() {
                let frame_pointer = saved.at(range.start, span.depth);
                rows.push((range, GoRule::Rule(rule(span.depth, frame_pointer))));
            }
        }
    }
}

/// The rule at this depth.
pub(super) fn rule(depth: Option<i32>, frame_pointer: FramePointerRule) -> Rule {
    match depth {
        None => Rule::Unsupported(UnsupportedReason::Malformed),
        // The return address has been popped (`rawVforkSyscall`, internal/runtime/syscall/asm_linux_amd64.s).
        Some(depth) if depth < 0 => Rule::Unsupported(UnsupportedReason::ReturnAddress),
        Some(depth) => match depth.checked_add(8) {
            Some(offset) => Rule::Frame {
                cfa: CfaRule::Offset(Register::RSP, offset),
                return_address: ReturnAddressRule::AtCfa(-8),
                frame_pointer,
            },
            None => Rule::Unsupported(UnsupportedReason::CfaOffset),
        },
    }
}

fn saved(is_compiled: bool, spans: &[Span], code: Option<&[u8]>, style: Style) -> Saved {
    let Some(framed) = spans.iter().find(|span| span.depth != Some(0)) else {
        return match code {
            Some(code) if is_compiled => {
                if code.windows(DUFF_FRAME.len()).any(|bytes| bytes == DUFF_FRAME) {
                    Saved::Unknown
                } else {
                    Saved::Never
                }
            }
            Some(code) if leaves_frame_pointer(code) => Saved::Never,
            None if is_compiled && style == Style::Push => Saved::Never,
            _ => Saved::Unknown,
        };
    };
    let Some(depth) = framed.depth.filter(|depth| *depth > 0 && framed.start > 0) else {
        return Saved::Unknown;
    };
    let at = framed.start;
    match code {
        Some(code) => prologue(code, at, depth).map_or(Saved::Unknown, Saved::Behind),
        None if !is_compiled => Saved::Unknown,
        None => match style {
            Style::Push => Saved::Behind(at),
            Style::Subtract => Saved::Between(at, at + store_bytes(depth - 8)),
            Style::Unknown => Saved::Unknown,
        },
    }
}

/// Bytes of `mov [rsp + displacement], rbp`.
fn store_bytes(displacement: i32) -> u32 {
    match i8::try_from(displacement) {
        Ok(0) => 4,
        Ok(_) => 5,
        Err(_) => 8,
    }
}

/// How far into a function its prologue, which first takes `depth` bytes of stack just before `at`, has saved rbp.
pub(super) fn prologue(code: &[u8], at: u32, depth: i32) -> Option<u32> {
    let place = usize::try_from(at).ok()?;
    let (before, behind) = code.split_at_checked(place)?;
    // push rbp; mov rbp, rsp
    if depth == PUSHED_BYTES && before.ends_with(&[0x55]) && behind.starts_with(&[0x48, 0x89, 0xe5]) {
        return Some(at);
    }
    // sub rsp, N, or, where that is shorter, add rsp, -N.
    let wide = depth.to_le_bytes();
    let subtracts = [&[0x48, 0x81, 0xec][..], &wide].concat();
    let narrow = i8::try_from(depth).map(|depth| [0x48, 0x83, 0xec, depth as u8]);
    let added = i8::try_from(-depth).map(|depth| [0x48, 0x83, 0xc4, depth as u8]);
    let is_subtracted = before.ends_with(&subtracts)
        || narrow.is_ok_and(|bytes| before.ends_with(&bytes))
        || added.is_ok_and(|bytes| before.ends_with(&bytes));
    // mov [rsp + N - 8], rbp
    let displacement = depth.checked_sub(8)?;
    let store = match (store_bytes(displacement), displacement.to_le_bytes()) {
        (4, _) => vec![0x48, 0x89, 0x2c, 0x24],
        (5, [low, ..]) => vec![0x48, 0x89, 0x6c, 0x24, low],
        (_, bytes) => [&[0x48, 0x89, 0xac, 0x24][..], &bytes].concat(),
    };
    (is_subtracted && displacement >= 0 && behind.starts_with(&store)).then(|| at + store_bytes(displacement))
}

/// Whether all instructions are known and none may write rbp.
fn leaves_frame_pointer(code: &[u8]) -> bool {
    let mut at = 0;
    while let Some(rest) = code.get(at..).filter(|rest| !rest.is_empty()) {
        match decode(rest) {
            Some(instruction) if !instruction.effect.writes_frame_pointer() => at += instruction.bytes,
            _ => return false,
        }
    }
    true
}
