//! A walk by the book: gimli's interpreter of call frame information over all registers and real memory.
//!
//! Slow, and good for nothing but being right: it keeps every register that CFI speaks of, evaluates
//! every expression, and knows no table. It judges where two unwinders differ.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use gimli::{
    BaseAddresses, CfaRule, CieOrFde, EhFrame, EhFrameOffset, Encoding, EvaluationResult, LittleEndian,
    Location, Register, RegisterRule, UnwindContext, UnwindExpression, UnwindSection as _, UnwindTableRow,
    Value,
};
use windlass_schema::ImageAddress;
use windlass_schema::record::{DWARF_RBP, DWARF_RSP, REGISTERS};

use super::images::Sections;

/// What x86-64 calls keep (System V ABI, 3.2.1): rbx, rbp, r12 to r15. CFI says nothing of one that a function
/// leaves alone.
const CALLEE_SAVED: [usize; 6] = [3, 6, 12, 13, 14, 15];
/// Column of the return address.
const RETURN_ADDRESS: Register = Register(16);
/// Longest expression evaluation, in operations; none is known that loops.
const MAX_OPERATIONS: u32 = 256;

/// The word at an address.
pub(crate) type Memory<'a> = dyn Fn(u64) -> Option<u64> + 'a;

/// The registers of a frame, those that are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) general: [Option<u64>; REGISTERS],
    pub(crate) rip: u64,
    /// Whether `rip` is an instruction's address, not a return address.
    pub(crate) exact: bool,
}

/// Why there is no next frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The CFI says so.
    Undefined,
    /// No CFI covers the address.
    NotCovered,
    /// A value that the rule needs is not to be had.
    Unknown,
}

/// The CFI of one image.
pub(crate) struct Cfi {
    sections: Arc<Sections>,
    bases: BaseAddresses,
    /// First address, first address behind, and place of each FDE, by address.
    fdes: Vec<(u64, u64, usize)>,
    rows: RefCell<HashMap<u64, Option<Rc<Row>>>>,
}

/// What CFI says of one address.
pub(crate) struct Row {
    row: UnwindTableRow<usize>,
    signal: bool,
    encoding: Encoding,
}

impl Cfi {
    pub(crate) fn new(sections: Arc<Sections>) -> Self {
        let bases = BaseAddresses::default()
            .set_eh_frame(sections.eh_frame_address)
            .set_text(sections.text.start)
            .set_got(sections.got.start);
        let eh_frame = EhFrame::new(&sections.eh_frame, LittleEndian);
        let mut fdes = Vec::new();
        let mut entries = eh_frame.entries(&bases);
        while let Ok(Some(entry)) = entries.next() {
            let CieOrFde::Fde(partial) = entry else { continue };
            if let Ok(fde) = partial.parse(EhFrame::cie_from_offset) {
                fdes.push((fde.initial_address(), fde.end_address(), fde.offset()));
            }
        }
        fdes.sort_unstable();
        Self { sections, bases, fdes, rows: RefCell::default() }
    }

    /// Address of the program's first instruction.
    pub(crate) fn entry(&self) -> ImageAddress {
        ImageAddress::new(self.sections.entry)
    }

