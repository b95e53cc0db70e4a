//! How do batches reach the service, in order, without holding up sampling?
//!
//! A batch goes out as it comes while the service answers. When it does not, the batch and all that
//! follow go to the spool, and the spool is sent from its front once the service is back: nothing
//! overtakes. What the service refuses for good is dropped, for a batch that is sent forever blocks
//! those behind it. Every batch that is lost is counted.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};

use crate::metrics::Metrics;
use crate::service::Service;
use crate::spool::{EncodedBatch, Spool};

/// Most bytes of spooled batches: a day of a busy 32-core host at 19 Hz (1.5 KiB/s compressed).
pub const SPOOL_BUDGET_BYTES: u64 = 128 * 1024 * 1024;
/// Batches that wait for a request under way; at five seconds each, twice the longest answer.
const WAITING_BATCHES: usize = 16;
/// First pause after the service failed; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Longest pause after the service failed.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
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
}

impl Line {
    async fn run(mut self, mut queue: mpsc::Receiver<EncodedBatch>) -> Shipped {
        loop {
            self.count();
            tokio::select! {
                batch = queue.recv() => match batch {
                    Some(batch) => self.take(batch).await,
                    None => break,
                },
                () = sleep_until(self.retry_at), if !self.spool.is_empty() => {
                    self.send_oldest().await;
                }
            }
        }
        let flush = async { while !self.spool.is_empty() && self.send_oldest().await {} };
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
        if self.spool.is_empty() && self.send(batch.clone()).await {
            return;
        }
        match self.spool.push(&batch) {
            Ok(dropped) => self.shipped.dropped += dropped,
            Err(error) => {
                tracing::warn!(%error, "batch cannot be spooled and is lost");
                self.shipped.dropped += 1;
            }
        }
    }

    /// Sends the oldest spooled batch. False if the service is still away.
    async fn send_oldest(&mut self) -> bool {
        let batch = match self.spool.front() {
            None => return true,
            Some(Ok(batch)) => batch,
            Some(Err(error)) => {
                tracing::warn!(%error, "spooled batch cannot be read and is lost");
                self.shipped.dropped += 1;
                self.spool.pop();
                return true;
            }
        };
        let sent = self.send(batch).await;
        if sent {
            self.spool.pop();
        }
        sent
    }

    /// Sends a batch. False if it is to be sent again later.
    async fn send(&mut self, batch: EncodedBatch) -> bool {
        match self.service.ship(batch).await {
            Ok(()) => {
                self.shipped.sent += 1;
                self.pause = FIRST_PAUSE;
                if std::mem::take(&mut self.is_late) {
                    tracing::info!(waiting = self.spool.len(), "the service takes profiles again");
                }
                true
            }
            Err(error) if error.is_for_later() => {
                // Once for each time that the service is away, which may be a day.
                if !std::mem::replace(&mut self.is_late, true) {
                    tracing::warn!(%error, "profiles are kept on disk until the service takes them");
                }
                tracing::debug!(%error, waiting = self.spool.len(), "batch is kept for later");
                self.retry_at = Instant::now() + error.retry_after().unwrap_or(self.pause).min(LONGEST_PAUSE);
                self.pause = (self.pause * 2).min(LONGEST_PAUSE);
                false
            }
            Err(error) => {
                tracing::error!(%error, "batch is lost");
                self.shipped.dropped += 1;
                true
            }
        }
    }
}
