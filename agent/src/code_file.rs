//! How is the file found in which a process's compiler names its code?
//!
//! A perf map is `/tmp/perf-PID.map` and a jitdump a mapped file `jit-PID.dump`, as the process sees its files and its
//! number: in its own mount and PID namespaces. A name there can be anything that its user chose, as a link to a file of
//! the host, a pipe or a device. So names are followed inside the process's root alone (`openat2`, `RESOLVE_IN_ROOT`),
//! the last one never through a link, and what is found is opened only if it is a regular file that belongs to the
//! process's user or to root, as perf demands of perf maps (`dso__load` in tools/perf/util/symbol.c).

use std::ffi::CString;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use crate::code_map::{Code, CodeMap};
use crate::code_records::{Progress, RecordsError};
use crate::jitdump::{self, JitdumpReader};
use crate::perf_map::{self, PerfMapReader};
use crate::time_namespace::monotonic_offset_ns;

/// A process, as far as its files are concerned. It keeps the process's root, so that files can be found a moment after
/// its end: Java writes its map when it ends.
#[derive(Debug)]
pub struct ProcessRoot {
    pid: u32,
    /// `None` until a file was looked for: the file system of a root may hang (`nfs_weak_revalidate` in fs/nfs/dir.c).
    root: Option<File>,
    /// The process's number as it sees itself.
    own_pid: u32,
    /// Its effective user.
    user: u32,
    /// When it started, in clock ticks since boot: what tells it from an earlier process of the same number.
    started: u64,
}

/// A file was found and is not used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// None there, or not to be opened.
    #[error("cannot be opened: {0}")]
    Open(#[from] io::Error),
    /// A pipe, a device, a folder.
    #[error("is not a regular file")]
    NotRegular,
    /// Written by somebody else.
    #[error("belongs to user {found}, the process to user {expected}")]
    Owner {
        /// Of the file.
        found: u32,
        /// Of the process.
        expected: u32,
    },
    /// Its times may be of either of two clocks.
    #[error("is of a process whose time namespace is not that of its children")]
    Clock,
}

impl ProcessRoot {
    /// That of process `pid`. Asks `/proc` alone.
    pub fn of(pid: u32) -> io::Result<Self> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
        // Real, effective, saved and file system's; numbers from the outermost namespace to the innermost.
        let user = field("Uid:").and_then(|ids| ids.split_whitespace().nth(1)?.parse().ok());
        let own_pid = field("NSpid:").and_then(|ids| ids.split_whitespace().last()?.parse().ok());
        let unknown = || io::Error::new(io::ErrorKind::InvalidData, "status without Uid or NSpid");
        let (user, own_pid) = (user.ok_or_else(unknown)?, own_pid.ok_or_else(unknown)?);
        Ok(Self { pid, root: None, own_pid, user, started: start_time(pid).ok_or_else(unknown)? })
    }

    /// Opens the root, if that was not done before.
    pub(crate) fn enter(&mut self) -> io::Result<()> {
        if self.root.is_none() {
            let root = File::options()
                .read(true)
                .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
                .open(format!("/proc/{}/root", self.pid))?;
            // Asked behind: the number may be another process's.
            if start_time(self.pid) != Some(self.started) {
                return Err(io::ErrorKind::NotFound.into());
            }
            self.root = Some(root);
        }
        Ok(())
    }

    /// A handle, good for questions alone, of what `path` leads to.
    fn find(&self, path: &Path) -> io::Result<File> {
        open_beneath(self.root.as_ref().ok_or(io::ErrorKind::NotFound)?, path)
    }

    /// Whether process `pid` is still this one, or none.
    pub fn is_of(&self, pid: u32) -> bool {
        start_time(pid).is_none_or(|started| started == self.started)
    }

    /// The process's perf map.
    pub fn perf_map(&self) -> PathBuf {
        PathBuf::from(format!("/tmp/perf-{}.map", self.own_pid))
    }

    /// Whether a mapped file is the process's jitdump, by its name.
    pub fn is_jitdump(&self, path: &str) -> bool {
        path.rsplit('/').next() == Some(&format!("jit-{}.dump", self.own_pid))
    }

    /// Opens a file of the process's.
    fn file(&self, path: &Path) -> Result<File, FileError> {
        // First without opening, since to open a device may be to act on it.
        let found = self.find(path)?;
        let metadata = found.metadata()?;
        if !metadata.is_file() {
            return Err(FileError::NotRegular);
        }
        if ![0, self.user].contains(&metadata.uid()) {
            return Err(FileError::Owner { found: metadata.uid(), expected: self.user });
        }
        let again = format!("/proc/self/fd/{}", found.as_raw_fd());
        Ok(File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(again)?)
    }
}

