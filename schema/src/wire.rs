//! The wire form: how a table travels.
//!
//! # Why this shape
//! zstd finds what repeats byte for byte, and takes 14% of `.eh_frame` for the tables of a distribution. What
//! entries repeat is other: a record follows from the function's first and from the state before,
//! a gap from the two records around it, and behind a function's end the next begins at a multiple of
//! 16. So entries are coded one by one by how probable each is given those before it, as the
//! best general compressors do with bytes, at a few bits an entry. Pages and index are made again from the
//! entries, so that what arrives is the table, byte for byte.
//!
//! # File
//! Little-endian.
//! ```text
//! offset  size     field
//! 0       [u8; 4]  magic "WLUW"
//! 4       u16      version of the wire form, 1
//! 6       u16      version of the table
//! 8       u8       architecture, as in the table
//! 9       u8       length of the build-ID
//! 10      u16      R: number of records in the dictionary
//! 12      u32      E: number of entries
//! 16      u32      rows that the table states
//! 20      u32      bytes of the coded records and entries
//! 24      u64      base of the table
//! 32      u64      checksum of the table: its bytes 8 to 15
//! 40      [u8; N]  build-ID
//!         ...      R records, then E entries, arithmetically coded (see below), to the end
//! ```
//! The table's directory begins with the page of the first entry and ends with that of the last. In it lie, without a gap,
//! the pages that have entries, each written as [`page_writer`](crate::page_writer) says.
//!
//! # Coding
//! Modules `coder` (bits by their probability), `mixing` (probabilities of a bit), `symbols` (symbols of
//! several bits) and `model` (records and entries as symbols) are the specification: all of it is integer
//! arithmetic, and encoder and decoder run the same code. In short, an entry is, in this order:
//! 1. one flag if the last three entries have been followed by something before: the same again;
//! 2. else its record: a flag if it is the one that last followed the two records before it; else its number, in
//!    four-bit steps, in the contexts of the function's first record, the record before and the state behind that;
//! 3. and its gap to the entry before: behind an end, a flag if it begins at the next multiple of 16; elsewhere, a
//!    flag if it is the gap that last lay between these two records; else the number.

mod coder;
mod mixing;
mod model;
mod symbols;

use crate::build_id::MAX_BUILD_ID_BYTES;
use crate::page::{BLOCK_SHIFT, MAX_BLOCK_ENTRIES};
use crate::record::Record;
use crate::table::{MAX_PAGES, MAX_RECORDS, Table, VERSION};
use crate::table_writer::{TableEntry, TableHeader, write_table};
use crate::{Architecture, BuildId, ImageAddress};

use coder::{Decoder, Encoder};
use model::{Entry, EntryModel, RecordModel};

/// Version of the wire form.
///
/// | version | change |
/// |---|---|
/// | 1 | first |
pub const WIRE_VERSION: u16 = 1;
/// First bytes of a wire form.
pub const WIRE_MAGIC: [u8; 4] = *b"WLUW";
/// Bytes in front of the build-ID.
const HEADER_BYTES: usize = 40;
/// Most entries of a table that is unpacked: 64 MiB of pages, all that an agent has room for. The largest seen
/// (libtensorflow_cc, 30 MB of `.eh_frame`) has 2 million.
pub const MAX_ENTRIES: u32 = 1 << 25;

/// Why bytes are no wire form, or a table has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Shorter than a header.
    #[error("wire form of {0} bytes, its header alone has {HEADER_BYTES}")]
    Length(usize),
    /// Other first bytes.
    #[error("not the wire form of an unwind table: magic {0:02x?}")]
    Magic([u8; 4]),
    /// A version of the wire form or of the table that this reader does not know.
    #[error("wire form version {0} of unwind table version {1}, expected {WIRE_VERSION} of {VERSION}")]
    Version(u16, u16),
    /// A header field out of its range.
    #[error("wire form header field {0} is out of range")]
    Header(&'static str),
    /// Entry that cannot be.
    #[error("entry {0} of the wire form is out of order or has no record: it was damaged on the way")]
    Entry(u32),
    /// What came out is not what went in.
    #[error(
        "unpacked unwind table has checksum {found:016x}, expected {expected:016x}: it was damaged on the way"
    )]
    Checksum {
        /// Of the table made.
        found: u64,
        /// In the header.
        expected: u64,
    },
    /// A table that was not written as tables are.
    #[error("the unwind table's pages are not as the writer of this version makes them")]
    NotCanonical,
}

