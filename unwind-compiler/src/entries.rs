//! The CIEs and FDEs of a call frame section.
//!
//! # Why this shape
//! Iterators over `.eh_frame` stop at the first entry they cannot parse, and so do the unwinders built on
//! them: one bad FDE, or a CIE augmentation they do not know, loses the file. Each entry states its
//! length, which is all that is needed to get to the next one, so entries are found here by
//! their lengths alone, and whatever is wrong inside one stays there. An FDE is kept as four numbers and its
//! place, so that those of a whole image fit into less than they take in the file.
//!
//! Sources: DWARF 5, 6.4.1 and 7.4; Linux Standard Base Core 5.0, 10.6 and 10.5 (pointer encodings).

use std::collections::HashMap;

use windlass_schema::{Architecture, ImageAddress, Record};

use crate::cursor::Cursor;
use crate::elf::{FrameSection, Image, SectionKind};
use crate::instructions::{Frame, run_initial};
use crate::plain;
use crate::projection::record;
use crate::report::{SkipReason, SkippedFde};

/// Largest CIE in bytes; those of compilers take under 100.
pub(crate) const MAX_CIE_BYTES: usize = 4096;

/// What the FDEs of a CIE share.
pub(crate) struct Cie<'a> {
    /// Its section.
    pub(crate) data: &'a [u8],
    pub(crate) kind: SectionKind,
    pub(crate) architecture: Architecture,
    pub(crate) code_alignment: u64,
    pub(crate) data_alignment: i64,
    pub(crate) return_address: u16,
    pub(crate) is_signal_frame: bool,
    /// Whether a row that does not name the frame pointer leaves it as it is. Go's `.debug_frame` never names it.
    pub(crate) names_frame_pointer: bool,
    pub(crate) pointers: Pointers,
    /// The row that every FDE starts with; `None` if the instructions that make it are malformed.
    pub(crate) initial: Option<Frame<'a>>,
    /// The record of that row, if it is of the plain kind.
    pub(crate) plain: Option<Record>,
    pub(crate) pointer_encoding: u8,
    pub(crate) has_augmentation_data: bool,
}

/// One FDE: which addresses, and by which instructions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fde {
    pub(crate) start: u64,
    pub(crate) length: u32,
    /// Number of its CIE among all.
    pub(crate) cie: u32,
    /// Offset of the entry in its section.
    pub(crate) offset: u32,
    /// Offset and length of its instructions in the section.
    pub(crate) instructions: (u32, u32),
}

impl Fde {
    /// This FDE, as one that was skipped.
    pub(crate) fn skipped(&self, reason: SkipReason) -> SkippedFde {
        SkippedFde { offset: self.offset.into(), address: Some(ImageAddress::new(self.start)), reason }
    }
}

/// What encoded pointers count from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pointers {
    pub(crate) section: u64,
    pub(crate) text: Option<u64>,
    pub(crate) data: Option<u64>,
}

/// A section under way: its bytes and the CIEs met so far.
pub(crate) struct Entries<'a, 'c> {
    kind: SectionKind,
    data: &'a [u8],
    pointers: Pointers,
    architecture: Architecture,
    names_frame_pointer: bool,
    cies: &'c mut Vec<Cie<'a>>,
    /// Numbers of CIEs by offset; `None` for those of no use.
    numbers: HashMap<usize, Option<u32>>,
    last: Option<(usize, u32)>,
}

impl<'a, 'c> Entries<'a, 'c> {
    /// Section number `section`, whose bytes are `data`. Its CIEs go behind `cies`.
    pub(crate) fn new(
        image: &Image<'_>,
        section: usize,
        data: &'a [u8],
        is_go: bool,
        cies: &'c mut Vec<Cie<'a>>,
    ) -> Self {
        let FrameSection { kind, address, .. } = image.frames[section];
        Self {
            kind,
            data,
            pointers: Pointers { section: address, text: image.text, data: image.got },
            architecture: image.architecture,
            names_frame_pointer: !(is_go && kind == SectionKind::DebugFrame),
            cies,
            numbers: HashMap::new(),
            last: None,
        }
    }

