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
//! 4       u8       version of the wire form, 1
//! 5       u8       version of the table
//! 6       u8       architecture, as in the table
//! 7       u8       N: length of the build-ID
//! 8       u64      checksum of the table: its bytes 8 to 15
//! 16      [u8; N]  build-ID
//!         ...      head, and section 0 behind it without a seam
//!         ...      section 1 and so on
//! ```
//! The head holds numbers: a length of six bits, then as many bits. In this order:
//! 1. the table's base, divided by 65536; the rows that it states; its records; its entries
//! 2. bytes of each section but the first, and the offset of the entry before it. There are as few sections as have
//!    no more than [`SECTION_ENTRIES`] entries when all have the same number, rounded up, and the last the rest. Each is coded
//!    on its own, so that they can be decoded at once
//! 3. the records
//!
//! The table's directory begins with the page of the first entry and ends with that of the last. In it lie, without a gap,
//! the pages that have entries, each written as [`page_writer`](crate::page_writer) says, and records are numbered as
//! [`table_writer`](crate::table_writer) says.
//!
//! # Coding
//! Modules `coder` (choices by their probability), `mixing` (their probabilities), `symbols` (these by context),
//! `dictionary` and `entries` (records and entries as choices), `prior` (records that are expected) are the
//! specification. Encoder and decoder run the same code, over integers but for one product of IEEE doubles in `prior`, which is
//! the same everywhere. `fixtures/unwind/sample.wluw` is a form that has to stay readable.

mod coder;
mod dictionary;
mod entries;
mod mixing;
mod prior;
mod symbols;

pub use prior::encode_prior;

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::build_id::MAX_BUILD_ID_BYTES;
use crate::page::{BLOCK_SHIFT, MAX_BLOCK_ENTRIES};
use crate::record::Record;
use crate::table::{MAX_PAGES, MAX_RECORDS, Table, TableError, VERSION};
use crate::table_writer::{TableEntry, TableHeader, number_records, write_table};
use crate::{Architecture, BuildId, ImageAddress};

use coder::{Coder, Decoder, Encoder};
use dictionary::{Used, code_dictionary};
use entries::{Entry, EntryModel, Known};

/// Version of the wire form.
///
/// | version | change |
/// |---|---|
/// | 1 | first |
pub const WIRE_VERSION: u8 = 1;
/// First bytes of a wire form.
pub const WIRE_MAGIC: [u8; 4] = *b"WLUW";
/// Bytes in front of the build-ID.
const HEADER_BYTES: usize = 16;
/// Most entries of a section: enough to learn from, and few enough that the tables which take longest are decoded by
/// several cores at once.
pub const SECTION_ENTRIES: u32 = 160_000;
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
    Version(u8, u8),
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
    /// No table to pack.
    #[error(transparent)]
    Table(#[from] TableError),
    /// A table that was not written as tables are.
    #[error("the unwind table's pages are not as the writer of this version makes them")]
    NotCanonical,
}

/// What the head says.
struct Head {
    base: ImageAddress,
    rows: u32,
    records: usize,
    entries: u32,
    sections: Vec<Section>,
}

/// A section but the first.
#[derive(Clone, Copy, Default)]
struct Section {
    bytes: u32,
    /// Offset of the entry before it.
    from: u32,
}

