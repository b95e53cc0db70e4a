//! The caller of a frame by its CFI: gimli's row, every register, every expression.
//!
//! It knows no table, and keeps all registers that CFI speaks of, where the kernel's walk keeps two. What it cannot
//! have it says instead of going on without.

use gimli::{CfaRule, EvaluationResult, Location, Register, RegisterRule, UnwindExpression, Value};
use windlass_schema::record::{DWARF_RA, DWARF_RBP, DWARF_RSP, REGISTERS};

use super::image_cfi::Row;
use super::walk::StackCopy;

/// What x86-64 calls keep (System V ABI, 3.2.1): rbx, rbp, r12 to r15. CFI says nothing of one that a function
/// leaves alone.
const CALLEE_SAVED: [usize; 6] = [3, 6, 12, 13, 14, 15];
const RETURN_ADDRESS: Register = Register(DWARF_RA as u16);
/// Longest evaluation of an expression, in operations; none is known that loops.
const MAX_OPERATIONS: u32 = 256;

/// What could not be had to take a step by CFI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Missing {
    /// Memory that is not in the copy.
    Memory,
    /// The value of a register.
    Register,
    /// A rule that can be followed.
    Rule,
}

/// A register's value, or why there is none.
pub(super) type Known = Result<u64, Missing>;

/// The registers of a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CfiFrame {
    pub(super) general: [Known; REGISTERS],
    pub(super) rip: u64,
    /// Whether `rip` is an instruction's address, not a return address.
    pub(super) is_exact: bool,
}

impl CfiFrame {
    /// One of which rsp is known, and rbp if it is given.
    pub(super) fn of(rip: u64, is_exact: bool, rsp: u64, rbp: Option<u64>) -> Self {
        let mut general = [Err(Missing::Register); REGISTERS];
        general[usize::from(DWARF_RSP)] = Ok(rsp);
        general[usize::from(DWARF_RBP)] = rbp.ok_or(Missing::Register);
        Self { general, rip, is_exact }
    }

    pub(super) fn rsp(&self) -> Known {
        self.general[usize::from(DWARF_RSP)]
    }

    pub(super) fn rbp(&self) -> Known {
        self.general[usize::from(DWARF_RBP)]
    }
}

/// The caller of `frame`, whose row this is; `None` if the row says that there is none.
pub(super) fn caller(
    frame: &CfiFrame,
    row: &Row<'_>,
    stack: &StackCopy,
) -> Result<Option<CfiFrame>, Missing> {
    let evaluation = Evaluation { frame, row, stack };
    let rule = |register| row.row.register(register);
    let return_address = match rule(RETURN_ADDRESS) {
        Some(RegisterRule::Undefined) => return Ok(None),
        // Nothing is known that leaves its return address where a caller would have it.
        None => return Err(Missing::Rule),
        Some(rule) => rule,
    };
    let cfa = evaluation.canonical_frame_address()?;
    let general = std::array::from_fn(|number| match rule(Register(number as u16)) {
        None if number == usize::from(DWARF_RSP) => Ok(cfa),
        None if CALLEE_SAVED.contains(&number) => frame.general[number],
        None => Err(Missing::Register),
        Some(rule) => evaluation.value(&rule, cfa, frame.general[number]),
    });
    let rip = evaluation.value(&return_address, cfa, Err(Missing::Rule))?;
    Ok(Some(CfiFrame { general, rip, is_exact: row.is_signal }))
}

/// A frame in which rules get values.
struct Evaluation<'a> {
    frame: &'a CfiFrame,
    row: &'a Row<'a>,
    stack: &'a StackCopy,
}

impl Evaluation<'_> {
    fn register(&self, register: Register) -> Known {
        if register == RETURN_ADDRESS {
            return Ok(self.frame.rip);
        }
        *self.frame.general.get(usize::from(register.0)).ok_or(Missing::Rule)?
    }

    fn word(&self, address: u64) -> Known {
        self.stack.word(address).ok_or(Missing::Memory)
    }

    fn canonical_frame_address(&self) -> Known {
        match self.row.row.cfa() {
            CfaRule::RegisterAndOffset { register, offset } => {
                Ok(self.register(*register)?.wrapping_add_signed(*offset))
            }
            CfaRule::Expression(expression) => self.evaluate(expression, None),
        }
    }

    fn value(&self, rule: &RegisterRule<usize>, cfa: u64, same: Known) -> Known {
        match rule {
            RegisterRule::SameValue => same,
            RegisterRule::Offset(offset) => self.word(cfa.wrapping_add_signed(*offset)),
            RegisterRule::ValOffset(offset) => Ok(cfa.wrapping_add_signed(*offset)),
            RegisterRule::Register(register) => self.register(*register),
            RegisterRule::Expression(expression) => self.word(self.evaluate(expression, Some(cfa))?),
            RegisterRule::ValExpression(expression) => self.evaluate(expression, Some(cfa)),
            RegisterRule::Undefined => Err(Missing::Register),
            _ => Err(Missing::Rule),
        }
    }

    fn evaluate(&self, expression: &UnwindExpression<usize>, initial: Option<u64>) -> Known {
        let rule = |_| Missing::Rule;
        let expression = expression.get(&self.row.section).map_err(rule)?;
        let mut evaluation = expression.evaluation(self.row.encoding);
        evaluation.set_max_iterations(MAX_OPERATIONS);
        if let Some(initial) = initial {
            evaluation.set_initial_value(initial);
        }
        let mut result = evaluation.evaluate().map_err(rule)?;
        loop {
            result = match result {
                EvaluationResult::Complete => break,
                EvaluationResult::RequiresRegister { register, .. } => {
                    let value = Value::Generic(self.register(register)?);
                    evaluation.resume_with_register(value).map_err(rule)?
                }
                EvaluationResult::RequiresMemory { address, size: 8, space: None, .. } => {
                    let value = Value::Generic(self.word(address)?);
                    evaluation.resume_with_memory(value).map_err(rule)?
                }
                _ => return Err(Missing::Rule),
            };
        }
        match evaluation.as_result() {
            [piece] => match piece.location {
                Location::Address { address } => Ok(address),
                _ => Err(Missing::Rule),
            },
            _ => Err(Missing::Rule),
        }
    }
}
