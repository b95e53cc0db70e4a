//! Where an ELF image keeps its call frame information, and its build-ID.
//!
//! # Why this shape
//! Section headers come last in a file and are the first to go (`sstrip`, a cut download), while what the
//! running program unwinds by is named by a program header. So sections are read if they can be, and
//! `PT_GNU_EH_FRAME` leads to `.eh_frame` where no section has that name; a section that reaches past the
//! end of the file is read as far as it goes. Only headers decide whether a file is supported at all.
//!
//! Section headers may name one range of a file many times, and compression makes much of little. So each
//! byte is read for one section only, what decompresses has a budget for all sections together, and
//! sections are held in memory one at a time; what is left out is reported.

use std::borrow::Cow;
use std::ops::Range;

use gimli::{BaseAddresses, EhFrameHdr, LittleEndian as GimliLittleEndian, Pointer};
use object::elf::{self, FileHeader64, ProgramHeader64, Rela64, SectionHeader64};
use object::read::elf::{CompressionHeader, FileHeader, ProgramHeader, SectionHeader, SectionTable};
use object::read::{CompressedData, CompressedFileRange, CompressionFormat};
use object::{LittleEndian, ReadRef};
use windlass_schema::page::{BLOCK_SHIFT, PAGE_SHIFT};
use windlass_schema::table::{MAX_PAGES, TableError};
use windlass_schema::{Architecture, BuildId, ImageAddress};

use crate::go::{GoCode, GoImage, find_table, text_start};
use crate::report::{SkipReason, SkippedFde};

/// Most bytes of `.eh_frame`, all sections together. The largest of a Debian developer's machine has 15 MB;
/// compiling takes memory in proportion.
const MAX_EH_FRAME_BYTES: u64 = 512 << 20;

/// Most bytes of `.eh_frame` for each byte of the file, all sections together. What is not compressed is
/// part of the file; compilers' `.eh_frame` deflates to a third, a bomb to a thousandth.
const EH_FRAME_BYTES_PER_FILE_BYTE: u64 = 8;

/// Bytes of `.eh_frame` that any file may have, however small: repetitive code of few functions deflates
/// better, and compiling so little takes 40 MiB at worst.
const MIN_EH_FRAME_BUDGET_BYTES: u64 = 1 << 20;

/// Most sections of call frame information that are read. Linkers write one of a name, or none.
const MAX_SECTIONS: usize = 16;

/// What a segment's end is rounded up to when it is mapped.
const MEMORY_PAGE_BYTES: u64 = 4096;

/// Why a file has no unwind table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    /// Other first bytes, or too short for an ELF header.
    #[error("not an ELF file")]
    NotElf,
    /// An ELF class other than 64-bit.
    #[error("ELF class {0}, expected 2 (64-bit)")]
    Class(u8),
    /// A byte order other than little-endian.
    #[error("ELF data encoding {0}, expected 1 (little-endian)")]
    ByteOrder(u8),
    /// An instruction set other than x86-64 and aarch64.
    #[error("ELF machine {0}, expected 62 (x86-64) or 183 (aarch64)")]
    Machine(u16),
    /// The table that was made breaks its own format: a fault of the compiler, not of the file.
    #[error("compiled table cannot be read back: this is a fault of the compiler, report it with the file")]
    Table(#[source] TableError),
}

/// What a section is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SectionKind {
    EhFrame,
    DebugFrame,
}

/// One section of call frame information.
pub(crate) struct FrameSection<'a> {
    pub(crate) kind: SectionKind,
    /// Image address of its first byte.
    pub(crate) address: u64,
    /// Size that the headers state, if they do.
    pub(crate) stated_bytes: Option<u64>,
    stored: Stored<'a>,
}

