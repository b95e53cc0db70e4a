//! Where an ELF image keeps its call frame information, and its build-ID.
//!
//! # Why this shape
//! Section headers come last in a file and are the first to go (`sstrip`, a cut download), while what the
//! running program unwinds by is named by a program header. So sections are read if they can be, and
//! `PT_GNU_EH_FRAME` leads to `.eh_frame` where no section has that name; a section that reaches past the
//! end of the file is read as far as it goes. Only headers decide whether a file is supported at all.
//!
//! Files that are not linked yet have sections without addresses; the `relocation` module says where they are taken
//! to be. The rest, from [`FrameSection`] on, does not see the difference.

mod build_id;
mod relocation;
mod section;
#[cfg(test)]
mod tests;

use std::cell::OnceCell;
use std::ops::Range;
use std::rc::Rc;

use gimli::{BaseAddresses, EhFrameHdr, LittleEndian as GimliLittleEndian, Pointer};
use object::elf::{self, FileHeader64, ProgramHeader64, Rela64, SectionHeader64};
use object::read::SectionIndex;
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader, SectionTable, SymbolTable};
use object::{LittleEndian, ReadRef};
use windlass_schema::Architecture;
use windlass_schema::page::{BLOCK_SHIFT, PAGE_SHIFT};
use windlass_schema::table::{MAX_PAGES, TableError};

pub use self::build_id::build_id_of;
use self::relocation::{Layout, Relocations};
pub(crate) use self::section::{FrameSection, SectionKind};
use self::section::{Intake, MAX_FRAME_BYTES, Naming, Stored, skipped_section};
use crate::go::{GoCode, GoImage, find_table, text_start};
use crate::report::{SkipReason, SkippedFde};

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

/// What unwinding needs of an image.
pub(crate) struct Image<'a> {
    pub(crate) architecture: Architecture,
    /// Whether the file is not linked yet: a kernel module or an object file.
    pub(crate) is_relocatable: bool,
    /// Where the program begins; 0 if it does not.
    pub(crate) entry: u64,
    /// All `.eh_frame` first: what the running program unwinds by.
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
    /// Where sections are that have no address of their own.
    layout: Option<Rc<Layout>>,
    /// Whether a dynamic linker may change words that are writable.
    is_dynamic: bool,
    /// Addresses that may be code, sorted: those of segments, or of sections of code in a relocatable file.
    loaded: Vec<Range<u64>>,
    /// First address that is loaded as code.
    first_code: Option<u64>,
    /// What [`Self::word_at`] looks into, sorted.
    words: OnceCell<Vec<(u64, &'a [u8])>>,
}

