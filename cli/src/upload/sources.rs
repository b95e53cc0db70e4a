//! The source files that an ELF file's line table names and that exist on this machine.
//!
//! elfutils' debuginfod opens whatever path a line table names when someone asks for it, so a doctored
//! object serves `/etc/passwd`. Here the uploader chooses, before anything leaves the machine, and only
//! regular files of a source file's size go.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Component, Path};

use sha2::{Digest as _, Sha256};
use windlass_schema::BuildId;
use windlass_schema::http::{ArtefactKind, ArtefactName};

use super::elf_file::hex;

/// Largest source file to send. Generated parsers reach some MiB; beyond this it is no source.
const MAX_SOURCE_BYTES: u64 = 16 << 20;
/// Most source files of one ELF file. A whole Linux kernel names about 60,000.
const MAX_SOURCES: usize = 200_000;

/// A source file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SourceFile {
    /// Absolute path, as the line table (joined with its compilation directory) names it.
    pub(crate) path: String,
    pub(crate) sha256: String,
    pub(crate) size_bytes: u64,
}

impl SourceFile {
    /// How the service knows this file.
    pub(crate) fn artefact(&self, build_id: BuildId) -> ArtefactName {
        ArtefactName {
            build_id,
            kind: ArtefactKind::Source,
            path: Some(self.path.clone()),
            sha256: Some(self.sha256.clone()),
        }
    }
}

/// Those of the files in `elf`'s line tables that can be sent. Broken DWARF names what it can.
pub(crate) fn named_by(elf: &[u8]) -> Vec<SourceFile> {
    line_table_paths(elf).into_iter().filter_map(read).collect()
}

fn line_table_paths(elf: &[u8]) -> BTreeSet<String> {
    let Ok(object) = symbolic_debuginfo::Object::parse(elf) else { return BTreeSet::new() };
    let Ok(session) = object.debug_session() else { return BTreeSet::new() };
    let paths = session.files().filter_map(Result::ok).map(|file| file.abs_path_str());
    paths.filter(|path| is_plain(path)).take(MAX_SOURCES).collect()
}

/// Absolute, and without `..`, which means nothing once the build folder is gone.
fn is_plain(path: &str) -> bool {
    let mut components = Path::new(path).components();
    components.next() == Some(Component::RootDir)
        && components.all(|part| matches!(part, Component::Normal(_)))
}

fn read(path: String) -> Option<SourceFile> {
    let metadata = fs::metadata(&path).ok()?;
    if !metadata.is_file() || metadata.len() > MAX_SOURCE_BYTES {
        return None;
    }
    let text = fs::read(&path).ok()?;
    Some(SourceFile { sha256: hex(&Sha256::digest(&text)), size_bytes: text.len() as u64, path })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_absolute_paths_without_detours() {
        for plain in ["/src/hello.c", "/usr/include/c++/12/vector"] {
            assert!(is_plain(plain), "{plain}");
        }
        for detour in ["", "hello.c", "./elf/sofini.c", "/src/../etc/passwd", "<built-in>", "C:\\x.c"] {
            assert!(!is_plain(detour), "{detour}");
        }
    }

    #[test]
    fn this_test_names_this_file() {
        let elf = fs::read("/proc/self/exe").unwrap();
        let paths = line_table_paths(&elf);
        assert!(paths.iter().any(|path| path.ends_with("upload/sources.rs")), "{} paths", paths.len());
    }

    #[test]
    fn folders_and_absent_files_are_left_out() {
        assert_eq!(read("/".into()), None);
        assert_eq!(read("/nonexistent/x.c".into()), None);
        assert_eq!(line_table_paths(b"no elf"), BTreeSet::new());
    }
}
