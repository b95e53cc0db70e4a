//! Rows of a function that writes its stack pointer: it switches stacks, or aligns one for C.
//!
//! # Why this shape
//! The runtime's own tracebacks end at such functions, unless it runs one of two that it knows by number; unwinders
//! built on the table do the same, or take its depths for true. Here each instruction is followed. Until the first
//! one that writes rsp the table's depths hold, and they are compared with what the code does. Behind it, three
//! things can still be proved:
//!
//! - rbp was set to `cfa - 16` by the prologue and has not been written since: `cfa = rbp + 16`, on whatever stack
//!   rsp is. So it is with `systemstack` from Go 1.21, with `cgocallback`, which leads from Go back to C, and with those
//!   that call the vDSO (`nanotime1`, `walltime`).
//! - What the code behind a call does to get its stack pointer back says where the frame is during the call. So it is
//!   with `asmcgocall`:
//!
//! ```text
//! call rax
//! mov  rdi, [rsp + g]          saved g
//! mov  rsi, [rdi + 8]          g.stack.hi
//! sub  rsi, [rsp + depth]      rsi = *(*(rsp + g) + 8) - *(rsp + depth)
//! mov  rsp, rsi                from here on the table's depths hold again
//! ```
//! - `mcall` never returns from the call that it makes on the system stack: that one has no caller.
//!
//! All else is unsupported. Where two ways lead to an instruction, only what holds on both counts.

use std::collections::HashMap;

use windlass_schema::{CfaRule, FramePointerRule, Register, ReturnAddressRule, Rule, UnsupportedReason};

use super::frame::{SAVED_FRAME_POINTER, rule};
use super::table::{Function, Span};
use super::{FunctionRow, GoRule};
use crate::x86_64::instruction::{Effect, Instruction, Memory, Operand, RBP, RSP, decode};

/// Longest function that is followed, in bytes. The largest of the runtime's takes under 1 KiB.
const MAX_CODE_BYTES: usize = 64 << 10;

/// Most instructions between a call and the one that restores the stack pointer; `asmcgocall` takes 6.
const MAX_RESTORING: usize = 12;

/// Offset of `stack.hi` in `g` (runtime/runtime2.go): `stack` is its first field, `lo` that one's.
const STACK_HI: i32 = 8;

/// What is known in front of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    /// `rsp = cfa - 8 - depth`, with the table's depth.
    is_depth_true: bool,
    /// rbp is the caller's.
    is_callers: bool,
    /// The caller's rbp is at `cfa - 16`.
    is_saved: bool,
    /// `rbp = cfa - 16`.
    is_frame: bool,
}

impl State {
    const ENTRY: Self = Self { is_depth_true: true, is_callers: true, is_saved: false, is_frame: false };
    const NOTHING: Self = Self { is_depth_true: false, is_callers: false, is_saved: false, is_frame: false };

    fn and(self, other: Self) -> Self {
        Self {
            is_depth_true: self.is_depth_true && other.is_depth_true,
            is_callers: self.is_callers && other.is_callers,
            is_saved: self.is_saved && other.is_saved,
            is_frame: self.is_frame && other.is_frame,
        }
    }

    fn frame_pointer(self) -> FramePointerRule {
        match self {
            Self { is_saved: true, .. } => SAVED_FRAME_POINTER,
            Self { is_callers: true, .. } => FramePointerRule::Same,
            _ => FramePointerRule::Undefined,
        }
    }
}

/// Whether an instruction in `code` may write rsp by other means than `push`, `pop`, or adding a constant: for tables
/// in which functions do not say so.
pub(super) fn may_write_stack_pointer(code: &[u8]) -> bool {
    let mut at = 0;
    while let Some(rest) = code.get(at..).filter(|rest| !rest.is_empty()) {
        let Some(instruction) = decode(rest) else { return true };
        let writes = match instruction.effect {
            Effect::Load(register, _) | Effect::Address(register, _) | Effect::Subtract(register, _) => {
                register == RSP
            }
            Effect::Pop(register) => register == Some(RSP),
            Effect::Other { stack_pointer, .. } => stack_pointer,
            Effect::Leave => true,
            _ => false,
        };
        if writes {
            return true;
        }
        at += instruction.bytes;
    }
    false
}

