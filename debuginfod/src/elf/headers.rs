//! What is read of an ELF file to check it: headers, names of sections and notes, each within bounds.
//!
//! Readers of ELF files take sizes and counts for granted; in a file made to hurt, a section table is
//! as large as the file, a million notes are the same megabytes, and names run to the end. Here each read has
//! a limit, and what goes beyond is refused by name. All limits together are [`MAX_READ_BYTES`], whatever the file.

use object::elf;
use object::read::elf::{CompressionHeader, FileHeader, NoteIterator, ProgramHeader, SectionHeader};
use object::{Endianness, ReadCache, ReadCacheOps, ReadRef};
use windlass_schema::BuildId;

use super::ContentError;
use crate::content::Content;

/// Most section headers read. Linkers number beyond 65,280 for relocatable files with a section for each function;
/// the largest kernel objects have some 100,000.
pub(super) const MAX_SECTIONS: u32 = 1 << 17;
/// Most program headers read: what `e_phnum` can say without extension.
pub(super) const MAX_SEGMENTS: u32 = elf::PN_XNUM as u32 - 1;
/// Most bytes of the names of sections that are read. Names behind it are unknown.
const MAX_NAMES_BYTES: u64 = 8 << 20;
/// Most bytes of notes read in one file. The most seen is 100 KB, probes of a Java machine.
const MAX_NOTES_BYTES: u64 = 1 << 20;
/// Most bytes read in one file: all of the above, and the header of each compressed section.
const MAX_READ_BYTES: u64 = 24 << 20;
/// Largest single read in bytes.
const MAX_RANGE_BYTES: u64 = 8 << 20;
/// Most bytes that the sections of a file may claim to be when they are decompressed: 64 GiB, sixteen times what a
/// symbol index is made of at most.
pub(super) const MAX_INFLATED_BYTES: u64 = 64 << 30;

const _: () =
    assert!(MAX_SECTIONS as u64 * size_of::<elf::SectionHeader64<Endianness>>() as u64 <= MAX_RANGE_BYTES);
const _: () =
    assert!(MAX_SEGMENTS as u64 * size_of::<elf::ProgramHeader64<Endianness>>() as u64 <= MAX_RANGE_BYTES);
const _: () = assert!(MAX_NAMES_BYTES <= MAX_RANGE_BYTES && MAX_NOTES_BYTES <= MAX_RANGE_BYTES);

/// A content as `object` reads it, until [`MAX_READ_BYTES`] are read.
pub(super) struct Source<'c, C: ?Sized> {
    content: &'c C,
    at: u64,
    left: u64,
}

impl<C: Content + ?Sized> ReadCacheOps for Source<'_, C> {
    fn len(&mut self) -> Result<u64, ()> {
        Ok(self.content.size())
    }

    fn seek(&mut self, at: u64) -> Result<u64, ()> {
        self.at = at;
        Ok(at)
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, ()> {
        let left = self.content.size().saturating_sub(self.at);
        let count = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
        self.read_exact(&mut buffer[..count])?;
        Ok(count)
    }

    fn read_exact(&mut self, buffer: &mut [u8]) -> Result<(), ()> {
        self.left = self.left.checked_sub(buffer.len() as u64).ok_or(())?;
        self.content.read_at(buffer, self.at).map_err(|_| ())?;
        self.at += buffer.len() as u64;
        Ok(())
    }
}

/// What was read of one file.
pub(super) type Cache<'c, C> = ReadCache<Source<'c, C>>;

/// Reads ranges of up to [`MAX_RANGE_BYTES`], which the cache keeps.
pub(super) struct Bounded<'d, 'c, C: Content + ?Sized>(&'d Cache<'c, C>);

impl<C: Content + ?Sized> Clone for Bounded<'_, '_, C> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<C: Content + ?Sized> Copy for Bounded<'_, '_, C> {}

impl<'d, C: Content + ?Sized> ReadRef<'d> for Bounded<'d, '_, C> {
    fn len(self) -> Result<u64, ()> {
        self.0.len()
    }

