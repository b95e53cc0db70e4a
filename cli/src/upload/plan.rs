//! What to send of what was found: decided from values alone, so that it can be tested without a
//! service.
//!
//! One build-ID has one executable. Of several files with the same build-ID and kind (stripped and not,
//! installed and not) the richest goes. The service prefers what brings more, too; a file that brings as much as what is
//! there goes as debuginfo, if there is none. A stripped file has nothing to add to one that is
//! there, so that it being uploaded after `strip` again is no failure.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;

use windlass_schema::BuildId;
use windlass_schema::http::{ArtefactKind, ArtefactName, MissingResponse};

use super::contents::Image;
use super::elf_file::{ElfFile, Identity, Inspected, SkipReason};
use super::gather::Gathered;

/// What becomes of an artefact.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// To be sent.
    Send,
    /// Sent, and new to the service.
    Sent,
    /// The service has it.
    Present,
    /// Not worth sending, and why.
    Skipped(String),
    /// Could not be sent, and why.
    Failed(String),
}

/// An ELF file with its fate and that of its sources.
#[derive(Debug)]
pub(crate) struct PlannedFile {
    pub(crate) file: ElfFile,
    /// The kind it is sent as.
    pub(crate) kind: ArtefactKind,
    pub(crate) fate: Fate,
    /// In the order of the files of `file.sources`.
    pub(crate) sources: Vec<Fate>,
}

/// Everything that was found.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) files: Vec<PlannedFile>,
    /// Paths that could not be read, or were named and are no ELF file to upload.
    pub(crate) unusable: Vec<(PathBuf, String)>,
    /// ELF files in folders that no one would look for.
    pub(crate) skipped: BTreeMap<SkipReason, u64>,
    /// What the files of each build-ID bring together.
    pub(crate) images: HashMap<BuildId, Image>,
}

impl Plan {
    pub(crate) fn new(gathered: Gathered) -> Self {
        let mut plan = Self::default();
        for (candidate, result) in gathered.inspected {
            match result {
                Ok(Inspected::Artefacts(files)) => files.into_iter().for_each(|file| plan.add(file)),
                Ok(Inspected::NotElf) if !candidate.named => {}
                Ok(Inspected::NotElf) => plan.unusable.push((candidate.path, "not an ELF file".to_owned())),
                Ok(Inspected::Skipped(reason)) if !candidate.named => {
                    *plan.skipped.entry(reason).or_default() += 1;
                }
                Ok(Inspected::Skipped(reason)) => {
                    plan.unusable.push((candidate.path, reason.as_str().to_owned()));
                }
                Err(error) => plan.unusable.push((candidate.path, format!("{error:#}"))),
            }
        }
        for (id, image) in &mut plan.images {
            image.absent_units = gathered.absent_units.contains(id);
            image.absent_supplementary = gathered.absent_supplementary.contains(id);
        }
        plan.skip_duplicates();
        plan
    }

    fn add(&mut self, file: ElfFile) {
        let image = self.images.entry(file.build_id).or_default();
        image.add(&file.contents, file.identity == Identity::Gnu);
        self.files.push(PlannedFile {
            kind: file.kind,
            fate: Fate::Send,
            sources: vec![Fate::Send; file.sources.files.len()],
            file,
        });
    }

    /// Whether there is nothing to tell of.
    pub(crate) fn is_empty(&self) -> bool {
        self.files.is_empty() && self.unusable.is_empty() && self.skipped.is_empty()
    }

    fn skip_duplicates(&mut self) {
        let key = |planned: &PlannedFile| (planned.file.build_id, planned.kind, planned.file.unit.clone());
        let mut best: HashMap<(BuildId, ArtefactKind, Option<String>), usize> = HashMap::new();
        for (index, planned) in self.files.iter().enumerate() {
            let kept = best.entry(key(planned)).or_insert(index);
            if planned.file.richness() > self.files[*kept].file.richness() {
                *kept = index;
            }
        }
        for index in 0..self.files.len() {
            let planned = &self.files[index];
            let kept = best[&key(planned)];
            if kept != index {
                let other = &self.files[kept].file;
                let same = if other.content.sha256 == planned.file.content.sha256 {
                    "the same as"
                } else {
                    "same build-ID as"
                };
                let reason = format!("{same} {}, which goes", other.path.display());
                self.files[index].fate = Fate::Skipped(reason);
            }
        }
    }