/// The process's start, field 22 of `/proc/PID/stat` (proc_pid_stat(5)).
fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; behind it follows field 3.
    stat.rsplit_once(')')?.1.split_whitespace().nth(22 - 3)?.parse().ok()
}

/// A handle, good for questions alone, of what `path` leads to from `root`.
fn open_beneath(root: &File, path: &Path) -> io::Result<File> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: a struct of numbers, for which zero is a value.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = (libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC) as u64;
    how.resolve = libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS;
    // SAFETY: `path` ends with NUL, `how` has the size that is stated, and both outlive the call.
    let opened = unsafe {
        libc::syscall(libc::SYS_openat2, root.as_raw_fd(), path.as_ptr(), &raw const how, size_of_val(&how))
    };
    if opened < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just opened it for us, and nobody else knows of it.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(opened as i32) }))
}

/// A file in which a compiler names its code.
#[derive(Debug)]
pub struct CodeFile {
    path: PathBuf,
    file: File,
    identity: (u64, u64),
    reader: Reader,
}

#[derive(Debug)]
enum Reader {
    PerfMap(PerfMapReader),
    Jitdump(JitdumpReader),
}

impl CodeFile {
    /// Opens the perf map of a process.
    pub fn perf_map(process: &ProcessRoot) -> Result<Self, FileError> {
        Self::open(process, process.perf_map(), Reader::PerfMap(PerfMapReader::default()))
    }

    /// Opens the jitdump of process `pid`, which it maps from `path`.
    pub fn jitdump(process: &ProcessRoot, pid: u32, path: &str) -> Result<Self, FileError> {
        let clock_ahead_ns = monotonic_offset_ns(pid)?.ok_or(FileError::Clock)?;
        Self::open(process, path.into(), Reader::Jitdump(JitdumpReader::of_clock(clock_ahead_ns)))
    }

    fn open(process: &ProcessRoot, path: PathBuf, reader: Reader) -> Result<Self, FileError> {
        let file = process.file(&path)?;
        let identity = identity(&file.metadata()?);
        Ok(Self { path, file, identity, reader })
    }

    /// Its path, as the process sees it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is a jitdump.
    pub fn is_jitdump(&self) -> bool {
        matches!(self.reader, Reader::Jitdump(_))
    }

    /// Whether another file has its name now. One that has none any more is read on.
    pub fn is_replaced(&self, process: &ProcessRoot) -> bool {
        let found = process.find(&self.path).and_then(|file| file.metadata());
        found.is_ok_and(|metadata| identity(&metadata) != self.identity)
    }

    /// Reads on into `map`. What comes now was written between `earliest_ns` and `latest_ns`.
    pub fn read_new(
        &mut self,
        map: &mut CodeMap,
        earliest_ns: u64,
        latest_ns: impl Fn() -> u64,
    ) -> Result<Progress, RecordsError> {
        let mut sink = |record| map.add(record, earliest_ns, latest_ns());
        match &mut self.reader {
            Reader::PerfMap(reader) => reader.read_new(&self.file, &mut sink),
            Reader::Jitdump(reader) => reader.read_new(&self.file, &mut sink),
        }
    }

