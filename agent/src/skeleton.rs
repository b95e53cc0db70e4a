//! What of an image does the service need to compile its unwind table?
//!
//! Other agents compile tables themselves (2.3 s of CPU and 128 MiB of heap for one ClickHouse,
//! opentelemetry-ebpf-profiler #1009), or upload the whole binary, code included. A skeleton is the
//! image without its code and data: a valid ELF file of the same type, with the same program headers
//! and sections in the same order at the same addresses, in which only notes, unwind sections, symbol
//! tables and the links to debug files have contents. And code that nothing else tells the frames of
//! ([`code_without_cfi`](crate::code_without_cfi)), with the arrays of functions that the loader calls.
//!
//! ```text
//! ELF header
//! program headers        p_offset as in the image, so that file offsets still turn into addresses;
//!                        only PT_NOTE and PT_GNU_EH_FRAME point at their kept bytes. Segments that
//!                        readers would follow to bytes that are gone (PT_DYNAMIC, PT_INTERP) are PT_NULL.
//! kept bytes             each part congruent to its old place modulo 64
//! identity note          only if the image has no GNU build-ID: its file hash as one, because the hash
//!                        of the skeleton would be another
//! section names
//! section headers        SHT_NOBITS with the size in memory where the contents were left out; behind them one of its own
//!                        for each part of code that is kept, and for the relocations of the arrays
//! ```
//! An image without section headers (`sstrip`) gets some: `.note` for each `PT_NOTE`, `.code` for each segment of code, `.eh_frame_hdr`
//! from `PT_GNU_EH_FRAME`, `.eh_frame` from the pointer in it. Its dynamic symbols are left out.
//!
//! A skeleton is laid out first and then written from beginning to end, so that nobody needs to hold it as a whole
//! ([`packed_skeleton`](crate::packed_skeleton)).

mod found_sections;
mod kept_sections;

use std::io::{self, Write};
use std::ops::Range;

use object::LittleEndian as LE;
use object::elf;
use object::pod::{bytes_of, bytes_of_slice};
use object::read::ReadRef;
use object::read::elf::{FileHeader as _, ProgramHeader as _, SectionHeader as _};
use windlass_schema::BuildId;

use found_sections::unwind_sections;
use kept_sections::{GO_TABLE, GO_TABLE_OF_PIE, is_kept, is_symbols};

use crate::code_without_cfi::{Code, KeptCode, array_relocations};
use crate::coroutine_code::makecontext;
use crate::image::{
    FileHeader, ImageError, ProgramHeader, SectionHeader, file_hash, file_header, gnu_build_id,
    program_headers, section_headers,
};
use crate::image_file::CopyBytes;

/// Largest skeleton in bytes. That of an unstripped Chromium, symbol names included, has about 200 MiB, that of a Go program of
/// 700 MB 180.
pub const MAX_SKELETON_BYTES: u64 = 256 * 1024 * 1024;
/// Largest section name table read in bytes; they have some hundreds.
const MAX_SECTION_NAMES_BYTES: u64 = 1024 * 1024;
/// Kept bytes keep their place modulo this, the largest alignment that a kept section asks for.
const PART_ALIGNMENT: u64 = 64;

/// Name of a section that holds a part of another, which has none of its bytes.
const CODE_SECTION: &[u8] = b".text.without_cfi";
/// Name of a section that holds those relocations that fill arrays of functions to call.
const RELOCATION_SECTION: &[u8] = b".rela.arrays";
/// Why there is no skeleton of an image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SkeletonError {
    /// It is no image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// It is too large.
    #[error("skeleton of {bytes} bytes, at most {MAX_SKELETON_BYTES} are sent")]
    Size {
        /// What it would have.
        bytes: u64,
    },
    /// It is too large even packed.
    #[error(
        "skeleton of {bytes} bytes has more than {limit} when it is compressed, which are the most that are held in memory"
    )]
    Packed {
        /// What it has unpacked.
        bytes: u64,
        /// What it may have packed.
        limit: usize,
    },
    /// The file shrank or could not be read.
    #[error("bytes {0:#x} to {1:#x} of the image cannot be read")]
    Read(u64, u64),
}

