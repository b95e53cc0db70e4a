//! Is this file what it is uploaded as? Identity and contents of an ELF file, checked before it is stored.
//!
//! Parca checks the length of the build-ID and leaves the rest to the symbolizer, hours later; a
//! stripped file uploaded by mistake then hides good debuginfo. Here the note inside the file must be the
//! build-ID in the path and the file must bring what its kind promises, or the uploader is told at
//! once. What a file brings is kept beside it, so that requests need not open it again.

use std::io;
use std::str::FromStr;

use object::elf;
use object::elf::{FileHeader32, FileHeader64};
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader};
use object::{Endianness, FileKind, ReadRef};
use serde::{Deserialize, Serialize};
use windlass_schema::BuildId;
use windlass_schema::file_id::{FILE_ID_BYTES, htlhash_with};
use windlass_schema::http::{ArtefactKind, Brings};
use windlass_schema::perf_map::MAX_PERF_MAP_BYTES;

use crate::content::Content;
use headers::{Headers, MAX_INFLATED_BYTES, MAX_SECTIONS, MAX_SEGMENTS};

mod headers;
mod symbol_lists;

/// Most sections kept on record: what `e_shnum` can say without extension. Later ones are not served.
const MAX_RECORDED_SECTIONS: usize = 0xff00;
/// Most bytes of their names together: a megabyte is 16 for each of them.
const MAX_RECORDED_NAME_BYTES: usize = 1 << 20;
/// Longest name of a section kept on record, in bytes; sections of DWARF, which clients ask for, have names of
/// at most 27. Names of many sections may be the same bytes of a file, so that without a limit a file of
/// some megabytes could make a record of terabytes.
const MAX_SECTION_NAME_BYTES: usize = 256;

/// A section as a client may ask for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Section {
    /// Its name.
    pub name: String,
    /// Offset in the file.
    pub offset: u64,
    /// Size in bytes.
    pub size: u64,
    /// Whether the file holds no bytes of it (`SHT_NOBITS`).
    pub nobits: bool,
}

/// What a stored file brings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// DWARF: `.debug_info` with data.
    pub dwarf: bool,
    /// `.symtab` with data.
    pub symtab: bool,
    /// `.eh_frame` or `.debug_frame` with data.
    pub unwind: bool,
    /// Executable code with data.
    pub code: bool,
    /// Its sections.
    pub sections: Vec<Section>,
}

impl Facts {
    /// The best it has to name code with.
    pub fn brings(&self) -> Brings {
        let has = |names: &[&str]| {
            let mut sections = self.sections.iter().filter(|section| !section.nobits && section.size > 0);
            sections.any(|section| names.contains(&section.name.as_str()))
        };
        if self.dwarf {
            Brings::DebugInfo
        } else if has(&[".debug_line", ".zdebug_line"]) {
            Brings::LineTable
        } else if self.symtab {
            Brings::Symtab
        } else if has(&[".dynsym"]) {
            Brings::Dynsym
        } else {
            Brings::Nothing
        }
    }
}

/// Two build-IDs that should be one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// In the file.
    pub found: BuildId,
    /// In the path.
    pub stated: BuildId,
}

