//! Is a table that is here still the one that the service would send?
//!
//! A table is not final: a newer compiler knows more rows, and a whole executable may arrive where a skeleton was before. Its
//! build-ID stays the same, and so a table in the disk cache would be used for ever. It is used at once, and once it was not
//! asked for in a while, it is asked for again in the background, with its validator (RFC 9110, 13.1.2): unchanged, that costs
//! a 304. One table after the other, with a pause between them and each at a time of its own, so that a fleet that was started
//! at once does not ask at once. What comes is checked as any table is before it replaces what was there; if it does not
//! pass, or the service is away, the old one stays: it is as right as it was.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet};
use std::hash::{BuildHasher as _, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::time::{Instant, sleep};
use windlass_schema::BuildId;

use crate::service::{Service, TableAnswer};
use crate::table_cache::TableCache;
use crate::tables::{Results, TableOutcome, TableResult};

/// How long a table counts without being asked for, unless said otherwise; by table up to a quarter more or less. Ten
/// thousand tables are then a request every two seconds.
pub(crate) const DEFAULT_REFRESH_AFTER: Duration = Duration::from_secs(6 * 3600);
/// Pause between two requests.
const PAUSE: Duration = Duration::from_secs(1);
/// Longest sleep: within it a table that comes from disk and is due already is noticed.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);

/// The tables that are here, and when each is asked for again.
pub(crate) struct Refresh {
    after: Duration,
    jitter: RandomState,
    watched: Mutex<Watched>,
}

#[derive(Default)]
struct Watched {
    ids: HashSet<BuildId>,
    due: BinaryHeap<Reverse<(Instant, BuildId)>>,
}

/// What there is of a watched table at its time.
enum Next {
    Due(BuildId),
    Sleep(Duration),
}

impl Refresh {
    pub(crate) fn new(after: Duration) -> Self {
        Self { after, jitter: RandomState::new(), watched: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long the table of `id` counts: three to five quarters of the time, by a hash that is this agent's own.
    fn lifetime(&self, id: BuildId) -> Duration {
        let sixteenths = 12 + (self.jitter.hash_one(id) % 9) as u32;
        self.after * sixteenths / 16
    }

    /// A table is in use that the service was asked for at `asked`, if that is known.
    pub(crate) fn watch(&self, id: BuildId, asked: Option<SystemTime>, now: Instant) {
        let lifetime = self.lifetime(id);
        // Of a clock that was set back nothing can be told, and so of one that was never asked for.
        let age = asked.and_then(|asked| asked.elapsed().ok()).unwrap_or(lifetime);
        let mut watched = self.lock();
        if watched.ids.insert(id) {
            watched.due.push(Reverse((now + lifetime.saturating_sub(age), id)));
        }
    }

    fn again(&self, id: BuildId) {
        let due = Instant::now() + self.lifetime(id);
        self.lock().due.push(Reverse((due, id)));
    }

    fn forget(&self, id: BuildId) {
        self.lock().ids.remove(&id);
    }

    fn next(&self, now: Instant) -> Next {
        let mut watched = self.lock();
        match watched.due.peek() {
            Some(Reverse((due, id))) if *due <= now => {
                let id = *id;
                watched.due.pop();
                Next::Due(id)
            }
            Some(Reverse((due, _))) => Next::Sleep(due.duration_since(now).min(LONGEST_SLEEP)),
            None => Next::Sleep(LONGEST_SLEEP),
        }
    }

    /// Asks for tables as they are due, until nobody takes results any more.
    pub(crate) async fn run(self: Arc<Self>, service: Service, cache: Arc<TableCache>, results: Results) {
        loop {
            match self.next(Instant::now()) {
                Next::Sleep(pause) => sleep(pause.min(self.after)).await,
                Next::Due(id) => {
                    let newer = self.ask(id, &service, &cache).await;
                    if let Some(outcome) = newer {
                        let result = TableResult { id, path: id.to_string().into(), outcome };
                        if !results.send(result).await {
                            return;
                        }
                    }
                    sleep(PAUSE.min(self.after)).await;
                }
            }
            if results.is_closed() {
                return;
            }
        }
    }

    /// Asks for one table. What is newer, if it is.
    async fn ask(&self, id: BuildId, service: &Service, cache: &Arc<TableCache>) -> Option<TableOutcome> {
        let Some(validator) = on_disk(cache, move |cache| cache.validator(id)).await.flatten() else {
            // Evicted: what comes next of it comes from the service.
            self.forget(id);
            return None;
        };
        self.again(id);
        match service.table(id, validator.tag.as_deref()).await {
            Ok(TableAnswer::Unchanged) => {
                on_disk(cache, move |cache| cache.confirm(id)).await;
                None
            }
            Ok(TableAnswer::Table { sent, tag }) => {
                let replaced = on_disk(cache, move |cache| cache.replace(id, &sent, tag.as_deref())).await?;
                match replaced {
                    Ok(None) => None,
                    Ok(Some(table)) => {
                        tracing::info!(%id, "the service has another unwind table of this image");
                        Some(TableOutcome::Newer(table))
                    }
                    Err(error) => {
                        tracing::warn!(%id, %error, "the service sent no usable table, the one that is here stays");
                        None
                    }
                }
            }
            // Being made, or forgotten by the service: it may have it the next time.
            Ok(TableAnswer::Making { .. } | TableAnswer::UnknownImage) => None,
            Err(error) => {
                tracing::debug!(%id, %error, "unwind table is not compared with that of the service");
                None
            }
        }
    }
}

/// Calls `work` where it may take its time.
async fn on_disk<T: Send + 'static>(
    cache: &Arc<TableCache>,
    work: impl FnOnce(&TableCache) -> T + Send + 'static,
) -> Option<T> {
    let cache = cache.clone();
    tokio::task::spawn_blocking(move || work(&cache)).await.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_table_is_due_at_a_time_of_its_own() {
        let now = Instant::now();
        let hour = Duration::from_secs(3600);
        let refresh = Refresh::new(8 * hour);
        let id = |number: u16| BuildId::new(&number.to_be_bytes()).unwrap();
        for number in 0..100 {
            refresh.watch(id(number), Some(SystemTime::now()), now);
            refresh.watch(id(number), None, now);
        }
        assert!(matches!(refresh.next(now), Next::Sleep(LONGEST_SLEEP)));
        let mut due = Vec::new();
        for sixteenth in 0..=20 {
            while let Next::Due(id) = refresh.next(now + hour * sixteenth / 2) {
                due.push((sixteenth, id));
            }
        }
        assert_eq!(due.len(), 100, "once each");
        let times: HashSet<u32> = due.iter().map(|(time, _)| *time).collect();
        assert!(times.len() > 3 && times.iter().all(|time| (12..=20).contains(time)), "{times:?}");
        // One that was never asked for is due now; one that was asked for long ago, too.
        refresh.watch(id(200), None, now);
        refresh.watch(id(201), Some(SystemTime::UNIX_EPOCH), now);
        assert!(matches!(refresh.next(now), Next::Due(_)));
        assert!(matches!(refresh.next(now), Next::Due(_)));
        assert!(matches!(refresh.next(now), Next::Sleep(_)));
        refresh.forget(id(200));
        refresh.watch(id(200), None, now);
        assert!(matches!(refresh.next(now), Next::Due(found) if found == id(200)));
    }
}
