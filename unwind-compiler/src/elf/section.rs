//! The sections of call frame information: which are read, how far, and how a file holds their bytes.
//!
//! # Why this shape
//! Section headers may name one range of a file many times, and compression makes much of little. So each
//! byte is read for one section only, what decompresses has a budget for all sections together, and
//! sections come out one at a time, when they are asked for; what is left out is reported.

use std::borrow::Cow;
use std::ops::Range;

use object::ReadRef;
use object::elf;
use object::read::elf::{CompressionHeader, SectionHeader};
use object::read::{CompressedData, CompressedFileRange, CompressionFormat};
use windlass_schema::ImageAddress;

use super::relocation::Relocations;
use super::{LE, SectionRow};
use crate::report::{SkipReason, SkippedFde};

/// Most bytes of call frame information, all sections together. The largest of a Debian developer's machine
/// has 15 MB; compiling takes memory in proportion.
pub(super) const MAX_FRAME_BYTES: u64 = 512 << 20;

/// Most bytes of call frame information for each byte of the file, all sections together. What is not
/// compressed is part of the file; compilers' sections deflate to a third, a bomb to a thousandth.
const FRAME_BYTES_PER_FILE_BYTE: u64 = 8;

/// Bytes of call frame information that any file may have, however small: repetitive code of few functions
/// deflates better, and compiling so little takes 40 MiB at worst.
const MIN_FRAME_BUDGET_BYTES: u64 = 1 << 20;

/// Most sections of call frame information that are read. Linkers write one of a name, or none.
const MAX_SECTIONS: usize = 16;

/// Bytes before the stream of a `.zdebug_*` section: "ZLIB", and the size in 8 big-endian bytes.
const ZDEBUG_HEADER_BYTES: usize = 12;

/// What a section is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SectionKind {
    EhFrame,
    DebugFrame,
}

/// How a section's name says that it is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Naming {
    /// Not at all: `SHF_COMPRESSED` does.
    Plain,
    /// As `.zdebug_*`, which GNU tools wrote before there was that flag.
    Zdebug,
}

/// One section of call frame information.
pub(crate) struct FrameSection<'a> {
    pub(crate) kind: SectionKind,
    /// Image address of its first byte; 0 for `.debug_frame`, in which nothing counts from where it is.
    pub(crate) address: u64,
    /// Size that the headers state, if they do.
    pub(crate) stated_bytes: Option<u64>,
    pub(super) stored: Stored<'a>,
    /// What is to be put into the bytes of a relocatable file.
    pub(super) relocations: Option<Relocations<'a>>,
}

/// How a file holds a section.
pub(super) enum Stored<'a> {
    /// As it is, as far as the file goes.
    Plain(&'a [u8]),
    Compressed(CompressedData<'a>),
}

impl<'a> FrameSection<'a> {
    /// Its bytes, as many as the file has, relocated; `None` if they do not decompress to the size that is
    /// stated.
    pub(crate) fn data(&self) -> Option<Cow<'a, [u8]>> {
        let mut data: Cow<'a, [u8]> = match self.stored {
            Stored::Plain(data) => data.into(),
            // Takes the stated size, and a window of zstd of at most 128 MiB.
            Stored::Compressed(data) => data.decompress().ok()?,
        };
        if let Some(relocations) = &self.relocations {
            relocations.apply(self.kind, self.address, data.to_mut());
        }
        Some(data)
    }

    /// This section, as one that was skipped.
    pub(crate) fn skipped(&self, reason: SkipReason) -> SkippedFde {
        skipped_section(self.address, reason)
    }
}

pub(super) fn skipped_section(address: u64, reason: SkipReason) -> SkippedFde {
    SkippedFde { offset: 0, address: Some(ImageAddress::new(address)), reason }
}

/// Takes sections as long as there is room.
pub(super) struct Intake<'a> {
    file: &'a [u8],
    budget_bytes: u64,
    /// Ranges of the file that have been taken.
    taken: Vec<Range<u64>>,
}

impl<'a> Intake<'a> {
    pub(super) fn of(file: &'a [u8]) -> Self {
        let by_size = (file.len() as u64).saturating_mul(FRAME_BYTES_PER_FILE_BYTE);
        let budget_bytes = by_size.clamp(MIN_FRAME_BUDGET_BYTES, MAX_FRAME_BYTES);
        Self { file, budget_bytes, taken: Vec::new() }
    }

    /// The section of this header, which is at `address`. `None` for one without bytes, as in split debug
    /// files.
    pub(super) fn section(
        &mut self,
        section: &SectionRow,
        kind: SectionKind,
        naming: Naming,
        address: u64,
    ) -> Result<Option<FrameSection<'a>>, SkipReason> {
        let Some((file_offset, stored_bytes)) = section.file_range(LE) else { return Ok(None) };
        let range = file_offset..file_offset.saturating_add(stored_bytes);
        if self.taken.len() == MAX_SECTIONS {
            return Err(SkipReason::SectionLimit);
        }
        if self.taken.iter().any(|taken| taken.start < range.end && range.start < taken.end) {
            return Err(SkipReason::SectionOverlap);
        }
        let (stored, read_bytes, stated_bytes) = match section.compression(LE, self.file) {
            Ok(None) if naming == Naming::Zdebug => self.zdebug(&range)?,
            Ok(None) => {
                let end = range.end.min(self.file.len() as u64);
                let read_bytes = end.saturating_sub(range.start).min(self.budget_bytes);
                // Past the end of the file there is nothing to read, which is reported as truncated.
                let data = self.file.read_bytes_at(range.start.min(end), read_bytes);
                (Stored::Plain(data.unwrap_or_default()), read_bytes, stored_bytes)
            }
            Ok(Some((header, offset, compressed_size))) => {
                let uncompressed_size = header.ch_size(LE);
                let format = match header.ch_type(LE) {
                    elf::ELFCOMPRESS_ZLIB => CompressionFormat::Zlib,
                    elf::ELFCOMPRESS_ZSTD => CompressionFormat::Zstandard,
                    _ => return Err(SkipReason::Unreadable),
                };
                let data = CompressedFileRange { format, offset, compressed_size, uncompressed_size }
                    .data(self.file)
                    .map_err(|_| SkipReason::Truncated)?;
                (Stored::Compressed(data), uncompressed_size, uncompressed_size)
            }
            Err(_) => return Err(SkipReason::Truncated),
        };
        self.budget_bytes = self.budget_bytes.checked_sub(read_bytes).ok_or(SkipReason::SectionLimit)?;
        self.taken.push(range);
        let stated_bytes = Some(stated_bytes);
        Ok(Some(FrameSection { kind, address, stated_bytes, stored, relocations: None }))
    }

    /// A section that is compressed as `.zdebug_*` sections are, and its size, read and stated.
    fn zdebug(&self, range: &Range<u64>) -> Result<(Stored<'a>, u64, u64), SkipReason> {
        let data = self.file.read_bytes_at(range.start, range.end - range.start);
        let data = data.map_err(|()| SkipReason::Truncated)?;
        let size = data.get(4..ZDEBUG_HEADER_BYTES).and_then(|size| size.first_chunk());
        let (Some(b"ZLIB"), Some(size)) = (data.get(..4), size) else {
            return Err(SkipReason::Unreadable);
        };
        let uncompressed_size = u64::from_be_bytes(*size);
        let (format, data) = (CompressionFormat::Zlib, &data[ZDEBUG_HEADER_BYTES..]);
        let stored = Stored::Compressed(CompressedData { format, data, uncompressed_size });
        Ok((stored, uncompressed_size, uncompressed_size))
    }
}
