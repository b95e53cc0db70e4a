//! `POST /api/v1/missing`: one request before an upload instead of one for each file.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use windlass_schema::http::{MAX_MISSING_ARTEFACTS, MissingRequest, MissingResponse};

use crate::error::ServiceError;
use crate::intake::receive_bytes;
use crate::service::App;

/// Largest body in bytes: the most artefacts, 500 bytes each.
const MAX_BODY_BYTES: u64 = 500 * MAX_MISSING_ARTEFACTS as u64;

/// Answers which of the named artefacts are not stored, or stored with other content. One whose
/// content was found damaged counts as missing.
pub(crate) async fn missing(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<MissingResponse>, ServiceError> {
    let mut body = body.into_data_stream();
    let received = receive_bytes(&headers, &mut body, MAX_BODY_BYTES).await?;
    let request: MissingRequest = serde_json::from_slice(&received.sink)
        .map_err(|e| ServiceError::Malformed(format!("request: {e}")))?;
    if request.artefacts.len() > MAX_MISSING_ARTEFACTS {
        return Err(ServiceError::Malformed(format!(
            "{} artefacts in one request, at most {MAX_MISSING_ARTEFACTS} are allowed",
            request.artefacts.len()
        )));
    }
    let response = app
        .catalog(move |catalog| {
            let mut response = MissingResponse::default();
            for name in request.artefacts {
                let stored =
                    catalog.artefact(name.build_id, name.kind, name.path.as_deref().unwrap_or_default())?;
                match stored.filter(|artefact| !artefact.damaged) {
                    None => response.missing.push(name),
                    Some(artefact)
                        if name
                            .sha256
                            .as_ref()
                            .is_some_and(|hash| *hash != artefact.blob.hash.to_string()) =>
                    {
                        response.differing.push(name);
                    }
                    Some(_) => {}
                }
            }
            Ok(response)
        })
        .await?;
    Ok(Json(response))
}
