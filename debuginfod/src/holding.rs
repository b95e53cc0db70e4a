//! How long may a content be held before something names it?
//!
//! A content goes when nothing names it (module `catalog::collection`), and nothing does while an upload has found it on record
//! or has just written it. So whoever is about to name one holds it for a time that is bounded, and who collects waits longer
//! than that. Both sides measure their own time: replicas' clocks may differ by the rest.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::blob::Blob;
use crate::content::Content;
use crate::content_hash::ContentHash;
use crate::error::ServiceError;
use crate::service::App;

/// Longest time from finding or beginning to write a content to naming it: a large one on a slow store takes minutes.
const NAMING_LIMIT: Duration = Duration::from_secs(6 * 3600);
/// How long after a content was withdrawn, or its object written, it may be removed, in seconds.
pub const GRACE_S: u64 = 24 * 3600;
const _: () = assert!(2 * NAMING_LIMIT.as_secs() < GRACE_S, "clocks may differ by hours");

/// A durable content that is about to be named.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Held {
    blob: Blob,
    since: Instant,
}

impl Held {
    /// The content, to be named at once.
    pub(crate) fn blob(&self) -> Result<Blob, ServiceError> {
        match self.since.elapsed() < NAMING_LIMIT {
            true => Ok(self.blob),
            false => Err(ServiceError::Busy("the store took hours for one content")),
        }
    }
}

/// The content on record, or else `content`, stored.
pub(crate) async fn hold<C>(app: &App, content: Arc<C>, hash: ContentHash) -> Result<Held, ServiceError>
where
    C: Content + Send + Sync + 'static,
{
    let since = Instant::now();
    match app.catalog(move |catalog| catalog.blob(hash)).await? {
        Some(blob) => Ok(Held { blob, since }),
        None => store(app, content, hash).await,
    }
}

/// `content`, stored in any case.
pub(crate) async fn store<C>(app: &App, content: Arc<C>, hash: ContentHash) -> Result<Held, ServiceError>
where
    C: Content + Send + Sync + 'static,
{
    let since = Instant::now();
    Ok(Held { blob: app.blobs.put(content, hash).await?, since })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_held_too_long_is_not_named() {
        let hash = ContentHash::of(b"content");
        let blob = Blob { hash, size: 7, stored_size: 8, write: 1 };
        let now = Instant::now();
        assert_eq!(Held { blob, since: now }.blob().expect("at once"), blob);
        if let Some(since) = now.checked_sub(NAMING_LIMIT) {
            assert_eq!(Held { blob, since }.blob().expect_err("too late").status(), 503);
        }
    }
}