/// How a file holds a section.
enum Stored<'a> {
    /// As it is, as far as the file goes.
    Plain(&'a [u8]),
    Compressed(CompressedData<'a>),
}

impl<'a> FrameSection<'a> {
    /// Its bytes, as many as the file has; `None` if they do not decompress to the size that is stated.
    pub(crate) fn data(&self) -> Option<Cow<'a, [u8]>> {
        match self.stored {
            Stored::Plain(data) => Some(data.into()),
            // Takes the stated size, and a window of zstd of at most 128 MiB.
            Stored::Compressed(data) => data.decompress().ok(),
        }
    }

    /// This section, as one that was skipped.
    pub(crate) fn skipped(&self, reason: SkipReason) -> SkippedFde {
        skipped_section(self.address, reason)
    }
}

fn skipped_section(address: u64, reason: SkipReason) -> SkippedFde {
    SkippedFde { offset: 0, address: Some(ImageAddress::new(address)), reason }
}

/// What unwinding needs of an image.
pub(crate) struct Image<'a> {
    pub(crate) architecture: Architecture,
    pub(crate) frames: Vec<FrameSection<'a>>,
    /// Sections that are there but are not read.
    pub(crate) skipped: Vec<SkippedFde>,
    /// Address of `.text`, which text-relative pointers count from.
    pub(crate) text: Option<u64>,
    /// Address of `.got`, which data-relative pointers count from.
    pub(crate) got: Option<u64>,
    file: &'a [u8],
    segments: &'a [Segment],
    sections: Sections<'a>,
    /// Addresses that are loaded.
    loaded: Vec<Range<u64>>,
    /// First address that is loaded as code.
    first_code: Option<u64>,
}

type Header = FileHeader64<LittleEndian>;
type Segment = ProgramHeader64<LittleEndian>;
type SectionRow = SectionHeader64<LittleEndian>;
type Sections<'a> = SectionTable<'a, Header>;
const LE: LittleEndian = LittleEndian;

/// The header of a supported file, and its instruction set.
fn header(file: &[u8]) -> Result<(&Header, Architecture), CompileError> {
    // e_ident up to EI_DATA and e_machine lie at the same offsets in every class.
    let (Some(ident), Some(machine)) = (file.get(..16), file.get(18..20)) else {
        return Err(CompileError::NotElf);
    };
    if ident[..4] != elf::ELFMAG {
        return Err(CompileError::NotElf);
    }
    if ident[4] != 2 {
        return Err(CompileError::Class(ident[4]));
    }
    if ident[5] != 1 {
        return Err(CompileError::ByteOrder(ident[5]));
    }
    let machine = u16::from_le_bytes([machine[0], machine[1]]);
    let architecture = match machine {
        62 => Architecture::X86_64,
        183 => Architecture::Aarch64,
        _ => return Err(CompileError::Machine(machine)),
    };
    let header = Header::parse(file).map_err(|_| CompileError::NotElf)?;
    Ok((header, architecture))
}

impl<'a> Image<'a> {
    fn new(file: &'a [u8], architecture: Architecture) -> Self {
        Self {
            architecture,
            frames: Vec::new(),
            skipped: Vec::new(),
            text: None,
            got: None,
            file,
            segments: &[],
            sections: SectionTable::default(),
            loaded: Vec::new(),
            first_code: None,
        }
    }

