//! The rows of functions as x86-64 compilers write them, straight from instructions to records.
//!
//! # Why this shape
//! A row has a rule for each of seventeen registers, and a table keeps three of them. Of a thousand FDEs, 999 move rsp
//! or rbp, save registers at the CFA, and do nothing else; the state they go through is one record, a word. So
//! these are run here, at a tenth of the work; at the first instruction that could mean more, this gives up, and
//! [`instructions`](crate::instructions) runs the FDE from its start. What is right is said there: this has to say the same.

use windlass_schema::record::{DWARF_RA, DWARF_RBP, DWARF_RSP, frame_pointer, kind, return_address};
use windlass_schema::{Architecture, Record};

use crate::cursor::Cursor;
use crate::entries::Cie;

/// States remembered at once; compilers nest two.
const MAX_REMEMBERED: usize = 4;

/// The state that an FDE of `cie` starts with, if FDEs of this CIE can be run here: its first row has this record.
pub(crate) fn initial(cie: &Cie<'_>, record: Record) -> Option<Record> {
    let is_plain = cie.architecture == Architecture::X86_64
        && !cie.is_signal_frame
        && cie.names_frame_pointer
        && (cie.code_alignment, cie.data_alignment) == (1, -8)
        && cie.return_address == DWARF_RA.into()
        && matches!(record.kind(), kind::SP | kind::FP)
        && record.return_address() == return_address::AT_CFA
        && record.frame_pointer() <= frame_pointer::AT_CFA;
    is_plain.then_some(record)
}

/// Runs instructions from this state on; calls `visit` with the offset of each row's first byte and its record.
/// `None`, after some calls, if there is more to them.
#[inline]
pub(crate) fn run(instructions: &[u8], initial: Record, mut visit: impl FnMut(u64, Record)) -> Option<()> {
    let mut state = initial;
    let mut remembered = [initial; MAX_REMEMBERED];
    let mut depth = 0;
    let mut offset = 0u64;
    let mut cursor = Cursor::new(instructions, 0);
    while let Some(instruction) = cursor.u8() {
        let operand = instruction & 0x3f;
        let advance: u64 = match instruction >> 6 {
            1 => operand.into(),
            2 => {
                let words = cursor.uleb128()?;
                match operand {
                    DWARF_RBP => state = saved(state, i16::try_from(words).ok()?.checked_mul(-8)?),
                    DWARF_RA | DWARF_RSP => return None,
                    _ => {}
                }
                continue;
            }
            3 => {
                match operand {
                    DWARF_RBP => state = restored(state, initial),
                    DWARF_RA | DWARF_RSP => return None,
                    _ => {}
                }
                continue;
            }
            _ => match operand {
                0x00 => continue,
                0x02 => cursor.u8()?.into(),
                0x03 => cursor.u16()?.into(),
                0x04 => cursor.u32()?.into(),
                0x0a => {
                    *remembered.get_mut(depth)? = state;
                    depth += 1;
                    continue;
                }
                0x0b => {
                    depth = depth.checked_sub(1)?;
                    state = remembered[depth];
                    continue;
                }
                0x0c => {
                    state = based(state, cursor.uleb128()?)?;
                    state = moved(state, cursor.uleb128()?)?;
                    continue;
                }
                0x0d => {
                    state = based(state, cursor.uleb128()?)?;
                    continue;
                }
                0x0e => {
                    state = moved(state, cursor.uleb128()?)?;
                    continue;
                }
                // GNU_args_size: how far the caller of a landing pad pops.
                0x2e => {
                    cursor.uleb128()?;
                    continue;
                }
                _ => return None,
            },
        };
        if advance > 0 {
            visit(offset, state);
            offset += advance;
        }
    }
    visit(offset, state);
    Some(())
}

/// Fields of a plain record; see [`windlass_schema::record`].
const RULES: u64 = 0xf0;
const KIND: u64 = 0x0f;
const SAVED_AT: u64 = 0xffff << 16;

/// With rbp saved at the CFA plus `f`.
fn saved(state: Record, f: i16) -> Record {
    let rule = u64::from(frame_pointer::AT_CFA) << 4;
    Record(state.0 & !(RULES | SAVED_AT) | rule | u64::from(f as u16) << 16)
}

/// With what `initial` says of rbp.
fn restored(state: Record, initial: Record) -> Record {
    let fields = RULES | SAVED_AT;
    Record(state.0 & !fields | initial.0 & fields)
}

/// With the CFA counted from this register.
fn based(state: Record, register: u64) -> Option<Record> {
    let kind = match u8::try_from(register) {
        Ok(DWARF_RSP) => kind::SP,
        Ok(DWARF_RBP) => kind::FP,
        _ => return None,
    };
    Some(Record(state.0 & !KIND | u64::from(kind)))
}

