//! Who wrote what, and from where: `GET /api/v1/audit`, and an event of the log for each entry.
//!
//! An artefact and its entry are one commit, so there is none without the other. An upload that is refused to
//! who may upload is recorded too; what strangers try is in the log of the process only, since they would push out of
//! the catalog what matters. Batches of profiles are not recorded: each host sends one every few seconds, and they take nothing's place.

use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use serde::{Deserialize, Serialize};

use crate::catalog::{Action, Artefact, AuditEntry, AuditRecord, STORED, Subject, Writer};
use crate::error::ServiceError;
use crate::service::{App, now_s};

/// Most entries kept, whatever their age: some 200 MB of the catalog.
const MAX_ENTRIES: u64 = 1_000_000;
/// Entries added between two looks for those that are too old.
const TRIM_INTERVAL: u64 = 1024;
/// Longest result in bytes.
const MAX_RESULT_BYTES: usize = 300;
/// Entries of a page, unless the query says.
const DEFAULT_PAGE: usize = 100;
/// Most entries of a page.
const MAX_PAGE: usize = 1000;
const DAY_S: u64 = 24 * 3600;

/// How the log is kept.
pub(crate) struct Audit {
    retention_s: u64,
    added: AtomicU64,
}

impl Audit {
    /// Entries are kept for `days`.
    pub(crate) fn new(days: u64) -> Self {
        Self { retention_s: days.saturating_mul(DAY_S), added: AtomicU64::new(0) }
    }
}

/// Tells of an upload that the catalog has recorded.
pub(crate) fn stored(app: &Arc<App>, artefact: &Artefact, writer: &Writer) {
    tell(Action::Upload, &Subject::from(artefact), writer, STORED);
    count(app);
}

/// Records an upload that was refused. That this fails changes nothing for the client.
pub(crate) async fn refused(app: &Arc<App>, subject: Subject, writer: Writer, error: &ServiceError) {
    let text = error.to_string();
    let result = text[..text.floor_char_boundary(MAX_RESULT_BYTES)].to_owned();
    tell(Action::Upload, &subject, &writer, &result);
    let entry = AuditEntry { at_s: now_s(), writer, action: Action::Upload, subject, result };
    if let Err(error) = app.catalog(move |catalog| catalog.record(&entry)).await {
        tracing::error!("recording a refused upload: {error}");
    }
    count(app);
}

fn tell(action: Action, subject: &Subject, writer: &Writer, result: &str) {
    tracing::info!(
        target: "windlass::audit",
        token = writer.token,
        peer = writer.peer,
        action = action.as_str(),
        build_id = text(subject.build_id),
        kind = text(subject.kind),
        path = subject.path,
        namespace = text(subject.namespace.as_ref()),
        sha256 = text(subject.sha256),
        size_bytes = subject.size_bytes,
        result,
    );
}

fn text(value: Option<impl Display>) -> String {
    value.map(|value| value.to_string()).unwrap_or_default()
}

fn count(app: &Arc<App>) {
    if (app.audit.added.fetch_add(1, Ordering::Relaxed) + 1).is_multiple_of(TRIM_INTERVAL) {
        trim(app);
    }
}

/// Forgets in the background what is older than it is kept.
pub(crate) fn trim(app: &Arc<App>) {
    let app = Arc::clone(app);
    tokio::spawn(async move {
        let since_s = now_s().saturating_sub(app.audit.retention_s);
        if let Err(error) = app.catalog(move |catalog| catalog.trim_audit(since_s, MAX_ENTRIES)).await {
            tracing::error!("forgetting old entries of the audit log: {error}");
        }
    });
}

/// Which page.
#[derive(Debug, Deserialize)]
pub(crate) struct Parameters {
    before: Option<u64>,
    limit: Option<usize>,
}

/// A page.
#[derive(Debug, Serialize)]
pub(crate) struct Page {
    /// Latest first.
    records: Vec<AuditRecord>,
    /// `before` of the next page, if there may be one.
    next: Option<u64>,
}

/// `GET /api/v1/audit[?before=ID][&limit=N]`.
pub(crate) async fn page(
    State(app): State<Arc<App>>,
    parameters: Result<Query<Parameters>, QueryRejection>,
) -> Result<Json<Page>, ServiceError> {
    let Query(Parameters { before, limit }) = parameters
        .map_err(|e| ServiceError::Malformed(format!("{}, expected before and limit", e.body_text())))?;
    let limit = limit.unwrap_or(DEFAULT_PAGE).clamp(1, MAX_PAGE);
    let records = app.catalog(move |catalog| catalog.audit(before, limit)).await?;
    let next = records.last().filter(|_| records.len() == limit).map(|record| record.id);
    Ok(Json(Page { records, next }))
}
