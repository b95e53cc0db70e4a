//! Runs call frame instructions: what rule each register has, row by row.
//!
//! # Why this shape
//! gimli's interpreter is complete and general; it serves here as the oracle, which is worth something
//! only if the tables are not made by it. This one does what tables need: it runs an FDE from offset 0 on
//! and knows nothing of its address, so that one run serves all functions with the same instructions
//! (four in five), and it refuses what it does not know at that instruction, so that rows before it stand.
//!
//! Sources: DWARF 5, 6.4.2 and 7.24; DWARF for the Arm 64-bit Architecture, 4.2.

use windlass_schema::Architecture;

use crate::cursor::Cursor;
use crate::entries::{Cie, pointer_value};

/// Registers that are followed: all of x86-64 with its return address column, and as many of aarch64, up to
/// sp. A walk restores no other.
const REGISTERS: usize = 17;

/// Where the rule of a register is kept.
fn slot(architecture: Architecture, number: u16) -> usize {
    match architecture {
        Architecture::X86_64 => number.into(),
        // 15 to 31.
        Architecture::Aarch64 => usize::from(number).wrapping_sub(32 - REGISTERS),
    }
}

/// Most states remembered at once. Compilers nest two; hand-written code five.
const MAX_REMEMBERED: usize = 64;

/// The rule of one register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) enum RegisterRule<'a> {
    /// No instruction has named it.
    #[default]
    Unspecified,
    Undefined,
    SameValue,
    /// *(CFA + offset)
    Offset(i64),
    /// CFA + offset
    ValOffset(i64),
    Register(u16),
    /// *(expression)
    Expression(&'a [u8]),
    ValExpression(&'a [u8]),
}

/// The rule of the canonical frame address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) enum Cfa<'a> {
    /// No instruction has defined it.
    #[default]
    Undefined,
    Offset(u16, i64),
    Expression(&'a [u8]),
}

/// A row: the rules that hold together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frame<'a> {
    architecture: Architecture,
    pub(crate) cfa: Cfa<'a>,
    registers: [RegisterRule<'a>; REGISTERS],
}

impl<'a> Frame<'a> {
    fn new(architecture: Architecture) -> Self {
        Self { architecture, cfa: Cfa::Undefined, registers: [RegisterRule::Unspecified; REGISTERS] }
    }

    /// The rule of a register; one that is not followed has none.
    pub(crate) fn register(&self, number: u16) -> RegisterRule<'a> {
        self.registers.get(slot(self.architecture, number)).copied().unwrap_or_default()
    }

    /// Sets the rule of a register, if it is followed. `None` for a number that is no register's.
    fn set(&mut self, number: u64, rule: RegisterRule<'a>) -> Option<()> {
        let number = u16::try_from(number).ok()?;
        if let Some(register) = self.registers.get_mut(slot(self.architecture, number)) {
            *register = rule;
        }
        Some(())
    }
}

/// What an instruction does to the place that rows are at.
enum Effect {
    /// Nothing: it changed the row.
    Row,
    /// Moves forward by so many bytes of code.
    Advance(u64),
    /// Moves to this address.
    SetLocation(u64),
}

/// How the instructions of an FDE ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ran {
    /// Offset from which on nothing is known, if some instruction is malformed.
    pub(crate) malformed_from: Option<u64>,
    /// Whether the rows depend on where the function lies.
    pub(crate) is_placed: bool,
}

/// The row that a CIE's instructions leave, with which each of its FDEs starts.
pub(crate) fn run_initial<'a>(cie: &Cie<'a>, instructions: &'a [u8]) -> Option<Frame<'a>> {
    let (frame, remembered) = (Frame::new(cie.architecture), &mut Vec::new());
    let mut machine = Machine { cie, frame, remembered, is_initial: true };
    let mut cursor = Cursor::new(instructions, 0);
    while !cursor.is_at_end() {
        // Instructions of a CIE have no place, so one that moves does nothing.
        machine.run(&mut cursor)?;
    }
    Some(machine.frame)
}

/// Runs the instructions of an FDE that starts at address `start`; calls `visit` with the offset of each row's
/// first byte from there, the row, and whether any instruction came since the last. A row ends where the next begins; rows
/// without a byte are left out.
/// `remembered` is memory to use.
pub(crate) fn run<'a>(
    cie: &Cie<'a>,
    (at, len): (u32, u32),
    start: u64,
    remembered: &mut Vec<Frame<'a>>,
    mut visit: impl FnMut(u64, &Frame<'a>, bool),
) -> Ran {
    let instructions = cie.data.get(..at as usize + len as usize).unwrap_or_default();
    let mut cursor = Cursor::new(instructions, at as usize);
    let Some(initial) = cie.initial else {
        return Ran { malformed_from: Some(0), is_placed: false };
    };
    remembered.clear();
    let mut machine = Machine { cie, frame: initial, remembered, is_initial: false };
    let mut offset = 0u64;
    let mut is_placed = false;
    let mut is_changed = true;
    while !cursor.is_at_end() {
        let next = match machine.run(&mut cursor) {
            Some(Effect::Row) => {
                is_changed = true;
                continue;
            }
            Some(Effect::Advance(bytes)) => offset.checked_add(bytes),
            Some(Effect::SetLocation(address)) => {
                is_placed = true;
                address.checked_sub(start).filter(|next| *next >= offset)
            }
            None => None,
        };
        let Some(next) = next else {
            return Ran { malformed_from: Some(offset), is_placed };
        };
        if next > offset {
            visit(offset, &machine.frame, is_changed);
            is_changed = false;
            offset = next;
        }
    }
    visit(offset, &machine.frame, is_changed);
    Ran { malformed_from: None, is_placed }
}

