//! Files that are mapped rather than read: ELF files, and what is made of them.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::Context as _;

/// Maps the file at `path`; only a regular one, since others have no end.
pub(crate) fn map(path: &Path) -> anyhow::Result<memmap2::Mmap> {
    let failed = || format!("failed to read {}", path.display());
    let file = File::open(path).with_context(failed)?;
    anyhow::ensure!(file.metadata().with_context(failed)?.is_file(), "{} is no regular file", path.display());
    map_open(&file).with_context(failed)
}

/// Maps a file that is open.
pub(crate) fn map_open(file: &File) -> std::io::Result<memmap2::Mmap> {
    // SAFETY: the map is read-only. Whoever truncates the file meanwhile can end this process with
    // SIGBUS, as with every linker and debugger; nothing is written.
    unsafe { memmap2::Mmap::map(file) }
}

/// Files up to this size in bytes are read instead of mapped: a linker that truncates one meanwhile does no harm then,
/// and as many as are read at a time fit into memory.
const MAX_READ_BYTES: u64 = 16 << 20;

/// The content of a file, in memory or mapped.
pub(crate) enum FileBytes {
    Read(Vec<u8>),
    Mapped(memmap2::Mmap),
}

impl std::ops::Deref for FileBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Read(bytes) => bytes,
            Self::Mapped(map) => map,
        }
    }
}

/// The content of a file that is open, as it may be while a build goes on.
pub(crate) fn read_or_map(file: &File) -> std::io::Result<FileBytes> {
    let size = file.metadata()?.len();
    if size > MAX_READ_BYTES {
        return Ok(FileBytes::Mapped(map_open(file)?));
    }
    let mut bytes = vec![0; size as usize];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(FileBytes::Read(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files() {
        assert!(map(Path::new("/proc/self/exe")).unwrap().starts_with(&object::elf::ELFMAG));
        let error = |path: &str| map(Path::new(path)).unwrap_err().to_string();
        assert_eq!(error("/dev/zero"), "/dev/zero is no regular file");
        assert_eq!(error("/nowhere"), "failed to read /nowhere");
    }
}
