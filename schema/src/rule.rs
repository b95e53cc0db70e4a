//! The meaning of a plain record, checked.

use core::fmt;

use crate::record::{DWARF_RBP, DWARF_RSP, Record, frame_pointer, kind, return_address};

/// An x86-64 general-purpose register, by DWARF number 0 to 15.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Register(u8);

impl Register {
    /// The stack pointer.
    pub const RSP: Self = Self(DWARF_RSP);
    /// The frame pointer.
    pub const RBP: Self = Self(DWARF_RBP);

    /// The register with this DWARF number, if it is a general-purpose one.
    pub const fn new(dwarf_number: u16) -> Option<Self> {
        if dwarf_number < 16 { Some(Self(dwarf_number as u8)) } else { None }
    }

    /// The DWARF number.
    pub const fn number(self) -> u8 {
        self.0
    }

    /// The assembler's name.
    pub const fn name(self) -> &'static str {
        [
            "rax", "rdx", "rcx", "rbx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13",
            "r14", "r15",
        ][self.0 as usize]
    }
}

impl fmt::Debug for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How to find the canonical frame address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CfaRule {
    /// register + offset
    Offset(Register, i32),
    /// *(register + a) + b
    Deref(Register, i16, i16),
    /// *(rsp + 8 * r9 + a) + b
    DerefIndexed(i16, i16),
    /// rsp + base + 8 * ((rip & 15) >= threshold)
    Plt {
        /// From which byte of its 16 a PLT entry has pushed once more.
        threshold: i16,
        /// CFA offset before that push.
        base: i16,
    },
}

/// How to find the caller's rbp.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FramePointerRule {
    /// Unchanged.
    Same,
    /// *(CFA + offset)
    AtCfa(i16),
    /// *(rbp + offset)
    AtRbp(i16),
    /// Lost.
    Undefined,
}

/// How to find the return address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReturnAddressRule {
    /// *(CFA - 8)
    AtCfa,
    /// In a register.
    Register(Register),
}

/// Why a row of CFI has no exact record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum UnsupportedReason {
    /// A CFA expression outside the families of [`CfaRule`].
    CfaExpression = 1,
    /// A CFA register that is no general-purpose one.
    CfaRegister = 2,
    /// A CFA offset outside the record's field.
    CfaOffset = 3,
    /// A return-address rule other than those of [`ReturnAddressRule`].
    ReturnAddress = 4,
    /// A frame-pointer rule other than those of [`FramePointerRule`].
    FramePointer = 5,
    /// A signal frame whose registers are not where the kernel puts them.
    SignalFrame = 6,
    /// The stack pointer of the caller is not the CFA.
    StackPointer = 7,
    /// More rows in 256 bytes of code than the format holds.
    DenseBlock = 8,
    /// More distinct records in the image than a dictionary holds.
    DictionaryFull = 9,
    /// Two FDEs cover the address with different rules.
    Overlap = 10,
    /// The FDE's instructions are malformed from some point on.
    Malformed = 11,
}

impl UnsupportedReason {
    /// Every reason.
    pub const ALL: &[Self] = &[
        Self::CfaExpression,
        Self::CfaRegister,
        Self::CfaOffset,
        Self::ReturnAddress,
        Self::FramePointer,
        Self::SignalFrame,
        Self::StackPointer,
        Self::DenseBlock,
        Self::DictionaryFull,
        Self::Overlap,
        Self::Malformed,
    ];

    /// The name used in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::CfaExpression => "cfa_expression",
            Self::CfaRegister => "cfa_register",
            Self::CfaOffset => "cfa_offset",
            Self::ReturnAddress => "return_address",
            Self::FramePointer => "frame_pointer",
            Self::SignalFrame => "signal_frame",
            Self::StackPointer => "stack_pointer",
            Self::DenseBlock => "dense_block",
            Self::DictionaryFull => "dictionary_full",
            Self::Overlap => "overlap",
            Self::Malformed => "malformed",
        }
    }
}