    fn read_bytes_at(self, offset: u64, size: u64) -> Result<&'d [u8], ()> {
        if size > MAX_RANGE_BYTES {
            return Err(());
        }
        self.0.read_bytes_at(offset, size)
    }

    fn read_bytes_at_until(self, range: std::ops::Range<u64>, delimiter: u8) -> Result<&'d [u8], ()> {
        self.0.read_bytes_at_until(range, delimiter)
    }
}

/// A cache for the reads of one file.
pub(super) fn cache<C: Content + ?Sized>(content: &C) -> Cache<'_, C> {
    ReadCache::new(Source { content, at: 0, left: MAX_READ_BYTES })
}

/// The headers of a file, checked for what would cost too much or means two things.
pub(super) struct Headers<'d, H: FileHeader> {
    pub(super) endian: Endianness,
    pub(super) sections: &'d [H::SectionHeader],
    pub(super) segments: &'d [H::ProgramHeader],
    names: &'d [u8],
}

fn not_elf(error: object::Error) -> ContentError {
    ContentError::NotElf(error.to_string())
}

impl<'d, H: FileHeader<Endian = Endianness>> Headers<'d, H> {
    /// Reads the headers of a file whose first one is `header`.
    pub(super) fn read<C: Content + ?Sized>(
        header: &'d H,
        cache: &'d Cache<'_, C>,
    ) -> Result<Self, ContentError> {
        let data = Bounded(cache);
        let endian = header.endian().map_err(not_elf)?;
        let sections = header.shnum(endian, data).map_err(not_elf)?;
        if sections > MAX_SECTIONS {
            return Err(ContentError::Sections(sections));
        }
        let segments = header.phnum(endian, data).map_err(not_elf)?;
        if segments > MAX_SEGMENTS {
            return Err(ContentError::Segments(segments));
        }
        let sections = header.section_headers(endian, data).map_err(not_elf)?;
        let segments = header.program_headers(endian, data).map_err(not_elf)?;
        let names = match header.section_strings_index(endian, data).map_err(not_elf)?.0 {
            0 => &[][..],
            index => {
                let strings = sections
                    .get(index)
                    .ok_or_else(|| ContentError::NotElf("no section of section names".to_owned()))?;
                let size = u64::min(strings.sh_size(endian).into(), MAX_NAMES_BYTES);
                data.read_bytes_at(strings.sh_offset(endian).into(), size).unwrap_or_default()
            }
        };
        let headers = Self { endian, sections, segments, names };
        headers.refuse_overlaps()?;
        Ok(headers)
    }

