//! How does an image get its table?
//!
//! ```text
//! disk cache -> table
//! GET unwind -> 200 table
//!            -> 202 being made: ask again
//!            -> 404 image unknown: send its skeleton, ask again
//!            -> anything else the service means: there is none, with its reason
//! ```
//! Agents that compile at the first mapping stall, and load what nobody runs; here nothing is asked for
//! before a sample touches it, and what samples wait for goes first. Requests run on the agent's own
//! runtime; results come back through a bounded channel, so that tables wait on disk or in the network
//! rather than in memory. A network that fails is asked again, without end and without hurry, and never
//! holds up sampling; a service that fails for one image holds up no other (`table_queue`).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::{Semaphore, SemaphorePermit, mpsc};
use tokio::time::Instant;
use windlass_schema::{BuildId, TableFile};

use crate::alarm::Alarm;
use crate::mapped_file::{FileKey, ImageSource};
use crate::packed_skeleton::{MAX_PACKED_BYTES, PackedSkeleton, packed_skeleton};
use crate::service::{Service, ServiceError, TableAnswer};
use crate::table_cache::TableCache;
use crate::table_queue::{Job, Queue};
use crate::table_refresh::Refresh;

/// Requests under way for images that samples wait for.
const URGENT_WORKERS: usize = 6;
/// Requests under way for anything: images that a sampled process maps and may run into.
const WORKERS: usize = 2;
/// Pause between two requests for a table that is being made: a tenth of the two seconds within which
/// walks are to start.
const FIRST_POLL: Duration = Duration::from_millis(200);
/// Longest pause between them: one that takes long may be noticed late in proportion.
const LONGEST_POLL: Duration = Duration::from_secs(1);
/// A table is asked for again when it has been made for another of so many parts of its time.
const POLL_PARTS: u32 = 8;
/// How long a table may take to be made: librustc_driver, 1.1 million rows, takes seconds.
const MAKING_LIMIT: Duration = Duration::from_secs(300);
/// First pause after the service failed for an image; it doubles up to [`LONGEST_BACK_OFF`].
const FIRST_BACK_OFF: Duration = Duration::from_millis(200);
/// Longest pause after the service failed for an image: a thousand such images are a hundred requests
/// a second, and what was mended is noticed while somebody still looks.
const LONGEST_BACK_OFF: Duration = Duration::from_secs(10);
/// Failures in a row for one image before the log says so, within 0.6 s: a service that restarts
/// behind a proxy fails once or twice for many.
const FAILURES_TO_WARN: u32 = 3;
/// Skeletons that are made at once: each image is looked at in memory of its own ([`crate::image_file`]).
const SKELETONS_MADE: usize = 1;
/// KiB of skeletons in memory at once, made or on their way: the largest one, or many small ones.
const SKELETONS_KIB: u32 = (MAX_PACKED_BYTES / 1024) as u32;
/// Most files remembered because their skeletons were refused, some 100 KiB. At the limit all are forgotten.
const MAX_REFUSED: usize = 1000;
/// Results that wait for the agent's loop.
const RESULTS: usize = 4;

/// A wish for the table of an image.
#[derive(Clone, Debug)]
pub struct TableRequest {
    /// The image.
    pub id: BuildId,
    /// Its path, for messages.
    pub path: Arc<str>,
    /// Where to read it, should the service not know it.
    pub source: ImageSource,
    /// Whether samples wait for it.
    pub urgent: bool,
}

/// What came of a request.
#[derive(Clone, Debug)]
pub struct TableResult {
    /// The image.
    pub id: BuildId,
    /// Its path.
    pub path: Arc<str>,
    /// What there is.
    pub outcome: TableOutcome,
}

/// What there is of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TableOutcome {
    /// Its bytes, checked.
    Table(TableFile),
    /// Those of another one, checked, where there is one already.
    Newer(TableFile),
    /// Nothing, and why.
    Unavailable(String),
    /// The image could not be read any more when the service wanted it.
    ImageGone(String),
}

/// The queue of wishes and what works on it.
pub struct Tables {
    queue: Arc<Queue>,
    results: mpsc::Receiver<TableResult>,
}

impl Tables {
    /// Starts the workers on `runtime`. Tables that are here for `refresh_after` are asked for again. With each result, `alarm`
    /// rings.
    pub fn start(
        runtime: &tokio::runtime::Handle,
        service: &Service,
        cache: TableCache,
        refresh_after: Duration,
        alarm: Alarm,
    ) -> Self {
        let queue = Arc::new(Queue::default());
        let (sender, results) = mpsc::channel(RESULTS);
        let sender = Results { sender, alarm };
        let skeletons = Skeletons::default();
        let (cache, refresh) = (Arc::new(cache), Arc::new(Refresh::new(refresh_after)));
        runtime.spawn(refresh.clone().run(service.clone(), cache.clone(), sender.clone()));
        let source = Arc::new(TableSource { service: service.clone(), cache, refresh, skeletons });
        for worker in 0..URGENT_WORKERS + WORKERS {
            let only_urgent = worker < URGENT_WORKERS;
            runtime.spawn(work(queue.clone(), source.clone(), sender.clone(), only_urgent));
        }
        Self { queue, results }
    }

