//! How do names that only this host knows reach the service?
//!
//! Those are of just-in-time compiled functions and of kernel modules. Each list is sent once, under its ID, in a task of
//! its own, so that no sample waits for it. While the service is away, lists wait in memory up to a bound, and beyond it
//! functions stay without a name: what is spooled for a day are addresses, whose names most likely were sent before. A list
//! that the service fails for again and again goes behind the others, and is given up at last.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use windlass_schema::BuildId;
use windlass_schema::http::ArtefactKind;
use windlass_schema::perf_map::MAX_PERF_MAP_BYTES;

use crate::kernel_modules::LoadedModule;
use crate::service::{Service, ServiceError};

/// Most bytes of lists that wait: two of the largest, or a thousand usual ones.
const WAITING_BYTES: usize = 2 * MAX_PERF_MAP_BYTES;
/// Most lists that wait.
const WAITING_LISTS: usize = 1024;
/// First pause after the service failed; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Longest pause after the service failed.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// How often the service may fail for a list, with an answer, before it is given up: with the pauses, a minute and a half.
const MAX_FAILURES: u32 = 12;
/// How long the last lists may take when the agent stops.
const FLUSH_LIMIT: Duration = Duration::from_secs(5);

/// A list on its way.
enum Waiting {
    PerfMap {
        id: BuildId,
        content: Vec<u8>,
        _room: OwnedSemaphorePermit,
    },
    /// Its symbols are read when it is its turn, if the service lacks them.
    Module(LoadedModule),
}

/// Sends lists.
pub struct SymbolUpload {
    lists: mpsc::Sender<Waiting>,
    room: Arc<Semaphore>,
    task: JoinHandle<()>,
}

impl SymbolUpload {
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
        room.is_ok_and(|room| self.lists.try_send(Waiting::PerfMap { id, content, _room: room }).is_ok())
    }

    /// Queues the symbols of a kernel module; false if there is no room. Never waits.
    pub fn send_module(&self, module: LoadedModule) -> bool {
        self.lists.try_send(Waiting::Module(module)).is_ok()
    }

    /// Sends what can be sent in a short time, and ends.
    pub async fn finish(self) {
        drop(self.lists);
        if timeout(FLUSH_LIMIT, self.task).await.is_err() {
            tracing::warn!("the last names of this host's code were not sent");
        }
    }
}

async fn run(service: Service, mut queue: mpsc::Receiver<Waiting>) {
    let mut pause = FIRST_PAUSE;
    // Those that failed, and how often, behind those that were not tried.
    let mut failed: VecDeque<(Waiting, u32)> = VecDeque::new();
    loop {
        let untried = match failed.is_empty() {
            true => queue.recv().await,
            false => queue.try_recv().ok(),
        };
        let next = untried.map(|list| (list, 0)).or_else(|| failed.pop_front());
        let Some((list, failures)) = next else { return };
        let error = match send(&service, &list).await {
            Ok(()) => {
                pause = FIRST_PAUSE;
                continue;
            }
            Err(error) => error,
        };
        if !error.is_for_later() && !error.is_of_service() || failures == MAX_FAILURES {
            tracing::warn!(%error, "names of this host's code were not taken");
            continue;
        }
        if failed.len() < WAITING_LISTS {
            // Only what the service says of this list counts against it.
            failed.push_back((list, failures + u32::from(error.is_of_service())));
        }
        tokio::time::sleep(error.retry_after().unwrap_or(pause).min(LONGEST_PAUSE)).await;
        pause = (2 * pause).min(LONGEST_PAUSE);
    }
}

async fn send(service: &Service, list: &Waiting) -> Result<(), ServiceError> {
    match list {
        Waiting::PerfMap { id, content, .. } => {
            service.put(*id, ArtefactKind::PerfMap, content.clone()).await
        }
        Waiting::Module(module) => {
            let id = module.build_id();
            if !service.lacks(id, ArtefactKind::Kallsyms).await? {
                return Ok(());
            }
            let module = module.clone();
            let symbols = tokio::task::spawn_blocking(move || module.symbols()).await;
            let symbols = symbols.map_err(|error| ServiceError::Client(error.to_string()))?;
            let symbols = symbols.map_err(|error| ServiceError::Client(error.to_string()))?;
            match symbols {
                Some(symbols) if !symbols.is_empty() => {
                    service.put(id, ArtefactKind::Kallsyms, symbols).await
                }
                _ => Ok(()),
            }
        }
    }
}