    /// Calls `visit` with the CIEs so far and each FDE that is of use, or with what was skipped. `stated_bytes` is the
    /// section's size as its header has it.
    pub(crate) fn for_each(
        &mut self,
        image: &Image<'_>,
        stated_bytes: Option<u64>,
        mut visit: impl FnMut(&[Cie<'a>], Result<Fde, SkippedFde>),
    ) {
        let data = self.data;
        let mut at = 0;
        let skip = |at: usize, reason| Err(SkippedFde { offset: at as u64, address: None, reason });
        while let Some(length) = Cursor::new(data, at).u32() {
            let (header, length) = match length {
                // A terminator. Linkers leave one where an input object brought it, followed by more.
                0 if stated_bytes.is_some() => {
                    at += 4;
                    continue;
                }
                0 => return,
                0xffff_ffff => match Cursor::new(data, at + 4).u64() {
                    Some(length) => (12, length),
                    None => return visit(self.cies, skip(at, SkipReason::Truncated)),
                },
                length => (4, u64::from(length)),
            };
            let body = at + header;
            let end = usize::try_from(length).ok().and_then(|length| body.checked_add(length));
            let Some(end) = end.filter(|end| *end <= data.len()) else {
                return visit(self.cies, skip(at, SkipReason::Truncated));
            };
            let entry = Entry { offset: at, body, end, is_64_bit: header == 12 };
            match self.cie_of(&entry) {
                None => visit(self.cies, skip(at, SkipReason::Header)),
                Some(CieOf::Itself) => {}
                Some(CieOf::At(cie)) => {
                    let fde = self.fde(image, &entry, cie);
                    visit(self.cies, fde);
                }
            }
            at = end;
        }
        if stated_bytes.is_some_and(|stated| stated > data.len() as u64) {
            visit(self.cies, skip(at, SkipReason::Truncated));
        }
    }

    /// Where the entry's CIE is.
    fn cie_of(&self, entry: &Entry) -> Option<CieOf> {
        let mut cursor = Cursor::new(&self.data[..entry.end], entry.body);
        match self.kind {
            // LSB Core 10.6.1: the distance back to the CIE, of 4 bytes in either format.
            SectionKind::EhFrame => match cursor.u32()? {
                0 => Some(CieOf::Itself),
                distance => Some(match entry.body.checked_sub(distance as usize) {
                    Some(cie) => CieOf::At(Some(cie)),
                    None => CieOf::At(None),
                }),
            },
            // DWARF 5, 7.4: an offset into the section, as wide as the format; all ones is a CIE.
            SectionKind::DebugFrame => {
                let (pointer, itself) = if entry.is_64_bit {
                    (cursor.u64()?, u64::MAX)
                } else {
                    (cursor.u32()?.into(), u32::MAX.into())
                };
                Some(if pointer == itself { CieOf::Itself } else { CieOf::At(usize::try_from(pointer).ok()) })
            }
        }
    }

    fn fde(&mut self, image: &Image<'_>, entry: &Entry, cie: Option<usize>) -> Result<Fde, SkippedFde> {
        let skipped = |address, reason| SkippedFde { offset: entry.offset as u64, address, reason };
        let Some(number) = cie.and_then(|offset| self.cie_number(offset)) else {
            // Nor is a CIE there in entries whose relocations failed; no assembler writes such ones.
            let is_nowhere = cie.is_none_or(|offset| offset >= self.data.len());
            let is_spoiled = is_nowhere && image.is_relocatable();
            return Err(skipped(None, if is_spoiled { SkipReason::Relocation } else { SkipReason::Cie }));
        };
        let cie = &self.cies[number as usize];
        let wide = self.kind == SectionKind::DebugFrame && entry.is_64_bit;
        let mut cursor = Cursor::new(&self.data[..entry.end], entry.body + if wide { 8 } else { 4 });
        let (start, length, instructions) =
            header(&mut cursor, cie, image).ok_or(skipped(None, SkipReason::Header))?;
        let reason = match start.checked_add(length) {
            Some(end) if end == start => SkipReason::Empty,
            None => SkipReason::AddressOverflow,
            Some(_) if start == 0 && !image.has_code_at_zero() => SkipReason::Tombstone,
            Some(end) if !image.reaches(&(start..end)) => SkipReason::OutsideImage,
            Some(_) => {
                // Sections are limited to less than 4 GiB, and so is the reach of a table.
                return Ok(Fde {
                    start,
                    length: length as u32,
                    cie: number,
                    offset: entry.offset as u32,
                    instructions: (instructions as u32, (entry.end - instructions) as u32),
                });
            }
        };
        Err(skipped(Some(ImageAddress::new(start)), reason))
    }

    /// The number of the CIE at `offset`, which is read if it has not been.
    fn cie_number(&mut self, offset: usize) -> Option<u32> {
        if let Some((last, number)) = self.last
            && last == offset
        {
            return Some(number);
        }
        let number = match self.numbers.get(&offset) {
            Some(number) => *number,
            None => {
                let cie = self.cie(offset);
                let number = cie.map(|cie| {
                    self.cies.push(cie);
                    self.cies.len() as u32 - 1
                });
                self.numbers.insert(offset, number);
                number
            }
        }?;
        self.last = Some((offset, number));
        Some(number)
    }

    fn cie(&self, offset: usize) -> Option<Cie<'a>> {
        let mut cursor = Cursor::new(self.data, offset);
        let (is_64_bit, length) = match cursor.u32()? {
            0 => return None,
            0xffff_ffff => (true, cursor.u64()?),
            length => (false, length.into()),
        };
        let body = cursor.position();
        let end = body.checked_add(usize::try_from(length).ok()?)?;
        if end > self.data.len() || end - body > MAX_CIE_BYTES {
            return None;
        }
        let mut cursor = Cursor::new(&self.data[..end], body);
        match self.kind {
            SectionKind::EhFrame => (cursor.u32()? == 0).then_some(())?,
            SectionKind::DebugFrame if is_64_bit => (cursor.u64()? == u64::MAX).then_some(())?,
            SectionKind::DebugFrame => (cursor.u32()? == u32::MAX).then_some(())?,
        }
        let version = cursor.u8()?;
        let augmentation = cursor.string()?;
        match version {
            1 | 3 => {}
            // Address size 8, no segment selectors; `.eh_frame` never had these fields.
            4 if self.kind == SectionKind::DebugFrame => {
                (cursor.u8()? == 8 && cursor.u8()? == 0).then_some(())?;
            }
            4 => {}
            _ => return None,
        }
        let (code_alignment, data_alignment) = (cursor.uleb128()?, cursor.sleb128()?);
        let return_address =
            if version == 1 { cursor.u8()?.into() } else { u16::try_from(cursor.uleb128()?).ok()? };
        let mut cie = Cie {
            data: self.data,
            kind: self.kind,
            architecture: self.architecture,
            code_alignment,
            data_alignment,
            return_address,
            is_signal_frame: false,
            names_frame_pointer: self.names_frame_pointer,
            pointers: self.pointers,
            initial: None,
            plain: None,
            pointer_encoding: 0,
            has_augmentation_data: false,
        };
        if augmentation == b"S" {
            // What GNU as writes into `.debug_frame`, which has no augmentation data.
            cie.is_signal_frame = true;
        } else if let Some((z, letters)) = augmentation.split_first() {
            (*z == b'z').then_some(())?;
            let data_bytes = cursor.uleb128()?;
            let mut data = Cursor::new(&self.data[..cursor.position()], cursor.position());
            cursor.take(data_bytes)?;
            data = Cursor::new(&self.data[..cursor.position()], data.position());
            cie.has_augmentation_data = true;
            cie.augment(letters, &mut data)?;
        }
        cie.initial = run_initial(&cie, cursor.rest());
        cie.plain = cie.initial.and_then(|row| plain::initial(&cie, record(&cie, &row)));
        Some(cie)
    }
}

impl Cie<'_> {
    /// How addresses of its FDEs are written.
    pub(crate) fn pointer_encoding(&self) -> u8 {
        self.pointer_encoding
    }