    /// Finds the call frame information of `file`. An image of another type than `ET_EXEC` and `ET_DYN`
    /// has none that is of use: its addresses are not final.
    pub(crate) fn parse(file: &'a [u8]) -> Result<Self, CompileError> {
        let (header, architecture) = header(file)?;
        let mut image = Self::new(file, architecture);
        if header.e_type(LE) != elf::ET_EXEC && header.e_type(LE) != elf::ET_DYN {
            return Ok(image);
        }
        let segments = header.program_headers(LE, file).unwrap_or_default();
        for segment in segments.iter().filter(|segment| segment.p_type(LE) == elf::PT_LOAD) {
            let start = segment.p_vaddr(LE);
            let range = start..start.saturating_add(segment.p_memsz(LE));
            if segment.p_flags(LE).contains(elf::PF_X) {
                image.first_code = Some(image.first_code.map_or(start, |first| first.min(start)));
            }
            image.loaded.push(range);
        }
        let sections = header.sections(LE, file).unwrap_or_default();
        (image.segments, image.sections) = (segments, sections);
        let mut intake = Intake::of(file);
        let mut is_named = false;
        for section in sections.iter() {
            let mut add =
                |kind, is_old| image.add(section.sh_addr(LE), intake.section(section, kind, is_old));
            match sections.section_name(LE, section).unwrap_or_default() {
                b".eh_frame" => {
                    is_named = true;
                    add(SectionKind::EhFrame, false);
                }
                b".debug_frame" => add(SectionKind::DebugFrame, false),
                b".zdebug_frame" => add(SectionKind::DebugFrame, true),
                b".text" => image.text = Some(section.sh_addr(LE)),
                b".got" => image.got = Some(section.sh_addr(LE)),
                _ => {}
            }
        }
        let header = segments.iter().find(|segment| segment.p_type(LE) == elf::PT_GNU_EH_FRAME);
        // Split debug files have the section without its bytes, and program headers that lead nowhere.
        if let Some(header) = header.filter(|header| !is_named && header.p_filesz(LE) > 0) {
            let section = eh_frame_of_header(file, segments, header).ok_or(SkipReason::Unreadable);
            image.add(header.p_vaddr(LE), section.map(Some));
        }
        // What the running program unwinds by comes first.
        image.frames.sort_by_key(|section| section.kind == SectionKind::DebugFrame);
        Ok(image)
    }

    fn add(&mut self, address: u64, section: Result<Option<FrameSection<'a>>, SkipReason>) {
        match section {
            Ok(section) => self.frames.extend(section),
            Err(reason) => self.skipped.push(skipped_section(address, reason)),
        }
    }

    /// Addresses with the bytes that are loaded there and whether they are (writable, executable): sections, or
    /// segments where there are none. Skeletons and split debug files have program headers that
    /// lead to other bytes, and sections that say so.
    fn loaded_bytes(&self) -> impl Iterator<Item = (u64, &'a [u8], (bool, bool))> + Clone + '_ {
        let sections = self.sections.iter().filter_map(|section| {
            let flags = section.sh_flags(LE);
            let bytes: &'a [u8] = section.data(LE, self.file).ok()?;
            let kind = (flags.contains(elf::SHF_WRITE), flags.contains(elf::SHF_EXECINSTR));
            flags.contains(elf::SHF_ALLOC).then_some((section.sh_addr(LE), bytes, kind))
        });
        let segments = self.segments.iter().filter(|_| self.sections.is_empty()).filter_map(|segment| {
            let flags = segment.p_flags(LE);
            let bytes: &'a [u8] = segment.data(LE, self.file).ok()?;
            let kind = (flags.contains(elf::PF_W), flags.contains(elf::PF_X));
            (segment.p_type(LE) == elf::PT_LOAD).then_some((segment.p_vaddr(LE), bytes, kind))
        });
        sections.chain(segments)
    }

    /// The 8 bytes of the file that are loaded at `address`.
    pub(crate) fn word_at(&self, address: u64) -> Option<u64> {
        self.loaded_bytes().find_map(|(start, bytes, _)| {
            let skip = usize::try_from(address.checked_sub(start)?).ok()?;
            Some(u64::from_le_bytes(*bytes.get(skip..)?.first_chunk()?))
        })
    }

    /// What the Go linker wrote of an image's functions.
    pub(crate) fn go_table(&self) -> Option<GoTable<'a>> {
        let named = |name: &[u8]| {
            self.sections
                .iter()
                .find(|section| self.sections.section_name(LE, section).is_ok_and(|it| it == name))
        };
        let (address, table) = match named(b".gopclntab").or_else(|| named(b".data.rel.ro.gopclntab")) {
            Some(section) => (section.sh_addr(LE), section.data(LE, self.file).ok()?),
            // Where nothing has a name, by its first bytes.
            None if self.sections.is_empty() => self.loaded_bytes().find_map(|(start, bytes, _)| {
                find_table(bytes).map(|at| (start + at as u64, &bytes[at..]))
            })?,
            None => return None,
        };
        if table.is_empty() {
            return None;
        }
        let code = (self.loaded_bytes())
            .filter(|(_, bytes, (_, is_code))| *is_code && !bytes.is_empty())
            .map(|(address, bytes, _)| GoCode { address, bytes })
            .collect();
        let words =
            self.loaded_bytes().filter(|(_, _, (is_data, _))| *is_data).flat_map(|(start, bytes, _)| {
                // Aligned words, as the start of a section need not be.
                let skip = start.wrapping_neg() as usize % 8;
                let (words, _) = bytes.get(skip..).unwrap_or_default().as_chunks();
                (start + skip as u64..).step_by(8).zip(words.iter().map(|word| u64::from_le_bytes(*word)))
            });
        // By name: the linker's own is not listed as dynamic by every version.
        let relocations = [named(b".rela"), named(b".rela.dyn")].into_iter().flatten().flat_map(|section| {
            let entries = section.data_as_array::<Rela64<LittleEndian>, _>(LE, self.file).unwrap_or_default();
            let relative =
                |entry: &&Rela64<LittleEndian>| entry.r_info.get(LE) == u64::from(elf::R_X86_64_RELATIVE.0);
            entries
                .iter()
                .filter(relative)
                .map(|entry| (entry.r_offset.get(LE), entry.r_addend.get(LE) as u64))
        });
        let text = text_start(table, address, words.chain(relocations));
        Some(GoTable { table, text, code })
    }