/// The wire form of a table file.
pub fn pack(file: &[u8]) -> Result<Vec<u8>, WireError> {
    let table = Table::parse(file)?;
    let mut records: Vec<Record> = table.records().collect();
    let mut entries: Vec<TableEntry> = table.entries().collect();
    let header = TableHeader {
        architecture: table.architecture(),
        build_id: table.build_id(),
        base: table.base(),
        rows: table.row_count(),
    };
    if entries.len() > MAX_ENTRIES as usize {
        return Err(WireError::Header("entries"));
    }
    let used = uses(&records, &entries);
    let coded = code_dictionary(&mut Encoder::default(), &used, records.len());
    renumber(&records, &coded, &mut entries).ok_or(WireError::NotCanonical)?;
    let known = Known::new(&coded);
    let mut sections = Vec::new();
    let mut rest = Vec::new();
    let size = section_entries(entries.len() as u32) as usize;
    for (number, chunk) in entries.chunks(size).enumerate().skip(1) {
        let from = entries[number * size - 1].offset;
        let mut encoder = Encoder::default();
        code_entries(&mut encoder, &known, chunk, chunk.len() as u32, from)?;
        let bytes = encoder.finish();
        sections.push(Section { bytes: bytes.len() as u32, from });
        rest.extend(bytes);
    }
    let count = entries.len() as u32;
    let head =
        Head { base: header.base, rows: header.rows, records: records.len(), entries: count, sections };
    let mut encoder = Encoder::default();
    head.code(&mut encoder)?;
    code_dictionary(&mut encoder, &used, records.len());
    let first = &entries[..entries.len().min(size)];
    code_entries(&mut encoder, &known, first, first.len() as u32, 0)?;

    records = coded;
    number_records(&mut records, &mut entries);
    if write_table(&header, &records, &entries) != file {
        return Err(WireError::NotCanonical);
    }
    let mut bytes = WIRE_MAGIC.to_vec();
    bytes.extend([WIRE_VERSION, VERSION as u8, header.architecture as u8]);
    bytes.push(header.build_id.as_bytes().len() as u8);
    bytes.extend(&file[8..16]);
    bytes.extend(header.build_id.as_bytes());
    bytes.extend(encoder.finish());
    bytes.extend(rest);
    Ok(bytes)
}

/// Entries of each section but the last.
fn section_entries(entries: u32) -> u32 {
    entries.div_ceil(entries.div_ceil(SECTION_ENTRIES).max(1)).max(1)
}

/// The records and how often each is used.
fn uses(records: &[Record], entries: &[TableEntry]) -> Vec<Used> {
    let mut used: Vec<Used> = records.iter().map(|record| Used { record: *record, entries: 0 }).collect();
    for entry in entries {
        used[usize::from(entry.record)].entries += 1;
    }
    used
}

/// From numbers in `old` to those in `new`. `None` if a record is not in it.
fn renumber(old: &[Record], new: &[Record], entries: &mut [TableEntry]) -> Option<()> {
    let mut numbers: Vec<(Record, u16)> = new.iter().copied().zip(0..).collect();
    numbers.sort_unstable();
    let number = |record: &Record| {
        let at = numbers.binary_search_by_key(record, |(record, _)| *record).ok()?;
        Some(numbers[at].1)
    };
    let numbers: Vec<u16> = old.iter().map(number).collect::<Option<_>>()?;
    for entry in entries {
        entry.record = numbers[usize::from(entry.record)];
    }
    Some(())
}

/// The table file that was packed. It still has to be parsed.
pub fn unpack(bytes: &[u8]) -> Result<Vec<u8>, WireError> {
    let head = bytes.first_chunk::<HEADER_BYTES>().ok_or(WireError::Length(bytes.len()))?;
    let magic = [head[0], head[1], head[2], head[3]];
    if magic != WIRE_MAGIC {
        return Err(WireError::Magic(magic));
    }
    if (head[4], head[5]) != (WIRE_VERSION, VERSION as u8) {
        return Err(WireError::Version(head[4], head[5]));
    }
    let architecture = Architecture::of_code(head[6]).ok_or(WireError::Header("architecture"))?;
    let id_len = usize::from(head[7]);
    if id_len > MAX_BUILD_ID_BYTES {
        return Err(WireError::Header("build-ID length"));
    }
    let (build_id, coded) =
        bytes[HEADER_BYTES..].split_at_checked(id_len).ok_or(WireError::Length(bytes.len()))?;
    let build_id = BuildId::new(build_id).map_err(|_| WireError::Header("build-ID length"))?;
    let expected = u64::from_le_bytes(head[8..].try_into().expect("eight bytes are left"));

    let mut decoder = Decoder::new(coded);
    let head = Head { base: ImageAddress::new(0), rows: 0, records: 0, entries: 0, sections: Vec::new() };
    let head = head.code(&mut decoder)?;
    let section_bytes: u64 = head.sections.iter().map(|section| u64::from(section.bytes)).sum();
    let first_bytes = (coded.len() as u64).checked_sub(section_bytes).ok_or(WireError::Header("sections"))?;
    let (first, rest) = coded.split_at(first_bytes as usize);
    decoder.end_at(first.len());
    let mut records = code_dictionary(&mut decoder, &[], head.records);
    let mut entries = decode_sections(&head, &Known::new(&records), decoder, rest)?;
    number_records(&mut records, &mut entries);
    let header = TableHeader { architecture, build_id, base: head.base, rows: head.rows };
    if let Some(number) = crowded(&entries) {
        return Err(WireError::Entry(number));
    }
    let file = write_table(&header, &records, &entries);
    let found = u64::from_le_bytes(file[8..16].try_into().expect("a table has a header"));
    if found != expected {
        return Err(WireError::Checksum { found, expected });
    }
    Ok(file)
}

