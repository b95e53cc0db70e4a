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
//!
//! Each step a module: `section`, which sections are read and how far; `relocation`; `address_space`, what lies at
//! which address; `functions`, where functions start; `go_table`; `build_id`.

mod address_space;
mod build_id;
mod functions;
mod go_table;
mod relocation;
mod section;

use std::cell::OnceCell;
use std::ops::Range;
use std::rc::Rc;

use gimli::{BaseAddresses, EhFrameHdr, LittleEndian as GimliLittleEndian, Pointer};
use object::elf::{self, FileHeader64, ProgramHeader64, SectionHeader64};
use object::read::elf::{FileHeader, ProgramHeader, SectionTable, SymbolTable};
use object::{LittleEndian, ReadRef};
use windlass_schema::Architecture;
use windlass_schema::table::TableError;

pub use self::build_id::build_id_of;
use self::relocation::{Layout, Relocations};
pub(crate) use self::section::{FrameSection, SectionKind};
use self::section::{Intake, MAX_FRAME_BYTES, Naming, Stored, skipped_section};
use crate::report::{SkipReason, SkippedFde};

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
    /// All `.eh_frame` first: what the running program unwinds by.
    pub(crate) frames: Vec<FrameSection<'a>>,
    /// Sections that are there but are not read.
    pub(crate) skipped: Vec<SkippedFde>,
    /// Address of `.text`, which text-relative pointers count from.
    pub(crate) text: Option<u64>,
    /// Address of `.got`, which data-relative pointers count from.
    pub(crate) got: Option<u64>,
    /// Address at which the process starts.
    entry: u64,
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
            frames: Vec::new(),
            skipped: Vec::new(),
            text: None,
            got: None,
            entry: 0,
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
        let is_relocatable = match header.e_type(LE) {
            elf::ET_EXEC | elf::ET_DYN => false,
            elf::ET_REL => true,
            _ => return Ok(image),
        };
        image.entry = header.e_entry(LE);
        image.is_dynamic = header.e_type(LE) == elf::ET_DYN;
        image.sections = header.sections(LE, file).unwrap_or_default();
        if is_relocatable {
            image.layout = Some(Rc::new(Layout::of(&image.sections)));
        } else {
            image.segments = header.program_headers(LE, file).unwrap_or_default();
        }
        image.find_code();
        image.find_frames();
        Ok(image)
    }

    /// Whether the file is not linked yet: a kernel module or an object file.
    pub(crate) fn is_relocatable(&self) -> bool {
        self.layout.is_some()
    }

    /// Finds the sections of call frame information.
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

    fn add(&mut self, address: u64, section: Result<Option<FrameSection<'a>>, SkipReason>) {
        match section {
            Ok(section) => self.frames.extend(section),
            Err(reason) => self.skipped.push(skipped_section(address, reason)),
        }
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