    /// Whether address 0 is loaded as code.
    pub(crate) fn has_code_at_zero(&self) -> bool {
        self.first_code == Some(0)
    }

    /// Whether one table reaches the code at `range`, and it is loaded as far as program headers say: a
    /// segment ends with its last page. The row that ends the coverage needs a page of the table as
    /// well; it is at the end of `range`, or at that of its block if the block is overfull.
    pub(crate) fn reaches(&self, range: &Range<u64>) -> bool {
        let first = self.first_code.unwrap_or(0) >> PAGE_SHIFT << PAGE_SHIFT;
        // The last page of the address space ends where no address can say.
        let last_page = u64::MAX >> PAGE_SHIFT << PAGE_SHIFT;
        let reach = first.saturating_add(u64::from(MAX_PAGES) << PAGE_SHIFT).min(last_page);
        let loads = |load: &Range<u64>| {
            load.contains(&range.start) && range.end <= load.end.saturating_add(MEMORY_PAGE_BYTES - 1)
        };
        range.start >= first
            && range.end < reach - (1 << BLOCK_SHIFT)
            && (self.loaded.is_empty() || self.loaded.iter().any(loads))
    }
}

/// A Go function table and what it is read with.
pub(crate) struct GoTable<'a> {
    table: &'a [u8],
    text: Option<u64>,
    code: Vec<GoCode<'a>>,
}

impl GoTable<'_> {
    /// As the decoder takes it.
    pub(crate) fn image(&self) -> GoImage<'_> {
        GoImage { table: self.table, text: self.text, code: &self.code }
    }
}

/// Takes sections as long as there is room.
struct Intake<'a> {
    file: &'a [u8],
    budget_bytes: u64,
    /// Ranges of the file that have been taken.
    taken: Vec<Range<u64>>,
}

impl<'a> Intake<'a> {
    fn of(file: &'a [u8]) -> Self {
        let by_size = (file.len() as u64).saturating_mul(EH_FRAME_BYTES_PER_FILE_BYTE);
        let budget_bytes = by_size.clamp(MIN_EH_FRAME_BUDGET_BYTES, MAX_EH_FRAME_BYTES);
        Self { file, budget_bytes, taken: Vec::new() }
    }