/// A file that is not what it is uploaded as.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// The received bytes cannot be read back: our trouble.
    #[error("temporary file: {0}")]
    Read(io::Error),
    /// No ELF magic, or a header that contradicts itself.
    #[error("not a readable ELF file: {0}")]
    NotElf(String),
    /// A core file or worse.
    #[error("an ELF file of type {0}, expected an executable, a shared object or a module")]
    FileType(u16),
    /// More section headers than are read.
    #[error("{0} section headers, at most {MAX_SECTIONS} are read")]
    Sections(u32),
    /// More program headers than are read.
    #[error("{0} program headers, at most {MAX_SEGMENTS} are read")]
    Segments(u32),
    /// Two segments share addresses.
    #[error(
        "the segment loaded at {second:#x} overlaps the one at {first:#x}: its addresses name two contents"
    )]
    Overlap {
        /// Address of the lower one.
        first: u64,
        /// Address of the other.
        second: u64,
    },
    /// Compressed sections that would fill any memory.
    #[error("compressed sections that claim to be {0} bytes, at most {MAX_INFLATED_BYTES} are accepted")]
    Inflated(u64),
    /// Notes that do not end, and no build-ID among the first.
    #[error("no GNU build-ID among the notes that are read, and {0} more bytes of them")]
    Notes(u64),
    /// Sections and segments lead to different notes.
    #[error("two build-ID notes: {} by the sections, {} by the segments", .0.0, .0.1)]
    TwoBuildIds(Box<(BuildId, BuildId)>),
    /// The note says otherwise.
    #[error("the file's build-ID note is {}, the path says {}", .0.found, .0.stated)]
    BuildId(Box<Mismatch>),
    /// No note, and the ID is not the file's hash.
    #[error(
        "the file has no GNU build-ID note and its htlhash is {}, the path says {} \
         (link with -Wl,--build-id to get a note)",
        .0.found, .0.stated
    )]
    FileHash(Box<Mismatch>),
    /// No note, and an ID that cannot be an `htlhash`.
    #[error("the skeleton has no GNU build-ID note and {0} is no 16-byte htlhash")]
    SkeletonHash(BuildId),
    /// Uploaded as debuginfo, but stripped.
    #[error(
        "neither .debug_info nor .symtab in a file uploaded as debuginfo (compile with -g, upload before strip)"
    )]
    NoDebuginfo,
    /// Uploaded as executable, but a debug file.
    #[error(
        "no code in a file uploaded as executable (is it a separate debug file? then its kind is debuginfo)"
    )]
    NoCode,
    /// Uploaded as skeleton, but without anything to unwind or name with.
    #[error("neither unwind sections nor symbols in a file uploaded as skeleton")]
    EmptySkeleton,
    /// Not lines of `ADDRESS TYPE NAME`.
    #[error("line {line} of the kernel symbols is not `HEXADDRESS TYPE NAME`: {text:?}")]
    Kallsyms {
        /// From 1.
        line: usize,
        /// Its beginning.
        text: String,
    },
    /// No line at all.
    #[error("no kernel symbols in the file")]
    EmptyKallsyms,
    /// Lines, but no code in them: what a reader without privilege is shown.
    #[error(
        "no function of the kernel has an address in the kernel symbols \
         (read /proc/kallsyms as root, and with kernel.kptr_restrict at most 1)"
    )]
    HiddenKallsyms,
    /// Another list than the one of this ID.
    #[error("the ID of the perf map is {}, the path says {}", .0.found, .0.stated)]
    PerfMapId(Box<Mismatch>),
    /// A line that is none, overlaps the one before, or has a name that cannot be shown.
    #[error("line {line} of the perf map is not `HEXSTART HEXSIZE NAME` behind the one before: {text:?}")]
    PerfMap {
        /// From 1.
        line: usize,
        /// Its beginning.
        text: String,
    },
    /// Uploaded as split DWARF, but none, or of the other kind.
    #[error("no {0} in a file uploaded as split DWARF (.dwo files are of kind dwo, .dwp files of kind dwp)")]
    NoSplitDwarf(&'static str),
    /// No line, or too many bytes of them.
    #[error("perf map of {0} bytes, expected 1 to {MAX_PERF_MAP_BYTES}")]
    PerfMapSize(u64),
}

/// Checks that `content` is a `kind` of `stated`, and says what it brings. Takes the same memory for any content:
/// some 30 MiB at most, see `headers`.
pub fn check(
    content: &(impl Content + ?Sized),
    kind: ArtefactKind,
    stated: BuildId,
) -> Result<Facts, ContentError> {
    match kind {
        ArtefactKind::Source => Ok(Facts::default()),
        ArtefactKind::Kallsyms => symbol_lists::check_kallsyms(content).map(|()| Facts::default()),
        ArtefactKind::PerfMap => symbol_lists::check_perf_map(content, stated).map(|()| Facts::default()),
        ArtefactKind::Executable
        | ArtefactKind::Debuginfo
        | ArtefactKind::Skeleton
        | ArtefactKind::Dwp
        | ArtefactKind::Dwo => {
            let cache = headers::cache(content);
            match FileKind::parse(&cache) {
                Ok(FileKind::Elf64) => check_elf::<FileHeader64<Endianness>, _>(&cache, kind, stated),
                Ok(FileKind::Elf32) => check_elf::<FileHeader32<Endianness>, _>(&cache, kind, stated),
                _ => Err(ContentError::NotElf("another file type".to_owned())),
            }
        }
    }
}

