//! What keeps a file system that hangs, or a process whose memory is held, from holding up sampling?
//!
//! Files that other people's processes name lie in file systems of theirs: a hard NFS mount whose server is gone, or a
//! FUSE mount that never answers, keeps whoever asks in the kernel for as long as it likes. No system call on
//! files takes a deadline, nor does one that reads of a process's memory. So threads of their own ask, and whoever wants the answer looks
//! whether it has come: an alarm rings, or it waits for a while. One thread does, as long as it comes back; for one that does
//! not, another takes its place, up to a limit. [`crate::visits`] sees to it that some stay below that.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::alarm::Alarm;
use crate::promptness;

/// Most threads: as many readings may hang, less one, before everybody waits. One that hangs costs its stack, some 20 KB.
pub(crate) const MAX_THREADS: usize = 12;
/// Longest rest after a job.
const LONGEST_REST: Duration = Duration::from_millis(200);
/// After how long without an answer the log says so.
const SURELY_HANGS: Duration = Duration::from_secs(2);

/// How threads go about their jobs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Manner {
    /// What the threads are called.
    pub(crate) name: &'static str,
    /// After how long without an answer a thread counts as one that hangs.
    pub(crate) hangs_after: Duration,
    /// Whether somebody waits for results: then a thread is scheduled soon, and does not rest after a job as long as that
    /// took, which leaves it half a core at most, whatever there is to read.
    pub(crate) is_awaited: bool,
}

/// Threads that do `work` for jobs, in the order of their coming.
pub(crate) struct FileThreads<J, R> {
    manner: Manner,
    work: fn(J) -> R,
    shared: Arc<Shared<J>>,
    sender: mpsc::Sender<R>,
    results: mpsc::Receiver<R>,
    threads: usize,
}

struct Shared<J> {
    jobs: Mutex<Jobs<J>>,
    came: Condvar,
    /// Rings with each result, but while one is waited for.
    alarm: OnceLock<Alarm>,
    is_waited_for: AtomicBool,
}

struct Jobs<J> {
    waiting: VecDeque<J>,
    /// Since when the threads that work do so, by their numbers.
    running: HashMap<usize, Instant>,
    is_over: bool,
}

