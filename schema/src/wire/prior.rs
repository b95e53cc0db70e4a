//! The records that compilers' output has everywhere.
//!
//! A small table is mostly its dictionary, and that mostly of the same few thousand records: states of the
//! platform's ABI, and what gcc, clang and rustc do on the way there. So they are listed once, in `prior.bin`, as a trained
//! dictionary of zstd would be. The list was made from the tables of a Debian 12 machine by the
//! example `prior` of `windlass-unwind-compiler`; made from half of them, it serves the other half as well.
//! A table with other records merely takes more bytes. Changing the list changes the wire form.

use std::sync::LazyLock;

use crate::record::Record;

use super::coder::{Coder, Decoder, Encoder};
use super::dictionary::{DictionaryModel, fields};

/// Tables that the list was made from.
const TABLES: f64 = 1500.0;
/// Records that such a table has on average.
const MEAN_RECORDS: f64 = 200.0;
/// Bits that count the records of a spread.
const COUNT_BITS: u32 = 16;
/// Spreads: how many tables a record was found in, as the logarithm, rounded down.
const SPREADS: usize = 16;

/// The list, those found in most tables first.
pub(super) struct Prior {
    pub(super) records: Vec<(Record, u8)>,
}

static PRIOR: LazyLock<Prior> = LazyLock::new(|| Prior { records: decode(include_bytes!("prior.bin")) });

impl Prior {
    pub(super) fn get() -> &'static Self {
        &PRIOR
    }

    /// How probable it is that a table of `count` records has one of this spread: a first guess, in 1/65536.
    pub(super) fn probability(spread: u32, count: usize) -> u32 {
        let share = 1.4 * f64::from(1u32 << spread) / TABLES * count as f64 / MEAN_RECORDS;
        (share.clamp(0.002, 0.5) * 65536.0) as u32
    }
}

fn decode(bytes: &[u8]) -> Vec<(Record, u8)> {
    let mut decoder = Decoder::new(bytes);
    let mut model = DictionaryModel::new(1);
    let mut records = Vec::new();
    for spread in (0..SPREADS as u8).rev() {
        for _ in 0..decoder.bits(COUNT_BITS, 0) {
            records.push((model.code_fields(&mut decoder, Default::default()), spread));
        }
    }
    records
}

/// The bytes of `prior.bin` for a list of records and of the number of tables each was found in.
pub fn encode_prior(found: &[(Record, u32)]) -> Vec<u8> {
    let mut encoder = Encoder::default();
    let mut model = DictionaryModel::new(1);
    for spread in (0..SPREADS as u32).rev() {
        let of_spread = found.iter().filter(|(_, tables)| tables.ilog2().min(SPREADS as u32 - 1) == spread);
        let mut of_spread: Vec<_> = of_spread.map(|(record, _)| fields(*record)).collect();
        of_spread.sort_unstable();
        encoder.bits(COUNT_BITS, of_spread.len() as u32);
        for fields in of_spread {
            model.code_fields(&mut encoder, fields);
        }
    }
    encoder.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A change of the coding changes what `prior.bin` says: then it is to be made anew.
    #[test]
    fn the_list_is_what_was_encoded() {
        let records = &Prior::get().records;
        let found: Vec<(Record, u32)> =
            records.iter().map(|(record, spread)| (*record, 1 << spread)).collect();
        assert_eq!(encode_prior(&found), include_bytes!("prior.bin"));
        let mut distinct: Vec<Record> = records.iter().map(|(record, _)| *record).collect();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), records.len());
        assert!(records.len() > 1000, "{} records", records.len());
    }
}
