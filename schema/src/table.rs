//! The unwind table of one image: the format and its reader.
//!
//! A table answers, for any image address, how to step from a frame at that address to its caller.
//! It is what the service compiles, what travels to the agent, and, page by page and byte for byte,
//! what lies in the kernel's maps.
//!
//! # File
//! Little-endian; offsets from the start of the file.
//! ```text
//! offset  size     field
//! 0       [u8; 4]  magic "WLUT"
//! 4       u16      version, 2
//! 6       u8       architecture: 1 x86-64, 2 aarch64
//! 7       u8       0
//! 8       u64      XXH3-64 (seed 0) of all bytes from offset 16 to the end
//! 16      u64      base: image address of page 0, a multiple of 65536
//! 24      u32      P: number of pages in the directory, at most 65536 (MAX_PAGES); base + 65536 P is below 2^64
//! 28      u32      R: number of records in the dictionary, at most 8192 (MAX_RECORDS)
//! 32      u32      B: size of the page area in bytes, a multiple of 8
//! 36      u32      rows that the table states, for information
//! 40      u8       length of the build-ID, 1 to 64
//! 41      [u8; 64] build-ID, zero-padded
//! 105     [u8; 7]  0
//! 112     u64[R]   dictionary of records (see the record module)
//!         u32[P]   directory: offset of each page in the page area / 8, 0xffffffff (NO_PAGE) where none is
//!         u32      only if P is odd: 0
//!         [u8; B]  page area: pages (see the page module), each padded with zeros to 8 bytes
//! ```
//! The file ends behind the page area. Pages lie in the page area in the order of
//! the directory and share no byte: an offset that is not `NO_PAGE` is at or behind the end of the
//! page before it, padding included. So checking a table takes time in proportion to its file. What lies
//! between pages otherwise, or behind the last, has no meaning. A page has at most 61440 bytes (MAX_PAGE_BYTES).
//!
//! Whatever a reader finds that is not as these modules say, unused bits that are not 0 included, makes the table
//! malformed: readers refuse it.
//!
//! # Lookup of image address `a`
//! 1. `p = (a - base) >> 16`; outside 0..P, or a directory entry of `NO_PAGE`: no CFI.
//! 2. Search the page for `a & 0xffff` (see the page module): dictionary number and distance.
//! 3. The record at that number, taken at that distance, is the rule.
//!
//! # Example
//! An image of one function at 0x1000 to 0x1005, `push rbp; mov rbp, rsp; pop rbp`-less, at
//! base 0: dictionary `[0a 00.. (NO_CFI), 47 01 09 00 80 00 00 00 (the run of the record module)]`,
//! directory `[0]`, and the page
//! ```text
//! 00 01 01 00 02 00 02 00    narrow; first group 1 (0x1000 >> 12), one group, no locals, 2 entries, C = 2
//! 02 00 00 00 00 00 00 00    block 0x10 has 2 entries; the others have none
//! 00 00                      group 1 starts at entry 0
//! 00 05                      entries at 0x1000 and 0x1005
//! 01 00                      records 1 and 0
//! ```
//! 0x1004 is found in block 0x10 as entry 0 at distance 4: CFA = rbp + 16.

use crate::architecture::Architecture;
use crate::build_id::{BuildId, MAX_BUILD_ID_BYTES};
use crate::page::{BLOCK_SHIFT, GROUP_BLOCKS, PAGE_SHIFT, PageLayout, search};
use crate::page_check::{Limits, check_page};
use crate::record::{MAX_RUN_BYTES, Record};
use crate::rule::has_meaning;
use crate::{ImageAddress, Rule};

/// Version of the format. A table of another version is made anew, never converted.
///
/// | version | change |
/// |---|---|
/// | 1 | first |
/// | 2 | pages count the entries of blocks instead of naming their offsets; aarch64; return addresses up to 128 words from the CFA, or beside the frame pointer's place; `GO_STACK`, `OTHER_STACK`, `FAR_CFA` |
pub const VERSION: u16 = 2;
/// First bytes of a table.
pub const MAGIC: [u8; 4] = *b"WLUT";
/// Size of the header in bytes.
pub const HEADER_BYTES: usize = 112;
/// Directory entry of a page that holds no CFI.
pub const NO_PAGE: u32 = u32::MAX;
/// Most pages in a directory: 4 GiB of code, the reach of the x86-64 small and medium code models.
pub const MAX_PAGES: u32 = 1 << 16;
/// Most records in a dictionary: it must lie in one chunk of kernel memory. The largest
/// dictionary seen (librustc_driver, 1.1 million rows) has fewer than 3,000.
pub const MAX_RECORDS: u32 = 8192;
/// Largest page in bytes: it must lie in one chunk of kernel memory.
pub const MAX_PAGE_BYTES: u32 = 60 * 1024;

