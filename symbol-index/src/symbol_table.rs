//! Symbols as bytes: a sorted table of disjoint ranges of code, and their names.
//!
//! Entries of one size make the lookup one binary search in place; a name is demangled when the table
//! is built, and each distinct string is stored once. All integers are little-endian.
//!
//! ```text
//! entry, 24 bytes; ascending by start, ranges disjoint
//! offset  size  field
//! 0       u64   start: image address
//! 8       u32   size of the range in bytes
//! 12      u32   offset of the name in the strings
//! 16      u32   offset of the linkage name in the strings, 0xffff_ffff if it is the name
//! 20      u32   where the name comes from: 0 .symtab, 1 .dynsym, 2 kallsyms, 3 perf map
//!
//! string: u32 length in bytes, then as many bytes of UTF-8
//! ```
//!
//! Lookup of address `x`: the last entry with `start <= x`, if `x - start < size`.

use std::collections::HashMap;

use windlass_schema::http::Provenance;

use crate::name;
use crate::symbol::Segment;

/// Size of an entry in bytes.
pub(crate) const ENTRY_BYTES: usize = 24;
/// A linkage name that is the name.
const NO_STRING: u32 = u32::MAX;
/// Where names come from, by number.
const PROVENANCES: [Provenance; 4] =
    [Provenance::Symtab, Provenance::Dynsym, Provenance::Kallsyms, Provenance::PerfMap];

/// Names take more bytes than an offset can express.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooManyNames;

/// The bytes of a table under construction.
#[derive(Default)]
pub(crate) struct Encoded {
    pub(crate) entries: Vec<u8>,
    pub(crate) strings: Vec<u8>,
}

/// Lays out `segments`.
pub(crate) fn encode(segments: &[Segment<'_>]) -> Result<Encoded, TooManyNames> {
    let mut encoded = Encoded::default();
    let mut offsets: HashMap<String, u32> = HashMap::new();
    let mut offset_of = |text: String| -> Result<u32, TooManyNames> {
        if let Some(&offset) = offsets.get(&text) {
            return Ok(offset);
        }
        let offset = u32::try_from(encoded.strings.len()).map_err(|_| TooManyNames)?;
        let length = u32::try_from(text.len()).map_err(|_| TooManyNames)?;
        encoded.strings.extend_from_slice(&length.to_le_bytes());
        encoded.strings.extend_from_slice(text.as_bytes());
        offsets.insert(text, offset);
        Ok(offset)
    };
    for segment in segments {
        let (name, linkage_name) = match name::demangle(segment.name) {
            Some(demangled) => (offset_of(demangled)?, offset_of(segment.name.to_owned())?),
            None => (offset_of(segment.name.to_owned())?, NO_STRING),
        };
        let size = u32::try_from(segment.end - segment.start).unwrap_or(u32::MAX);
        let provenance = PROVENANCES.iter().position(|&it| it == segment.provenance).unwrap_or(0) as u32;
        encoded.entries.extend_from_slice(&segment.start.to_le_bytes());
        for field in [size, name, linkage_name, provenance] {
            encoded.entries.extend_from_slice(&field.to_le_bytes());
        }
    }
    Ok(encoded)
}

/// A table, read in place.
#[derive(Clone, Copy)]
pub(crate) struct SymbolTable<'a> {
    entries: &'a [[u8; ENTRY_BYTES]],
    strings: &'a [u8],
}

/// A name found in a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NamedSymbol<'a> {
    pub(crate) name: &'a str,
    pub(crate) linkage_name: Option<&'a str>,
    pub(crate) provenance: Provenance,
}

/// An entry points outside the strings, or has an unknown number in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BrokenEntry;

impl<'a> SymbolTable<'a> {
    /// A table over the bytes of its entries (a multiple of [`ENTRY_BYTES`], the rest is ignored) and
    /// strings.
    pub(crate) fn new(entries: &'a [u8], strings: &'a [u8]) -> Self {
        Self { entries: entries.as_chunks().0, strings }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether the entries ascend, as a lookup needs them to.
    pub(crate) fn is_sorted(&self) -> bool {
        self.entries.is_sorted_by(|a, b| start(a) < start(b))
    }

    /// The symbol that covers `address`.
    pub(crate) fn lookup(&self, address: u64) -> Result<Option<NamedSymbol<'a>>, BrokenEntry> {
        let behind = self.entries.partition_point(|entry| start(entry) <= address);
        let Some(entry) = behind.checked_sub(1).and_then(|last| self.entries.get(last)) else {
            return Ok(None);
        };
        if address - start(entry) >= u64::from(field(entry, 8)) {
            return Ok(None);
        }
        let linkage_name = field(entry, 16);
        Ok(Some(NamedSymbol {
            name: self.string(field(entry, 12)).ok_or(BrokenEntry)?,
            linkage_name: match linkage_name {
                NO_STRING => None,
                offset => Some(self.string(offset).ok_or(BrokenEntry)?),
            },
            provenance: *PROVENANCES.get(field(entry, 20) as usize).ok_or(BrokenEntry)?,
        }))
    }

    fn string(&self, offset: u32) -> Option<&'a str> {
        let (length, rest) = self.strings.get(offset as usize..)?.split_first_chunk()?;
        let bytes = rest.get(..u32::from_le_bytes(*length) as usize)?;
        std::str::from_utf8(bytes).ok()
    }
}

fn start(entry: &[u8; ENTRY_BYTES]) -> u64 {
    u64::from(field(entry, 0)) | u64::from(field(entry, 4)) << 32
}

fn field(entry: &[u8; ENTRY_BYTES], offset: usize) -> u32 {
    u32::from_le_bytes([entry[offset], entry[offset + 1], entry[offset + 2], entry[offset + 3]])
}
