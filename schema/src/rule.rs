//! The meaning of a plain record, checked.

use core::fmt;

use crate::architecture::{Architecture, Register};
use crate::record::{MAX_RUN_BYTES, Record, frame_pointer, kind, return_address};

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
    /// *(*(rsp + g) + 8) - *(rsp + depth) + offset: the goroutine's stack, seen from the system stack on which
    /// it runs C code.
    GoStack {
        /// Where the goroutine is saved.
        g: i16,
        /// Where the depth of its stack pointer is saved.
        depth: i16,
        /// From that stack pointer to the CFA, in words.
        words: i8,
    },
    /// frame pointer + offset, on whichever stack that is.
    OtherStack(i32),
}

impl CfaRule {
    /// The instruction set that the rule is for.
    pub const fn architecture(self) -> Architecture {
        match self {
            Self::Offset(register, _) | Self::Deref(register, ..) => register.architecture(),
            Self::DerefIndexed(..) | Self::Plt { .. } | Self::GoStack { .. } | Self::OtherStack(_) => {
                Architecture::X86_64
            }
        }
    }
}

/// How to find the caller's frame pointer: rbp or x29.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FramePointerRule {
    /// Unchanged.
    Same,
    /// *(CFA + offset)
    AtCfa(i32),
    /// *(frame pointer + offset)
    AtFramePointer(i16),
    /// Lost.
    Undefined,
}

/// How to find the return address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReturnAddressRule {
    /// *(CFA + offset)
    AtCfa(i32),
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
    /// No CFI at all, in an image whose code keeps frame pointers: a walker may go by them, and know that
    /// the innermost frame may be in a prologue.
    FramePointersOnly = 12,
    /// A function that switches stacks, or whose frame cannot be told without its code.
    StackSwitch = 13,
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
        Self::FramePointersOnly,
        Self::StackSwitch,
    ];

    /// The reason with this code.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.iter().copied().find(|reason| *reason as u8 == code)
    }

    /// The name used in JSON and metrics.
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
            Self::FramePointersOnly => "frame_pointers_only",
            Self::StackSwitch => "stack_switch",
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
    /// The record that states this rule; where none can, one that says so.
    pub const fn to_record(self) -> Record {
        match self {
            Self::Frame { cfa, return_address, frame_pointer } => {
                match frame_record(cfa, return_address, frame_pointer) {
                    Some(record) => record,
                    None => match far_record(cfa, return_address, frame_pointer) {
                        Some(record) => record,
                        None => Record::unsupported(unstated(frame_pointer)),
                    },
                }
            }
            Self::Signal(offset) => Record::plain(kind::SIGNAL, 0, 0, 0, 0, Record::pair(offset, 0)),
            Self::End => Record::END,
            Self::NoCfi => Record::NO_CFI,
            Self::Unsupported(reason) => Record::unsupported(reason),
        }
    }

    /// The rule that a plain record of this instruction set states.
    pub fn of_record(record: Record, architecture: Architecture) -> Result<Self, RecordError> {
        let rule = decode(record, architecture).ok_or(RecordError(record.0))?;
        // Each rule has one record: bits that its kind does not use are zero.
        if rule.to_record() == record { Ok(rule) } else { Err(RecordError(record.0)) }
    }

    /// Whether this row can be stepped over exactly.
    pub const fn is_exact(self) -> bool {
        matches!(self, Self::Frame { .. } | Self::Signal(_) | Self::End)
    }
}

/// Which part of a frame's rule no record states.
const fn unstated(fp: FramePointerRule) -> UnsupportedReason {
    match fp {
        FramePointerRule::AtCfa(f) if f as i16 as i32 != f => UnsupportedReason::FramePointer,
        _ => UnsupportedReason::ReturnAddress,
    }
}

