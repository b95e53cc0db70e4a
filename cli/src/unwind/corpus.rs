//! Files and trees of files, worked through on all cores.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use serde::Serialize;

use crate::mapped_elf;
use crate::terminal;
use crate::upload::tree::{Candidate, files_under};

/// Arguments of a command over files and trees.
#[derive(Debug, clap::Args)]
pub(crate) struct CorpusArgs {
    /// ELF files, and folders to search for them; links are followed only if given here
    #[arg(value_name = "PATH", required = true)]
    paths: Vec<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

/// A file that could not be worked on.
#[derive(Debug, Serialize)]
pub(super) struct FailedFile {
    path: PathBuf,
    error: String,
}

/// What became of the files of a corpus, in a stable order.
pub(super) struct Outcome<T> {
    pub(super) done: Vec<(PathBuf, T)>,
    pub(super) failed: Vec<FailedFile>,
}

impl<T> Outcome<T> {
    /// The exit status: `status`, unless nothing could be done.
    pub(super) fn status(&self, status: u8) -> ExitCode {
        let nothing = self.done.is_empty() && !self.failed.is_empty();
        ExitCode::from(if nothing { crate::FAILED } else { status })
    }

    /// Names the failed files on stderr.
    pub(super) fn print_failed(&self) {
        for failed in &self.failed {
            eprintln!("{}: {}", failed.path.display(), failed.error);
        }
    }
}

/// Calls `work` with the bytes of each ELF file of `args`.
pub(super) fn for_each_elf<T: Send>(
    args: &CorpusArgs,
    verb: &'static str,
    work: impl Fn(&[u8]) -> anyhow::Result<T> + Sync,
) -> Outcome<T> {
    let files = files_under(&args.paths);
    let bar = terminal::count_bar(files.len() as u64, verb);
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::new());
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((number, file)) = {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    files.get(number).map(|file| (number, file))
                } {
                    if let Some(result) = work_on(file, &work) {
                        results.lock().expect("no holder panics").push((number, result));
                    }
                    bar.inc(1);
                }
            });
        }
    });
    bar.finish_and_clear();
    let mut results = results.into_inner().expect("no holder panics");
    results.sort_by_key(|(number, _)| *number);
    let mut outcome = Outcome { done: Vec::new(), failed: Vec::new() };
    for (number, result) in results {
        let path = files[number].path.clone();
        match result {
            Ok(done) => outcome.done.push((path, done)),
            Err(error) => outcome.failed.push(FailedFile { path, error: format!("{error:#}") }),
        }
    }
    outcome
}

/// Whether a file has the name of a kernel module that may be compressed: of a tree of those nothing would be left.
fn is_module(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().contains(".ko."))
}

/// `None` for what is no ELF file, unless it was named or is a compressed kernel module.
fn work_on<T>(file: &Candidate, work: impl Fn(&[u8]) -> anyhow::Result<T>) -> Option<anyhow::Result<T>> {
    if let Some(error) = &file.error {
        return Some(Err(anyhow::anyhow!("{error}")));
    }
    // Nothing can be mapped of an empty file.
    let is_empty = file.path.metadata().is_ok_and(|metadata| metadata.len() == 0);
    if is_empty {
        return file.named.then(|| Err(anyhow::anyhow!("not an ELF file")));
    }
    match mapped_elf::map(&file.path) {
        Ok(bytes) if !file.named && !bytes.starts_with(&object::elf::ELFMAG) && !is_module(&file.path) => {
            None
        }
        Ok(bytes) => Some(work(&bytes)),
        Err(error) => Some(Err(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_in_trees_are_skipped_and_named_ones_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &[u8]| {
            std::fs::write(folder.path().join(name), content).unwrap();
            folder.path().join(name)
        };
        file("a", b"\x7fELF and more");
        file("b", b"text");
        let empty = file("c", b"");
        let args = |paths| CorpusArgs { paths, json: false };
        let lengths = |bytes: &[u8]| Ok(bytes.len());

        let outcome = for_each_elf(&args(vec![folder.path().to_owned()]), "reading", lengths);
        assert_eq!(outcome.done, [(folder.path().join("a"), 13)]);
        assert!(outcome.failed.is_empty());
        assert_eq!(outcome.status(0), ExitCode::from(0));

        let absent = folder.path().join("absent");
        let outcome = for_each_elf(&args(vec![empty.clone(), absent.clone()]), "reading", lengths);
        let failed: Vec<_> = outcome.failed.iter().map(|failed| &failed.path).collect();
        assert_eq!(failed, [&empty, &absent]);
        assert_eq!(outcome.status(0), ExitCode::from(crate::FAILED));
    }
}
