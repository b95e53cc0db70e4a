//! What an upload did, for a reader and for a script.

use std::fmt;

use serde::Serialize;
use windlass_schema::BuildId;
use windlass_schema::http::ArtefactKind;

use super::elf_file::{self, Identity, Lack};
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
    summary: Summary,
}

#[derive(Debug, Serialize)]
struct FileReport {
    path: String,
    build_id: BuildId,
    identity: Identity,
    kind: ArtefactKind,
    sha256: String,
    size_bytes: u64,
    brings: Vec<&'static str>,
    lacks: Vec<Lack>,
    status: Status,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Counts::is_empty")]
    sources: Counts,
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
    pub(crate) fn new(plan: Plan, dry_run: bool) -> Self {
        let mut summary = Summary::default();
        let files: Vec<_> =
            plan.files.into_iter().map(|planned| FileReport::new(planned, &mut summary)).collect();
        summary.files.failed += plan.unusable.len() as u64;
        let unusable = plan.unusable.into_iter();
        let unusable =
            unusable.map(|(path, error)| Unusable { path: path.display().to_string(), error }).collect();
        let skipped = plan.skipped.into_iter();
        let skipped = skipped.map(|(reason, files)| Skipped { reason: reason.as_str(), files }).collect();
        Self { dry_run, files, unusable, skipped, summary }
    }

    /// 0: all is there; 1: something could not be uploaded; 2: nothing could.
    pub(crate) fn exit_status(&self) -> u8 {
        let Summary { files: counts, sources, .. } = &self.summary;
        let done = counts.uploaded + counts.present + counts.would_upload;
        if done == 0 {
            crate::FAILED
        } else if counts.failed + sources.failed > 0 {
            crate::FINDINGS
        } else {
            crate::DONE
        }
    }
}

impl FileReport {
    fn new(planned: PlannedFile, summary: &mut Summary) -> Self {
        let PlannedFile { file, kind, fate, sources } = planned;
        let (status, reason) = Status::of(&fate);
        let lacks = elf_file::lacks(&file);
        summary.files.add(status);
        summary.without_gnu_build_id += u64::from(file.identity == Identity::Htlhash);
        summary.without_debug_info += u64::from(!file.contents.debug_info);
        if status == Status::Uploaded {
            summary.uploaded_bytes += file.size_bytes;
        }
        let mut counts = Counts::default();
        let mut source_error = None;
        for (source, fate) in file.sources.iter().zip(&sources) {
            let (status, reason) = Status::of(fate);
            counts.add(status);
            summary.sources.add(status);
            if status == Status::Failed {
                source_error = source_error.or(reason.map(|reason| format!("{}: {reason}", source.path)));
            }
        }
        Self {
            path: file.path.display().to_string(),
            build_id: file.build_id,
            identity: file.identity,
            kind,
            size_bytes: file.size_bytes,
            brings: elf_file::brings(&file.contents),
            sha256: file.sha256,
            lacks,
            status,
            reason,
            sources: counts,
            source_error,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for file in &self.files {
            write!(f, "{file}")?;
        }
        for Unusable { path, error } in &self.unusable {
            writeln!(f, "{:<9} {path}: {error}", Status::Failed.as_str())?;
        }
        for Skipped { reason, files } in &self.skipped {
            writeln!(f, "{:<9} {files} files: {reason}", Status::Skipped.as_str())?;
        }
        writeln!(f, "{}", self.summary)?;
        if self.dry_run {
            writeln!(f, "Nothing was sent (--dry-run).")?;
        }
        Ok(())
    }
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
        let identity = match self.identity {
            Identity::Gnu => "build-ID",
            Identity::Htlhash => "file hash",
        };
        writeln!(f, "{:10}{identity} {build_id}; brings {}", "", brings.join(", "))?;
        for Lack { what, remedy } in &self.lacks {
            writeln!(f, "{:10}lacks {what}: {remedy}", "")?;
        }
        if !self.sources.is_empty() {
            writeln!(f, "{:10}sources: {}", "", self.sources)?;
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
        let report = Report { dry_run: false, files: vec![], unusable: vec![], skipped: vec![], summary };
        assert_eq!(report.exit_status(), expect);
    }

    #[test]
    fn exit_status_follows_the_counts() {
        check(3, 0, 0);
        check(3, 1, 1);
        check(0, 1, 2);
        check(0, 0, 2);
    }
}