    /// All that the service is asked about.
    pub(crate) fn questions(&self) -> Vec<ArtefactName> {
        let mut questions = Vec::new();
        for PlannedFile { file, kind, fate, .. } in &self.files {
            if *fate == Fate::Send {
                questions.push(file.artefact(*kind));
                if *kind == ArtefactKind::Executable && file.has_debuginfo() {
                    questions.push(file.artefact(ArtefactKind::Debuginfo));
                }
                questions.extend(file.sources.files.iter().map(|source| source.artefact(file.build_id)));
            }
        }
        questions
    }

    /// Settles what goes, from what the service lacks.
    pub(crate) fn decide(&mut self, answer: &MissingResponse) {
        let missing: HashSet<_> = answer.missing.iter().collect();
        let differing: HashSet<_> = answer.differing.iter().collect();
        let fate_of = |artefact: &ArtefactName| {
            if missing.contains(artefact) {
                Fate::Send
            } else if differing.contains(artefact) {
                Fate::Failed(format!("the service has another {} for this build-ID", artefact.kind))
            } else {
                Fate::Present
            }
        };
        for planned in &mut self.files {
            if planned.fate != Fate::Send {
                planned.sources.fill(Fate::Skipped("goes with the other file".to_owned()));
                continue;
            }
            planned.fate = fate_of(&planned.file.artefact(planned.kind));
            let other_executable =
                planned.kind == ArtefactKind::Executable && matches!(planned.fate, Fate::Failed(_));
            if other_executable && planned.file.has_debuginfo() {
                let fate = fate_of(&planned.file.artefact(ArtefactKind::Debuginfo));
                if !matches!(fate, Fate::Failed(_)) {
                    (planned.kind, planned.fate) = (ArtefactKind::Debuginfo, fate);
                }
            } else if other_executable {
                let reason =
                    "the service has another executable for this build-ID, to which this one adds nothing";
                planned.fate = Fate::Skipped(reason.to_owned());
            }
            for (source, fate) in planned.file.sources.files.iter().zip(&mut planned.sources) {
                *fate = fate_of(&source.artefact(planned.file.build_id));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upload::content::Content;
    use crate::upload::gather::InspectedFile;
    use crate::upload::sources::Sources;
    use crate::upload::tree::Candidate;
    use windlass_schema::http::Brings;
    use windlass_symbol_index::Contents;

    /// A file whose content is `content`.
    fn file(path: &str, id: &str, content: &str, debug_info: bool) -> InspectedFile {
        let contents = Contents {
            debug_info,
            line_table: debug_info,
            symtab: debug_info,
            dynsym: true,
            unwind: true,
            gnu_debugdata: false,
            code: true,
        };
        let mut bytes = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut bytes, content.as_bytes()).unwrap();
        let file = ElfFile {
            path: path.into(),
            build_id: id.parse().unwrap(),
            identity: Identity::Gnu,
            kind: ArtefactKind::Executable,
            unit: None,
            contents,
            content: Content::whole(bytes.path(), bytes.as_file()).unwrap(),
            sources: Sources::default(),
            companions: Vec::new(),
        };
        (candidate(path, false), Ok(Inspected::Artefacts(vec![file])))
    }

    fn plan(inspected: Vec<InspectedFile>) -> Plan {
        Plan::new(Gathered { inspected, ..Gathered::default() })
    }

    fn candidate(path: &str, named: bool) -> Candidate {
        Candidate { path: path.into(), named, error: None }
    }

    fn sha256_of(content: &str) -> String {
        use sha2::Digest as _;
        crate::upload::content::hex(&sha2::Sha256::digest(content))
    }

    /// How a file of that content is asked for: `1` is stripped.
    fn name(id: &str, kind: ArtefactKind, content: &str) -> ArtefactName {
        let brings = if content == "1" { Brings::Dynsym } else { Brings::DebugInfo };
        ArtefactName {
            build_id: id.parse().unwrap(),
            kind,
            path: None,
            sha256: Some(sha256_of(content)),
            brings: Some(brings),
        }
    }

    #[test]
    fn the_richest_of_one_build_id_goes() {
        let plan = plan(vec![
            file("stripped", "abcd", "1", false),
            file("full", "abcd", "2", true),
            file("copy", "abcd", "2", true),
        ]);
        let fates: Vec<_> = plan.files.iter().map(|planned| &planned.fate).collect();
        assert_eq!(
            fates,
            [
                &Fate::Skipped("same build-ID as full, which goes".to_owned()),
                &Fate::Send,
                &Fate::Skipped("the same as full, which goes".to_owned()),
            ]
        );
        assert_eq!(
            plan.questions(),
            [name("abcd", ArtefactKind::Executable, "2"), name("abcd", ArtefactKind::Debuginfo, "2")]
        );
    }

    #[test]
    fn dwarf_goes_as_debuginfo_beside_a_stripped_executable() {
        let executable = name("abcd", ArtefactKind::Executable, "2");
        let debuginfo = name("abcd", ArtefactKind::Debuginfo, "2");
        let check =
            |missing: &[&ArtefactName], differing: &[&ArtefactName], kind, fate: fn(&Fate) -> bool| {
                let mut plan = plan(vec![file("full", "abcd", "2", true)]);
                plan.decide(&MissingResponse {
                    missing: missing.iter().map(|&name| name.clone()).collect(),
                    differing: differing.iter().map(|&name| name.clone()).collect(),
                });
                assert_eq!(plan.files[0].kind, kind);
                assert!(fate(&plan.files[0].fate), "{:?}", plan.files[0].fate);
            };
        let send = |fate: &Fate| *fate == Fate::Send;
        let present = |fate: &Fate| *fate == Fate::Present;
        let failed = |fate: &Fate| matches!(fate, Fate::Failed(_));
        check(&[&executable, &debuginfo], &[], ArtefactKind::Executable, send);
        check(&[], &[], ArtefactKind::Executable, present);
        check(&[&debuginfo], &[&executable], ArtefactKind::Debuginfo, send);
        check(&[], &[&executable], ArtefactKind::Debuginfo, present);
        check(&[], &[&executable, &debuginfo], ArtefactKind::Executable, failed);
    }

    #[test]
    fn a_stripped_file_has_nothing_to_add() {
        let mut plan = plan(vec![file("stripped", "abcd", "1", false)]);
        let differing = vec![name("abcd", ArtefactKind::Executable, "1")];
        plan.decide(&MissingResponse { missing: Vec::new(), differing });
        assert!(matches!(plan.files[0].fate, Fate::Skipped(_)), "{:?}", plan.files[0].fate);
    }

    #[test]
    fn what_was_named_is_never_ignored() {
        let plan = plan(vec![
            (candidate("notes.txt", true), Ok(Inspected::NotElf)),
            (candidate("tree/notes.txt", false), Ok(Inspected::NotElf)),
            (candidate("x.o", true), Ok(Inspected::Skipped(SkipReason::Relocatable))),
            (candidate("tree/x.o", false), Ok(Inspected::Skipped(SkipReason::Relocatable))),
            (candidate("tree/broken", false), Err(anyhow::anyhow!("bad"))),
        ]);
        let unusable: Vec<_> = plan.unusable.iter().map(|(path, _)| path.to_str().unwrap()).collect();
        assert_eq!(unusable, ["notes.txt", "x.o", "tree/broken"]);
        assert_eq!(plan.skipped[&SkipReason::Relocatable], 1);
    }
}
