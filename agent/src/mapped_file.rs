//! How are the contents of a mapping read?
//!
//! A path in `/proc/PID/maps` names a file in the process's mount namespace, which may be deleted or
//! replaced by now; opening it in the agent's own namespace, as older agents did, reads another file.
//! `/proc/PID/map_files/START-END` is the mapped file itself, whatever became of its name. It takes
//! CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE; without, the path is followed through `/proc/PID/root` and
//! must lead to the device and inode that the mapping shows. Only regular files are opened: to open a
//! device may be to act on it.

use std::fs::{File, Metadata};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::proc_maps::{Backing, MapsEntry};

/// Largest vDSO read in bytes; it has two to four pages.
const MAX_VDSO_BYTES: u64 = 256 * 1024;

/// What tells the contents of a file from those of any other, until somebody writes into it in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileKey {
    device: u64,
    inode: u64,
    modified_s: i64,
    modified_ns: i64,
    size_bytes: u64,
}

impl FileKey {
    fn new(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            modified_s: metadata.mtime(),
            modified_ns: metadata.mtime_nsec(),
            size_bytes: metadata.size(),
        }
    }
}

/// Where the bytes of an image can be read, now or later.
#[derive(Clone, Debug)]
pub enum ImageSource {
    /// A file, by the names under which it was or may be found.
    File {
        /// Tried in order.
        names: Vec<PathBuf>,
        /// What it must be.
        key: FileKey,
    },
    /// Bytes read from a process.
    Memory(Arc<[u8]>),
}

/// An image could not be read.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Neither a name that leads to the file, nor permission.
    #[error("mapped file {0} cannot be opened: {1}")]
    Open(PathBuf, io::Error),
    /// What the name leads to is another file than the mapped one.
    #[error("{0} is not the file that is mapped")]
    Replaced(PathBuf),
    /// A device, a socket.
    #[error("{0} is not a regular file")]
    NotRegular(PathBuf),
}

impl ImageSource {
    /// Finds the file that process `pid` maps at `entry`.
    pub fn of_mapping(pid: u32, entry: &MapsEntry, path: &Path) -> Result<Self, SourceError> {
        let mapped = PathBuf::from(format!("/proc/{pid}/map_files/{:x}-{:x}", entry.start, entry.end));
        let relative = path.strip_prefix("/").unwrap_or(path);
        let rooted = PathBuf::from(format!("/proc/{pid}/root")).join(relative);
        let metadata = std::fs::metadata(&mapped).or_else(|_| {
            let metadata =
                std::fs::metadata(&rooted).map_err(|error| SourceError::Open(path.to_owned(), error))?;
            let device = (libc::major(metadata.dev()), libc::minor(metadata.dev()));
            if (device, metadata.ino()) == (entry.device, entry.inode) {
                Ok(metadata)
            } else {
                Err(SourceError::Replaced(path.to_owned()))
            }
        })?;
        if !metadata.is_file() {
            return Err(SourceError::NotRegular(path.to_owned()));
        }
        // The last name outlives the process, if both see the same file system.
        Ok(Self::File { names: vec![mapped, rooted, path.to_owned()], key: FileKey::new(&metadata) })
    }

    /// The vDSO that process `pid` maps at `entry`.
    pub fn of_vdso(pid: u32, entry: &MapsEntry) -> Result<Self, SourceError> {
        let path = PathBuf::from(format!("/proc/{pid}/mem"));
        let read = || {
            let mut memory = File::open(&path)?;
            memory.seek(SeekFrom::Start(entry.start))?;
            let mut bytes = vec![0; (entry.end - entry.start).min(MAX_VDSO_BYTES) as usize];
            memory.read_exact(&mut bytes)?;
            Ok(Self::Memory(bytes.into()))
        };
        read().map_err(|error| SourceError::Open(path.clone(), error))
    }

