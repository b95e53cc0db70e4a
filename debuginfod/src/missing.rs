//! `POST /api/v1/missing`: one request before an upload instead of one for each file.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Extension, State};
use axum::http::HeaderMap;
use windlass_schema::http::{MAX_MISSING_ARTEFACTS, MissingRequest, MissingResponse};

use crate::access::Identity;
use crate::conflict::depends_on_facts;
use crate::error::ServiceError;
use crate::intake::receive_bytes;
use crate::service::{App, now_s};
use crate::uses::is_due;

/// Largest body in bytes: the most artefacts, 500 bytes each.
const MAX_BODY_BYTES: u64 = 500 * MAX_MISSING_ARTEFACTS as u64;

/// Answers which of the named artefacts are not stored, or stored with other content. One whose
/// content was found damaged counts as missing, and so does one that the asker's content would replace.
/// For who may upload, the question is what an upload to their namespace would add; for others, what there is to read.
pub(crate) async fn missing(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
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
    let namespace = identity.compared_namespace(&headers, &app.namespaces)?;
    let namespaces = app.namespaces.clone();
    let response = app
        .catalog(move |catalog| {
            let now_s = now_s();
            let mut response = MissingResponse::default();
            let (mut spared, mut uses) = (Vec::new(), Vec::new());
            for name in request.artefacts {
                let path = name.path.as_deref().unwrap_or_default();
                let versions = catalog.versions(name.build_id, name.kind, path)?;
                let stored = match &namespace {
                    None => namespaces.most_trusted(versions, path),
                    Some(namespace) => {
                        let offered = name.sha256.as_deref().and_then(|hash| hash.parse().ok());
                        namespaces.decisive(versions, namespace, offered)
                    }
                };
                match stored.filter(|artefact| !artefact.damaged) {
                    None => response.missing.push(name),
                    Some(artefact) => match name.sha256.as_deref() {
                        Some(hash) if hash != artefact.blob.hash.to_string() => {
                            let is_richer = depends_on_facts(name.kind)
                                && name.brings.is_some_and(|brings| brings > artefact.facts.brings());
                            let list =
                                if is_richer { &mut response.missing } else { &mut response.differing };
                            list.push(name);
                        }
                        _ if is_due(&artefact, now_s) => {
                            uses.push((artefact.name(), now_s));
                            spared.push(name);
                        }
                        _ => {}
                    },
                }
            }
            // Whoever is told that an upload can be spared relies on what is there from now on.
            let known = catalog.note_uses(&uses)?;
            let removed = spared.into_iter().zip(known).filter(|(_, known)| !known);
            response.missing.extend(removed.map(|(name, _)| name));
            Ok(response)
        })
        .await?;
    Ok(Json(response))
}