/// Why bytes are no table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// Shorter or longer than its header says.
    #[error("table of {found} bytes, its header says {expected}")]
    Length {
        /// Bytes there are.
        found: u64,
        /// Bytes there should be.
        expected: u64,
    },
    /// Other first bytes.
    #[error("not an unwind table: magic {0:02x?}")]
    Magic([u8; 4]),
    /// A version that this reader does not know.
    #[error("unwind table version {0}, expected {VERSION}")]
    Version(u16),
    /// An unknown architecture code.
    #[error("unknown architecture code {0} in unwind table")]
    Architecture(u8),
    /// The bytes are not those that were written.
    #[error("unwind table checksum {found:016x}, expected {expected:016x}")]
    Checksum {
        /// Checksum of the bytes.
        found: u64,
        /// Checksum in the header.
        expected: u64,
    },
    /// A header field out of its range.
    #[error("unwind table header field {0} is out of range")]
    Header(&'static str),
    /// A dictionary record without meaning.
    #[error("dictionary record {0} of the unwind table has no meaning")]
    Record(u32),
    /// A page that breaks its format.
    #[error("page {0} of the unwind table is malformed: {1}")]
    Page(u32, &'static str),
}

/// A table, checked, borrowed from the bytes it came in. Lookups allocate and copy nothing.
#[derive(Clone, Copy)]
pub struct Table<'a> {
    architecture: Architecture,
    build_id: BuildId,
    base: u64,
    rows: u32,
    dictionary: &'a [u8],
    directory: &'a [u8],
    pages: &'a [u8],
}

#[inline(always)]
fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    *bytes[at..].first_chunk().expect("offsets are checked before they are read from")
}

#[inline(always)]
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes_at(bytes, at))
}

#[inline(always)]
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes_at(bytes, at))
}

#[inline(always)]
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes_at(bytes, at))
}

/// The checksum of a table file: over everything behind the checksum field.
pub fn checksum(file: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(file.get(16..).unwrap_or_default())
}

impl<'a> Table<'a> {
    /// Checks `file` to the last byte, so that no later lookup can meet anything malformed.
    pub fn parse(file: &'a [u8]) -> Result<Self, TableError> {
        let table = Self::read(file);
        // A header that says something else than was written is that first of all.
        if let Ok(_) | Err(TableError::Header(_)) = table {
            let (found, expected) = (checksum(file), u64_at(file, 8));
            if found != expected {
                return Err(TableError::Checksum { found, expected });
            }
        }
        let table = table?;
        for number in 0..(table.dictionary.len() / 8) as u32 {
            if !has_meaning(table.record(number), table.architecture) {
                return Err(TableError::Record(number));
            }
        }
        let limits = Limits::of_dictionary(table.dictionary);
        let mut free = 0;
        for page in 0..table.page_count() {
            free = table.check_page(page, free, &limits).map_err(|why| TableError::Page(page, why))?;
        }
        Ok(table)
    }