impl SkeletonError {
    /// Whether it is its size that is wrong, which stays as it is.
    pub(crate) fn is_of_size(&self) -> bool {
        matches!(self, Self::Size { .. } | Self::Packed { .. })
    }
}

/// What of an image goes into its skeleton, beside what always does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    /// All code: for the vDSO, which is no secret, has two pages of it, and on aarch64 the trampoline of signals without CFI
    /// (arch/arm64/kernel/vdso/sigreturn.S), known by its instructions alone.
    pub(crate) code: bool,
    /// The symbol table that is not loaded, with its names: often most of the bytes, and no table needs it.
    pub(crate) symbols: bool,
}

/// The skeleton of the image `elf`, symbols included.
pub fn skeleton<'data, R: CopyBytes<'data>>(elf: R) -> Result<Vec<u8>, SkeletonError> {
    let skeleton = Skeleton::new(elf, Extent { code: false, symbols: true })?;
    let mut out = Vec::with_capacity(skeleton.bytes() as usize);
    skeleton.write(&mut out)?;
    Ok(out)
}

/// A skeleton that is laid out.
pub(crate) struct Skeleton<R> {
    elf: R,
    header: FileHeader,
    segments: Vec<ProgramHeader>,
    parts: Moved,
    /// The ID that the image has no note of, and where its note goes.
    identity: Option<(BuildId, u64)>,
    names: Vec<u8>,
    names_at: u64,
    sections: Vec<SectionHeader>,
}

impl<'data, R: CopyBytes<'data>> Skeleton<R> {
    /// Lays out the skeleton of the image `elf`.
    pub(crate) fn new(elf: R, extent: Extent) -> Result<Self, SkeletonError> {
        let header = file_header(elf)?;
        let mut segments = program_headers(header, elf)?.to_vec();
        let mut sections = section_headers(header, elf)?.to_vec();
        let length = elf.len().map_err(|()| SkeletonError::Read(0, 0))?;
        let (mut names, names_index) = match section_names(header, &sections, elf) {
            Some(names_and_index) => names_and_index,
            None => {
                let mut names = vec![0];
                if sections.is_empty() {
                    sections = unwind_sections(&segments, elf, &mut names);
                }
                sections.push(section(&mut names, b".shstrtab", elf::SHT_STRTAB, 0, 0..0));
                let index = sections.len() - 1;
                (names, index)
            }
        };
        let is_kept = |section: &SectionHeader| {
            is_kept(section, &names) && (extent.symbols || !is_symbols(section, &names))
                || extent.code && section.sh_flags(LE).contains(elf::SHF_EXECINSTR)
        };
        let kept = sections.iter().map(|section| is_kept(section) && range_of(section).end <= length);
        let mut kept: Vec<bool> = kept.collect();
        let added = match extent.code {
            true => Vec::new(),
            false => added_sections(header, (&segments, &sections), &mut names, elf),
        };
        for section in added {
            if range_of(&section).end <= length {
                sections.push(section);
                kept.push(true);
            }
        }
        let parts = Parts::collect(&segments, &sections, &kept, length);
        if parts.bytes() > MAX_SKELETON_BYTES {
            return Err(SkeletonError::Size { bytes: parts.bytes() });
        }
        let identity = match gnu_build_id(header, &segments, elf) {
            Some(_) => None,
            None => Some(file_hash(elf)?),
        };

        let headers = segments.len() + usize::from(identity.is_some());
        let mut at = (size_of::<FileHeader>() + headers * size_of::<ProgramHeader>()) as u64;
        let parts = Moved::from_on(parts, &mut at);
        for segment in &mut segments {
            place_segment(segment, &parts);
        }
        for (section, kept) in sections.iter_mut().zip(kept) {
            place_section(section, kept, &parts);
        }
        let identity = identity.map(|id| {
            let start = aligned(at, 0);
            at = start + identity_note(id).len() as u64;
            segments.push(identity_segment(start..at));
            sections.push(section(&mut names, b".note.gnu.build-id", elf::SHT_NOTE, 0, start..at));
            (id, start)
        });
        let names_at = aligned(at, 0);
        let names_section = &mut sections[names_index];
        names_section.sh_type.set(LE, elf::SHT_STRTAB);
        names_section.sh_offset.set(LE, names_at);
        names_section.sh_size.set(LE, names.len() as u64);
        let mut skeleton =
            Self { elf, header: *header, segments, parts, identity, names, names_at, sections };
        skeleton.set_header(names_index);
        match skeleton.bytes() {
            bytes if bytes > MAX_SKELETON_BYTES => Err(SkeletonError::Size { bytes }),
            _ => Ok(skeleton),
        }
    }

