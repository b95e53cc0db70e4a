//! Makes a call frame section legible to gimli without changing what it says.
//!
//! # Why this shape
//! gimli refuses a CIE with an augmentation letter that it does not know, an FDE with a pointer that it cannot
//! read and instructions behind one that it does not know, even if no row depends on any of them: the letters
//! `B` and `G` of aarch64, where the exception tables are, and whether a return address is signed. And it
//! does not read `DW_EH_PE_aligned`. An oracle that sees less than the compiler would call right rows wrong. So
//! in a copy of the section such instructions are nops, and other such bytes are taken out: those behind
//! them in the entry move up, and nops take the place at the end. Every entry stays where it is, as long as it
//! is; what cannot be made sense of stays as it was.
//!
//! Sources: Linux Standard Base Core 5.0, 10.5 and 10.6; DWARF 5, 7.24; DWARF for the Arm 64-bit
//! Architecture, 4.2.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;

use windlass_schema::Architecture;

use super::{Found, walk_entries};
use crate::cursor::Cursor;
use crate::elf::SectionKind;
use crate::entries::MAX_CIE_BYTES;

/// `DW_EH_PE_indirect`, which may come with any of the others.
const INDIRECT: u8 = 0x80;
/// `DW_EH_PE_aligned`: a word, at the next multiple of its size.
const ALIGNED: u8 = 0x50;
/// `DW_CFA_AARCH64_negate_ra_state_with_pc` and `DW_CFA_AARCH64_negate_ra_state`. What they change is in no
/// column that a walk restores.
const SIGNING: std::ops::RangeInclusive<u8> = 0x2c..=0x2d;

/// A section.
#[derive(Clone, Copy)]
struct Section<'a> {
    architecture: Architecture,
    kind: SectionKind,
    address: u64,
    data: &'a [u8],
}

/// What a CIE says of the form of its FDEs.
#[derive(Clone, Copy, Default)]
struct Form {
    pointer_encoding: u8,
    has_augmentation_data: bool,
}

/// What is to be done to an entry.
struct Edit {
    entry: Range<usize>,
    /// Bytes to set, before any are taken out.
    set: Vec<(usize, u8)>,
    /// Bytes to take out, in order.
    remove: Vec<Range<usize>>,
}

/// The section at `address` as gimli can read it.
pub(super) fn legible<'a>(
    architecture: Architecture,
    kind: SectionKind,
    address: u64,
    data: Cow<'a, [u8]>,
) -> Cow<'a, [u8]> {
    let section = Section { architecture, kind, address, data: &data };
    let mut edits = Vec::new();
    let mut forms = HashMap::new();
    walk_entries(kind, &data, None, |entry| {
        if let Ok(Found::Cie { offset, string, end }) = entry
            && end - offset <= MAX_CIE_BYTES
            && let Some((edit, form)) = section.cie_edit(string..end)
        {
            edits.push(edit);
            forms.insert(offset, form);
        }
    });
    let is_aligned = |form: &Form| form.pointer_encoding & !INDIRECT == ALIGNED;
    if architecture == Architecture::Aarch64 || forms.values().any(is_aligned) {
        walk_entries(kind, &data, None, |entry| {
            if let Ok(Found::Fde { body, end, is_64_bit, .. }) = entry {
                edits.extend(section.fde_edit(body..end, is_64_bit, &forms));
            }
        });
    }
    edits.retain(|edit| !edit.set.is_empty() || edit.remove.iter().any(|removed| !removed.is_empty()));
    let mut data = data;
    for edit in edits {
        edit.apply(data.to_mut());
    }
    data
}

impl Edit {
    fn apply(&self, data: &mut [u8]) {
        for (at, byte) in &self.set {
            data[*at] = *byte;
        }
        if self.remove.is_empty() {
            return;
        }
        let mut to = self.entry.start;
        for at in self.entry.clone() {
            if !self.remove.iter().any(|removed| removed.contains(&at)) {
                data[to] = data[at];
                to += 1;
            }
        }
        // DW_CFA_nop
        data[to..self.entry.end].fill(0);
    }
}

