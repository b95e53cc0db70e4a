//! What instructions of x86-64 do to a frame, and code that is known by its bytes: process entries and the
//! trampolines of signals.

use windlass_schema::{Architecture, CfaRule, FramePointerRule, Register, ReturnAddressRule, Rule};

use super::instruction::{Effect, Instruction, Memory, Operand, PRESERVED, RBP, RSP, decode};
use super::plt;
use super::stack_switch::{self, PoppedFrame, popped_frame};
use crate::function_walk::{Flow, Frames, Step};
use crate::projection::SIGCONTEXT_OFFSET;
use crate::recognise::{Code, Linkage, Prologue, Trampoline};

/// x86-64.
pub(crate) enum Machine {}

/// What is known of a frame. Its places are given as bytes below the CFA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct State {
    /// Where rsp points, if known.
    depth: Option<i32>,
    /// Where rbp points, if it is the frame pointer of this frame.
    frame: Option<i32>,
    /// A register that keeps a place of this frame while rsp is aligned, and where it points, if there is one.
    base: Option<(u8, i32)>,
    /// Where the caller's rbp is saved, if it is. Otherwise rbp is the caller's.
    saved: Option<i32>,
    /// The register that the return address was popped into, if it was. Then `depth` counts from what lay below it.
    popped: Option<u8>,
    /// The constant in eax, the number of a system call, if known.
    number: Option<u32>,
    /// A register, and the address that it was loaded with, if known.
    address: Option<(u8, u64)>,
}

/// Bytes of an address, and of a saved register.
pub(super) const WORD: i32 = 8;

impl State {
    /// The place that a memory operand names, if it lies in this frame.
    fn place(self, memory: Memory) -> Option<i32> {
        match memory.base? {
            RSP => self.depth?.checked_sub(memory.displacement),
            RBP => self.frame?.checked_sub(memory.displacement),
            other => self.based(other)?.checked_sub(memory.displacement),
        }
    }

    /// Where `register` points, if it keeps a place of this frame.
    fn based(self, register: u8) -> Option<i32> {
        self.base.filter(|(base, _)| *base == register).map(|(_, place)| place)
    }

    /// With what `instruction` says of a base: what it copies rsp to, or that it may write the last one.
    fn with_base_behind(self, instruction: Instruction, before: Self) -> Self {
        if let Effect::Load(to, Operand::Register(RSP)) = instruction.effect
            && PRESERVED.contains(&to)
            && let Some(depth) = before.depth
        {
            return Self { base: Some((to, depth)), ..self };
        }
        Self { base: self.base.filter(|(base, _)| !instruction.may_write(*base)), ..self }
    }

    /// Whether the frame is known without rsp.
    fn has_base(self) -> bool {
        self.saved.is_some() && self.frame.is_some() || self.base.is_some()
    }

    /// Whether a `push` is of the word at `place`.
    fn pushes(self, instruction: Instruction, place: i32) -> bool {
        instruction.memory.and_then(|memory| self.place(memory)) == Some(place)
    }

    /// Whether the word at `place` shares a byte with what this frame has to keep: return address and saved rbp.
    fn is_kept(self, place: i32) -> bool {
        let overlaps = |kept: i32| place.abs_diff(kept) < WORD.unsigned_abs();
        overlaps(WORD) || self.saved.is_some_and(overlaps)
    }

    /// With rbp as something else.
    fn without_frame_pointer(self) -> Option<Self> {
        self.saved.map(|_| Self { frame: None, ..self })
    }

    /// With rsp moved down by so many bytes.
    fn moved(self, bytes: i32) -> Option<Self> {
        let depth = match self.depth {
            Some(depth) => Some(depth.checked_add(bytes)?),
            None => None,
        };
        Some(Self { depth, ..self })
    }

    /// With the caller's rbp back in rbp.
    fn restored(self) -> Self {
        Self { frame: None, saved: None, ..self }
    }

    /// Behind an instruction while the return address is in a register. What is not known to leave that alone is refused:
    /// `pop %r10; lea (%rsp, %rcx, 8), %rsp; push %r10; ret` drops arguments whose number is known at run time.
    fn behind_popped(self, popped: u8, instruction: Instruction) -> Option<Self> {
        match instruction.effect {
            // Back on top: whatever lies above belongs to the caller, or is the next function's.
            Effect::Push(Some(register)) if register == popped => {
                Some(Self { depth: Some(WORD), popped: None, ..self })
            }
            Effect::Push(_) => self.moved(WORD),
            // The arguments are gone, and the caller's frame ends here.
            Effect::Address(RSP, _) if self.depth == Some(0) => Some(self),
            Effect::Add(RSP, value) if self.depth == Some(0) && value > 0 && instruction.memory.is_none() => {
                Some(self)
            }
            _ => None,
        }
    }