    fn set_header(&mut self, names_index: usize) {
        let sections_at = self.sections_at();
        let header = &mut self.header;
        let headers_at = if self.segments.is_empty() { 0 } else { size_of::<FileHeader>() as u64 };
        header.e_phoff.set(LE, headers_at);
        header.e_phentsize.set(LE, size_of::<ProgramHeader>() as u16);
        header.e_phnum.set(LE, self.segments.len() as u16);
        header.e_shoff.set(LE, sections_at);
        header.e_shentsize.set(LE, size_of::<SectionHeader>() as u16);
        header.e_shnum.set(LE, self.sections.len() as u16);
        header.e_shstrndx.set(LE, elf::SymbolSection(names_index as u16));
    }

    fn sections_at(&self) -> u64 {
        aligned(self.names_at + self.names.len() as u64, 0)
    }

    /// How long it is.
    pub(crate) fn bytes(&self) -> u64 {
        self.sections_at() + size_of_val(&self.sections[..]) as u64
    }

    /// Writes it.
    pub(crate) fn write(&self, out: &mut dyn Write) -> Result<(), SkeletonError> {
        let mut out = Placed { out, at: 0 };
        let (sections_at, bytes) = (self.sections_at(), self.bytes());
        out.put(0, bytes_of(&self.header)).map_err(|_| SkeletonError::Read(0, 0))?;
        let headers_at = size_of::<FileHeader>() as u64;
        out.put(headers_at, bytes_of_slice(&self.segments)).map_err(|_| SkeletonError::Read(0, 0))?;
        for (part, place) in &self.parts.0 {
            let copied = out.pad_to(*place).and_then(|()| {
                out.at += part.end - part.start;
                self.elf.copy_bytes_at(part.start, part.end - part.start, out.out)
            });
            copied.map_err(|_| SkeletonError::Read(part.start, part.end))?;
        }
        let identity = self.identity.map_or(Ok(()), |(id, place)| out.put(place, &identity_note(id)));
        identity
            .and_then(|()| out.put(self.names_at, &self.names))
            .and_then(|()| out.put(sections_at, bytes_of_slice(&self.sections)))
            .map_err(|_| SkeletonError::Read(self.names_at, bytes))
    }
}

/// What is written where.
struct Placed<'a> {
    out: &'a mut dyn Write,
    at: u64,
}

impl Placed<'_> {
    /// Pads with zeros up to a place, all of them less than [`PART_ALIGNMENT`] apart.
    fn pad_to(&mut self, place: u64) -> io::Result<()> {
        let padding = [0; PART_ALIGNMENT as usize];
        let count = (place - self.at) as usize;
        self.at = place;
        self.out.write_all(&padding[..count])
    }

    fn put(&mut self, place: u64, bytes: &[u8]) -> io::Result<()> {
        self.pad_to(place)?;
        self.at += bytes.len() as u64;
        self.out.write_all(bytes)
    }
}

/// The next place from `at` on that is `remainder` modulo [`PART_ALIGNMENT`].
fn aligned(at: u64, remainder: u64) -> u64 {
    at + (PART_ALIGNMENT + remainder - at % PART_ALIGNMENT) % PART_ALIGNMENT
}

