//! How are the contents of a mapping read?
//!
//! A path in `/proc/PID/maps` names a file in the process's mount namespace, which may be deleted or
//! replaced by now; opening it in the agent's own namespace, as older agents did, reads another file.
//! `/proc/PID/map_files/START-END` is the mapped file itself, whatever became of its name. It takes
//! CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE; without, the path is followed through `/proc/PID/root`: it must
//! not have been deleted or replaced, which the mapping shows, and lead to the inode that the mapping shows.
//! Devices are not compared: btrfs gives each subvolume, and overlayfs each layer, a device of its own in
//! `stat`, where maps show that of the whole file system. Only regular files are opened: to open a device may
//! be to act on it.
//!
//! | what | capability, for processes of other users |
//! |---|---|
//! | what is below `/proc/PID/root`; `/proc/PID/mem` | CAP_SYS_PTRACE |
//! | files that not everyone may read, or in folders that not everyone may enter; `/proc/PID/mem` | CAP_DAC_READ_SEARCH |
//! | deleted or replaced files | CAP_CHECKPOINT_RESTORE |

use std::fs::{File, Metadata};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use crate::image_file::{CopyBytes, ImageFile};
use crate::proc_maps::{Backing, MapsEntry, executable_mappings};

/// Largest vDSO read in bytes; it has two to four pages.
const MAX_VDSO_BYTES: u64 = 256 * 1024;
/// End of what a 32-bit process can address. Above it lies the vDSO of 64-bit processes alone, of which a
/// kernel has but one for each of their instruction sets.
pub(crate) const END_OF_32_BIT: u64 = 1 << 32;

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
    /// What the name leads to is another file than the mapped one, or nothing.
    #[error("{0} is not the file that is mapped: that was deleted or replaced")]
    Replaced(PathBuf),
    /// A device, a socket.
    #[error("{0} is not a regular file")]
    NotRegular(PathBuf),
}

impl SourceError {
    /// The capabilities with which the agent could have read it, if it is for want of some that it could not.
    pub fn capabilities(&self) -> Option<&'static str> {
        match self {
            Self::Open(..) if self.is_permission() => Some("CAP_DAC_READ_SEARCH and CAP_SYS_PTRACE"),
            Self::Replaced(_) => Some("CAP_CHECKPOINT_RESTORE"),
            Self::Open(..) | Self::NotRegular(_) => None,
        }
    }

    fn is_permission(&self) -> bool {
        matches!(self, Self::Open(_, error) if error.kind() == io::ErrorKind::PermissionDenied)
    }
}

impl ImageSource {
    /// Finds the file that process `pid` maps at `entry`.
    pub fn of_mapping(pid: u32, entry: &MapsEntry, path: &Path) -> Result<Self, SourceError> {
        let names = names_of(pid, entry, path);
        let [mapped, rooted, ..] = &names[..] else { unreachable!("a mapped file has three names") };
        let deleted = matches!(entry.backing, Backing::File { deleted: true, .. });
        let metadata = match std::fs::metadata(mapped) {
            Ok(metadata) => metadata,
            Err(error) if deleted => {
                let error = SourceError::Open(path.to_owned(), error);
                // It is still there, but has only this name.
                let hidden = error.is_permission();
                return Err(if hidden { SourceError::Replaced(path.to_owned()) } else { error });
            }
            Err(_) => named(rooted, entry, path)?,
        };
        if !metadata.is_file() {
            return Err(SourceError::NotRegular(path.to_owned()));
        }
        Ok(Self::File { key: FileKey::new(&metadata), names })
    }

    /// The same contents, as process `pid` maps them at `entry` from a file that it calls `path`.
    pub(crate) fn mapped_by(&self, pid: u32, entry: &MapsEntry, path: &Path) -> Self {
        match self {
            Self::File { names, key } => {
                let mut here = names_of(pid, entry, path);
                // It may be another file with the same contents.
                here.extend(names.last().filter(|name| **name != *path).cloned());
                Self::File { names: here, key: *key }
            }
            Self::Memory(_) => self.clone(),
        }
    }

