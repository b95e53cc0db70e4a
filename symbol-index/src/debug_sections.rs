//! The sections of DWARF, decompressed once for all that read them, and never without bounds.
//!
//! zlib packs a thousand zero bytes into one and zstd more, so a file of some megabytes can state, and hold,
//! sections of gigabytes. What the sections become together is therefore bounded before the first of
//! them is decompressed, by what their headers state, and a section whose data goes on behind its stated
//! size is not read further.

use std::borrow::Cow;
use std::convert::Infallible;

use gimli::{EndianSlice, RunTimeEndian, SectionId};
use object::{CompressedData, CompressionFormat, Object, ObjectKind, ObjectSection};
use symbolic::debuginfo::dwarf::{Dwarf, DwarfSection, Endian};

use crate::dwarf::Reader;
use crate::elf::Image;
use crate::relocatable::relocate;

/// Most bytes that compressed sections become for each byte of their file. Of 273 debug files of a Debian
/// machine, all compressed with zlib, one of 138 KB reaches 12.8, any larger one 2.1.
const MAX_EXPANSION: u64 = 32;
/// Bytes that compressed sections may become however small their file is: ten times what those of that
/// file of 138 KB do. What repeats itself most is found in small files.
const MIN_BUDGET_BYTES: u64 = 16 << 20;
/// Bytes that compressed sections may become however large their file is: as far as offsets in 32-bit
/// DWARF reach, and the SymCache's.
const MAX_BUDGET_BYTES: u64 = 4 << 30;
const _: () = assert!(MIN_BUDGET_BYTES < MAX_BUDGET_BYTES);

/// The sections that functions, inlined calls and lines are read from.
const SECTIONS: [SectionId; 9] = [
    SectionId::DebugAbbrev,
    SectionId::DebugAddr,
    SectionId::DebugInfo,
    SectionId::DebugLine,
    SectionId::DebugLineStr,
    SectionId::DebugRanges,
    SectionId::DebugRngLists,
    SectionId::DebugStr,
    SectionId::DebugStrOffsets,
];

/// A section, in the file if it is not compressed there.
type LoadedSection<'a> = (SectionId, Cow<'a, [u8]>);

/// The sections of one file.
pub(crate) struct DebugSections<'a> {
    sections: Vec<LoadedSection<'a>>,
    little_endian: bool,
    /// Whether each section could be read; one that could not is empty.
    pub(crate) complete: bool,
}

/// Compressed sections state that they become more than they may.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct OverBudget {
    stated_bytes: u64,
    budget_bytes: u64,
}

/// Bytes that the compressed sections of a file of `file_bytes` may become, all together.
fn budget_bytes(file_bytes: usize) -> u64 {
    (file_bytes as u64).saturating_mul(MAX_EXPANSION).clamp(MIN_BUDGET_BYTES, MAX_BUDGET_BYTES)
}

impl<'a> DebugSections<'a> {
    /// Those of `image`.
    pub(crate) fn load(image: &Image<'a>) -> Result<Self, OverBudget> {
        Self::load_named(image, |id| Some(id.name()))
    }

    /// Those of split units in `image`, a `.dwo` or `.dwp` file.
    pub(crate) fn load_split(image: &Image<'a>) -> Result<Self, OverBudget> {
        Self::load_named(image, SectionId::dwo_name)
    }

    fn load_named(
        image: &Image<'a>,
        name: impl Fn(SectionId) -> Option<&'static str>,
    ) -> Result<Self, OverBudget> {
        let file = &image.file;
        let section_of = |id| name(id).and_then(|name| file.section_by_name(name));
        let mut complete = true;
        let mut stored = Vec::new();
        for id in SECTIONS {
            match section_of(id).map(|section| section.compressed_data()) {
                Some(Ok(data)) => stored.push((id, data)),
                Some(Err(_)) => complete = false,
                None => {}
            }
        }
        let (mut sections, decompressed) = decompress(stored, budget_bytes(image.bytes))?;
        if file.kind() == ObjectKind::Relocatable {
            for (id, data) in &mut sections {
                let section = section_of(*id);
                complete &= section.is_some_and(|it| relocate(file, &image.placement, &it, data.to_mut()));
            }
        }
        Ok(Self { sections, little_endian: file.is_little_endian(), complete: complete && decompressed })
    }

    fn data(&self, id: SectionId) -> &[u8] {
        self.sections.iter().find(|(own, _)| *own == id).map_or(&[], |(_, data)| data)
    }

    /// The sections as gimli reads them.
    pub(crate) fn dwarf(&self) -> gimli::Dwarf<Reader<'_>> {
        let endian = if self.little_endian { RunTimeEndian::Little } else { RunTimeEndian::Big };
        let load = |id| -> Result<_, Infallible> { Ok(EndianSlice::new(self.data(id), endian)) };
        let Ok(dwarf) = gimli::Dwarf::load(load);
        dwarf
    }
}

/// The sections as `symbolic` reads them.
impl<'s> Dwarf<'s> for &'s DebugSections<'_> {
    fn endianity(&self) -> Endian {
        if self.little_endian { Endian::Little } else { Endian::Big }
    }

