//! Single flight: many callers, one making.
//!
//! The making runs in a task of its own, so a caller that goes away neither stops nor repeats it.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

/// The makings under way, by key.
pub(crate) struct Flights<K, V> {
    running: Arc<Mutex<HashMap<K, watch::Receiver<Option<V>>>>>,
}

impl<K, V> Default for Flights<K, V> {
    fn default() -> Self {
        Self { running: Arc::default() }
    }
}

/// Takes the key off the list, even when the making panics.
struct Landing<K: Hash + Eq, V> {
    running: Arc<Mutex<HashMap<K, watch::Receiver<Option<V>>>>>,
    key: K,
}

impl<K: Hash + Eq, V> Drop for Landing<K, V> {
    fn drop(&mut self) {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

impl<K, V> Flights<K, V>
where
    K: Hash + Eq + Clone + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// Waits for what `make` makes, or for the making of the same key that is under way. `None` if
    /// it panicked or the runtime stops.
    pub(crate) fn join<F, M>(
        &self,
        key: K,
        make: M,
    ) -> impl Future<Output = Option<V>> + Send + use<F, M, K, V>
    where
        F: Future<Output = V> + Send + 'static,
        M: FnOnce() -> F,
    {
        let mut receiver = {
            let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            match running.get(&key) {
                Some(receiver) => receiver.clone(),
                None => {
                    let (sender, receiver) = watch::channel(None);
                    running.insert(key.clone(), receiver.clone());
                    let landing = Landing { running: Arc::clone(&self.running), key };
                    let making = make();
                    tokio::spawn(async move {
                        let landing = landing;
                        let made = making.await;
                        drop(landing);
                        let _ = sender.send(Some(made));
                    });
                    receiver
                }
            }
        };
        async move { receiver.wait_for(Option::is_some).await.ok().and_then(|value| value.clone()) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_panic_ends_the_flight_and_the_next_one_starts() {
        let flights = Flights::<u32, u32>::default();
        assert_eq!(flights.join(1, || async { panic!("as planned") }).await, None);
        assert_eq!(flights.join(1, || async { 7 }).await, Some(7));
    }

    #[tokio::test]
    async fn callers_that_leave_neither_stop_nor_repeat_it() {
        let flights = Flights::<u32, u32>::default();
        let made = Arc::new(AtomicU32::new(0));
        let make = || {
            let made = Arc::clone(&made);
            async move {
                tokio::time::sleep(Duration::from_millis(50)).await;
                made.fetch_add(1, Ordering::SeqCst) + 1
            }
        };
        for _ in 0..10 {
            drop(flights.join(1, make));
        }
        assert_eq!(flights.join(1, make).await, Some(1));
        assert_eq!(flights.join(1, make).await, Some(2), "after it landed, the next one starts");
    }
}