fn check_elf<H: FileHeader<Endian = Endianness>, C: Content + ?Sized>(
    cache: &headers::Cache<'_, C>,
    kind: ArtefactKind,
    stated: BuildId,
) -> Result<Facts, ContentError> {
    let not_elf = |e: object::Error| ContentError::NotElf(e.to_string());
    let header = H::parse(cache).map_err(not_elf)?;
    let file_type = header.e_type(header.endian().map_err(not_elf)?);
    if ![elf::ET_EXEC, elf::ET_DYN, elf::ET_REL].contains(&file_type) {
        return Err(ContentError::FileType(file_type.0));
    }
    let headers = Headers::read(header, cache)?;
    match (headers.build_id(cache)?, kind) {
        // Split DWARF has no ID of the image: who uploads it says to which one it belongs.
        (_, ArtefactKind::Dwp | ArtefactKind::Dwo) => {}
        (Some(found), _) if found == stated => {}
        (Some(found), _) => return Err(ContentError::BuildId(Box::new(Mismatch { found, stated }))),
        // A skeleton lacks the bytes that the hash covers.
        (None, ArtefactKind::Skeleton) if stated.as_bytes().len() == FILE_ID_BYTES => {}
        (None, ArtefactKind::Skeleton) => return Err(ContentError::SkeletonHash(stated)),
        (None, _) => match file_id(cache)? {
            found if found == stated => {}
            found => return Err(ContentError::FileHash(Box::new(Mismatch { found, stated }))),
        },
    }
    headers.refuse_inflation(cache)?;
    let facts = facts(&headers, ReadRef::len(cache).unwrap_or_default());
    let has = |name: &str| facts.sections.iter().any(|it| it.name == name && !it.nobits && it.size > 0);
    match kind {
        ArtefactKind::Dwp | ArtefactKind::Dwo if !has(".debug_info.dwo") => {
            Err(ContentError::NoSplitDwarf(".debug_info.dwo"))
        }
        ArtefactKind::Dwp if !has(".debug_cu_index") => Err(ContentError::NoSplitDwarf(".debug_cu_index")),
        ArtefactKind::Debuginfo if !facts.dwarf && !facts.symtab => Err(ContentError::NoDebuginfo),
        ArtefactKind::Executable if !facts.code => Err(ContentError::NoCode),
        ArtefactKind::Skeleton
            if !facts.unwind && !facts.symtab && !facts.sections.iter().any(|s| s.name == ".dynsym") =>
        {
            Err(ContentError::EmptySkeleton)
        }
        _ => Ok(facts),
    }
}

fn file_id<C: Content + ?Sized>(cache: &headers::Cache<'_, C>) -> Result<BuildId, ContentError> {
    let unreadable = |()| ContentError::Read(io::ErrorKind::UnexpectedEof.into());
    let length = ReadRef::len(cache).map_err(unreadable)?;
    htlhash_with(length, |offset, size| cache.read_bytes_at(offset, size).map_err(unreadable))
}