    /// Opens a file again, if it still is what it was.
    fn open(names: &[PathBuf], key: FileKey) -> Result<File, SourceError> {
        let mut failure = None;
        for name in names {
            // Should a name lead to a pipe by now, do not wait for its writer.
            let opened = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(name);
            let outcome = opened.and_then(|file| Ok((FileKey::new(&file.metadata()?), file)));
            match outcome {
                Ok((found, file)) if found == key => return Ok(file),
                Ok(_) => failure = Some(SourceError::Replaced(name.clone())),
                Err(error) => failure = Some(SourceError::Open(name.clone(), error)),
            }
        }
        Err(failure.expect("a source has a name"))
    }

    /// Runs `read` over the image's bytes: those in memory, or a cache over the file that reads what
    /// is asked for.
    pub fn read<T>(&self, read: impl FnOnce(ImageBytes<'_>) -> T) -> Result<T, SourceError> {
        match self {
            Self::Memory(bytes) => Ok(read(ImageBytes::Memory(bytes))),
            Self::File { names, key } => {
                let cache = object::ReadCache::new(Self::open(names, *key)?);
                Ok(read(ImageBytes::File(&cache)))
            }
        }
    }
}

/// The bytes of an image.
#[derive(Clone, Copy, Debug)]
pub enum ImageBytes<'a> {
    /// In memory.
    Memory(&'a [u8]),
    /// In a file.
    File(&'a object::ReadCache<File>),
}

impl<'a> object::ReadRef<'a> for ImageBytes<'a> {
    fn len(self) -> Result<u64, ()> {
        match self {
            Self::Memory(bytes) => object::ReadRef::len(bytes),
            Self::File(cache) => object::ReadRef::len(cache),
        }
    }

    fn read_bytes_at(self, offset: u64, size: u64) -> Result<&'a [u8], ()> {
        match self {
            Self::Memory(bytes) => bytes.read_bytes_at(offset, size),
            Self::File(cache) => cache.read_bytes_at(offset, size),
        }
    }

    fn read_bytes_at_until(self, range: std::ops::Range<u64>, delimiter: u8) -> Result<&'a [u8], ()> {
        match self {
            Self::Memory(bytes) => bytes.read_bytes_at_until(range, delimiter),
            Self::File(cache) => cache.read_bytes_at_until(range, delimiter),
        }
    }
}

/// The path of an entry as it is shown.
pub fn shown_path(entry: &MapsEntry) -> Arc<str> {
    match &entry.backing {
        Backing::File { path, .. } => path.to_string_lossy().into(),
        Backing::Vdso => "[vdso]".into(),
        Backing::Anonymous => "[anonymous]".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proc_maps::executable_mappings;

    #[test]
    fn own_mappings_can_be_read() {
        let pid = std::process::id();
        let maps = std::fs::read("/proc/self/maps").unwrap();
        let entries = executable_mappings(&maps);
        let own = std::env::current_exe().unwrap();
        let entry = entries.iter().find(|entry| *shown_path(entry) == *own.to_string_lossy()).unwrap();
        let source = ImageSource::of_mapping(pid, entry, &own).unwrap();
        let expect = crate::image::identify(&std::fs::read(&own).unwrap()[..]).unwrap();
        assert_eq!(source.read(|image| crate::image::identify(image)).unwrap().unwrap(), expect);

        let vdso = entries.iter().find(|entry| entry.backing == Backing::Vdso).unwrap();
        let source = ImageSource::of_vdso(pid, vdso).unwrap();
        assert!(source.read(|image| crate::image::identify(image)).unwrap().is_ok());
    }

    #[test]
    fn a_replaced_file_is_not_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        std::fs::write(&path, "one").unwrap();
        let key = FileKey::new(&std::fs::metadata(&path).unwrap());
        let source = ImageSource::File { names: vec![path.clone()], key };
        assert!(source.read(|_| ()).is_ok());
        std::fs::write(directory.path().join("other"), "two!").unwrap();
        std::fs::rename(directory.path().join("other"), &path).unwrap();
        assert!(matches!(source.read(|_| ()), Err(SourceError::Replaced(_))));
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(source.read(|_| ()), Err(SourceError::Open(..))));
    }
}