    /// The vDSO that process `pid` maps at `entry`; this process's own, where that of the other must not be
    /// read and is of the same size: the kernel maps the same pages into all.
    pub fn of_vdso(pid: u32, entry: &MapsEntry) -> Result<Self, SourceError> {
        let path = PathBuf::from(format!("/proc/{pid}/mem"));
        let read = || {
            let mut memory = File::open(&path)?;
            memory.seek(SeekFrom::Start(entry.start))?;
            let mut bytes = vec![0; (entry.end - entry.start).min(MAX_VDSO_BYTES) as usize];
            memory.read_exact(&mut bytes)?;
            Ok(bytes)
        };
        read()
            .or_else(|error: io::Error| match own_vdso(entry) {
                Some(bytes) if error.kind() == io::ErrorKind::PermissionDenied => Ok(bytes),
                _ => Err(SourceError::Open(path.clone(), error)),
            })
            .map(|bytes| Self::Memory(bytes.into()))
    }

    /// What messages call it.
    pub fn shown_name(&self) -> String {
        match self {
            Self::File { names, .. } => {
                names.last().map_or_else(String::new, |name| name.display().to_string())
            }
            Self::Memory(_) => "[vdso]".to_owned(),
        }
    }

    /// What tells the file from others, if it is one.
    pub(crate) fn key(&self) -> Option<FileKey> {
        match self {
            Self::File { key, .. } => Some(*key),
            Self::Memory(_) => None,
        }
    }

    /// How many bytes the image has.
    pub(crate) fn bytes(&self) -> u64 {
        match self {
            Self::File { key, .. } => key.size_bytes,
            Self::Memory(bytes) => bytes.len() as u64,
        }
    }

    /// Opens a file again, if it still is what it was.
    fn open(names: &[PathBuf], key: FileKey) -> Result<File, SourceError> {
        let mut failure = None;
        for (number, name) in names.iter().enumerate() {
            // Should a name lead to a pipe by now, do not wait for its writer.
            let opened = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(name);
            let outcome = opened.and_then(|file| Ok((FileKey::new(&file.metadata()?), file)));
            let error = match outcome {
                Ok((found, file)) if found == key => return Ok(file),
                Ok(_) => SourceError::Replaced(name.clone()),
                Err(error) => SourceError::Open(name.clone(), error),
            };
            // The first name takes a capability of its own; the others may do without.
            if number == 0 && names.len() > 1 && error.is_permission() {
                continue;
            }
            failure.get_or_insert(error);
        }
        Err(failure.expect("a source has a name"))
    }

    /// Runs `read` over the image's bytes: those in memory, or a cache over the file that reads what
    /// is asked for.
    pub fn read<T>(&self, read: impl FnOnce(ImageBytes<'_>) -> T) -> Result<T, SourceError> {
        match self {
            Self::Memory(bytes) => Ok(read(ImageBytes::Memory(bytes))),
            Self::File { names, key } => {
                let file = ImageFile::new(Self::open(names, *key)?);
                Ok(read(ImageBytes::File(&file)))
            }
        }
    }
}

/// The names of the file that process `pid` maps at `entry` and calls `path`. The last one outlives the process, if both
/// see the same file system.
fn names_of(pid: u32, entry: &MapsEntry, path: &Path) -> Vec<PathBuf> {
    let mapped = PathBuf::from(format!("/proc/{pid}/map_files/{:x}-{:x}", entry.start, entry.end));
    let relative = path.strip_prefix("/").unwrap_or(path);
    vec![mapped, PathBuf::from(format!("/proc/{pid}/root")).join(relative), path.to_owned()]
}

/// What the name `rooted` of the mapped file `path` leads to, if it is that file.
fn named(rooted: &Path, entry: &MapsEntry, path: &Path) -> Result<Metadata, SourceError> {
    let metadata = std::fs::metadata(rooted).map_err(|error| SourceError::Open(path.to_owned(), error))?;
    let deleted = matches!(entry.backing, Backing::File { deleted: true, .. });
    if deleted || metadata.ino() != entry.inode {
        return Err(SourceError::Replaced(path.to_owned()));
    }
    Ok(metadata)
}

/// Whether these are the bytes of this process's vDSO, which nobody wrote into.
pub(crate) fn is_own_vdso(bytes: &[u8]) -> bool {
    static OWN: LazyLock<Option<&'static [u8]>> = LazyLock::new(|| {
        let own = own_vdso_entry()?;
        // SAFETY: the kernel maps the vDSO for reading, never writes to it, and nothing here unmaps it.
        Some(unsafe { std::slice::from_raw_parts(own.start as *const u8, (own.end - own.start) as usize) })
    });
    OWN.is_some_and(|own| own == bytes)
}

