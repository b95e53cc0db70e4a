//! Which processes are being read, and how long does sampling wait for that?
//!
//! What is read of a process is read beside sampling ([`process_reading`](crate::process_reading)), one reading a process. A reading
//! takes some 100 microseconds, and a process is walked from then on: so sampling waits for it, and for no more than
//! [`PATIENCE`]. What takes longer is taken when it is there. Until then the process is not read again, and what
//! events tell of it meanwhile is kept beside ([`Noted`]).

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::noted::{Noted, NotedMapping};
use crate::alarm::Alarm;
use crate::file_threads::{FileThreads, Manner};
use crate::images::KnownFiles;
use crate::process_reading::{Made, NotRead, Wanted, read};
use crate::visits::Visits;

/// How long sampling waits for readings. Most take a hundredth of it, the kernel's buffers have room for more,
/// and a process that is new has its mappings in time.
const PATIENCE: Duration = Duration::from_millis(20);
/// How long it waits at the start, when all processes are read, for the next one.
const START_PATIENCE: Duration = Duration::from_millis(500);
/// How threads read: one that is at a file for so long waits for a disk at the least, and others need not.
const MANNER: Manner =
    Manner { name: "windlass-files", hangs_after: Duration::from_millis(100), is_awaited: true };

/// The readings that are out.
pub(super) struct Readings {
    threads: FileThreads<Wanted, Made>,
    visits: Visits,
    out: HashMap<u32, Out>,
    last_number: u64,
    patience: Duration,
    counts: ReadingCounts,
}

/// A process's reading that is out.
pub(super) struct Out {
    number: u64,
    /// Whether sampling went on without.
    is_late: bool,
    /// What it mapped since.
    pub(super) noted: Noted,
    /// When the process ended.
    pub(super) exited: Option<Instant>,
    /// Whether the process is to be read again.
    pub(super) is_wanted_again: bool,
    /// Set when it is not wanted any more.
    is_over: Arc<AtomicBool>,
}

impl Drop for Out {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}

/// What became of readings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadingCounts {
    /// Those that were not there when sampling had waited for them.
    pub late: u64,
    /// Those that were due and not begun, as an earlier one was not there.
    pub skipped: u64,
    /// Those that were put off, as the process's memory looks held.
    pub put_off: u64,
    /// Those of the late ones that are still not there.
    pub waiting: u64,
}

impl Readings {
    pub(super) fn new() -> Self {
        Self {
            threads: FileThreads::new(MANNER, read),
            visits: Visits::default(),
            out: HashMap::new(),
            last_number: 0,
            patience: PATIENCE,
            counts: ReadingCounts::default(),
        }
    }

    pub(super) fn ring(&mut self, alarm: &Alarm) {
        self.threads.ring(alarm);
    }

    pub(super) fn wait_for(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// Has a process read, unless it is being read.
    pub(super) fn begin(&mut self, tgid: u32, files: KnownFiles) {
        if let Some(out) = self.out.get_mut(&tgid) {
            self.counts.skipped += 1;
            out.is_wanted_again = true;
            return;
        }
        self.last_number += 1;
        let number = self.last_number;
        let is_over = Arc::new(AtomicBool::new(false));
        let visits = self.visits.clone();
        self.threads.submit(Wanted { tgid, number, files, visits, is_over: is_over.clone() });
        let noted = Noted::default();
        let out = Out { number, is_late: false, noted, exited: None, is_wanted_again: false, is_over };
        self.out.insert(tgid, out);
    }

    /// A reading that was made, and what happened meanwhile; `None` if it is of a process before this one of its number, or of the
    /// program before this one.
    pub(super) fn take(&mut self) -> Option<(Made, Option<Out>)> {
        let made = self.threads.try_result()?;
        Some(self.claim(made))
    }

    /// The same, waiting for one as long as there is one to wait for.
    pub(super) fn wait(&mut self, deadline: Instant) -> Option<(Made, Option<Out>)> {
        let is_waited_for = self.out.values().any(|out| !out.is_late);
        let made = is_waited_for.then(|| self.threads.wait_for_result(deadline))??;
        Some(self.claim(made))
    }

    fn claim(&mut self, made: Made) -> (Made, Option<Out>) {
        let is_of_it = self.out.get(&made.tgid).is_some_and(|out| out.number == made.number);
        let out = if is_of_it { self.out.remove(&made.tgid) } else { None };
        self.counts.put_off += u64::from(matches!(made.found, Err(NotRead::PutOff)));
        (made, out)
    }

    /// Until when to wait for those that were begun.
    pub(super) fn deadline(&self) -> Instant {
        Instant::now() + self.patience
    }

    /// The same at the start, for the next one.
    pub(super) fn start_deadline(&self) -> Instant {
        Instant::now() + self.patience.max(START_PATIENCE)
    }

    /// Goes on without those that are still out.
    pub(super) fn go_on(&mut self) {
        // Not the time of the turn's beginning: threads have gone on since.
        let now = Instant::now();
        for out in self.out.values_mut().filter(|out| !out.is_late) {
            out.is_late = true;
            self.counts.late += 1;
        }
        self.threads.review(now);
        self.visits.say_hanging(now);
    }

    /// How long until it is to be looked whether a thread hangs.
    pub(super) fn next_review(&self) -> Option<Duration> {
        self.threads.is_behind().then_some(MANNER.hangs_after)
    }

    pub(super) fn counts(&self) -> ReadingCounts {
        ReadingCounts { waiting: self.out.len() as u64, ..self.counts }
    }

    /// A process mapped something.
    pub(super) fn note_mapped(&mut self, tgid: u32, mapping: impl FnOnce() -> NotedMapping) {
        if let Some(out) = self.out.get_mut(&tgid) {
            out.noted.push(mapping());
        }
    }

    /// A process ended, or one of its threads.
    pub(super) fn note_exited(&mut self, tgid: u32, now: Instant) {
        if let Some(out) = self.out.get_mut(&tgid) {
            out.exited = Some(now);
            out.is_wanted_again = false;
        }
    }

    /// Another program runs under this number: what is being read is not of it.
    pub(super) fn forget(&mut self, tgid: u32) {
        self.out.remove(&tgid);
    }

    /// Forgets all processes but those in `running`.
    pub(super) fn retain(&mut self, running: &HashSet<u32>) {
        self.out.retain(|tgid, _| running.contains(tgid));
    }
}

#[cfg(test)]
impl Readings {
    /// Has readings put off, or made again.
    pub(super) fn put_off(&mut self, are_put_off: bool) {
        let put_off = |Wanted { tgid, number, .. }| Made {
            tgid,
            number,
            read_ns: 0,
            work: Duration::ZERO,
            found: Err(NotRead::PutOff),
        };
        self.threads = FileThreads::new(MANNER, if are_put_off { put_off } else { read });
    }

    /// Has the next reading of process `tgid` hang until what this returns is dropped.
    pub(super) fn hang(&mut self, tgid: u32) -> std::sync::mpsc::Sender<()> {
        use std::sync::{Mutex, mpsc};
        static HANGING: Mutex<Option<(u32, mpsc::Receiver<()>)>> = Mutex::new(None);
        let (held, hanging) = mpsc::channel();
        *HANGING.lock().expect("nobody panics with it") = Some((tgid, hanging));
        self.threads = FileThreads::new(MANNER, |wanted| {
            let hanging =
                HANGING.lock().expect("nobody panics with it").take_if(|(tgid, _)| *tgid == wanted.tgid);
            let _ = hanging.map(|(_, hanging)| hanging.recv());
            read(wanted)
        });
        held
    }
}
