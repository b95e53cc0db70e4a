//! The FDEs of an image and the rows of each, by gimli: what tables are held against.
//!
//! # Why this shape
//! Compiler and oracle share where sections are and how entries are found (by their lengths alone, so that one
//! broken entry costs itself); headers, pointers and instructions are read by gimli here, and by
//! [`entries`](crate::entries) and [`instructions`](crate::instructions) there. What gimli leaves to its callers is
//! done here: it takes an indirect pointer for the address itself, and the row of an FDE that has not
//! defined a CFA yet for register 0 with offset 0.

mod legible;

use std::collections::HashMap;
use std::ops::Range;

use gimli::{
    BaseAddresses, CallFrameInstruction, CommonInformationEntry, DebugFrame, EhFrame, EndianSlice,
    FrameDescriptionEntry, LittleEndian, StoreOnHeap, UnwindContext, UnwindOffset, UnwindSection,
    UnwindTableRow, Vendor,
};
use windlass_schema::{Architecture, ImageAddress};

use self::legible::legible;
use crate::elf::{Image, SectionKind};
use crate::entries::MAX_CIE_BYTES;
use crate::report::{SkipReason, SkippedFde};

pub(crate) type Reader<'a> = EndianSlice<'a, LittleEndian>;
pub(crate) type CfiRow = UnwindTableRow<usize, StoreOnHeap>;

/// A row of an FDE.
#[derive(Clone, Copy)]
pub(crate) struct Row<'r> {
    pub(crate) cfi: &'r CfiRow,
    /// Whether instructions have defined a CFA.
    pub(crate) has_cfa: bool,
}

/// One FDE of an image and what is needed to interpret it.
pub(crate) struct Fde<'a, 's, S> {
    pub(crate) section: &'s S,
    bases: &'s BaseAddresses,
    pub(crate) entry: FrameDescriptionEntry<Reader<'a>>,
    /// From the address that gimli reads to that of the function: where that one is stored if the pointer
    /// is indirect, 0 if not.
    shift: u64,
}

/// What is done with each FDE.
pub(crate) trait Visitor {
    /// An FDE of use, of a section of this kind.
    fn fde<'a, S: UnwindSection<Reader<'a>>>(&mut self, kind: SectionKind, fde: &Fde<'a, '_, S>);
}

impl<'a, S: UnwindSection<Reader<'a>>> Fde<'a, '_, S> {
    /// The addresses that the FDE covers: at least one.
    pub(crate) fn range(&self) -> Range<u64> {
        let start = self.entry.initial_address().wrapping_add(self.shift);
        start..start + self.entry.len()
    }