/// Sections for parts of others: code that no CFI covers, and what is to be known for following it.
fn added_sections<'data, R: ReadRef<'data>>(
    header: &FileHeader,
    (segments, sections): (&[ProgramHeader], &[SectionHeader]),
    names: &mut Vec<u8>,
    elf: R,
) -> Vec<SectionHeader> {
    let is_named = |section: &&SectionHeader, expect: &[&[u8]]| expect.contains(&name_of(section, names));
    // Go's table has what CFI has not; and the skeleton of a skeleton has the sections already.
    if sections.iter().any(|section| is_named(&section, &[CODE_SECTION, GO_TABLE, GO_TABLE_OF_PIE])) {
        return Vec::new();
    }
    let executable = elf::SHF_ALLOC | elf::SHF_EXECINSTR;
    let is_code = |section: &&SectionHeader| section.sh_flags(LE).contains(executable);
    let has_bytes = |section: &&SectionHeader| section.sh_type(LE) != elf::SHT_NOBITS;
    let piece = |section: &SectionHeader| {
        KeptCode::new(section.sh_addr(LE), section.sh_offset(LE), section.sh_size(LE))
    };
    let code = Code {
        architecture: header.e_machine(LE),
        program_headers: segments,
        pieces: sections.iter().filter(is_code).filter(has_bytes).filter_map(piece).collect(),
        entry: header.e_entry(LE),
        makecontext: makecontext(sections, elf),
        image: elf,
    };
    if !matches!(header.e_type(LE), elf::ET_EXEC | elf::ET_DYN) || code.pieces.is_empty() {
        return Vec::new();
    }
    let mut added = Vec::new();
    for part in code.kept() {
        let mut code = section(names, CODE_SECTION, elf::SHT_PROGBITS, part.address, part.file);
        code.sh_flags.set(LE, executable);
        code.sh_addralign.set(LE, 1);
        added.push(code);
    }
    for file in array_relocations(sections, elf) {
        let mut relocations = section(names, RELOCATION_SECTION, elf::SHT_RELA, 0, file);
        relocations.sh_addralign.set(LE, align_of::<elf::Rela64<LE>>().max(8) as u64);
        relocations.sh_entsize.set(LE, size_of::<elf::Rela64<LE>>() as u64);
        added.push(relocations);
    }
    added
}

/// The section name table and its index, if it is sound.
fn section_names<'data, R: ReadRef<'data>>(
    header: &FileHeader,
    sections: &[SectionHeader],
    elf: R,
) -> Option<(Vec<u8>, usize)> {
    let index = header.shstrndx(LE, elf).ok()? as usize;
    let section = sections.get(index)?;
    if section.sh_type(LE) == elf::SHT_NOBITS || section.sh_size(LE) > MAX_SECTION_NAMES_BYTES {
        return None;
    }
    let mut names = elf.read_bytes_at(section.sh_offset(LE), section.sh_size(LE)).ok()?.to_vec();
    // Whatever stood last, a name ends before what is appended.
    names.push(0);
    Some((names, index))
}

fn range_of(section: &SectionHeader) -> Range<u64> {
    let start = section.sh_offset(LE);
    start..start.saturating_add(section.sh_size(LE))
}

/// The name of a section.
fn name_of<'n>(section: &SectionHeader, names: &'n [u8]) -> &'n [u8] {
    let name = names.get(section.sh_name(LE) as usize..).unwrap_or_default();
    name.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// Points a section at its moved contents, or makes it one without.
fn place_section(section: &mut SectionHeader, kept: bool, moved: &Moved) {
    if section.sh_type(LE) == elf::SHT_NULL {
        return;
    }
    let place = kept.then(|| moved.place(section.sh_offset(LE))).flatten();
    if place.is_none() {
        section.sh_type.set(LE, elf::SHT_NOBITS);
    }
    section.sh_offset.set(LE, place.unwrap_or(0));
}

/// A section header, its name appended to `names`.
fn section(
    names: &mut Vec<u8>,
    name: &[u8],
    kind: elf::SectionType,
    address: u64,
    file: Range<u64>,
) -> SectionHeader {
    let at = names.len() as u32;
    names.extend_from_slice(name);
    names.push(0);
    let flags = if address == 0 { elf::SectionFlags(0) } else { elf::SHF_ALLOC };
    SectionHeader {
        sh_name: object::U32::new(LE, at),
        sh_type: object::U32::new(LE, kind),
        sh_flags: object::U64::new(LE, flags),
        sh_addr: object::U64::new(LE, address),
        sh_offset: object::U64::new(LE, file.start),
        sh_size: object::U64::new(LE, file.end - file.start),
        sh_link: object::U32::new(LE, 0),
        sh_info: object::U32::new(LE, 0),
        sh_addralign: object::U64::new(LE, 4),
        sh_entsize: object::U64::new(LE, 0),
    }
}