/// With the CFA at this offset from its register.
fn moved(state: Record, offset: u64) -> Option<Record> {
    let offset = i32::try_from(offset as i64).ok()?;
    Some(Record(state.0 & 0xffff_ffff | u64::from(offset as u32) << 32))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::elf::SectionKind;
    use crate::entries::Pointers;
    use crate::instructions::{self, run_initial};
    use crate::projection::record;

    /// The CIE that compilers write, with these instructions behind its bytes.
    fn cie(data: &[u8]) -> Cie<'_> {
        let mut cie = Cie {
            data,
            kind: SectionKind::EhFrame,
            architecture: Architecture::X86_64,
            code_alignment: 1,
            data_alignment: -8,
            return_address: DWARF_RA.into(),
            is_signal_frame: false,
            names_frame_pointer: true,
            pointers: Pointers { section: 0, text: None, data: None },
            initial: None,
            plain: None,
            pointer_encoding: 0,
            has_augmentation_data: false,
        };
        // DW_CFA_def_cfa rsp, 8; DW_CFA_offset rip, cfa - 8
        cie.initial = run_initial(&cie, &[0x0c, 7, 8, 0x90, 1]);
        cie.plain = cie.initial.and_then(|row| initial(&cie, record(&cie, &row)));
        cie
    }

    /// One instruction, mostly of those that compilers write, and sometimes what is none.
    fn instruction() -> impl Strategy<Value = Vec<u8>> {
        let register = prop_oneof![4 => 0u8..17, 2 => Just(6u8), 2 => Just(7u8), 1 => any::<u8>()];
        let number = prop_oneof![6 => (0u8..0x80).prop_map(|low| vec![low]), 1 => prop::collection::vec(any::<u8>(), 1..6)];
        let operands = (register, number);
        prop_oneof![
            6 => (0x40u8..0x80).prop_map(|advance| vec![advance]),
            4 => operands.clone().prop_map(|(register, at)| [vec![0x80 | register & 0x3f], at].concat()),
            2 => (0xc0u8..0xd2).prop_map(|restore| vec![restore]),
            4 => operands.clone().prop_map(|(_, offset)| [vec![0x0e], offset].concat()),
            3 => operands.clone().prop_map(|(register, offset)| [vec![0x0c, register], offset].concat()),
            2 => operands.prop_map(|(register, _)| vec![0x0d, register]),
            2 => prop::sample::select(vec![0x00u8, 0x0a, 0x0b]).prop_map(|plain| vec![plain]),
            1 => any::<u8>().prop_map(|delta| vec![0x02, delta]),
            1 => any::<[u8; 2]>().prop_map(|delta| [&[0x03][..], &delta].concat()),
            1 => any::<[u8; 4]>().prop_map(|delta| [&[0x04][..], &delta].concat()),
            1 => any::<u8>().prop_map(|size| vec![0x2e, size & 0x7f]),
            1 => any::<u8>().prop_map(|any| vec![any]),
        ]
    }

    proptest! {
        /// What is run here has the rows that the whole interpreter finds.
        #[test]
        fn rows_are_those_of_the_interpreter(instructions in prop::collection::vec(instruction(), 0..24)) {
            let bytes = instructions.concat();
            let cie = cie(&bytes);
            let initial = cie.plain.expect("the CIE is a plain one");
            let mut rows = Vec::new();
            if run(&bytes, initial, |offset, record| rows.push((offset, record))).is_some() {
                let mut expected = Vec::new();
                let visit = |offset, row: &_, _| expected.push((offset, record(&cie, row)));
                let ran = instructions::run(&cie, (0, bytes.len() as u32), 0, &mut Vec::new(), visit);
                prop_assert_eq!((ran.malformed_from, ran.is_placed), (None, false));
                prop_assert_eq!(rows, expected);
            }
        }
    }

    #[test]
    fn prologues_and_epilogues_are_run() {
        let record =
            |kind, rule, f, words: i32| Record::plain(kind, rule, return_address::AT_CFA, 0, f, 8 * words);
        // push rbp; mov rbp, rsp; push rbx; leave; ret; a second way out.
        let bytes = [
            0x41, 0x0e, 16, 0x86, 2, 0x43, 0x0d, 6, 0x44, 0x83, 3, 0x0a, 0x50, 0xc6, 0x0c, 7, 8, 0x41, 0x0b,
            0, 0,
        ];
        let cie = cie(&bytes);
        let mut rows = Vec::new();
        run(&bytes, cie.plain.unwrap(), |offset, record| rows.push((offset, record))).unwrap();
        let (plain, saved) = (record(kind::SP, 0, 0, 1), record(kind::SP, 1, -16, 2));
        let framed = record(kind::FP, 1, -16, 2);
        assert_eq!(rows, [(0, plain), (1, saved), (4, framed), (8, framed), (24, plain), (25, framed)]);
    }

    #[test]
    fn what_could_mean_more_is_left_to_the_interpreter() {
        // Another CFA register, expressions, saves of rip or rsp, a deep nest, offsets that no record has.
        for bytes in [
            &[0x0c, 10, 0][..],
            &[0x0f, 1, 0x97],
            &[0x90, 1],
            &[0x87, 1],
            &[0x0a; MAX_REMEMBERED + 1],
            &[0x0b],
            &[0x86, 0x81, 0x20],
            &[0x0e, 0x80, 0x80, 0x80, 0x80, 0x10],
            &[0x0e],
        ] {
            assert_eq!(run(bytes, cie(bytes).plain.unwrap(), |_, _| {}), None, "{bytes:x?}");
        }
    }
}