impl Section<'_> {
    /// What to do to a CIE, whose augmentation string and what follows are at `entry`, and the form of its FDEs.
    /// `None` if it is no CIE that any reader takes.
    fn cie_edit(&self, entry: Range<usize>) -> Option<(Edit, Form)> {
        let version = *self.data.get(entry.start.checked_sub(1)?)?;
        let mut cursor = Cursor::new(&self.data[..entry.end], entry.start);
        let letters = cursor.string()?;
        if version == 4 && self.kind == SectionKind::DebugFrame {
            cursor.take(2)?;
        }
        cursor.uleb128()?;
        cursor.sleb128()?;
        match version {
            1 => cursor.take(1).map(|_| ())?,
            _ => cursor.uleb128().map(|_| ())?,
        }
        let mut edit = Edit { entry: entry.clone(), set: Vec::new(), remove: Vec::new() };
        let mut form = Form::default();
        if letters.first() == Some(&b'z') {
            let length_at = cursor.position();
            // Of more than 127 bytes no compiler has use.
            let length = cursor.u8().filter(|length| *length < 0x80)?;
            let from = cursor.position();
            cursor.take(length.into())?;
            let mut removed = Vec::new();
            let data = Cursor::new(&self.data[..cursor.position()], from);
            form = self.letters_edit(&letters[1..], entry.start + 1, data, &mut edit, &mut removed)?;
            let bytes: usize = removed.iter().map(|removed| removed.len()).sum();
            edit.set.push((length_at, length.checked_sub(u8::try_from(bytes).ok()?)?));
            edit.remove.extend(removed);
        }
        let instructions = cursor.position()..entry.end;
        self.silence(instructions, form.pointer_encoding, &mut edit);
        Some((edit, form))
    }

    /// Goes through the letters behind the `z` at `at - 1` and their data; `removed` are the bytes of that to take
    /// out.
    fn letters_edit(
        &self,
        letters: &[u8],
        at: usize,
        mut data: Cursor<'_>,
        edit: &mut Edit,
        removed: &mut Vec<Range<usize>>,
    ) -> Option<Form> {
        let mut form = Form { has_augmentation_data: true, ..Form::default() };
        for (letter, at) in letters.iter().zip(at..) {
            let from = data.position();
            let is_removed = match letter {
                b'B' | b'G' => self.architecture == Architecture::Aarch64,
                b'S' => false,
                b'L' => data.u8().map(|_| true)?,
                b'P' => {
                    let encoding = data.u8()? & !INDIRECT;
                    self.skip_pointer(encoding, &mut data)?;
                    encoding == ALIGNED
                }
                b'R' => {
                    form.pointer_encoding = data.u8()?;
                    if form.pointer_encoding & !INDIRECT == ALIGNED {
                        edit.set.push((from, form.pointer_encoding & INDIRECT));
                    }
                    false
                }
                _ => return None,
            };
            if is_removed {
                edit.remove.push(at..at + 1);
                removed.push(from..data.position());
            }
        }
        Some(form)
    }

    /// What to do to an FDE, given what follows its length field.
    fn fde_edit(&self, entry: Range<usize>, is_64_bit: bool, forms: &HashMap<usize, Form>) -> Option<Edit> {
        let mut cursor = Cursor::new(&self.data[..entry.end], entry.start);
        let cie = match self.kind {
            SectionKind::EhFrame => entry.start.checked_sub(cursor.u32()? as usize)?,
            SectionKind::DebugFrame if is_64_bit => usize::try_from(cursor.u64()?).ok()?,
            SectionKind::DebugFrame => cursor.u32()? as usize,
        };
        let form = forms.get(&cie)?;
        let encoding = form.pointer_encoding & !INDIRECT;
        let mut edit = Edit { entry: entry.clone(), set: Vec::new(), remove: Vec::new() };
        if encoding == ALIGNED {
            let from = cursor.position();
            cursor.take(self.padding(from))?;
            edit.remove.push(from..cursor.position());
            cursor.take(8)?;
        } else {
            self.skip_pointer(encoding, &mut cursor)?;
        }
        skip_value(encoding, &mut cursor)?;
        if form.has_augmentation_data {
            let length = cursor.uleb128()?;
            cursor.take(length)?;
        }
        self.silence(cursor.position()..entry.end, form.pointer_encoding, &mut edit);
        Some(edit)
    }

    /// Makes nops of the instructions in `range` that are about signatures, up to one that is not known.
    fn silence(&self, range: Range<usize>, encoding: u8, edit: &mut Edit) {
        if self.architecture != Architecture::Aarch64 {
            return;
        }
        let mut cursor = Cursor::new(&self.data[..range.end], range.start);
        loop {
            let at = cursor.position();
            let Some(instruction) = cursor.u8() else { return };
            if SIGNING.contains(&instruction) {
                edit.set.push((at, 0));
            } else if self.skip_operands(instruction, encoding, &mut cursor).is_none() {
                return;
            }
        }
    }

    fn skip_operands(&self, instruction: u8, encoding: u8, cursor: &mut Cursor<'_>) -> Option<()> {
        let numbers = match instruction {
            0x00 | 0x0a | 0x0b | 0x40..=0x7f | 0xc0..=0xff => 0,
            0x01 => return self.skip_pointer(encoding & !INDIRECT, cursor),
            0x02 => return cursor.take(1).map(|_| ()),
            0x03 => return cursor.take(2).map(|_| ()),
            0x04 => return cursor.take(4).map(|_| ()),
            // Blocks, behind a register or not.
            0x0f => return skip_block(cursor),
            0x10 | 0x16 => return cursor.uleb128().and_then(|_| skip_block(cursor)),
            0x06..=0x08 | 0x0d | 0x0e | 0x13 | 0x2e | 0x80..=0xbf => 1,
            0x05 | 0x09 | 0x0c | 0x11 | 0x12 | 0x14 | 0x15 => 2,
            _ => return None,
        };
        for _ in 0..numbers {
            // As long as its bytes say, signed or not.
            while cursor.u8()? >= 0x80 {}
        }
        Some(())
    }

    /// Goes behind a pointer in this encoding, which is not an indirect one.
    fn skip_pointer(&self, encoding: u8, cursor: &mut Cursor<'_>) -> Option<()> {
        if encoding == ALIGNED {
            return cursor.take(self.padding(cursor.position()) + 8).map(|_| ());
        }
        skip_value(encoding, cursor)
    }

    /// Bytes from `at` to the next word.
    fn padding(&self, at: usize) -> u64 {
        self.address.wrapping_add(at as u64).wrapping_neg() % 8
    }
}

