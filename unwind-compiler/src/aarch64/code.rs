//! What instructions of aarch64 do to a frame, and code that is known by its bytes: process entries and the
//! trampolines of signals.

use windlass_schema::{Architecture, CfaRule, FramePointerRule, Register, ReturnAddressRule, Rule};

use super::instruction::{Access, BYTES, Effect, SP, X8, X29, X30, decode};
use super::plt;
use crate::function_walk::{Flow, Frames, Step};
use crate::recognise::{Code, Linkage, Prologue, Trampoline};

/// aarch64.
pub(crate) enum Machine {}

/// What is known of a frame. Its places are given as bytes below the CFA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct State {
    /// Where sp points, if known.
    depth: Option<i32>,
    /// Where x29 points, if it is the frame pointer of this frame.
    frame: Option<i32>,
    /// Where the caller's x29 is saved, if it is. Otherwise x29 is the caller's.
    saved: Option<i32>,
    /// Where the return address is saved, if it is. Otherwise it is in x30.
    returns: Option<i32>,
    /// The constant in x8, the number of a system call, if known.
    number: Option<u32>,
}

/// Bytes of an address, and of a saved register.
const WORD: i32 = 8;

impl State {
    /// The place that is so many bytes from where a register points.
    fn place(self, base: u8, offset: i32) -> Option<i32> {
        match base {
            SP => self.depth?.checked_sub(offset),
            X29 => self.frame?.checked_sub(offset),
            _ => None,
        }
    }

    /// Whether so many bytes at `place` share one with what this frame has to keep.
    fn is_kept(self, place: i32, bytes: i32) -> bool {
        let (place, bytes) = (i64::from(place), i64::from(bytes));
        let overlaps = |kept: i32| place > i64::from(kept - WORD) && place - bytes < i64::from(kept);
        self.saved.is_some_and(overlaps) || self.returns.is_some_and(overlaps)
    }

    /// With something else in these registers.
    fn written(self, registers: impl IntoIterator<Item = Option<u8>>) -> Option<Self> {
        let mut state = self;
        for register in registers.into_iter().flatten() {
            match register {
                X29 => state.frame = state.saved.map(|_| None)?,
                X30 => state.returns.map(|_| ())?,
                SP => state.depth = None,
                _ => {}
            }
        }
        Some(state)
    }

    /// This state, if it makes sense: what the frame has to keep is not below sp, and there is a CFA.
    fn checked(self) -> Option<Self> {
        let lowest = self.saved.max(self.returns).unwrap_or(0);
        match self.depth {
            Some(depth) => depth >= lowest,
            None => self.frame.is_some() && self.saved.is_some(),
        }
        .then_some(self)
    }

    /// Behind an access to memory.
    fn accessed(self, access: Access) -> Option<Self> {
        let Access { is_load, is_general, registers, bytes, base, offset, change } = access;
        let mut state = self;
        for (number, register) in registers.into_iter().enumerate() {
            let Some(register) = register else { continue };
            let place = match offset {
                Some(offset) => self.place(base, offset.checked_add(bytes * number as i32)?),
                None => None,
            };
            let is_word = is_general && bytes == WORD;
            match (register, place) {
                (X29, Some(place)) if is_load && is_word && state.saved == Some(place) => {
                    (state.frame, state.saved) = (None, None);
                }
                (X30, Some(place)) if is_load && is_word && state.returns == Some(place) => {
                    state.returns = None;
                }
                (SP, _) if is_load => {}
                _ if is_load => state = state.written([is_general.then_some(register)])?,
                // Below the CFA: above it the frame is the caller's.
                (X29, Some(place)) if is_word && state.saved.is_none() && base == SP && place >= WORD => {
                    state.saved = Some(place);
                }
                (X30, Some(place)) if is_word && state.returns.is_none() && base == SP && place >= WORD => {
                    state.returns = Some(place);
                }
                (_, Some(place)) if state.is_kept(place, bytes) => return None,
                _ => {}
            }
        }
        match (base, change) {
            (_, 0) => Some(state),
            (SP, _) => state.moved(change),
            _ => state.written([Some(base)]),
        }
    }

    /// With sp moved up by so many bytes.
    fn moved(self, bytes: i32) -> Option<Self> {
        let depth = match self.depth {
            Some(depth) => Some(depth.checked_sub(bytes)?),
            None => None,
        };
        Some(Self { depth, ..self })
    }