    /// This state, if it makes sense: what the frame has to keep is not below rsp, and there is a CFA.
    fn checked(self) -> Option<Self> {
        if self.popped.is_some() {
            return self.depth.is_some_and(|depth| depth >= 0).then_some(self);
        }
        let is_above = |depth: i32| depth >= self.saved.unwrap_or(WORD).max(WORD);
        match self.depth {
            Some(depth) => is_above(depth),
            None => self.has_base(),
        }
        .then_some(self)
    }

    /// Behind an instruction that passes control on.
    fn behind(self, instruction: Instruction) -> Option<Self> {
        if let Some(popped) = self.popped {
            return self.behind_popped(popped, instruction);
        }
        match instruction.effect {
            // The return address again, for what lay above it to be arguments of the function that is jumped to.
            Effect::Push(None) if self.saved.is_none() && self.pushes(instruction, WORD) => {
                Some(Self { depth: Some(WORD), ..self })
            }
            Effect::Push(register) => {
                let state = self.moved(WORD)?;
                match (register, state.saved) {
                    (Some(RBP), None) => Some(Self { saved: Some(state.depth?), ..state }),
                    _ => Some(state),
                }
            }
            Effect::Pop(Some(RBP)) if self.saved.is_none() || self.saved != self.depth => None,
            Effect::Pop(Some(RBP)) => self.restored().moved(-WORD),
            Effect::Pop(Some(RSP) | None) => None,
            Effect::Pop(Some(register)) if self.depth == Some(WORD) && self.saved.is_none() => {
                Some(Self { depth: Some(0), popped: Some(register), ..self })
            }
            Effect::Pop(_) => self.moved(-WORD),
            Effect::Leave if self.frame.is_none() || self.frame != self.saved => None,
            Effect::Leave => Self { depth: self.frame, ..self }.restored().moved(-WORD),
            Effect::Load(RSP, Operand::Register(RBP)) => Some(Self { depth: Some(self.frame?), ..self }),
            Effect::Load(RSP, Operand::Register(base)) => Some(Self { depth: Some(self.based(base)?), ..self }),
            // rsp as it was saved before it was aligned: the frame pointer has to do.
            Effect::Load(RSP, Operand::Memory(_)) if self.frame.is_some() => Some(Self { depth: None, ..self }),
            Effect::Load(RSP, _) | Effect::Subtract(RSP, _) => None,
            Effect::Load(RBP, Operand::Register(RSP)) if self.saved.is_some() => {
                Some(Self { frame: Some(self.depth?), ..self })
            }
            Effect::Load(RBP, Operand::Memory(from))
                if self.saved.is_some() && self.place(from) == self.saved =>
            {
                Some(self.restored())
            }
            Effect::Load(RBP, _) | Effect::Subtract(RBP, _) | Effect::Add(RBP, _) => {
                self.without_frame_pointer()
            }
            Effect::Address(RSP, of) => Some(Self { depth: Some(self.place(of)?), ..self }),
            Effect::Address(RBP, of) if self.saved.is_some() => Some(Self { frame: self.place(of), ..self }),
            Effect::Address(RBP, _) => None,
            Effect::Add(RSP, value) => {
                // What `pop` stores.
                let place = instruction.memory.and_then(|memory| self.place(memory));
                if place.is_some_and(|place| self.is_kept(place)) {
                    return None;
                }
                self.moved(value.checked_neg()?)
            }
            Effect::Store(RBP, to)
                // Behind the return address: above it the frame is the caller's.
                if self.saved.is_none() && to.base == Some(RSP) && self.place(to)? >= 2 * WORD =>
            {
                Some(Self { saved: self.place(to), ..self })
            }
            Effect::Load(..) | Effect::Address(..) | Effect::Subtract(..) | Effect::Add(..) => Some(self),
            Effect::Store(..) | Effect::StoreConstant | Effect::Other { .. } => {
                let place = instruction.memory.and_then(|memory| self.place(memory));
                if place.is_some_and(|place| self.is_kept(place)) {
                    return None;
                }
                match instruction.effect {
                    // rsp aligned, or moved by a variable: the frame pointer has to do.
                    Effect::Other { stack_pointer: true, frame_pointer: false } => {
                        Some(Self { depth: None, ..self })
                    }
                    Effect::Other { stack_pointer: false, frame_pointer: true } => {
                        self.without_frame_pointer()
                    }
                    Effect::Other { stack_pointer: true, frame_pointer: true } => None,
                    _ => Some(self),
                }
            }
            Effect::Call(_) | Effect::Branch(_) | Effect::Jump(_) | Effect::Return | Effect::Trap => Some(self),
            Effect::SystemCall => {
                self.number.filter(|number| !SWITCHING_SYSTEM_CALLS.contains(number)).map(|_| self)
            }
        }
    }
}

