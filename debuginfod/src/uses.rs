//! When was an artefact last used?
//!
//! The answer decides what is kept, so it must be on record, and a write for each request would cost more than the request.
//! A use is recorded only if the last one on record is more than [`USE_INTERVAL_S`] ago, and with the others of some seconds
//! in one transaction. What a process that is killed had not recorded yet is at most [`FLUSH_INTERVAL`] of uses, of things that
//! go unused for weeks before anybody collects them.
//!
//! Who is told that an upload can be spared relies on what is there: that use is recorded before the answer ([`keep`]).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::catalog::{Artefact, Name};
use crate::error::ServiceError;
use crate::service::{App, now_s};

/// How exactly the last use is known, in seconds.
pub(crate) const USE_INTERVAL_S: u64 = 3600;
/// How long uses are gathered before they are recorded, in seconds.
const FLUSH_INTERVAL: Duration = Duration::from_secs(10);
/// Most uses gathered: some 20 MB. Those beyond are left to the next use.
const MAX_PENDING: usize = 65_536;

/// Uses that are not on record yet.
#[derive(Default)]
pub(crate) struct Uses {
    pending: Mutex<HashMap<Name, u64>>,
}

impl Uses {
    /// Notes a use of `artefact`, as it is on record.
    pub(crate) fn note(&self, artefact: &Artefact) {
        let now_s = now_s();
        if !is_due(artefact, now_s) {
            return;
        }
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        if pending.len() < MAX_PENDING {
            pending.entry(artefact.name()).or_insert(now_s);
        }
    }

    fn take(&self) -> Vec<(Name, u64)> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).drain().collect()
    }
}

/// Whether a use now is one to record.
pub(crate) fn is_due(artefact: &Artefact, now_s: u64) -> bool {
    artefact.used_s.saturating_add(USE_INTERVAL_S) < now_s
}

/// Records a use of `artefact` now, durably. `false`: it was removed since it was read.
pub(crate) async fn keep(app: &App, artefact: &Artefact) -> Result<bool, ServiceError> {
    let now_s = now_s();
    if !is_due(artefact, now_s) {
        return Ok(true);
    }
    let uses = [(artefact.name(), now_s)];
    Ok(app.catalog(move |catalog| catalog.note_uses(&uses)).await? == [true])
}

/// Records the uses that were noted.
pub(crate) async fn flush(app: &App) {
    let uses = app.uses.take();
    if uses.is_empty() {
        return;
    }
    let images: Vec<_> = uses.iter().map(|(name, _)| name.build_id).collect();
    match app.catalog(move |catalog| catalog.note_uses(&uses)).await {
        // What is kept in memory of them tells of the use before, by which each that follows would be recorded too.
        Ok(_) => images.into_iter().for_each(|id| app.rows.forget(id)),
        Err(error) => tracing::warn!("recording uses: {error}"),
    }
}

/// Records uses every some seconds until `stop`.
pub(crate) async fn record(app: Arc<App>, stop: CancellationToken) {
    while stop.run_until_cancelled(tokio::time::sleep(FLUSH_INTERVAL)).await.is_some() {
        flush(&app).await;
    }
}