    /// Behind an instruction that passes control on.
    fn behind(self, effect: Effect) -> Option<Self> {
        match effect {
            Effect::Access(access) => self.accessed(access),
            Effect::Add(SP, SP, value) => self.moved(value),
            Effect::Add(SP, X29, value) if self.frame.is_some() => {
                Some(Self { depth: self.place(X29, value), ..self })
            }
            Effect::Add(X29, SP, value) if self.saved.is_some() => {
                Some(Self { frame: self.place(SP, value), ..self })
            }
            Effect::Add(to, ..) => self.written([Some(to)]),
            Effect::Other(registers) => self.written(registers),
            Effect::Call(_) => self.written([Some(X30)]),
            Effect::Branch(_) | Effect::Jump(_) | Effect::Return | Effect::Trap => Some(self),
            Effect::SystemCall => {
                self.number.filter(|number| !SWITCHING_SYSTEM_CALLS.contains(number)).map(|_| self)
            }
        }
    }
}

/// System calls behind which the child has another stack, or there is none: `rt_sigreturn`, `clone`, `clone3`
/// (include/uapi/asm-generic/unistd.h).
const SWITCHING_SYSTEM_CALLS: [u32; 3] = [139, 220, 435];

/// System calls that do not return, as some functions do not: `exit`, `exit_group` (the same header).
const ENDING_SYSTEM_CALLS: [u32; 2] = [93, 94];

/// The constant in x8 behind the instruction that `code` begins with.
fn number(code: &[u8], effect: Effect, number: Option<u32>) -> Option<u32> {
    let word = u32::from_le_bytes(*code.first_chunk()?);
    // mov x8, n and mov w8, n.
    if word & 0x7fe0_001f == 0x5280_0008 {
        return Some(word >> 5 & 0xffff);
    }
    let is_written = match effect {
        Effect::Access(Access { is_load, is_general, registers, base, change, .. }) => {
            is_load && is_general && registers.contains(&Some(X8)) || change != 0 && base == X8
        }
        Effect::Add(to, ..) => to == X8,
        Effect::Other(registers) => registers.contains(&Some(X8)),
        Effect::Call(_) => true,
        _ => false,
    };
    number.filter(|_| !is_written)
}