    /// Queues a wish. One that is queued or under way is not repeated, but may become urgent.
    pub fn request(&self, request: TableRequest) {
        self.queue.request(request);
    }

    /// A result, if one is there.
    pub fn try_result(&mut self) -> Option<TableResult> {
        self.results.try_recv().ok()
    }
}

/// Takes results to the agent's loop.
#[derive(Clone)]
pub(crate) struct Results {
    sender: mpsc::Sender<TableResult>,
    alarm: Alarm,
}

impl Results {
    /// Hands a result over when there is room; false if nobody takes them any more.
    pub(crate) async fn send(&self, result: TableResult) -> bool {
        let taken = self.sender.send(result).await.is_ok();
        self.alarm.ring();
        taken
    }

    /// Whether nobody takes them any more.
    pub(crate) fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }
}

async fn work(queue: Arc<Queue>, source: Arc<TableSource>, results: Results, only_urgent: bool) {
    loop {
        let mut job = queue.next(only_urgent).await;
        let attempt = source.attempt(&mut job).await;
        let now = Instant::now();
        if let Attempt::Failed(error @ ServiceError::Unreachable(_)) = &attempt {
            if queue.service_away() {
                tracing::warn!(
                    %error,
                    "unwind tables wait for the service: check that it runs and that its address is right"
                );
            }
            job.making_since = None;
            queue.put_back(job, now);
            continue;
        }
        // Answers from disk say nothing of the service.
        if !matches!(attempt, Attempt::Cached(_)) && queue.service_answered() {
            tracing::info!("the service can be reached again");
        }
        let outcome = match attempt {
            Attempt::Cached(table) => TableOutcome::Table(table),
            Attempt::Done(outcome) => outcome,
            Attempt::Making { pause } => {
                job.failures = 0;
                queue.put_back(job, now + pause);
                continue;
            }
            Attempt::Failed(error) => {
                let pause = back_off(&mut job, &error);
                queue.put_back(job, now + pause);
                continue;
            }
        };
        queue.finish(job.request.id);
        let result = TableResult { id: job.request.id, path: job.request.path, outcome };
        if !results.send(result).await {
            return;
        }
    }
}

/// Counts a failure of the service for one image, says so once, and returns the pause before the next try.
fn back_off(job: &mut Job, error: &ServiceError) -> Duration {
    job.failures = job.failures.saturating_add(1);
    tracing::debug!(%error, path = %job.request.path, id = %job.request.id, "unwind table not to be had yet");
    if job.failures == FAILURES_TO_WARN {
        tracing::warn!(
            %error, path = %job.request.path, id = %job.request.id,
            "the service fails for this image again and again, and stacks stop in it with table_pending; \
             it is asked every {LONGEST_BACK_OFF:?}: look for this build-ID in the log of windlassd"
        );
    }
    let doublings = (job.failures - 1).min(LONGEST_BACK_OFF.as_millis().ilog2());
    let pause = FIRST_BACK_OFF.saturating_mul(1 << doublings);
    error.retry_after().unwrap_or_default().max(pause).min(LONGEST_BACK_OFF)
}

/// What one try came to.
enum Attempt {
    /// The table, from disk.
    Cached(TableFile),
    /// What the service says.
    Done(TableOutcome),
    /// It is being made.
    Making {
        /// When to ask again.
        pause: Duration,
    },
    /// To be tried again.
    Failed(ServiceError),
}

/// Where tables come from.
struct TableSource {
    service: Service,
    cache: Arc<TableCache>,
    refresh: Arc<Refresh>,
    skeletons: Skeletons,
}