type Header = FileHeader64<LittleEndian>;
type Segment = ProgramHeader64<LittleEndian>;
type SectionRow = SectionHeader64<LittleEndian>;
type Sections<'a> = SectionTable<'a, Header>;
type Symbols<'a> = SymbolTable<'a, Header>;
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
            is_relocatable: false,
            entry: 0,
            frames: Vec::new(),
            skipped: Vec::new(),
            text: None,
            got: None,
            file,
            segments: &[],
            sections: SectionTable::default(),
            layout: None,
            is_dynamic: false,
            loaded: Vec::new(),
            first_code: None,
            words: OnceCell::new(),
        }
    }

    /// Finds the call frame information of `file`. An image of another type than `ET_EXEC`, `ET_DYN` and `ET_REL`
    /// has none.
    pub(crate) fn parse(file: &'a [u8]) -> Result<Self, CompileError> {
        let (header, architecture) = header(file)?;
        let mut image = Self::new(file, architecture);
        (image.is_relocatable, image.is_dynamic) = match header.e_type(LE) {
            elf::ET_EXEC => (false, false),
            elf::ET_DYN => (false, true),
            elf::ET_REL => (true, false),
            _ => return Ok(image),
        };
        image.entry = header.e_entry(LE);
        image.sections = header.sections(LE, file).unwrap_or_default();
        if image.is_relocatable {
            image.layout = Some(Rc::new(Layout::of(&image.sections)));
        } else {
            image.segments = header.program_headers(LE, file).unwrap_or_default();
        }
        image.find_code();
        image.find_frames();
        Ok(image)
    }

    /// Finds what is loaded: by segments, or by the sections of a file that has none yet.
    fn find_code(&mut self) {
        let mut loaded: Vec<(Range<u64>, bool)> = if self.is_relocatable {
            self.code().map(|(range, _)| (range, true)).collect()
        } else {
            let loads = self.segments.iter().filter(|segment| segment.p_type(LE) == elf::PT_LOAD);
            let range = |segment: &Segment| {
                let start = segment.p_vaddr(LE);
                start..start.saturating_add(segment.p_memsz(LE))
            };
            loads.map(|load| (range(load), load.p_flags(LE).contains(elf::PF_X))).collect()
        };
        self.first_code = loaded.iter().filter(|(_, is_code)| *is_code).map(|(range, _)| range.start).min();
        loaded.retain(|(range, _)| !range.is_empty());
        loaded.sort_by_key(|(range, _)| range.start);
        self.loaded = loaded.into_iter().map(|(range, _)| range).collect();
    }

    fn find_frames(&mut self) {
        let file = self.file;
        let mut intake = Intake::of(file);
        let mut is_named = false;
        let sections = self.sections;
        for (number, section) in sections.enumerate() {
            let address = self.address_of(number, section).unwrap_or(0);
            let (kind, naming) = match sections.section_name(LE, section).unwrap_or_default() {
                b".eh_frame" => (SectionKind::EhFrame, Naming::Plain),
                b".debug_frame" => (SectionKind::DebugFrame, Naming::Plain),
                b".zdebug_frame" => (SectionKind::DebugFrame, Naming::Zdebug),
                name => {
                    match name {
                        b".text" => self.text = Some(address),
                        b".got" => self.got = Some(address),
                        _ => {}
                    }
                    continue;
                }
            };
            is_named |= kind == SectionKind::EhFrame;
            // `.debug_frame` is not loaded: nothing in it counts from where it is.
            let address = if kind == SectionKind::EhFrame { address } else { 0 };
            let mut found = intake.section(section, kind, naming, address);
            if let (Ok(Some(found)), Some(layout)) = (&mut found, &self.layout) {
                let (architecture, layout) = (self.architecture, Rc::clone(layout));
                found.relocations = Some(Relocations::of(architecture, layout, (file, &sections), number));
            }
            self.add(address, found);
        }
        let header = self.segments.iter().find(|segment| segment.p_type(LE) == elf::PT_GNU_EH_FRAME);
        // Split debug files have the section without its bytes, and program headers that lead nowhere.
        if let Some(header) = header.filter(|header| !is_named && header.p_filesz(LE) > 0) {
            let section = eh_frame_of_header(file, self.segments, header).ok_or(SkipReason::Unreadable);
            self.add(header.p_vaddr(LE), section.map(Some));
        }
        self.frames.sort_by_key(|section| section.kind == SectionKind::DebugFrame);
    }

    /// Where a section is loaded.
    fn address_of(&self, number: SectionIndex, section: &SectionRow) -> Option<u64> {
        match &self.layout {
            Some(layout) => layout.address(number),
            None => Some(section.sh_addr(LE)),
        }
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

    /// Ranges of code, and their bytes where the file has them: sections, or segments where there are none.
    pub(crate) fn code(&self) -> impl Iterator<Item = (Range<u64>, Option<&'a [u8]>)> + '_ {
        let range = |start: u64, len: u64| start..start.saturating_add(len);
        let whole = |range: &Range<u64>, bytes: &'a [u8]| {
            (bytes.len() as u64 == range.end - range.start).then_some(bytes)
        };
        let sections = self.sections.enumerate().filter_map(move |(number, section)| {
            let flags = section.sh_flags(LE);
            let is_code = flags.contains(elf::SHF_ALLOC) && flags.contains(elf::SHF_EXECINSTR);
            let range = range(self.address_of(number, section).filter(|_| is_code)?, section.sh_size(LE));
            let bytes = section.data(LE, self.file).ok().and_then(|bytes| whole(&range, bytes));
            Some((range, bytes))
        });
        let segments = self.segments.iter().filter(|_| self.sections.is_empty()).filter_map(move |segment| {
            let is_code = segment.p_type(LE) == elf::PT_LOAD && segment.p_flags(LE).contains(elf::PF_X);
            let range = range(segment.p_vaddr(LE), segment.p_filesz(LE));
            let bytes = segment.data(LE, self.file).ok().and_then(|bytes| whole(&range, bytes));
            is_code.then_some((range, bytes))
        });
        sections.chain(segments)
    }

    /// Address and bytes of the first section of this name, if it is not compressed.
    pub(crate) fn section_named(&self, name: &[u8]) -> Option<(u64, &'a [u8])> {
        let is_named =
            |section: &SectionRow| self.sections.section_name(LE, section).is_ok_and(|it| it == name);
        let (number, section) = self.sections.enumerate().find(|(_, section)| is_named(section))?;
        if section.sh_flags(LE).contains(elf::SHF_COMPRESSED) {
            return None;
        }
        Some((self.address_of(number, section).unwrap_or(0), section.data(LE, self.file).ok()?))
    }

    /// The 8 bytes of the file that are loaded at `address`: none where a linker or a dynamic linker has a say
    /// in them.
    pub(crate) fn word_at(&self, address: u64) -> Option<u64> {
        if self.is_relocatable {
            return None;
        }
        let words = self.words.get_or_init(|| {
            let is_final = |is_writable: bool| !(self.is_dynamic && is_writable);
            let words = self.loaded_bytes().filter(|(_, bytes, _)| !bytes.is_empty());
            let words = words.filter(|(_, _, (is_writable, _))| is_final(*is_writable));
            let mut words: Vec<_> = words.map(|(start, bytes, _)| (start, bytes)).collect();
            words.sort_by_key(|(start, _)| *start);
            words
        });
        let behind = words.partition_point(|(start, _)| *start <= address);
        let (start, bytes) = words[..behind].last()?;
        let skip = usize::try_from(address - start).ok()?;
        Some(u64::from_le_bytes(*bytes.get(skip..)?.first_chunk()?))
    }

    /// What the Go linker wrote of an image's functions.
    pub(crate) fn go_table(&self) -> Option<GoTable<'a>> {
        if self.is_relocatable {
            return None;
        }
        let named = |name: &[u8]| {
            self.sections
                .iter()
                .find(|section| self.sections.section_name(LE, section).is_ok_and(|it| it == name))
        };
        let in_section = [b".gopclntab".as_slice(), b".data.rel.ro.gopclntab"];
        let (address, table) = match in_section.into_iter().find_map(|name| self.section_named(name)) {
            Some(table) => table,
            // Where nothing has a name, by its first bytes.
            None if self.sections.is_empty() => self.loaded_bytes().find_map(|(start, bytes, _)| {
                find_table(bytes).map(|at| (start + at as u64, &bytes[at..]))
            })?,
            None => return None,
        };
        if table.is_empty() {
            return None;
        }
        let code = (self.code())
            .filter_map(|(range, bytes)| Some(GoCode { address: range.start, bytes: bytes? }))
            .filter(|code| !code.bytes.is_empty())
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

    /// Whether one table reaches the code at `range`, and it is loaded as far as headers say: a segment ends
    /// with its last page, a section of a relocatable file where it ends. The row that ends the coverage
    /// needs a page of the table as well; it is at the end of `range`, or at that of its block if the
    /// block is overfull.
    pub(crate) fn reaches(&self, range: &Range<u64>) -> bool {
        let first = self.first_code.unwrap_or(0) >> PAGE_SHIFT << PAGE_SHIFT;
        // The last page of the address space ends where no address can say.
        let last_page = u64::MAX >> PAGE_SHIFT << PAGE_SHIFT;
        let reach = first.saturating_add(u64::from(MAX_PAGES) << PAGE_SHIFT).min(last_page);
        let is_in_reach = range.start >= first && range.end < reach - (1 << BLOCK_SHIFT);
        is_in_reach && self.loads(range)
    }

    /// Whether headers say that all of `range` is loaded, or say nothing at all.
    fn loads(&self, range: &Range<u64>) -> bool {
        if self.loaded.is_empty() {
            return !self.is_relocatable;
        }
        // Loadable segments do not overlap (gABI, chapter 5): only the last that begins before it can hold it.
        let behind = self.loaded.partition_point(|load| load.start <= range.start);
        let slack = if self.is_relocatable { 0 } else { MEMORY_PAGE_BYTES - 1 };
        self.loaded[..behind]
            .last()
            .is_some_and(|load| load.contains(&range.start) && range.end <= load.end.saturating_add(slack))
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
    let data = file.read_bytes_at(file_offset, end.checked_sub(file_offset)?.min(MAX_FRAME_BYTES)).ok()?;
    Some(FrameSection {
        kind: SectionKind::EhFrame,
        address,
        stated_bytes: None,
        stored: Stored::Plain(data),
        relocations: None,
    })
}
