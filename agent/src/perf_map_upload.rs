//! How do the names of just-in-time compiled functions reach the service?
//!
//! Each list is sent once, under its ID, in a task of its own, so that no sample waits for it. While the service is away,
//! lists wait in memory up to a bound, and beyond it functions stay without a name: what is spooled for a day are
//! addresses, whose names most likely were sent before.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use windlass_schema::BuildId;
use windlass_schema::http::ArtefactKind;
use windlass_schema::perf_map::MAX_PERF_MAP_BYTES;

use crate::service::Service;

/// Most bytes of lists that wait: two of the largest, or a thousand usual ones.
const WAITING_BYTES: usize = 2 * MAX_PERF_MAP_BYTES;
/// Most lists that wait.
const WAITING_LISTS: usize = 1024;
/// First pause after the service failed; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Longest pause after the service failed.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// How long the last lists may take when the agent stops.
const FLUSH_LIMIT: Duration = Duration::from_secs(5);

/// A list on its way.
struct Waiting {
    id: BuildId,
    content: Vec<u8>,
    _room: OwnedSemaphorePermit,
}

/// Sends lists.
pub struct PerfMapUpload {
    lists: mpsc::Sender<Waiting>,
    room: Arc<Semaphore>,
    task: JoinHandle<()>,
}

impl PerfMapUpload {
    /// Starts on `runtime`.
    pub fn start(runtime: &tokio::runtime::Handle, service: Service) -> Self {
        let (lists, queue) = mpsc::channel(WAITING_LISTS);
        Self {
            lists,
            room: Arc::new(Semaphore::new(WAITING_BYTES)),
            task: runtime.spawn(run(service, queue)),
        }
    }

    /// Queues a list; false if there is no room. Never waits.
    pub fn send(&self, id: BuildId, content: Vec<u8>) -> bool {
        let bytes = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let room = Arc::clone(&self.room).try_acquire_many_owned(bytes);
        room.is_ok_and(|room| self.lists.try_send(Waiting { id, content, _room: room }).is_ok())
    }

    /// Sends what can be sent in a short time, and ends.
    pub async fn finish(self) {
        drop(self.lists);
        if timeout(FLUSH_LIMIT, self.task).await.is_err() {
            tracing::warn!("the last names of just-in-time compiled functions were not sent");
        }
    }
}

async fn run(service: Service, mut queue: mpsc::Receiver<Waiting>) {
    while let Some(list) = queue.recv().await {
        let mut pause = FIRST_PAUSE;
        loop {
            match service.put(list.id, ArtefactKind::PerfMap, list.content.clone()).await {
                Ok(()) => break,
                Err(error) if error.is_transient() => {
                    tokio::time::sleep(error.retry_after().unwrap_or(pause).min(LONGEST_PAUSE)).await;
                    pause = (2 * pause).min(LONGEST_PAUSE);
                }
                Err(error) => {
                    tracing::warn!(%error, "names of just-in-time compiled functions were not taken");
                    break;
                }
            }
        }
    }
}
