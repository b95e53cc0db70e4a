//! Is this file what it is uploaded as? Identity and contents of an ELF file, checked before it is stored.
//!
//! Parca checks the length of the build-ID and leaves the rest to the symbolizer, hours later; a
//! stripped file uploaded by mistake then hides good debuginfo. Here the note inside the file must be the
//! build-ID in the path and the file must bring what its kind promises, or the uploader is told at
//! once. What a file brings is kept beside it, so that requests need not open it again.

use std::str::FromStr;

use object::elf::{self, FileHeader32, FileHeader64};
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader};
use object::{Endianness, FileKind};
use serde::{Deserialize, Serialize};
use windlass_schema::BuildId;
use windlass_schema::file_id::{FILE_ID_BYTES, htlhash};
use windlass_schema::http::ArtefactKind;
use windlass_schema::perf_map::{MAX_PERF_MAP_BYTES, clean_name, parse_line, perf_map_id};

/// Most sections kept on record: what `e_shnum` can say without extension. Later ones are not served.
const MAX_SECTIONS: usize = 0xff00;
/// Longest name of a section kept on record, in bytes; sections of DWARF, which clients ask for, have names of
/// at most 27. Names of many sections may be the same bytes of a file, so that without a limit a file of
/// some megabytes could make a record of terabytes.
const MAX_SECTION_NAME_BYTES: usize = 256;

/// Types of kernel symbols that are functions: global, local and weak text.
const KERNEL_CODE_TYPES: [u8; 4] = *b"TtWw";

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

/// Two build-IDs that should be one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// In the file.
    pub found: BuildId,
    /// In the path.
    pub stated: BuildId,
}

/// A file that is not what it is uploaded as.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ContentError {
    /// No ELF magic, or a header that contradicts itself.
    #[error("not a readable ELF file: {0}")]
    NotElf(String),
    /// A core file or worse.
    #[error("an ELF file of type {0}, expected an executable, a shared object or a module")]
    FileType(u16),
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
    /// No line, or too many bytes of them.
    #[error("perf map of {0} bytes, expected 1 to {MAX_PERF_MAP_BYTES}")]
    PerfMapSize(usize),
}

/// Checks that `content` is a `kind` of `stated`, and says what it brings.
pub fn check(content: &[u8], kind: ArtefactKind, stated: BuildId) -> Result<Facts, ContentError> {
    match kind {
        ArtefactKind::Source => Ok(Facts::default()),
        ArtefactKind::Kallsyms => check_kallsyms(content).map(|()| Facts::default()),
        ArtefactKind::PerfMap => check_perf_map(content, stated).map(|()| Facts::default()),
        ArtefactKind::Executable | ArtefactKind::Debuginfo | ArtefactKind::Skeleton => {
            match FileKind::parse(content) {
                Ok(FileKind::Elf64) => check_elf::<FileHeader64<Endianness>>(content, kind, stated),
                Ok(FileKind::Elf32) => check_elf::<FileHeader32<Endianness>>(content, kind, stated),
                _ => Err(ContentError::NotElf("another file type".to_owned())),
            }
        }
    }
}

