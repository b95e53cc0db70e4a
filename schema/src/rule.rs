//! The meaning of a plain record, checked.

use core::fmt;

use crate::record::{DWARF_RBP, DWARF_RSP, MAX_RUN_BYTES, Record, frame_pointer, kind, return_address};

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

/// Whether the record module describes this record, plain or a run: then each of its states is a rule.
pub(crate) fn has_meaning(record: Record) -> bool {
    if record.is_run() {
        let [first, _, _, _, event, spare, ..] = record.0.to_le_bytes();
        let mask = record.run_mask();
        // Unused: bit 7 of byte 0, bits 4 to 6 of the event, its distance if there is none, byte 5.
        if first & 0x80 != 0 || event & 0x70 != 0 || (event & 0x80 == 0 && event != 0) || spare != 0 {
            return false;
        }
        let is_pop = record.kind() == kind::POP_RUN;
        let has_last = first & 0x40 != 0;
        let last_change = mask.checked_ilog2();
        let event_change = (event & 0x80 != 0).then_some(u32::from(event & 15));
        if record.frame_pointer() > frame_pointer::AT_CFA
            || has_last && (last_change.is_none() || event_change >= last_change)
            || is_pop && u32::from(record.aux()) < mask.count_ones() - u32::from(has_last)
        {
            return false;
        }
    }
    (0..=MAX_RUN_BYTES).all(|distance| Rule::try_from(record.at(distance)).is_ok())
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

    fn register() -> impl Strategy<Value = Register> {
        (0u16..16).prop_map(|number| Register::new(number).unwrap())
    }

    fn rule() -> impl Strategy<Value = Rule> {
        let cfa = prop_oneof![
            (register(), any::<i32>()).prop_map(|(register, offset)| CfaRule::Offset(register, offset)),
            (register(), any::<i16>(), any::<i16>())
                .prop_map(|(register, a, b)| CfaRule::Deref(register, a, b)),
            (any::<i16>(), any::<i16>()).prop_map(|(a, b)| CfaRule::DerefIndexed(a, b)),
            (any::<i16>(), any::<i16>()).prop_map(|(threshold, base)| CfaRule::Plt { threshold, base }),
        ];
        let return_address =
            prop_oneof![Just(ReturnAddressRule::AtCfa), register().prop_map(ReturnAddressRule::Register)];
        let frame_pointer = prop_oneof![
            Just(FramePointerRule::Same),
            any::<i16>().prop_map(FramePointerRule::AtCfa),
            any::<i16>().prop_map(FramePointerRule::AtRbp),
            Just(FramePointerRule::Undefined),
        ];
        let frame = (cfa, return_address, frame_pointer).prop_map(|(cfa, return_address, frame_pointer)| {
            Rule::Frame { cfa, return_address, frame_pointer }
        });
        prop_oneof![
            12 => frame,
            2 => any::<i16>().prop_map(Rule::Signal),
            1 => Just(Rule::End),
            1 => Just(Rule::NoCfi),
            2 => prop::sample::select(UnsupportedReason::ALL).prop_map(Rule::Unsupported),
        ]
    }

    /// The fields of a run that the record module describes.
    #[derive(Clone, Copy, Debug)]
    struct Run {
        is_push: bool,
        /// Whether the last change is that of bit 6.
        has_last: bool,
        base: u8,
        mask: u16,
        /// `f` if rbp is saved at distance 0.
        saved: Option<i16>,
        /// Distance of the event.
        event: Option<u8>,
    }

    impl Run {
        fn record(self) -> Record {
            let kind = if self.is_push { kind::PUSH_RUN } else { kind::POP_RUN };
            let first = kind | u8::from(self.saved.is_some()) << 4 | u8::from(self.has_last) << 6;
            let [m0, m1] = self.mask.to_le_bytes();
            let [f0, f1] = self.saved.unwrap_or(0).to_le_bytes();
            let event = self.event.map_or(0, |distance| 0x80 | (distance - 1));
            Record(u64::from_le_bytes([first, self.base, m0, m1, event, 0, f0, f1]))
        }

        /// The equations of the record module, one distance at a time.
        fn state(self, distance: u32) -> Rule {
            let last = (1..=16).rfind(|at| self.mask >> (at - 1) & 1 != 0);
            let (mut register, mut words) = (Register::RSP, i32::from(self.base));
            let mut saved = self.saved;
            for at in 1..=distance.min(16) {
                if self.mask >> (at - 1) & 1 != 0 {
                    match (self.is_push, self.has_last && Some(at) == last) {
                        (true, true) => register = Register::RBP,
                        (false, true) => return Rule::NoCfi,
                        (true, false) => words += 1,
                        (false, false) => words -= 1,
                    }
                }
                if self.event.map(u32::from) == Some(at) {
                    saved = if self.is_push { Some(-8 * words as i16) } else { None };
                }
            }
            Rule::Frame {
                cfa: CfaRule::Offset(register, 8 * words),
                return_address: ReturnAddressRule::AtCfa,
                frame_pointer: saved.map_or(FramePointerRule::Same, FramePointerRule::AtCfa),
            }
        }
    }

    fn run() -> impl Strategy<Value = Run> {
        let saved = prop::option::of(any::<i16>());
        let event = prop::option::of(1u8..=16);
        (any::<bool>(), any::<bool>(), any::<u8>(), any::<u16>(), saved, event).prop_map(
            |(is_push, has_last, base, mask, saved, event)| {
                let last = 16 - mask.leading_zeros() as u8;
                let has_last = has_last && last > event.unwrap_or(0);
                let pops = if is_push { 0 } else { mask.count_ones() as u8 - u8::from(has_last) };
                Run { is_push, has_last, base: base.max(pops), mask, saved, event }
            },
        )
    }

    proptest! {
        #[test]
        fn decode_inverts_encode(rule in rule()) {
            prop_assert_eq!(Rule::try_from(rule.to_record()), Ok(rule));
        }

        /// No two records state one rule: a bit that is flipped changes it, or has no meaning.
        #[test]
        fn encode_inverts_decode(rule in rule(), bit in 0u32..64) {
            let record = Record(rule.to_record().0 ^ 1 << bit);
            if let Ok(other) = Rule::try_from(record) {
                prop_assert!(other != rule);
                prop_assert_eq!(other.to_record(), record);
            }
        }

        #[test]
        fn every_state_of_a_run_is_what_the_equations_say(run in run()) {
            prop_assert!(has_meaning(run.record()));
            for distance in (0..20).chain([u32::MAX]) {
                prop_assert_eq!(Rule::try_from(run.record().at(distance)), Ok(run.state(distance)), "{}", distance);
            }
        }
    }

    #[test]
    fn runs_without_meaning() {
        let push = Run { is_push: true, has_last: true, base: 1, mask: 0b1001, saved: None, event: Some(1) };
        let pop =
            Run { is_push: false, has_last: false, base: 2, mask: 0b11, saved: Some(-16), event: Some(2) };
        assert!(has_meaning(push.record()) && has_meaning(pop.record()));
        for run in [
            Run { event: Some(4), ..push },
            Run { event: Some(16), ..push },
            Run { event: None, mask: 0, ..push },
            Run { base: 1, ..pop },
            Run { has_last: true, ..pop },
            Run { has_last: true, base: 0, event: None, ..pop },
        ] {
            assert!(!has_meaning(run.record()), "{run:?}");
        }
        // Bits that no run uses; a base rule that no run has; an offset without its rule.
        for bits in [1 << 5, 1 << 7, 1 << 36, 1 << 38, 1 << 40, 1 << 47] {
            assert!(!has_meaning(Record(push.record().0 | bits)), "{bits:#x}");
        }
        assert!(
            !has_meaning(Record(push.record().0 & !(0x80 << 32) | 1 << 32)),
            "a distance without an event"
        );
        assert!(!has_meaning(Record(push.record().0 | 1 << 48)), "an offset without a save");
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