fn own_vdso_entry() -> Option<MapsEntry> {
    let maps = std::fs::read("/proc/self/maps").ok()?;
    executable_mappings(&maps).into_iter().find(|entry| entry.backing == Backing::Vdso)
}

/// The bytes of this process's vDSO, if it is that of another process at `other`.
fn own_vdso(other: &MapsEntry) -> Option<Vec<u8>> {
    let own = own_vdso_entry()?;
    let bytes = own.end - own.start;
    if other.start < END_OF_32_BIT || other.end - other.start != bytes || bytes > MAX_VDSO_BYTES {
        return None;
    }
    // SAFETY: the kernel maps the vDSO for reading, never writes to it, and nothing here unmaps it.
    Some(unsafe { std::slice::from_raw_parts(own.start as *const u8, bytes as usize) }.to_vec())
}

/// The bytes of an image.
#[derive(Clone, Copy, Debug)]
pub enum ImageBytes<'a> {
    /// In memory.
    Memory(&'a [u8]),
    /// In a file.
    File(&'a ImageFile),
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

impl<'a> CopyBytes<'a> for ImageBytes<'a> {
    fn copy_bytes_at(self, offset: u64, size: u64, out: &mut dyn io::Write) -> io::Result<()> {
        match self {
            Self::Memory(bytes) => bytes.copy_bytes_at(offset, size, out),
            Self::File(file) => file.copy_bytes_at(offset, size, out),
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
        let ImageSource::Memory(bytes) = source else { panic!("no bytes: {source:?}") };
        assert_eq!(own_vdso(vdso).as_deref(), Some(&bytes[..]));
        let other = MapsEntry { end: vdso.end + 4096, ..vdso.clone() };
        assert_eq!(own_vdso(&other), None, "of another size");
        let of_32_bit = MapsEntry { start: 0xf7f0_0000, end: 0xf7f0_0000 + bytes.len() as u64, ..other };
        assert_eq!(own_vdso(&of_32_bit), None, "of a 32-bit process");
    }

    #[test]
    fn a_name_leads_to_the_mapped_inode_whatever_the_device() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        std::fs::write(&path, "one").unwrap();
        let inode = std::fs::metadata(&path).unwrap().ino();
        let entry = |inode, deleted| MapsEntry {
            start: 0,
            end: 4096,
            file_offset: 0,
            device: (0xfff, 0xfffff),
            inode,
            backing: Backing::File { path: path.clone(), deleted },
            is_v8_code: false,
        };
        assert!(named(&path, &entry(inode, false), &path).is_ok());
        for other in [entry(inode, true), entry(inode + 1, false)] {
            let error = named(&path, &other, &path).unwrap_err();
            assert!(matches!(error, SourceError::Replaced(_)), "{error}");
            assert_eq!(error.capabilities(), Some("CAP_CHECKPOINT_RESTORE"));
        }
        let denied = SourceError::Open(path.clone(), io::ErrorKind::PermissionDenied.into());
        assert!(denied.capabilities().is_some_and(|text| text.contains("CAP_DAC_READ_SEARCH")));
        let gone = SourceError::Open(path, io::ErrorKind::NotFound.into());
        assert_eq!(gone.capabilities(), None, "processes end while they are read");
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
