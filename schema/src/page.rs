//! One page of a table: the rows of 64 KiB of code, and the search in it.
//!
//! # Why this shape
//! The kernel rounds array values up to 8 bytes, so a row of its own costs 8 bytes however small it
//! is, and a map lookup for each probe of a binary search costs more than the probe. So rows are
//! packed: a page is one run of bytes inside a large map value, in which an entry costs two bytes
//! (low byte of its address, record number) and a search touches one array of bytes, at most
//! [`MAX_PROBES`] times.
//!
//! Where the entries of a block lie is a sum of counts, not an offset for each block: four bits a block are
//! enough for three pages in four, and sixteen of them are added up in a few instructions without a branch.
//!
//! # Layout
//! Little-endian; offsets from the page's first byte, which is 8-aligned. A *block* is 256 bytes of
//! code, a *group* is 16 blocks. `G` = groups, `L` = locals, `E` = entries.
//! ```text
//! offset  size        field
//! 0       u8          flags: bit 0 WIDE_COUNTS, bit 1 WIDE_RECORDS or bit 2 NINTH_BITS, others 0
//! 1       u8          first group: (page offset >> 12) of the first group, 0 to 15
//! 2       u8          G: number of groups, 1 to 16 - first
//! 3       u8          L: number of page-local record numbers, low 8 bits (0 with WIDE_RECORDS)
//! 4       u16         E: number of entries, at least 1
//! 6       u8          C: record numbers below C are dictionary numbers
//! 7       u8          high bits of L
//! 8                   entries of each block, narrow: u64[G], block b of its group in bits 4 b to 4 b + 3
//!                                            wide:   u8[16 G]
//!         u16[G]      number of the first entry of each group
//!         u16[L]      dictionary numbers of record numbers C, C + 1, ...
//!         u16[E]      with WIDE_RECORDS only: dictionary number of each entry
//!         u8[E]       low byte of the address of each entry, ascending inside a block
//!         u8[E]       without WIDE_RECORDS only: low 8 bits of the record number of each entry
//!         u8[E / 8]   with NINTH_BITS only, rounded up: bit 8 of the record number of entry `i` in bit
//!                     `i & 7` of byte `i >> 3`
//! ```
//! Record numbers are below C + L, dictionary numbers below the dictionary's R, those of locals that no entry has
//! included; C alone may be greater. With `WIDE_RECORDS` C has no meaning, and the bits of `NINTH_BITS` behind entry E - 1
//! have none. Entries ascend strictly.
//!
//! An entry holds from its address up to the next entry's. The rows of a page stand on their own: a
//! state that lasts from the page before is stated again at page offset 0, and only code that no
//! FDE covers may come before the first entry.
//!
//! # Lookup of page offset `x`
//! 1. Group `x >> 12`, block `x >> 8`. Before the first group: nothing covers `x`. Behind the last:
//!    the answer is the last entry, distance "past its run".
//! 2. The block's first entry `s` is that of its group plus the counts of the group's blocks before it; its
//!    own count gives the end `e`.
//! 3. Among the low bytes `s..e`, count those that are at most `x & 255`; the entry sought is the last
//!    of them, or entry `s - 1` if there is none (nothing covers `x` if `s` is 0). They ascend, so of more than
//!    [`WINDOW`] bytes up to four probes find the window that matters, and its bytes are compared eight at a time.
//! 4. If the entry lies in this block its distance is `x - entry`; else it is "past its run": a
//!    run's last change, its event's included, is always in the block of its entry.

/// Bytes of code that a page covers.
pub const PAGE_CODE_BYTES: u64 = 1 << PAGE_SHIFT;
/// log2 of [`PAGE_CODE_BYTES`].
pub const PAGE_SHIFT: u32 = 16;
/// log2 of the bytes of code in a block: an entry keeps the low 8 bits of its address.
pub const BLOCK_SHIFT: u32 = 8;
/// log2 of the bytes of code in a group of 16 blocks.
pub const GROUP_SHIFT: u32 = 12;
/// Blocks in a group: as many counts of four bits as a `u64` holds.
pub const GROUP_BLOCKS: u32 = 1 << (GROUP_SHIFT - BLOCK_SHIFT);
/// Most entries in one block: what a byte counts.
pub const MAX_BLOCK_ENTRIES: usize = 255;
/// Most entries of a block that four bits count.
pub const MAX_NARROW_COUNT: usize = 15;
/// Most probes of one search: up to four for a window, then as many words of eight bytes as it may touch.
pub const MAX_PROBES: u32 = 7;
/// Low bytes that are compared at once.
pub const WINDOW: u32 = 16;
/// Size of a page's header in bytes.
pub const PAGE_HEADER_BYTES: u32 = 8;
/// Flag: counts take a byte each, because a block has more than [`MAX_NARROW_COUNT`] entries.
pub const WIDE_COUNTS: u8 = 1;
/// Flag: entries hold 16-bit dictionary numbers, because the page uses more than 512 records.
pub const WIDE_RECORDS: u8 = 2;
/// Flag: record numbers have nine bits, because the page uses more than 256 records.
pub const NINTH_BITS: u8 = 4;
/// The distance that is past every run.
pub const PAST_RUN: u32 = u32::MAX;

