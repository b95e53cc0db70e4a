//! Where Go code begins, if its table does not say: from `runtime.firstmoduledata`.
//!
//! # Why this shape
//! From Go 1.26 on the table no longer holds the address of `runtime.text`, and in position-independent executables
//! a relocation fills it in. `.text` may begin earlier, with code of C, and symbols may be stripped. The runtime's own
//! description of the module is always there: it begins with the address of the table, and the bounds of
//! code in it must agree with the table's. Words of data and addends of relocations look the same from here.

use super::table::bounds;

/// Offsets of fields in `moduledata` (runtime/symtab.go), Go 1.18 to 1.27: behind `pcHeader` come six slices and
/// `findfunctab`.
const MIN_PC: u64 = 160;
const MAX_PC: u64 = 168;
const TEXT: u64 = 176;

/// Most words that are taken for the first of `moduledata`: each is a pointer to the table.
const MAX_CANDIDATES: usize = 16;

/// The address of `runtime.text`. `table` is at image address `address`; `words` gives each aligned word of writable
/// data, by address, and each `R_X86_64_RELATIVE` relocation with its addend for a word. Gone through twice.
pub(crate) fn text_start(
    table: &[u8],
    address: u64,
    words: impl Iterator<Item = (u64, u64)> + Clone,
) -> Option<u64> {
    let (first, end) = bounds(table)?;
    let mut candidates: Vec<Candidate> = Vec::new();
    for (at, value) in words.clone() {
        if value == address && candidates.len() < MAX_CANDIDATES {
            candidates.push(Candidate { at, fields: [None; 3] });
        }
    }
    for (at, value) in words {
        for candidate in &mut candidates {
            let offset = at.wrapping_sub(candidate.at);
            for (field, place) in candidate.fields.iter_mut().zip([MIN_PC, MAX_PC, TEXT]) {
                // A word that is relocated may be 0 in the file, whichever comes first.
                if offset == place && value != 0 {
                    *field = Some(value);
                }
            }
        }
    }
    candidates.iter().find_map(|candidate| {
        let [Some(min), Some(max), Some(text)] = candidate.fields else { return None };
        (text.checked_add(first) == Some(min) && text.checked_add(end) == Some(max)).then_some(text)
    })
}

struct Candidate {
    at: u64,
    /// `minpc`, `maxpc`, `text`.
    fields: [Option<u64>; 3],
}

#[cfg(test)]
mod tests {
    use super::super::tests::{V120, table};
    use super::*;

    #[test]
    fn text_comes_from_the_one_description_that_agrees() {
        let table = table(V120, &[("main.main", 0, 0x10, &[0x02, 0x10, 0x00])]);
        let words = [
            (0x900, 0x5000),
            (0x900 + MIN_PC, 0x7000),
            (0x900 + MAX_PC, 0x7010),
            (0x900 + TEXT, 0x6000),
            (0x2000, 0x5000),
            (0x2000 + TEXT, 0),
            (0x2000 + MIN_PC, 0x4000),
            (0x2000 + MAX_PC, 0x4010),
            (0x2000 + TEXT, 0x4000),
        ];
        assert_eq!(text_start(&table, 0x5000, words.into_iter()), Some(0x4000));
        assert_eq!(text_start(&table, 0x5000, words[..4].iter().copied()), None);
        assert_eq!(text_start(&table, 0x5008, words.into_iter()), None);
    }
}