    /// The name of `code`, if it can still be read.
    pub fn name(&self, code: &Code) -> Option<String> {
        let (start, record_at) = code.named;
        match self.reader {
            Reader::PerfMap(_) => perf_map::name(&self.file, record_at, start, code.end),
            Reader::Jitdump(_) => jitdump::name(&self.file, record_at, start),
        }
    }
}

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// This process with another root and user.
    fn process(root: &Path, user: u32) -> ProcessRoot {
        let own = ProcessRoot::of(std::process::id()).unwrap();
        let root = File::options().read(true).custom_flags(libc::O_PATH).open(root).unwrap();
        ProcessRoot { root: Some(root), user, ..own }
    }

    #[test]
    fn own_process() {
        let own = ProcessRoot::of(std::process::id()).unwrap();
        assert_eq!(own.own_pid, std::process::id());
        // SAFETY: it takes nothing and cannot fail.
        assert_eq!(own.user, unsafe { libc::geteuid() });
        assert!(own.is_of(std::process::id()) && own.is_of(u32::MAX));
        assert!(!own.is_of(1));
        assert!(own.is_jitdump(&format!("/home/x/.debug/jit-{}.dump", std::process::id())));
        assert!(!own.is_jitdump("/home/x/.debug/jit-0.dump"));
    }

    #[test]
    fn names_that_lead_elsewhere_are_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let (root, outside) = (folder.path().join("root"), folder.path().join("outside"));
        std::fs::create_dir_all(root.join("tmp")).unwrap();
        std::fs::create_dir_all(&outside).unwrap();
        std::fs::write(outside.join("file"), "1000 20 f\n").unwrap();
        std::fs::write(root.join("tmp/file"), "1000 20 f\n").unwrap();
        let user = std::fs::metadata(&outside).unwrap().uid();
        let process = process(&root, user);
        let open = |path: &str| process.file(Path::new(path));
        assert!(open("/tmp/file").is_ok());
        assert!(open("/tmp/../../outside/file").is_err());
        symlink(outside.join("file"), root.join("tmp/link")).unwrap();
        symlink("file", root.join("tmp/near")).unwrap();
        assert!(matches!(open("/tmp/link"), Err(FileError::NotRegular | FileError::Open(_))));
        assert!(matches!(open("/tmp/near"), Err(FileError::NotRegular | FileError::Open(_))));
        symlink(&outside, root.join("away")).unwrap();
        symlink("/tmp", root.join("inside")).unwrap();
        assert!(open("/away/file").is_err(), "an absolute link is one below the process's root");
        assert!(open("/inside/file").is_ok());
        assert!(matches!(open("/tmp"), Err(FileError::NotRegular)));
        let pipe = CString::new(root.join("tmp/pipe").as_os_str().as_bytes()).unwrap();
        // SAFETY: a path that ends with NUL.
        assert_eq!(unsafe { libc::mkfifo(pipe.as_ptr(), 0o600) }, 0);
        assert!(matches!(open("/tmp/pipe"), Err(FileError::NotRegular)));
    }

    #[test]
    fn files_of_other_users_are_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, "1000 20 f\n").unwrap();
        let user = std::fs::metadata(&path).unwrap().uid();
        let found = process(folder.path(), user + 1).file(Path::new("/file"));
        match user {
            0 => assert!(found.is_ok(), "root may write for all"),
            _ => assert!(matches!(found, Err(FileError::Owner { .. }))),
        }
        if user == 0 {
            std::os::unix::fs::chown(&path, Some(65_534), None).unwrap();
            let found = process(folder.path(), 1).file(Path::new("/file"));
            assert!(matches!(found, Err(FileError::Owner { found: 65_534, expected: 1 })), "{found:?}");
            assert!(process(folder.path(), 65_534).file(Path::new("/file")).is_ok());
        }
    }
}
