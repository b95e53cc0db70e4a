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
//! holds up sampling.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::time::{Instant, sleep};
use windlass_schema::BuildId;
use windlass_schema::http::ArtefactKind;

use crate::mapped_file::ImageSource;
use crate::service::{Service, ServiceError, TableAnswer};
use crate::skeleton::skeleton;
use crate::table_cache::{TableCache, check};

/// Requests under way for images that samples wait for.
const URGENT_WORKERS: usize = 6;
/// Requests under way for anything: images that a sampled process maps and may run into.
const WORKERS: usize = 2;
/// Longest pause between two requests for a table that is being made: a tenth of the two seconds
/// within which walks are to start.
const LONGEST_POLL: Duration = Duration::from_millis(200);
/// Shortest pause, whatever the service says.
const SHORTEST_POLL: Duration = Duration::from_millis(50);
/// How long a table may take to be made: librustc_driver, 1.1 million rows, takes seconds.
const MAKING_LIMIT: Duration = Duration::from_secs(300);
/// First pause after the network failed; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// Longest pause after the network failed. Walks start within two seconds of its return.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Skeletons in memory at once: the largest have tens of megabytes, and a small one must not wait long.
const SKELETONS: usize = 2;
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
    Table(Vec<u8>),
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

#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    urgent_came: Notify,
    any_came: Notify,
}

#[derive(Default)]
struct Waiting {
    urgent: VecDeque<TableRequest>,
    background: VecDeque<TableRequest>,
    running: Vec<BuildId>,
}

impl Tables {
    /// Starts the workers on `runtime`.
    pub fn start(runtime: &tokio::runtime::Handle, service: &Service, cache: TableCache) -> Self {
        let queue = Arc::new(Queue::default());
        let (sender, results) = mpsc::channel(RESULTS);
        let skeletons = Semaphore::new(SKELETONS);
        let source = Arc::new(TableSource { service: service.clone(), cache, skeletons });
        for worker in 0..URGENT_WORKERS + WORKERS {
            let only_urgent = worker < URGENT_WORKERS;
            runtime.spawn(work(queue.clone(), source.clone(), sender.clone(), only_urgent));
        }
        Self { queue, results }
    }

    /// Queues a wish. One that is queued or under way is not repeated, but may become urgent.
    pub fn request(&self, request: TableRequest) {
        let mut waiting = self.queue.lock();
        if waiting.running.contains(&request.id) || waiting.urgent.iter().any(|other| other.id == request.id)
        {
            return;
        }
        if request.urgent {
            waiting.background.retain(|other| other.id != request.id);
            waiting.urgent.push_back(request);
            drop(waiting);
            self.queue.urgent_came.notify_one();
        } else {
            if waiting.background.iter().all(|other| other.id != request.id) {
                waiting.background.push_back(request);
            }
            drop(waiting);
        }
        self.queue.any_came.notify_one();
    }

    /// A result, if one is there.
    pub fn try_result(&mut self) -> Option<TableResult> {
        self.results.try_recv().ok()
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next request for a worker.
    async fn next(&self, only_urgent: bool) -> TableRequest {
        loop {
            let came = if only_urgent { &self.urgent_came } else { &self.any_came };
            let mut came = std::pin::pin!(came.notified());
            // Registered before the look into the queue, so that nothing comes unnoticed in between.
            came.as_mut().enable();
            {
                let mut waiting = self.lock();
                let request = waiting
                    .urgent
                    .pop_front()
                    .or_else(|| if only_urgent { None } else { waiting.background.pop_front() });
                if let Some(request) = request {
                    waiting.running.push(request.id);
                    return request;
                }
            }
            came.await;
        }
    }
}

async fn work(
    queue: Arc<Queue>,
    source: Arc<TableSource>,
    results: mpsc::Sender<TableResult>,
    only_urgent: bool,
) {
    loop {
        let request = queue.next(only_urgent).await;
        let outcome = source.obtain(&request).await;
        queue.lock().running.retain(|id| *id != request.id);
        let result = TableResult { id: request.id, path: request.path, outcome };
        if results.send(result).await.is_err() {
            return;
        }
    }
}

/// Where tables come from.
struct TableSource {
    service: Service,
    cache: TableCache,
    skeletons: Semaphore,
}

impl TableSource {
    async fn obtain(&self, request: &TableRequest) -> TableOutcome {
        if let Some(table) = self.cache.get(request.id) {
            return TableOutcome::Table(table);
        }
        let started = Instant::now();
        let (mut pause, mut skeleton_sent) = (FIRST_PAUSE, false);
        loop {
            match self.service.table(request.id).await {
                Ok(TableAnswer::Table(table)) => return self.take(request.id, table),
                Ok(TableAnswer::Making { .. }) if started.elapsed() > MAKING_LIMIT => {
                    return TableOutcome::Unavailable(format!("not made within {MAKING_LIMIT:?}"));
                }
                Ok(TableAnswer::Making { retry_after }) => {
                    sleep(retry_after.unwrap_or(LONGEST_POLL).clamp(SHORTEST_POLL, LONGEST_POLL)).await;
                }
                Ok(TableAnswer::UnknownImage) if skeleton_sent => {
                    return TableOutcome::Unavailable(
                        "the service does not know the image it was sent".to_owned(),
                    );
                }
                Ok(TableAnswer::UnknownImage) => match self.send_skeleton(request).await {
                    Ok(()) => skeleton_sent = true,
                    Err(SendError::Service(error)) if error.is_transient() => {
                        self.rest(&error, &mut pause).await;
                    }
                    Err(SendError::Service(error)) => return TableOutcome::Unavailable(error.to_string()),
                    Err(SendError::Image(reason)) => return TableOutcome::Unavailable(reason),
                    Err(SendError::Gone(reason)) => return TableOutcome::ImageGone(reason),
                },
                Err(error) if error.is_transient() => self.rest(&error, &mut pause).await,
                Err(error) => return TableOutcome::Unavailable(error.to_string()),
            }
        }
    }

    /// Waits before the next try.
    async fn rest(&self, error: &ServiceError, pause: &mut Duration) {
        tracing::debug!(%error, "unwind table not to be had yet");
        sleep(error.retry_after().map_or(*pause, |wanted| wanted.min(LONGEST_PAUSE))).await;
        *pause = (*pause * 2).min(LONGEST_PAUSE);
    }

    fn take(&self, id: BuildId, table: Vec<u8>) -> TableOutcome {
        if let Err(error) = check(&table, id) {
            return TableOutcome::Unavailable(format!("the service sent no usable table: {error}"));
        }
        if let Err(error) = self.cache.put(id, &table) {
            tracing::warn!(%error, "unwind table is not kept on disk");
        }
        TableOutcome::Table(table)
    }

    async fn send_skeleton(&self, request: &TableRequest) -> Result<(), SendError> {
        // Never closed; were it, there would merely be no limit.
        let _permit = self.skeletons.acquire().await;
        let source = request.source.clone();
        let made = tokio::task::spawn_blocking(move || source.read(|image| skeleton(image)))
            .await
            .map_err(|error| SendError::Image(error.to_string()))?;
        let skeleton = made
            .map_err(|error| SendError::Gone(error.to_string()))?
            .map_err(|error| SendError::Image(error.to_string()))?;
        tracing::info!(path = %request.path, id = %request.id, bytes = skeleton.len(), "sending skeleton");
        Ok(self.service.put(request.id, ArtefactKind::Skeleton, skeleton).await?)
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
