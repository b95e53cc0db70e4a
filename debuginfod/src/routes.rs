//! Every route of the service, and what it needs: see module `access`.

use std::sync::Arc;

use axum::Router;
use axum::middleware::from_fn_with_state;
use axum::routing::{any, delete, get, head, post, put};
use tower_http::trace::TraceLayer;

use crate::access::{Need, require};
use crate::service::App;
use crate::{
    audit, inventory, metadata, missing, openapi, profiles, protocol, status, symbolize, unfinished, unwind,
    upload,
};

/// The route table.
pub(crate) fn router(app: Arc<App>) -> Router {
    let needs = |need| from_fn_with_state((Arc::clone(&app), need), require);
    let open = Router::new()
        .route("/healthz", get(status::health))
        .route("/readyz", get(status::ready))
        .route("/api/v1/openapi.json", get(openapi::document));
    let read = Router::new()
        .route("/metrics", get(status::metrics))
        .route("/api/v1/buildid/{id}/unwind", get(unwind::table))
        .route("/api/v1/buildid/{id}/provenance", get(status::provenance))
        .route("/api/v1/upstreams", get(status::upstreams))
        .route("/api/v1/symbolize", post(symbolize::symbolize))
        .route("/api/v1/profiles", get(profiles::merged))
        .route("/api/v1/artefacts", get(inventory::list))
        .route("/api/v1/artefacts/{id}", get(inventory::show))
        .route("/api/v1/namespaces", get(inventory::namespaces))
        .route("/api/{*rest}", any(status::unknown))
        // The debuginfod protocol parses its paths itself: it answers any of them.
        .route("/metadata", get(metadata::metadata))
        .fallback(protocol::answer)
        .layer(needs(Need::Read));
    let compare =
        Router::new().route("/api/v1/missing", post(missing::missing)).route_layer(needs(Need::Compare));
    let upload = Router::new()
        .route("/api/v1/buildid/{id}/source/{*path}", put(upload::source))
        .route("/api/v1/buildid/{id}/dwo/{unit}", put(upload::split_unit))
        .route("/api/v1/buildid/{id}/{kind}", put(upload::artefact))
        .route(
            "/api/v1/uploads/{id}/{kind}/{sha256}",
            head(unfinished::progress).patch(unfinished::append).delete(unfinished::forget),
        )
        .route("/api/v1/labels", post(inventory::label))
        .route("/v1development/profiles", post(profiles::ingest))
        .route_layer(needs(Need::Upload));
    let admin = Router::new()
        .route("/api/v1/audit", get(audit::page))
        .route("/api/v1/artefacts/{id}", delete(inventory::delete))
        .route_layer(needs(Need::Admin));
    let all = open.merge(read).merge(compare).merge(upload).merge(admin);
    all.layer(TraceLayer::new_for_http()).with_state(app)
}