/// The parts of the file that are kept, in order, none touching another.
struct Parts(Vec<Range<u64>>);

impl Parts {
    fn collect(segments: &[ProgramHeader], sections: &[SectionHeader], kept: &[bool], length: u64) -> Self {
        let of_segments = segments.iter().filter(|segment| is_segment_kept(segment)).map(|segment| {
            let start = segment.p_offset(LE);
            start..start.saturating_add(segment.p_filesz(LE))
        });
        let of_sections =
            sections.iter().zip(kept).filter(|(_, kept)| **kept).map(|(section, _)| range_of(section));
        let mut ranges: Vec<_> = of_segments
            .chain(of_sections)
            .filter(|range| range.start < range.end && range.end <= length)
            .collect();
        ranges.sort_by_key(|range| range.start);
        let mut parts: Vec<Range<u64>> = Vec::new();
        for range in ranges {
            match parts.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => parts.push(range),
            }
        }
        Self(parts)
    }

    fn bytes(&self) -> u64 {
        self.0.iter().map(|part| part.end - part.start + PART_ALIGNMENT).sum()
    }
}

/// Whether the bytes of a segment are kept.
fn is_segment_kept(segment: &ProgramHeader) -> bool {
    segment.p_type(LE) == elf::PT_NOTE || segment.p_type(LE) == elf::PT_GNU_EH_FRAME
}

/// Where each part of the image went.
struct Moved(Vec<(Range<u64>, u64)>);

impl Moved {
    /// Places parts one after the other, and moves `at` behind the last one.
    fn from_on(parts: Parts, at: &mut u64) -> Self {
        let place = |part: Range<u64>| {
            let place = aligned(*at, part.start % PART_ALIGNMENT);
            *at = place + (part.end - part.start);
            (part, place)
        };
        Self(parts.0.into_iter().map(place).collect())
    }

    /// The new offset of the kept byte at `offset`, or behind the last of a part (an empty section).
    fn place(&self, offset: u64) -> Option<u64> {
        let (part, place) = self.0.iter().find(|(part, _)| part.start <= offset && offset <= part.end)?;
        Some(place + (offset - part.start))
    }
}

/// Points a segment at its moved contents, if they are kept, and hides it, if readers would follow it to bytes that are gone.
fn place_segment(segment: &mut ProgramHeader, moved: &Moved) {
    match (is_segment_kept(segment), moved.place(segment.p_offset(LE))) {
        (true, Some(place)) => segment.p_offset.set(LE, place),
        (true, None) => segment.p_filesz.set(LE, 0),
        (false, _) if [elf::PT_DYNAMIC, elf::PT_INTERP].contains(&segment.p_type(LE)) => {
            segment.p_type.set(LE, elf::PT_NULL);
        }
        (false, _) => {}
    }
}

/// `id` as a GNU build-ID note.
fn identity_note(id: BuildId) -> Vec<u8> {
    let words = [4, id.as_bytes().len() as u32, elf::NT_GNU_BUILD_ID.0];
    let head = words.into_iter().flat_map(u32::to_le_bytes);
    head.chain(*b"GNU\0").chain(id.as_bytes().iter().copied()).collect()
}

