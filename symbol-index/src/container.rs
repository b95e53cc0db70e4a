//! The format of an index: the answers to "what is at this address" behind one header.
//!
//! # Why this shape
//! The strongest peer, Sentry's SymCache, writes DWARF's functions and the symbol table's into one table,
//! so nobody can tell which of the two a name came from, and leaves out what has no DWARF as soon as
//! a neighbour has some. Here a SymCache holds what DWARF says and nothing else; symbols have a table
//! of their own that is asked second. Functions of stripped images, which have no name left but still
//! their extent, are in a third table. The checksum covers everything behind itself, so that a reader
//! that got past it reads what was written.
//!
//! # Layout
//! Little-endian. Offsets count from the index's first byte; sections start at multiples of 8 and
//! are in this order, with zero bytes between.
//! ```text
//! offset  size  field
//! 0       4     magic "WLSX"
//! 4       u32   format version
//! 8       u64   XXH3-64 of all bytes from offset 16 to the end
//! 16      u32   flags: bit 0 BROKEN: some of the input could not be read; others 0
//! 20      u32   0
//! 24      u64   base: the image address of the SymCache's address 0
//! 32      u64   offset of the SymCache
//! 40      u64   its length in bytes, 0 if there was no DWARF
//! 48      u64   offset of the symbol table's entries
//! 56      u64   their length in bytes
//! 64      u64   offset of the symbol table's strings
//! 72      u64   their length in bytes
//! 80      u64   offset of the extent table's blocks
//! 88      u64   their length in bytes
//! 96      u64   offset of the extent table's lengths
//! 104     u64   their length in bytes
//! 112           sections
//! ```
//! The SymCache is `symbolic`'s, version 9, in which a function's name is `NAME` or
//! `NAME NUL LINKAGE-NAME`, or empty for code whose line is known but not its function. The symbol table
//! is described in `symbol_table`, the extent table in `extent_table`.
//!
//! An index of nothing is its header, for example with base 0:
//! ```text
//! 57 4c 53 58  03 00 00 00  <8 bytes of checksum>  00 00 00 00  00 00 00 00  <base: 8 zero bytes>
//! 70 00 00 00 00 00 00 00  <8 zero bytes>    five times: an empty section at offset 112
//! ```
//!
//! # Lookup of image address `x`
//! 1. SymCache at `x - base`: a chain of frames, innermost first. Those with a name are DWARF's.
//! 2. If there is none, or the outermost has no name: the symbol that covers `x`. It is the function,
//!    at the file and line of step 1 if that gave one.
//! 3. If there is none either: unresolved. The extent table may still say where the function starts.

use xxhash_rust::xxh3::xxh3_64;

use crate::extent_table::{self, ExtentTable};
use crate::symbol_table::{self, SymbolTable};

/// The version of the format.
///
/// 3: files that are not linked. 2: extents of functions without names. 1: the first.
pub const FORMAT_VERSION: u32 = 3;

const MAGIC: [u8; 4] = *b"WLSX";
const HEADER_BYTES: usize = 112;
/// What the checksum covers starts here.
const CHECKED_FROM: usize = 16;
const SECTION_ALIGNMENT: usize = 8;
const FLAG_BROKEN: u32 = 1;

/// Bytes are no index that this version can read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IndexError {
    /// Shorter than a header.
    #[error("symbol index of {0} bytes is shorter than its header of {HEADER_BYTES}")]
    Short(usize),
    /// Another format.
    #[error("no symbol index: it begins with {0:02x?}")]
    Magic([u8; 4]),
    /// Another version of the format.
    #[error("symbol index has format version {0}, this reads {FORMAT_VERSION}")]
    Version(u32),
    /// Changed or cut since it was written.
    #[error("symbol index has checksum {found:016x}, its header says {stated:016x}")]
    Checksum {
        /// In the header.
        stated: u64,
        /// Of the bytes.
        found: u64,
    },
    /// A section lies outside, or its length does not fit its entries.
    #[error("symbol index of {size} bytes has a section of {length} bytes at offset {offset}")]
    Section {
        /// Of the section.
        offset: u64,
        /// Of the section.
        length: u64,
        /// Of the index.
        size: usize,
    },
    /// The addresses of this table do not ascend.
    #[error("symbol index has unsorted {0}")]
    Unsorted(&'static str),
    /// The SymCache inside cannot be read.
    #[error("broken SymCache in symbol index: {0}")]
    SymCache(String),
}