const _: () = assert!(MAX_BLOCK_ENTRIES < (WINDOW as usize) << (MAX_PROBES - WINDOW_WORDS));
/// Words of eight bytes that a window touches, wherever it begins.
const WINDOW_WORDS: u32 = WINDOW / 8 + 1;

/// How the bytes of a page are read. An offset out of range gives some value, never a fault:
/// the BPF side masks it into its map value, the host side gives zero.
pub trait PageBytes {
    /// The byte at `offset` of the page.
    fn byte(&self, offset: u32) -> u8;
    /// The little-endian 16-bit value at the even `offset` of the page.
    fn half(&self, offset: u32) -> u16;
    /// The little-endian 64-bit value at `offset` of the page, a multiple of 8.
    fn double(&self, offset: u32) -> u64;
    /// The byte at `offset + index`, of which `offset` is known sooner.
    #[inline(always)]
    fn byte_behind(&self, offset: u32, index: u32) -> u8 {
        self.byte(offset.wrapping_add(index))
    }
    /// How many of the first `count` bytes at `offset`, which ascend, or of the first [`WINDOW`] if these are
    /// fewer, are at most `low`.
    #[inline(always)]
    fn count_at_most(&self, offset: u32, count: u32, low: u32) -> u32
    where
        Self: Sized,
    {
        count_at_most(self, offset, count, low)
    }
}

impl PageBytes for &[u8] {
    #[inline]
    fn byte(&self, offset: u32) -> u8 {
        self.get(offset as usize).copied().unwrap_or(0)
    }

    #[inline]
    fn half(&self, offset: u32) -> u16 {
        let bytes = self.get(offset as usize..).and_then(|rest| rest.first_chunk());
        bytes.map_or(0, |bytes| u16::from_le_bytes(*bytes))
    }