struct Machine<'c, 'a> {
    cie: &'c Cie<'a>,
    frame: Frame<'a>,
    remembered: &'c mut Vec<Frame<'a>>,
    is_initial: bool,
}

impl<'a> Machine<'_, 'a> {
    /// Runs one instruction; `None` if it is malformed.
    #[inline(always)]
    fn run(&mut self, cursor: &mut Cursor<'a>) -> Option<Effect> {
        let instruction = cursor.u8()?;
        let low = u64::from(instruction & 0x3f);
        match instruction >> 6 {
            1 => return Some(Effect::Advance(low.checked_mul(self.cie.code_alignment)?)),
            2 => {
                let rule = self.factored(cursor.uleb128()?);
                self.frame.set(low, RegisterRule::Offset(rule))?;
                return Some(Effect::Row);
            }
            3 => return self.restore(low),
            _ => {}
        }
        match instruction {
            0x01 => {
                let address = pointer_value(self.cie.pointer_encoding() & 0x7f, cursor, &self.cie.pointers)?;
                return Some(Effect::SetLocation(address));
            }
            0x02 => return self.advance(cursor.u8()?.into()),
            0x03 => return self.advance(cursor.u16()?.into()),
            0x04 => return self.advance(cursor.u32()?.into()),
            0x06 => return self.restore(cursor.uleb128()?),
            0x0a if self.remembered.len() < MAX_REMEMBERED => self.remembered.push(self.frame),
            0x0b => self.frame = self.remembered.pop()?,
            0x0c..=0x0f | 0x12 | 0x13 => self.define_cfa(instruction, cursor)?,
            // GNU_args_size: how far the caller of a landing pad pops.
            0x2e => {
                cursor.uleb128()?;
            }
            // AARCH64_negate_ra_state_with_pc, AARCH64_negate_ra_state: see the record module on signatures.
            0x2c | 0x2d if self.cie.architecture == Architecture::Aarch64 => {}
            0x00 => {}
            _ => self.register_rule(instruction, cursor)?,
        }
        Some(Effect::Row)
    }

    fn advance(&self, delta: u64) -> Option<Effect> {
        Some(Effect::Advance(delta.checked_mul(self.cie.code_alignment)?))
    }

    fn restore(&mut self, register: u64) -> Option<Effect> {
        // An FDE is not run without the row that its CIE leaves; a CIE has none to go back to.
        let rule = self.cie.initial.filter(|_| !self.is_initial)?.register(u16::try_from(register).ok()?);
        self.frame.set(register, rule)?;
        Some(Effect::Row)
    }

    fn factored(&self, offset: u64) -> i64 {
        (offset as i64).wrapping_mul(self.cie.data_alignment)
    }

    fn factored_signed(&self, offset: i64) -> i64 {
        offset.wrapping_mul(self.cie.data_alignment)
    }

    #[inline(always)]
    fn define_cfa(&mut self, instruction: u8, cursor: &mut Cursor<'a>) -> Option<()> {
        let register = |number: u64| u16::try_from(number).ok();
        // What keeps a part of the rule needs one of that kind.
        let (cfa_register, cfa_offset) = match self.frame.cfa {
            Cfa::Offset(register, offset) => (Some(register), Some(offset)),
            Cfa::Undefined | Cfa::Expression(_) => (None, None),
        };
        self.frame.cfa = match instruction {
            0x0c => Cfa::Offset(register(cursor.uleb128()?)?, cursor.uleb128()? as i64),
            0x0d => Cfa::Offset(register(cursor.uleb128()?)?, cfa_offset?),
            0x0e => Cfa::Offset(cfa_register?, cursor.uleb128()? as i64),
            0x0f => Cfa::Expression(block(cursor)?),
            0x12 => Cfa::Offset(register(cursor.uleb128()?)?, self.factored_signed(cursor.sleb128()?)),
            _ => Cfa::Offset(cfa_register?, self.factored_signed(cursor.sleb128()?)),
        };
        Some(())
    }

    fn register_rule(&mut self, instruction: u8, cursor: &mut Cursor<'a>) -> Option<()> {
        // Vendors' instructions do not all begin with a register.
        if !matches!(instruction, 0x05 | 0x07..=0x09 | 0x10 | 0x11 | 0x14..=0x16) {
            return None;
        }
        let register = cursor.uleb128()?;
        let rule = match instruction {
            0x05 => RegisterRule::Offset(self.factored(cursor.uleb128()?)),
            0x07 => RegisterRule::Undefined,
            0x08 => RegisterRule::SameValue,
            0x09 => RegisterRule::Register(u16::try_from(cursor.uleb128()?).ok()?),
            0x10 => RegisterRule::Expression(block(cursor)?),
            0x11 => RegisterRule::Offset(self.factored_signed(cursor.sleb128()?)),
            0x14 => RegisterRule::ValOffset(self.factored(cursor.uleb128()?)),
            0x15 => RegisterRule::ValOffset(self.factored_signed(cursor.sleb128()?)),
            _ => RegisterRule::ValExpression(block(cursor)?),
        };
        self.frame.set(register, rule)
    }
}

/// A block of bytes behind its length.
fn block<'a>(cursor: &mut Cursor<'a>) -> Option<&'a [u8]> {
    let len = cursor.uleb128()?;
    cursor.take(len)
}