/// What an index holds.
#[derive(Default)]
pub(crate) struct Parts {
    pub(crate) broken: bool,
    pub(crate) base: u64,
    pub(crate) symcache: Vec<u8>,
    pub(crate) symbols: symbol_table::Encoded,
    pub(crate) extents: extent_table::Encoded,
}

/// What an index holds, in place.
#[derive(Clone, Copy)]
pub(crate) struct Sections<'a> {
    pub(crate) broken: bool,
    pub(crate) base: u64,
    pub(crate) symcache: &'a [u8],
    pub(crate) symbols: SymbolTable<'a>,
    pub(crate) extents: ExtentTable<'a>,
}

/// Writes an index.
pub(crate) fn encode(parts: &Parts) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_BYTES];
    let Parts { symcache, symbols, extents, .. } = parts;
    let sections = [symcache, &symbols.entries, &symbols.strings, &extents.blocks, &extents.lengths];
    for (number, section) in sections.into_iter().enumerate() {
        bytes.resize(bytes.len().next_multiple_of(SECTION_ALIGNMENT), 0);
        let field = 32 + 16 * number;
        let offset = bytes.len() as u64;
        bytes[field..field + 8].copy_from_slice(&offset.to_le_bytes());
        bytes[field + 8..field + 16].copy_from_slice(&(section.len() as u64).to_le_bytes());
        bytes.extend_from_slice(section);
    }
    let flags = if parts.broken { FLAG_BROKEN } else { 0 };
    bytes[16..20].copy_from_slice(&flags.to_le_bytes());
    bytes[24..32].copy_from_slice(&parts.base.to_le_bytes());
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4..8].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
    let checksum = xxh3_64(&bytes[CHECKED_FROM..]);
    bytes[8..16].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// Checks an index as a whole and finds its sections.
pub(crate) fn parse(bytes: &[u8]) -> Result<Sections<'_>, IndexError> {
    let header: &[u8; HEADER_BYTES] = bytes.first_chunk().ok_or(IndexError::Short(bytes.len()))?;
    let magic = [header[0], header[1], header[2], header[3]];
    if magic != MAGIC {
        return Err(IndexError::Magic(magic));
    }
    let version = word(header, 0) >> 32;
    if version != u64::from(FORMAT_VERSION) {
        return Err(IndexError::Version(version as u32));
    }
    let (stated, found) = (word(header, 8), xxh3_64(&bytes[CHECKED_FROM..]));
    if stated != found {
        return Err(IndexError::Checksum { stated, found });
    }
    let symbols = SymbolTable::new(
        section(bytes, header, 48, symbol_table::ENTRY_BYTES)?,
        section(bytes, header, 64, 1)?,
    );
    if !symbols.is_sorted() {
        return Err(IndexError::Unsorted("symbols"));
    }
    let extents = ExtentTable::new(
        section(bytes, header, 80, extent_table::BLOCK_BYTES)?,
        section(bytes, header, 96, 1)?,
    );
    if !extents.is_sorted() {
        return Err(IndexError::Unsorted("extents"));
    }
    Ok(Sections {
        broken: word(header, 16) as u32 & FLAG_BROKEN != 0,
        base: word(header, 24),
        symcache: section(bytes, header, 32, 1)?,
        symbols,
        extents,
    })
}

/// The section whose offset and length are at `field`.
fn section<'a>(
    bytes: &'a [u8],
    header: &[u8; HEADER_BYTES],
    field: usize,
    entry_bytes: usize,
) -> Result<&'a [u8], IndexError> {
    let (offset, length) = (word(header, field), word(header, field + 8));
    let error = IndexError::Section { offset, length, size: bytes.len() };
    let (Ok(start), Ok(count)) = (usize::try_from(offset), usize::try_from(length)) else {
        return Err(error);
    };
    let end = start.checked_add(count).filter(|_| start % SECTION_ALIGNMENT == 0 && count % entry_bytes == 0);
    end.and_then(|end| bytes.get(start..end)).ok_or(error)
}

/// The 64-bit value at `offset`, at most 8 bytes before the header's end.
fn word(header: &[u8; HEADER_BYTES], offset: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&header[offset..offset + 8]);
    u64::from_le_bytes(value)
}
