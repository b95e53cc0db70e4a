//! Profiles: taken in as they come, named and merged when they are read.
//!
//! Parca symbolizes on write and cannot improve what is stored; Pyroscope reads back whole series. Here the
//! OTLP request is kept byte for byte, since addresses and build-IDs never age, and names come from
//! whatever debuginfo is there when someone looks, so an upload a day later still helps. A batch that an agent sends
//! twice, because an answer was lost, is one content and counts once.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use opentelemetry_proto::tonic::collector::profiles::v1development::{
    ExportProfilesServiceRequest, ExportProfilesServiceResponse,
};
use prost::Message;
use serde::Deserialize;

use crate::blob::BlobError;
use crate::catalog::ProfileBatch;
use crate::error::ServiceError;
use crate::holding::hold;
use crate::intake::{drain, receive_bytes};
use crate::service::App;

mod decoded_size;
mod merge;
mod naming;
mod otlp;
mod pprof;
mod segments;
mod string_table;

pub use decoded_size::TooManyParts;
pub(crate) use merge::Merge;
pub(crate) use naming::{Unnamed, name_locations};
pub use otlp::{OtlpError, decode, time_range_ns};
pub(crate) use pprof::{decode_pprof, encode_pprof};

/// `Content-Type` of a gzipped pprof profile.
pub const PPROF_TYPE: &str = "application/vnd.google.pprof";
/// Largest OTLP request in decoded bytes: 25 times what an agent sends in five seconds, and what the memory for
/// decoding suffices for.
pub const MAX_BATCH_BYTES: u64 = 16 << 20;
/// Header of a merged profile that lacks batches: how many could not be read.
pub const SKIPPED_BATCHES_HEADER: &str = "x-windlass-skipped-batches";
/// Most batches merged into one profile: fifteen hours of one agent at five seconds each.
const MAX_MERGED_BATCHES: usize = 10_000;

/// `POST /v1development/profiles`: stores a batch. The answer means that it is durable.
pub(crate) async fn ingest(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ServiceError> {
    let mut body = body.into_data_stream();
    let stored = async {
        let received = receive_bytes(&headers, &mut body, MAX_BATCH_BYTES).await?;
        let content = Arc::new(received.sink);
        let checked = Arc::clone(&content);
        let admission = app.decoding.admit(received.size).await;
        let range = tokio::task::spawn_blocking(move || {
            let range = decode(&checked).map(|request| time_range_ns(&request));
            drop(admission);
            range
        })
        .await??;
        let hash = received.hash;
        let blob = hold(&app, content, hash).await?.blob()?;
        let batch = ProfileBatch { blob, start_ns: range.start, end_ns: range.end, damaged: false };
        app.catalog(move |catalog| catalog.put_profiles(batch)).await?;
        app.metrics.count("windlass_profile_batches_total", "result", "stored");
        Ok(())
    }
    .await;
    match stored {
        Ok(()) => {
            let answer = ExportProfilesServiceResponse::default().encode_to_vec();
            Ok(([(header::CONTENT_TYPE, "application/x-protobuf")], answer).into_response())
        }
        Err(error) => {
            drain(body).await;
            Err(error)
        }
    }
}

/// What to merge.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Selection {
    /// From here, in nanoseconds since 1970.
    start: u64,
    /// To here, exclusive.
    end: u64,
    /// Of this process only; every host may have one.
    pid: Option<i64>,
    /// Of this host only, by its name.
    host: Option<String>,
    /// Of this agent only, by its `windlass.agent.id`, or of this instance of a service, by its
    /// `service.instance.id`.
    instance: Option<String>,
}

/// `GET /api/v1/profiles?start=NS&end=NS[&pid=N][&host=NAME][&instance=ID]`: one gzipped pprof profile with names.
/// Batches that cannot be read are left out and counted in [`SKIPPED_BATCHES_HEADER`].
pub(crate) async fn merged(
    State(app): State<Arc<App>>,
    selection: Result<Query<Selection>, QueryRejection>,
) -> Result<Response, ServiceError> {
    let Query(selection) = selection.map_err(|e| {
        let expected = "expected start, end and optionally pid, host and instance";
        ServiceError::Malformed(format!("{}, {expected}", e.body_text()))
    })?;
    let Selection { start, end, .. } = selection;
    if start >= end {
        return Err(ServiceError::Malformed(format!(
            "time range from {start} to {end}, expected start before end, both in nanoseconds since 1970"
        )));
    }
    let batches = app.catalog(move |catalog| catalog.profiles(start..end, MAX_MERGED_BATCHES + 1)).await?;
    if batches.len() > MAX_MERGED_BATCHES {
        return Err(ServiceError::Malformed(format!(
            "more than {MAX_MERGED_BATCHES} batches between {start} and {end}, ask for a shorter time"
        )));
    }
    let mut merge = Merge::new(selection);
    let _admission = app.merging.admit(batches.iter().map(|batch| batch.blob.size).sum()).await;
    let mut skipped = 0_u64;
    for batch in batches {
        match add_batch(&app, merge, batch).await? {
            (merged, true) => merge = merged,
            (merged, false) => (merge, skipped) = (merged, skipped + 1),
        }
    }
    let named = name_locations(&app, merge.finish(), Unnamed::Describe).await?;
    let bytes = tokio::task::spawn_blocking(move || encode_pprof(&named)).await??;
    let headers = [(header::CONTENT_TYPE, PPROF_TYPE), (header::CACHE_CONTROL, "no-store")];
    let mut response = (headers, bytes).into_response();
    if skipped > 0 {
        tracing::error!("{skipped} batches left out of the profile from {start} to {end}");
        response.headers_mut().insert(SKIPPED_BATCHES_HEADER, skipped.into());
    }
    Ok(response)
}

/// Adds one batch, and tells whether it could be read: a damaged one does not cost the others.
async fn add_batch(
    app: &Arc<App>,
    mut merge: Merge,
    batch: ProfileBatch,
) -> Result<(Merge, bool), ServiceError> {
    let skipped = |why: &dyn std::fmt::Display| {
        tracing::error!("profiles of {} to {}: {why}", batch.start_ns, batch.end_ns);
        app.metrics.count("windlass_profile_batches_total", "result", "damaged");
    };
    if batch.damaged {
        return Ok((merge, false)); // it was told when it was found
    }
    let content = match app.blobs.read(batch.blob).await {
        Err(error @ BlobError::Damaged { .. }) => {
            skipped(&error);
            app.mark_damaged(batch.blob.hash).await?;
            return Ok((merge, false));
        }
        content => content?,
    };
    let admission = app.decoding.admit(batch.blob.size).await;
    let (merge, added) = tokio::task::spawn_blocking(move || {
        let added = decode(&content).map(|request| merge.add(&request));
        drop(admission);
        (merge, added)
    })
    .await?;
    match added {
        Ok(added) => added.map(|()| (merge, true)).map_err(ServiceError::from),
        Err(error) => {
            skipped(&error);
            Ok((merge, false))
        }
    }
}

/// The request as a type of this crate's interface.
pub type OtlpRequest = ExportProfilesServiceRequest;