    #[inline]
    fn double(&self, offset: u32) -> u64 {
        let rest = self.get(offset as usize..).unwrap_or_default();
        match rest.first_chunk() {
            Some(bytes) => u64::from_le_bytes(*bytes),
            // The last word of a page may be cut off: what is missing is zero.
            None => rest.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)),
        }
    }

    /// Loads eight bytes while `index` is still being found: it is below 8 as a rule.
    #[inline(always)]
    fn byte_behind(&self, offset: u32, index: u32) -> u8 {
        match self.get(offset as usize..).and_then(|rest| rest.first_chunk()) {
            Some(bytes) if index < 8 => (u64::from_le_bytes(*bytes) >> (8 * index)) as u8,
            _ => self.byte(offset.wrapping_add(index)),
        }
    }

    /// The same by words that need no joining, and by the first byte that is greater.
    #[inline(always)]
    fn count_at_most(&self, offset: u32, count: u32, low: u32) -> u32 {
        let Some(window) =
            self.get(offset as usize..).and_then(|rest| rest.first_chunk::<{ WINDOW as usize }>())
        else {
            return count_at_most(self, offset, count, low);
        };
        let window = u128::from_le_bytes(*window);
        let words = [window as u64, (window >> 64) as u64].map(|word| !is_at_most(word, low) & TOP_BITS);
        let first = words[0].trailing_zeros() / 8;
        let second = words[1].trailing_zeros() / 8;
        let all = if words[0] == 0 { 8 + second } else { first };
        if all < count { all } else { count }
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
    pub group_starts_at: u32,
    pub locals_at: u32,
    pub wide_records_at: u32,
    pub low_bytes_at: u32,
    pub records_at: u32,
    pub ninth_bits_at: u32,
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
        let count_bytes = if flags & WIDE_COUNTS != 0 { GROUP_BLOCKS } else { GROUP_BLOCKS / 2 };
        let group_starts_at = PAGE_HEADER_BYTES + count_bytes * groups;
        let locals_at = group_starts_at + 2 * groups;
        let wide_records_at = locals_at + 2 * locals;
        let low_bytes_at = wide_records_at + if flags & WIDE_RECORDS != 0 { 2 * entries } else { 0 };
        let records_at = low_bytes_at + entries;
        let ninth_bits_at = records_at + if flags & WIDE_RECORDS != 0 { 0 } else { entries };
        let end = ninth_bits_at + if flags & NINTH_BITS != 0 { (entries + 7) >> 3 } else { 0 };
        Self {
            flags,
            first_group,
            groups,
            locals,
            entries,
            common,
            group_starts_at,
            locals_at,
            wide_records_at,
            low_bytes_at,
            records_at,
            ninth_bits_at,
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
            u32::from(page.byte(3)) | u32::from(page.byte(7)) << 8,
            u32::from(page.half(4)),
            u32::from(page.byte(6)),
        )
    }

    /// Entries `start..end` of block `block` (0 to 16 * groups - 1, counted from the first group).
    #[inline(always)]
    pub fn block<P: PageBytes>(&self, page: &P, block: u32) -> (u32, u32) {
        let group = block / GROUP_BLOCKS;
        let in_group = block % GROUP_BLOCKS;
        let group_start = u32::from(page.half(self.group_starts_at + 2 * group));
        let (before, count) = if self.flags & WIDE_COUNTS != 0 {
            let at = PAGE_HEADER_BYTES + GROUP_BLOCKS * group;
            let (first, second) = (page.double(at), page.double(at + 8));
            let in_word = 8 * (in_group & 7);
            if in_group < 8 {
                (sum_bytes(first & low_bits(in_word)), first >> in_word & 0xff)
            } else {
                let before = sum_bytes(first) + sum_bytes(second & low_bits(in_word));
                (before, second >> in_word & 0xff)
            }
        } else {
            let counts = page.double(PAGE_HEADER_BYTES + GROUP_BLOCKS / 2 * group);
            let before = counts & low_bits(4 * in_group);
            let pairs = (before & 0x0f0f_0f0f_0f0f_0f0f) + (before >> 4 & 0x0f0f_0f0f_0f0f_0f0f);
            // At most 15 * 15, which the top byte holds.
            (pairs.wrapping_mul(0x0101_0101_0101_0101) >> 56, counts >> (4 * in_group) & 15)
        };
        let start = group_start + before as u32;
        (start, start + count as u32)
    }

    /// The page's number for the record of entry `entry`, without `WIDE_RECORDS`. `near` is an entry, known sooner, that
    /// `entry` is not more than one before.
    #[inline(always)]
    pub fn record_number<P: PageBytes>(&self, page: &P, near: u32, entry: u32) -> u32 {
        let from = near.wrapping_sub(1);
        let number =
            u32::from(page.byte_behind(self.records_at.wrapping_add(from), entry.wrapping_sub(from)));
        if self.flags & NINTH_BITS == 0 {
            return number;
        }
        let bits = u32::from(page.byte(self.ninth_bits_at + (entry >> 3)));
        number | (bits >> (entry & 7) & 1) << 8
    }

    /// The dictionary number of entry `entry`; `near` as for [`Self::record_number`].
    #[inline(always)]
    pub fn dictionary_number<P: PageBytes>(&self, page: &P, near: u32, entry: u32) -> u32 {
        if self.flags & WIDE_RECORDS != 0 {
            return u32::from(page.half(self.wide_records_at + 2 * entry));
        }
        let number = self.record_number(page, near, entry);
        // Arithmetic instead of a branch, which would go either way: all ones for a local number.
        let is_local = (number.wrapping_sub(self.common) >> 31).wrapping_sub(1);
        let local = u32::from(page.half(self.locals_at + 2 * (number.wrapping_sub(self.common) & is_local)));
        number & !is_local | local & is_local
    }
}

/// The lowest `bits` bits, 0 to 63.
#[inline(always)]
const fn low_bits(bits: u32) -> u64 {
    (1 << bits) - 1
}

/// The sum of the eight bytes of a word.
#[inline(always)]
const fn sum_bytes(word: u64) -> u64 {
    let pairs = (word & 0x00ff_00ff_00ff_00ff) + (word >> 8 & 0x00ff_00ff_00ff_00ff);
    pairs.wrapping_mul(0x0001_0001_0001_0001) >> 48
}

/// How many of the first `count` bytes at `at`, or of the first [`WINDOW`] if these are fewer, are at most `low`.
#[inline(always)]
fn count_at_most<P: PageBytes>(page: &P, at: u32, count: u32, low: u32) -> u32 {
    let words = [
        page.double(at & !7),
        page.double((at & !7).wrapping_add(8)),
        page.double((at & !7).wrapping_add(16)),
    ];
    let shift = 8 * (at & 7);
    // Twice, as a shift by 64 is none.
    let joined = |low: u64, high: u64| low >> shift | high << 1 << (63 - shift);
    let count = if count < WINDOW { count } else { WINDOW };
    let first = if count < 8 { count } else { 8 };
    at_most(joined(words[0], words[1]), first, low) + at_most(joined(words[1], words[2]), count - first, low)
}

