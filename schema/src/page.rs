//! One page of a table: the rows of 64 KiB of code, and the search in it.
//!
//! # Why this shape
//! The kernel rounds array values up to 8 bytes, so a row of its own costs 8 bytes however small it
//! is, and a map lookup for each probe of a binary search costs more than the probe. So rows are
//! packed: a page is one run of bytes inside a large map value, in which an entry costs two bytes
//! (low byte of its address, record number) and a search touches one array of bytes, at most
//! [`MAX_PROBES`] times.
//!
//! # Layout
//! Little-endian; offsets from the page's first byte, which is 8-aligned. A *block* is 256 bytes of
//! code, a *group* is 8 blocks. `G` = groups, `L` = locals, `E` = entries.
//! ```text
//! offset  size        field
//! 0       u8          flags: bit 0 WIDE_INDEX, bit 1 WIDE_RECORDS, others 0
//! 1       u8          first group: (page offset >> 11) of the first group, 0 to 31
//! 2       u8          G: number of groups, 1 to 32 - first
//! 3       u8          L: number of page-local record numbers (0 with WIDE_RECORDS)
//! 4       u16         E: number of entries, at least 1
//! 6       u8          C: record numbers below C are dictionary numbers
//! 7       u8          0
//! 8                   index, narrow: u16[G + 1] number of the first entry of each group, last = E
//!                            wide:   u16[8 G + 1] number of the first entry of each block, last = E
//!         u16[L]      dictionary numbers of record numbers C, C + 1, ...
//!         u16[E]      with WIDE_RECORDS only: dictionary number of each entry
//!         u8[8 G]     narrow index only: for each block, entries between its group's first and its own
//!         u8[E]       low byte of the address of each entry, ascending inside a block
//!         u8[E]       without WIDE_RECORDS only: record number of each entry
//! ```
//! An entry holds from its address up to the next entry's. The rows of a page stand on their own: a
//! state that lasts from the page before is stated again at page offset 0, and only code that no
//! FDE covers may come before the first entry.
//!
//! # Lookup of page offset `x`
//! 1. Group `x >> 11`, block `x >> 8`. Before the first group: nothing covers `x`. Behind the last:
//!    the answer is the last entry, distance "past its run".
//! 2. The index gives the block's first entry `s` and the next block's first entry `e`.
//! 3. Among the low bytes `s..e`, count those that are at most `x & 255`; the entry sought is the last
//!    of them, or entry `s - 1` if there is none (nothing covers `x` if `s` is 0).
//! 4. If the entry lies in this block its distance is `x - entry`; else it is "past its run": a
//!    run's last change is always in the block of its entry.

/// Bytes of code that a page covers.
pub const PAGE_CODE_BYTES: u64 = 1 << PAGE_SHIFT;
/// log2 of [`PAGE_CODE_BYTES`].
pub const PAGE_SHIFT: u32 = 16;
/// log2 of the bytes of code in a block: an entry keeps the low 8 bits of its address.
pub const BLOCK_SHIFT: u32 = 8;
/// log2 of the bytes of code in a group of 8 blocks.
pub const GROUP_SHIFT: u32 = 11;
/// Most entries in one block: what 8 probes tell apart.
pub const MAX_BLOCK_ENTRIES: usize = 255;
/// Most probes of one search.
pub const MAX_PROBES: u32 = 8;
/// Size of a page's header in bytes.
pub const PAGE_HEADER_BYTES: u32 = 8;
/// Flag: the index counts entries for each block, because a group has more than 255.
pub const WIDE_INDEX: u8 = 1;
/// Flag: entries hold 16-bit dictionary numbers, because the page uses more than 256 records.
pub const WIDE_RECORDS: u8 = 2;
/// The distance that is past every run.
pub const PAST_RUN: u32 = u32::MAX;

const _: () = assert!(1 << MAX_PROBES == MAX_BLOCK_ENTRIES + 1);

/// How the bytes of a page are read. An offset out of range gives some value, never a fault:
/// the BPF side masks it into its map value, the host side gives zero.
pub trait PageBytes {
    /// The byte at `offset` of the page.
    fn byte(&self, offset: u32) -> u8;
    /// The little-endian 16-bit value at the even `offset` of the page.
    fn half(&self, offset: u32) -> u16;
}

impl PageBytes for &[u8] {
    fn byte(&self, offset: u32) -> u8 {
        self.get(offset as usize).copied().unwrap_or(0)
    }

    fn half(&self, offset: u32) -> u16 {
        u16::from(self.byte(offset)) | u16::from(self.byte(offset + 1)) << 8
    }
}

/// The header of a page and, derived from it, where its arrays start.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the table in the module documentation defines each")]
pub struct PageLayout {
    pub flags: u8,
    pub first_group: u32,
    pub groups: u32,
    pub locals: u32,
    pub entries: u32,
    pub common: u32,
    pub locals_at: u32,
    pub wide_records_at: u32,
    pub block_index_at: u32,
    pub low_bytes_at: u32,
    pub records_at: u32,
    /// Size of the page in bytes.
    pub end: u32,
}