/// Where control goes behind an instruction at `address`.
fn flow(effect: Effect, address: u64) -> Flow {
    let target = |to: i32| address.wrapping_add_signed(to.into());
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

impl Frames for Machine {
    type State = State;

    const ENTRY: State = State { depth: Some(0), frame: None, saved: None, returns: None, number: None };

    const IN_FRAME: Option<State> = None;

    const IN_PROLOGUE: Option<State> = None;

    fn join(one: State, other: State) -> Option<State> {
        let number = one.number.filter(|_| one.number == other.number);
        let joined = State { number, ..one };
        (joined == State { number, ..other }).then_some(joined)
    }

    fn step(code: &[u8], address: u64, state: State) -> Option<Step<State>> {
        let effect = decode(code)?;
        let flow = match effect {
            Effect::SystemCall
                if state.number.is_some_and(|number| ENDING_SYSTEM_CALLS.contains(&number)) =>
            {
                Flow::Call(None)
            }
            effect => flow(effect, address),
        };
        let behind = state.behind(effect)?.checked()?;
        let behind = State { number: number(code, effect, state.number), ..behind };
        Some(Step { bytes: BYTES, flow, behind })
    }

    fn has_frame_pointer(state: State) -> bool {
        state.frame.is_some()
    }

    fn passes(code: &[u8], address: u64) -> Option<(usize, Flow)> {
        Some((BYTES, flow(decode(code)?, address)))
    }

    fn rule(state: State) -> Rule {
        let cfa = match (state.frame, state.depth) {
            (Some(frame), _) => CfaRule::Offset(Register::X29, frame),
            (None, depth) => CfaRule::Offset(Register::SP, depth.unwrap_or_default()),
        };
        Rule::Frame {
            cfa,
            return_address: state
                .returns
                .map_or(ReturnAddressRule::Register(Register::X30), |place| ReturnAddressRule::AtCfa(-place)),
            frame_pointer: state
                .saved
                .map_or(FramePointerRule::Same, |place| FramePointerRule::AtCfa(-place)),
        }
    }
}

const NOP: u32 = 0xd503_201f;

/// mov x29, 0 and mov x30, 0; and from xzr.
const ZEROED_X29: [[u8; BYTES]; 2] = [0xd280_001d_u32.to_le_bytes(), 0xaa1f_03fd_u32.to_le_bytes()];
const ZEROED_X30: [[u8; BYTES]; 2] = [0xd280_001e_u32.to_le_bytes(), 0xaa1f_03fe_u32.to_le_bytes()];

/// Most instructions of a process entry in front of its call; C libraries take 6 to 13.
const MAX_ENTRY_INSTRUCTIONS: usize = 32;

/// mov x8, 139; svc 0: `rt_sigreturn` (include/uapi/asm-generic/unistd.h).
const RT_SIGRETURN: [u8; 2 * BYTES] = [0x68, 0x11, 0x80, 0xd2, 0x01, 0x00, 0x00, 0xd4];

/// Where the kernel saved the registers, from the stack pointer of a signal trampoline: behind `siginfo` of 128 bytes,
/// in `struct ucontext` the 176 before `uc_mcontext`, and there `fault_address` (arch/arm64/kernel/signal.c,
/// `struct rt_sigframe`; arch/arm64/include/uapi/asm/ucontext.h and sigcontext.h).
const SIGNAL_REGISTERS_OFFSET: i16 = 128 + 176 + 8;

/// Most instructions of a prologue up to the one that sets x29.
const MAX_PROLOGUE_INSTRUCTIONS: usize = 8;

impl Code for Machine {
    const ARCHITECTURE: Architecture = Architecture::Aarch64;
    const ALIGNMENT: u64 = BYTES as u64;
    const CALL_BYTES: usize = BYTES;

    /// nop, and what linkers leave zero.
    fn padding(code: &[u8]) -> Option<usize> {
        let word = u32::from_le_bytes(*code.first_chunk()?);
        matches!(word, NOP | 0).then_some(BYTES)
    }

    /// The kernel and dynamic linkers jump there, and the code zeroes x29 and x30 for the walk to end (AAPCS64,
    /// 6.4.6): no function may, as x29 is its caller's.
    fn process_entry(code: &[u8]) -> Option<usize> {
        let (mut is_x29_zeroed, mut is_x30_zeroed) = (false, false);
        for (number, bytes) in code.as_chunks::<BYTES>().0.iter().take(MAX_ENTRY_INSTRUCTIONS).enumerate() {
            match decode(bytes)? {
                Effect::Branch(_) | Effect::Return | Effect::Trap => return None,
                Effect::Call(_) | Effect::Jump(_) => {
                    return (is_x29_zeroed && is_x30_zeroed).then_some((number + 1) * BYTES);
                }
                _ => {
                    is_x29_zeroed |= ZEROED_X29.contains(bytes);
                    is_x30_zeroed |= ZEROED_X30.contains(bytes);
                }
            }
        }
        None
    }

    /// When a handler has returned, sp is at the `rt_sigframe` (arch/arm64/kernel/signal.c, `rt_sigreturn`). Its return
    /// address is the trampoline's first byte, so that it is looked up one byte before: which is no
    /// instruction's first, and the return address's own only behind a call.
    fn trampoline(code: &[u8], at: usize, _: u64, address: u64) -> Option<Trampoline> {
        if !address.is_multiple_of(Self::ALIGNMENT) || !code[at..].starts_with(&RT_SIGRETURN) {
            return None;
        }
        let last = at.checked_sub(BYTES).and_then(|before| decode(&code[before..at]));
        let is_after_call = last.is_none_or(|effect| matches!(effect, Effect::Call(_)));
        Some(Trampoline {
            before: usize::from(!is_after_call),
            bytes: RT_SIGRETURN.len(),
            rule: Rule::Signal(SIGNAL_REGISTERS_OFFSET),
        })
    }

    fn prologue(code: &[u8]) -> Prologue {
        let mut prologue = Prologue::Unknown;
        for bytes in code.as_chunks::<BYTES>().0.iter().take(MAX_PROLOGUE_INSTRUCTIONS) {
            match decode(bytes) {
                Some(Effect::Add(X29, SP, _)) if prologue == Prologue::Other => {
                    return Prologue::FramePointer;
                }
                // Functions that save x30 call others: the rest need no frame (GCC, -momit-leaf-frame-pointer).
                Some(Effect::Access(Access {
                    is_load: false,
                    is_general: true,
                    base: SP,
                    registers,
                    ..
                })) if registers.contains(&Some(X30)) => {
                    prologue = Prologue::Other;
                }
                Some(Effect::Call(_) | Effect::Jump(_) | Effect::Return | Effect::Trap) | None => break,
                _ => {}
            }
        }
        prologue
    }

    fn linkage(code: &[u8], address: u64, is_section: bool) -> Option<Linkage> {
        plt::run(code, address, is_section)
    }

    /// Nobody pads with traps here.
    fn is_padded(_: &[u8]) -> bool {
        false
    }

    fn call(code: &[u8], address: u64) -> Option<u64> {
        match decode(code)? {
            Effect::Call(Some(to)) => Some(address.wrapping_add_signed(to.into())),
            _ => None,
        }
    }
}