/// The meaning of one row: how to step from a frame to its caller.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rule {
    /// The caller's stack pointer is the CFA.
    Frame {
        /// Where the CFA is.
        cfa: CfaRule,
        /// Where the return address is.
        return_address: ReturnAddressRule,
        /// Where the caller's rbp is.
        frame_pointer: FramePointerRule,
    },
    /// All registers come from the `sigcontext` at rsp + offset.
    Signal(i16),
    /// The frame has no caller.
    End,
    /// No FDE covers the address.
    NoCfi,
    /// CFI has a rule that no record states exactly.
    Unsupported(UnsupportedReason),
}

/// A record that means nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("record {0:#018x} has no meaning")]
pub struct RecordError(pub u64);

impl Rule {
    /// The record that states this rule.
    pub const fn to_record(self) -> Record {
        let (cfa, ra, fp) = match self {
            Self::Frame { cfa, return_address, frame_pointer } => (cfa, return_address, frame_pointer),
            Self::Signal(offset) => {
                return Record::plain(kind::SIGNAL, 0, 0, 0, 0, Record::pair(offset, 0));
            }
            Self::End => return Record::END,
            Self::NoCfi => return Record::NO_CFI,
            Self::Unsupported(reason) => {
                return Record::plain(kind::UNSUPPORTED, 0, 0, reason as u8, 0, 0);
            }
        };
        let (kind, register, offset) = match cfa {
            CfaRule::Offset(Register::RSP, offset) => (kind::RSP, 0, offset),
            CfaRule::Offset(Register::RBP, offset) => (kind::RBP, 0, offset),
            CfaRule::Offset(register, offset) => (kind::REGISTER, register.0, offset),
            CfaRule::Deref(register, a, b) => (kind::DEREF, register.0, Record::pair(a, b)),
            CfaRule::DerefIndexed(a, b) => (kind::DEREF_INDEXED, 0, Record::pair(a, b)),
            CfaRule::Plt { threshold, base } => (kind::PLT, 0, Record::pair(threshold, base)),
        };
        let (ra_rule, ra_register) = match ra {
            ReturnAddressRule::AtCfa => (return_address::AT_CFA, 0),
            ReturnAddressRule::Register(register) => (return_address::REGISTER, register.0),
        };
        let (fp_rule, f) = match fp {
            FramePointerRule::Same => (frame_pointer::SAME, 0),
            FramePointerRule::AtCfa(f) => (frame_pointer::AT_CFA, f),
            FramePointerRule::AtRbp(f) => (frame_pointer::AT_RBP, f),
            FramePointerRule::Undefined => (frame_pointer::UNDEFINED, 0),
        };
        Record::plain(kind, fp_rule, ra_rule, register | ra_register << 4, f, offset)
    }

    /// Whether this row can be stepped over exactly.
    pub const fn is_exact(self) -> bool {
        matches!(self, Self::Frame { .. } | Self::Signal(_) | Self::End)
    }
}

impl TryFrom<Record> for Rule {
    type Error = RecordError;

    fn try_from(record: Record) -> Result<Self, RecordError> {
        let register = Register(record.cfa_register());
        let (a, b) = (record.a(), record.b());
        let cfa = match record.kind() {
            kind::RSP => CfaRule::Offset(Register::RSP, record.offset()),
            kind::RBP => CfaRule::Offset(Register::RBP, record.offset()),
            kind::REGISTER => CfaRule::Offset(register, record.offset()),
            kind::DEREF => CfaRule::Deref(register, a, b),
            kind::DEREF_INDEXED => CfaRule::DerefIndexed(a, b),
            kind::PLT => CfaRule::Plt { threshold: a, base: b },
            kind::SIGNAL => return canonical(Self::Signal(a), record),
            kind::END => return canonical(Self::End, record),
            kind::NO_CFI => return canonical(Self::NoCfi, record),
            kind::UNSUPPORTED => {
                let reason = UnsupportedReason::ALL
                    .iter()
                    .find(|reason| **reason as u8 == record.aux())
                    .ok_or(RecordError(record.0))?;
                return canonical(Self::Unsupported(*reason), record);
            }
            _ => return Err(RecordError(record.0)),
        };
        let return_address = match record.return_address() {
            return_address::AT_CFA => ReturnAddressRule::AtCfa,
            return_address::REGISTER => {
                ReturnAddressRule::Register(Register(record.return_address_register()))
            }
            _ => return Err(RecordError(record.0)),
        };
        let frame_pointer = match record.frame_pointer() {
            frame_pointer::SAME => FramePointerRule::Same,
            frame_pointer::AT_CFA => FramePointerRule::AtCfa(record.frame_pointer_offset()),
            frame_pointer::AT_RBP => FramePointerRule::AtRbp(record.frame_pointer_offset()),
            _ => FramePointerRule::Undefined,
        };
        canonical(Self::Frame { cfa, return_address, frame_pointer }, record)
    }
}

