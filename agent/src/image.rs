//! Who is this ELF image, and where does it put its file?
//!
//! Profilers that name an image by its path mix up deploys and containers, and those that know
//! only the GNU note lose what rustup, zig and Go ship without one. So an image is named by its GNU
//! build-ID, or, without one, by the OpenTelemetry file hash, which the service stores as well. The
//! functions here take any [`ReadRef`]: a byte slice, or an `object::ReadCache` over an open file,
//! which reads the few kilobytes needed. A file is never mapped into memory: one truncated under a
//! mapping would end the agent with SIGBUS.

use std::ops::Range;

use object::LittleEndian as LE;
use object::elf;
use object::read::ReadRef;
use object::read::elf::{FileHeader as _, NoteIterator, ProgramHeader as _, SectionHeader as _};
use windlass_schema::Architecture;
use windlass_schema::{BuildId, FileOffset, LoadBias, ProcessAddress, file_id};

use crate::frame_pointers::frame_pointer_code;

/// Header of the files read here: 64-bit, little-endian.
pub(crate) type FileHeader = elf::FileHeader64<LE>;
/// Their program header.
pub(crate) type ProgramHeader = elf::ProgramHeader64<LE>;
/// Their section header.
pub(crate) type SectionHeader = elf::SectionHeader64<LE>;

/// Most program headers read. The kernel refuses to run more than 64 KiB of them (1,170).
pub const MAX_PROGRAM_HEADERS: u32 = 1170;
/// Most section headers read, 4 MiB of them; linked images have fewer than a hundred. Below
/// `SHN_LORESERVE` (65,280), from where on counts move to another place.
pub const MAX_SECTION_HEADERS: u32 = 65_000;
/// Most bytes read of all note segments and sections of an image; they have some hundreds, with probes some tens of
/// thousands.
pub const MAX_NOTE_BYTES: u64 = 1024 * 1024;
/// Most note segments and sections read; linked images have fewer than ten.
const MAX_NOTES: u32 = 1024;

/// An image's identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ImageId {
    /// The descriptor of its GNU build-ID note.
    Gnu(BuildId),
    /// Its OpenTelemetry `htlhash`, for want of a note.
    FileHash(BuildId),
    /// None: the ID of the list of its functions, which a just-in-time compiler made.
    PerfMap(BuildId),
}

impl ImageId {
    /// The id under which the service knows the image.
    pub const fn build_id(self) -> BuildId {
        match self {
            Self::Gnu(id) | Self::FileHash(id) | Self::PerfMap(id) => id,
        }
    }
}

/// What the agent needs to know of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Its identity.
    pub id: ImageId,
    /// Its instruction set.
    pub architecture: Architecture,
    /// Image addresses of code that has no CFI and keeps frame pointers.
    pub frame_pointer_code: Vec<Range<u64>>,
    segments: Vec<LoadSegment>,
}

/// A `PT_LOAD` program header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct LoadSegment {
    file_offset: u64,
    file_bytes: u64,
    address: u64,
    executable: bool,
}

/// Why bytes are no image that the agent can use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// No ELF magic, or cut off within the header.
    #[error("not an ELF file")]
    NotElf,
    /// A 32-bit or big-endian file.
    #[error("ELF class {0} with data encoding {1}, expected 64-bit little-endian")]
    Class(u8, u8),
    /// Another instruction set.
    #[error("ELF machine {0}, expected x86-64 or aarch64")]
    Machine(u16),
    /// A table that lies outside the file or exceeds its limit.
    #[error("{0}")]
    Malformed(String),
}

impl From<object::read::Error> for ImageError {
    fn from(error: object::read::Error) -> Self {
        Self::Malformed(error.to_string().to_lowercase())
    }
}

/// Reads the identity and the load segments of the image `elf`, and what is known of its code without CFI.
pub fn identify<'data, R: ReadRef<'data>>(elf: R) -> Result<Image, ImageError> {
    let header = file_header(elf)?;
    let architecture = match header.e_machine(LE) {
        elf::EM_X86_64 => Architecture::X86_64,
        elf::EM_AARCH64 => Architecture::Aarch64,
        machine => return Err(ImageError::Machine(machine.0)),
    };
    let program_headers = program_headers(header, elf)?;
    let segments = program_headers
        .iter()
        .filter(|segment| segment.p_type(LE) == elf::PT_LOAD)
        .map(|segment| LoadSegment {
            file_offset: segment.p_offset(LE),
            file_bytes: segment.p_filesz(LE),
            address: segment.p_vaddr(LE),
            executable: segment.p_flags(LE).contains(elf::PF_X),
        })
        .collect();
    let id = match gnu_build_id(header, program_headers, elf) {
        Some(id) => ImageId::Gnu(id),
        None => ImageId::FileHash(file_hash(elf)?),
    };
    let frame_pointer_code = match architecture {
        Architecture::X86_64 => frame_pointer_code(program_headers, elf),
        Architecture::Aarch64 => Vec::new(),
    };
    Ok(Image { id, architecture, frame_pointer_code, segments })
}