    fn section(&self) -> EhFrame<gimli::EndianSlice<'_, LittleEndian>> {
        EhFrame::new(&self.sections.eh_frame, LittleEndian)
    }

    /// What holds at an address.
    pub(crate) fn row(&self, address: ImageAddress) -> Option<Rc<Row>> {
        let address = address.get();
        let find = || {
            let behind = self.fdes.partition_point(|(start, ..)| *start <= address);
            let (_, end, offset) = self.fdes[behind.checked_sub(1)?];
            if address >= end {
                return None;
            }
            let section = self.section();
            let fde =
                section.fde_from_offset(&self.bases, EhFrameOffset(offset), EhFrame::cie_from_offset).ok()?;
            let mut context = UnwindContext::new();
            let row = fde.unwind_info_for_address(&section, &self.bases, &mut context, address).ok()?;
            let (signal, encoding) = (fde.is_signal_trampoline(), fde.cie().encoding());
            Some(Rc::new(Row { row: row.clone(), signal, encoding }))
        };
        self.rows.borrow_mut().entry(address).or_insert_with(find).clone()
    }

    /// The caller of `frame`, whose row this is.
    pub(crate) fn step(&self, frame: &Frame, row: &Row, memory: &Memory<'_>) -> Result<Frame, End> {
        let machine = Machine { frame, memory: Some(memory), section: &self.section(), row };
        let rule = |register| row.row.register(register);
        if rule(RETURN_ADDRESS) == Some(RegisterRule::Undefined) {
            return Err(End::Undefined);
        }
        let cfa = machine.canonical_frame_address().ok_or(End::Unknown)?;
        let mut caller = Frame { general: [None; REGISTERS], rip: 0, exact: row.signal };
        for (number, value) in caller.general.iter_mut().enumerate() {
            *value = match rule(Register(number as u16)) {
                None if number == usize::from(DWARF_RSP) => Some(cfa),
                None if CALLEE_SAVED.contains(&number) => frame.general[number],
                None => None,
                Some(rule) => machine.value(&rule, cfa, frame.general[number]),
            };
        }
        let return_address = rule(RETURN_ADDRESS).ok_or(End::Unknown)?;
        caller.rip = machine.value(&return_address, cfa, None).ok_or(End::Unknown)?;
        Ok(caller)
    }

    /// Whether framehop 0.16 can follow this row. It evaluates expressions over rip, rsp and rbp alone, without
    /// memory, and where it cannot, it goes by the frame pointer instead, right or wrong:
    /// - a CFA in another register than rsp and rbp: code before and behind a DRAP frame's body (r10), the
    ///   loader's lazy binding (rbx), cryptographic assembly (rax, r11);
    /// - a CFA read from memory: the body of a DRAP frame (`*(rbp - 8)`), cryptographic assembly;
    /// - a signal frame, whose registers are all in memory; it also takes the interrupted instruction's
    ///   address for a return address and looks up the byte before it;
    /// - a return address in a register.
    pub(crate) fn framehop_follows(&self, frame: &Frame, row: &Row) -> bool {
        let machine = Machine { frame, memory: None, section: &self.section(), row };
        matches!(row.row.register(RETURN_ADDRESS), Some(RegisterRule::Undefined | RegisterRule::Offset(_)))
            && match row.row.cfa() {
                CfaRule::RegisterAndOffset { register, .. } => framehop_knows(*register),
                CfaRule::Expression(expression) => machine.evaluate(expression, None).is_some(),
            }
    }
}

fn framehop_knows(register: Register) -> bool {
    [u16::from(DWARF_RSP), u16::from(DWARF_RBP), RETURN_ADDRESS.0].contains(&register.0)
}

/// A frame in which rules get values.
struct Machine<'a> {
    frame: &'a Frame,
    /// `None` for a machine as limited as framehop's: no memory, and only the registers that it knows.
    memory: Option<&'a Memory<'a>>,
    section: &'a EhFrame<gimli::EndianSlice<'a, LittleEndian>>,
    row: &'a Row,
}

impl Machine<'_> {
    fn register(&self, register: Register) -> Option<u64> {
        if self.memory.is_none() && !framehop_knows(register) {
            return None;
        }
        if register == RETURN_ADDRESS {
            return Some(self.frame.rip);
        }
        *self.frame.general.get(usize::from(register.0))?
    }

    fn word(&self, address: u64) -> Option<u64> {
        self.memory?(address)
    }

    fn canonical_frame_address(&self) -> Option<u64> {
        match self.row.row.cfa() {
            CfaRule::RegisterAndOffset { register, offset } => {
                Some(self.register(*register)?.wrapping_add_signed(*offset))
            }
            CfaRule::Expression(expression) => self.evaluate(expression, None),
        }
    }

    fn value(&self, rule: &RegisterRule<usize>, cfa: u64, same: Option<u64>) -> Option<u64> {
        match rule {
            RegisterRule::SameValue => same,
            RegisterRule::Offset(offset) => self.word(cfa.wrapping_add_signed(*offset)),
            RegisterRule::ValOffset(offset) => Some(cfa.wrapping_add_signed(*offset)),
            RegisterRule::Register(register) => self.register(*register),
            RegisterRule::Expression(expression) => self.word(self.evaluate(expression, Some(cfa))?),
            RegisterRule::ValExpression(expression) => self.evaluate(expression, Some(cfa)),
            _ => None,
        }
    }

    fn evaluate(&self, expression: &UnwindExpression<usize>, initial: Option<u64>) -> Option<u64> {
        let mut evaluation = expression.get(self.section).ok()?.evaluation(self.row.encoding);
        evaluation.set_max_iterations(MAX_OPERATIONS);
        if let Some(initial) = initial {
            evaluation.set_initial_value(initial);
        }
        let mut result = evaluation.evaluate().ok()?;
        loop {
            result = match result {
                EvaluationResult::Complete => break,
                EvaluationResult::RequiresRegister { register, .. } => {
                    evaluation.resume_with_register(Value::Generic(self.register(register)?)).ok()?
                }
                EvaluationResult::RequiresMemory { address, size: 8, space: None, .. } => {
                    evaluation.resume_with_memory(Value::Generic(self.word(address)?)).ok()?
                }
                _ => return None,
            };
        }
        match evaluation.as_result() {
            [piece] => match piece.location {
                Location::Address { address } => Some(address),
                _ => None,
            },
            _ => None,
        }
    }
}
