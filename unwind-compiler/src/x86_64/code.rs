//! What instructions of x86-64 do to a frame.

use windlass_schema::{Architecture, CfaRule, FramePointerRule, Register, ReturnAddressRule, Rule};

use super::instruction::{Effect, Instruction, Memory, Operand, PRESERVED, RBP, RSP, decode};
use super::shift::Shift;
use super::stack_switch::{PoppedFrame, popped_frame};
use super::system_call::{ENDING_SYSTEM_CALLS, SWITCHING_SYSTEM_CALLS, number};
use crate::function_walk::{Flow, Frames, Step};

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
    /// Whether the return address is being moved.
    shift: Shift,
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
        if !matches!(self.shift, Shift::None(_)) {
            return Some(self);
        }
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

    /// The state behind an instruction, also of a switch to another stack, which is left as this function leaves its own: then nothing else would
    /// return to it.
    fn behind_or_switched(self, instruction: Instruction, code: &[u8]) -> Option<Self> {
        let is_switch =
            matches!(instruction.effect, Effect::Load(RSP, from) if from != Operand::Register(RBP));
        if is_switch && self.popped.is_none() {
            let other = code.get(instruction.bytes..).and_then(popped_frame);
            let is_own = |other: &PoppedFrame| Some(other.depth) == self.depth && other.saved == self.saved;
            if other.filter(is_own).is_some() {
                return Some(Self { frame: None, base: None, ..self });
            }
        }
        self.behind(instruction)
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

/// syscall
const SYSTEM_CALL: [u8; 2] = [0x0f, 0x05];

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
        shift: Shift::None(None),
        number: None,
        address: None,
    };

    const IN_FRAME: Option<State> =
        Some(State { depth: None, frame: Some(2 * WORD), saved: Some(2 * WORD), ..Self::ENTRY });

    /// Below the return address of its caller lies its own.
    const IN_PROLOGUE: Option<State> = Some(State { depth: Some(2 * WORD), ..Self::ENTRY });

    fn join(one: State, other: State) -> Option<State> {
        let number = one.number.filter(|_| one.number == other.number);
        let address = one.address.filter(|_| one.address == other.address);
        let base = one.base.filter(|_| one.base == other.base);
        let shift = Shift::join(one.shift, other.shift)?;
        // Of two places for rsp, the frame pointer or the base has to do.
        let has_base = State { base, ..one }.has_base();
        let depth = one.depth.filter(|_| one.depth == other.depth || !has_base);
        let joined = State { depth, number, base, shift, address, ..one };
        let depth = if has_base { depth } else { other.depth };
        let other = State { depth, number, base, shift, address, ..other };
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
        let is_bare = state.saved.is_none() && state.popped.is_none() && state.base.is_none();
        let is_on_top = is_bare && state.depth == Some(WORD);
        let shift = state.shift.behind(instruction, code, is_on_top)?;
        let behind = match (state.shift, shift) {
            (Shift::None(_), Shift::None(_)) => {
                state.behind_or_switched(instruction, code)?.with_base_behind(instruction, state).checked()?
            }
            (_, Shift::None(_)) => State { depth: Some(WORD), ..state },
            _ => State { depth: None, ..state },
        };
        let behind = State {
            number: number(code, state.number),
            address: loaded(code, address, instruction, state.address),
            shift,
            ..behind
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
        if let Shift::Begun(at) | Shift::Copying(at) = state.shift {
            let is_copied = matches!(state.shift, Shift::Copying(_));
            return register(at).filter(|_| !is_copied).map_or(Rule::NoCfi, |register| Rule::Frame {
                cfa: CfaRule::Offset(register, WORD),
                return_address: ReturnAddressRule::AtCfa(-8),
                frame_pointer: FramePointerRule::Same,
            });
        }
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
