//! One file of a build: whether it is an ELF file to upload, under which identity and kind, what it
//! brings and what it lacks.
//!
//! Identity follows the service: the GNU build-ID note, or, for an executable without one, the 16-byte
//! OpenTelemetry `htlhash` file ID.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use object::read::elf::{ElfFile32, ElfFile64};
use object::{Object as _, ObjectKind};
use sha2::{Digest as _, Sha256};
use windlass_schema::BuildId;
use windlass_schema::file_id::htlhash;
use windlass_schema::http::{ArtefactKind, ArtefactName};
use windlass_symbol_index::Contents;

use super::sources::{self, SourceFile};
use crate::mapped_elf;

/// Where an artefact's build-ID comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Identity {
    /// The GNU build-ID note.
    Gnu,
    /// The hash of parts of the file.
    Htlhash,
}

/// An ELF file to upload.
#[derive(Debug)]
pub(crate) struct ElfFile {
    pub(crate) path: PathBuf,
    pub(crate) build_id: BuildId,
    pub(crate) identity: Identity,
    pub(crate) kind: ArtefactKind,
    pub(crate) contents: Contents,
    pub(crate) sha256: String,
    pub(crate) size_bytes: u64,
    /// Files of its line table that exist here; empty unless asked for.
    pub(crate) sources: Vec<SourceFile>,
}

/// What a file turned out to be.
#[derive(Debug)]
pub(crate) enum Inspected {
    Artefact(Box<ElfFile>),
    /// An ELF file that no one would look for.
    Skipped(SkipReason),
    NotElf,
}

/// Why an ELF file is not uploaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum SkipReason {
    /// A `.o` or `.dwo` file: what runs is linked from it, and has its debug information or names it.
    Relocatable,
    /// A memory dump.
    Core,
    /// A debug file that nothing ties to what it describes.
    DebugWithoutBuildId,
    /// Neither code, nor debug information, nor symbols.
    Empty,
}

impl SkipReason {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Relocatable => "relocatable object without a build-ID",
            Self::Core => "core dump",
            Self::DebugWithoutBuildId => {
                "debug file without a build-ID note: link with -Wl,--build-id, then split the debug information off"
            }
            Self::Empty => "neither code nor debug information nor symbols",
        }
    }
}

impl ElfFile {
    /// How the service knows this file.
    pub(crate) fn artefact(&self, kind: ArtefactKind) -> ArtefactName {
        ArtefactName { build_id: self.build_id, kind, path: None, sha256: Some(self.sha256.clone()) }
    }

    /// Whether it can answer a debugger's request for debug information.
    pub(crate) fn has_debuginfo(&self) -> bool {
        self.contents.debug_info || self.contents.symtab
    }

    /// How much it tells; the richest of several files with one build-ID is the one to keep.
    pub(crate) fn richness(&self) -> (bool, bool, bool, bool) {
        let Contents { debug_info, line_table, symtab, dynsym, .. } = self.contents;
        (debug_info, line_table, symtab, dynsym)
    }
}

/// Reads and classifies the file at `path`.
pub(crate) fn inspect(path: &Path, with_sources: bool) -> anyhow::Result<Inspected> {
    let mut file = File::open(path)?;
    let mut magic = [0; 4];
    match file.read_exact(&mut magic) {
        Ok(()) if magic == object::elf::ELFMAG => {}
        Ok(()) => return Ok(Inspected::NotElf),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(Inspected::NotElf),
        Err(error) => return Err(error.into()),
    }
    let elf = mapped_elf::map_open(&file)?;
    let (note, object_kind) = header_facts(&elf)?;
    match (object_kind, note) {
        (ObjectKind::Core, _) => return Ok(Inspected::Skipped(SkipReason::Core)),
        (ObjectKind::Relocatable, None) => return Ok(Inspected::Skipped(SkipReason::Relocatable)),
        _ => {}
    }
    let contents = windlass_symbol_index::describe(&elf)?;
    let kind = match kind_of(&contents, note.is_some()) {
        Ok(kind) => kind,
        Err(reason) => return Ok(Inspected::Skipped(reason)),
    };
    Ok(Inspected::Artefact(Box::new(ElfFile {
        path: path.to_owned(),
        build_id: note.unwrap_or_else(|| htlhash(&elf)),
        identity: if note.is_some() { Identity::Gnu } else { Identity::Htlhash },
        kind,
        contents,
        sha256: hex(&Sha256::digest(&elf)),
        size_bytes: elf.len() as u64,
        sources: if with_sources { sources::named_by(&elf) } else { Vec::new() },
    })))
}

/// Files with code are executables, which serve their DWARF too; files without are split off debug files.
fn kind_of(contents: &Contents, has_note: bool) -> Result<ArtefactKind, SkipReason> {
    if contents.code {
        Ok(ArtefactKind::Executable)
    } else if !(contents.debug_info || contents.line_table || contents.symtab) {
        Err(SkipReason::Empty)
    } else if has_note {
        Ok(ArtefactKind::Debuginfo)
    } else {
        Err(SkipReason::DebugWithoutBuildId)
    }
}

