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
use crate::intake::{drain, receive_bytes};
use crate::service::App;

mod merge;
mod naming;
mod otlp;
mod pprof;

pub(crate) use merge::Merge;
pub(crate) use naming::{Unnamed, name_locations};
pub use otlp::{OtlpError, decode, time_range_ns};
pub(crate) use pprof::{decode_pprof, encode_pprof};

/// `Content-Type` of a gzipped pprof profile.
pub const PPROF_TYPE: &str = "application/vnd.google.pprof";
/// Largest OTLP request in decoded bytes: a hundred times what an agent sends in five seconds.
pub const MAX_BATCH_BYTES: u64 = 64 << 20;
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
        app.access.check_write(&headers)?;
        let received = receive_bytes(&headers, &mut body, MAX_BATCH_BYTES).await?;
        let content = Arc::new(received.sink);
        let checked = Arc::clone(&content);
        let range =
            tokio::task::spawn_blocking(move || decode(&checked).map(|request| time_range_ns(&request)))
                .await??;
        let hash = received.hash;
        let blob = match app.catalog(move |catalog| catalog.blob(hash)).await? {
            Some(blob) => blob,
            None => app.blobs.put(content, hash).await?,
        };
        let batch = ProfileBatch { blob, start_ns: range.start, end_ns: range.end };
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
#[derive(Debug, Deserialize)]
pub(crate) struct Selection {
    /// From here, in nanoseconds since 1970.
    start: u64,
    /// To here, exclusive.
    end: u64,
    /// Of this process only.
    pid: Option<i64>,
}

/// `GET /api/v1/profiles?start=NS&end=NS[&pid=N]`: one gzipped pprof profile with names.
pub(crate) async fn merged(
    State(app): State<Arc<App>>,
    selection: Result<Query<Selection>, QueryRejection>,
) -> Result<Response, ServiceError> {
    let Query(Selection { start, end, pid }) = selection.map_err(|e| {
        ServiceError::Malformed(format!("{}, expected start, end and optionally pid", e.body_text()))
    })?;
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
    let mut merge = Merge::new(start..end, pid);
    for batch in batches {
        let content = match app.blobs.read(batch.blob).await {
            // One damaged batch does not cost the others.
            Err(error @ BlobError::Damaged { .. }) => {
                tracing::error!("profiles of {} to {}: {error}", batch.start_ns, batch.end_ns);
                app.metrics.count("windlass_profile_batches_total", "result", "damaged");
                app.mark_damaged(batch.blob.hash).await?;
                continue;
            }
            content => content?,
        };
        merge = tokio::task::spawn_blocking(move || -> Result<Merge, ServiceError> {
            merge.add(&decode(&content)?);
            Ok(merge)
        })
        .await??;
    }
    let named = name_locations(&app, merge.finish(), Unnamed::Describe).await?;
    let bytes = tokio::task::spawn_blocking(move || encode_pprof(&named)).await??;
    let headers = [(header::CONTENT_TYPE, PPROF_TYPE), (header::CACHE_CONTROL, "no-store")];
    Ok((headers, bytes).into_response())
}

/// The request as a type of this crate's interface.
pub type OtlpRequest = ExportProfilesServiceRequest;
