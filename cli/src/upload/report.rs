//! What an upload did, for a reader and for a script.
//!
//! A reader gets a line for each file that went or failed, and what lacks once for all files that lack it; of a rerun,
//! where everything is there, a line. A script gets everything.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;

use serde::Serialize;
use windlass_schema::BuildId;
use windlass_schema::http::ArtefactKind;

use super::contents::{self, Image, Lack, Requirement};
use super::elf_file::Identity;
use super::plan::{Fate, Plan, PlannedFile};
use crate::terminal;

/// The result of an upload; its serialisation is the command's `--json`.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    dry_run: bool,
    files: Vec<FileReport>,
    /// Paths that could not be read, or were named and are no ELF file to upload.
    unusable: Vec<Unusable>,
    /// ELF files in folders that were left out, by reason.
    skipped: Vec<Skipped>,
    /// What `--require` asked for and was not brought.
    findings: Vec<Finding>,
    summary: Summary,
}

/// A file that lacks what it must bring.
#[derive(Debug, Serialize)]
struct Finding {
    path: String,
    build_id: BuildId,
    requires: Requirement,
    #[serde(flatten)]
    lack: Lack,
}

#[derive(Debug, Serialize)]
struct FileReport {
    path: String,
    build_id: BuildId,
    identity: Identity,
    kind: ArtefactKind,
    /// Of a `.dwo`, the unit's ID.
    #[serde(skip_serializing_if = "Option::is_none")]
    unit: Option<String>,
    sha256: String,
    size_bytes: u64,
    brings: Vec<&'static str>,
    /// What all files of this build-ID together lack.
    lacks: Vec<Lack>,
    status: Status,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Counts::is_empty")]
    sources: Counts,
    /// Sources that do not go, by reason.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    sources_skipped: Vec<Skipped>,
    /// The first source that could not be sent, and why.
    #[serde(skip_serializing_if = "Option::is_none")]
    source_error: Option<String>,
}

#[derive(Debug, Serialize)]
struct Unusable {
    path: String,
    error: String,
}