fn check_elf<H: FileHeader<Endian = Endianness>>(
    content: &[u8],
    kind: ArtefactKind,
    stated: BuildId,
) -> Result<Facts, ContentError> {
    let not_elf = |e: object::Error| ContentError::NotElf(e.to_string());
    let header = H::parse(content).map_err(not_elf)?;
    let endian = header.endian().map_err(not_elf)?;
    let file_type = header.e_type(endian);
    if ![elf::ET_EXEC, elf::ET_DYN, elf::ET_REL].contains(&file_type) {
        return Err(ContentError::FileType(file_type.0));
    }
    match (build_id_note(header, endian, content), kind) {
        (Some(found), _) if found == stated => {}
        (Some(found), _) => return Err(ContentError::BuildId(Box::new(Mismatch { found, stated }))),
        // A skeleton lacks the bytes that the hash covers.
        (None, ArtefactKind::Skeleton) if stated.as_bytes().len() == FILE_ID_BYTES => {}
        (None, ArtefactKind::Skeleton) => return Err(ContentError::SkeletonHash(stated)),
        (None, _) => match htlhash(content) {
            found if found == stated => {}
            found => return Err(ContentError::FileHash(Box::new(Mismatch { found, stated }))),
        },
    }
    let facts = facts(header, endian, content).map_err(not_elf)?;
    match kind {
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

/// The GNU build-ID note, through sections or, where there are none or they lie, through segments.
fn build_id_note<H: FileHeader<Endian = Endianness>>(
    header: &H,
    endian: Endianness,
    content: &[u8],
) -> Option<BuildId> {
    let mut notes = Vec::new();
    for section in header.section_headers(endian, content).unwrap_or_default() {
        notes.extend(section.notes(endian, content).ok().flatten());
    }
    for segment in header.program_headers(endian, content).unwrap_or_default() {
        notes.extend(segment.notes(endian, content).ok().flatten());
    }
    notes.into_iter().find_map(|mut notes| {
        while let Ok(Some(note)) = notes.next() {
            if note.name() == elf::ELF_NOTE_GNU && note.n_type(endian) == elf::NT_GNU_BUILD_ID {
                return BuildId::new(note.desc()).ok();
            }
        }
        None
    })
}

fn facts<H: FileHeader<Endian = Endianness>>(
    header: &H,
    endian: Endianness,
    content: &[u8],
) -> object::Result<Facts> {
    let mut facts = Facts::default();
    let table = header.sections(endian, content)?;
    for section in table.iter() {
        let name = table.section_name(endian, section).unwrap_or_default();
        let (offset, size): (u64, u64) = (section.sh_offset(endian).into(), section.sh_size(endian).into());
        let nobits = section.sh_type(endian) == elf::SHT_NOBITS;
        let inside = offset.checked_add(size).is_some_and(|end| end <= content.len() as u64);
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
        if facts.sections.len() < MAX_SECTIONS && is_named && (nobits || inside) {
            let name = String::from_utf8_lossy(name).into_owned();
            facts.sections.push(Section { name, offset, size, nobits });
        }
    }
    if table.is_empty() {
        facts.code = header.program_headers(endian, content)?.iter().any(|segment| {
            segment.p_type(endian) == elf::PT_LOAD
                && segment.p_flags(endian).0 & elf::PF_X.0 != 0
                && segment.p_filesz(endian).into() > 0
        });
    }
    Ok(facts)
}

fn check_kallsyms(content: &[u8]) -> Result<(), ContentError> {
    let (mut lines, mut usable) = (0, false);
    for (number, line) in
        content.split(|byte| *byte == b'\n').enumerate().filter(|(_, line)| !line.is_empty())
    {
        lines += 1;
        let mut words = line.split(|byte| byte.is_ascii_whitespace());
        let address = words.next().and_then(|word| std::str::from_utf8(word).ok());
        let address = address.and_then(|word| u64::from_str_radix(word, 16).ok());
        let symbol_type = words.next().filter(|word| word.len() == 1);
        let name = words.next().is_some_and(|word| !word.is_empty());
        let (Some(address), Some(symbol_type), true) = (address, symbol_type, name) else {
            let text = String::from_utf8_lossy(&line[..line.len().min(80)]).into_owned();
            return Err(ContentError::Kallsyms { line: number + 1, text });
        };
        // A module is an image of its own: a fourth word names it, and its line names nothing of the kernel.
        let of_kernel = words.all(<[u8]>::is_empty);
        usable |= address != 0 && of_kernel && KERNEL_CODE_TYPES.contains(&symbol_type[0]);
    }
    match (lines, usable) {
        (0, _) => Err(ContentError::EmptyKallsyms),
        (_, false) => Err(ContentError::HiddenKallsyms),
        (_, true) => Ok(()),
    }
}

/// Checks that `content` is the list of functions whose ID is `stated`, as `perf_map` of the schema defines it.
fn check_perf_map(content: &[u8], stated: BuildId) -> Result<(), ContentError> {
    if !(1..=MAX_PERF_MAP_BYTES).contains(&content.len()) {
        return Err(ContentError::PerfMapSize(content.len()));
    }
    let found = perf_map_id(content);
    if found != stated {
        return Err(ContentError::PerfMapId(Box::new(Mismatch { found, stated })));
    }
    let mut behind = 0;
    let lines = content.strip_suffix(b"\n").unwrap_or(content).split(|byte| *byte == b'\n');
    for (number, line) in lines.enumerate() {
        let parsed = parse_line(line).filter(|parsed| parsed.start >= behind);
        let parsed = parsed
            .filter(|parsed| clean_name(parsed.name).is_some_and(|clean| clean.as_bytes() == parsed.name));
        let Some(parsed) = parsed else {
            let text = String::from_utf8_lossy(&line[..line.len().min(80)]).into_owned();
            return Err(ContentError::PerfMap { line: number + 1, text });
        };
        behind = parsed.end;
    }
    Ok(())
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

    #[test]
    fn perf_maps_are_what_their_id_says() {
        let check = |text: &str| {
            let content = text.as_bytes();
            super::check(content, ArtefactKind::PerfMap, perf_map_id(content))
        };
        assert!(check("1000 20 f\n1020 10 g (x)\n").is_ok());
        let other = BuildId::new(&[1; 20]).unwrap();
        let found = super::check(b"1000 20 f\n", ArtefactKind::PerfMap, other);
        assert!(matches!(found, Err(ContentError::PerfMapId(_))));
        for (text, bad) in [
            ("1000 20 f\n101f 10 g\n", 2),
            ("1000 20 f\n\n2000 1 g\n", 2),
            ("1000 20 f\n2000 10 \u{7}g\n", 2),
            ("1000 20 \n", 1),
            ("1000 20 f \n", 1),
            ("nonsense\n", 1),
        ] {
            assert!(
                matches!(check(text), Err(ContentError::PerfMap { line, .. }) if line == bad),
                "{text:?}: {:?}",
                check(text)
            );
        }
        assert_eq!(check(""), Err(ContentError::PerfMapSize(0)));
    }

    #[test]
    fn kernel_symbols_are_checked_line_by_line() {
        let check =
            |text: &str| check(text.as_bytes(), ArtefactKind::Kallsyms, BuildId::new(&[1; 20]).unwrap());
        assert!(check("ffffffff81000000 T _text\nffffffff81000100 t x [mod]\n").is_ok());
        assert!(matches!(
            check("ffffffff81000000 T _text\nnonsense\n"),
            Err(ContentError::Kallsyms { line: 2, .. })
        ));
        assert_eq!(check(""), Err(ContentError::EmptyKallsyms));
        let hidden = Err(ContentError::HiddenKallsyms);
        assert_eq!(check("0000000000000000 T _text\n0000000000000000 t helper\n"), hidden);
        assert_eq!(check("0000000000000000 T _text\nffffffff82000000 D data\n"), hidden);
        assert_eq!(check("0000000000000000 T _text\nffffffffc0000000 t x\t[mod]\n"), hidden);
    }
}
