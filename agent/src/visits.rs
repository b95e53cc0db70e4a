//! Where are readings, and may another one go there?
//!
//! What a reading asks for may never come: of a file system whose server is gone, or of the memory of a process
//! that waits for one. A reading that hangs keeps its thread of [`crate::file_threads`], so if every reading went where others hang
//! already, there would soon be no thread left. So a place takes a few of them:
//!
//! ```text
//! a file system             2, and none once one of them has been there for 2 s
//! the memory of processes   4 over all processes; beyond, those whose memory does not look held
//! ```
//!
//! Each process's memory is a place of its own, and which of them is held nobody knows before: see [`crate::held_memory`].

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::file_threads::MAX_THREADS;
use crate::held_memory::looks_held;

/// After how long without an answer a file system is left alone: disks under load answer within it.
const HANGS_AFTER: Duration = Duration::from_secs(2);
/// Most readings in one file system at a time.
const MAX_IN_FILE_SYSTEM: usize = 2;
/// Most readings in the memory of processes at a time, before those that look held are left out.
const MAX_IN_MEMORY: usize = 4;
/// What may stop answering at once, and leave two threads: three file systems, and the memory of any number of processes.
const _: () = assert!(MAX_IN_MEMORY + 3 * MAX_IN_FILE_SYSTEM + 2 <= MAX_THREADS);

/// Where readings are.
#[derive(Clone, Default)]
pub(crate) struct Visits(Arc<Mutex<Vec<Visit>>>);

/// A reading at a place.
struct Visit {
    number: u64,
    place: Place,
    since: Instant,
    /// Whether it was said that it hangs.
    is_said: bool,
}

enum Place {
    /// A file, and its file system: major and minor number of its device.
    File { device: (u32, u32), path: PathBuf },
    /// A process's memory.
    Memory { pid: u32 },
}

impl Place {
    fn is_in(&self, file_system: (u32, u32)) -> bool {
        matches!(self, Self::File { device, .. } if *device == file_system)
    }
}

/// Ends a visit when it is dropped.
pub(crate) struct VisitEnd<'a> {
    visits: &'a Visits,
    number: u64,
}

impl Drop for VisitEnd<'_> {
    fn drop(&mut self) {
        self.visits.lock().retain(|visit| visit.number != self.number);
    }
}

impl Visits {
    fn lock(&self) -> MutexGuard<'_, Vec<Visit>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to ask for a file of a file system, unless that hangs.
    pub(crate) fn begin_file(&self, device: (u32, u32), path: &Path) -> Option<VisitEnd<'_>> {
        let now = Instant::now();
        let visits = self.lock();
        let others = || visits.iter().filter(|visit| visit.place.is_in(device));
        if others().count() >= MAX_IN_FILE_SYSTEM
            || others().any(|visit| now.duration_since(visit.since) >= HANGS_AFTER)
        {
            return None;
        }
        Some(self.begin(visits, Place::File { device, path: path.to_owned() }))
    }

    /// Begins to read a process's memory, unless that looks held and too many wait for such already.
    pub(crate) fn begin_memory(&self, pid: u32) -> Option<VisitEnd<'_>> {
        self.begin_memory_unless(pid, looks_held)
    }

    fn begin_memory_unless(&self, pid: u32, looks_held: impl FnOnce(u32) -> bool) -> Option<VisitEnd<'_>> {
        let others = self.lock().iter().filter(|visit| matches!(visit.place, Place::Memory { .. })).count();
        // One that is held looks so for as long as it is.
        if others >= MAX_IN_MEMORY && looks_held(pid) {
            return None;
        }
        Some(self.begin(self.lock(), Place::Memory { pid }))
    }

    fn begin(&self, mut visits: MutexGuard<'_, Vec<Visit>>, place: Place) -> VisitEnd<'_> {
        let number = visits.iter().map(|visit| visit.number).max().map_or(0, |last| last + 1);
        visits.push(Visit { number, place, since: Instant::now(), is_said: false });
        VisitEnd { visits: self, number }
    }

    /// Says what has been waited for too long, each once.
    pub(crate) fn say_hanging(&self, now: Instant) {
        for visit in self.lock().iter_mut().filter(|visit| !visit.is_said) {
            if now.duration_since(visit.since) < HANGS_AFTER {
                continue;
            }
            visit.is_said = true;
            match &visit.place {
                Place::File { device, path } => tracing::warn!(
                    path = %path.display(),
                    device = format!("{}:{}", device.0, device.1),
                    "a mapped file's file system does not answer: walks stop at its files, and the process that is being \
                     read has no mappings until it does"
                ),
                Place::Memory { pid } => tracing::warn!(
                    pid,
                    "what a process maps is not to be had, as its memory is held: it is read when it is let go"
                ),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_that_hangs_is_left_alone() {
        let visits = Visits::default();
        let path = Path::new("/x");
        let (one, other) = ((8, 1), (8, 2));
        let first = visits.begin_file(one, path).expect("nobody is there");
        let second = visits.begin_file(one, path).expect("as many as may be");
        assert!(visits.begin_file(one, path).is_none(), "too many");
        assert!(visits.begin_file(other, path).is_some(), "another one");
        drop(first);
        assert!(visits.begin_file(one, path).is_some(), "its visit is over");
        visits.lock()[0].since =
            Instant::now().checked_sub(HANGS_AFTER).expect("the machine runs for longer");
        assert!(visits.begin_file(one, path).is_none(), "it does not answer");
        drop(second);
        assert!(visits.begin_file(one, path).is_some(), "it answered");
        assert!(visits.lock().is_empty());
    }

    #[test]
    fn while_many_wait_for_memory_none_is_read_that_looks_held() {
        let visits = Visits::default();
        let (held, free) = (|_| true, |_| false);
        let unasked = |pid| panic!("whether {pid} looks held says nothing yet");
        let _file = visits.begin_file((8, 1), Path::new("/x"));
        let mut waiting: Vec<_> = (0..4).filter_map(|pid| visits.begin_memory_unless(pid, unasked)).collect();
        assert_eq!(waiting.len(), MAX_IN_MEMORY);
        assert!(visits.begin_memory_unless(7, held).is_none());
        let other = visits.begin_memory_unless(8, free);
        assert!(other.is_some(), "others are read on");
        assert!(visits.begin_memory_unless(7, held).is_none());
        drop(other);
        waiting.pop();
        assert!(visits.begin_memory_unless(7, unasked).is_some(), "one was let go");
    }
}