/// The wire form of a table. `file` are the bytes that `table` was parsed from.
pub fn pack(table: &Table<'_>, file: &[u8]) -> Result<Vec<u8>, WireError> {
    let records: Vec<Record> = table.records().collect();
    let entries: Vec<TableEntry> = table.entries().collect();
    let header = TableHeader {
        architecture: table.architecture(),
        build_id: table.build_id(),
        base: table.base(),
        rows: table.row_count(),
    };
    if write_table(&header, &records, &entries) != file {
        return Err(WireError::NotCanonical);
    }
    let count = u32::try_from(entries.len()).ok().filter(|count| *count <= MAX_ENTRIES);
    let count = count.ok_or(WireError::Header("entries"))?;
    let mut bytes = WIRE_MAGIC.to_vec();
    bytes.extend(WIRE_VERSION.to_le_bytes());
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend([header.architecture as u8, header.build_id.as_bytes().len() as u8]);
    bytes.extend((records.len() as u16).to_le_bytes());
    for field in [count, header.rows, 0] {
        bytes.extend(field.to_le_bytes());
    }
    bytes.extend(header.base.get().to_le_bytes());
    bytes.extend(&file[8..16]);
    bytes.extend(header.build_id.as_bytes());
    let coded_from = bytes.len();
    let mut encoder = Encoder::new(bytes);
    let mut model = RecordModel::new();
    for record in &records {
        model.code(&mut encoder, *record);
    }
    let mut model = EntryModel::new(&records, count);
    for entry in &entries {
        model.code(&mut encoder, Entry { offset: entry.offset, record: entry.record });
    }
    let mut bytes = encoder.finish();
    // Trailing zeros are not written, be they the build-ID's.
    bytes.resize(bytes.len().max(coded_from), 0);
    let coded = (bytes.len() - coded_from) as u32;
    bytes[20..24].copy_from_slice(&coded.to_le_bytes());
    Ok(bytes)
}

/// The table file that was packed. It still has to be parsed.
pub fn unpack(bytes: &[u8]) -> Result<Vec<u8>, WireError> {
    let head = bytes.get(..HEADER_BYTES).ok_or(WireError::Length(bytes.len()))?;
    let half = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
    let word = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
    let double = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
    let magic = [head[0], head[1], head[2], head[3]];
    if magic != WIRE_MAGIC {
        return Err(WireError::Magic(magic));
    }
    if (half(4), half(6)) != (WIRE_VERSION, VERSION) {
        return Err(WireError::Version(half(4), half(6)));
    }
    let architecture = Architecture::of_code(head[8]).ok_or(WireError::Header("architecture"))?;
    let (records, entries) = (u32::from(half(10)), word(12));
    for (wrong, field) in [
        (usize::from(head[9]) > MAX_BUILD_ID_BYTES, "build-ID length"),
        (records > MAX_RECORDS || records == 0 && entries != 0, "records"),
        (entries > MAX_ENTRIES, "entries"),
        (bytes.len() as u64 != HEADER_BYTES as u64 + u64::from(head[9]) + u64::from(word(20)), "length"),
    ] {
        if wrong {
            return Err(WireError::Header(field));
        }
    }
    let rest = &bytes[HEADER_BYTES..];
    let build_id = rest.get(..head[9].into()).ok_or(WireError::Length(bytes.len()))?;
    let build_id = BuildId::new(build_id).map_err(|_| WireError::Header("build-ID length"))?;
    let mut decoder = Decoder::new(&rest[head[9].into()..]);
    let mut model = RecordModel::new();
    let records: Vec<Record> = (0..records).map(|_| model.code(&mut decoder, Record(0))).collect();
    let mut model = EntryModel::new(&records, entries);
    let mut decoded = Vec::new();
    let (mut block, mut in_block) = (0, 0);
    for number in 0..entries {
        // The encoder wrote every byte that its bits need, so far behind the end there is nothing more.
        let entry = Some(&decoder).filter(|decoder| decoder.missing <= MAX_MISSING);
        entry.ok_or(WireError::Entry(number))?;
        let entry = model.code(&mut decoder, Entry::default()).ok_or(WireError::Entry(number))?;
        in_block = if entry.offset >> BLOCK_SHIFT == block { in_block + 1 } else { 1 };
        block = entry.offset >> BLOCK_SHIFT;
        if in_block > MAX_BLOCK_ENTRIES {
            return Err(WireError::Entry(number));
        }
        decoded.push(TableEntry { offset: entry.offset, record: entry.record });
    }
    let header = TableHeader { architecture, build_id, base: ImageAddress::new(double(24)), rows: word(16) };
    let file = write_table(&header, &records, &decoded);
    let found = u64::from_le_bytes(file[8..16].try_into().expect("a table has a header"));
    if found != double(32) {
        return Err(WireError::Checksum { found, expected: double(32) });
    }
    Ok(file)
}

