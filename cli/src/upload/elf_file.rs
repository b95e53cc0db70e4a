//! One file of a build: whether it is an ELF file to upload, under which identity and kind, and what of it
//! is sent.
//!
//! Identity follows the service: the GNU build-ID note, or, for an executable without one, the 16-byte
//! OpenTelemetry `htlhash` file ID.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use object::read::elf::{ElfFile32, ElfFile64};
use object::{Object as _, ObjectKind, ObjectSection as _};
use windlass_schema::BuildId;
use windlass_schema::file_id::htlhash;
use windlass_schema::http::{ArtefactKind, ArtefactName, Brings};
use windlass_symbol_index::Contents;

use super::companions::{self, Companion};
use super::content::Content;
use super::debug_part::debug_part;
use super::sources::{SourceReader, Sources};
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

/// The image that a companion belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) build_id: BuildId,
    pub(crate) identity: Identity,
}

/// An artefact of an ELF file, to upload.
#[derive(Debug)]
pub(crate) struct ElfFile {
    pub(crate) path: PathBuf,
    pub(crate) build_id: BuildId,
    pub(crate) identity: Identity,
    pub(crate) kind: ArtefactKind,
    /// Of a `.dwo`, the ID of its unit in hex.
    pub(crate) unit: Option<String>,
    /// What the file brings, of which a part may be sent.
    pub(crate) contents: Contents,
    pub(crate) content: Content,
    /// Files of its line table that exist here; empty unless asked for.
    pub(crate) sources: Sources,
    /// What may belong to it.
    pub(crate) companions: Vec<Companion>,
}

/// What a file turned out to be.
#[derive(Debug)]
pub(crate) enum Inspected {
    /// What is sent of it: one artefact, or with `--only-debug` its debug part and its skeleton.
    Artefacts(Vec<ElfFile>),
    /// An ELF file that no one would look for.
    Skipped(SkipReason),
    NotElf,
}

/// Why an ELF file is not uploaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum SkipReason {
    /// A `.o` file: what runs is linked from it, and has its debug information.
    Relocatable,
    /// A `.dwo` or `.dwp` file that belongs to nothing that was found.
    SplitDwarf,
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
            Self::SplitDwarf => "split DWARF (.dwo, .dwp) of no program found here",
            Self::Core => "core dump",
            Self::DebugWithoutBuildId => {
                "debug file without a build-ID note: link with -Wl,--build-id, then split the debug information off"
            }
            Self::Empty => "neither code nor debug information nor symbols",
        }
    }
}

/// How files are looked at.
#[derive(Debug, Default)]
pub(crate) struct Inspection {
    /// Reads sources, if they go too.
    pub(crate) sources: Option<SourceReader>,
    /// Send debug parts instead of whole programs.
    pub(crate) only_debug: bool,
    /// Folders with debug files.
    pub(crate) debug_dirs: Vec<PathBuf>,
}

impl ElfFile {
    /// How the service knows this file.
    pub(crate) fn artefact(&self, kind: ArtefactKind) -> ArtefactName {
        // Of skeletons the first is as good as any.
        let sha256 = (kind != ArtefactKind::Skeleton).then(|| self.content.sha256.clone());
        let brings =
            matches!(kind, ArtefactKind::Executable | ArtefactKind::Debuginfo).then(|| self.brings());
        ArtefactName { build_id: self.build_id, kind, path: self.unit.clone(), sha256, brings }
    }

    /// What it has to name code with: what makes the service prefer it.
    fn brings(&self) -> Brings {
        match self.contents {
            Contents { debug_info: true, .. } => Brings::DebugInfo,
            Contents { line_table: true, .. } => Brings::LineTable,
            Contents { symtab: true, .. } => Brings::Symtab,
            Contents { dynsym: true, .. } => Brings::Dynsym,
            _ => Brings::Nothing,
        }
    }

    /// Whose it is.
    pub(crate) fn owner(&self) -> Owner {
        Owner { build_id: self.build_id, identity: self.identity }
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

    /// Split DWARF of `owner`: one unit of it, or all.
    pub(crate) fn split(path: &Path, file: &File, owner: Owner, unit: Option<u64>) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            build_id: owner.build_id,
            identity: owner.identity,
            kind: if unit.is_some() { ArtefactKind::Dwo } else { ArtefactKind::Dwp },
            unit: unit.map(|id| format!("{id:016x}")),
            contents: Contents::default(),
            content: Content::whole(path, file)?,
            sources: Sources::default(),
            companions: Vec::new(),
        })
    }
}