fn facts<H: FileHeader<Endian = Endianness>>(headers: &Headers<'_, H>, file_bytes: u64) -> Facts {
    let endian = headers.endian;
    let (mut facts, mut name_bytes) = (Facts::default(), 0);
    for section in headers.sections {
        let name = headers.name(section);
        let (offset, size): (u64, u64) = (section.sh_offset(endian).into(), section.sh_size(endian).into());
        let nobits = section.sh_type(endian) == elf::SHT_NOBITS;
        let inside = offset.checked_add(size).is_some_and(|end| end <= file_bytes);
        let data = !nobits && size > 0 && inside;
        match name {
            b".debug_info" | b".zdebug_info" => facts.dwarf |= data,
            b".symtab" => facts.symtab |= data,
            b".eh_frame" | b".debug_frame" | b".zdebug_frame" | b".gopclntab" | b".data.rel.ro.gopclntab" => {
                facts.unwind |= data
            }
            _ => {}
        }
        facts.code |= data && section.sh_flags(endian).0 & elf::SHF_EXECINSTR.0 != 0;
        let is_named = (1..=MAX_SECTION_NAME_BYTES).contains(&name.len());
        let has_room = facts.sections.len() < MAX_RECORDED_SECTIONS
            && name_bytes + name.len() <= MAX_RECORDED_NAME_BYTES;
        if has_room && is_named && (nobits || inside) {
            name_bytes += name.len();
            let name = String::from_utf8_lossy(name).into_owned();
            facts.sections.push(Section { name, offset, size, nobits });
        }
    }
    if headers.sections.is_empty() {
        facts.code = headers.segments.iter().any(|segment| {
            segment.p_type(endian) == elf::PT_LOAD
                && segment.p_flags(endian).0 & elf::PF_X.0 != 0
                && segment.p_filesz(endian).into() > 0
        });
    }
    facts
}

/// The facts as they are kept in the catalog.
impl FromStr for Facts {
    type Err = serde_json::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        serde_json::from_str(text)
    }
}

#[cfg(test)]
mod tests {
    use windlass_schema::file_id::htlhash;

    use super::*;

    #[test]
    fn no_cut_or_changed_file_panics() {
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        // Headers at the front, section headers at the back: keep both, drop the middle.
        let small = &own[..own.len().min(8192)];
        let id = BuildId::new(&[1; 16]).unwrap();
        for kind in ArtefactKind::ALL {
            for end in 0..small.len() {
                let _ = check(&small[..end], *kind, id);
            }
        }
        for at in 0..64.min(own.len()) {
            for value in [0, 0x7f, 0xff] {
                let mut broken = own.clone();
                broken[at] = value;
                let _ = check(&broken, ArtefactKind::Executable, id);
            }
        }
    }

    /// An ELF file with sections of code whose names are all but the first bytes of one name.
    fn sections_named_alike(sections: u16, name_bytes: usize) -> Vec<u8> {
        const HEADER_BYTES: usize = 64;
        let section = |name: u32, section_type: u32, flags: u64, size: usize| {
            let words = [name, section_type].map(u32::to_le_bytes).concat();
            let longs = [flags, 0, HEADER_BYTES as u64, size as u64, 0, 0, 0].map(u64::to_le_bytes).concat();
            [words, longs].concat()
        };
        let mut file = vec![0; HEADER_BYTES];
        file.resize(HEADER_BYTES + name_bytes, b'n');
        file.push(0);
        let table = file.len() as u64;
        let strings = section(name_bytes as u32, elf::SHT_STRTAB.0, 0, name_bytes + 1);
        file.extend(section(name_bytes as u32, elf::SHT_NULL.0, 0, 0));
        file.extend(strings);
        for name in 1..=sections {
            file.extend(section(name.into(), elf::SHT_PROGBITS.0, elf::SHF_EXECINSTR.0, 1));
        }
        file[..20].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x03\0\x3e\0");
        file[20] = 1;
        file[40..48].copy_from_slice(&table.to_le_bytes());
        for (at, value) in [(52, 64), (54, 56), (58, 64), (60, sections + 2), (62, 1)] {
            file[at..at + 2].copy_from_slice(&u16::to_le_bytes(value));
        }
        file
    }

    #[test]
    fn names_of_sections_do_not_multiply_the_file() {
        let names = |file: &[u8]| -> Vec<usize> {
            let facts = check(file, ArtefactKind::Executable, htlhash(file)).unwrap();
            assert!(facts.code);
            facts.sections.iter().map(|section| section.name.len()).collect()
        };
        assert_eq!(names(&sections_named_alike(3, 20)), [19, 18, 17]);
        assert_eq!(names(&sections_named_alike(1000, 1255)), [256, 255]);
    }
}
