//! Which records a table has, and roughly how often it uses each.
//!
//! A compiler's output uses much the same records everywhere, so most of those of a table are among the ones that
//! [`prior`](super::prior) lists, and cost a yes or no. The others come in an order in which neighbours are alike.

use crate::record::Record;

use super::coder::Coder;
use super::prior::Prior;
use super::symbols::{Flags, Symbols, hash};

/// Records of a table, and how many of its entries have each.
pub(super) struct Used {
    pub(super) record: Record,
    pub(super) entries: u32,
}

/// Codes the `count` records of a table. Gives them by how often they are used, the most used ones first: what the
/// entries call a record by. A decoder is given none in `used`, an encoder all, in any order.
pub(super) fn code_dictionary<C: Coder>(coder: &mut C, used: &[Used], count: usize) -> Vec<Record> {
    let mut used: Vec<(Fields, u32)> = used.iter().map(|used| (fields(used.record), used.entries)).collect();
    used.sort_unstable();
    let mut found = Vec::with_capacity(count);
    let mut model = DictionaryModel::new(count);
    for (record, spread) in &Prior::get().records {
        if found.len() == count {
            break;
        }
        let at = used.binary_search_by_key(&fields(*record), |(fields, _)| *fields);
        if model.is_used.code(coder, (*spread).into(), at.is_ok()) {
            let entries = at.map_or(0, |at| used.remove(at).1);
            found.push((model.code_class(coder, entries), *record));
        }
    }
    for at in 0..count - found.len() {
        let (fields, entries) = used.get(at).copied().unwrap_or_default();
        let record = model.code_fields(coder, fields);
        found.push((model.code_class(coder, entries), record));
    }
    // The sort keeps the order of those that are alike.
    found.sort_by_key(|(class, _)| core::cmp::Reverse(*class));
    found.into_iter().map(|(_, record)| record).collect()
}

/// What is learned while a dictionary is coded.
pub(super) struct DictionaryModel {
    is_used: Flags,
    bytes: Symbols<3>,
    classes: Symbols<1>,
    last: Fields,
}

impl DictionaryModel {
    pub(super) fn new(count: usize) -> Self {
        Self {
            is_used: Flags::with(16, |spread| Prior::probability(spread as u32, count)),
            bytes: Symbols::new([7, 10, 12]),
            classes: Symbols::new([5]),
            last: Fields::default(),
        }
    }

    /// Codes about how many entries have a record: the logarithm, rounded down.
    fn code_class<C: Coder>(&mut self, coder: &mut C, entries: u32) -> usize {
        let class = entries.checked_ilog2().unwrap_or(0).min(15);
        self.classes.code(coder, [0], 0, class as usize)
    }

    /// Codes a record that is not before the last one.
    pub(super) fn code_fields<C: Coder>(&mut self, coder: &mut C, wanted: Fields) -> Record {
        let mut coded = Fields::default();
        let mut is_same = true;
        for at in 0..coded.len() {
            let (place, kind) = (at as u64, u64::from(coded[0]));
            let previous = if at == 0 { 0 } else { coded[at - 1] };
            let last = u64::from(self.last[at]) << 1 | u64::from(is_same);
            let contexts = [
                hash([1, place, kind]),
                hash([2, place, kind, previous.into()]),
                hash([3, place, kind, last]),
            ];
            let upper = self.bytes.code(coder, contexts, 0, (wanted[at] >> 4).into());
            let lower = self.bytes.code(coder, contexts, upper as u64 + 1, (wanted[at] & 15).into());
            coded[at] = (upper << 4 | lower) as u8;
            is_same &= coded[at] == self.last[at];
        }
        self.last = coded;
        record(coded)
    }
}

/// The bytes of a record, in an order in which what distinguishes most comes first and numbers are big-endian.
pub(super) type Fields = [u8; 8];

/// For the place in [`Fields`], that in a plain record and in a run.
const PLAIN: [usize; 8] = [0, 1, 3, 2, 7, 6, 5, 4];
const RUN: [usize; 8] = [0, 7, 6, 1, 4, 5, 3, 2];

fn order(kind_byte: u8) -> &'static [usize; 8] {
    if Record(kind_byte.into()).is_run() { &RUN } else { &PLAIN }
}

pub(super) fn fields(record: Record) -> Fields {
    let bytes = record.0.to_le_bytes();
    order(bytes[0]).map(|at| bytes[at])
}

fn record(fields: Fields) -> Record {
    let mut bytes = [0; 8];
    for (at, byte) in order(fields[0]).iter().zip(fields) {
        bytes[*at] = byte;
    }
    Record(u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_record_comes_back_from_its_fields(bits: u64) {
            prop_assert_eq!(record(fields(Record(bits))), Record(bits));
        }
    }
}