#[derive(Debug, Serialize)]
struct Skipped {
    reason: &'static str,
    files: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Status {
    Uploaded,
    Present,
    WouldUpload,
    Skipped,
    Failed,
}

impl Status {
    fn of(fate: &Fate) -> (Self, Option<String>) {
        match fate {
            Fate::Send => (Self::WouldUpload, None),
            Fate::Sent => (Self::Uploaded, None),
            Fate::Present => (Self::Present, None),
            Fate::Skipped(reason) => (Self::Skipped, Some(reason.clone())),
            Fate::Failed(reason) => (Self::Failed, Some(reason.clone())),
        }
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::Uploaded => "uploaded",
            Self::Present => "present",
            Self::WouldUpload => "would go",
            Self::Skipped => "skipped",
            Self::Failed => "FAILED",
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
struct Counts {
    uploaded: u64,
    present: u64,
    would_upload: u64,
    skipped: u64,
    failed: u64,
}

impl Counts {
    fn add(&mut self, status: Status) {
        *match status {
            Status::Uploaded => &mut self.uploaded,
            Status::Present => &mut self.present,
            Status::WouldUpload => &mut self.would_upload,
            Status::Skipped => &mut self.skipped,
            Status::Failed => &mut self.failed,
        } += 1;
    }

    fn add_all(&mut self, other: &Self) {
        self.uploaded += other.uploaded;
        self.present += other.present;
        self.would_upload += other.would_upload;
        self.skipped += other.skipped;
        self.failed += other.failed;
    }

    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

#[derive(Debug, Default, Serialize)]
struct Summary {
    #[serde(flatten)]
    files: Counts,
    sources: Counts,
    uploaded_bytes: u64,
    without_gnu_build_id: u64,
    without_debug_info: u64,
}

impl Report {
    pub(crate) fn new(plan: Plan, require: &[Requirement], dry_run: bool) -> Self {
        let mut summary = Summary::default();
        let images = plan.images;
        let findings = findings(&plan.files, &images, require);
        let lacking = images.values().filter(|image| !image.contents.debug_info);
        summary.without_debug_info = lacking.count() as u64;
        summary.without_gnu_build_id = images.values().filter(|image| !image.has_note).count() as u64;
        let files = plan.files.into_iter();
        let files = files.map(|planned| {
            let image = images.get(&planned.file.build_id).copied().unwrap_or_default();
            FileReport::new(planned, &image, &mut summary)
        });
        let files: Vec<_> = files.collect();
        summary.files.failed += plan.unusable.len() as u64;
        let unusable = plan.unusable.into_iter();
        let unusable =
            unusable.map(|(path, error)| Unusable { path: path.display().to_string(), error }).collect();
        let skipped = plan.skipped.into_iter();
        let skipped = skipped.map(|(reason, files)| Skipped { reason: reason.as_str(), files }).collect();
        Self { dry_run, files, unusable, skipped, findings, summary }
    }

    /// Images of which something is stored now.
    pub(crate) fn stored(&self) -> Vec<BuildId> {
        let files = self.files.iter();
        let stored = files.filter(|file| matches!(file.status, Status::Uploaded | Status::Present));
        let ids: BTreeSet<_> = stored.map(|file| file.build_id).collect();
        ids.into_iter().collect()
    }

    /// 0: all is there; 1: something could not be uploaded, or lacks what is required; 2: nothing could.
    pub(crate) fn exit_status(&self) -> u8 {
        let Summary { files: counts, sources, .. } = &self.summary;
        // What was skipped is there in a better form.
        let done = counts.uploaded + counts.present + counts.would_upload + counts.skipped;
        if done == 0 {
            crate::FAILED
        } else if counts.failed + sources.failed > 0 || !self.findings.is_empty() {
            crate::FINDINGS
        } else {
            crate::DONE
        }
    }
}

/// What is lacking of `require`, once for each image, by the first of its files.
fn findings(
    files: &[PlannedFile],
    images: &std::collections::HashMap<BuildId, Image>,
    require: &[Requirement],
) -> Vec<Finding> {
    let mut seen = HashSet::new();
    let mut findings = Vec::new();
    for PlannedFile { file, .. } in files {
        let Some(image) = images.get(&file.build_id).filter(|_| seen.insert(file.build_id)) else { continue };
        findings.extend(require.iter().filter_map(|&requires| {
            let lack = image.misses(requires)?;
            Some(Finding { path: file.path.display().to_string(), build_id: file.build_id, requires, lack })
        }));
    }
    findings
}

impl FileReport {
    fn new(planned: PlannedFile, image: &Image, summary: &mut Summary) -> Self {
        let PlannedFile { file, kind, fate, sources } = planned;
        let (status, reason) = Status::of(&fate);
        summary.files.add(status);
        if status == Status::Uploaded {
            summary.uploaded_bytes += file.content.size_bytes;
        }
        let mut counts = Counts::default();
        let mut source_error = None;
        for (source, fate) in file.sources.files.iter().zip(&sources) {
            let (status, reason) = Status::of(fate);
            counts.add(status);
            if status == Status::Failed {
                source_error = source_error.or(reason.map(|reason| format!("{}: {reason}", source.path)));
            }
        }
        counts.skipped += file.sources.skipped.values().sum::<u64>();
        summary.sources.add_all(&counts);
        let skipped = file.sources.skipped.iter();
        // Parts of an image without what is reported lack nothing themselves.
        let is_whole = matches!(kind, ArtefactKind::Executable | ArtefactKind::Debuginfo);
        Self {
            path: file.path.display().to_string(),
            build_id: file.build_id,
            identity: file.identity,
            kind,
            unit: file.unit,
            size_bytes: file.content.size_bytes,
            brings: brings(kind, &file.contents),
            sha256: file.content.sha256,
            lacks: if is_whole { image.lacks() } else { Vec::new() },
            status,
            reason,
            sources: counts,
            sources_skipped: skipped
                .map(|(reason, files)| Skipped { reason: reason.as_str(), files: *files })
                .collect(),
            source_error,
        }
    }
}

/// What the artefact brings, which may be a part of what its file does.
fn brings(kind: ArtefactKind, contents: &windlass_symbol_index::Contents) -> Vec<&'static str> {
    let mut brings = contents::brings(contents);
    match kind {
        ArtefactKind::Debuginfo if contents.code => {
            brings.retain(|what| ["debug_info", "line_table", "symtab"].contains(what));
        }
        ArtefactKind::Skeleton => brings.retain(|what| ["unwind", "symtab", "dynsym"].contains(what)),
        ArtefactKind::Dwo | ArtefactKind::Dwp => brings.push("split_dwarf"),
        _ => {}
    }
    brings
}

/// Most files of each status that are named one by one, the last in sight last. JSON has all.
const SHOWN: [(Status, usize); 5] = [
    (Status::Present, 5),
    (Status::Skipped, 5),
    (Status::WouldUpload, 50),
    (Status::Uploaded, 50),
    (Status::Failed, usize::MAX),
];
/// Most files named after what they lack.
const MAX_NAMED: usize = 3;

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (status, most) in SHOWN {
            let files = || self.files.iter().filter(|file| file.status == status);
            files().take(most).try_for_each(|file| write!(f, "{file}"))?;
            let more = files().count().saturating_sub(most);
            if more > 0 {
                writeln!(f, "{:<9} {more} more", status.as_str())?;
            }
        }
        for Skipped { reason, files } in &self.skipped {
            writeln!(f, "{:<9} {}: {reason}", Status::Skipped.as_str(), counted(*files, "file"))?;
        }
        for Unusable { path, error } in &self.unusable {
            writeln!(f, "{:<9} {path}: {error}", Status::Failed.as_str())?;
        }
        self.lacks(f)?;
        for Finding { path, requires, lack, .. } in &self.findings {
            let requires = serde_json::to_value(requires).unwrap_or_default();
            let requires = requires.as_str().unwrap_or_default();
            writeln!(f, "{:<9} {path} lacks {}: {}", "REQUIRED", contents::in_words(requires), lack.remedy)?;
        }
        writeln!(f, "{}", self.summary)?;
        if self.dry_run {
            writeln!(f, "Nothing was sent (--dry-run).")?;
        }
        Ok(())
    }
}

impl Report {
    /// What lacks, and how a build would add it, with the first of the files.
    fn lacks(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lacking: BTreeMap<Lack, Vec<&str>> = BTreeMap::new();
        let mut seen = HashSet::new();
        for file in self.files.iter().filter(|file| file.status != Status::Skipped) {
            for lack in file.lacks.iter().filter(|lack| seen.insert((file.build_id, lack.what))) {
                lacking.entry(*lack).or_default().push(&file.path);
            }
        }
        for (Lack { what, remedy }, paths) in lacking {
            let named = paths[..paths.len().min(MAX_NAMED)].join(", ");
            let more = paths.len().saturating_sub(MAX_NAMED);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let verb = if paths.len() == 1 { "lacks" } else { "lack" };
            writeln!(f, "{:<9} {named}{more} {verb} {}", "note", contents::in_words(what))?;
            writeln!(f, "{:10}{remedy}", "")?;
        }
        Ok(())
    }
}

fn counted(count: u64, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

impl fmt::Display for FileReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, build_id, kind, size_bytes, status, brings, .. } = self;
        writeln!(f, "{:<9} {path} ({kind}, {})", status.as_str(), terminal::size(*size_bytes))?;
        if let Some(reason) = &self.reason {
            writeln!(f, "{:10}{reason}", "")?;
        }
        if *status == Status::Skipped {
            return Ok(());
        }
        if *status != Status::Present {
            let identity = match self.identity {
                Identity::Gnu => "build-ID",
                Identity::Htlhash => "file hash",
            };
            let brings: Vec<_> = brings.iter().map(|what| contents::in_words(what)).collect();
            writeln!(f, "{:10}{identity} {build_id}; brings {}", "", brings.join(", "))?;
        }
        if !self.sources.is_empty() {
            writeln!(f, "{:10}sources: {}", "", self.sources)?;
        }
        for Skipped { reason, files } in &self.sources_skipped {
            writeln!(f, "{:12}{files} {reason}", "")?;
        }
        if let Some(error) = &self.source_error {
            writeln!(f, "{:10}{error}", "")?;
        }
        Ok(())
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = [
            (self.uploaded, "uploaded"),
            (self.would_upload, "to upload"),
            (self.present, "already there"),
            (self.skipped, "skipped"),
            (self.failed, "failed"),
        ];
        let said: Vec<_> = counts
            .iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, word)| format!("{count} {word}"))
            .collect();
        f.write_str(if said.is_empty() { "none".to_owned() } else { said.join(", ") }.as_str())
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ELF files: {}", self.files)?;
        if self.uploaded_bytes > 0 {
            write!(f, " ({} before compression)", terminal::size(self.uploaded_bytes))?;
        }
        if !self.sources.is_empty() {
            write!(f, "; sources: {}", self.sources)?;
        }
        if self.without_debug_info > 0 {
            write!(f, "; {} without DWARF", self.without_debug_info)?;
        }
        if self.without_gnu_build_id > 0 {
            write!(f, "; {} without a GNU build-ID, known by a hash of the file", self.without_gnu_build_id)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(done: u64, failed: u64, expect: u8) {
        let files = Counts { present: done, failed, ..Counts::default() };
        let summary = Summary { files, ..Summary::default() };
        let mut report = Report { summary, ..Report::new(Plan::default(), &[], false) };
        assert_eq!(report.exit_status(), expect);
        let lack = Lack { what: "symtab", remedy: "keep it" };
        let (path, build_id) = ("a".to_owned(), "abcd".parse().unwrap());
        report.findings.push(Finding { path, build_id, requires: Requirement::Symtab, lack });
        assert_eq!(report.exit_status(), expect.max(1));
    }

    #[test]
    fn exit_status_follows_the_counts() {
        check(3, 0, 0);
        check(3, 1, 1);
        check(0, 1, 2);
        check(0, 0, 2);
    }
}
