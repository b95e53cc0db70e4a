//! Where an ELF image keeps its call frame information, and its build-ID.
//!
//! # Why this shape
//! Section headers come last in a file and are the first to go (`sstrip`, a cut download), while what the
//! running program unwinds by is named by a program header. So sections are read if they can be, and
//! `PT_GNU_EH_FRAME` leads to `.eh_frame` where they cannot; a section that reaches past the end of the
//! file is read as far as it goes. Only headers decide whether a file is supported at all.

use std::borrow::Cow;
use std::ops::Range;

use gimli::{BaseAddresses, EhFrameHdr, LittleEndian as GimliLittleEndian, Pointer};
use object::elf::{self, FileHeader64, ProgramHeader64, SectionHeader64};
use object::read::elf::{CompressionHeader, FileHeader, ProgramHeader, SectionHeader};
use object::read::{CompressedFileRange, CompressionFormat};
use object::{LittleEndian, ReadRef};
use windlass_schema::BuildId;
use windlass_schema::page::PAGE_SHIFT;
use windlass_schema::table::MAX_PAGES;

/// Largest `.eh_frame` after decompression, in bytes. The largest of a Debian developer's machine has 15 MB;
/// compiling takes memory in proportion.
const MAX_EH_FRAME_BYTES: u64 = 512 << 20;

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
    /// An instruction set other than x86-64.
    #[error("ELF machine {0}, expected 62 (x86-64)")]
    Machine(u16),
}

/// One `.eh_frame`.
pub(crate) struct EhFrameSection<'a> {
    /// Image address of its first byte.
    pub(crate) address: u64,
    /// Its bytes, as many as the file has.
    pub(crate) data: Cow<'a, [u8]>,
    /// Size that the headers state, if they do.
    pub(crate) stated_bytes: Option<u64>,
}

/// What unwinding needs of an image.
#[derive(Default)]
pub(crate) struct Image<'a> {
    pub(crate) eh_frames: Vec<EhFrameSection<'a>>,
    /// Address of `.text`, which text-relative pointers count from.
    pub(crate) text: Option<u64>,
    /// Address of `.got`, which data-relative pointers count from.
    pub(crate) got: Option<u64>,
    /// Addresses that are loaded.
    loaded: Vec<Range<u64>>,
    /// First address that is loaded as code.
    first_code: Option<u64>,
}

type Header = FileHeader64<LittleEndian>;
type Segment = ProgramHeader64<LittleEndian>;
type SectionRow = SectionHeader64<LittleEndian>;
const LE: LittleEndian = LittleEndian;

/// The header of a supported file.
fn header(file: &[u8]) -> Result<&Header, CompileError> {
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
    if machine != 62 {
        return Err(CompileError::Machine(machine));
    }
    Header::parse(file).map_err(|_| CompileError::NotElf)
}

impl<'a> Image<'a> {
    /// Finds the call frame information of `file`. An image of another type than `ET_EXEC` and `ET_DYN`
    /// has none that is of use: its addresses are not final.
    pub(crate) fn parse(file: &'a [u8]) -> Result<Self, CompileError> {
        let header = header(file)?;
        let mut image = Self::default();
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
        let Ok(sections) = header.sections(LE, file) else {
            image.eh_frames.extend(eh_frame_of_header(file, segments));
            return Ok(image);
        };
        for section in sections.iter() {
            match sections.section_name(LE, section).unwrap_or_default() {
                b".eh_frame" => image.eh_frames.extend(eh_frame_of_section(file, section)),
                b".text" => image.text = Some(section.sh_addr(LE)),
                b".got" => image.got = Some(section.sh_addr(LE)),
                _ => {}
            }
        }
        if sections.is_empty() {
            image.eh_frames.extend(eh_frame_of_header(file, segments));
        }
        Ok(image)
    }

    /// Whether address 0 is loaded as code.
    pub(crate) fn has_code_at_zero(&self) -> bool {
        self.first_code == Some(0)
    }

    /// Whether one table reaches the code at `range`, and it is loaded as far as program headers say: a
    /// segment ends with its last page.
    pub(crate) fn reaches(&self, range: &Range<u64>) -> bool {
        let first = self.first_code.unwrap_or(0) >> PAGE_SHIFT << PAGE_SHIFT;
        let reach = first.saturating_add(u64::from(MAX_PAGES) << PAGE_SHIFT);
        let loads = |load: &Range<u64>| {
            load.contains(&range.start) && range.end <= load.end.saturating_add(MEMORY_PAGE_BYTES - 1)
        };
        range.start >= first
            && range.end <= reach
            && (self.loaded.is_empty() || self.loaded.iter().any(loads))
    }
}

/// `None` for a section without bytes, as in split debug files.
fn eh_frame_of_section<'a>(file: &'a [u8], section: &SectionRow) -> Option<EhFrameSection<'a>> {
    let (file_offset, stored_bytes) = section.file_range(LE)?;
    let address = section.sh_addr(LE);
    match section.compression(LE, file) {
        Ok(None) => {
            let start = usize::try_from(file_offset).unwrap_or(usize::MAX).min(file.len());
            let len = usize::try_from(stored_bytes.min(MAX_EH_FRAME_BYTES)).unwrap_or(usize::MAX);
            let data = &file[start..start.saturating_add(len).min(file.len())];
            Some(EhFrameSection { address, data: data.into(), stated_bytes: Some(stored_bytes) })
        }
        Ok(Some((header, offset, compressed_size))) => {
            let uncompressed_size = header.ch_size(LE);
            let data = compressed(file, header.ch_type(LE), offset, compressed_size, uncompressed_size);
            let data = data.unwrap_or_default();
            Some(EhFrameSection { address, data, stated_bytes: Some(uncompressed_size) })
        }
        Err(_) => {
            let data = Cow::default();
            Some(EhFrameSection { address, data, stated_bytes: Some(stored_bytes) })
        }
    }
}

fn compressed(
    file: &[u8],
    kind: elf::CompressionType,
    offset: u64,
    compressed_size: u64,
    uncompressed_size: u64,
) -> Option<Cow<'_, [u8]>> {
    let format = match kind {
        elf::ELFCOMPRESS_ZLIB => CompressionFormat::Zlib,
        elf::ELFCOMPRESS_ZSTD => CompressionFormat::Zstandard,
        _ => return None,
    };
    if uncompressed_size > MAX_EH_FRAME_BYTES {
        return None;
    }
    CompressedFileRange { format, offset, compressed_size, uncompressed_size }
        .data(file)
        .and_then(|data| data.decompress())
        .ok()
}

/// Follows `PT_GNU_EH_FRAME`. The size of `.eh_frame` is not stated; its terminator ends it.
fn eh_frame_of_header<'a>(file: &'a [u8], segments: &[Segment]) -> Option<EhFrameSection<'a>> {
    let segment = segments.iter().find(|segment| segment.p_type(LE) == elf::PT_GNU_EH_FRAME)?;
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
    Some(EhFrameSection { address, data: data.into(), stated_bytes: None })
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