fn identity_segment(file: Range<u64>) -> ProgramHeader {
    ProgramHeader {
        p_type: object::U32::new(LE, elf::PT_NOTE),
        p_flags: object::U32::new(LE, elf::PF_R),
        p_offset: object::U64::new(LE, file.start),
        p_vaddr: object::U64::new(LE, 0),
        p_paddr: object::U64::new(LE, 0),
        p_filesz: object::U64::new(LE, file.end - file.start),
        p_memsz: object::U64::new(LE, 0),
        p_align: object::U64::new(LE, 4),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::identify;
    use object::read::elf::ElfFile64;
    use object::{Object as _, ObjectSection as _, ObjectSymbol as _};
    use std::process::Command;

    type Elf<'a> = ElfFile64<'a, LE>;

    fn system_binaries() -> Vec<(String, Vec<u8>)> {
        let own = std::env::current_exe().unwrap().to_string_lossy().into_owned();
        ["/bin/ls", "/bin/bash", "/lib/x86_64-linux-gnu/libc.so.6", "/usr/bin/gdb", "/usr/bin/readelf", &own]
            .into_iter()
            .filter_map(|path| Some((path.to_owned(), std::fs::read(path).ok()?)))
            .collect()
    }

    /// Everything that a consumer reads out of a skeleton is what it reads out of the image.
    #[track_caller]
    fn check(path: &str, image: &[u8], skeleton: &[u8]) {
        let (whole, bare) = (Elf::parse(image).unwrap(), Elf::parse(skeleton).unwrap());
        assert_eq!(whole.architecture(), bare.architecture());
        let mut with_contents = 0;
        for (section, copy) in whole.sections().zip(bare.sections()) {
            let name = section.name().unwrap();
            let flags = |section: &object::read::elf::ElfSection64<'_, '_, LE>| {
                section.elf_section_header().sh_flags(LE)
            };
            assert_eq!(
                (name, section.address(), section.align(), flags(&section)),
                (copy.name().unwrap(), copy.address(), copy.align(), flags(&copy)),
                "{path}"
            );
            if name == ".shstrtab" {
                continue;
            }
            assert_eq!(section.size(), copy.size(), "{path} {name}");
            if !copy.data().unwrap().is_empty() {
                with_contents += 1;
                assert_eq!(section.data().unwrap(), copy.data().unwrap(), "{path} {name}");
            }
        }
        assert!(with_contents > 3, "{path}: {with_contents} sections with contents");
        for name in [".text", ".rodata", ".data"] {
            let data = bare.section_by_name(name).map(|section| section.data().unwrap());
            assert!(data.unwrap_or_default().is_empty(), "{path} {name}");
        }
        let symbols = |elf: &Elf<'_>| -> Vec<(u64, String)> {
            elf.symbols()
                .chain(elf.dynamic_symbols())
                .map(|symbol| (symbol.address(), symbol.name().unwrap_or_default().to_owned()))
                .collect()
        };
        assert_eq!(symbols(&whole), symbols(&bare), "{path}");
        // Identity and bias, and so what the agent computes from either.
        let (image, copy) = (identify(image).unwrap(), identify(skeleton).unwrap());
        assert_eq!(image.id.build_id(), copy.id.build_id(), "{path}");
        let bias = |image: &crate::image::Image| {
            (0..0x10_0000u64)
                .step_by(4096)
                .map(|offset| {
                    image.bias(
                        windlass_schema::ProcessAddress::new(0x7000_0000),
                        windlass_schema::FileOffset::new(offset),
                        4096,
                    )
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(bias(&image), bias(&copy), "{path}");
        assert_eq!(bare.build_id().unwrap().unwrap(), image.id.build_id().as_bytes(), "{path}");
    }

    #[test]
    fn skeletons_of_system_binaries() {
        let binaries = system_binaries();
        assert!(binaries.len() > 3);
        for (path, image) in binaries {
            let skeleton = skeleton(&image[..]).unwrap();
            assert!(skeleton.len() < image.len(), "{path}: {} of {}", skeleton.len(), image.len());
            check(&path, &image, &skeleton);
            // A skeleton is an image, and has itself as a skeleton.
            check(&path, &skeleton, &super::skeleton(&skeleton[..]).unwrap());
        }
    }

    #[test]
    fn readelf_has_nothing_to_complain_of() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("skeleton");
        for (path, image) in system_binaries() {
            std::fs::write(&file, skeleton(&image[..]).unwrap()).unwrap();
            let output =
                Command::new("readelf").args(["-h", "-l", "-S", "-s", "-n"]).arg(&file).output().unwrap();
            let complaints = String::from_utf8_lossy(&output.stderr);
            assert!(complaints.is_empty(), "{path}: {complaints}");
            let frames = |file: &std::path::Path| {
                // Without following links to debug files, and without the line that names the file.
                let output = Command::new("readelf").args(["-wf", "-wN"]).arg(file).output().unwrap();
                let text = String::from_utf8_lossy(&output.stdout).into_owned();
                text.trim_start().split_once('\n').map(|(_, rest)| rest.to_owned())
            };
            let expect = frames(path.as_ref()).filter(|text| text.len() > 1000);
            assert!(expect.is_some() && frames(&file) == expect, "{path}: other frames");
        }
    }

    /// The vDSO goes with its code.
    #[test]
    fn skeleton_of_the_vdso() {
        let maps = std::fs::read("/proc/self/maps").unwrap();
        let entries = crate::proc_maps::executable_mappings(&maps);
        let vdso = entries.iter().find(|entry| entry.backing == crate::proc_maps::Backing::Vdso).unwrap();
        let source = crate::mapped_file::ImageSource::of_vdso(std::process::id(), vdso).unwrap();
        let crate::mapped_file::ImageSource::Memory(image) = source else { panic!("the vDSO is no file") };
        let extent = Extent { code: true, symbols: true };
        let mut skeleton = Vec::new();
        Skeleton::new(&image[..], extent).unwrap().write(&mut skeleton).unwrap();
        let (whole, made) = (Elf::parse(&image[..]).unwrap(), Elf::parse(&skeleton[..]).unwrap());
        let text = whole.section_by_name(".text").unwrap();
        let kept = made.section_by_name(".text").unwrap();
        assert_eq!((text.address(), text.data()), (kept.address(), kept.data()));
        assert!(text.size() > 0 && made.section_by_name(".eh_frame").is_some());
        let without = super::skeleton(&image[..]).unwrap();
        let bare = Elf::parse(&without[..]).unwrap();
        assert!(bare.section_by_name(".text").unwrap().data().unwrap().is_empty());
    }

    /// An image that was stripped of its section headers still gives its frames.
    #[test]
    fn image_without_section_headers() {
        let whole = std::fs::read("/bin/ls").unwrap();
        let mut image = whole.clone();
        image[0x28..0x30].fill(0); // e_shoff
        image[0x3c..0x40].fill(0); // e_shnum, e_shstrndx
        let skeleton = skeleton(&image[..]).unwrap();
        let (expect, found) = (Elf::parse(&whole[..]).unwrap(), Elf::parse(&skeleton[..]).unwrap());
        for name in [".eh_frame", ".eh_frame_hdr"] {
            let expect = expect.section_by_name(name).unwrap();
            let found = found.section_by_name(name).unwrap();
            assert_eq!((expect.address(), expect.size()), (found.address(), found.size()), "{name}");
            assert_eq!(expect.data(), found.data(), "{name}");
        }
        assert_eq!(found.build_id(), expect.build_id());
    }

    #[test]
    fn image_without_build_id_says_its_file_hash() {
        let mut image = std::fs::read("/bin/ls").unwrap();
        let at = image.windows(8).position(|bytes| bytes == b"\x03\0\0\0GNU\0").expect("a build-ID note");
        image[at] = 0x77; // Another type of note.
        let id = identify(&image[..]).unwrap().id;
        assert!(matches!(id, crate::image::ImageId::FileHash(_)));
        check("/bin/ls without build-ID", &image, &skeleton(&image[..]).unwrap());
    }

    #[test]
    fn no_input_panics_or_grows() {
        let image = std::fs::read("/bin/ls").unwrap();
        for length in (0..4096).step_by(3).chain((4096..image.len()).step_by(1009)) {
            let _ = skeleton(&image[..length]);
        }
        // Headers at the start, section headers at the end, with the bytes that hurt most.
        let tail = image.len() - 32 * size_of::<SectionHeader>();
        for at in (0..1024).chain(tail..image.len()) {
            for value in [0, 0x7f, 0xff] {
                let mut broken = image.clone();
                broken[at] = value;
                if let Ok(skeleton) = skeleton(&broken[..]) {
                    assert!(skeleton.len() < 2 * image.len(), "byte {at}: {} bytes", skeleton.len());
                }
            }
        }
    }
}
