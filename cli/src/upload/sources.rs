//! The source files that an ELF file's line table names and that exist on this machine.
//!
//! elfutils' debuginfod opens whatever path a line table names when someone asks for it, so a doctored
//! object serves `/etc/passwd`. Here the uploader chooses, before anything leaves the machine: only
//! regular files of a source file's size go, and where the line table has their hashes only those that were compiled.
//! A file that many programs name is read once.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::path::Path;
use std::sync::Mutex;

use md5::{Digest as _, Md5};
use windlass_schema::BuildId;
use windlass_schema::http::{ArtefactKind, ArtefactName};
use windlass_symbol_index::NamedSource;

use super::content::Content;

/// Largest source file to send, in bytes. Generated parsers reach some MiB; beyond this it is no source.
const MAX_SOURCE_BYTES: u64 = 16 << 20;
/// Most source files of one ELF file. A whole Linux kernel names about 60,000.
const MAX_SOURCES: usize = 200_000;
/// Longest path that the service takes, in bytes: Linux's `PATH_MAX`.
const MAX_PATH_BYTES: usize = 4096;

/// A source file.
#[derive(Clone, Debug)]
pub(crate) struct SourceFile {
    /// Absolute path, as the line table (joined with its compilation directory) names it, without `.` and `..`:
    /// debuggers find it by either.
    pub(crate) path: String,
    pub(crate) content: Content,
}

/// The source files of one ELF file.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sources {
    pub(crate) files: Vec<SourceFile>,
    /// Those that do not go, by reason.
    pub(crate) skipped: BTreeMap<SourceSkip, u64>,
}

/// Why a source file is not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum SourceSkip {
    Absent,
    Relative,
    NoFile,
    TooLarge,
    Changed,
    Unreadable,
    TooMany,
}

impl SourceSkip {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Absent => "not on this machine",
            Self::Relative => {
                "relative path, which no debugger asks for (is it mapped by -ffile-prefix-map?)"
            }
            Self::NoFile => "no regular file",
            Self::TooLarge => "larger than 16 MiB",
            Self::Changed => "changed since it was compiled (its MD5 is not the line table's)",
            Self::Unreadable => "cannot be read",
            Self::TooMany => "beyond the 200,000 of one file",
        }
    }
}

const _: () = assert!(MAX_SOURCE_BYTES == 16 << 20 && MAX_SOURCES == 200_000, "as the reasons say");

impl SourceFile {
    /// How the service knows this file.
    pub(crate) fn artefact(&self, build_id: BuildId) -> ArtefactName {
        ArtefactName {
            build_id,
            kind: ArtefactKind::Source,
            path: Some(self.path.clone()),
            sha256: Some(self.content.sha256.clone()),
            brings: None,
        }
    }
}

/// What was read of a path: its content and MD5.
type Known = Result<(Content, [u8; 16]), SourceSkip>;

/// Reads source files, each once.
#[derive(Debug, Default)]
pub(crate) struct SourceReader {
    known: Mutex<HashMap<String, Known>>,
}

impl SourceReader {
    /// Those of the files in `elf`'s line tables that can be sent. Broken DWARF names what it can.
    pub(crate) fn named_by(&self, elf: &[u8]) -> Sources {
        let mut sources = Sources::default();
        let mut taken = std::collections::HashSet::new();
        for NamedSource { path, md5 } in windlass_symbol_index::named_sources(elf).unwrap_or_default() {
            if is_no_file(&path) {
                continue;
            }
            let Some(canonical) = canonical(&path) else {
                *sources.skipped.entry(SourceSkip::Relative).or_default() += 1;
                continue;
            };
            if !taken.insert(canonical.clone()) {
                continue;
            }
            let result = if sources.files.len() >= MAX_SOURCES {
                Err(SourceSkip::TooMany)
            } else {
                self.read(&path).and_then(|(content, found)| {
                    if md5.is_none_or(|md5| md5 == found) { Ok(content) } else { Err(SourceSkip::Changed) }
                })
            };
            match result {
                Ok(content) => sources.files.push(SourceFile { path: canonical, content }),
                Err(reason) => *sources.skipped.entry(reason).or_default() += 1,
            }
        }
        sources
    }

    fn read(&self, path: &str) -> Known {
        let lock = || self.known.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(known) = lock().get(path) {
            return known.clone();
        }
        let read = read(Path::new(path));
        lock().insert(path.to_owned(), read.clone());
        read
    }
}

/// Names that compilers give to what is in no file: `<built-in>`, `<artificial>`.
fn is_no_file(path: &str) -> bool {
    path.rsplit('/').next().is_none_or(|name| name.is_empty() || name.starts_with('<'))
}

/// An absolute path without `.`, `..` and empty parts, as the service has it on record (RFC 3986, 5.2.4).
fn canonical(path: &str) -> Option<String> {
    if !path.starts_with('/') || path.len() > MAX_PATH_BYTES || path.contains('\0') {
        return None;
    }
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    (!parts.is_empty()).then(|| format!("/{}", parts.join("/")))
}

fn read(path: &Path) -> Known {
    let metadata = fs::metadata(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory => SourceSkip::Absent,
        _ => SourceSkip::Unreadable,
    })?;
    if !metadata.is_file() {
        return Err(SourceSkip::NoFile);
    }
    if metadata.len() > MAX_SOURCE_BYTES {
        return Err(SourceSkip::TooLarge);
    }
    let unreadable = |_| SourceSkip::Unreadable;
    let content = Content::whole(path, &File::open(path).map_err(unreadable)?).map_err(unreadable)?;
    let md5 = Md5::digest(fs::read(path).map_err(unreadable)?);
    Ok((content, md5.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detours_are_taken_out_of_absolute_paths() {
        for (path, expect) in [
            ("/src/hello.c", Some("/src/hello.c")),
            ("/usr/include/c++/12/vector", Some("/usr/include/c++/12/vector")),
            ("/build/../src/./a//b.c", Some("/src/a/b.c")),
            ("/../../etc/passwd", Some("/etc/passwd")),
            ("hello.c", None),
            ("./elf/sofini.c", None),
            ("", None),
            ("/", None),
            ("C:\\x.c", None),
        ] {
            assert_eq!(canonical(path).as_deref(), expect, "{path}");
        }
        assert!(is_no_file("/build/<built-in>") && is_no_file("/src/") && !is_no_file("/src/a.c"));
    }

    #[test]
    fn this_test_names_this_file() {
        let elf = fs::read("/proc/self/exe").unwrap();
        let sources = SourceReader::default().named_by(&elf);
        let found = sources.files.iter().any(|source| source.path.ends_with("upload/sources.rs"));
        assert!(found, "{} files, {:?}", sources.files.len(), sources.skipped);
    }

    #[test]
    fn what_is_no_source_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("large.c");
        assert_eq!(read(dir.path()).err(), Some(SourceSkip::NoFile));
        assert_eq!(read(&path).err(), Some(SourceSkip::Absent));
        File::create(&path).unwrap().set_len(MAX_SOURCE_BYTES + 1).unwrap();
        assert_eq!(read(&path).err(), Some(SourceSkip::TooLarge));
        fs::write(&path, "int main;\n").unwrap();
        let (content, md5) = read(&path).unwrap();
        assert_eq!(content.size_bytes, 10);
        assert_eq!(super::super::content::hex(&md5), "77267212b18f2280d8fd7c90fc5827d9");
    }
}
