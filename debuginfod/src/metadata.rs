//! `GET /metadata`: which artefacts have this file name, or this build-ID?

use std::collections::HashSet;
use std::sync::Arc;

use axum::Json;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use windlass_schema::http::ArtefactKind;

use crate::catalog::MetadataQuery;
use crate::error::reset;
use crate::service::App;

/// Most results of one query; with more, the answer says that it is not complete.
const MAX_RESULTS: usize = 10_000;

/// The query; further keys are ignored.
#[derive(Debug, Deserialize)]
pub(crate) struct Parameters {
    key: Option<String>,
    value: Option<String>,
}

/// The answer, as elfutils' server gives it.
#[derive(Serialize)]
struct Answer {
    results: Vec<Entry>,
    complete: bool,
}

#[derive(Clone, PartialEq, Eq, Hash, Serialize)]
struct Entry {
    r#type: &'static str,
    buildid: String,
    file: String,
}

/// Answers `key=file|glob|buildid`.
pub(crate) async fn metadata(State(app): State<Arc<App>>, parameters: Query<Parameters>) -> Response {
    let refuse = |text: &'static str| {
        let headers = [(header::CONTENT_TYPE, "text/plain"), (header::CACHE_CONTROL, "no-store")];
        (StatusCode::SERVICE_UNAVAILABLE, headers, text).into_response()
    };
    app.metrics.count("http_requests_total", "type", "metadata");
    let Query(Parameters { key: Some(key), value: Some(value) }) = parameters else {
        return refuse("/metadata webapi error, need key and value");
    };
    let query = match key.as_str() {
        "file" => MetadataQuery::File(value),
        "glob" => MetadataQuery::Glob(value),
        "buildid" => MetadataQuery::BuildId(value),
        _ => return refuse("/metadata webapi error, unsupported key"),
    };
    let found = match app.catalog(move |catalog| catalog.metadata(&query, MAX_RESULTS + 1)).await {
        Ok(found) => found,
        Err(error) => {
            tracing::error!("metadata: {error}");
            return reset();
        }
    };
    let complete = found.len() <= MAX_RESULTS;
    let mut named = HashSet::new();
    let results = found
        .into_iter()
        .take(MAX_RESULTS)
        .filter(|artefact| {
            use ArtefactKind::{Debuginfo, Executable, Source};
            matches!(artefact.kind, Debuginfo | Executable | Source)
        })
        .map(|artefact| Entry {
            r#type: artefact.kind.as_str(),
            buildid: artefact.build_id.to_string(),
            file: if artefact.path.is_empty() { artefact.file_name } else { artefact.path },
        })
        // Several namespaces may have it.
        .filter(|entry: &Entry| named.insert(entry.clone()))
        .collect();
    ([(header::CACHE_CONTROL, "no-store")], Json(Answer { results, complete })).into_response()
}
