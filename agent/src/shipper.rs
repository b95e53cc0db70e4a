//! How do batches reach the service, in order, without holding up sampling?
//!
//! A batch goes out as it comes while the service answers. When it does not, the batch and all that
//! follow go to the spool, and the spool is sent from its front once the service is back: nothing
//! overtakes. What the service refuses for good is dropped, for a batch that is sent forever blocks
//! those behind it. So does one for which the service fails whenever it comes, or which something on the way does not let
//! through. That the service is away looks the same, until it takes another:
//!
//! ```text
//! oldest fails (for the fifth time) -> another, at once: fails -> pause, the oldest again
//!                                                        taken -> the oldest, at once: taken -> it was away
//!                                                                                      fails -> dropped
//! ```
//! Every batch that is lost is counted.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};

use crate::agent::DEFAULT_SHIP_INTERVAL;
use crate::metrics::Metrics;
use crate::otlp::MAX_BATCH_BYTES;
use crate::service::{Service, ServiceError, batch_timeout};
use crate::spool::{EncodedBatch, Spool};

/// Most bytes of spooled batches: a day of a busy 32-core host at 19 Hz (1.5 KiB/s compressed).
pub const SPOOL_BUDGET_BYTES: u64 = 128 * 1024 * 1024;
/// Batches that wait for a request under way.
const WAITING_BATCHES: usize = 16;
/// The largest batch may take as long as the others wait.
const _: () = assert!(
    batch_timeout(MAX_BATCH_BYTES).as_secs() <= WAITING_BATCHES as u64 * DEFAULT_SHIP_INTERVAL.as_secs()
);
/// First pause after the service failed; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Longest pause after the service failed.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Failures of the oldest batch in a row before another is tried: a service that restarts fails as often, within 4 s.
const FAILURES_TO_DOUBT: u32 = 5;
/// How long the last batches may take when the agent stops; what is left stays in the spool.
const FLUSH_LIMIT: Duration = Duration::from_secs(10);

/// What became of the batches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shipped {
    /// Taken by the service.
    pub sent: u64,
    /// Left in the spool for the next agent.
    pub spooled: u64,
    /// Lost: refused by the service, over the spool's limit, or not written to a full disk.
    pub dropped: u64,
}

/// Sends batches.
pub struct Shipper {
    batches: mpsc::Sender<EncodedBatch>,
    task: JoinHandle<Shipped>,
    not_queued: u64,
    metrics: Arc<Metrics>,
}

impl Shipper {
    /// Starts on `runtime`.
    pub fn start(
        runtime: &tokio::runtime::Handle,
        service: Service,
        spool: Spool,
        metrics: Arc<Metrics>,
    ) -> Self {
        let (batches, queue) = mpsc::channel(WAITING_BATCHES);
        let line = Line {
            service,
            spool,
            shipped: Shipped::default(),
            counted: Shipped::default(),
            metrics: metrics.clone(),
            pause: FIRST_PAUSE,
            retry_at: Instant::now(),
            is_late: false,
            next: Turn::Oldest,
            failures: 0,
            others_tried: 0,
        };
        Self { batches, task: runtime.spawn(line.run(queue)), not_queued: 0, metrics }
    }

    /// Queues a batch. Never waits.
    pub fn ship(&mut self, batch: EncodedBatch) {
        if self.batches.try_send(batch).is_err() {
            self.not_queued += 1;
            self.metrics.batch_dropped();
        }
    }

    /// Sends what can be sent and ends.
    pub async fn finish(self) -> Shipped {
        drop(self.batches);
        let mut shipped = self.task.await.unwrap_or_else(|error| {
            tracing::error!(%error, "shipping batches ended early");
            Shipped::default()
        });
        shipped.dropped += self.not_queued;
        shipped
    }
}

/// What the task holds.
struct Line {
    service: Service,
    spool: Spool,
    shipped: Shipped,
    /// What the metrics have of it.
    counted: Shipped,
    metrics: Arc<Metrics>,
    pause: Duration,
    retry_at: Instant,
    /// The service took no batch when it was last asked.
    is_late: bool,
    /// Which spooled batch is sent next.
    next: Turn,
    /// How often the oldest failed in a row although the service could be reached.
    failures: u32,
    /// How many others failed as well, so that not the same is tried each time.
    others_tried: usize,
}

/// Which spooled batch is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// The oldest.
    Oldest,
    /// Another, whether that is taken.
    Other,
    /// The oldest, after another was taken.
    Verdict,
}

/// What became of a batch that was sent.
enum Sent {
    Taken,
    /// For good.
    Refused,
    /// To be sent again.
    Failed(ServiceError),
}

impl Line {
    async fn run(mut self, mut queue: mpsc::Receiver<EncodedBatch>) -> Shipped {
        loop {
            self.count();
            tokio::select! {
                // What waits in the queue is spooled between two requests: each may take as long as the queue holds.
                biased;
                batch = queue.recv() => match batch {
                    Some(batch) => self.take(batch).await,
                    None => break,
                },
                () = sleep_until(self.retry_at), if !self.spool.is_empty() => {
                    self.send_spooled().await;
                }
            }
        }
        let flush = async { while !self.spool.is_empty() && self.send_spooled().await {} };
        let _ = timeout(FLUSH_LIMIT, flush).await;
        self.shipped.spooled = self.spool.len() as u64;
        self.shipped
    }