    /// The table in a file of which only the header and the length are checked.
    pub(crate) fn read(file: &'a [u8]) -> Result<Self, TableError> {
        if file.len() < HEADER_BYTES {
            return Err(TableError::Length { found: file.len() as u64, expected: HEADER_BYTES as u64 });
        }
        let magic = [file[0], file[1], file[2], file[3]];
        if magic != MAGIC {
            return Err(TableError::Magic(magic));
        }
        if u16_at(file, 4) != VERSION {
            return Err(TableError::Version(u16_at(file, 4)));
        }
        let architecture = Architecture::of_code(file[6]).ok_or(TableError::Architecture(file[6]))?;
        let (base, pages) = (u64_at(file, 16), u32_at(file, 24));
        let (records, page_bytes) = (u32_at(file, 28), u32_at(file, 32));
        let directory_bytes = u64::from(pages).next_multiple_of(2) * 4;
        let expected = HEADER_BYTES as u64 + u64::from(records) * 8 + directory_bytes + u64::from(page_bytes);
        if file.len() as u64 != expected {
            return Err(TableError::Length { found: file.len() as u64, expected });
        }
        for (wrong, field) in [
            (file[7] != 0 || file[105..HEADER_BYTES].iter().any(|byte| *byte != 0), "reserved"),
            (file[41..105].iter().skip(file[40].into()).any(|byte| *byte != 0), "build-ID padding"),
            (base % (1 << PAGE_SHIFT) != 0, "base"),
            (base.checked_add(u64::from(pages) << PAGE_SHIFT).is_none() || pages > MAX_PAGES, "pages"),
            (records > MAX_RECORDS, "records"),
            (page_bytes % 8 != 0, "page bytes"),
            (usize::from(file[40]) > MAX_BUILD_ID_BYTES, "build-ID length"),
        ] {
            if wrong {
                return Err(TableError::Header(field));
            }
        }
        let build_id = BuildId::new(&file[41..41 + usize::from(file[40])])
            .map_err(|_| TableError::Header("build-ID length"))?;
        let (dictionary, rest) = file[HEADER_BYTES..].split_at(records as usize * 8);
        let (directory, page_area) = rest.split_at(directory_bytes as usize);
        if directory[pages as usize * 4..].iter().any(|byte| *byte != 0) {
            return Err(TableError::Header("padding of the directory"));
        }
        Ok(Self {
            architecture,
            build_id,
            base,
            rows: u32_at(file, 36),
            dictionary,
            directory: &directory[..pages as usize * 4],
            pages: page_area,
        })
    }