/// The first entry for which its block has no room.
fn crowded(entries: &[TableEntry]) -> Option<u32> {
    let block = |entry: &TableEntry| entry.offset >> BLOCK_SHIFT;
    let first = |from: usize| (from + MAX_BLOCK_ENTRIES < entries.len()).then(|| from + MAX_BLOCK_ENTRIES);
    let is_crowded = |at: &usize| block(&entries[*at]) == block(&entries[at - MAX_BLOCK_ENTRIES]);
    (0..entries.len()).map_while(first).find(is_crowded).map(|at| at as u32)
}

/// Decodes the sections; `first` is where the first begins, `rest` are the others.
fn decode_sections(
    head: &Head,
    known: &Known,
    first: Decoder<'_>,
    mut rest: &[u8],
) -> Result<Vec<TableEntry>, WireError> {
    let mut sections = vec![(first, 0)];
    for section in &head.sections {
        let bytes;
        (bytes, rest) = rest.split_at(section.bytes as usize);
        sections.push((Decoder::new(bytes), section.from));
    }
    let size = section_entries(head.entries);
    let decoded = in_parallel(sections.len(), |number| {
        let (mut decoder, from) = sections[number].clone();
        let before = number as u32 * size;
        let count = (head.entries - before).min(size);
        let entries = code_entries(&mut decoder, known, &[], count, from)?;
        if decoder.is_at_end() { Ok(entries) } else { Err(WireError::Entry(before + count)) }
    });
    let mut entries: Vec<TableEntry> = Vec::with_capacity(head.entries as usize);
    for (of_section, (_, from)) in decoded.into_iter().zip(sections) {
        if entries.last().map_or(0, |last| last.offset) != from {
            return Err(WireError::Header("sections"));
        }
        entries.extend(of_section?);
    }
    Ok(entries)
}

/// What `work` makes of each number below `count`, on as many threads as there are numbers and cores.
fn in_parallel<T: Send>(count: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let next = AtomicUsize::new(0);
    let do_some = || {
        let numbers = std::iter::repeat_with(|| next.fetch_add(1, Ordering::Relaxed));
        numbers.take_while(|number| *number < count).map(|number| (number, work(number))).collect::<Vec<_>>()
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(count);
    let mut done = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(do_some)).collect();
        let mut done = do_some();
        for other in others {
            match other.join() {
                Ok(more) => done.extend(more),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        done
    });
    done.sort_unstable_by_key(|(number, _)| *number);
    done.into_iter().map(|(_, made)| made).collect()
}

/// Codes entries; a decoder is given none, and how many there are.
fn code_entries<C: Coder>(
    coder: &mut C,
    known: &Known,
    entries: &[TableEntry],
    count: u32,
    from: u32,
) -> Result<Vec<TableEntry>, WireError> {
    let mut model = EntryModel::new(known, count, from);
    let mut coded = Vec::new();
    for number in 0..count {
        // The encoder wrote every byte that its choices need, so behind the end there is nothing more.
        if coder.is_past_end() {
            return Err(WireError::Entry(number));
        }
        let entry = entries
            .get(number as usize)
            .map_or(Entry::default(), |entry| Entry { offset: entry.offset, record: entry.record });
        let Entry { offset, record } = model.code(coder, entry).ok_or(WireError::Entry(number))?;
        coded.push(TableEntry { offset, record });
    }
    Ok(coded)
}