/// The record of kind `FAR_CFA` of a frame's rule, if there is one.
const fn far_record(cfa: CfaRule, ra: ReturnAddressRule, fp: FramePointerRule) -> Option<Record> {
    let (CfaRule::Offset(register, offset), ReturnAddressRule::AtCfa(place)) = (cfa, ra) else { return None };
    let fp_rule = match fp {
        FramePointerRule::Same => frame_pointer::SAME,
        FramePointerRule::AtCfa(f) if f as i64 + 8 == place as i64 => frame_pointer::AT_CFA,
        FramePointerRule::Undefined => frame_pointer::UNDEFINED,
        FramePointerRule::AtCfa(_) | FramePointerRule::AtFramePointer(_) => return None,
    };
    let f = offset as i64 + place as i64 - 8;
    if !matches!(register.architecture(), Architecture::Aarch64) || f as i16 as i64 != f {
        return None;
    }
    Some(Record::plain(kind::FAR_CFA, fp_rule, return_address::ABOVE_FP, register.number(), f as i16, offset))
}

/// The record of a frame's rule of another kind, if there is one.
const fn frame_record(cfa: CfaRule, ra: ReturnAddressRule, fp: FramePointerRule) -> Option<Record> {
    let architecture = cfa.architecture();
    let (kind, register, offset) = match cfa {
        CfaRule::Offset(register, offset) => {
            if register.number() == architecture.stack_pointer().number() {
                (kind::SP, None, offset)
            } else if register.number() == architecture.frame_pointer().number() {
                (kind::FP, None, offset)
            } else {
                (kind::REGISTER, Some(register.number()), offset)
            }
        }
        CfaRule::Deref(register, a, b) => (kind::DEREF, Some(register.number()), Record::pair(a, b)),
        CfaRule::DerefIndexed(a, b) => (kind::DEREF_INDEXED, None, Record::pair(a, b)),
        CfaRule::Plt { threshold, base } => (kind::PLT, None, Record::pair(threshold, base)),
        CfaRule::GoStack { g, depth, words } => (kind::GO_STACK, Some(words as u8), Record::pair(g, depth)),
        CfaRule::OtherStack(offset) => (kind::OTHER_STACK, None, offset),
    };
    let (fp_rule, f) = match fp {
        FramePointerRule::Same => (frame_pointer::SAME, 0),
        FramePointerRule::AtCfa(f) if f as i16 as i32 == f => (frame_pointer::AT_CFA, f as i16),
        FramePointerRule::AtCfa(_) => return None,
        FramePointerRule::AtFramePointer(f) => (frame_pointer::AT_FP, f),
        FramePointerRule::Undefined => (frame_pointer::UNDEFINED, 0),
    };
    let (ra_rule, aux) = match (ra, register) {
        (ReturnAddressRule::AtCfa(-8), register) => (return_address::AT_CFA, register),
        (ReturnAddressRule::AtCfa(offset), register) => {
            if fp_rule == frame_pointer::AT_CFA && offset == f as i32 + 8 {
                (return_address::ABOVE_FP, register)
            } else if register.is_none() && offset % 8 == 0 && offset >= -8 * 128 && offset < 8 * 128 {
                (return_address::AT_CFA_WORDS, Some((offset / 8) as u8))
            } else {
                return None;
            }
        }
        (ReturnAddressRule::Register(_), _) if matches!(cfa, CfaRule::GoStack { .. }) => return None,
        (ReturnAddressRule::Register(saved), register) => {
            let aux = match (architecture, register) {
                (Architecture::X86_64, None) => saved.number() << 4,
                (Architecture::X86_64, Some(register)) => register | saved.number() << 4,
                (Architecture::Aarch64, None) => saved.number(),
                (Architecture::Aarch64, Some(register)) if saved.number() == Register::X30.number() => {
                    register
                }
                (Architecture::Aarch64, Some(_)) => return None,
            };
            (return_address::REGISTER, Some(aux))
        }
    };
    let aux = match aux {
        Some(aux) => aux,
        None => 0,
    };
    Some(Record::plain(kind, fp_rule, ra_rule, aux, f, offset))
}