impl TableSource {
    async fn attempt(&self, job: &mut Job) -> Attempt {
        let id = job.request.id;
        let cached = move |cache: &TableCache| {
            let asked = cache.validator(id).and_then(|validator| validator.asked);
            Some((cache.get(id)?, asked))
        };
        if let Ok(Some((table, asked))) = self.with_cache(cached).await {
            self.refresh.watch(id, asked, Instant::now());
            return Attempt::Cached(table);
        }
        let unavailable = |reason: String| Attempt::Done(TableOutcome::Unavailable(reason));
        loop {
            match self.service.table(id, None).await {
                Ok(TableAnswer::Unchanged) => {
                    return unavailable("the service sent no table, though none was named".to_owned());
                }
                Ok(TableAnswer::Table { sent, tag }) => {
                    return match self.with_cache(move |cache| cache.put(id, &sent, tag.as_deref())).await {
                        Ok(Ok(table)) => {
                            self.refresh.watch(id, Some(SystemTime::now()), Instant::now());
                            Attempt::Done(TableOutcome::Table(table))
                        }
                        Ok(Err(error)) => unavailable(format!("the service sent no usable table: {error}")),
                        Err(error) => unavailable(error.to_string()),
                    };
                }
                Ok(TableAnswer::Making { .. }) => {
                    let made_for = job.making_since.get_or_insert_with(Instant::now).elapsed();
                    if made_for > MAKING_LIMIT {
                        return unavailable(format!("not made within {MAKING_LIMIT:?}"));
                    }
                    return Attempt::Making {
                        pause: (made_for / POLL_PARTS).clamp(FIRST_POLL, LONGEST_POLL),
                    };
                }
                Ok(TableAnswer::UnknownImage) if job.skeleton_sent => {
                    return unavailable("the service does not know the image it was sent".to_owned());
                }
                Ok(TableAnswer::UnknownImage) => match self.send_skeleton(&job.request).await {
                    Ok(()) => job.skeleton_sent = true,
                    Err(SendError::Service(error)) if error.is_transient() => return Attempt::Failed(error),
                    Err(SendError::Service(error)) => return unavailable(error.to_string()),
                    Err(SendError::Image(reason)) => return unavailable(reason),
                    Err(SendError::Gone(reason)) => return Attempt::Done(TableOutcome::ImageGone(reason)),
                },
                Err(error) if error.is_transient() => return Attempt::Failed(error),
                Err(error) => return unavailable(error.to_string()),
            }
        }
    }

    /// Calls `work` where it may take its time: a large table takes tens of milliseconds to unpack.
    async fn with_cache<T: Send + 'static>(
        &self,
        work: impl FnOnce(&TableCache) -> T + Send + 'static,
    ) -> Result<T, tokio::task::JoinError> {
        let cache = self.cache.clone();
        tokio::task::spawn_blocking(move || work(&cache)).await
    }

    async fn send_skeleton(&self, request: &TableRequest) -> Result<(), SendError> {
        let (skeleton, _held) = self.skeletons.make(&request.source).await?;
        tracing::debug!(path = %request.path, id = %request.id, bytes = skeleton.zstd.len(), "sending skeleton");
        Ok(self.service.put_skeleton(request.id, skeleton).await?)
    }
}

/// Makes skeletons, few enough at once.
struct Skeletons {
    making: Semaphore,
    held_kib: Semaphore,
    /// The files of which there is none, and why: what would be found again.
    refused: Mutex<HashMap<FileKey, String>>,
}

impl Default for Skeletons {
    fn default() -> Self {
        Self {
            making: Semaphore::new(SKELETONS_MADE),
            held_kib: Semaphore::new(SKELETONS_KIB as usize),
            refused: Mutex::default(),
        }
    }
}

impl Skeletons {
    /// The skeleton of an image, and its share of the memory for skeletons, for as long as it is there.
    async fn make(
        &self,
        source: &ImageSource,
    ) -> Result<(PackedSkeleton, Option<SemaphorePermit<'_>>), SendError> {
        let key = source.key();
        let known = key.and_then(|key| self.refused().get(&key).cloned());
        if let Some(reason) = known {
            return Err(SendError::Image(reason));
        }
        // No skeleton has more than its image, about. Never closed; were they, there would merely be no limit.
        let most_kib = (source.bytes() / 1024 + 1).min(SKELETONS_KIB.into()) as u32;
        let mut held = self.held_kib.acquire_many(most_kib).await.ok();
        let making = self.making.acquire().await;
        let source = source.clone();
        let make = move || {
            let is_vdso = matches!(source, ImageSource::Memory(_));
            source.read(|image| packed_skeleton(image, is_vdso))
        };
        let made =
            tokio::task::spawn_blocking(make).await.map_err(|error| SendError::Image(error.to_string()))?;
        drop(making);
        let made = made.map_err(|error| SendError::Gone(error.to_string()))?;
        let skeleton = made.map_err(|error| {
            if let (Some(key), true) = (key, error.is_of_size()) {
                self.refuse(key, error.to_string());
            }
            SendError::Image(error.to_string())
        })?;
        let spare_kib = (most_kib as usize).saturating_sub(skeleton.zstd.len() / 1024 + 1);
        drop(held.as_mut().and_then(|held| held.split(spare_kib)));
        Ok((skeleton, held))
    }

    fn refused(&self) -> MutexGuard<'_, HashMap<FileKey, String>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refuse(&self, key: FileKey, reason: String) {
        let mut refused = self.refused();
        if refused.len() >= MAX_REFUSED {
            refused.clear();
        }
        refused.insert(key, reason);
    }
}

/// A skeleton did not reach the service.
#[derive(Debug, thiserror::Error)]
enum SendError {
    #[error(transparent)]
    Service(#[from] ServiceError),
    #[error("{0}")]
    Image(String),
    #[error("{0}")]
    Gone(String),
}
