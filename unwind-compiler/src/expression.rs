//! Recognises the few DWARF expressions that compilers and linkers write into call frame information.
//!
//! # Why this shape
//! Peers compare expressions byte for byte with the ones they know, and miss the same formula with another
//! constant or another encoding of it. The 29 distinct expressions of 25 million rows compute three
//! formulas. So an expression is run here over symbolic values; what cannot become one of the formulas
//! any more ends it, which also bounds the work.

use gimli::{Encoding, EndianSlice, Expression, Format, LittleEndian, Operation};
use windlass_schema::record::DWARF_RA;
use windlass_schema::{Architecture, CfaRule, Register};

/// Call frame expressions are of 64-bit addresses; nothing in them depends on format or version.
pub(crate) const ENCODING: Encoding = Encoding { address_size: 8, format: Format::Dwarf32, version: 4 };

/// Most operations of an expression. The PLT's has nine.
const MAX_OPERATIONS: usize = 32;

/// DWARF number of r9, which indexes the stack frames of some hand-written code.
const DWARF_R9: u16 = 9;

/// A value on the expression stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    Constant(u64),
    /// register + offset
    Register(Register, u64),
    /// r9 * scale
    ScaledIndex(u64),
    /// rsp + 8 * r9 + offset
    Indexed(u64),
    /// *(register + a) + offset
    Deref(Register, u64, u64),
    /// *(rsp + 8 * r9 + a) + offset
    DerefIndexed(u64, u64),
    /// rip
    InstructionPointer,
    /// rip & 15
    PltOffset,
    /// ((rip & 15) >= threshold) * scale
    PltPushed(u64, u64),
    /// rsp + base + 8 * ((rip & 15) >= threshold)
    Plt {
        threshold: u64,
        base: u64,
    },
}

/// Runs `expression`; `None` if it computes none of the formulas of [`Value`].
pub(crate) fn run(architecture: Architecture, expression: &[u8]) -> Option<Value> {
    let expression = Expression(EndianSlice::new(expression, LittleEndian));
    let mut stack = [Value::Constant(0); 4];
    let mut depth = 0;
    let mut operations = expression.operations(ENCODING);
    for _ in 0..MAX_OPERATIONS {
        let Some(operation) = operations.next().ok()? else {
            return (depth == 1).then_some(stack[0]);
        };
        let mut pop = || {
            depth = usize::checked_sub(depth, 1)?;
            Some(stack[depth])
        };
        let value = match operation {
            Operation::Nop => continue,
            Operation::UnsignedConstant { value } => Value::Constant(value),
            Operation::SignedConstant { value } => Value::Constant(value as u64),
            Operation::RegisterOffset { register, offset, base_type } if base_type.0 == 0 => {
                match Register::new(architecture, register.0) {
                    Some(register) => Value::Register(register, offset as u64),
                    None if architecture == Architecture::X86_64
                        && register.0 == u16::from(DWARF_RA)
                        && offset == 0 =>
                    {
                        Value::InstructionPointer
                    }
                    None => return None,
                }
            }
            Operation::PlusConstant { value } => pop()?.plus(Value::Constant(value))?,
            Operation::Deref { size: 8, space: false, base_type } if base_type.0 == 0 => pop()?.deref()?,
            Operation::Plus => pop()?.plus(pop()?)?,
            Operation::Minus => match pop()? {
                Value::Constant(value) => pop()?.plus(Value::Constant(value.wrapping_neg()))?,
                _ => return None,
            },
            Operation::Mul => pop()?.times(pop()?)?,
            Operation::Shl => match pop()? {
                Value::Constant(bits @ 0..64) => pop()?.times(Value::Constant(1 << bits))?,
                _ => return None,
            },
            Operation::And => match (pop()?, pop()?) {
                (Value::Constant(15), Value::InstructionPointer)
                | (Value::InstructionPointer, Value::Constant(15)) => Value::PltOffset,
                _ => return None,
            },
            // Signed, but rip & 15 is 0 to 15 and the threshold is checked to be.
            Operation::Ge => match (pop()?, pop()?) {
                (Value::Constant(threshold @ 0..16), Value::PltOffset) => Value::PltPushed(threshold, 1),
                _ => return None,
            },
            _ => return None,
        };
        *stack.get_mut(depth)? = value;
        depth += 1;
    }
    None
}