/// Each rule has one record: bits that its kind does not use are zero.
fn canonical(rule: Rule, record: Record) -> Result<Rule, RecordError> {
    if rule.to_record() == record { Ok(rule) } else { Err(RecordError(record.0)) }
}

impl fmt::Debug for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// As the dump prints it: `cfa=rsp+16 ra=*(cfa-8) rbp=*(cfa-16)`.
impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (cfa, ra, fp) = match self {
            Self::Frame { cfa, return_address, frame_pointer } => (cfa, return_address, frame_pointer),
            Self::Signal(offset) => return write!(f, "signal context=rsp{offset:+}"),
            Self::End => return f.write_str("end"),
            Self::NoCfi => return f.write_str("no_cfi"),
            Self::Unsupported(reason) => return write!(f, "unsupported {}", reason.as_str()),
        };
        match cfa {
            CfaRule::Offset(register, offset) => write!(f, "cfa={}{offset:+}", register.name())?,
            CfaRule::Deref(register, a, b) => write!(f, "cfa=*({}{a:+}){b:+}", register.name())?,
            CfaRule::DerefIndexed(a, b) => write!(f, "cfa=*(rsp+8*r9{a:+}){b:+}")?,
            CfaRule::Plt { threshold, base } => {
                write!(f, "cfa=rsp{base:+}+8*((rip&15)>={threshold})")?;
            }
        }
        match ra {
            ReturnAddressRule::AtCfa => f.write_str(" ra=*(cfa-8)")?,
            ReturnAddressRule::Register(register) => write!(f, " ra={}", register.name())?,
        }
        match fp {
            FramePointerRule::Same => f.write_str(" rbp=same"),
            FramePointerRule::AtCfa(offset) => write!(f, " rbp=*(cfa{offset:+})"),
            FramePointerRule::AtRbp(offset) => write!(f, " rbp=*(rbp{offset:+})"),
            FramePointerRule::Undefined => f.write_str(" rbp=undefined"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn decode_inverts_encode(bits: u64) {
            if let Ok(rule) = Rule::try_from(Record(bits)) {
                prop_assert_eq!(rule.to_record(), Record(bits));
            }
        }

        #[test]
        fn every_state_of_a_run_has_a_meaning(bits: u64, push: bool, distance in 0u32..20) {
            let kind = if push { kind::PUSH_RUN } else { kind::POP_RUN };
            let run = Record(bits & !0x1f_ff00_00af_u64 & !15 & !0x20 | u64::from(kind) | bits & 0xff00);
            let state = run.at(distance);
            prop_assert!(!state.is_run());
        }
    }

    #[test]
    fn every_rule_round_trips() {
        let mut rules = vec![Rule::End, Rule::NoCfi, Rule::Signal(40)];
        rules.extend(UnsupportedReason::ALL.iter().map(|reason| Rule::Unsupported(*reason)));
        let register = Register::new(10).unwrap();
        for cfa in [
            CfaRule::Offset(Register::RSP, i32::MAX),
            CfaRule::Offset(Register::RBP, -8),
            CfaRule::Offset(register, 0),
            CfaRule::Deref(Register::RBP, -8, 0),
            CfaRule::DerefIndexed(-32768, 32767),
            CfaRule::Plt { threshold: 11, base: 8 },
        ] {
            for return_address in [ReturnAddressRule::AtCfa, ReturnAddressRule::Register(register)] {
                for frame_pointer in [
                    FramePointerRule::Same,
                    FramePointerRule::AtCfa(-16),
                    FramePointerRule::AtRbp(0),
                    FramePointerRule::Undefined,
                ] {
                    rules.push(Rule::Frame { cfa, return_address, frame_pointer });
                }
            }
        }
        for rule in rules {
            assert_eq!(Rule::try_from(rule.to_record()), Ok(rule), "{rule}");
        }
    }
}