    /// Takes what each letter of the augmentation says. An unknown one may change what an FDE means.
    fn augment(&mut self, letters: &[u8], data: &mut Cursor<'_>) -> Option<()> {
        for letter in letters {
            match letter {
                b'L' => {
                    data.u8()?;
                }
                b'P' => {
                    let encoding = data.u8()?;
                    // The routine itself is of no matter, only where it ends.
                    pointer_value(encoding & !INDIRECT, data, &self.pointers)?;
                }
                b'R' => self.pointer_encoding = data.u8()?,
                b'S' => self.is_signal_frame = true,
                // Signed with the B key; tagged stack frames. Neither changes where anything is saved.
                b'B' | b'G' if self.architecture == Architecture::Aarch64 => {}
                _ => return None,
            }
        }
        Some(())
    }
}

/// Where an entry lies in its section.
struct Entry {
    offset: usize,
    body: usize,
    end: usize,
    is_64_bit: bool,
}

/// What an entry names as its CIE.
enum CieOf {
    Itself,
    At(Option<usize>),
}

/// Start, length and offset of the instructions of the FDE whose addresses `cursor` is at.
fn header(cursor: &mut Cursor<'_>, cie: &Cie<'_>, image: &Image<'_>) -> Option<(u64, u64, usize)> {
    let encoding = cie.pointer_encoding;
    let mut start = pointer_value(encoding & !INDIRECT, cursor, &cie.pointers)?;
    if encoding & INDIRECT != 0 {
        start = image.word_at(start)?;
    }
    let length = raw_pointer(encoding & 0x0f, cursor)?;
    if cie.has_augmentation_data {
        let bytes = cursor.uleb128()?;
        cursor.take(bytes)?;
    }
    Some((start, length, cursor.position()))
}

