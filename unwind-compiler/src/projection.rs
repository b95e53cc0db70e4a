//! One row of call frame information as a rule: its (CFA, return address, frame pointer) projection.
//!
//! # Why this shape
//! A walk needs three columns of a row. Peers that keep the three still assume the rest: that the return
//! address is at CFA - 8, that the stack pointer becomes the CFA, that the offsets fit their fields. Here
//! each assumption is looked at, and a row that breaks one is unsupported with the reason.

use windlass_schema::record::{frame_pointer, kind, return_address};
use windlass_schema::{
    Architecture, CfaRule, FramePointerRule, Record, Register, ReturnAddressRule, Rule, UnsupportedReason,
};

use crate::entries::Cie;
use crate::expression::{self, Value};
use crate::instructions::{Cfa, Frame, RegisterRule};

/// Where the kernel's `sigcontext` lies from the stack pointer of a signal trampoline: behind `uc_flags`,
/// `uc_link` and `uc_stack` of `struct ucontext` (arch/x86/include/uapi/asm/ucontext.h).
pub(crate) const SIGCONTEXT_OFFSET: i16 = 40;

/// DWARF number of the return address column of x86-64.
const RETURN_ADDRESS_X86_64: u16 = 16;

/// The registers in the order of `struct sigcontext_64`, 8 bytes each
/// (arch/x86/include/uapi/asm/sigcontext.h), by DWARF number.
const SIGCONTEXT: [u16; 17] = [8, 9, 10, 11, 12, 13, 14, 15, 5, 4, 6, 3, 1, 0, 2, 7, RETURN_ADDRESS_X86_64];

type Reason = UnsupportedReason;

/// The record of the rule that a row of this CIE states.
pub(crate) fn record(cie: &Cie<'_>, row: &Frame<'_>) -> Record {
    common(cie, row).unwrap_or_else(|| rule(cie, row).to_record())
}

/// The record of a row as x86-64 compilers write nearly all, without the detour by its rule.
fn common(cie: &Cie<'_>, row: &Frame<'_>) -> Option<Record> {
    const RBP: u16 = Register::RBP.number() as u16;
    const RSP: u16 = Register::RSP.number() as u16;
    let (kind, offset) = match row.cfa {
        Cfa::Offset(RSP, offset) => (kind::SP, offset),
        Cfa::Offset(RBP, offset) => (kind::FP, offset),
        _ => return None,
    };
    let (saved, f) = match row.register(RBP) {
        RegisterRule::Unspecified => (frame_pointer::SAME, 0),
        RegisterRule::Offset(f) => (frame_pointer::AT_CFA, i16::try_from(f).ok()?),
        _ => return None,
    };
    let is_common = cie.architecture == Architecture::X86_64
        && !cie.is_signal_frame
        && cie.names_frame_pointer
        && row.register(cie.return_address) == RegisterRule::Offset(-8)
        && row.register(RSP) == RegisterRule::Unspecified;
    is_common.then_some(Record::plain(kind, saved, return_address::AT_CFA, 0, f, i32::try_from(offset).ok()?))
}

/// The rule that a row of this CIE states.
fn rule(cie: &Cie<'_>, row: &Frame<'_>) -> Rule {
    exact(cie, row).unwrap_or_else(Rule::Unsupported)
}

