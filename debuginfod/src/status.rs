//! Is the service there, and what have it and its upstreams done?

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderName, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use windlass_schema::BuildId;

use crate::catalog::Provenance;
use crate::error::ServiceError;
use crate::service::App;
use crate::upstream::Record;

/// The process runs.
pub(crate) async fn health() -> &'static str {
    "ok\n"
}

/// The catalog answers, and the storage is there.
pub(crate) async fn ready(State(app): State<Arc<App>>) -> Response {
    let ready = async {
        app.catalog(|catalog| catalog.blobs(None, 1)).await?;
        Ok::<_, ServiceError>(app.blobs.require_marker().await?)
    };
    match ready.await {
        Ok(()) => "ready\n".into_response(),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")).into_response(),
    }
}

/// Prometheus counters.
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> ([(HeaderName, &'static str); 1], String) {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], app.metrics.text())
}

/// What each upstream server did.
pub(crate) async fn upstreams(State(app): State<Arc<App>>) -> Json<Vec<Record>> {
    Json(app.upstreams.report())
}

/// Which upstream servers the contents of an image came from.
pub(crate) async fn provenance(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<Json<Vec<Provenance>>, ServiceError> {
    let id: BuildId = id.parse()?;
    Ok(Json(app.catalog(move |catalog| catalog.provenances(id)).await?))
}

/// An interface that does not exist.
pub(crate) async fn unknown(uri: Uri) -> ServiceError {
    ServiceError::NotFound(format!("no interface at {}", uri.path()))
}