fn decode(record: Record, architecture: Architecture) -> Option<Rule> {
    let (a, b) = (record.a(), record.b());
    let is_x86 = architecture == Architecture::X86_64;
    let cfa_register = || {
        let number = if is_x86 { record.aux() & 15 } else { record.aux() };
        Register::new(architecture, number.into())
    };
    let mut has_register = false;
    let cfa = match record.kind() {
        kind::SP => CfaRule::Offset(architecture.stack_pointer(), record.offset()),
        kind::FP => CfaRule::Offset(architecture.frame_pointer(), record.offset()),
        kind::REGISTER => {
            has_register = true;
            CfaRule::Offset(cfa_register()?, record.offset())
        }
        kind::DEREF => {
            has_register = true;
            CfaRule::Deref(cfa_register()?, a, b)
        }
        kind::DEREF_INDEXED if is_x86 => CfaRule::DerefIndexed(a, b),
        kind::PLT if is_x86 => CfaRule::Plt { threshold: a, base: b },
        kind::GO_STACK if is_x86 => {
            has_register = true;
            CfaRule::GoStack { g: a, depth: b, words: record.aux() as i8 }
        }
        kind::OTHER_STACK if is_x86 => CfaRule::OtherStack(record.offset()),
        kind::FAR_CFA if !is_x86 => return decode_far(record, cfa_register()?),
        kind::SIGNAL => return Some(Rule::Signal(a)),
        kind::END => return Some(Rule::End),
        kind::NO_CFI => return Some(Rule::NoCfi),
        kind::UNSUPPORTED => {
            return Some(Rule::Unsupported(UnsupportedReason::from_code(record.aux())?));
        }
        _ => return None,
    };
    let return_address = match record.return_address() {
        return_address::AT_CFA => ReturnAddressRule::AtCfa(-8),
        return_address::REGISTER => ReturnAddressRule::Register(match (is_x86, has_register) {
            (true, _) => Register::new(architecture, (record.aux() >> 4).into())?,
            (false, false) => Register::new(architecture, record.aux().into())?,
            (false, true) => Register::X30,
        }),
        return_address::ABOVE_FP => ReturnAddressRule::AtCfa(i32::from(record.frame_pointer_offset()) + 8),
        _ => ReturnAddressRule::AtCfa(8 * i32::from(record.aux() as i8)),
    };
    let frame_pointer = match record.frame_pointer() {
        frame_pointer::SAME => FramePointerRule::Same,
        frame_pointer::AT_CFA => FramePointerRule::AtCfa(record.frame_pointer_offset().into()),
        frame_pointer::AT_FP => FramePointerRule::AtFramePointer(record.frame_pointer_offset()),
        _ => FramePointerRule::Undefined,
    };
    Some(Rule::Frame { cfa, return_address, frame_pointer })
}

/// The rule of a record of kind `FAR_CFA` over this register.
fn decode_far(record: Record, register: Register) -> Option<Rule> {
    let saved = i32::from(record.frame_pointer_offset()).checked_sub(record.offset())?;
    Some(Rule::Frame {
        cfa: CfaRule::Offset(register, record.offset()),
        return_address: ReturnAddressRule::AtCfa(saved.checked_add(8)?),
        frame_pointer: match record.frame_pointer() {
            frame_pointer::SAME => FramePointerRule::Same,
            frame_pointer::AT_CFA => FramePointerRule::AtCfa(saved),
            _ => FramePointerRule::Undefined,
        },
    })
}