/// Appends the rows of `function`.
pub(super) fn rules(function: &Function<'_>, spans: &[Span], code: &[u8], rows: &mut Vec<FunctionRow>) {
    let unsupported = GoRule::Rule(Rule::Unsupported(UnsupportedReason::StackPointer));
    let whole = 0..code.len() as u32;
    let first = rows.len();
    // Depths are of every address from the start on: the table's spans follow each other.
    let follow = Follow {
        spans,
        code,
        place: 0,
        incoming: HashMap::new(),
        before: HashMap::new(),
        restored: Vec::new(),
        targets: Vec::new(),
    };
    let is_one_way = function.is_named("runtime.mcall");
    let followed = code.len() <= MAX_CODE_BYTES && follow.run(is_one_way, rows).is_some();
    if !followed {
        rows.truncate(first);
        rows.push((whole, unsupported));
    }
}

/// A function that is followed from its first instruction to its last.
struct Follow<'a> {
    spans: &'a [Span],
    code: &'a [u8],
    /// Number of the span that holds the instruction.
    place: usize,
    /// What is known at the targets of jumps seen so far.
    incoming: HashMap<usize, State>,
    /// What was known in front of each instruction so far.
    before: HashMap<usize, State>,
    /// Calls whose frame is known by what the code behind them does: from the call up to which address, and the rule.
    restored: Vec<(usize, usize, GoRule)>,
    /// Where jumps lead.
    targets: Vec<usize>,
}