impl Value {
    fn plus(self, other: Self) -> Option<Self> {
        use Value as V;
        Some(match (self, other) {
            (V::Constant(a), V::Constant(b)) => V::Constant(a.wrapping_add(b)),
            (V::Register(r, a), V::Constant(b)) | (V::Constant(b), V::Register(r, a)) => {
                V::Register(r, a.wrapping_add(b))
            }
            (V::Indexed(a), V::Constant(b)) | (V::Constant(b), V::Indexed(a)) => {
                V::Indexed(a.wrapping_add(b))
            }
            (V::Deref(r, at, a), V::Constant(b)) | (V::Constant(b), V::Deref(r, at, a)) => {
                V::Deref(r, at, a.wrapping_add(b))
            }
            (V::DerefIndexed(at, a), V::Constant(b)) | (V::Constant(b), V::DerefIndexed(at, a)) => {
                V::DerefIndexed(at, a.wrapping_add(b))
            }
            (V::Plt { threshold, base }, V::Constant(b)) | (V::Constant(b), V::Plt { threshold, base }) => {
                V::Plt { threshold, base: base.wrapping_add(b) }
            }
            (V::Register(Register::RSP, a), V::ScaledIndex(8))
            | (V::ScaledIndex(8), V::Register(Register::RSP, a)) => V::Indexed(a),
            (V::Register(Register::RSP, base), V::PltPushed(threshold, 8))
            | (V::PltPushed(threshold, 8), V::Register(Register::RSP, base)) => V::Plt { threshold, base },
            _ => return None,
        })
    }

    fn times(self, other: Self) -> Option<Self> {
        use Value as V;
        Some(match (self, other) {
            (V::Constant(a), V::Constant(b)) => V::Constant(a.wrapping_mul(b)),
            (V::Register(r, 0), V::Constant(a)) | (V::Constant(a), V::Register(r, 0))
                if r.architecture() == Architecture::X86_64 && u16::from(r.number()) == DWARF_R9 =>
            {
                V::ScaledIndex(a)
            }
            (V::ScaledIndex(a), V::Constant(b)) | (V::Constant(b), V::ScaledIndex(a)) => {
                V::ScaledIndex(a.wrapping_mul(b))
            }
            (V::PltPushed(threshold, a), V::Constant(b)) | (V::Constant(b), V::PltPushed(threshold, a)) => {
                V::PltPushed(threshold, a.wrapping_mul(b))
            }
            _ => return None,
        })
    }

    fn deref(self) -> Option<Self> {
        match self {
            Self::Register(register, offset) => Some(Self::Deref(register, offset, 0)),
            Self::Indexed(offset) => Some(Self::DerefIndexed(offset, 0)),
            _ => None,
        }
    }

    /// This value as the CFA, if its constants fit a record.
    pub(crate) fn to_cfa(self) -> Option<CfaRule> {
        let short = |value: u64| i16::try_from(value as i64).ok();
        Some(match self {
            Self::Register(register, offset) => CfaRule::Offset(register, i32::try_from(offset as i64).ok()?),
            Self::Deref(register, at, offset) => CfaRule::Deref(register, short(at)?, short(offset)?),
            Self::DerefIndexed(at, offset) => CfaRule::DerefIndexed(short(at)?, short(offset)?),
            Self::Plt { threshold, base } => {
                CfaRule::Plt { threshold: short(threshold)?, base: short(base)? }
            }
            Self::Constant(_)
            | Self::ScaledIndex(_)
            | Self::Indexed(_)
            | Self::InstructionPointer
            | Self::PltOffset
            | Self::PltPushed(..) => return None,
        })
    }
}