/// Reads and classifies the file at `path`.
pub(crate) fn inspect(path: &Path, inspection: &Inspection) -> anyhow::Result<Inspected> {
    let file = File::open(path)?;
    let mut magic = [0; 4];
    match file.read_exact_at(&mut magic, 0) {
        Ok(()) if magic == object::elf::ELFMAG => {}
        Ok(()) => return Ok(Inspected::NotElf),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(Inspected::NotElf),
        Err(error) => return Err(error.into()),
    }
    let elf = mapped_elf::read_or_map(&file)?;
    let (note, object_kind) = header_facts(&elf)?;
    match (object_kind, note) {
        (ObjectKind::Core, _) => return Ok(Inspected::Skipped(SkipReason::Core)),
        _ if is_split_dwarf(&elf) => return Ok(Inspected::Skipped(SkipReason::SplitDwarf)),
        (ObjectKind::Relocatable, None) => return Ok(Inspected::Skipped(SkipReason::Relocatable)),
        _ => {}
    }
    let contents = windlass_symbol_index::describe(&elf)?;
    let kind = match kind_of(&contents, note.is_some()) {
        Ok(kind) => kind,
        Err(reason) => return Ok(Inspected::Skipped(reason)),
    };
    let whole = |content, kind| ElfFile {
        path: path.to_owned(),
        build_id: note.unwrap_or_else(|| htlhash(&elf[..])),
        identity: if note.is_some() { Identity::Gnu } else { Identity::Htlhash },
        kind,
        unit: None,
        contents,
        content,
        sources: Sources::default(),
        companions: Vec::new(),
    };
    let mut artefacts = if inspection.only_debug && kind == ArtefactKind::Executable {
        anyhow::ensure!(
            note.is_some(),
            "without a build-ID note nothing ties a split off debug file to it: link with -Wl,--build-id, or upload \
             it whole"
        );
        parts(path, &file, &elf, &contents, whole)?
    } else {
        vec![whole(Content::whole(path, &file)?, kind)]
    };
    if let Some(first) = artefacts.first_mut() {
        first.companions = companions::of(path, &elf, note, &inspection.debug_dirs);
        if let Some(reader) = &inspection.sources {
            first.sources = reader.named_by(&elf);
        }
    }
    Ok(Inspected::Artefacts(artefacts))
}

/// What `--only-debug` sends of a program: the debug part, if it has one, and the skeleton, from which the service
/// makes the unwind table that a debug part has no sections for.
fn parts(
    path: &Path,
    file: &File,
    elf: &[u8],
    contents: &Contents,
    artefact: impl Fn(Content, ArtefactKind) -> ElfFile,
) -> anyhow::Result<Vec<ElfFile>> {
    let mut parts = Vec::new();
    if contents.debug_info || contents.symtab {
        let content = Content::pieces(path, file, debug_part(elf)?)?;
        parts.push(artefact(content, ArtefactKind::Debuginfo));
    }
    // Made for the instruction sets that agents walk stacks of.
    if let Ok(skeleton) = windlass_agent::skeleton::skeleton(elf)
        && contents.unwind
    {
        let content = Content::skeleton(path, file, &skeleton)?;
        parts.push(artefact(content, ArtefactKind::Skeleton));
    }
    anyhow::ensure!(
        !parts.is_empty(),
        "neither debug information nor unwind sections that could go without the code"
    );
    Ok(parts)
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

/// Whether it is a `.dwo` or `.dwp` file. (An object file that is compiled with `-gsplit-dwarf=single` has such sections,
/// which the linker leaves there, beside code.)
fn is_split_dwarf(elf: &[u8]) -> bool {
    let Ok(file) = object::File::parse(elf) else { return false };
    file.section_by_name(".debug_info.dwo").is_some()
        && !file.sections().any(|section| section.kind() == object::SectionKind::Text && section.size() > 0)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_kind(contents: Contents, has_note: bool, expect: Result<ArtefactKind, SkipReason>) {
        assert_eq!(kind_of(&contents, has_note), expect);
    }

    #[test]
    fn kinds_follow_the_contents() {
        let code = Contents { code: true, ..Contents::default() };
        let debug = Contents { debug_info: true, ..Contents::default() };
        check_kind(code, false, Ok(ArtefactKind::Executable));
        check_kind(Contents { code: true, ..debug }, true, Ok(ArtefactKind::Executable));
        check_kind(debug, true, Ok(ArtefactKind::Debuginfo));
        check_kind(debug, false, Err(SkipReason::DebugWithoutBuildId));
        check_kind(Contents::default(), true, Err(SkipReason::Empty));
    }

    #[test]
    fn a_program_is_sent_whole_or_in_two_parts_without_its_code() {
        let path = Path::new("../fixtures/elf/inlined");
        let kinds = |only_debug| {
            let inspection = Inspection { only_debug, ..Inspection::default() };
            let Inspected::Artefacts(files) = inspect(path, &inspection).unwrap() else {
                panic!("not recognised")
            };
            assert!(files.iter().all(|file| file.contents.unwind && file.contents.line_table));
            assert!(files.iter().all(|file| file.content.sha256.len() == 64));
            files.iter().map(|file| file.kind).collect::<Vec<_>>()
        };
        assert_eq!(kinds(false), [ArtefactKind::Executable]);
        assert_eq!(kinds(true), [ArtefactKind::Debuginfo, ArtefactKind::Skeleton]);
    }

    #[test]
    fn text_and_truncated_elf_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        for not_elf in ["", "\x7fEL", "#!/bin/sh\n"] {
            std::fs::write(&path, not_elf).unwrap();
            assert!(matches!(inspect(&path, &Inspection::default()), Ok(Inspected::NotElf)), "{not_elf:?}");
        }
        std::fs::write(&path, "\x7fELF\x02\x01\x01").unwrap();
        assert!(inspect(&path, &Inspection::default()).is_err());
    }
}