    /// The name of a section, empty if it is not known.
    pub(super) fn name(&self, section: &H::SectionHeader) -> &'d [u8] {
        let name = self.names.get(section.sh_name(self.endian) as usize..).unwrap_or_default();
        name.split(|byte| *byte == 0).next().unwrap_or_default()
    }

    /// Segments in the same place would give an address two contents. Tables and symbols name code by its address.
    fn refuse_overlaps(&self) -> Result<(), ContentError> {
        let mut loaded: Vec<(u64, u64)> = self
            .segments
            .iter()
            .filter(|segment| segment.p_type(self.endian) == elf::PT_LOAD)
            .map(|segment| (segment.p_vaddr(self.endian).into(), segment.p_memsz(self.endian).into()))
            .filter(|(_, size)| *size > 0)
            .collect();
        loaded.sort_unstable();
        match loaded.windows(2).find(|pair| pair[1].0 - pair[0].0 < pair[0].1) {
            Some(pair) => Err(ContentError::Overlap { first: pair[0].0, second: pair[1].0 }),
            None => Ok(()),
        }
    }

    /// The GNU build-ID note. Sections and segments are two ways to the same notes: one of them may be missing, and if they
    /// lead to two build-IDs, no one can say whose file this is.
    pub(super) fn build_id<C: Content + ?Sized>(
        &self,
        cache: &'d Cache<'_, C>,
    ) -> Result<Option<BuildId>, ContentError> {
        let endian = self.endian;
        let of_sections =
            self.sections.iter().filter(|section| section.sh_type(endian) == elf::SHT_NOTE).map(|section| {
                let range: (u64, u64) = (section.sh_offset(endian).into(), section.sh_size(endian).into());
                (range, section.sh_addralign(endian))
            });
        let of_segments =
            self.segments.iter().filter(|segment| segment.p_type(endian) == elf::PT_NOTE).map(|segment| {
                let range: (u64, u64) = (segment.p_offset(endian).into(), segment.p_filesz(endian).into());
                (range, segment.p_align(endian))
            });
        let mut notes = Notes { data: Bounded(cache), left: MAX_NOTES_BYTES, cut: 0 };
        let in_sections = notes.build_id::<H>(endian, of_sections);
        let in_segments = notes.build_id::<H>(endian, of_segments);
        match (in_sections, in_segments) {
            (Some(sections), Some(segments)) if sections != segments => {
                Err(ContentError::TwoBuildIds(Box::new((sections, segments))))
            }
            (None, None) if notes.cut > 0 => Err(ContentError::Notes(notes.cut)),
            (sections, segments) => Ok(sections.or(segments)),
        }
    }

    /// Refuses compressed sections that together claim to be more than [`MAX_INFLATED_BYTES`].
    pub(super) fn refuse_inflation<C: Content + ?Sized>(
        &self,
        cache: &'d Cache<'_, C>,
    ) -> Result<(), ContentError> {
        let (data, endian) = (Bounded(cache), self.endian);
        let mut claimed = 0u64;
        for section in self.sections {
            let offset = section.sh_offset(endian).into();
            // The old GNU form: `ZLIB` and the size as a big-endian number, marked by the name alone.
            let size = if section.sh_flags(endian).0 & elf::SHF_COMPRESSED.0 != 0 {
                let header = data.read_at::<<H as FileHeader>::CompressionHeader>(offset);
                header.ok().map(|header| header.ch_size(endian).into())
            } else if self.name(section).starts_with(b".zdebug") {
                let header = data.read_bytes_at(offset, 12).ok();
                header
                    .and_then(|header| header.strip_prefix(b"ZLIB")?.try_into().ok())
                    .map(u64::from_be_bytes)
            } else {
                None
            };
            claimed = claimed.saturating_add(size.unwrap_or(0));
        }
        if claimed > MAX_INFLATED_BYTES { Err(ContentError::Inflated(claimed)) } else { Ok(()) }
    }
}

/// Reads notes until there were [`MAX_NOTES_BYTES`].
struct Notes<'d, 'c, C: Content + ?Sized> {
    data: Bounded<'d, 'c, C>,
    left: u64,
    /// Bytes of notes that were not read.
    cut: u64,
}

impl<C: Content + ?Sized> Notes<'_, '_, C> {
    /// The first build-ID in `places`, each offset and size, and an alignment.
    fn build_id<H: FileHeader<Endian = Endianness>>(
        &mut self,
        endian: Endianness,
        places: impl Iterator<Item = ((u64, u64), H::Word)>,
    ) -> Option<BuildId> {
        for ((offset, size), align) in places {
            let read = size.min(self.left);
            let Ok(bytes) = self.data.read_bytes_at(offset, read) else { continue };
            self.left -= read;
            self.cut = self.cut.saturating_add(size - read);
            let Ok(mut notes) = NoteIterator::<H>::new(endian, align, bytes) else { continue };
            while let Ok(Some(note)) = notes.next() {
                if note.name() == elf::ELF_NOTE_GNU && note.n_type(endian) == elf::NT_GNU_BUILD_ID {
                    // A description that is no build-ID is passed over, as are the notes behind it.
                    match BuildId::new(note.desc()) {
                        Ok(id) => return Some(id),
                        Err(_) => break,
                    }
                }
            }
        }
        None
    }
}
