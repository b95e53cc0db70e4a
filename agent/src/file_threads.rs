//! What keeps a file system that hangs from holding up sampling?
//!
//! Files that other people's processes name lie in file systems of theirs: a hard NFS mount whose server is gone, or a
//! FUSE mount that never answers, keeps whoever asks in the kernel for as long as it likes. No system call on
//! files takes a deadline. So threads of their own ask, and whoever wants the answer looks whether it has come. One thread
//! does, as long as it comes back; for one that does not, another takes its place, up to a limit.

use std::collections::{HashMap, VecDeque};
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// After how long without an answer a thread counts as one that hangs.
const HANGS_AFTER: Duration = Duration::from_secs(2);
/// Most threads: as many file systems may hang, less one, before everybody waits.
const MAX_THREADS: usize = 8;
/// Longest rest after a job.
const LONGEST_REST: Duration = Duration::from_millis(200);

/// Threads that do `work` for jobs, in the order of their coming.
pub(crate) struct FileThreads<J, R> {
    name: &'static str,
    work: fn(J) -> R,
    shared: Arc<Shared<J>>,
    sender: mpsc::Sender<R>,
    results: mpsc::Receiver<R>,
    threads: usize,
}

struct Shared<J> {
    jobs: Mutex<Jobs<J>>,
    came: Condvar,
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
    pub(crate) fn new(name: &'static str, work: fn(J) -> R) -> Self {
        let (sender, results) = mpsc::channel();
        let jobs = Jobs { waiting: VecDeque::new(), running: HashMap::new(), is_over: false };
        let shared = Arc::new(Shared { jobs: Mutex::new(jobs), came: Condvar::new() });
        Self { name, work, shared, sender, results, threads: 0 }
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

    /// Starts a thread if there is work and all threads hang.
    pub(crate) fn review(&mut self, now: Instant) {
        let jobs = self.shared.lock();
        let hanging =
            jobs.running.values().filter(|since| now.duration_since(**since) >= HANGS_AFTER).count();
        if jobs.waiting.is_empty() || hanging < self.threads || self.threads >= MAX_THREADS {
            return;
        }
        drop(jobs);
        if self.threads > 0 {
            tracing::warn!(
                threads = self.threads,
                "a file system does not answer; others are read on beside it"
            );
        }
        let (shared, sender, work, number) =
            (self.shared.clone(), self.sender.clone(), self.work, self.threads);
        let started = std::thread::Builder::new().name(self.name.to_owned()).spawn(move || {
            while let Some(job) = shared.next(number) {
                let start = Instant::now();
                let result = work(job);
                // Who rests does not hang.
                shared.lock().running.remove(&number);
                if sender.send(result).is_err() {
                    return;
                }
                // At most half a core, whatever there is to read.
                std::thread::sleep(start.elapsed().min(LONGEST_REST));
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
        let mut threads = FileThreads::new("test", work);
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

    #[test]
    fn threads_have_a_limit() {
        let mut threads = FileThreads::new("test", work);
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