    /// Calls `visit` with each row that covers an address of the FDE, in order, and the addresses.
    /// If the instructions are malformed, gives the address from which on nothing is known.
    pub(crate) fn rows(
        &self,
        context: &mut UnwindContext<usize>,
        mut visit: impl FnMut(Range<u64>, Row<'_>),
    ) -> Result<(), u64> {
        let range = self.range();
        let Ok(mut table) = self.entry.rows(self.section, self.bases, context) else {
            return Err(range.start);
        };
        let definitions = self.definitions();
        let mut next = range.start;
        loop {
            let row = match table.next_row() {
                Ok(Some(row)) => row,
                Ok(None) => return Ok(()),
                Err(_) if next < range.end => return Err(next),
                Err(_) => return Ok(()),
            };
            // The last row ends with the FDE, which may be where addresses end.
            let offset = row.end_address().wrapping_sub(self.entry.initial_address());
            let rows_range = next..range.start.saturating_add(offset).min(range.end);
            if !rows_range.is_empty() {
                next = rows_range.end;
                let behind = definitions.partition_point(|(from, _)| *from <= rows_range.start);
                let has_cfa = definitions[..behind].last().is_some_and(|(_, is_there)| *is_there);
                visit(rows_range, Row { cfi: row, has_cfa });
            }
        }
    }

    /// The addresses from which on instructions have defined a CFA, or have not: in order, up to the first
    /// instruction that is malformed.
    fn definitions(&self) -> Vec<(u64, bool)> {
        let mut definition = Definition::default();
        let mut initial = self.entry.cie().instructions(self.section, self.bases);
        while let Ok(Some(instruction)) = initial.next() {
            definition.run(&instruction);
        }
        let Range { start, end } = self.range();
        let code_alignment = self.entry.cie().code_alignment_factor();
        let mut instructions = self.entry.instructions(self.section, self.bases);
        let mut offset = 0u64;
        let mut found = vec![(start, definition.is_there)];
        while let Ok(Some(instruction)) = instructions.next() {
            match instruction {
                CallFrameInstruction::AdvanceLoc { delta } => {
                    offset = offset.saturating_add(code_alignment.saturating_mul(delta.into()));
                }
                CallFrameInstruction::SetLoc { address } => {
                    offset = address.wrapping_sub(self.entry.initial_address());
                }
                instruction => definition.run(&instruction),
            }
            let address = start.saturating_add(offset);
            if address >= end {
                break;
            }
            if found.last().is_some_and(|(_, is_there)| *is_there != definition.is_there) {
                found.push((address, definition.is_there));
            }
        }
        found
    }
}

/// Whether a CFA is defined, on the way through instructions.
#[derive(Default)]
struct Definition {
    is_there: bool,
    remembered: Vec<bool>,
}

impl Definition {
    fn run(&mut self, instruction: &CallFrameInstruction<usize>) {
        match instruction {
            CallFrameInstruction::DefCfa { .. }
            | CallFrameInstruction::DefCfaSf { .. }
            | CallFrameInstruction::DefCfaExpression { .. } => self.is_there = true,
            CallFrameInstruction::RememberState => self.remembered.push(self.is_there),
            CallFrameInstruction::RestoreState => {
                self.is_there = self.remembered.pop().unwrap_or(self.is_there);
            }
            _ => {}
        }
    }
}

/// Hands each FDE of `image` that is of use to `visitor`, section by section.
pub(crate) fn for_each_fde(image: &Image<'_>, visitor: &mut impl Visitor) {
    for section in &image.frames {
        let Some(data) = section.data() else { continue };
        let data = legible(image.architecture, section.kind, section.address, data);
        let mut bases = BaseAddresses::default().set_eh_frame(section.address);
        if let Some(text) = image.text {
            bases = bases.set_text(text);
        }
        if let Some(got) = image.got {
            bases = bases.set_got(got);
        }
        let vendor = match image.architecture {
            Architecture::X86_64 => Vendor::Default,
            Architecture::Aarch64 => Vendor::AArch64,
        };
        match section.kind {
            SectionKind::EhFrame => {
                let mut eh_frame = EhFrame::new(&data, LittleEndian);
                eh_frame.set_address_size(8);
                eh_frame.set_vendor(vendor);
                for_each_of(image, section.kind, section.stated_bytes, &data, &eh_frame, &bases, visitor);
            }
            SectionKind::DebugFrame => {
                let mut debug_frame = DebugFrame::new(&data, LittleEndian);
                debug_frame.set_address_size(8);
                debug_frame.set_vendor(vendor);
                for_each_of(image, section.kind, section.stated_bytes, &data, &debug_frame, &bases, visitor);
            }
        }
    }
}

fn for_each_of<'a, S: UnwindSection<Reader<'a>>>(
    image: &Image<'_>,
    kind: SectionKind,
    stated_bytes: Option<u64>,
    data: &'a [u8],
    section: &S,
    bases: &BaseAddresses,
    visitor: &mut impl Visitor,
) {
    let mut cies = Cies::default();
    for_each_entry(kind, data, stated_bytes, |entry| {
        if let Ok(fde) = entry.and_then(|offset| parse(image, section, bases, &mut cies, offset)) {
            visitor.fde(kind, &fde);
        }
    });
}

/// Calls `visit` with the offset of each entry of a section that is not a CIE.
fn for_each_entry(
    kind: SectionKind,
    data: &[u8],
    stated_bytes: Option<u64>,
    mut visit: impl FnMut(Result<usize, SkippedFde>),
) {
    walk_entries(kind, data, stated_bytes, |entry| match entry {
        Ok(Found::Cie { .. }) => {}
        Ok(Found::Fde { offset, .. }) => visit(Ok(offset)),
        Err(skipped) => visit(Err(skipped)),
    });
}

/// An entry of a section. `body` is what follows the length field.
enum Found {
    /// `string` is where its augmentation is.
    Cie {
        offset: usize,
        string: usize,
        end: usize,
    },
    Fde {
        offset: usize,
        body: usize,
        end: usize,
        is_64_bit: bool,
    },
}

/// The CIEs met so far, by offset; `None` for those of no use.
type Cies<'a> = HashMap<usize, Option<CommonInformationEntry<Reader<'a>>>>;

/// Calls `visit` with each entry of a section.
fn walk_entries(
    kind: SectionKind,
    data: &[u8],
    stated_bytes: Option<u64>,
    mut visit: impl FnMut(Result<Found, SkippedFde>),
) {
    let half = |at: usize| Some(u32::from_le_bytes(data.get(at..at + 4)?.try_into().ok()?));
    let mut at = 0;
    let skip = |at: usize, reason| Err(SkippedFde { offset: at as u64, address: None, reason });
    while let Some(length) = half(at) {
        let (header, length) = match length {
            // A terminator. Linkers leave one where an input object brought it, followed by more.
            0 if stated_bytes.is_some() => {
                at += 4;
                continue;
            }
            0 => return,
            0xffff_ffff => match (half(at + 4), half(at + 8)) {
                (Some(low), Some(high)) => (12, u64::from(low) | u64::from(high) << 32),
                _ => return visit(skip(at, SkipReason::Truncated)),
            },
            length => (4, u64::from(length)),
        };
        let body = at + header;
        let end = usize::try_from(length).ok().and_then(|length| body.checked_add(length));
        let Some(end) = end.filter(|end| *end <= data.len()) else {
            return visit(skip(at, SkipReason::Truncated));
        };
        let is_cie = match (kind, half(body)) {
            (SectionKind::EhFrame, Some(id)) => id == 0,
            (SectionKind::DebugFrame, Some(id)) => {
                id == u32::MAX && (header == 4 || half(body + 4) == Some(u32::MAX))
            }
            (_, None) => false,
        };
        match is_cie {
            _ if end - body < 4 => visit(skip(at, SkipReason::Header)),
            // Behind the id and the version.
            true => visit(Ok(Found::Cie {
                offset: at,
                string: body + if header == 12 && kind == SectionKind::DebugFrame { 9 } else { 5 },
                end,
            })),
            false => visit(Ok(Found::Fde { offset: at, body, end, is_64_bit: header == 12 })),
        }
        at = end;
    }
    if stated_bytes.is_some_and(|stated| stated > data.len() as u64) {
        visit(skip(at, SkipReason::Truncated));
    }
}

fn parse<'a, 's, S: UnwindSection<Reader<'a>>>(
    image: &Image<'_>,
    section: &'s S,
    bases: &'s BaseAddresses,
    cies: &mut Cies<'a>,
    offset: usize,
) -> Result<Fde<'a, 's, S>, SkippedFde> {
    let skipped = |address, reason| SkippedFde { offset: offset as u64, address, reason };
    let partial = section
        .partial_fde_from_offset(bases, S::Offset::from(offset))
        .map_err(|_| skipped(None, SkipReason::Header))?;
    let cie_offset = partial.cie_offset();
    let cie = cies
        .entry(UnwindOffset::into(cie_offset))
        .or_insert_with(|| {
            let cie = section.cie_from_offset(bases, cie_offset).ok()?;
            (cie.entry_len() <= MAX_CIE_BYTES).then_some(cie)
        })
        .as_ref()
        .ok_or(skipped(None, SkipReason::Cie))?;
    let entry = partial.parse(|_, _, _| Ok(cie.clone())).map_err(|_| skipped(None, SkipReason::Header))?;
    let stored = entry.initial_address();
    let is_indirect = entry.cie().fde_address_encoding().is_some_and(|encoding| encoding.is_indirect());
    let start = if is_indirect { image.word_at(stored) } else { Some(stored) };
    let start = start.ok_or(skipped(None, SkipReason::Header))?;
    let reason = match start.checked_add(entry.len()) {
        Some(end) if end == start => SkipReason::Empty,
        None => SkipReason::AddressOverflow,
        Some(_) if start == 0 && !image.has_code_at_zero() => SkipReason::Tombstone,
        Some(end) if !image.reaches(&(start..end)) => SkipReason::OutsideImage,
        Some(_) => return Ok(Fde { section, bases, entry, shift: start.wrapping_sub(stored) }),
    };
    Err(skipped(Some(ImageAddress::new(start)), reason))
}