impl<J> Shared<J> {
    fn lock(&self) -> MutexGuard<'_, Jobs<J>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next job of thread `number`; `None` if there will be none.
    fn next(&self, number: usize) -> Option<J> {
        let mut jobs = self.lock();
        loop {
            if jobs.is_over {
                return None;
            }
            if let Some(job) = jobs.waiting.pop_front() {
                jobs.running.insert(number, Instant::now());
                return Some(job);
            }
            jobs = self.came.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl<J: Send + 'static, R: Send + 'static> FileThreads<J, R> {
    /// No thread yet: the first one starts with the first job.
    pub(crate) fn new(manner: Manner, work: fn(J) -> R) -> Self {
        let (sender, results) = mpsc::channel();
        let jobs = Jobs { waiting: VecDeque::new(), running: HashMap::new(), is_over: false };
        let shared = Shared {
            jobs: Mutex::new(jobs),
            came: Condvar::new(),
            alarm: OnceLock::new(),
            is_waited_for: AtomicBool::new(false),
        };
        Self { manner, work, shared: Arc::new(shared), sender, results, threads: 0 }
    }

    /// Has `alarm` ring when a result is there.
    pub(crate) fn ring(&mut self, alarm: &Alarm) {
        // A second alarm would be of a second loop, and there is one.
        let _ = self.shared.alarm.set(alarm.clone());
    }

    /// Has `job` done when those before it are.
    pub(crate) fn submit(&mut self, job: J) {
        self.shared.lock().waiting.push_back(job);
        self.shared.came.notify_one();
    }

    /// What has been done since the last call.
    pub(crate) fn try_result(&mut self) -> Option<R> {
        self.results.try_recv().ok()
    }

    /// A result, if one comes until `deadline`. No alarm rings meanwhile: whoever waited looks once more for what is there.
    pub(crate) fn wait_for_result(&mut self, deadline: Instant) -> Option<R> {
        self.shared.is_waited_for.store(true, Ordering::SeqCst);
        let result = loop {
            let now = Instant::now();
            self.review(now);
            let wait = deadline.saturating_duration_since(now).min(self.manner.hangs_after);
            let result = self.results.recv_timeout(wait).ok();
            if result.is_some() || deadline <= Instant::now() {
                break result;
            }
        };
        self.shared.is_waited_for.store(false, Ordering::SeqCst);
        // Sent without ringing, as its thread still saw that it was waited for.
        result.or_else(|| self.try_result())
    }

    /// How many jobs wait for a thread.
    pub(crate) fn waiting(&self) -> usize {
        self.shared.lock().waiting.len()
    }

    /// Whether any does.
    pub(crate) fn is_behind(&self) -> bool {
        self.waiting() > 0
    }

    /// Starts a thread if there is work and all threads hang.
    pub(crate) fn review(&mut self, now: Instant) {
        let jobs = self.shared.lock();
        let since_all = |time: Duration| {
            let hanging = jobs.running.values().filter(|since| now.duration_since(**since) >= time).count();
            hanging == self.threads
        };
        if jobs.waiting.is_empty() || !since_all(self.manner.hangs_after) || self.threads >= MAX_THREADS {
            return;
        }
        if self.threads > 0 && since_all(SURELY_HANGS) {
            tracing::warn!(
                threads = self.threads,
                "a file system does not answer, or a process's memory is held; others are read on beside it"
            );
        }
        drop(jobs);
        let (shared, sender, work) = (self.shared.clone(), self.sender.clone(), self.work);
        let (number, is_awaited) = (self.threads, self.manner.is_awaited);
        let started = std::thread::Builder::new().name(self.manner.name.to_owned()).spawn(move || {
            if is_awaited && let Err(error) = promptness::ask() {
                promptness::note_refused(&error);
            }
            while let Some(job) = shared.next(number) {
                let start = Instant::now();
                let result = work(job);
                // Who rests does not hang.
                shared.lock().running.remove(&number);
                if sender.send(result).is_err() {
                    return;
                }
                if !shared.is_waited_for.load(Ordering::SeqCst)
                    && let Some(alarm) = shared.alarm.get()
                {
                    alarm.ring();
                }
                if !is_awaited {
                    std::thread::sleep(start.elapsed().min(LONGEST_REST));
                }
            }
        });
        match started {
            // Never joined: it may hang.
            Ok(_detached) => self.threads += 1,
            Err(error) => tracing::warn!(%error, "no thread can be started to read files"),
        }
    }
}

impl<J, R> Drop for FileThreads<J, R> {
    fn drop(&mut self) {
        self.shared.lock().is_over = true;
        self.shared.came.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANNER: Manner = Manner { name: "test", hangs_after: SURELY_HANGS, is_awaited: false };

    /// What a thread does that hangs as long as its job's sender lives.
    fn work(job: Result<u32, mpsc::Receiver<()>>) -> u32 {
        job.unwrap_or_else(|hanging| hanging.recv().map_or(0, |()| 1))
    }

    fn wait<J: Send + 'static>(threads: &mut FileThreads<J, u32>, now: Instant) -> u32 {
        loop {
            threads.review(now);
            if let Some(result) = threads.try_result() {
                return result;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn what_hangs_holds_up_nothing_else() {
        let mut threads = FileThreads::new(MANNER, work);
        let now = Instant::now();
        threads.submit(Ok(7));
        assert_eq!(wait(&mut threads, now), 7);
        let (held, hanging) = mpsc::channel::<()>();
        threads.submit(Err(hanging));
        threads.submit(Ok(8));
        let later = Instant::now() + Duration::from_secs(3600);
        assert_eq!(wait(&mut threads, later), 8);
        assert_eq!(threads.threads, 2);
        drop(held);
        assert_eq!(wait(&mut threads, later), 0, "its answer still counts");
    }

    fn rings(alarm: &Alarm) -> bool {
        let mut waited = libc::pollfd { fd: alarm.descriptor(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one descriptor is there.
        unsafe { libc::poll(&raw mut waited, 1, 0) == 1 }
    }

    #[test]
    fn results_ring_unless_they_are_waited_for() {
        let mut threads = FileThreads::new(MANNER, work);
        let alarm = Alarm::new().expect("an eventfd");
        threads.ring(&alarm);
        let late = Instant::now() + Duration::from_secs(3600);
        threads.submit(Ok(7));
        assert_eq!(threads.wait_for_result(late), Some(7));
        let (held, hanging) = mpsc::channel::<()>();
        threads.submit(Err(hanging));
        assert_eq!(threads.wait_for_result(Instant::now() + Duration::from_millis(1)), None, "it hangs");
        assert!(!rings(&alarm));
        drop(held);
        while !rings(&alarm) {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(threads.try_result(), Some(0), "what rings is there");
    }

    #[test]
    fn threads_have_a_limit() {
        let mut threads = FileThreads::new(MANNER, work);
        let mut held = Vec::new();
        for _ in 0..2 * MAX_THREADS {
            let (hold, hanging) = mpsc::channel::<()>();
            held.push(hold);
            threads.submit(Err(hanging));
        }
        let later = Instant::now() + Duration::from_secs(3600);
        while threads.threads < MAX_THREADS {
            threads.review(later);
            std::thread::sleep(Duration::from_millis(1));
        }
        while threads.shared.lock().running.len() < MAX_THREADS {
            std::thread::sleep(Duration::from_millis(1));
        }
        threads.review(later);
        assert_eq!(threads.threads, MAX_THREADS);
    }
}
