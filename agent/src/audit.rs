//! Are the kernel's walks right?
//!
//! # Why this shape
//! Profilers are tried in tests, and in production nobody can tell a wrong stack from a strange one. So one
//! sample in N comes with its registers, what its walk found in each frame, and a copy of its stack, and is held against
//! the CFI of the images themselves, read from the files that are mapped and interpreted by gimli: neither the service, nor
//! its compiler, nor the tables, nor the BPF program have a part in that. What agreed is counted by image; nothing
//! else is kept. It runs on a thread of its own, which reads images as it meets them; what is more than it can do
//! is left out and counted, and never holds up sampling.
//!
//! # What is certain
//! What is compared was captured in one interrupt (the program's `audit.rs` says what that rules out). A disagreement is
//! a fault of the walk, of the table, or of this module. Frames that are walked without CFI, by a proved frame pointer or by
//! recognised instructions, have nothing to be compared with, and are counted apart, as are those beyond the copy. The
//! share of frames compared is thus as much a result as the share that agree.

mod cfi_step;
mod comparison;
mod image_cfi;
mod report;
mod walk;

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::process::{Content, ExecutableMapping, find, lookup_address};
use crate::table_cache::TableCache;
use comparison::{Difference, judge};
use image_cfi::ImageCfis;
pub use report::{AuditReport, AuditedImage, Outcome};
pub use walk::{AuditedFrame, AuditedWalk, StackCopy};

/// Walks that wait to be compared: 5 MiB, those of some seconds while a large image is read.
const WAITING: usize = 64;
/// How often the log says what was found.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// How long the agent's end waits for what is still to be compared: a large image is read within it, and one whose file system
/// hangs would never be.
const LONGEST_END: Duration = Duration::from_secs(5);
/// Most disagreements that the log describes: enough to see what is wrong.
const MAX_DESCRIBED: u64 = 100;

/// What audits have found so far, for whoever wants to look.
#[derive(Clone, Debug, Default)]
pub struct SharedReport(Arc<Mutex<AuditReport>>);