/// System calls behind which the child has another stack, or shares this one, or there is none: `rt_sigreturn`,
/// `clone`, `vfork`, `clone3` (arch/x86/entry/syscalls/syscall_64.tbl).
const SWITCHING_SYSTEM_CALLS: [u32; 4] = [15, 56, 58, 435];

/// syscall
const SYSTEM_CALL: [u8; 2] = [0x0f, 0x05];

/// System calls that do not return, as some functions do not: `exit`, `exit_group` (the same table).
const ENDING_SYSTEM_CALLS: [u32; 2] = [60, 231];

/// The constant in eax behind the instruction that `code` begins with; `None` but for instructions that are known to
/// leave it.
fn number(code: &[u8], number: Option<u32>) -> Option<u32> {
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

/// The register that holds an address behind `instruction`, that `code` begins with, at `at`; `None` but for
/// instructions that are known to leave it.
fn loaded(code: &[u8], at: u64, instruction: Instruction, known: Option<(u8, u64)>) -> Option<(u8, u64)> {
    // lea of an address relative to rip.
    if let [rex @ (0x48 | 0x4c), 0x8d, modrm, a, b, c, d, ..] = *code
        && modrm & 0xc7 == 5
    {
        let behind = at.wrapping_add(instruction.bytes as u64);
        let target = behind.wrapping_add_signed(i32::from_le_bytes([a, b, c, d]).into());
        return Some((modrm >> 3 & 7 | (rex & 4) << 1, target));
    }
    known.filter(|(register, _)| match instruction.effect {
        Effect::Push(_) | Effect::Store(..) | Effect::StoreConstant | Effect::Branch(_) | Effect::Jump(_) => {
            true
        }
        Effect::Pop(Some(other))
        | Effect::Load(other, _)
        | Effect::Address(other, _)
        | Effect::Subtract(other, _)
        | Effect::Add(other, _) => other != *register,
        _ => false,
    })
}

/// Whether `code` begins with a jump to where `register` points.
fn jumps_by(code: &[u8], register: u8) -> bool {
    let operation = 0xe0 | register & 7;
    match *code {
        [0xff, modrm, ..] => register < 8 && modrm == operation,
        [0x41, 0xff, modrm, ..] => register >= 8 && modrm == operation,
        _ => false,
    }
}

/// Where control goes behind an instruction whose end is `next`.
fn flow(effect: Effect, next: u64) -> Flow {
    let target = |to: i32| next.wrapping_add_signed(to.into());
    match effect {
        Effect::Call(to) => Flow::Call(to.map(target)),
        Effect::Branch(to) => Flow::Branch(target(to)),
        Effect::Jump(Some(to)) => Flow::Jump(target(to)),
        Effect::Return => Flow::Return,
        Effect::Jump(None) => Flow::Leave,
        Effect::Trap => Flow::Trap,
        _ => Flow::Next,
    }
}

/// DWARF numbers of registers by those in instructions (System V ABI for AMD64, figure 3.36; Intel SDM volume 2,
/// table 3-1).
const DWARF_NUMBERS: [u16; 16] = [0, 2, 1, 3, 7, 6, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15];

/// The register that instructions give this number.
fn register(number: u8) -> Option<Register> {
    Register::new(Architecture::X86_64, DWARF_NUMBERS[usize::from(number & 15)])
}

impl Frames for Machine {
    type State = State;

    const ENTRY: State = State {
        depth: Some(WORD),
        frame: None,
        base: None,
        saved: None,
        popped: None,
        number: None,
        address: None,
    };

    fn join(one: State, other: State) -> Option<State> {
        let number = one.number.filter(|_| one.number == other.number);
        let address = one.address.filter(|_| one.address == other.address);
        let base = one.base.filter(|_| one.base == other.base);
        // Of two places for rsp, the frame pointer or the base has to do.
        let has_base = State { base, ..one }.has_base();
        let depth = one.depth.filter(|_| one.depth == other.depth || !has_base);
        let joined = State { depth, number, base, address, ..one };
        let depth = if has_base { depth } else { other.depth };
        let other = State { depth, number, base, address, ..other };
        (joined == other).then_some(joined)
    }

    fn step(code: &[u8], address: u64, state: State) -> Option<Step<State>> {
        let instruction = decode(code)?;
        let flow = match instruction.effect {
            Effect::SystemCall
                if state.number.is_some_and(|number| ENDING_SYSTEM_CALLS.contains(&number)) =>
            {
                Flow::Call(None)
            }
            Effect::Jump(None)
                if let Some((register, target)) = state.address
                    && jumps_by(code, register) =>
            {
                Flow::Jump(target)
            }
            effect => flow(effect, address.checked_add(instruction.bytes as u64)?),
        };
        let behind = match instruction.effect {
            Effect::Load(RSP, from) if from != Operand::Register(RBP) && state.popped.is_none() => {
                let other = code.get(instruction.bytes..).and_then(popped_frame);
                // As this function leaves its own stack, which nothing else would return to.
                let is_own =
                    |other: &PoppedFrame| Some(other.depth) == state.depth && other.saved == state.saved;
                let own = other.filter(is_own).map(|_| State { frame: None, base: None, ..state });
                own.or_else(|| state.behind(instruction))?
            }
            _ => state.behind(instruction)?,
        };
        let behind = State {
            number: number(code, state.number),
            address: loaded(code, address, instruction, state.address),
            ..behind.with_base_behind(instruction, state).checked()?
        };
        Some(Step { bytes: instruction.bytes, flow, behind })
    }

    fn has_frame_pointer(state: State) -> bool {
        state.frame.is_some()
    }

    fn uses_frame(code: &[u8], state: State) -> bool {
        let is_set = state.frame.is_some() && state.frame == state.saved;
        is_set && decode(code).and_then(|one| one.memory?.base) == Some(RBP)
    }

    /// In front of a call the CFA is a multiple of 16 away (System V ABI for AMD64, 3.2.2).
    fn is_aligned(code: &[u8], state: State) -> bool {
        code.starts_with(&SYSTEM_CALL) || state.depth.is_none_or(|depth| depth % (2 * WORD) == 0)
    }

    fn passes(code: &[u8], address: u64) -> Option<(usize, Flow)> {
        let instruction = decode(code)?;
        let next = address.checked_add(instruction.bytes as u64)?;
        Some((instruction.bytes, flow(instruction.effect, next)))
    }

    fn rule(state: State) -> Rule {
        if let Some(popped) = state.popped {
            let cfa = CfaRule::Offset(Register::RSP, state.depth.unwrap_or_default());
            return register(popped).map_or(Rule::NoCfi, |register| Rule::Frame {
                cfa,
                return_address: ReturnAddressRule::Register(register),
                frame_pointer: FramePointerRule::Same,
            });
        }
        let cfa = match (state.frame, state.depth, state.base) {
            (Some(frame), ..) => CfaRule::Offset(Register::RBP, frame),
            (None, Some(depth), _) => CfaRule::Offset(Register::RSP, depth),
            (None, None, base) => {
                let (base, place) = base.unwrap_or((RSP, 0));
                let Some(register) = register(base) else { return Rule::NoCfi };
                CfaRule::Offset(register, place)
            }
        };
        let frame_pointer = match state.saved.map(|saved| i16::try_from(-saved)) {
            None => FramePointerRule::Same,
            Some(Ok(saved)) => FramePointerRule::AtCfa(saved.into()),
            Some(Err(_)) => return Rule::NoCfi,
        };
        Rule::Frame { cfa, return_address: ReturnAddressRule::AtCfa(-8), frame_pointer }
    }
}

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
        let prefixes = code.iter().take_while(|byte| matches!(byte, 0x66 | 0x2e)).count();
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

/// endbr64
pub(super) const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];

/// Most instructions of a prologue up to `mov rbp, rsp`.
const MAX_PROLOGUE_INSTRUCTIONS: usize = 8;