    /// `None` for a section without bytes, as in split debug files. With `is_old`, one that is compressed as
    /// `.zdebug_*` sections are: "ZLIB", the size in 8 big-endian bytes, and the stream.
    fn section(
        &mut self,
        section: &SectionRow,
        kind: SectionKind,
        is_old: bool,
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
            Ok(None) if is_old => {
                let data = self.file.read_bytes_at(file_offset, stored_bytes);
                let data = data.map_err(|()| SkipReason::Truncated)?;
                let (Some(b"ZLIB"), Some(size)) =
                    (data.get(..4), data.get(4..12).and_then(|size| size.first_chunk()))
                else {
                    return Err(SkipReason::Unreadable);
                };
                let uncompressed_size = u64::from_be_bytes(*size);
                let format = CompressionFormat::Zlib;
                let data = CompressedData { format, data: &data[12..], uncompressed_size };
                (Stored::Compressed(data), uncompressed_size, uncompressed_size)
            }
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
        // `.debug_frame` is not loaded: nothing in it counts from where it is.
        let address = if kind == SectionKind::EhFrame { section.sh_addr(LE) } else { 0 };
        Ok(Some(FrameSection { kind, address, stated_bytes: Some(stated_bytes), stored }))
    }
}

/// Follows `PT_GNU_EH_FRAME`. The size of `.eh_frame` is not stated; its terminator ends it.
fn eh_frame_of_header<'a>(
    file: &'a [u8],
    segments: &[Segment],
    segment: &Segment,
) -> Option<FrameSection<'a>> {
    let bases = BaseAddresses::default().set_eh_frame_hdr(segment.p_vaddr(LE));
    let data = segment.data(LE, file).ok()?;
    let header = EhFrameHdr::new(data, GimliLittleEndian).parse(&bases, 8).ok()?;
    let Pointer::Direct(address) = header.eh_frame_ptr() else { return None };
    let (skip, load) =
        segments.iter().filter(|segment| segment.p_type(LE) == elf::PT_LOAD).find_map(|load| {
            let skip = address.checked_sub(load.p_vaddr(LE))?;
            (skip < load.p_filesz(LE)).then_some((skip, load))
        })?;
    let file_offset = load.p_offset(LE).checked_add(skip)?;
    let end = load.p_offset(LE).saturating_add(load.p_filesz(LE)).min(file.len() as u64);
    let data = file.read_bytes_at(file_offset, end.checked_sub(file_offset)?.min(MAX_EH_FRAME_BYTES)).ok()?;
    Some(FrameSection {
        kind: SectionKind::EhFrame,
        address,
        stated_bytes: None,
        stored: Stored::Plain(data),
    })
}

/// The GNU build-ID of an ELF file of any class, byte order and machine: from the notes that program
/// headers name, else from those of sections.
pub fn build_id_of(elf: &[u8]) -> Option<BuildId> {
    fn of<H: FileHeader<Endian = object::Endianness>>(file: &[u8]) -> Option<BuildId> {
        let header = H::parse(file).ok()?;
        let endian = header.endian().ok()?;
        let segments = header.program_headers(endian, file).unwrap_or_default();
        let of_segments = segments.iter().filter_map(|segment| segment.notes(endian, file).ok().flatten());
        let sections = header.sections(endian, file).unwrap_or_default();
        let of_sections = sections.iter().filter_map(|section| section.notes(endian, file).ok().flatten());
        of_segments.chain(of_sections).find_map(|mut notes| {
            while let Ok(Some(note)) = notes.next() {
                if note.name() == elf::ELF_NOTE_GNU && note.n_type(endian) == elf::NT_GNU_BUILD_ID {
                    return BuildId::new(note.desc()).ok();
                }
            }
            None
        })
    }
    of::<FileHeader64<object::Endianness>>(elf).or_else(|| of::<elf::FileHeader32<object::Endianness>>(elf))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where the reach of an image with code at `first` ends, which `end` is just short of or at.
    #[track_caller]
    fn check_reach(first: u64, end: u64) {
        let image = Image { first_code: Some(first), ..Image::new(&[], Architecture::X86_64) };
        assert!(image.reaches(&(first..end - 1)), "{first:#x}..{end:#x}");
        assert!(!image.reaches(&(first..end)), "{first:#x}..{end:#x}");
    }

    #[test]
    fn the_row_behind_the_last_fde_has_a_page() {
        check_reach(0, (1 << 32) - 256);
        check_reach(0x40_0123, 0x40_0000 + (1 << 32) - 256);
        // The kernel's half: the last page of the address space is out of reach.
        check_reach(0xffff_ffff_8000_0000, 0xffff_ffff_fffe_ff00);
    }
}