    fn raw_section(&self, name: &str) -> Option<DwarfSection<'s>> {
        let this: &'s DebugSections<'_> = self;
        let id = SECTIONS.into_iter().find(|id| id.name().strip_prefix('.') == Some(name))?;
        Some(DwarfSection { address: 0, offset: 0, align: 1, data: Cow::Borrowed(this.data(id)) })
    }
}

/// Decompresses what of `stored` is compressed, unless it states to become more than `budget_bytes`. Sections that
/// cannot be decompressed are left out; the answer says whether there were none.
fn decompress<'a>(
    stored: Vec<(SectionId, CompressedData<'a>)>,
    budget_bytes: u64,
) -> Result<(Vec<LoadedSection<'a>>, bool), OverBudget> {
    let stated = stored.iter().filter(|(_, data)| data.format != CompressionFormat::None);
    let stated_bytes = stated.fold(0, |sum: u64, (_, data)| sum.saturating_add(data.uncompressed_size));
    if stated_bytes > budget_bytes {
        return Err(OverBudget { stated_bytes, budget_bytes });
    }
    let mut complete = true;
    let mut sections = Vec::with_capacity(stored.len());
    for (id, data) in stored {
        match decompress_one(data) {
            Some(data) => sections.push((id, data)),
            None => complete = false,
        }
    }
    Ok((sections, complete))
}

/// Writes no byte behind the stated size, so that what headers state is a bound whether or not it is true.
fn decompress_one(data: CompressedData<'_>) -> Option<Cow<'_, [u8]>> {
    match data.format {
        // The decoder of `object` holds up to 100 MB of a frame that states such a window before it
        // looks at the size.
        CompressionFormat::Zstandard => {
            let size = usize::try_from(data.uncompressed_size).ok()?;
            let decompressed = zstd::bulk::decompress(data.data, size).ok()?;
            (decompressed.len() == size).then_some(Cow::Owned(decompressed))
        }
        _ => data.decompress().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1 << 10;

    /// A zlib stream of `size` zero bytes in one stored block.
    fn zlib(size: u16) -> Vec<u8> {
        let checksum = u32::from(size) << 16 | 1;
        let mut stream = vec![0x78, 0x01, 0x01];
        stream.extend(size.to_le_bytes());
        stream.extend((!size).to_le_bytes());
        stream.resize(stream.len() + usize::from(size), 0);
        stream.extend(checksum.to_be_bytes());
        stream
    }

    fn zstd(size: usize) -> Vec<u8> {
        zstd::bulk::compress(&vec![0; size], 3).unwrap()
    }

    fn stored(format: CompressionFormat, data: &[u8], stated: u64) -> CompressedData<'_> {
        CompressedData { format, data, uncompressed_size: stated }
    }

    #[test]
    fn the_budget_is_of_all_sections_together() {
        let (zlib, zstd) = (zlib(0x8000), zstd(0x8000));
        let sections = || {
            vec![
                (SectionId::DebugInfo, stored(CompressionFormat::Zlib, &zlib, 32 * KIB)),
                (SectionId::DebugStr, stored(CompressionFormat::Zstandard, &zstd, 32 * KIB)),
                (SectionId::DebugLine, stored(CompressionFormat::None, &zlib, zlib.len() as u64)),
            ]
        };
        let over = OverBudget { stated_bytes: 64 * KIB, budget_bytes: 64 * KIB - 1 };
        assert_eq!(decompress(sections(), 64 * KIB - 1), Err(over));
        let (sections, complete) = decompress(sections(), 64 * KIB).unwrap();
        let lengths: Vec<_> = sections.iter().map(|(_, data)| data.len()).collect();
        assert_eq!((lengths, complete), (vec![0x8000, 0x8000, zlib.len()], true));
        assert!(matches!(sections[2].1, Cow::Borrowed(_)));
    }

    #[test]
    fn more_than_stated_is_not_decompressed() {
        let (zlib, zstd) = (zlib(0x8000), zstd(64 << 20));
        for (format, data) in [(CompressionFormat::Zlib, &zlib), (CompressionFormat::Zstandard, &zstd)] {
            for stated in [0, 100] {
                let section = (SectionId::DebugInfo, stored(format, data, stated));
                let (sections, _) = decompress(vec![section], KIB).unwrap();
                let capacities = sections.iter().map(|(_, data)| data.clone().into_owned().capacity());
                assert!(capacities.sum::<usize>() <= stated as usize, "{format:?} {stated}");
            }
        }
        let two =
            [u64::MAX; 2].map(|stated| (SectionId::DebugStr, stored(CompressionFormat::Zlib, &zlib, stated)));
        assert!(decompress(two.into(), MAX_BUDGET_BYTES).is_err());
    }

    #[test]
    fn budgets_grow_with_the_file_between_bounds() {
        assert_eq!([0, 138_296].map(budget_bytes), [MIN_BUDGET_BYTES; 2]);
        assert_eq!(budget_bytes(3_144_512), 100_624_384);
        assert_eq!([1 << 30, usize::MAX].map(budget_bytes), [MAX_BUDGET_BYTES; 2]);
    }
}