    /// Tells the metrics what changed.
    fn count(&mut self) {
        let since = Shipped {
            sent: self.shipped.sent - self.counted.sent,
            spooled: self.spool.len() as u64,
            dropped: self.shipped.dropped - self.counted.dropped,
        };
        self.metrics.shipped(since, self.spool.bytes());
        self.counted = self.shipped;
    }

    /// Sends a new batch, or spools it behind those that wait.
    async fn take(&mut self, batch: EncodedBatch) {
        if self.spool.is_empty() {
            self.forget_doubts();
            match self.send(batch.clone()).await {
                Sent::Taken | Sent::Refused => return,
                Sent::Failed(error) => {
                    self.failures = u32::from(!matches!(error, ServiceError::Unreachable(_)));
                    self.wait(&error);
                }
            }
        }
        match self.spool.push(&batch) {
            Ok(0) => {}
            Ok(dropped) => {
                self.shipped.dropped += dropped;
                // Another is the oldest now.
                self.forget_doubts();
            }
            Err(error) => {
                tracing::warn!(%error, "batch cannot be spooled and is lost");
                self.shipped.dropped += 1;
            }
        }
    }

    /// The oldest batch is one of which nothing is known.
    fn forget_doubts(&mut self) {
        self.next = Turn::Oldest;
        self.failures = 0;
    }

    /// Sends a spooled batch. False if the next has to wait.
    async fn send_spooled(&mut self) -> bool {
        let waiting = self.spool.len();
        let (turn, place) = match std::mem::replace(&mut self.next, Turn::Oldest) {
            Turn::Other if waiting > 1 => (Turn::Other, 1 + self.others_tried % (waiting - 1)),
            Turn::Verdict => (Turn::Verdict, 0),
            Turn::Oldest | Turn::Other => (Turn::Oldest, 0),
        };
        let sent = match self.spool.get(place) {
            None => return true,
            Some(Ok(batch)) => self.send(batch).await,
            Some(Err(error)) => {
                tracing::warn!(%error, "spooled batch cannot be read and is lost");
                self.shipped.dropped += 1;
                Sent::Refused
            }
        };
        match (turn, sent) {
            (turn, Sent::Failed(error)) => return self.failed(turn, waiting, &error),
            (Turn::Oldest | Turn::Verdict, Sent::Taken | Sent::Refused) => self.forget_doubts(),
            (Turn::Other, Sent::Taken) => {
                self.next = Turn::Verdict;
                self.retry_at = Instant::now();
            }
            (Turn::Other, Sent::Refused) => {}
        }
        self.spool.remove(place);
        true
    }

    /// A spooled batch failed, one of so many. False if the next has to wait.
    fn failed(&mut self, turn: Turn, waiting: usize, error: &ServiceError) -> bool {
        // That nobody is there says nothing of a batch.
        let is_answered = !matches!(error, ServiceError::Unreachable(_));
        match turn {
            Turn::Oldest if is_answered => {
                self.failures += 1;
                if self.failures >= FAILURES_TO_DOUBT && waiting > 1 {
                    self.next = Turn::Other;
                    self.retry_at = Instant::now();
                    return true;
                }
            }
            Turn::Verdict if is_answered => {
                tracing::error!(%error, "batch is lost: the service takes others, but fails for this one again and again");
                self.spool.remove(0);
                self.shipped.dropped += 1;
                self.forget_doubts();
                self.retry_at = Instant::now();
                return true;
            }
            Turn::Oldest | Turn::Verdict => self.failures = 0,
            Turn::Other => self.others_tried += 1,
        }
        self.wait(error);
        false
    }

    /// The service is left alone for a while.
    fn wait(&mut self, error: &ServiceError) {
        // Once for each time that the service is away, which may be a day.
        if !std::mem::replace(&mut self.is_late, true) {
            tracing::warn!(%error, "profiles are kept on disk until the service takes them");
        }
        tracing::debug!(%error, waiting = self.spool.len(), "batch is kept for later");
        self.retry_at = Instant::now() + error.retry_after().unwrap_or(self.pause).min(LONGEST_PAUSE);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }

    /// Sends a batch.
    async fn send(&mut self, batch: EncodedBatch) -> Sent {
        match self.service.ship(batch).await {
            Ok(()) => {
                self.shipped.sent += 1;
                self.pause = FIRST_PAUSE;
                if std::mem::take(&mut self.is_late) {
                    tracing::info!(waiting = self.spool.len(), "the service takes profiles again");
                }
                Sent::Taken
            }
            Err(error) if error.is_for_later() => Sent::Failed(error),
            Err(error) => {
                tracing::error!(%error, "batch is lost");
                self.shipped.dropped += 1;
                Sent::Refused
            }
        }
    }
}