impl Follow<'_> {
    /// `None` if an instruction is unknown, or a jump back brings less than what was taken for known.
    fn run(mut self, is_one_way: bool, rows: &mut Vec<FunctionRow>) -> Option<()> {
        let mut at = 0;
        let mut through = Some(State::ENTRY);
        let mut has_switched = false;
        while at < self.code.len() {
            let instruction = decode(&self.code[at..])?;
            let end = at + instruction.bytes;
            let state = match (through, self.incoming.get(&at)) {
                (Some(a), Some(b)) => a.and(*b),
                (Some(a), None) => a,
                (None, Some(b)) => *b,
                (None, None) => State::NOTHING,
            };
            self.before.insert(at, state);
            let depth = self.depth(at);
            let here = if is_one_way && has_switched {
                GoRule::Rule(Rule::End)
            } else {
                self.rule(at, end, instruction, state, depth)
            };
            rows.push((at as u32..end as u32, here));
            let next = self.next(end, instruction, state, depth);
            has_switched |= state.is_depth_true && next.is_some_and(|next| !next.is_depth_true);
            if let Effect::Jump(Some(to)) | Effect::Branch(to) = instruction.effect {
                self.jump(at, end, to, state)?;
            }
            through = next;
            at = end;
        }
        let is_entered = |call: usize, until: usize| self.targets.iter().any(|to| call < *to && *to < until);
        (!self.restored.iter().any(|(call, until, _)| is_entered(*call, *until))).then_some(())
    }

    /// The table's depth at an address that is not below the last one asked for.
    fn depth(&mut self, at: usize) -> Option<i32> {
        while self.spans.get(self.place).is_some_and(|span| span.end as usize <= at) {
            self.place += 1;
        }
        self.spans.get(self.place)?.depth
    }

    /// The table's depth at any address of the function.
    fn depth_anywhere(&self, at: usize) -> Option<i32> {
        let place = self.spans.partition_point(|span| span.end as usize <= at);
        self.spans.get(place)?.depth
    }

    /// What holds at an instruction.
    fn rule(
        &mut self,
        at: usize,
        end: usize,
        instruction: Instruction,
        state: State,
        depth: Option<i32>,
    ) -> GoRule {
        if let Some((_, until, rule)) = self.restored.last()
            && at < *until
        {
            return *rule;
        }
        // A return that is reached pops the return address, whatever has been before.
        if instruction.effect == Effect::Return && state != State::NOTHING {
            let frame_pointer =
                if state.is_callers { FramePointerRule::Same } else { FramePointerRule::Undefined };
            return GoRule::Rule(rule(Some(0), frame_pointer));
        }
        if matches!(instruction.effect, Effect::Call(_))
            && !state.is_depth_true
            && let Some((until, restoring)) = self.restoring(end)
            && let Some(cfa) =
                self.depth_anywhere(until).and_then(|depth| i16::try_from(depth).ok()?.checked_add(8))
            && cfa > 0
        {
            let frame_pointer = state.frame_pointer();
            let rule = match restoring {
                Restoring::SavedDepth { g, depth } => GoRule::SavedDepth { g, depth, cfa, frame_pointer },
                Restoring::Saved(offset) => GoRule::Rule(Rule::Frame {
                    cfa: CfaRule::Deref(Register::RSP, offset, cfa),
                    return_address: ReturnAddressRule::AtCfa(-8),
                    frame_pointer,
                }),
            };
            self.restored.push((at, until, rule));
            return rule;
        }
        match state {
            State { is_depth_true: true, .. } => GoRule::Rule(rule(depth, state.frame_pointer())),
            State { is_frame: true, is_saved: true, .. } => GoRule::OtherStack,
            _ => GoRule::Rule(Rule::Unsupported(UnsupportedReason::StackPointer)),
        }
    }

    /// What is known behind an instruction, if control gets there.
    fn next(&self, end: usize, instruction: Instruction, state: State, depth: Option<i32>) -> Option<State> {
        let effect = instruction.effect;
        let mut next = state;
        if effect.writes_frame_pointer() {
            (next.is_callers, next.is_frame) = (false, false);
        }
        // How far the instruction moves rsp down; `None` for to anywhere.
        let moved = match effect {
            Effect::Return | Effect::Jump(_) | Effect::Trap => return None,
            Effect::Push(_) => Some(8),
            Effect::Pop(register) if register != Some(RSP) => Some(-8),
            Effect::Add(RSP, value) => value.checked_neg(),
            Effect::Load(RSP, _) | Effect::Address(RSP, _) | Effect::Subtract(RSP, _) | Effect::Pop(_) => {
                None
            }
            Effect::Leave | Effect::Other { stack_pointer: true, .. } => None,
            // The child of clone returns on another stack.
            Effect::SystemCall if !state.is_frame => None,
            _ => Some(0),
        };
        let behind = self.depth_anywhere(end);
        let is_as_stated = match (depth, moved, behind) {
            (Some(depth), Some(moved), Some(behind)) => depth.checked_add(moved) == Some(behind),
            // The last instruction: nothing follows.
            (Some(_), Some(_), None) => end == self.code.len(),
            _ => false,
        };
        next.is_depth_true &= is_as_stated;
        if self.restored.last().is_some_and(|(_, until, _)| *until == end) {
            next.is_depth_true = true;
        }
        match (effect, depth) {
            (Effect::Push(Some(RBP)), Some(0)) if state.is_depth_true && state.is_callers => {
                next.is_saved = true
            }
            (Effect::Store(RBP, to), Some(depth)) if state.is_depth_true && state.is_callers => {
                next.is_saved |= is_saved_slot(to, depth);
            }
            (Effect::Load(RBP, Operand::Register(RSP)), Some(8)) => next.is_frame = state.is_depth_true,
            (Effect::Address(RBP, from), Some(depth)) => {
                next.is_frame = state.is_depth_true && is_saved_slot(from, depth);
            }
            (Effect::Load(RBP, Operand::Memory(from)), Some(depth)) => {
                next.is_callers = state.is_depth_true && state.is_saved && is_saved_slot(from, depth);
            }
            // In an epilogue the return follows, so rsp was at the saved rbp, whatever the way.
            (Effect::Pop(Some(RBP)), _) if state.is_saved => {
                let ends = matches!(decode(&self.code[end..]).map(|next| next.effect), Some(Effect::Return));
                next.is_callers = ends || state.is_depth_true && depth == Some(8);
            }
            _ => {}
        }
        // Behind the pop the place is free.
        if next.is_saved && next.is_depth_true && behind.is_none_or(|depth| depth < 8) {
            next.is_saved = false;
        }
        Some(next)
    }

    /// Takes what is known at a jump to its target.
    fn jump(&mut self, at: usize, end: usize, to: i32, state: State) -> Option<()> {
        let target = usize::try_from(i64::try_from(end).ok()? + i64::from(to)).ok();
        let Some(target) = target.filter(|target| *target < self.code.len()) else {
            // Another function takes over: what it makes of the stack is its own.
            return Some(());
        };
        self.targets.push(target);
        let mut state = state;
        state.is_depth_true &= self.depth_anywhere(at) == self.depth_anywhere(target);
        if target > at {
            let known = self.incoming.entry(target).or_insert(state);
            *known = known.and(state);
            return Some(());
        }
        // What was taken for known there must still be.
        let taken = *self.before.get(&target)?;
        (taken.and(state) == taken).then_some(())
    }

    /// How the code from `at` on gets the stack pointer back, and the end of the instruction that does.
    fn restoring(&self, mut at: usize) -> Option<(usize, Restoring)> {
        let mut values: HashMap<u8, Value> = HashMap::new();
        for _ in 0..MAX_RESTORING {
            let instruction = decode(self.code.get(at..)?)?;
            at += instruction.bytes;
            match instruction.effect {
                Effect::Load(RSP, Operand::Register(from)) => {
                    return match *values.get(&from)? {
                        Value::Saved(offset) => Some((at, Restoring::Saved(offset))),
                        Value::Depth(g, depth) => Some((at, Restoring::SavedDepth { g, depth })),
                        Value::Hi(_) => None,
                    };
                }
                Effect::Load(RSP | RBP, _) => return None,
                Effect::Load(to, from) => {
                    let value = match from {
                        Operand::Memory(Memory { base: Some(RSP), displacement }) => {
                            Some(Value::Saved(offset(displacement)?))
                        }
                        Operand::Memory(Memory { base: Some(base), displacement: STACK_HI }) => {
                            match values.get(&base) {
                                Some(Value::Saved(g)) => Some(Value::Hi(*g)),
                                _ => None,
                            }
                        }
                        Operand::Register(from) => values.get(&from).copied(),
                        Operand::Memory(_) => None,
                    };
                    match value {
                        Some(value) => values.insert(to, value),
                        None => values.remove(&to),
                    };
                }
                Effect::Subtract(to, Operand::Memory(Memory { base: Some(RSP), displacement })) => {
                    match values.get(&to) {
                        Some(Value::Hi(g)) => values.insert(to, Value::Depth(*g, offset(displacement)?)),
                        _ => return None,
                    };
                }
                // A store to the stack could be to what is read next.
                Effect::Store(_, Memory { base: Some(base), .. }) if base == RSP => return None,
                // g into thread-local storage, and its address from there: `get_tls` (runtime/go_tls.h). Which register
                // is loaded is unknown, so only those that write none of interest, by their bytes.
                Effect::Store(..) => {}
                Effect::Other { .. } => {
                    let bytes = self.code.get(at - instruction.bytes..at)?;
                    match thread_local(bytes)? {
                        Some(register) => values.remove(&register),
                        None => None,
                    };
                }
                _ => return None,
            }
        }
        None
    }
}

