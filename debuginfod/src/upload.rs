//! `PUT /api/v1/buildid/ID/KIND`: an artefact comes in.
//!
//! Sentry's uploads stay PENDING up to an hour, Parca's are three calls of which the last can be lost,
//! and a stripped file can shadow a good one. Here an upload is one request whose answer is
//! final: 201 or 200 means checked, durable and served from now on.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Extension, Path, State};
use axum::http::{HeaderMap, StatusCode};
use windlass_schema::BuildId;
use windlass_schema::http::{ArtefactKind, FILE_NAME_HEADER, SHA256_HEADER, Stored};

use crate::access::Identity;
use crate::audit;
use crate::catalog::Name;
use crate::content_hash::ContentHash;
use crate::error::ServiceError;
use crate::intake::{drain, receive};
use crate::namespace::Namespace;
use crate::quota;
use crate::service::{App, now_s};
use crate::storing::{Origin, Outcome, foreseen, store};

/// Longest source path in bytes: Linux's `PATH_MAX`.
const MAX_PATH_BYTES: usize = 4096;
/// Longest file name in bytes: Linux's `NAME_MAX`. Longer ones are cut.
const MAX_FILE_NAME_BYTES: usize = 255;

pub(crate) type Answer = Result<(StatusCode, Json<Stored>), ServiceError>;

/// An ELF file or kernel symbols.
pub(crate) async fn artefact(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    Path((id, kind)): Path<(String, String)>,
    headers: HeaderMap,
    body: Body,
) -> Answer {
    let namespace = identity.namespace(&headers, &app.namespaces);
    let name = namespace.and_then(|namespace| named(&id, &kind, namespace));
    upload(&app, identity, name, &headers, body).await
}

/// The name of an artefact that is no source.
pub(crate) fn named(id: &str, kind: &str, namespace: Namespace) -> Result<Name, ServiceError> {
    let build_id = id.parse()?;
    let kind: ArtefactKind = kind.parse()?;
    if matches!(kind, ArtefactKind::Source | ArtefactKind::Dwo) {
        return Err(ServiceError::Malformed(
            "a source is uploaded to .../source/ABSOLUTE/PATH, a .dwo file to .../dwo/UNIT_ID".to_owned(),
        ));
    }
    Ok(Name { build_id, kind, path: String::new(), namespace })
}

/// A source file.
pub(crate) async fn source(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    Path((id, path)): Path<(String, String)>,
    headers: HeaderMap,
    body: Body,
) -> Answer {
    let name = id.parse::<BuildId>().map_err(ServiceError::from).and_then(|build_id| {
        let path = format!("/{path}");
        if path.len() > MAX_PATH_BYTES || path.contains('\0') {
            return Err(ServiceError::Malformed(format!(
                "source path of {} bytes or with a zero byte, at most {MAX_PATH_BYTES} are allowed",
                path.len()
            )));
        }
        let namespace = identity.namespace(&headers, &app.namespaces)?;
        Ok(Name { build_id, kind: ArtefactKind::Source, path, namespace })
    });
    upload(&app, identity, name, &headers, body).await
}

/// A `.dwo` file, by the ID of its unit.
pub(crate) async fn split_unit(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    Path((id, unit)): Path<(String, String)>,
    headers: HeaderMap,
    body: Body,
) -> Answer {
    let name = id.parse::<BuildId>().map_err(ServiceError::from).and_then(|build_id| {
        let namespace = identity.namespace(&headers, &app.namespaces)?;
        Ok(Name { build_id, kind: ArtefactKind::Dwo, path: unit_id(unit)?, namespace })
    });
    upload(&app, identity, name, &headers, body).await
}

/// The ID of a split unit, which the skeleton unit in its image names: 16 lower-case hex digits.
fn unit_id(text: String) -> Result<String, ServiceError> {
    const DIGITS: usize = 16;
    let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if text.len() == DIGITS && text.bytes().all(is_digit) {
        return Ok(text);
    }
    Err(ServiceError::Malformed(format!("{text:?} is no ID of a unit, {DIGITS} lower-case hex digits")))
}

async fn upload(
    app: &Arc<App>,
    identity: Identity,
    name: Result<Name, ServiceError>,
    headers: &HeaderMap,
    body: Body,
) -> Answer {
    let mut body = body.into_data_stream();
    let mut subject = name.as_ref().map(Name::subject).unwrap_or_default();
    let checked = async {
        let name = name?;
        let declared = declared_hash(headers)?.ok_or(ServiceError::MissingHeader(SHA256_HEADER))?;
        subject.sha256 = Some(declared);
        if let Err(refused) = quota::admit(app, &name.namespace, 1, Some(0)).await
            && foreseen(app, &name, declared).await?.is_none()
        {
            return Err(refused);
        }
        let _place = app.receiving.place(headers).await?;
        let sink = app.blobs.scratch_file()?;
        let received = receive(headers, &mut body, sink, app.max_upload_bytes).await?;
        if received.hash != declared {
            return Err(ServiceError::Checksum { found: received.hash, declared });
        }
        subject.size_bytes = Some(received.size);
        let writer = identity.writer.clone();
        let origin = Origin { file_name: file_name(headers, &name.path), modified_s: now_s(), writer };
        store(app, name, received, origin).await
    }
    .await;
    match checked {
        Ok(outcome) => Ok(answer(outcome)),
        Err(error) => {
            drain(body).await;
            if error.status().is_client_error() {
                audit::refused(app, subject, identity.writer, &error).await;
            }
            Err(error)
        }
    }
}

/// 201 or 200, and what is stored.
pub(crate) fn answer(outcome: Outcome) -> (StatusCode, Json<Stored>) {
    let Outcome { artefact, new, replaced } = outcome;
    let status = if new { StatusCode::CREATED } else { StatusCode::OK };
    let stored = Stored {
        build_id: artefact.build_id,
        kind: artefact.kind,
        sha256: artefact.blob.hash.to_string(),
        size_bytes: artefact.blob.size,
        replaced: replaced.map(|hash| hash.to_string()),
    };
    (status, Json(stored))
}

/// The hash that the sender says the body has.
pub(crate) fn declared_hash(headers: &HeaderMap) -> Result<Option<ContentHash>, ServiceError> {
    let Some(value) = headers.get(SHA256_HEADER) else { return Ok(None) };
    let text = value.to_str().unwrap_or_default();
    text.parse::<ContentHash>()
        .map(Some)
        .map_err(|e| ServiceError::Malformed(format!("header {SHA256_HEADER}: {e}")))
}

/// The stated name, reduced to its last component; for sources that of the path.
pub(crate) fn file_name(headers: &HeaderMap, path: &str) -> String {
    let stated = headers.get(FILE_NAME_HEADER).and_then(|value| value.to_str().ok()).unwrap_or(path);
    let decoded = percent_encoding::percent_decode_str(stated).decode_utf8_lossy();
    base_name(&decoded)
}

/// What follows the last slash, cut to what a file system allows.
pub(crate) fn base_name(path: &str) -> String {
    let name = path.rsplit('/').next().unwrap_or_default();
    name[..name.floor_char_boundary(MAX_FILE_NAME_BYTES)].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_have_sixteen_digits() {
        assert!(unit_id("0123456789abcdef".to_owned()).is_ok());
        for bad in ["", "0123456789ABCDEF", "0123456789abcde", "0123456789abcdefg", "+123456789abcdef"] {
            assert!(unit_id(bad.to_owned()).is_err(), "{bad}");
        }
    }
}
