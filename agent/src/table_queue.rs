//! Which table is asked for next?
//!
//! ```text
//! wish -> urgent or background line -> worker -> result
//!                ^                        |
//!                +-- due later -----------+   being made, or failed for this image
//! ```
//! A worker keeps a request for one try. What has to be asked again goes to the end of its line with the
//! time from which on it is due, so that an image for which the service always fails holds nobody up. A
//! service that cannot be reached fails for all images alike: then all wait, and together.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};
use windlass_schema::BuildId;

use crate::tables::TableRequest;

/// First pause after the service could not be reached; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// Longest pause after the service could not be reached. Walks start within two seconds of its return.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// A request and how far it is.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) request: TableRequest,
    /// Failures of the service for this image, in a row.
    pub(crate) failures: u32,
    /// Since when the service says that the table is being made.
    pub(crate) making_since: Option<Instant>,
    /// Whether the service took the skeleton.
    pub(crate) skeleton_sent: bool,
    due: Instant,
}

/// The lines of requests.
#[derive(Default)]
pub(crate) struct Queue {
    waiting: Mutex<Waiting>,
    urgent_came: Notify,
    any_came: Notify,
}

#[derive(Default)]
struct Waiting {
    urgent: VecDeque<Job>,
    background: VecDeque<Job>,
    /// What workers hold, and whether it became urgent meanwhile.
    running: HashMap<BuildId, bool>,
    away: Option<Away>,
}

/// A service that cannot be reached.
#[derive(Clone, Copy)]
struct Away {
    due: Instant,
    pause: Duration,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a wish. One that is queued or under way is not repeated, but may become urgent.
    pub(crate) fn request(&self, request: TableRequest) {
        let urgent = request.urgent;
        if self.lock().request(request, Instant::now()) {
            self.notify(urgent);
        }
    }

    /// Puts back what is to be asked again from `due` on.
    pub(crate) fn put_back(&self, job: Job, due: Instant) {
        let urgent = self.lock().put_back(job, due);
        // Whoever sleeps until something else is due has to know.
        self.notify(urgent);
    }

    fn notify(&self, urgent: bool) {
        if urgent {
            self.urgent_came.notify_one();
        }
        self.any_came.notify_one();
    }

    /// Notes that a request has its result.
    pub(crate) fn finish(&self, id: BuildId) {
        self.lock().running.remove(&id);
    }

    /// Notes that the service could not be reached. True at the first time in a row.
    pub(crate) fn service_away(&self) -> bool {
        self.lock().service_away(Instant::now())
    }

    /// Notes that the service answered. True if it could not be reached before.
    pub(crate) fn service_answered(&self) -> bool {
        self.lock().away.take().is_some()
    }

    /// The next request for a worker.
    pub(crate) async fn next(&self, only_urgent: bool) -> Job {
        loop {
            let came = if only_urgent { &self.urgent_came } else { &self.any_came };
            let mut came = std::pin::pin!(came.notified());
            // Registered before the look into the queue, so that nothing comes unnoticed in between.
            came.as_mut().enable();
            let due = match self.lock().take(only_urgent, Instant::now()) {
                Ok(job) => return job,
                Err(due) => due,
            };
            let is_due = async {
                match due {
                    Some(due) => sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = came => {}
                () = is_due => {}
            }
        }
    }
}

impl Waiting {
    fn request(&mut self, request: TableRequest, now: Instant) -> bool {
        let id = request.id;
        if let Some(urgent) = self.running.get_mut(&id) {
            *urgent |= request.urgent;
            return false;
        }
        if self.urgent.iter().any(|job| job.request.id == id) {
            return false;
        }
        let queued = self.background.iter().position(|job| job.request.id == id);
        match (request.urgent, queued.and_then(|at| self.background.remove(at))) {
            (true, Some(mut job)) => {
                job.request.urgent = true;
                self.urgent.push_back(job);
            }
            (false, Some(job)) => self.background.push_back(job),
            (urgent, None) => {
                let line = if urgent { &mut self.urgent } else { &mut self.background };
                line.push_back(Job {
                    request,
                    failures: 0,
                    making_since: None,
                    skeleton_sent: false,
                    due: now,
                });
            }
        }
        true
    }

    fn put_back(&mut self, mut job: Job, due: Instant) -> bool {
        let made_urgent = self.running.remove(&job.request.id).unwrap_or(false);
        job.request.urgent |= made_urgent;
        job.due = due;
        let urgent = job.request.urgent;
        if urgent {
            self.urgent.push_back(job)
        } else {
            self.background.push_back(job)
        }
        urgent
    }