/// An access to thread-local storage or a constant moved to a register: the register that it writes, if any.
fn thread_local(bytes: &[u8]) -> Option<Option<u8>> {
    match bytes {
        // mov reg, fs:[...]
        [0x64, rex @ 0x48..=0x4f, 0x8b, modrm, ..] => Some(Some(modrm >> 3 & 7 | (rex >> 2 & 1) << 3)),
        // mov fs:[...], reg
        [0x64, 0x48..=0x4f, 0x89, modrm, ..] if modrm >> 6 != 3 => Some(None),
        // mov reg, constant: the offset of g, in position-independent code.
        [rex @ 0x48..=0x4f, 0xc7, modrm, ..] if modrm >> 6 == 3 => Some(Some(modrm & 7 | (rex & 1) << 3)),
        _ => None,
    }
}

/// Whether the operand is at `cfa - 16`, with rsp at this depth.
fn is_saved_slot(operand: Memory, depth: i32) -> bool {
    operand.base == Some(RSP) && depth >= 8 && operand.displacement == depth - 8
}

fn offset(displacement: i32) -> Option<i16> {
    i16::try_from(displacement).ok()
}

/// A value of which the origin is known, at the return address of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Value {
    /// `*(rsp + offset)`
    Saved(i16),
    /// `*(*(rsp + g) + 8)`
    Hi(i16),
    /// `*(*(rsp + g) + 8) - *(rsp + depth)`
    Depth(i16, i16),
}

/// What the stack pointer is restored to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Restoring {
    /// `*(rsp + offset)`
    Saved(i16),
    /// `*(*(rsp + g) + 8) - *(rsp + depth)`
    SavedDepth { g: i16, depth: i16 },
}