/// Zeros behind the end that a decoder may have to read: four that the encoder need not write, and its own
/// lead of four; and trailing zeros that are left out.
const MAX_MISSING: usize = 4096;

const _: () = assert!(MAX_RECORDS <= u16::MAX as u32 && MAX_PAGES as u64 * 65536 <= 1 << 32);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::record::kind;

    fn rsp(words: i32) -> Record {
        Record::plain(kind::SP, 0, 0, 0, 0, 8 * words)
    }

    /// A table of entries at these distances, with these records.
    fn table(steps: &[(u32, u16)], records: u16) -> Vec<u8> {
        let mut dictionary = vec![Record::NO_CFI];
        dictionary.extend((1..i32::from(records)).map(rsp));
        let mut offset = 0;
        let mut entries = Vec::new();
        for (step, record) in steps {
            offset += step;
            entries.push(TableEntry { offset, record: record % records });
        }
        let header = TableHeader {
            architecture: Architecture::X86_64,
            build_id: BuildId::new(&[7; 20]).unwrap(),
            base: ImageAddress::new(0x40_0000),
            rows: 5,
        };
        // The writer's base is that of the first page that has entries.
        write_table(&header, &dictionary, &entries)
    }

    #[track_caller]
    fn packed(file: &[u8]) -> Vec<u8> {
        let wire = pack(&Table::parse(file).unwrap(), file).unwrap();
        assert!(unpack(&wire).as_deref() == Ok(file));
        wire
    }

    /// Two hundred functions of three entries.
    fn sample() -> Vec<u8> {
        let steps: Vec<_> =
            (0..200).flat_map(|at| [(16 + at % 7, 1), (4, 2 + (at % 5) as u16), (30 + at % 11, 0)]).collect();
        table(&steps, 8)
    }

    proptest! {
        #[test]
        fn unpacking_inverts_packing(
            steps in prop::collection::vec((prop_oneof![8 => 2u32..40, 1 => 2u32..0x3_0000], any::<u16>()), 0..600),
            records in 1u16..40,
        ) {
            packed(&table(&steps, records));
        }

        #[test]
        fn any_bytes_are_a_table_or_an_error(head in prop::collection::vec(any::<u8>(), 12..40), rest in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut wire = packed(&sample());
            wire.truncate(40 + 20);
            wire[8..8 + head.len().min(32)].copy_from_slice(&head[..head.len().min(32)]);
            // Few enough to be quick.
            wire[14..16].fill(0);
            wire.extend(rest);
            let _ = unpack(&wire);
        }
    }

    #[test]
    fn an_empty_table_travels_too() {
        packed(&table(&[], 1));
    }

    #[test]
    fn what_repeats_costs_little() {
        let file = sample();
        let wire = packed(&file);
        assert!(wire.len() * 3 < file.len(), "{} of {} bytes", wire.len(), file.len());
    }

    #[test]
    fn truncation_and_damage_are_errors() {
        let wire = packed(&sample());
        for len in 0..wire.len() {
            assert!(unpack(&wire[..len]).is_err(), "{len} bytes");
        }
        for at in 0..wire.len() {
            for bit in [0, 3, 7] {
                let mut damaged = wire.clone();
                damaged[at] ^= 1 << bit;
                assert!(unpack(&damaged).is_err(), "byte {at} bit {bit}");
            }
        }
        let mut longer = wire.clone();
        longer.push(1);
        assert!(unpack(&longer).is_err());
    }
}