/// The top bit of each byte of a word.
const TOP_BITS: u64 = 0x8080_8080_8080_8080;

/// The top bit of each byte of a word that is at most `low`.
#[inline(always)]
const fn is_at_most(word: u64, low: u32) -> u64 {
    let low = low as u64 * 0x0101_0101_0101_0101;
    // By the low seven bits of each byte, without a borrow from the next; then by the top bits, where these differ.
    let by_low_bits = (low | TOP_BITS).wrapping_sub(word & !TOP_BITS);
    (low & !word | !(low ^ word) & by_low_bits) & TOP_BITS
}

/// How many of the lowest `count` bytes of a word, 0 to 8, are at most `low`.
#[inline(always)]
const fn at_most(word: u64, count: u32, low: u32) -> u32 {
    // Twice, as a shift by 64 is none.
    let counted = !(u64::MAX << (4 * count) << (4 * count));
    ((is_at_most(word, low) & counted) >> 7).wrapping_mul(0x0101_0101_0101_0101).wrapping_shr(56) as u32
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
    let block = (offset >> BLOCK_SHIFT).wrapping_sub(GROUP_BLOCKS * layout.first_group);
    if (offset >> GROUP_SHIFT) < layout.first_group {
        return None;
    }
    let low = offset & 0xff;
    let (start, end) = if block >= GROUP_BLOCKS * layout.groups {
        (layout.entries, layout.entries)
    } else {
        layout.block(page, block)
    };
    let mut after = start;
    // The largest multiple of the window such that every low byte before it is at most `low`, found bit by bit.
    // Arithmetic instead of branches: the BPF verifier walks each side of a branch. All bits are there at first, and
    // those that are too many are taken off; to add the others instead is what LLVM makes a branch of.
    if end.wrapping_sub(start) > WINDOW {
        let mut step = 8 * WINDOW;
        after = after.wrapping_add(2 * step - WINDOW);
        while step >= WINDOW {
            let candidate = after.wrapping_sub(step - WINDOW);
            let byte = u32::from(page.byte(layout.low_bytes_at.wrapping_add(candidate).wrapping_sub(1)));
            // The sign bit of a difference is the comparison.
            let beyond = (end.wrapping_sub(candidate) | low.wrapping_sub(byte)) >> 31;
            after = after.wrapping_sub(beyond << step.trailing_zeros());
            step >>= 1;
        }
    }
    after += page.count_at_most(layout.low_bytes_at.wrapping_add(after), end.wrapping_sub(after), low);
    if after == 0 {
        return None;
    }
    let entry = after - 1;
    let from_entry = low.wrapping_sub(u32::from(page.byte(layout.low_bytes_at + entry)));
    // All ones, which is past every run, where the entry is in a block before: the sign bit of a difference.
    let distance = from_entry | (start.wrapping_sub(after) >> 31).wrapping_sub(1);
    Some(Hit { record: layout.dictionary_number(page, start, entry), distance })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_compared_as_one_by_one() {
        let bytes: Vec<u8> = [0, 1, 2, 126, 127, 128, 129, 130, 200, 254, 255].repeat(3);
        for at in 0..bytes.len() - 1 {
            for count in 0..20usize.min(bytes.len() - at) {
                for low in [0, 1, 2, 127, 128, 129, 253, 254, 255] {
                    let expected = bytes[at..at + count.min(16)].iter().filter(|byte| **byte <= low).count();
                    let counted = count_at_most(&&bytes[..], at as u32, count as u32, low.into());
                    assert_eq!(counted as usize, expected, "{count} bytes at {at}, {low}");
                }
            }
        }
    }

    #[test]
    fn counts_of_a_group_add_up() {
        for wide in [false, true] {
            let most = if wide { 255 } else { 15 };
            let counts: [u32; 16] = core::array::from_fn(|block| (block as u32 * 37 + 11) % (most + 1));
            let mut counts_of_most = counts;
            counts_of_most.fill(most);
            for counts in [counts, counts_of_most] {
                let entries = counts.iter().sum();
                let layout = PageLayout::new(if wide { WIDE_COUNTS } else { 0 }, 0, 1, 0, entries, 0);
                let mut page = vec![0; 8];
                if wide {
                    page.extend(counts.map(|count| count as u8));
                } else {
                    page.extend(counts.chunks(2).map(|pair| (pair[0] | pair[1] << 4) as u8));
                }
                page.extend([7, 0]);
                let mut start = 7;
                for (block, count) in counts.into_iter().enumerate() {
                    assert_eq!(
                        layout.block(&&page[..], block as u32),
                        (start, start + count),
                        "{block} {wide}"
                    );
                    start += count;
                }
            }
        }
    }
}