impl Image {
    /// The load bias of a mapping of `length` bytes of the file from `offset` on to `start`: of the
    /// `PT_LOAD` that shares most with that part of the file, executable ones first.
    ///
    /// ```text
    /// image address of `offset` = p_vaddr + (offset - p_offset)      (wrapping: pages start before p_offset)
    /// bias = start - image address of `offset`
    /// ```
    /// `None` if no segment shares a byte with it.
    pub fn bias(&self, start: ProcessAddress, offset: FileOffset, length: u64) -> Option<LoadBias> {
        let end = offset.get().saturating_add(length);
        let shared = |segment: &LoadSegment| {
            let segment_end = segment.file_offset.saturating_add(segment.file_bytes);
            segment_end.min(end).saturating_sub(segment.file_offset.max(offset.get()))
        };
        let segment = self
            .segments
            .iter()
            .filter(|segment| shared(segment) > 0)
            .max_by_key(|segment| (segment.executable, shared(segment)))?;
        let address = segment.address.wrapping_add(offset.get().wrapping_sub(segment.file_offset));
        Some(LoadBias::new(start.get().wrapping_sub(address)))
    }
}

/// The ELF header, if it is of a kind that is read here.
pub(crate) fn file_header<'data, R: ReadRef<'data>>(elf: R) -> Result<&'data FileHeader, ImageError> {
    let ident = elf.read_bytes_at(0, 16).map_err(|()| ImageError::NotElf)?;
    if ident[..4] != elf::ELFMAG {
        return Err(ImageError::NotElf);
    }
    if (ident[4], ident[5]) != (elf::ELFCLASS64.0, elf::ELFDATA2LSB.0) {
        return Err(ImageError::Class(ident[4], ident[5]));
    }
    Ok(FileHeader::parse(elf)?)
}

/// The program headers, up to [`MAX_PROGRAM_HEADERS`].
pub(crate) fn program_headers<'data, R: ReadRef<'data>>(
    header: &FileHeader,
    elf: R,
) -> Result<&'data [ProgramHeader], ImageError> {
    let count = header.phnum(LE, elf)?;
    if count > MAX_PROGRAM_HEADERS {
        return Err(ImageError::Malformed(format!(
            "{count} program headers, at most {MAX_PROGRAM_HEADERS} are read"
        )));
    }
    Ok(header.program_headers(LE, elf)?)
}

/// The section headers, up to [`MAX_SECTION_HEADERS`].
pub(crate) fn section_headers<'data, R: ReadRef<'data>>(
    header: &FileHeader,
    elf: R,
) -> Result<&'data [SectionHeader], ImageError> {
    let count = header.shnum(LE, elf)?;
    if count > MAX_SECTION_HEADERS {
        return Err(ImageError::Malformed(format!(
            "{count} section headers, at most {MAX_SECTION_HEADERS} are read"
        )));
    }
    Ok(header.section_headers(LE, elf)?)
}

/// The GNU build-ID: from the program headers, which survive every strip, else from the sections.
/// What is malformed is passed over.
pub(crate) fn gnu_build_id<'data, R: ReadRef<'data>>(
    header: &FileHeader,
    program_headers: &[ProgramHeader],
    elf: R,
) -> Option<BuildId> {
    let (mut bytes_left, mut notes_left) = (MAX_NOTE_BYTES, MAX_NOTES);
    let mut in_notes = |offset: u64, size: u64, align: u64| {
        notes_left = notes_left.checked_sub(1)?;
        let size = size.min(bytes_left);
        bytes_left -= size;
        build_id_in_notes(elf.read_bytes_at(offset, size).ok()?, align)
    };
    program_headers
        .iter()
        .filter(|segment| segment.p_type(LE) == elf::PT_NOTE)
        .find_map(|segment| in_notes(segment.p_offset(LE), segment.p_filesz(LE), segment.p_align(LE)))
        .or_else(|| {
            section_headers(header, elf)
                .ok()?
                .iter()
                .filter(|section| section.sh_type(LE) == elf::SHT_NOTE)
                .find_map(|section| {
                    in_notes(section.sh_offset(LE), section.sh_size(LE), section.sh_addralign(LE))
                })
        })
}

/// The GNU build-ID among the ELF notes `data`.
pub(crate) fn build_id_in_notes(data: &[u8], align: u64) -> Option<BuildId> {
    NoteIterator::<FileHeader>::new(LE, align, data)
        .ok()?
        .map_while(Result::ok)
        .filter(|note| note.name() == elf::ELF_NOTE_GNU && note.n_type(LE) == elf::NT_GNU_BUILD_ID)
        .find_map(|note| BuildId::new(note.desc()).ok())
}

