//! The FDEs of an image, one at a time, and the rows of each.
//!
//! # Why this shape
//! Iterators over `.eh_frame` stop at the first entry they cannot parse, and so do the unwinders built on
//! them: one bad FDE, or a CIE augmentation they do not know, loses the file. Each entry states its
//! length, which is all that is needed to get to the next one, so entries are found here by
//! their lengths alone, and whatever is wrong inside one stays there. The interpreter of
//! instructions is gimli's; nothing behind [`Fde::rows`] knows that.

use std::collections::HashMap;

use gimli::{
    BaseAddresses, CommonInformationEntry, EhFrame, EhFrameOffset, EndianSlice, FrameDescriptionEntry,
    LittleEndian, StoreOnHeap, UnwindContext, UnwindSection, UnwindTableRow,
};
use windlass_schema::ImageAddress;

use crate::elf::Image;
use crate::report::{SkipReason, SkippedFde};

pub(crate) type Reader<'a> = EndianSlice<'a, LittleEndian>;
pub(crate) type CfiRow = UnwindTableRow<usize, StoreOnHeap>;

/// Largest CIE in bytes. Its instructions run again for each of its FDEs; those of compilers take under 100
/// bytes.
const MAX_CIE_BYTES: usize = 4096;

/// One FDE of an image and what is needed to interpret it.
pub(crate) struct Fde<'a, 's> {
    pub(crate) section: &'s EhFrame<Reader<'a>>,
    bases: &'s BaseAddresses,
    pub(crate) entry: FrameDescriptionEntry<Reader<'a>>,
}

impl Fde<'_, '_> {
    /// The addresses that the FDE covers: at least one.
    pub(crate) fn range(&self) -> std::ops::Range<u64> {
        self.entry.initial_address()..self.entry.end_address()
    }

    /// Calls `visit` with each row that covers an address of the FDE, in order, and the addresses.
    /// If the instructions are malformed, gives the address from which on nothing is known.
    pub(crate) fn rows(
        &self,
        context: &mut UnwindContext<usize>,
        mut visit: impl FnMut(std::ops::Range<u64>, &CfiRow),
    ) -> Result<(), u64> {
        let range = self.range();
        let Ok(mut table) = self.entry.rows(self.section, self.bases, context) else {
            return Err(range.start);
        };
        let mut next = range.start;
        loop {
            let row = match table.next_row() {
                Ok(Some(row)) => row,
                Ok(None) => return Ok(()),
                Err(_) if next < range.end => return Err(next),
                Err(_) => return Ok(()),
            };
            let rows_range = next..row.end_address().min(range.end);
            if !rows_range.is_empty() {
                next = rows_range.end;
                visit(rows_range, row);
            }
        }
    }
}

/// Calls `visit` with each FDE of `image` that is of use, and with what was skipped. Holds one section at a
/// time; gives the bytes of all that were read.
pub(crate) fn for_each_fde(image: &Image<'_>, mut visit: impl FnMut(Result<Fde<'_, '_>, SkippedFde>)) -> u64 {
    let mut read_bytes = 0;
    for skipped in &image.skipped {
        visit(Err(*skipped));
    }
    for section in &image.frames {
        let Some(data) = section.data() else {
            visit(Err(section.skipped(SkipReason::Unreadable)));
            continue;
        };
        read_bytes += data.len() as u64;
        let mut bases = BaseAddresses::default().set_eh_frame(section.address);
        if let Some(text) = image.text {
            bases = bases.set_text(text);
        }
        if let Some(got) = image.got {
            bases = bases.set_got(got);
        }
        let mut eh_frame = EhFrame::new(&data, LittleEndian);
        eh_frame.set_address_size(8);
        let mut cies = Cies::default();
        for_each_entry(&data, section.stated_bytes, |entry| {
            visit(entry.and_then(|offset| parse(image, &eh_frame, &bases, &mut cies, offset)));
        });
    }
    read_bytes
}

/// The CIEs met so far, by offset; `None` for those of no use.
type Cies<'a> = HashMap<usize, Option<CommonInformationEntry<Reader<'a>>>>;

/// Calls `visit` with the offset of each entry of a section that is not a CIE.
fn for_each_entry(data: &[u8], stated_bytes: Option<u64>, mut visit: impl FnMut(Result<usize, SkippedFde>)) {
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
        match half(body) {
            _ if end - body < 4 => visit(skip(at, SkipReason::Header)),
            Some(0) => {}
            _ => visit(Ok(at)),
        }
        at = end;
    }
    if stated_bytes.is_some_and(|stated| stated > data.len() as u64) {
        visit(skip(at, SkipReason::Truncated));
    }
}

fn parse<'a, 's>(
    image: &Image<'_>,
    section: &'s EhFrame<Reader<'a>>,
    bases: &'s BaseAddresses,
    cies: &mut Cies<'a>,
    offset: usize,
) -> Result<Fde<'a, 's>, SkippedFde> {
    let skipped = |address, reason| SkippedFde { offset: offset as u64, address, reason };
    let partial = section
        .partial_fde_from_offset(bases, EhFrameOffset(offset))
        .map_err(|_| skipped(None, SkipReason::Header))?;
    let cie_offset = partial.cie_offset();
    let cie = cies
        .entry(cie_offset.0)
        .or_insert_with(|| {
            let cie = section.cie_from_offset(bases, cie_offset).ok()?;
            (cie.entry_len() <= MAX_CIE_BYTES).then_some(cie)
        })
        .as_ref()
        .ok_or(skipped(None, SkipReason::Cie))?;
    let entry = partial.parse(|_, _, _| Ok(cie.clone())).map_err(|_| skipped(None, SkipReason::Header))?;
    let start = entry.initial_address();
    let reason = match start.checked_add(entry.len()) {
        Some(end) if end == start => SkipReason::Empty,
        None => SkipReason::AddressOverflow,
        Some(_) if start == 0 && !image.has_code_at_zero() => SkipReason::Tombstone,
        Some(end) if !image.reaches(&(start..end)) => SkipReason::OutsideImage,
        Some(_) => return Ok(Fde { section, bases, entry }),
    };
    Err(skipped(Some(ImageAddress::new(start)), reason))
}