    /// Checks the place of a page and the page. Pages before it take the page area up to offset `free`;
    /// gives the offset behind this one.
    fn check_page(&self, number: u32, free: usize, limits: &Limits) -> Result<usize, &'static str> {
        let at = u32_at(self.directory, number as usize * 4);
        if at == NO_PAGE {
            return Ok(free);
        }
        let start = at as usize * 8;
        if start < free {
            return Err("out of order or on another page");
        }
        let Some(page) = self.pages.get(start..) else {
            return Err("outside the page area");
        };
        let end = start + check_page(page, limits)? as usize;
        let behind = end.next_multiple_of(8);
        if self.pages[end..behind].iter().any(|byte| *byte != 0) {
            return Err("padded with something else than zeros");
        }
        Ok(behind)
    }

    /// The record with this dictionary number, which must be one of the table's.
    fn record(&self, number: u32) -> Record {
        Record(u64_at(self.dictionary, number as usize * 8))
    }

    /// The plain record that holds at `address`.
    pub fn lookup(&self, address: ImageAddress) -> Record {
        let offset = address.get().wrapping_sub(self.base);
        let number = offset >> PAGE_SHIFT;
        let Some(page) = u32::try_from(number).ok().and_then(|number| self.pages_from(number)) else {
            return Record::NO_CFI;
        };
        match search(&page, offset as u32 & 0xffff) {
            Some(hit) => self.record(hit.record).at(hit.distance),
            None => Record::NO_CFI,
        }
    }

    /// The rule that holds at `address`.
    pub fn rule(&self, address: ImageAddress) -> Rule {
        Rule::of_record(self.lookup(address), self.architecture)
            .expect("parse checked that each state of each record has a meaning")
    }

    /// The bytes of page `number`, without padding; `None` if the directory has none.
    pub fn page(&self, number: u32) -> Option<&'a [u8]> {
        let page = self.pages_from(number)?;
        Some(&page[..PageLayout::read(&page).end as usize])
    }

    /// The bytes of page `number` and of those behind it.
    #[inline]
    fn pages_from(&self, number: u32) -> Option<&'a [u8]> {
        let at = (number as usize).checked_mul(4)?;
        let at = u32_at(self.directory.get(at..at + 4)?, 0);
        if at == NO_PAGE {
            return None;
        }
        Some(&self.pages[at as usize * 8..])
    }

    /// Number of pages in the directory.
    pub fn page_count(&self) -> u32 {
        (self.directory.len() / 4) as u32
    }

    /// Image address of page 0.
    pub fn base(&self) -> ImageAddress {
        ImageAddress::new(self.base)
    }

    /// The dictionary's bytes: little-endian records.
    pub fn dictionary(&self) -> &'a [u8] {
        self.dictionary
    }

    /// The dictionary.
    pub fn records(&self) -> impl Iterator<Item = Record> + 'a {
        let table = *self;
        (0..(self.dictionary.len() / 8) as u32).map(move |number| table.record(number))
    }

    /// Every entry in the order of addresses.
    #[cfg(feature = "std")]
    pub fn entries(&self) -> impl Iterator<Item = crate::table_writer::TableEntry> + 'a {
        let table = *self;
        (0..self.page_count()).filter_map(move |number| Some((number, table.page(number)?))).flat_map(
            |(number, page)| {
                let layout = PageLayout::read(&page);
                (0..GROUP_BLOCKS * layout.groups).flat_map(move |block| {
                    let start =
                        (number << PAGE_SHIFT) + (GROUP_BLOCKS * layout.first_group + block << BLOCK_SHIFT);
                    let (first, end) = layout.block(&page, block);
                    (first..end).map(move |entry| crate::table_writer::TableEntry {
                        offset: start + u32::from(page[(layout.low_bytes_at + entry) as usize]),
                        record: layout.dictionary_number(&page, entry, entry) as u16,
                    })
                })
            },
        )
    }

    /// Rows that the table states.
    pub fn row_count(&self) -> u32 {
        self.rows
    }

    /// The image that the table is of.
    pub fn build_id(&self) -> BuildId {
        self.build_id
    }

    /// The image's instruction set.
    pub fn architecture(&self) -> Architecture {
        self.architecture
    }

    /// Every row in the order of addresses: where it starts and the plain record that holds from
    /// there. The last one, or the one before a page without entries, is [`Record::NO_CFI`].
    pub fn rows(&self) -> impl Iterator<Item = (ImageAddress, Record)> + 'a {
        let table = *self;
        let mut last = Record::NO_CFI;
        (0..self.page_count())
            .flat_map(move |number| table.page_rows(number))
            .filter(move |(_, record)| core::mem::replace(&mut last, *record) != *record)
    }

    /// The states of one page, neighbours not yet merged; one `NO_CFI` for a page that is absent.
    fn page_rows(self, number: u32) -> impl Iterator<Item = (ImageAddress, Record)> + 'a {
        let start = self.base + (u64::from(number) << PAGE_SHIFT);
        let page = self.page(number);
        // Code before the first entry is not covered.
        let lead = core::iter::once((ImageAddress::new(start), Record::NO_CFI));
        let body = page.into_iter().flat_map(move |page| {
            let layout = PageLayout::read(&page);
            (0..GROUP_BLOCKS * layout.groups).flat_map(move |block| {
                let (first, end) = layout.block(&page, block);
                let block_start =
                    start + (u64::from(GROUP_BLOCKS * layout.first_group + block) << BLOCK_SHIFT);
                (first..end).flat_map(move |entry| {
                    let at = block_start + u64::from(page[(layout.low_bytes_at + entry) as usize]);
                    let record = self.record(layout.dictionary_number(&page, entry, entry));
                    let states = if record.is_run() { MAX_RUN_BYTES + 1 } else { 1 };
                    let next = if entry + 1 < end {
                        block_start + u64::from(page[(layout.low_bytes_at + entry + 1) as usize])
                    } else {
                        u64::MAX
                    };
                    (0..states)
                        .map(move |distance| (at + u64::from(distance), record.at(distance)))
                        .take_while(move |(at, _)| *at < next)
                        .map(|(at, record)| (ImageAddress::new(at), record))
                })
            })
        });
        let skip_lead = page.is_some_and(|page| search(&page, 0).is_some());
        lead.filter(move |_| !skip_lead).chain(body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the module documentation, byte for byte.
    fn example() -> Vec<u8> {
        let mut file = Vec::new();
        file.extend(b"WLUT\x02\x00\x01\x00");
        file.extend([0; 8]);
        file.extend(0u64.to_le_bytes());
        for field in [1u32, 2, 24, 4] {
            file.extend(field.to_le_bytes());
        }
        file.extend([2, 0xab, 0xcd]);
        file.resize(HEADER_BYTES, 0);
        file.extend([0x0a, 0, 0, 0, 0, 0, 0, 0]);
        file.extend([0x47, 1, 9, 0, 0x80, 0, 0, 0]);
        file.extend([0; 8]);
        file.extend([0, 1, 1, 0, 2, 0, 2, 0]);
        file.extend([2, 0, 0, 0, 0, 0, 0, 0]);
        file.extend([0, 0]);
        file.extend([0, 5, 1, 0]);
        file.extend([0, 0]);
        seal(&mut file);
        file
    }

    fn seal(file: &mut [u8]) {
        let sum = checksum(file);
        file[8..16].copy_from_slice(&sum.to_le_bytes());
    }

    #[test]
    fn example_of_the_module_documentation() {
        let file = example();
        let table = Table::parse(&file).unwrap();
        let mut text = String::new();
        for (address, record) in table.rows() {
            text += &format!("{address} {}\n", Rule::of_record(record, table.architecture()).unwrap());
        }
        assert_eq!(
            text,
            "0x1000 cfa=rsp+8 ra=*(cfa-8) rbp=same\n\
             0x1001 cfa=rsp+16 ra=*(cfa-8) rbp=*(cfa-16)\n\
             0x1004 cfa=rbp+16 ra=*(cfa-8) rbp=*(cfa-16)\n\
             0x1005 no_cfi\n"
        );
        for (address, expect) in
            [(0xfff, "no_cfi"), (0x1003, "cfa=rsp+16 ra=*(cfa-8) rbp=*(cfa-16)"), (0x9000, "no_cfi")]
        {
            assert_eq!(table.rule(ImageAddress::new(address)).to_string(), expect);
        }
    }

    /// The example with this directory, and as many copies of its page as `pages` says.
    fn with_directory(directory: &[u32], pages: usize) -> Vec<u8> {
        let example = example();
        let (head, page) = (&example[..HEADER_BYTES + 2 * 8], &example[HEADER_BYTES + 3 * 8..]);
        let mut file = head.to_vec();
        file[24..28].copy_from_slice(&(directory.len() as u32).to_le_bytes());
        file[32..36].copy_from_slice(&((pages * page.len()) as u32).to_le_bytes());
        file.extend(directory.iter().flat_map(|at| at.to_le_bytes()));
        file.resize(file.len().next_multiple_of(8), 0);
        (0..pages).for_each(|_| file.extend(page));
        seal(&mut file);
        file
    }

    /// A directory that names one page 65,536 times would make 2 billion checks of 320 KB.
    #[test]
    fn pages_lie_in_order_and_apart() {
        // The page takes three units of 8 bytes.
        for directory in [&[0, 3][..], &[NO_PAGE, 0, NO_PAGE, 3], &[3], &[]] {
            assert!(Table::parse(&with_directory(directory, 2)).is_ok(), "{directory:?}");
        }
        for (directory, page) in [(&[0, 0][..], 1), (&[3, 0], 1), (&[0, NO_PAGE, 0], 2), (&[0, 2], 1)] {
            assert_eq!(
                Table::parse(&with_directory(directory, 2)).err(),
                Some(TableError::Page(page, "out of order or on another page")),
                "{directory:?}"
            );
        }
    }

    #[test]
    fn truncation_at_every_byte_is_an_error() {
        let file = example();
        for len in 0..file.len() {
            assert!(Table::parse(&file[..len]).is_err(), "{len} bytes");
        }
    }

    /// With the checksum mended after the damage, so that the structure checks are what stands.
    #[test]
    fn any_one_byte_changed_is_an_error_or_a_table() {
        for at in 0..example().len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut file = example();
                file[at] = value;
                let changed = file != example();
                assert!(Table::parse(&file).is_err() || !changed || (8..16).contains(&at), "byte {at}");
                seal(&mut file);
                if let Ok(table) = Table::parse(&file) {
                    for address in (0..0x20000).step_by(7) {
                        let _ = table.rule(ImageAddress::new(address));
                    }
                    let _ = table.rows().count();
                }
            }
        }
    }
}
