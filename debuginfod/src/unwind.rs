//! `GET /api/v1/buildid/ID/unwind`: the compiled unwind table.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use windlass_schema::BuildId;
use windlass_schema::http::ArtefactKind;
use windlass_schema::table::VERSION;

use crate::blob::BlobError;
use crate::catalog::{Artefact, DerivedKind};
use crate::delivery::{Delivery, REVALIDATE};
use crate::derive::{Inputs, derive};
use crate::error::ServiceError;
use crate::service::App;

/// `Content-Type` of a table.
pub(crate) const TABLE_TYPE: &str = "application/vnd.windlass.unwind";
/// How long a request waits for a compilation before it is answered 202.
const PATIENCE: Duration = Duration::from_secs(1);

/// Sends the table, compiling it first if need be. It may be replaced when a better file of the image
/// arrives, so caches must ask again; unchanged it costs a 304.
pub(crate) async fn table(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    method: Method,
    headers: HeaderMap,
) -> Result<Response, ServiceError> {
    let id: BuildId = id.parse()?;
    let source = source(&app, id).await?.ok_or_else(|| {
        ServiceError::NotFound(format!(
            "neither executable, skeleton nor debuginfo with unwind sections stored for {id}"
        ))
    })?;
    match deliver(&app, source.clone(), &method, &headers).await {
        // The stored table went bad after it was checked: it is disposable, so make it again.
        Err(ServiceError::Blob(BlobError::Damaged { hash, .. })) => {
            app.mark_damaged(hash).await?;
            deliver(&app, source, &method, &headers).await
        }
        answer => answer,
    }
}

async fn deliver(
    app: &Arc<App>,
    source: Artefact,
    method: &Method,
    headers: &HeaderMap,
) -> Result<Response, ServiceError> {
    let (modified_s, file_name) = (source.modified_s, source.file_name.clone());
    let inputs = Inputs { image: Some(source), ..Inputs::default() };
    let key = inputs.key(DerivedKind::Unwind, u32::from(VERSION)).expect("there is an input");
    let blob = match tokio::time::timeout(PATIENCE, derive(app, key, inputs)).await {
        Ok(outcome) => outcome?.map_err(|why| ServiceError::Compile(why.to_string()))?,
        Err(_) => {
            let headers = [(header::RETRY_AFTER, "1"), (header::CACHE_CONTROL, "no-store")];
            return Ok((StatusCode::ACCEPTED, headers).into_response());
        }
    };
    let delivery = Delivery {
        blob,
        part: None,
        modified_s,
        file_name,
        content_type: TABLE_TYPE,
        cache_control: REVALIDATE,
    };
    delivery.answer(app, method, headers).await
}

/// The best file to compile from. The executable has everything; a skeleton was cut from it for this; a debug
/// file may have kept `.debug_frame` only.
async fn source(app: &App, id: BuildId) -> Result<Option<Artefact>, ServiceError> {
    for kind in [ArtefactKind::Executable, ArtefactKind::Skeleton, ArtefactKind::Debuginfo] {
        if let Some(artefact) = app.sound_artefact(id, kind).await?
            && (kind != ArtefactKind::Debuginfo || artefact.facts.unwind)
        {
            return Ok(Some(artefact));
        }
    }
    Ok(None)
}