fn skip_block(cursor: &mut Cursor<'_>) -> Option<()> {
    let length = cursor.uleb128()?;
    cursor.take(length).map(|_| ())
}

/// Goes behind a value in the format of this encoding.
fn skip_value(encoding: u8, cursor: &mut Cursor<'_>) -> Option<()> {
    match encoding & 0x0f {
        // DW_EH_PE_absptr, udata8, sdata8
        0x00 | 0x04 | 0x0c => cursor.take(8).map(|_| ()),
        0x02 | 0x0a => cursor.take(2).map(|_| ()),
        0x03 | 0x0b => cursor.take(4).map(|_| ()),
        0x01 => cursor.uleb128().map(|_| ()),
        0x09 => cursor.sleb128().map(|_| ()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use gimli::{BaseAddresses, CfaRule, EhFrame, LittleEndian, UnwindContext, UnwindSection, Vendor};

    use super::*;

    /// An entry of `.eh_frame` behind `before` bytes of it: a length, the distance back to the CIE, the rest. `A` in
    /// `parts` is padding to the next word of the section.
    fn entry(section: &mut Vec<u8>, distance: u32, parts: &[&[u8]]) {
        let start = section.len();
        section.extend([0; 4]);
        section.extend(distance.to_le_bytes());
        for part in parts {
            match part {
                [b'A'] => section.resize(section.len().next_multiple_of(8), 0),
                part => section.extend(*part),
            }
        }
        section.resize(section.len().next_multiple_of(4), 0);
        let length = (section.len() - start - 4) as u32;
        section[start..start + 4].copy_from_slice(&length.to_le_bytes());
    }

    #[test]
    fn what_gimli_refuses_is_read_as_it_was_meant() {
        let mut section = Vec::new();
        // 14 bytes of data: an aligned personality routine, which is at 24, and how addresses are written.
        let header = b"\x01zPBRG\0\x04\x78\x1e";
        let def_cfa = [0x0c, 31, 0];
        entry(&mut section, 0, &[header, &[14, ALIGNED], b"A", &[0xff; 8], &[ALIGNED], &def_cfa]);
        let fde = section.len();
        let (start, length) = (0x40_0000u64.to_le_bytes(), 16u64.to_le_bytes());
        // negate_ra_state, advance_loc 1, def_cfa_offset 32
        let instructions = [0, 0x2d, 0x41, 0x0e, 32];
        entry(&mut section, fde as u32 + 4, &[b"A", &start, &length, &instructions]);
        let read = |section: &[u8]| {
            let mut eh_frame = EhFrame::new(section, LittleEndian);
            eh_frame.set_address_size(8);
            eh_frame.set_vendor(Vendor::AArch64);
            let bases = BaseAddresses::default().set_eh_frame(0x1000);
            let fde = eh_frame.fde_from_offset(&bases, fde.into(), EhFrame::cie_from_offset)?;
            let mut context = UnwindContext::new();
            let mut table = fde.rows(&eh_frame, &bases, &mut context)?;
            let mut rows = Vec::new();
            while let Some(row) = table.next_row()? {
                let CfaRule::RegisterAndOffset { offset, .. } = *row.cfa() else {
                    unreachable!("no expression")
                };
                rows.push((row.start_address(), row.end_address(), offset));
            }
            Ok::<_, gimli::Error>(rows)
        };
        assert!(read(&section).is_err(), "nothing to help with");
        let found = legible(Architecture::Aarch64, SectionKind::EhFrame, 0x1000, section.as_slice().into());
        assert_eq!(found.len(), section.len());
        assert_eq!(read(&found), Ok(vec![(0x40_0000, 0x40_0004, 0), (0x40_0004, 0x40_0010, 32)]));
        // Letters of aarch64 mean nothing elsewhere.
        let other = legible(Architecture::X86_64, SectionKind::EhFrame, 0x1000, section.as_slice().into());
        assert!(read(&other).is_err());
    }
}