impl SharedReport {
    /// As it is now.
    pub fn get(&self) -> AuditReport {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, AuditReport> {
        // Counters are right whoever panicked while holding them.
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// A walk and the mappings that it went by.
struct Job {
    walk: AuditedWalk,
    mappings: Arc<[ExecutableMapping]>,
}

/// The thread that compares.
pub(crate) struct Auditor {
    jobs: SyncSender<Job>,
    /// Tells that the thread has ended, which is never joined: it may hang in a mapped file.
    end: Receiver<()>,
    report: SharedReport,
    /// Walks lost on their way here, as the backend counts them.
    lost_before: u64,
}

impl Auditor {
    /// Starts to count into `report`. `tables` are those that walks go by, to be shown.
    pub(crate) fn start(report: SharedReport, tables: TableCache) -> io::Result<Self> {
        let auditing =
            Auditing { report: report.clone(), tables, images: ImageCfis::default(), described: 0 };
        Self::start_thread(report, move |queue| auditing.run(&queue))
    }

    fn start_thread(
        report: SharedReport,
        run: impl FnOnce(Receiver<Job>) + Send + 'static,
    ) -> io::Result<Self> {
        let (jobs, queue) = sync_channel(WAITING);
        let (ended, end) = channel();
        std::thread::Builder::new().name("windlass-audit".to_owned()).spawn(move || {
            run(queue);
            // Nobody listens any more if it took too long.
            let _ = ended.send(());
        })?;
        Ok(Self { jobs, end, report, lost_before: 0 })
    }

    /// Queues a walk. `mappings` are those that it went by, if they still hold.
    pub(crate) fn take(&self, mappings: Option<Arc<[ExecutableMapping]>>, walk: AuditedWalk) {
        let Some(mappings) = mappings else {
            self.report.lock().outdated += 1;
            return;
        };
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) =
            self.jobs.try_send(Job { walk, mappings })
        {
            self.report.lock().lost += 1;
        }
    }

    /// Counts walks that the backend lost, given how many there were since the start.
    pub(crate) fn note_lost(&mut self, lost: u64) {
        self.report.lock().lost += lost.saturating_sub(self.lost_before);
        self.lost_before = lost;
    }

    /// Compares what waits, as far as that is done within [`LONGEST_END`], and ends the thread.
    pub(crate) fn finish(self) -> AuditReport {
        self.finish_within(LONGEST_END)
    }

    fn finish_within(self, longest: Duration) -> AuditReport {
        drop(self.jobs);
        match self.end.recv_timeout(longest) {
            Ok(()) => {}
            Err(RecvTimeoutError::Timeout) => {
                tracing::warn!(
                    "the audit ends before all is compared: a mapped file's file system may not answer"
                );
            }
            Err(RecvTimeoutError::Disconnected) => tracing::error!("audit thread panicked"),
        }
        self.report.get()
    }
}

/// What the thread owns.
struct Auditing {
    report: SharedReport,
    tables: TableCache,
    images: ImageCfis,
    /// Disagreements described in the log so far.
    described: u64,
}

impl Auditing {
    fn run(mut self, queue: &Receiver<Job>) {
        let mut last_log = Instant::now();
        loop {
            match queue.recv_timeout(LOG_INTERVAL.saturating_sub(last_log.elapsed())) {
                Ok(job) => self.audit(&job),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if last_log.elapsed() >= LOG_INTERVAL {
                self.report.get().log();
                last_log = Instant::now();
            }
        }
    }

    /// Compares one walk and counts what came of it.
    fn audit(&mut self, job: &Job) {
        let judged = judge(&job.walk, &job.mappings, &mut self.images);
        for (number, step) in judged.iter().enumerate() {
            if let Some(difference) = &step.difference
                && self.described < MAX_DESCRIBED
            {
                self.described += 1;
                self.describe(job, number, difference);
            }
        }
        let steps = job.walk.frames.iter().zip(&judged);
        let steps = steps.map(|(frame, step)| (image_of(&job.mappings, frame.address), step.outcome));
        self.report.lock().count(steps.collect(), job.walk.sample.stop.is_complete());
    }

    /// Writes to the log where the walk and the CFI part: the place in the image, both rows, what each leads to.
    fn describe(&self, job: &Job, number: usize, difference: &Difference) {
        let (sample, frames) = (&job.walk.sample, &job.walk.frames);
        let at = lookup_address(frames[number].address);
        let shown = crate::process::frame(find(&job.mappings, at), at);
        let image = image_of(&job.mappings, frames[number].address);
        let table = image.id.and_then(|id| self.tables.get(id));
        let row = table.map_or_else(
            || "no longer at hand".to_owned(),
            |table| table.table().rule(windlass_schema::ImageAddress::new(shown.address)).to_string(),
        );
        tracing::warn!(
            path = %image.path,
            id = image.shown_id(),
            address = format!("{:#x}", shown.address),
            table_row = row,
            cfi_row = difference.row,
            frame = format!("{} of {}: {:x?}", number, frames.len(), frames[number]),
            walked = format!("{:x?}, {}", frames.get(number + 1), sample.stop.as_str()),
            by_cfi = difference.caller,
            comm = sample.comm,
            tgid = sample.tgid,
            "audit: a step disagrees with the image's CFI"
        );
    }
}

/// The image that a frame is counted by.
fn image_of(mappings: &[ExecutableMapping], sampled: u64) -> AuditedImage {
    match find(mappings, lookup_address(sampled)) {
        Some(mapping) => {
            let id = match &mapping.content {
                Content::Image { image, .. } => Some(image.id.build_id()),
                Content::NoTable(_) => None,
            };
            AuditedImage { path: mapping.module.path.clone(), id }
        }
        None => AuditedImage { path: "(no mapping)".into(), id: None },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_audit_that_hangs_does_not_hold_up_the_end() {
        let (held, hanging) = channel::<()>();
        let report = SharedReport::default();
        report.lock().outdated = 7;
        let run = move |_queue| assert!(hanging.recv().is_err(), "nobody sends");
        let auditor = Auditor::start_thread(report, run).expect("a thread starts");
        assert_eq!(auditor.finish_within(Duration::from_millis(1)).outdated, 7);
        drop(held);
    }

    #[test]
    fn the_end_waits_for_what_is_compared() {
        let report = SharedReport::default();
        let counted = report.clone();
        let run = move |queue: Receiver<Job>| {
            assert!(queue.recv().is_err(), "nothing more comes");
            counted.lock().outdated = 7;
        };
        let auditor = Auditor::start_thread(report, run).expect("a thread starts");
        assert_eq!(auditor.finish_within(Duration::from_secs(3600)).outdated, 7);
    }
}
