//! One of the servers: is it asked, and what did it do?

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use reqwest::Url;
use serde::Serialize;

use super::UpstreamsError;

/// Failures in a row after which a server is left alone.
const BREAKER_FAILURES: u32 = 3;
/// For how long. Then one request more is tried.
const BREAKER_PAUSE: Duration = Duration::from_secs(30);

/// A server and its record.
pub(super) struct Server {
    /// Without a slash at the end.
    pub(super) base: String,
    health: Mutex<Health>,
}

#[derive(Default)]
struct Health {
    failures_in_a_row: u32,
    left_alone_until: Option<Instant>,
    record: Record,
}

/// What came of asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// A file.
    File,
    /// A clear no.
    Lacking,
    /// Neither.
    Failure,
}

/// What a server did since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Record {
    /// Its URL.
    url: String,
    /// Whether it is left alone at the moment, after repeated failures.
    left_alone: bool,
    /// Files that came from it.
    files: u64,
    /// Times it said that it does not have one.
    lacking: u64,
    /// Times it gave no usable answer.
    failures: u64,
    /// The last failure.
    last_failure: Option<String>,
}

impl Server {
    pub(super) fn new(text: &str) -> Result<Self, UpstreamsError> {
        match Url::parse(text) {
            Ok(url) if ["http", "https"].contains(&url.scheme()) => {
                Ok(Self { base: text.trim_end_matches('/').to_owned(), health: Mutex::default() })
            }
            _ => Err(UpstreamsError::Url(text.to_owned())),
        }
    }

    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it may be asked.
    pub(super) fn is_open(&self) -> bool {
        let mut health = self.health();
        match health.left_alone_until {
            Some(until) if Instant::now() < until => false,
            Some(_) => {
                health.left_alone_until = None;
                health.failures_in_a_row = BREAKER_FAILURES - 1; // one more failure closes it again
                true
            }
            None => true,
        }
    }

    pub(super) fn record(&self, outcome: Outcome, failure: Option<String>) {
        let mut health = self.health();
        match outcome {
            Outcome::File => health.record.files += 1,
            Outcome::Lacking => health.record.lacking += 1,
            Outcome::Failure => health.record.failures += 1,
        }
        if outcome != Outcome::Failure {
            (health.failures_in_a_row, health.left_alone_until) = (0, None);
            return;
        }
        health.record.last_failure = failure;
        health.failures_in_a_row += 1;
        if health.failures_in_a_row >= BREAKER_FAILURES {
            health.left_alone_until = Some(Instant::now() + BREAKER_PAUSE);
        }
    }

    pub(super) fn report(&self) -> Record {
        let health = self.health();
        let left_alone = health.left_alone_until.is_some_and(|until| Instant::now() < until);
        Record { url: self.base.clone(), left_alone, ..health.record.clone() }
    }
}