/// `DW_EH_PE_indirect`.
const INDIRECT: u8 = 0x80;

/// A pointer in this encoding, which is not an indirect one.
pub(crate) fn pointer_value(encoding: u8, cursor: &mut Cursor<'_>, bases: &Pointers) -> Option<u64> {
    // DW_EH_PE_aligned: a plain word at the next multiple of its size.
    if encoding == 0x50 {
        let address = bases.section.wrapping_add(cursor.position() as u64);
        cursor.take(address.wrapping_neg() % 8)?;
        return cursor.u64();
    }
    let place = bases.section.wrapping_add(cursor.position() as u64);
    let value = raw_pointer(encoding & 0x0f, cursor)?;
    let base = match encoding & 0x70 {
        0x00 => 0,
        0x10 => place,
        0x20 => bases.text?,
        0x30 => bases.data?,
        // DW_EH_PE_funcrel counts from the function, which is what is being read.
        _ => return None,
    };
    Some(base.wrapping_add(value))
}

/// A value in this format, widened to 64 bits.
fn raw_pointer(format: u8, cursor: &mut Cursor<'_>) -> Option<u64> {
    Some(match format {
        // DW_EH_PE_absptr, udata8, sdata8
        0x00 | 0x04 | 0x0c => cursor.u64()?,
        0x01 => cursor.uleb128()?,
        0x02 => cursor.u16()?.into(),
        0x03 => cursor.u32()?.into(),
        0x09 => cursor.sleb128()? as u64,
        0x0a => i64::from(cursor.u16()? as i16) as u64,
        0x0b => i64::from(cursor.u32()? as i32) as u64,
        _ => return None,
    })
}