fn exact(cie: &Cie<'_>, row: &Frame<'_>) -> Result<Rule, Reason> {
    let architecture = cie.architecture;
    let return_address = row.register(cie.return_address);
    if return_address == RegisterRule::Undefined {
        return Ok(Rule::End);
    }
    if cie.is_signal_frame {
        return signal(architecture, row).ok_or(Reason::SignalFrame);
    }
    let cfa = cfa(architecture, &row.cfa)?;
    let frame_pointer = match row.register(architecture.frame_pointer().number().into()) {
        RegisterRule::Unspecified if !cie.names_frame_pointer => FramePointerRule::Undefined,
        rule => frame_pointer_rule(architecture, rule)?,
    };
    let register = |number| Register::new(architecture, number).map(ReturnAddressRule::Register);
    let return_address = match (return_address, architecture) {
        (RegisterRule::Offset(offset), _) => i32::try_from(offset).ok().map(ReturnAddressRule::AtCfa),
        (RegisterRule::Register(number), _) => register(number),
        // The link register holds it until an instruction says otherwise (AAPCS64, 6.1.1).
        (RegisterRule::Unspecified | RegisterRule::SameValue, Architecture::Aarch64) => {
            register(cie.return_address)
        }
        _ => None,
    };
    let return_address = return_address.ok_or(Reason::ReturnAddress)?;
    match row.register(architecture.stack_pointer().number().into()) {
        RegisterRule::Unspecified | RegisterRule::ValOffset(0) => {}
        _ => return Err(Reason::StackPointer),
    }
    Ok(Rule::Frame { cfa, return_address, frame_pointer })
}

fn cfa(architecture: Architecture, cfa: &Cfa<'_>) -> Result<CfaRule, Reason> {
    match *cfa {
        Cfa::Offset(register, offset) => Ok(CfaRule::Offset(
            Register::new(architecture, register).ok_or(Reason::CfaRegister)?,
            i32::try_from(offset).map_err(|_| Reason::CfaOffset)?,
        )),
        Cfa::Expression(expression) => {
            expression::run(architecture, expression).and_then(Value::to_cfa).ok_or(Reason::CfaExpression)
        }
        Cfa::Undefined => Err(Reason::Malformed),
    }
}

/// A register without a rule keeps its value: rbp and x29 belong to the caller (psABI, 3.2.1; AAPCS64, 6.1.1).
fn frame_pointer_rule(
    architecture: Architecture,
    rule: RegisterRule<'_>,
) -> Result<FramePointerRule, Reason> {
    match rule {
        RegisterRule::Unspecified | RegisterRule::SameValue => Some(FramePointerRule::Same),
        RegisterRule::Undefined => Some(FramePointerRule::Undefined),
        RegisterRule::Offset(offset) => i32::try_from(offset).ok().map(FramePointerRule::AtCfa),
        RegisterRule::Expression(expression) => match expression::run(architecture, expression) {
            Some(Value::Register(register, offset)) if register == architecture.frame_pointer() => {
                i16::try_from(offset as i64).ok().map(FramePointerRule::AtFramePointer)
            }
            _ => None,
        },
        RegisterRule::ValOffset(_) | RegisterRule::Register(_) | RegisterRule::ValExpression(_) => None,
    }
    .ok_or(Reason::FramePointer)
}

/// The trampoline's rule, if all registers are restored from where the kernel saved them and the CFA
/// is the interrupted stack pointer.
fn signal(architecture: Architecture, row: &Frame<'_>) -> Option<Rule> {
    // That of aarch64 is in the vDSO, whose CFI names two registers of 32 and another stack pointer.
    if architecture != Architecture::X86_64 {
        return None;
    }
    let value = |expression| expression::run(architecture, expression);
    let slot = |position: usize| i64::from(SIGCONTEXT_OFFSET) + 8 * position as i64;
    for (position, register) in SIGCONTEXT.into_iter().enumerate() {
        let RegisterRule::Expression(expression) = row.register(register) else {
            return None;
        };
        if value(expression)? != Value::Register(Register::RSP, slot(position) as u64) {
            return None;
        }
    }
    let Cfa::Expression(expression) = row.cfa else { return None };
    let stack_pointer = u16::from(Register::RSP.number());
    let saved = SIGCONTEXT.iter().position(|register| *register == stack_pointer)?;
    (value(expression)? == Value::Deref(Register::RSP, slot(saved) as u64, 0))
        .then_some(Rule::Signal(SIGCONTEXT_OFFSET))
}
