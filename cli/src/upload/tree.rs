//! Walks the paths to upload: every regular file once, symbolic links only where given by name. One kind of link is
//! followed: `.build-id/xx/yyyy.debug`, which leads to a debug file wherever a distribution keeps it.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// A file to look at, or a path that could not be read.
#[derive(Debug)]
pub(crate) struct Candidate {
    pub(crate) path: PathBuf,
    /// Named on the command line, so that it being unsuitable is worth a word.
    pub(crate) named: bool,
    pub(crate) error: Option<String>,
}

/// Every regular file under `paths`, in a stable order, hard links once.
pub(crate) fn files_under(paths: &[PathBuf]) -> Vec<Candidate> {
    let mut seen = HashSet::new();
    paths.iter().flat_map(|path| walk(path)).filter(|candidate| candidate.is_new(&mut seen)).collect()
}

fn walk(root: &Path) -> impl Iterator<Item = Candidate> {
    let walk = walkdir::WalkDir::new(root).follow_links(false).sort_by_file_name();
    walk.into_iter().filter_map(move |entry| match entry {
        Ok(entry) => {
            let named = entry.depth() == 0;
            // A file named through a symbolic link has the link's file type here.
            let follows = named || entry.path_is_symlink() && is_debug_link(entry.path());
            let is_file = if follows { entry.path().is_file() } else { entry.file_type().is_file() };
            is_file.then(|| Candidate { path: entry.into_path(), named, error: None })
        }
        Err(error) => {
            let path = error.path().unwrap_or(root).to_owned();
            let error = error.into_io_error().map_or_else(|| "a loop".to_owned(), |error| error.to_string());
            Some(Candidate { path, named: true, error: Some(error) })
        }
    })
}

/// Whether it is called `.build-id/xx/yyyy.debug`.
fn is_debug_link(path: &Path) -> bool {
    let tree = path.parent().and_then(Path::parent).and_then(Path::file_name);
    tree.is_some_and(|name| name == ".build-id") && path.extension().is_some_and(|name| name == "debug")
}

impl Candidate {
    fn is_new(&self, seen: &mut HashSet<(u64, u64)>) -> bool {
        self.error.is_some()
            || fs::metadata(&self.path).map_or(true, |metadata| seen.insert((metadata.dev(), metadata.ino())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_file_once_and_hidden_ones_too() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::create_dir_all(root.join("bin/.debug")).unwrap();
        fs::write(root.join("bin/a"), "a").unwrap();
        fs::write(root.join("bin/.debug/a.debug"), "d").unwrap();
        fs::hard_link(root.join("bin/a"), root.join("bin/b")).unwrap();
        std::os::unix::fs::symlink("a", root.join("bin/c")).unwrap();
        std::os::unix::fs::symlink("..", root.join("bin/loop")).unwrap();
        let names = |paths: &[PathBuf]| -> Vec<String> {
            files_under(paths)
                .iter()
                .map(|found| found.path.strip_prefix(root).unwrap().display().to_string())
                .collect()
        };
        assert_eq!(names(&[root.join("bin")]), ["bin/.debug/a.debug", "bin/a"]);
        assert_eq!(names(&[root.join("bin/c")]), ["bin/c"], "a link given by name is followed");
        assert_eq!(names(&[root.join("bin/a"), root.join("bin")]), ["bin/a", "bin/.debug/a.debug"]);
    }

    #[test]
    fn links_of_build_ids_lead_to_debug_files() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("debug/.build-id/ab");
        fs::create_dir_all(&tree).unwrap();
        fs::write(dir.path().join("elsewhere"), "d").unwrap();
        for name in ["cdef.debug", "cdef"] {
            std::os::unix::fs::symlink("../../../elsewhere", tree.join(name)).unwrap();
        }
        std::os::unix::fs::symlink("../../../absent", tree.join("0123.debug")).unwrap();
        let found = files_under(&[dir.path().join("debug")]);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].path, tree.join("cdef.debug"));
    }

    #[test]
    fn an_absent_path_is_an_error() {
        let found = files_under(&["/nonexistent/path".into()]);
        assert_eq!(found.len(), 1);
        assert!(found[0].error.as_deref().unwrap().contains("No such file"), "{found:?}");
    }
}
