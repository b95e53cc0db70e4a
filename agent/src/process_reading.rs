//! What does one reading of a process's mappings say?
//!
//! To tell who the mapped files are, they are asked for (`stat`), and those that are not known are opened and read: in file systems of
//! the process's choice, any of which may hang. So a reading is a job for a thread of [`crate::file_threads`], with all that
//! it needs, and what it found comes back as values. The text of `/proc/PID/maps` is read there, too, in one go with the files: the
//! kernel makes it under the process's `mmap_lock`, which `mmap` holds while it asks a file server (`nfs_file_mmap` in
//! fs/nfs/file.c).
//!
//! What a process maps is its own choice as well: files that take long to identify, by the thousand, or anew each time. So a reading that
//! has taken its time leaves the rest of what is not known to the next one, and says what it took; [`crate::scan_schedule`] has
//! the next one wait accordingly.
//!
//! One file system that hangs would hold up one thread for each process that maps its files, until there is none left, and processes
//! whose memory is held would. [`crate::visits`] tells what a reading leaves out for that, or that it is put off.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use windlass_schema::StopReason;

use crate::image::{Image, ImageError, identify};
use crate::images::{Identified, KnownFiles};
use crate::mapped_file::{FileKey, ImageSource, SourceError};
use crate::perf_ring::monotonic_ns;
use crate::proc_maps::{Backing, MapsEntry, executable_mappings};
use crate::process::living_threads;
use crate::visits::Visits;

/// How much of a processor one reading may take before it leaves files out: some thousand files of the usual kind.
const MAX_WORK: Duration = Duration::from_millis(100);

/// A reading that is to be made.
pub(crate) struct Wanted {
    pub(crate) tgid: u32,
    /// Which reading of the process.
    pub(crate) number: u64,
    pub(crate) files: KnownFiles,
    pub(crate) visits: Visits,
    /// Whether nobody wants it any more.
    pub(crate) is_over: Arc<AtomicBool>,
}

/// A reading that was made.
pub(crate) struct Made {
    pub(crate) tgid: u32,
    pub(crate) number: u64,
    /// When it began: `CLOCK_MONOTONIC` in nanoseconds.
    pub(crate) read_ns: u64,
    /// How long a processor worked at it.
    pub(crate) work: Duration,
    pub(crate) found: Result<Vec<(MapsEntry, Found)>, NotRead>,
}

/// Why a process was not read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotRead {
    /// Its memory looks held, and others wait for such.
    #[error("its memory looks held, as that of others is")]
    PutOff,
    /// It cannot be read.
    #[error(transparent)]
    Failed(#[from] io::Error),
}

impl From<NotRead> for io::Error {
    fn from(error: NotRead) -> Self {
        match error {
            NotRead::PutOff => Self::new(io::ErrorKind::WouldBlock, error),
            NotRead::Failed(error) => error,
        }
    }
}

/// What a mapping maps.
pub(crate) enum Found {
    /// Memory.
    Anonymous,
    /// A file, and which image that is.
    File(ImageSource, Identified),
    /// The vDSO.
    Vdso(Arc<[u8]>),
    /// Something that cannot be read; a file that was identified, by its name.
    Unreadable(Option<String>, SourceError),
    /// A file of a file system that hangs, or for which there was no time.
    LeftOut,
}

/// Makes a reading.
pub(crate) fn read(wanted: Wanted) -> Made {
    let Wanted { tgid, number, files, visits, is_over } = wanted;
    if is_over.load(Ordering::Relaxed) {
        let found = Err(NotRead::Failed(io::ErrorKind::Interrupted.into()));
        return Made { tgid, number, read_ns: 0, work: Duration::ZERO, found };
    }
    let (read_ns, began) = (monotonic_ns(), thread_time());
    let found = find_mappings(tgid, &files, &visits);
    Made { tgid, number, read_ns, work: thread_time().saturating_sub(began), found }
}

/// How long processors worked for this thread.
fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec.try_into().unwrap_or_default(), time.tv_nsec.try_into().unwrap_or_default())
}