impl Head {
    /// Codes a head; a decoder is given an empty one.
    fn code<C: Coder>(&self, coder: &mut C) -> Result<Self, WireError> {
        let base = code_number(coder, self.base.get() >> 16);
        if base >> 48 != 0 {
            return Err(WireError::Header("base"));
        }
        let mut number = |value: u64, end: u64, field: &'static str| {
            let value = code_number(coder, value);
            if value < end { Ok(value as u32) } else { Err(WireError::Header(field)) }
        };
        let rows = number(self.rows.into(), 1 << 32, "rows")?;
        let records = number(self.records as u64, u64::from(MAX_RECORDS) + 1, "records")? as usize;
        let entries = number(self.entries.into(), u64::from(MAX_ENTRIES) + 1, "entries")?;
        if records == 0 && entries != 0 {
            return Err(WireError::Header("records"));
        }
        let mut sections = Vec::new();
        for at in 1..entries.div_ceil(section_entries(entries)).max(1) as usize {
            let section = self.sections.get(at - 1).copied().unwrap_or_default();
            let bytes = number(section.bytes.into(), 1 << 32, "sections")?;
            let from = number(section.from.into(), 1 << 32, "sections")?;
            sections.push(Section { bytes, from });
        }
        Ok(Self { base: ImageAddress::new(base << 16), rows, records, entries, sections })
    }
}

/// Codes a number: its length in six bits, and its bits.
fn code_number<C: Coder>(coder: &mut C, value: u64) -> u64 {
    let len = coder.bits(6, (64 - value.leading_zeros()).min(63)).min(63);
    let (upper, lower) = (len.saturating_sub(32), len.min(32));
    let upper = u64::from(coder.bits(upper, (value >> 32) as u32));
    upper << 32 | u64::from(coder.bits(lower, value as u32))
}

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
        let used: Vec<u16> =
            (0..records).filter(|number| entries.iter().any(|entry| entry.record == *number)).collect();
        for entry in &mut entries {
            entry.record = used.binary_search(&entry.record).expect("is used") as u16;
        }
        let mut dictionary = used.iter().map(|number| dictionary[usize::from(*number)]).collect();
        number_records(&mut dictionary, &mut entries);
        // The writer's base is that of the first page that has entries.
        write_table(&header, &dictionary, &entries)
    }

    #[track_caller]
    fn packed(file: &[u8]) -> Vec<u8> {
        let wire = pack(file).unwrap();
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
            wire.truncate(16 + 20);
            wire.extend(head);
            wire.extend(rest);
            let _ = unpack(&wire);
        }
    }

    #[test]
    fn an_empty_table_travels_too() {
        packed(&table(&[], 1));
    }

    #[test]
    fn sections_join() {
        let steps: Vec<_> =
            (0..SECTION_ENTRIES * 5 / 2).map(|at| (4 + at % 13 * (at % 7), (at % 31) as u16)).collect();
        packed(&table(&steps, 40));
    }

    #[test]
    fn what_repeats_costs_little() {
        let file = sample();
        let wire = packed(&file);
        assert!(wire.len() * 3 < file.len(), "{} of {} bytes", wire.len(), file.len());
    }

    /// What was packed has to be read by those to come.
    #[test]
    fn the_form_of_before_is_read_and_written() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/unwind/sample.wluw");
        let (table, packed) = (sample(), packed(&sample()));
        if std::env::var_os("WINDLASS_BLESS").is_some() {
            std::fs::write(path, &packed).unwrap();
        }
        let before = std::fs::read(path).unwrap();
        assert_eq!(unpack(&before), Ok(table), "not read any more: raise WIRE_VERSION");
        assert!(packed == before, "packed otherwise: if the coding has changed, raise WIRE_VERSION");
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