/// The build-ID note and the type in the ELF header.
fn header_facts(elf: &[u8]) -> anyhow::Result<(Option<BuildId>, ObjectKind)> {
    /// EI_CLASS, and its value for 64-bit files.
    const CLASS: usize = 4;
    let (note, kind) = if elf.get(CLASS) == Some(&object::elf::ELFCLASS32.0) {
        let file = ElfFile32::<object::Endianness>::parse(elf)?;
        (file.build_id()?, file.kind())
    } else {
        let file = ElfFile64::<object::Endianness>::parse(elf)?;
        (file.build_id()?, file.kind())
    };
    // Some linkers leave an empty note: that is none.
    Ok((note.filter(|note| !note.is_empty()).map(BuildId::new).transpose()?, kind))
}

/// Lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Something that a file does not bring, and how a build would add it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Lack {
    pub(crate) what: &'static str,
    pub(crate) remedy: &'static str,
}

/// What `contents` brings, in the words of the report.
pub(crate) fn brings(contents: &Contents) -> Vec<&'static str> {
    [
        (contents.code, "code"),
        (contents.unwind, "unwind sections"),
        (contents.debug_info, "DWARF"),
        (contents.line_table, "lines"),
        (contents.symtab, ".symtab"),
        (contents.dynsym, ".dynsym"),
        (contents.gnu_debugdata, "MiniDebugInfo"),
    ]
    .into_iter()
    .filter_map(|(present, name)| present.then_some(name))
    .collect()
}

/// What `file` lacks for unwinding and naming.
pub(crate) fn lacks(file: &ElfFile) -> Vec<Lack> {
    let Contents { debug_info, line_table, symtab, unwind, code, .. } = file.contents;
    let mut lacks = Vec::new();
    let mut lack = |missing: bool, what, remedy| {
        if missing {
            lacks.push(Lack { what, remedy });
        }
    };
    lack(
        file.identity == Identity::Htlhash,
        "GNU build-ID",
        "link with -Wl,--build-id (rustc: -C link-arg=-Wl,--build-id; Go: -ldflags=-B=gobuildid; zig: --build-id=sha1)",
    );
    lack(
        code && !unwind,
        "unwind sections",
        "compile with -fasynchronous-unwind-tables (rustc: -C force-unwind-tables=yes)",
    );
    lack(!debug_info, "DWARF", "compile with -g (Cargo: debug = true) and upload before strip");
    lack(debug_info && !line_table, "lines", "compile with -g or at least -gline-tables-only");
    lack(!debug_info && !symtab, ".symtab", "upload before strip; link without -s");
    lacks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_follow_code_and_debug_information() {
        let code = Contents { code: true, ..Contents::default() };
        let debug = Contents { debug_info: true, ..Contents::default() };
        assert_eq!(kind_of(&code, true), Ok(ArtefactKind::Executable));
        assert_eq!(kind_of(&code, false), Ok(ArtefactKind::Executable));
        assert_eq!(kind_of(&debug, true), Ok(ArtefactKind::Debuginfo));
        assert_eq!(kind_of(&debug, false), Err(SkipReason::DebugWithoutBuildId));
        assert_eq!(kind_of(&Contents { dynsym: true, ..Contents::default() }, true), Err(SkipReason::Empty));
    }

    fn file(contents: Contents, identity: Identity) -> ElfFile {
        ElfFile {
            path: "x".into(),
            build_id: "abcd".parse().unwrap(),
            identity,
            kind: ArtefactKind::Executable,
            contents,
            sha256: String::new(),
            size_bytes: 0,
            sources: Vec::new(),
        }
    }

    #[track_caller]
    fn check_lacks(contents: Contents, identity: Identity, expect: &[&str]) {
        let lacks: Vec<_> = lacks(&file(contents, identity)).iter().map(|lack| lack.what).collect();
        assert_eq!(lacks, expect);
    }

    #[test]
    fn what_lacks_is_named_once() {
        let full = Contents {
            code: true,
            unwind: true,
            debug_info: true,
            line_table: true,
            symtab: true,
            ..Contents::default()
        };
        check_lacks(full, Identity::Gnu, &[]);
        check_lacks(full, Identity::Htlhash, &["GNU build-ID"]);
        check_lacks(Contents { line_table: false, ..full }, Identity::Gnu, &["lines"]);
        check_lacks(
            Contents { code: true, ..Contents::default() },
            Identity::Gnu,
            &["unwind sections", "DWARF", ".symtab"],
        );
        check_lacks(
            Contents { debug_info: true, line_table: true, ..Contents::default() },
            Identity::Gnu,
            &[],
        );
    }

    #[test]
    fn this_test_is_an_executable_with_lines() {
        let Inspected::Artefact(file) = inspect(Path::new("/proc/self/exe"), false).unwrap() else {
            panic!("not recognised");
        };
        assert_eq!(file.kind, ArtefactKind::Executable);
        assert!(file.contents.unwind && file.contents.line_table, "{:?}", file.contents);
        assert_eq!(file.sha256.len(), 64);
    }

    #[test]
    fn text_and_truncated_elf_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        for not_elf in ["", "\x7fEL", "#!/bin/sh\n"] {
            std::fs::write(&path, not_elf).unwrap();
            assert!(matches!(inspect(&path, false), Ok(Inspected::NotElf)), "{not_elf:?}");
        }
        std::fs::write(&path, "\x7fELF\x02\x01\x01").unwrap();
        assert!(inspect(&path, false).is_err());
    }
}
