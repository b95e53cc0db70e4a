//! One row of call frame information as a rule: its (CFA, return address, frame pointer) projection.
//!
//! # Why this shape
//! A walk needs three columns of a row. Peers that keep the three still assume the rest: that the return
//! address is at CFA - 8, that the stack pointer becomes the CFA, that the offsets fit their fields. Here
//! each assumption is looked at, and a row that breaks one is unsupported with the reason.

use gimli::{CfaRule as CfiCfa, EhFrame, Register as CfiRegister, RegisterRule, UnwindExpression};
use windlass_schema::record::{DWARF_RA, DWARF_RBP, DWARF_RSP};
use windlass_schema::{CfaRule, FramePointerRule, Register, ReturnAddressRule, Rule, UnsupportedReason};

use crate::cfi::{CfiRow, Fde, Reader};
use crate::expression::{self, Value};

/// Where the kernel's `sigcontext` lies from the stack pointer of a signal trampoline: behind `uc_flags`,
/// `uc_link` and `uc_stack` of `struct ucontext` (arch/x86/include/uapi/asm/ucontext.h).
const SIGCONTEXT_OFFSET: i16 = 40;

/// The registers in the order of `struct sigcontext_64`, 8 bytes each
/// (arch/x86/include/uapi/asm/sigcontext.h), by DWARF number.
const SIGCONTEXT: [u8; 17] = [8, 9, 10, 11, 12, 13, 14, 15, 5, 4, DWARF_RBP, 3, 1, 0, 2, DWARF_RSP, DWARF_RA];

type Reason = UnsupportedReason;
type CfiRule = RegisterRule<usize>;

/// Projects the rows of one FDE.
pub(crate) struct Projection<'a, 's> {
    section: &'s EhFrame<Reader<'a>>,
    return_address: CfiRegister,
    is_signal_frame: bool,
}

impl<'a, 's> Projection<'a, 's> {
    pub(crate) fn of(fde: &Fde<'a, 's>) -> Self {
        Self {
            section: fde.section,
            return_address: fde.entry.cie().return_address_register(),
            is_signal_frame: fde.entry.is_signal_trampoline(),
        }
    }

    /// The rule that `row` states.
    pub(crate) fn rule(&self, row: &CfiRow) -> Rule {
        self.exact(row).unwrap_or_else(Rule::Unsupported)
    }

    fn exact(&self, row: &CfiRow) -> Result<Rule, Reason> {
        let return_address = row.register(self.return_address);
        if return_address == Some(RegisterRule::Undefined) {
            return Ok(Rule::End);
        }
        if self.is_signal_frame {
            return self.signal(row).ok_or(Reason::SignalFrame);
        }
        let cfa = self.cfa(row.cfa())?;
        let return_address = match return_address {
            Some(RegisterRule::Offset(-8)) => ReturnAddressRule::AtCfa,
            Some(RegisterRule::Register(register)) => {
                ReturnAddressRule::Register(Register::new(register.0).ok_or(Reason::ReturnAddress)?)
            }
            _ => return Err(Reason::ReturnAddress),
        };
        match row.register(CfiRegister(DWARF_RSP.into())) {
            None | Some(RegisterRule::ValOffset(0)) => {}
            _ => return Err(Reason::StackPointer),
        }
        let frame_pointer = self.frame_pointer(row.register(CfiRegister(DWARF_RBP.into())))?;
        Ok(Rule::Frame { cfa, return_address, frame_pointer })
    }

    fn cfa(&self, cfa: &CfiCfa<usize>) -> Result<CfaRule, Reason> {
        match cfa {
            CfiCfa::RegisterAndOffset { register, offset } => Ok(CfaRule::Offset(
                Register::new(register.0).ok_or(Reason::CfaRegister)?,
                i32::try_from(*offset).map_err(|_| Reason::CfaOffset)?,
            )),
            CfiCfa::Expression(expression) => {
                self.value(expression).and_then(Value::to_cfa).ok_or(Reason::CfaExpression)
            }
        }
    }

    /// A register without a rule keeps its value: rbp belongs to the caller (psABI, 3.2.1).
    fn frame_pointer(&self, rule: Option<CfiRule>) -> Result<FramePointerRule, Reason> {
        match rule {
            None | Some(RegisterRule::SameValue) => Some(FramePointerRule::Same),
            Some(RegisterRule::Undefined) => Some(FramePointerRule::Undefined),
            Some(RegisterRule::Offset(offset)) => i16::try_from(offset).ok().map(FramePointerRule::AtCfa),
            Some(RegisterRule::Expression(expression)) => match self.value(&expression) {
                Some(Value::Register(Register::RBP, offset)) => {
                    i16::try_from(offset as i64).ok().map(FramePointerRule::AtRbp)
                }
                _ => None,
            },
            Some(_) => None,
        }
        .ok_or(Reason::FramePointer)
    }

    /// The trampoline's rule, if all registers are restored from where the kernel saved them and the CFA
    /// is the interrupted stack pointer.
    fn signal(&self, row: &CfiRow) -> Option<Rule> {
        let slot = |position: usize| i64::from(SIGCONTEXT_OFFSET) + 8 * position as i64;
        for (position, register) in SIGCONTEXT.into_iter().enumerate() {
            let Some(RegisterRule::Expression(expression)) = row.register(CfiRegister(register.into()))
            else {
                return None;
            };
            if self.value(&expression)? != Value::Register(Register::RSP, slot(position) as u64) {
                return None;
            }
        }
        let CfiCfa::Expression(expression) = row.cfa() else { return None };
        let saved_rsp = SIGCONTEXT.iter().position(|register| *register == DWARF_RSP)?;
        (self.value(expression)? == Value::Deref(Register::RSP, slot(saved_rsp) as u64, 0))
            .then_some(Rule::Signal(SIGCONTEXT_OFFSET))
    }

    fn value(&self, expression: &UnwindExpression<usize>) -> Option<Value> {
        expression::run(expression.get(self.section).ok()?)
    }
}