    fn service_away(&mut self, now: Instant) -> bool {
        match &mut self.away {
            // Of the same moment: all workers ask at once.
            Some(away) if now < away.due => {}
            Some(away) => {
                away.pause = (away.pause * 2).min(LONGEST_PAUSE);
                away.due = now + away.pause;
            }
            None => {
                self.away = Some(Away { due: now + FIRST_PAUSE, pause: FIRST_PAUSE });
                return true;
            }
        }
        false
    }

    /// The next request that is due at `now`; if there is none, when one will be.
    fn take(&mut self, only_urgent: bool, now: Instant) -> Result<Job, Option<Instant>> {
        let mut earliest: Option<Instant> = None;
        let lines = [(&mut self.urgent, true), (&mut self.background, !only_urgent)];
        for line in lines.into_iter().filter_map(|(line, takes)| takes.then_some(line)) {
            let Some(first) = line.iter().map(|job| job.due).min() else { continue };
            if let Some(away) = self.away.filter(|away| now < away.due) {
                return Err(Some(away.due));
            }
            if first > now {
                earliest = Some(earliest.map_or(first, |earliest| earliest.min(first)));
                continue;
            }
            let at = line.iter().position(|job| job.due <= now);
            if let Some(job) = at.and_then(|at| line.remove(at)) {
                self.running.insert(job.request.id, false);
                return Ok(job);
            }
        }
        Err(earliest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapped_file::ImageSource;

    fn request(id: &str, urgent: bool) -> TableRequest {
        TableRequest {
            id: id.parse().unwrap(),
            path: id.into(),
            source: ImageSource::Memory(Vec::new().into()),
            urgent,
        }
    }

    /// What a worker takes at `now`.
    #[track_caller]
    fn check(waiting: &mut Waiting, only_urgent: bool, now: Instant, expect: Option<&str>) -> Option<Job> {
        let job = waiting.take(only_urgent, now).ok();
        assert_eq!(job.as_ref().map(|job| &*job.request.path), expect);
        job
    }

    #[test]
    fn what_failed_lets_others_pass_and_comes_again() {
        let (mut waiting, now) = (Waiting::default(), Instant::now());
        assert!(waiting.request(request("aaaa", true), now));
        assert!(waiting.request(request("bbbb", true), now));
        assert!(!waiting.request(request("aaaa", true), now), "queued already");
        let job = check(&mut waiting, true, now, Some("aaaa")).unwrap();
        assert!(!waiting.request(request("aaaa", true), now), "under way");
        let due = now + Duration::from_secs(1);
        assert!(waiting.put_back(job, due));
        check(&mut waiting, true, now, Some("bbbb"));
        assert_eq!(waiting.take(true, now).unwrap_err(), Some(due));
        check(&mut waiting, true, due, Some("aaaa"));
        assert_eq!(waiting.take(true, due).unwrap_err(), None);
    }

    #[test]
    fn background_becomes_urgent_in_the_line_and_under_way() {
        let (mut waiting, now) = (Waiting::default(), Instant::now());
        waiting.request(request("aaaa", false), now);
        check(&mut waiting, true, now, None);
        waiting.request(request("aaaa", true), now);
        check(&mut waiting, true, now, Some("aaaa"));
        waiting.request(request("bbbb", false), now);
        let job = check(&mut waiting, false, now, Some("bbbb")).unwrap();
        waiting.request(request("bbbb", true), now);
        assert!(waiting.put_back(job, now));
        assert!(check(&mut waiting, true, now, Some("bbbb")).unwrap().request.urgent);
    }

    #[test]
    fn all_wait_for_a_service_that_is_away() {
        let (mut waiting, now) = (Waiting::default(), Instant::now());
        waiting.request(request("aaaa", true), now);
        waiting.request(request("bbbb", false), now);
        assert!(waiting.service_away(now));
        assert!(!waiting.service_away(now), "workers fail together");
        let mut due = now + FIRST_PAUSE;
        assert_eq!(waiting.take(false, now).unwrap_err(), Some(due));
        for _ in 0..10 {
            assert!(!waiting.service_away(due));
            let next = waiting.take(false, due).unwrap_err().unwrap();
            assert!(next - due <= LONGEST_PAUSE && next > due);
            due = next;
        }
        check(&mut waiting, false, due, Some("aaaa"));
    }
}
