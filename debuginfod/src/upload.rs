//! `PUT /api/v1/buildid/ID/KIND`: an artefact comes in.
//!
//! Sentry's uploads stay PENDING up to an hour, Parca's are three calls of which the last can be lost,
//! and a stripped file can shadow a good one. Here an upload is one request whose answer is
//! final: 201 or 200 means checked, durable and served from now on.

use std::fs::File;
use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use memmap2::Mmap;
use windlass_schema::BuildId;
use windlass_schema::http::{ArtefactKind, FILE_NAME_HEADER, SHA256_HEADER, Stored};

use crate::blob::{Blob, map_private};
use crate::catalog::{Artefact, Put};
use crate::content_hash::ContentHash;
use crate::elf;
use crate::error::ServiceError;
use crate::intake::{Received, drain, receive};
use crate::service::{App, now_s};

/// Longest source path in bytes: Linux's `PATH_MAX`.
const MAX_PATH_BYTES: usize = 4096;
/// Longest file name in bytes: Linux's `NAME_MAX`. Longer ones are cut.
const MAX_FILE_NAME_BYTES: usize = 255;

type Answer = Result<(StatusCode, Json<Stored>), ServiceError>;

/// Where a file comes from, beside its bytes.
pub(crate) struct Origin {
    /// Base name, possibly empty.
    pub(crate) file_name: String,
    /// Seconds since 1970.
    pub(crate) modified_s: u64,
}

/// An ELF file or kernel symbols.
pub(crate) async fn artefact(
    State(app): State<Arc<App>>,
    Path((id, kind)): Path<(String, String)>,
    headers: HeaderMap,
    body: Body,
) -> Answer {
    let name = id.parse::<BuildId>().map_err(ServiceError::from).and_then(|id| {
        let kind: ArtefactKind = kind.parse()?;
        if kind == ArtefactKind::Source {
            return Err(ServiceError::Malformed(
                "a source is uploaded to .../source/ABSOLUTE/PATH".to_owned(),
            ));
        }
        Ok((id, kind, String::new()))
    });
    upload(&app, name, &headers, body).await
}

/// A source file.
pub(crate) async fn source(
    State(app): State<Arc<App>>,
    Path((id, path)): Path<(String, String)>,
    headers: HeaderMap,
    body: Body,
) -> Answer {
    let name = id.parse::<BuildId>().map_err(ServiceError::from).and_then(|id| {
        let path = format!("/{path}");
        if path.len() > MAX_PATH_BYTES || path.contains('\0') {
            return Err(ServiceError::Malformed(format!(
                "source path of {} bytes or with a zero byte, at most {MAX_PATH_BYTES} are allowed",
                path.len()
            )));
        }
        Ok((id, ArtefactKind::Source, path))
    });
    upload(&app, name, &headers, body).await
}

async fn upload(
    app: &Arc<App>,
    name: Result<(BuildId, ArtefactKind, String), ServiceError>,
    headers: &HeaderMap,
    body: Body,
) -> Answer {
    let mut body = body.into_data_stream();
    let checked = async {
        app.access.check_write(headers)?;
        let (id, kind, path) = name?;
        let declared = declared_hash(headers)?;
        let sink = app.blobs.scratch_file()?;
        let received = receive(headers, &mut body, sink, app.max_upload_bytes).await?;
        if received.hash != declared {
            return Err(ServiceError::Checksum { found: received.hash, declared });
        }
        let origin = Origin { file_name: file_name(headers, &path), modified_s: now_s() };
        store(app, id, kind, path, received, origin).await
    }
    .await;
    match checked {
        Ok((put, artefact)) => {
            let status = if put { StatusCode::CREATED } else { StatusCode::OK };
            let stored = Stored {
                build_id: artefact.build_id,
                kind: artefact.kind,
                sha256: artefact.blob.hash.to_string(),
                size_bytes: artefact.blob.size,
            };
            Ok((status, Json(stored)))
        }
        Err(error) => {
            drain(body).await;
            Err(error)
        }
    }
}

fn declared_hash(headers: &HeaderMap) -> Result<ContentHash, ServiceError> {
    let value = headers.get(SHA256_HEADER).ok_or(ServiceError::MissingHeader(SHA256_HEADER))?;
    let text = value.to_str().unwrap_or_default();
    text.parse().map_err(|e| ServiceError::Malformed(format!("header {SHA256_HEADER}: {e}")))
}

/// The stated name, reduced to its last component; for sources that of the path.
fn file_name(headers: &HeaderMap, path: &str) -> String {
    let stated = headers.get(FILE_NAME_HEADER).and_then(|value| value.to_str().ok()).unwrap_or(path);
    let decoded = percent_encoding::percent_decode_str(stated).decode_utf8_lossy();
    base_name(&decoded)
}

/// What follows the last slash, cut to what a file system allows.
pub(crate) fn base_name(path: &str) -> String {
    let name = path.rsplit('/').next().unwrap_or_default();
    name[..name.floor_char_boundary(MAX_FILE_NAME_BYTES)].to_owned()
}

/// Checks a received file, stores it and records it. Tells whether it is new, and what is stored.
pub(crate) async fn store(
    app: &Arc<App>,
    build_id: BuildId,
    kind: ArtefactKind,
    path: String,
    received: Received<File>,
    origin: Origin,
) -> Result<(bool, Artefact), ServiceError> {
    let Received { sink, hash, size } = received;
    if let Some(present) = app.artefact(build_id, kind, &path).await?
        && present.path == path
        && !present.damaged
    {
        return settle(present, hash);
    }
    let (facts, content) = tokio::task::spawn_blocking(move || -> Result<(_, Mmap), ServiceError> {
        let content = map_private(&sink)?;
        Ok((elf::check(&content, kind, build_id)?, content))
    })
    .await??;
    let blob = match app.catalog(move |catalog| catalog.blob(hash)).await? {
        Some(blob) => blob,
        None => app.blobs.put(Arc::new(content), hash).await?,
    };
    debug_assert_eq!(blob.size, size, "the same hash is the same content");
    let Origin { file_name, modified_s } = origin;
    let artefact = Artefact { build_id, kind, path, blob, file_name, modified_s, facts, damaged: false };
    let row = artefact.clone();
    let put = app.catalog(move |catalog| catalog.put_artefact(&row)).await?;
    app.upstreams.forget(build_id);
    match put {
        Put::Stored => Ok((true, artefact)),
        Put::Present(blob) => settle(Artefact { blob, ..artefact }, hash),
    }
}

/// Something sound is stored under the name already. The same content is welcome; of skeletons and kernel symbols
/// the first is as good as any, since both are cut from the same image on different hosts.
fn settle(present: Artefact, offered: ContentHash) -> Result<(bool, Artefact), ServiceError> {
    let interchangeable = matches!(present.kind, ArtefactKind::Skeleton | ArtefactKind::Kallsyms);
    if present.blob.hash == offered || interchangeable {
        return Ok((false, present));
    }
    let Artefact { build_id, kind, path, blob: Blob { hash: stored, .. }, .. } = present;
    Err(ServiceError::Conflict { name: format!("{kind}{path} of build-ID {build_id}"), stored, offered })
}