impl PageLayout {
    /// The layout of a page with these counts.
    #[inline(always)]
    pub const fn new(
        flags: u8,
        first_group: u32,
        groups: u32,
        locals: u32,
        entries: u32,
        common: u32,
    ) -> Self {
        let index_halves = if flags & WIDE_INDEX != 0 { 8 * groups + 1 } else { groups + 1 };
        let locals_at = PAGE_HEADER_BYTES + 2 * index_halves;
        let wide_records_at = locals_at + 2 * locals;
        let block_index_at = wide_records_at + if flags & WIDE_RECORDS != 0 { 2 * entries } else { 0 };
        let low_bytes_at = block_index_at + if flags & WIDE_INDEX != 0 { 0 } else { 8 * groups };
        let records_at = low_bytes_at + entries;
        let end = records_at + if flags & WIDE_RECORDS != 0 { 0 } else { entries };
        Self {
            flags,
            first_group,
            groups,
            locals,
            entries,
            common,
            locals_at,
            wide_records_at,
            block_index_at,
            low_bytes_at,
            records_at,
            end,
        }
    }

    /// Reads a page's header.
    #[inline(always)]
    pub fn read<P: PageBytes>(page: &P) -> Self {
        Self::new(
            page.byte(0),
            u32::from(page.byte(1)),
            u32::from(page.byte(2)),
            u32::from(page.byte(3)),
            u32::from(page.half(4)),
            u32::from(page.byte(6)),
        )
    }

    /// Entries `start..end` of block `block` (0 to 8 * groups - 1, counted from the first group).
    #[inline(always)]
    pub fn block<P: PageBytes>(&self, page: &P, block: u32) -> (u32, u32) {
        if self.flags & WIDE_INDEX != 0 {
            let at = PAGE_HEADER_BYTES + 2 * block;
            return (u32::from(page.half(at)), u32::from(page.half(at + 2)));
        }
        let group_at = PAGE_HEADER_BYTES + 2 * (block >> 3);
        let base = u32::from(page.half(group_at));
        let start = base + u32::from(page.byte(self.block_index_at + block));
        let end = if block & 7 == 7 {
            u32::from(page.half(group_at + 2))
        } else {
            base + u32::from(page.byte(self.block_index_at + block + 1))
        };
        (start, end)
    }

    /// The dictionary number of entry `entry`.
    #[inline(always)]
    pub fn dictionary_number<P: PageBytes>(&self, page: &P, entry: u32) -> u32 {
        if self.flags & WIDE_RECORDS != 0 {
            return u32::from(page.half(self.wide_records_at + 2 * entry));
        }
        let number = u32::from(page.byte(self.records_at + entry));
        if number < self.common {
            number
        } else {
            u32::from(page.half(self.locals_at + 2 * (number - self.common)))
        }
    }
}

/// What a search found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    /// Dictionary number of the entry's record.
    pub record: u32,
    /// Bytes from the entry to the address sought, or [`PAST_RUN`].
    pub distance: u32,
}

/// Finds the entry that holds at `offset` (0 to 65535) of `page`. `None`: no FDE covers it.
#[inline(always)]
pub fn search<P: PageBytes>(page: &P, offset: u32) -> Option<Hit> {
    let layout = PageLayout::read(page);
    let block = (offset >> BLOCK_SHIFT).wrapping_sub(8 * layout.first_group);
    if (offset >> GROUP_SHIFT) < layout.first_group {
        return None;
    }
    let low = offset & 0xff;
    let (start, end) =
        if block >= 8 * layout.groups { (layout.entries, layout.entries) } else { layout.block(page, block) };
    // The largest `after` in start..=end such that every low byte in start..after is at most `low`,
    // found bit by bit. Arithmetic instead of branches: the BPF verifier walks each side of a branch.
    let mut after = start;
    let mut step = 1 << (MAX_PROBES - 1);
    while step != 0 {
        let candidate = after.wrapping_add(step);
        let byte = u32::from(page.byte(layout.low_bytes_at.wrapping_add(candidate).wrapping_sub(1)));
        // The sign bit of a difference is the comparison.
        let beyond = end.wrapping_sub(candidate) >> 31 | low.wrapping_sub(byte) >> 31;
        after += step & beyond.wrapping_sub(1);
        step >>= 1;
    }
    if after == 0 {
        return None;
    }
    let entry = after - 1;
    let distance = if after > start {
        low.wrapping_sub(u32::from(page.byte(layout.low_bytes_at + entry)))
    } else {
        PAST_RUN
    };
    Some(Hit { record: layout.dictionary_number(page, entry), distance })
}
