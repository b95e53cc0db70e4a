//! What is known to be of no use to ask, and for how long?

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Most answers remembered; at the limit all are forgotten.
const MAX_NEGATIVES: usize = 100_000;

/// Keys that are believed for a while.
pub(super) struct Negatives<K> {
    ttl: Duration,
    until: Mutex<HashMap<K, Instant>>,
}

impl<K: Eq + Hash> Negatives<K> {
    pub(super) fn new(ttl: Duration) -> Self {
        Self { ttl, until: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<K, Instant>> {
        self.until.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn contains(&self, key: &K) -> bool {
        let mut until = self.lock();
        match until.get(key) {
            Some(end) if Instant::now() < *end => true,
            Some(_) => {
                until.remove(key);
                false
            }
            None => false,
        }
    }

    pub(super) fn insert(&self, key: K) {
        let mut until = self.lock();
        if until.len() >= MAX_NEGATIVES {
            until.clear();
        }
        until.insert(key, Instant::now() + self.ttl);
    }

    pub(super) fn forget(&self, is_meant: impl Fn(&K) -> bool) {
        let mut until = self.lock();
        if !until.is_empty() {
            until.retain(|key, _| !is_meant(key));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_believed_until_it_is_old_or_forgotten() {
        let long = Negatives::new(Duration::from_secs(3600));
        long.insert(1);
        long.insert(2);
        long.forget(|key| *key == 1);
        assert_eq!((long.contains(&1), long.contains(&2)), (false, true));
        let over = Negatives::new(Duration::ZERO);
        over.insert(1);
        assert!(!over.contains(&1));
    }
}
