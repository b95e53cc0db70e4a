//! Every route of the service.

use std::sync::Arc;

use axum::Router;
use axum::routing::{get, post, put};
use tower_http::trace::TraceLayer;

use crate::service::App;
use crate::{metadata, missing, profiles, protocol, status, symbolize, unwind, upload};

/// The route table.
pub(crate) fn router(app: Arc<App>) -> Router {
    Router::new()
        // Operations.
        .route("/healthz", get(status::health))
        .route("/readyz", get(status::ready))
        .route("/metrics", get(status::metrics))
        // What agents, the command line and backends use.
        .route("/api/v1/missing", post(missing::missing))
        .route("/api/v1/buildid/{id}/unwind", get(unwind::table))
        .route("/api/v1/buildid/{id}/source/{*path}", put(upload::source))
        .route("/api/v1/buildid/{id}/{kind}", put(upload::artefact))
        .route("/api/v1/symbolize", post(symbolize::symbolize))
        .route("/api/v1/profiles", get(profiles::merged))
        .route("/api/{*rest}", axum::routing::any(status::unknown))
        .route("/v1development/profiles", post(profiles::ingest))
        // The debuginfod protocol parses its paths itself: it answers any of them.
        .route("/metadata", get(metadata::metadata))
        .fallback(protocol::answer)
        .layer(TraceLayer::new_for_http())
        .with_state(app)
}