/// The file's OpenTelemetry [`htlhash`](file_id).
pub(crate) fn file_hash<'data, R: ReadRef<'data>>(elf: R) -> Result<BuildId, ImageError> {
    let unreadable = |()| ImageError::Malformed("file cannot be read for its hash".to_owned());
    let length = elf.len().map_err(unreadable)?;
    file_id::htlhash_with(length, |offset, size| elf.read_bytes_at(offset, size)).map_err(unreadable)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image_file::counted::Counted;
    use std::process::Command;

    /// The build-ID that readelf prints, if any.
    fn readelf_build_id(path: &str) -> Option<String> {
        let output = Command::new("readelf").args(["-n", path]).output().unwrap();
        String::from_utf8_lossy(&output.stdout)
            .lines()
            .find_map(|line| line.trim().strip_prefix("Build ID: ").map(str::to_owned))
    }

    #[test]
    fn build_ids_are_those_that_readelf_prints() {
        let mut with_note = 0;
        for path in ["/bin/ls", "/bin/bash", "/lib/x86_64-linux-gnu/libc.so.6", "/usr/bin/readelf"] {
            let Ok(file) = std::fs::File::open(path) else { continue };
            let image = identify(&object::ReadCache::new(file)).unwrap();
            match readelf_build_id(path) {
                Some(text) => {
                    with_note += 1;
                    assert_eq!(image.id, ImageId::Gnu(text.parse().unwrap()), "{path}");
                }
                None => assert!(matches!(image.id, ImageId::FileHash(_)), "{path}"),
            }
        }
        assert!(with_note > 0, "no system binary with a build-ID to compare");
    }

    #[test]
    fn file_hash_of_a_file_that_is_read_in_parts() {
        let own = std::env::current_exe().unwrap();
        let file = object::ReadCache::new(std::fs::File::open(&own).unwrap());
        assert_eq!(file_hash(&file), Ok(file_id::htlhash(&std::fs::read(own).unwrap())));
    }

    fn image(segments: &[(u64, u64, u64, bool)]) -> Image {
        let segments = segments
            .iter()
            .map(|&(file_offset, file_bytes, address, executable)| LoadSegment {
                file_offset,
                file_bytes,
                address,
                executable,
            })
            .collect();
        let id = ImageId::Gnu("abcd".parse().unwrap());
        Image { id, architecture: Architecture::X86_64, frame_pointer_code: Vec::new(), segments }
    }

    #[track_caller]
    fn check(image: &Image, start: u64, offset: u64, length: u64, expect: Option<u64>) {
        let bias = image.bias(ProcessAddress::new(start), FileOffset::new(offset), length);
        assert_eq!(bias.map(LoadBias::get), expect);
    }

    #[test]
    fn bias_of_mappings() {
        // As lld lays files out: text neither starts at a page nor at its address modulo the file's.
        let lld =
            image(&[(0, 0x1240, 0, false), (0x1240, 0x5000, 0x2240, true), (0x6240, 0x100, 0x8240, false)]);
        check(&lld, 0x7000_0000_2000, 0x1000, 0x6000, Some(0x7000_0000_0000));
        // A part of the text, as after an mprotect in its middle.
        check(&lld, 0x7000_0000_4000, 0x3000, 0x1000, Some(0x7000_0000_0000));
        // Not position-independent.
        check(&image(&[(0, 0x8000, 0x40_0000, true)]), 0x40_0000, 0, 0x8000, Some(0));
        // Behind the end of every segment; and no overflow at the extremes.
        check(&lld, 0x1000, 0x10_0000, 0x1000, None);
        check(&lld, u64::MAX, u64::MAX, u64::MAX, None);
    }

    #[test]
    fn notes_are_bounded_in_all() {
        let note = ProgramHeader {
            p_type: object::U32::new(LE, elf::PT_NOTE),
            p_flags: object::U32::new(LE, elf::PF_R),
            p_offset: object::U64::new(LE, 0),
            p_vaddr: object::U64::new(LE, 0),
            p_paddr: object::U64::new(LE, 0),
            p_filesz: object::U64::new(LE, MAX_NOTE_BYTES),
            p_memsz: object::U64::new(LE, MAX_NOTE_BYTES),
            p_align: object::U64::new(LE, 4),
        };
        let file = vec![0xff; MAX_NOTE_BYTES as usize];
        let header = std::fs::read("/bin/ls").expect("a file of the machine");
        let mut header = *file_header(&header[..]).expect("an ELF file");
        header.e_shoff = object::U64::new(LE, 0);
        let read = std::cell::Cell::new(0);
        let id = gnu_build_id(&header, &vec![note; MAX_PROGRAM_HEADERS as usize], Counted(&file, &read));
        assert_eq!(id, None);
        assert!(read.get() <= MAX_NOTE_BYTES, "{} bytes read", read.get());
    }

    #[test]
    fn no_input_panics() {
        let file = std::fs::read("/bin/ls").unwrap();
        for length in (0..4096).chain((4096..file.len()).step_by(1009)) {
            let _ = identify(&file[..length]);
        }
        assert_eq!(identify(&b"#!/bin/sh\nexit 0\n"[..]), Err(ImageError::NotElf));
        let mut other = file[..].to_vec();
        other[4] = 1;
        assert_eq!(identify(&other[..]), Err(ImageError::Class(1, 1)));
        for at in 0..1024 {
            let mut broken = file.clone();
            broken[at] ^= 0xff;
            let _ = identify(&broken[..]);
        }
    }
}