/// Reads the executable mappings of process `pid`, in the order of addresses.
///
/// When its first thread has ended and others go on, `/proc/PID` shows no memory any more; then they are
/// read of another thread, whose `/proc/TID` is the same but for not being listed.
pub(crate) fn find_mappings(
    pid: u32,
    files: &KnownFiles,
    visits: &Visits,
) -> Result<Vec<(MapsEntry, Found)>, NotRead> {
    let visit = visits.begin_memory(pid).ok_or(NotRead::PutOff)?;
    let first = read_maps(pid);
    let (reader, maps) = match first {
        Ok(maps) if !maps.is_empty() => (pid, maps),
        first => match living_threads(pid).find_map(|tid| Some((tid, read_maps(tid).ok()?))) {
            Some(of_thread) => of_thread,
            None => (pid, first?),
        },
    };
    let entries = executable_mappings(&maps);
    wait_for_memory(reader, &entries);
    drop(visit);
    let until = thread_time() + MAX_WORK;
    let mut reading = Reading { pid: reader, files, visits, until, new: HashMap::new() };
    Ok(entries
        .into_iter()
        .map(|entry| {
            let found = reading.find(&entry);
            (entry, found)
        })
        .collect())
}

/// Waits for a process's `mmap_lock`, which whoever looks for one of its mapped files takes (`proc_map_files_lookup` in
/// fs/proc/base.c), and newer kernels do not for `maps`. Were it waited for at a file, the file's system would seem to hang.
fn wait_for_memory(pid: u32, entries: &[MapsEntry]) {
    let of_file = entries.iter().find(|entry| matches!(entry.backing, Backing::File { .. }));
    if let Some(MapsEntry { start, end, .. }) = of_file {
        // Whatever it says, nobody asks the file system for it.
        let _ = std::fs::read_link(format!("/proc/{pid}/map_files/{start:x}-{end:x}"));
    }
}

/// Largest `/proc/PID/maps` read in bytes: the 65,530 mappings that the kernel allows by default, at
/// 256 bytes each.
const MAX_MAPS_BYTES: u64 = 16 * 1024 * 1024;

fn read_maps(pid: u32) -> io::Result<Vec<u8>> {
    use std::io::Read as _;
    let mut maps = Vec::new();
    std::fs::File::open(format!("/proc/{pid}/maps"))?.take(MAX_MAPS_BYTES).read_to_end(&mut maps)?;
    Ok(maps)
}

struct Reading<'a> {
    pid: u32,
    files: &'a KnownFiles,
    visits: &'a Visits,
    /// The thread's time from which on nothing is identified.
    until: Duration,
    /// What this reading identified: a file has several mappings.
    new: HashMap<FileKey, Identified>,
}

impl Reading<'_> {
    fn find(&mut self, entry: &MapsEntry) -> Found {
        match &entry.backing {
            Backing::File { path, .. } => match self.visits.begin_file(entry.device, path) {
                Some(_visit) => self.find_file(entry, path),
                None => Found::LeftOut,
            },
            Backing::Vdso => match ImageSource::of_vdso(self.pid, entry) {
                Ok(ImageSource::Memory(bytes)) => Found::Vdso(bytes),
                Ok(ImageSource::File { .. }) => unreachable!("a vDSO is in memory"),
                Err(error) => Found::Unreadable(None, error),
            },
            Backing::Anonymous => Found::Anonymous,
        }
    }

    fn find_file(&mut self, entry: &MapsEntry, path: &Path) -> Found {
        let source = match ImageSource::of_mapping(self.pid, entry, path) {
            Ok(source) => source,
            Err(error) => return Found::Unreadable(None, error),
        };
        let ImageSource::File { key, .. } = &source else { unreachable!("a mapping of a file is of a file") };
        let known = self.new.get(key).cloned().or_else(|| self.files.get(key));
        if known.is_none() && thread_time() >= self.until {
            return Found::LeftOut;
        }
        match known.map_or_else(|| read_identity(&source), Ok) {
            Ok(identified) => {
                self.new.insert(*key, identified.clone());
                Found::File(source, identified)
            }
            Err(error) => Found::Unreadable(Some(source.shown_name()), error),
        }
    }
}

/// The image behind `source`, or the reason that a walk through it is to stop with.
fn read_identity(source: &ImageSource) -> Result<Identified, SourceError> {
    source.read(|image| identified(source, identify(image)))
}

/// The same, of what reading it came to.
pub(crate) fn identified(source: &ImageSource, read: Result<Image, ImageError>) -> Identified {
    match read {
        Ok(image) => Ok(Arc::new(image)),
        // Executable memory of a file that is no image: a JIT's memfd or cache.
        Err(ImageError::NotElf) => Err(StopReason::Jit),
        Err(error) => {
            tracing::info!(image = source.shown_name(), %error, "image cannot be used");
            Err(StopReason::TableUnavailable)
        }
    }
}