/// Whether the record module describes this record, plain or a run: then each of its states is a rule.
pub(crate) fn has_meaning(record: Record, architecture: Architecture) -> bool {
    if record.is_run() {
        // Runs count words that are pushed and popped one at a time, as x86-64 has it.
        if architecture != Architecture::X86_64 {
            return false;
        }
        let [first, _, _, _, event, extra, ..] = record.0.to_le_bytes();
        let mask = record.run_mask();
        // Unused: bit 5 of byte 0, bits 4 to 6 of the event, its distance if there is none.
        if first & 0x20 != 0 || event & 0x70 != 0 || (event & 0x80 == 0 && event != 0) {
            return false;
        }
        let is_pop = record.kind() == kind::POP_RUN;
        let (has_last, is_frame) = (first & 0x40 != 0, first & 0x80 != 0);
        // The rows of the record module's table.
        let is_known = if is_pop {
            if has_last { !is_frame || extra != 0 } else { !is_frame && extra == 0 }
        } else {
            !is_frame && (!has_last || extra == 0)
        };
        let last_change = mask.checked_ilog2();
        let event_change = (event & 0x80 != 0).then_some(u32::from(event & 15));
        let ends_apart = has_last || extra != 0;
        if !is_known
            || ends_apart && (last_change.is_none() || event_change >= last_change)
            || is_pop && u32::from(record.aux()) < mask.count_ones() - u32::from(has_last)
        {
            return false;
        }
    }
    // The state changes at distance 0, at each change of the mask and at the event.
    let event = record.0 >> 32;
    let changes =
        if record.is_run() { record.run_mask() | ((event >> 7 & 1) << (event & 15)) as u32 } else { 0 };
    (0..=MAX_RUN_BYTES)
        .filter(|distance| *distance == 0 || changes >> (distance - 1) & 1 != 0)
        .all(|distance| Rule::of_record(record.at(distance), architecture).is_ok())
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
            Self::Signal(offset) => return write!(f, "signal context=sp{offset:+}"),
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
            CfaRule::GoStack { g, depth, words } => {
                write!(f, "cfa=*(*(rsp{g:+})+8)-*(rsp{depth:+}){:+}", 8 * i32::from(*words))?;
            }
            CfaRule::OtherStack(offset) => write!(f, "cfa=rbp{offset:+} on another stack")?,
        }
        match ra {
            ReturnAddressRule::AtCfa(offset) => write!(f, " ra=*(cfa{offset:+})")?,
            ReturnAddressRule::Register(register) => write!(f, " ra={}", register.name())?,
        }
        let name = cfa.architecture().frame_pointer().name();
        match fp {
            FramePointerRule::Same => write!(f, " {name}=same"),
            FramePointerRule::AtCfa(offset) => write!(f, " {name}=*(cfa{offset:+})"),
            FramePointerRule::AtFramePointer(offset) => write!(f, " {name}=*({name}{offset:+})"),
            FramePointerRule::Undefined => write!(f, " {name}=undefined"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn has_meaning(record: Record) -> bool {
        super::has_meaning(record, Architecture::X86_64)
    }

    fn architecture() -> impl Strategy<Value = Architecture> {
        prop_oneof![Just(Architecture::X86_64), Just(Architecture::Aarch64)]
    }

    fn register(architecture: Architecture) -> impl Strategy<Value = Register> {
        let registers = if architecture == Architecture::X86_64 { 16u16 } else { 32 };
        (0..registers).prop_map(move |number| Register::new(architecture, number).unwrap())
    }

    fn rule(architecture: Architecture) -> impl Strategy<Value = Rule> {
        let of_x86 = u32::from(architecture == Architecture::X86_64);
        let cfa = prop_oneof![
            2 => (register(architecture), any::<i32>()).prop_map(|(register, offset)| CfaRule::Offset(register, offset)),
            1 => (register(architecture), any::<i16>(), any::<i16>())
                .prop_map(|(register, a, b)| CfaRule::Deref(register, a, b)),
            of_x86 => (any::<i16>(), any::<i16>()).prop_map(|(a, b)| CfaRule::DerefIndexed(a, b)),
            of_x86 => (any::<i16>(), any::<i16>()).prop_map(|(threshold, base)| CfaRule::Plt { threshold, base }),
            of_x86 => (any::<i16>(), any::<i16>(), any::<i8>()).prop_map(|(g, depth, words)| CfaRule::GoStack { g, depth, words }),
            of_x86 => any::<i32>().prop_map(CfaRule::OtherStack),
        ];
        let return_address = prop_oneof![
            Just(ReturnAddressRule::AtCfa(-8)),
            (-200i32..200).prop_map(|words| ReturnAddressRule::AtCfa(8 * words)),
            any::<i16>().prop_map(|offset| ReturnAddressRule::AtCfa(offset.into())),
            any::<i32>().prop_map(ReturnAddressRule::AtCfa),
            register(architecture).prop_map(ReturnAddressRule::Register)
        ];
        let frame_pointer = prop_oneof![
            Just(FramePointerRule::Same),
            any::<i16>().prop_map(|f| FramePointerRule::AtCfa(f.into())),
            any::<i32>().prop_map(FramePointerRule::AtCfa),
            (-200i32..200).prop_map(|words| FramePointerRule::AtCfa(8 * words)),
            any::<i16>().prop_map(FramePointerRule::AtFramePointer),
            Just(FramePointerRule::Undefined),
        ];
        let frame = (cfa, return_address, frame_pointer).prop_map(|(cfa, return_address, frame_pointer)| {
            Rule::Frame { cfa, return_address, frame_pointer }
        });
        let near = (register(architecture), 0..1 << 20, -40_000..40_000, 0..4);
        let far = near.prop_map(|(register, offset, near, saved)| Rule::Frame {
            cfa: CfaRule::Offset(register, offset),
            return_address: ReturnAddressRule::AtCfa(near - offset),
            frame_pointer: match saved {
                0 => FramePointerRule::Same,
                1 => FramePointerRule::Undefined,
                _ => FramePointerRule::AtCfa(near - offset - 8 * (saved - 1)),
            },
        });
        prop_oneof![
            12 => frame,
            6 => far,
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
        extra: u8,
        is_frame: bool,
    }

    impl Run {
        fn record(self) -> Record {
            let kind = if self.is_push { kind::PUSH_RUN } else { kind::POP_RUN };
            let first = kind
                | u8::from(self.saved.is_some()) << 4
                | u8::from(self.has_last) << 6
                | u8::from(self.is_frame) << 7;
            let [m0, m1] = self.mask.to_le_bytes();
            let [f0, f1] = self.saved.unwrap_or(0).to_le_bytes();
            let event = self.event.map_or(0, |distance| 0x80 | (distance - 1));
            Record(u64::from_le_bytes([first, self.base, m0, m1, event, self.extra, f0, f1]))
        }

        /// The equations of the record module, one distance at a time.
        fn state(self, distance: u32) -> Rule {
            let last = (1..=16).rfind(|at| self.mask >> (at - 1) & 1 != 0);
            let (mut register, mut words) = (Register::RSP, i32::from(self.base));
            let mut saved = self.saved;
            for at in 1..=distance.min(16) {
                if self.mask >> (at - 1) & 1 != 0 {
                    let extra = i32::from(self.extra);
                    match (self.is_push, Some(at) == last, self.has_last) {
                        (true, true, true) => register = Register::RBP,
                        (true, true, false) => words += 1 + extra,
                        (true, false, _) => words += 1,
                        (false, true, true) if extra == 0 => return Rule::NoCfi,
                        (false, true, true) if self.is_frame => {
                            (register, words, saved) = (Register::RBP, extra, Some(-16));
                        }
                        (false, true, true) => (words, saved) = (i32::from(self.base) + extra, self.saved),
                        (false, ..) => words -= 1,
                    }
                }
                if self.event.map(u32::from) == Some(at) {
                    saved = if self.is_push { Some(-8 * words as i16) } else { None };
                }
            }
            Rule::Frame {
                cfa: CfaRule::Offset(register, 8 * words),
                return_address: ReturnAddressRule::AtCfa(-8),
                frame_pointer: saved
                    .map_or(FramePointerRule::Same, |saved| FramePointerRule::AtCfa(saved.into())),
            }
        }
    }

    fn run() -> impl Strategy<Value = Run> {
        let saved = prop::option::of(any::<i16>());
        let event = prop::option::of(1u8..=16);
        let extra = prop_oneof![Just(0u8), any::<u8>()];
        let flags = (any::<bool>(), any::<bool>(), any::<bool>());
        (flags, any::<u8>(), any::<u16>(), saved, event, extra).prop_map(
            |((is_push, has_last, is_frame), base, mask, saved, event, extra)| {
                let last = 16 - mask.leading_zeros() as u8;
                let ends_apart = last > event.unwrap_or(0);
                let has_last = has_last && ends_apart;
                let extra = if ends_apart && is_push != has_last { extra } else { 0 };
                let is_frame = is_frame && !is_push && has_last && extra != 0;
                let pops = if is_push { 0 } else { mask.count_ones() as u8 - u8::from(has_last) };
                Run { is_push, has_last, base: base.max(pops), mask, saved, event, extra, is_frame }
            },
        )
    }

    proptest! {
        /// A rule comes back as it was, or as unsupported if no record states it.
        #[test]
        fn decode_inverts_encode((architecture, rule) in architecture().prop_flat_map(|it| (Just(it), rule(it)))) {
            let back = Rule::of_record(rule.to_record(), architecture);
            let expect = if is_stated(rule) { Ok(rule) } else { Ok(Rule::Unsupported(reason(rule))) };
            prop_assert!(back == expect, "{} {:?}", rule, back);
        }

        /// No two records state one rule: a bit that is flipped changes it, or has no meaning.
        #[test]
        fn encode_inverts_decode(
            (architecture, rule) in architecture().prop_flat_map(|it| (Just(it), rule(it))),
            bit in 0u32..64,
        ) {
            let record = Record(rule.to_record().0 ^ 1 << bit);
            if let Ok(other) = Rule::of_record(record, architecture) {
                prop_assert!(other != rule);
                prop_assert_eq!(other.to_record(), record);
            }
        }

        #[test]
        fn every_state_of_a_run_is_what_the_equations_say(run in run()) {
            prop_assert!(has_meaning(run.record()));
            for distance in (0..20).chain([u32::MAX]) {
                prop_assert_eq!(Rule::of_record(run.record().at(distance), Architecture::X86_64), Ok(run.state(distance)), "{}", distance);
            }
        }
    }

    #[test]
    fn runs_without_meaning() {
        let none = Run {
            is_push: true,
            has_last: false,
            base: 1,
            mask: 0,
            saved: None,
            event: None,
            extra: 0,
            is_frame: false,
        };
        let push = Run { has_last: true, mask: 0b1001, event: Some(1), ..none };
        let pop = Run { is_push: false, base: 2, mask: 0b11, saved: Some(-16), event: Some(2), ..none };
        assert!(has_meaning(push.record()) && has_meaning(pop.record()));
        for run in [
            Run { event: Some(4), ..push },
            Run { event: Some(16), ..push },
            Run { event: None, mask: 0, ..push },
            Run { base: 1, ..pop },
            Run { has_last: true, ..pop },
            Run { has_last: true, base: 0, event: None, ..pop },
            Run { extra: 1, ..none },
            Run { extra: 1, ..push },
            Run { has_last: false, event: Some(4), extra: 1, ..push },
            Run { is_frame: true, ..push },
            Run { extra: 1, ..pop },
            Run { has_last: true, event: None, is_frame: true, ..pop },
        ] {
            assert!(!has_meaning(run.record()), "{run:?}");
        }
        // Bits that no run uses; a base rule that no run has; an offset without its rule.
        for bits in [1 << 5, 1 << 7, 1 << 36, 1 << 38, 1 << 47] {
            assert!(!has_meaning(Record(push.record().0 | bits)), "{bits:#x}");
        }
        assert!(
            !has_meaning(Record(push.record().0 & !(0x80 << 32) | 1 << 32)),
            "a distance without an event"
        );
        assert!(!has_meaning(Record(push.record().0 | 1 << 48)), "an offset without a save");
    }

    /// Why a frame's rule that no record states is unsupported.
    fn reason(rule: Rule) -> UnsupportedReason {
        match rule {
            Rule::Frame { frame_pointer: FramePointerRule::AtCfa(f), .. } if i16::try_from(f).is_err() => {
                UnsupportedReason::FramePointer
            }
            _ => UnsupportedReason::ReturnAddress,
        }
    }

    /// Whether some record states the frame's rule, as the record module has it.
    fn is_stated(rule: Rule) -> bool {
        let Rule::Frame { cfa, return_address, frame_pointer } = rule else { return true };
        let architecture = cfa.architecture();
        let has_register = match cfa {
            CfaRule::Offset(register, _) => {
                register != architecture.stack_pointer() && register != architecture.frame_pointer()
            }
            CfaRule::Deref(..) | CfaRule::GoStack { .. } => true,
            _ => false,
        };
        let is_wide = |offset: i32| i16::try_from(offset).is_err();
        let far = |place: i32| match (cfa, frame_pointer) {
            (_, FramePointerRule::AtFramePointer(_)) => false,
            (_, FramePointerRule::AtCfa(f)) if i64::from(place) != i64::from(f) + 8 => false,
            (CfaRule::Offset(register, offset), _) => {
                let near = i64::from(offset) + i64::from(place) - 8;
                register.architecture() == Architecture::Aarch64 && i16::try_from(near).is_ok()
            }
            _ => false,
        };
        match (return_address, frame_pointer) {
            (ReturnAddressRule::AtCfa(place), FramePointerRule::AtCfa(f)) if is_wide(f) => far(place),
            (ReturnAddressRule::AtCfa(place), _) => {
                place == -8
                    || matches!(frame_pointer, FramePointerRule::AtCfa(f) if place == f + 8)
                    || !has_register && place % 8 == 0 && (-128..128).contains(&(place / 8))
                    || far(place)
            }
            (_, FramePointerRule::AtCfa(f)) if is_wide(f) => false,
            (ReturnAddressRule::Register(register), _) => {
                let is_go = matches!(cfa, CfaRule::GoStack { .. });
                !is_go && (architecture == Architecture::X86_64 || !has_register || register == Register::X30)
            }
        }
    }

    #[test]
    fn rules_of_aarch64_and_their_records() {
        let frame = |cfa, return_address, frame_pointer| Rule::Frame { cfa, return_address, frame_pointer };
        let leaf = frame(
            CfaRule::Offset(Register::SP, 0),
            ReturnAddressRule::Register(Register::X30),
            FramePointerRule::Same,
        );
        let pair = frame(
            CfaRule::Offset(Register::X29, 48),
            ReturnAddressRule::AtCfa(-40),
            FramePointerRule::AtCfa(-48),
        );
        let alone =
            frame(CfaRule::Offset(Register::SP, 16), ReturnAddressRule::AtCfa(-16), FramePointerRule::Same);
        for (rule, bytes, text) in [
            (leaf, [0x40, 30, 0, 0, 0, 0, 0, 0], "cfa=sp+0 ra=x30 x29=same"),
            (pair, [0x91, 0, 0xd0, 0xff, 48, 0, 0, 0], "cfa=x29+48 ra=*(cfa-40) x29=*(cfa-48)"),
            (alone, [0xc0, 0xfe, 0, 0, 16, 0, 0, 0], "cfa=sp+16 ra=*(cfa-16) x29=same"),
        ] {
            assert_eq!((rule.to_record().0.to_le_bytes(), rule.to_string().as_str()), (bytes, text));
            assert_eq!(Rule::of_record(rule.to_record(), Architecture::Aarch64), Ok(rule));
        }
    }
}
