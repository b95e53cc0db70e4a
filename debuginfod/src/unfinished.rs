//! `/api/v1/uploads/ID/KIND/SHA256`: a large artefact comes in parts, over as many connections as it takes.
//!
//! A break in the fourth gigabyte should not cost four gigabytes. What others do: tus and S3 hand out an ID at the start, which
//! is lost with the process that asked for it, and sentry-cli cuts files into chunks of its own naming. Here the name of an
//! upload is what is uploaded and the SHA-256 of its content, so whoever has the file knows how to go on, at any replica: a
//! part is a blob in the store and a row in the catalog, and nothing else is kept. Methods and header fields are those of the
//! IETF's "Resumable Uploads for HTTP" (draft-ietf-httpbis-resumable-upload-15); `docs/uploads.md` is the contract.
//!
//! 1. A part is received into a scratch file and checked against its bounds, as a whole or not at all.
//! 2. It is stored as a blob, then recorded, if no other part came to lie there meanwhile. Now it is durable: 204.
//! 3. With the last part the whole is put together in a scratch file, its hash checked, and stored as if it had come at once;
//!    the parts are forgotten when that is final, and their blobs left to be collected.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Extension, Path, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use sha2::{Digest, Sha256};
use windlass_schema::http::{
    UPLOAD_COMPLETE_HEADER, UPLOAD_LENGTH_HEADER, UPLOAD_LIMIT_HEADER, UPLOAD_OFFSET_HEADER,
};

use crate::access::Identity;
use crate::audit;
use crate::blob::BlobError;
use crate::catalog::{Appended, Name, Part, Subject, UploadName};
use crate::content::{Content, FileContent};
use crate::content_hash::ContentHash;
use crate::error::ServiceError;
use crate::holding::hold;
use crate::intake::{Received, drain, receive};
use crate::quota;
use crate::service::{App, now_s};
use crate::storing::{Origin, foreseen, store};
use crate::upload::{answer, declared_hash, file_name, named};

/// Fewest decoded bytes of a part that is not the last: 1 MiB, so that an upload of the largest size has some thousand rows.
const MIN_PART_BYTES: u64 = 1 << 20;
/// Most decoded bytes of a part: 64 MiB, what a broken connection costs at most, a minute of a line of 10 Mbit/s.
const MAX_PART_BYTES: u64 = 64 << 20;
/// How long after its last part an unfinished upload stays, in seconds: a week, so that a build that failed on Friday is
/// finished on Monday.
pub(crate) const MAX_AGE_S: u64 = 7 * 24 * 3600;
/// Bytes copied at once while the whole is put together.
const COPY_BYTES: usize = 1 << 20;

type Answer = Result<Response, ServiceError>;
type UploadPath = Path<(String, String, String)>;

/// An upload in parts, by its path.
struct Upload {
    name: Name,
    /// Of the whole.
    hash: ContentHash,
}

impl Upload {
    fn parse(
        app: &App,
        identity: &Identity,
        headers: &HeaderMap,
        Path((id, kind, sha256)): UploadPath,
    ) -> Result<Self, ServiceError> {
        let name = named(&id, &kind, identity.namespace(headers, &app.namespaces)?)?;
        let hash =
            sha256.parse::<ContentHash>().map_err(|e| ServiceError::Malformed(format!("upload: {e}")))?;
        Ok(Self { name, hash })
    }

    fn key(&self) -> UploadName {
        let Name { build_id, kind, ref namespace, .. } = self.name;
        UploadName { build_id, kind, namespace: namespace.clone(), sha256: self.hash }
    }

    async fn parts(&self, app: &App) -> Result<Vec<Part>, ServiceError> {
        let key = self.key();
        app.catalog(move |catalog| catalog.parts(&key)).await
    }

    async fn forget(&self, app: &App) -> Result<(), ServiceError> {
        let key = self.key();
        app.catalog(move |catalog| catalog.forget_upload(&key)).await
    }
}

/// What a part says of itself.
struct Announced {
    offset: u64,
    length: u64,
    complete: bool,
}

impl Announced {
    fn parse(headers: &HeaderMap) -> Result<Self, ServiceError> {
        let text = |name: &'static str| match headers.get(name) {
            Some(value) => Ok(value.to_str().unwrap_or_default().trim()),
            None => Err(ServiceError::MissingHeader(name)),
        };
        let number = |name: &'static str| {
            let text = text(name)?;
            text.parse::<u64>().map_err(|_| {
                ServiceError::Malformed(format!("header {name}: {text:?} is no number of bytes"))
            })
        };
        let complete = match text(UPLOAD_COMPLETE_HEADER)? {
            "?1" => true,
            "?0" => false,
            other => {
                let why = format!("header {UPLOAD_COMPLETE_HEADER}: {other:?}, expected ?1 or ?0");
                return Err(ServiceError::Malformed(why));
            }
        };
        let (offset, length) = (number(UPLOAD_OFFSET_HEADER)?, number(UPLOAD_LENGTH_HEADER)?);
        if offset > length {
            return Err(ServiceError::Malformed(format!("a part at {offset} of {length} bytes")));
        }
        Ok(Self { offset, length, complete })
    }

    /// Whether a part of `size` bytes is what was announced.
    fn check(&self, size: u64) -> Result<(), ServiceError> {
        let left = self.length - self.offset;
        if self.complete && size != left {
            let why = format!("the last part has {size} bytes, and {left} are left");
            return Err(ServiceError::Malformed(why));
        }
        if !self.complete && (size < MIN_PART_BYTES || size >= left) {
            let why = format!(
                "a part of {size} bytes where {left} are left: all but the last have {MIN_PART_BYTES} to \
                 {MAX_PART_BYTES}"
            );
            return Err(ServiceError::Malformed(why));
        }
        Ok(())
    }
}

/// `HEAD`: how far it is.
pub(crate) async fn progress(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    headers: HeaderMap,
    path: UploadPath,
) -> Answer {
    let upload = Upload::parse(&app, &identity, &headers, path)?;
    let (offset, complete) = match foreseen(&app, &upload.name, upload.hash).await? {
        Some(outcome) => (outcome.artefact.blob.size, true),
        None => (upload.parts(&app).await?.last().map_or(0, Part::end), false),
    };
    let limit = format!(
        "max-size={}, min-append-size={MIN_PART_BYTES}, max-append-size={MAX_PART_BYTES}, max-age={MAX_AGE_S}",
        app.max_upload_bytes
    );
    let mut response = (
        StatusCode::NO_CONTENT,
        [(header::CACHE_CONTROL, "no-store"), (header::ACCEPT, "application/partial-upload")],
        [(UPLOAD_COMPLETE_HEADER, if complete { "?1" } else { "?0" })],
        [(UPLOAD_LIMIT_HEADER, limit)],
    )
        .into_response();
    response.headers_mut().insert(UPLOAD_OFFSET_HEADER, HeaderValue::from(offset));
    Ok(response)
}

/// `DELETE`: gives the parts up.
pub(crate) async fn forget(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    headers: HeaderMap,
    path: UploadPath,
) -> Answer {
    Upload::parse(&app, &identity, &headers, path)?.forget(&app).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// `PATCH`: appends a part.
pub(crate) async fn append(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    headers: HeaderMap,
    path: UploadPath,
    body: Body,
) -> Answer {
    let mut body = body.into_data_stream();
    let appended = async {
        let upload = Upload::parse(&app, &identity, &headers, path)?;
        let announced = Announced::parse(&headers)?;
        if announced.length > app.max_upload_bytes {
            return Err(ServiceError::TooLarge { limit: app.max_upload_bytes });
        }
        if let Some(outcome) = foreseen(&app, &upload.name, upload.hash).await? {
            upload.forget(&app).await?;
            return Ok(answer(outcome).into_response());
        }
        let parts = upload.parts(&app).await?;
        let durable = parts.last().map_or(0, Part::end);
        if durable != announced.offset {
            return Err(ServiceError::UploadOffset { durable });
        }
        if let Some(total) = parts.first().map(|part| part.total).filter(|total| *total != announced.length) {
            return Err(other_total(announced.length, total));
        }
        // All that is still to come must fit, or nothing of it need be sent.
        quota::admit(&app, &upload.name.namespace, announced.length, Some(durable)).await?;
        let _place = app.receiving.place(&headers).await?;
        let sink = app.blobs.scratch_file()?;
        let part = receive(&headers, &mut body, sink, MAX_PART_BYTES).await?;
        announced.check(part.size)?;
        if let Some(declared) = declared_hash(&headers)?.filter(|declared| *declared != part.hash) {
            let why = format!("the part has SHA-256 {}, its header says {declared}", part.hash);
            return Err(ServiceError::Body(why));
        }
        if announced.complete {
            finish(&app, &identity, &upload, parts, part, &headers).await
        } else {
            keep(&app, &upload, &announced, part).await
        }
    }
    .await;
    // An answer before the end of the body would be lost with the connection.
    drain(body).await;
    appended
}

fn other_total(stated: u64, before: u64) -> ServiceError {
    ServiceError::Malformed(format!(
        "header {UPLOAD_LENGTH_HEADER}: {stated}, with the parts before it was {before} (DELETE gives them up)"
    ))
}

/// Stores and records a part.
async fn keep(app: &App, upload: &Upload, announced: &Announced, part: Received<File>) -> Answer {
    let hash = part.hash;
    let held = hold(app, Arc::new(FileContent::new(part.sink, part.size)), hash).await?;
    let (blob, key) = (held.blob()?, upload.key());
    let row = Part { start: announced.offset, blob, total: announced.length, received_s: now_s() };
    match app.catalog(move |catalog| catalog.append_part(&key, &row)).await? {
        Appended::Yes => {
            let offset = [(UPLOAD_OFFSET_HEADER, row.end().to_string())];
            Ok((StatusCode::NO_CONTENT, offset, [(UPLOAD_COMPLETE_HEADER, "?0")]).into_response())
        }
        Appended::At(durable) => Err(ServiceError::UploadOffset { durable }),
        Appended::OtherTotal(total) => Err(other_total(announced.length, total)),
    }
}

/// Puts the whole together and stores it. What is final gives the parts up, whether it is good or bad.
async fn finish(
    app: &Arc<App>,
    identity: &Identity,
    upload: &Upload,
    parts: Vec<Part>,
    last: Received<File>,
    headers: &HeaderMap,
) -> Answer {
    let whole = match assemble(app, parts, last).await {
        Ok(whole) => whole,
        Err(ServiceError::Blob(BlobError::Damaged { hash, why })) => {
            app.mark_damaged(hash).await?;
            upload.forget(app).await?;
            return Err(BlobError::Damaged { hash, why }.into());
        }
        Err(error) => return Err(error),
    };
    if whole.hash != upload.hash {
        upload.forget(app).await?;
        return Err(ServiceError::Checksum { found: whole.hash, declared: upload.hash });
    }
    let writer = identity.writer.clone();
    let origin = Origin { file_name: file_name(headers, ""), modified_s: now_s(), writer };
    let size = whole.size;
    let stored = store(app, upload.name.clone(), whole, origin).await;
    if let Err(error) = &stored
        && error.status().is_client_error()
    {
        let subject = Subject { sha256: Some(upload.hash), size_bytes: Some(size), ..upload.name.subject() };
        audit::refused(app, subject, identity.writer.clone(), error).await;
    }
    if stored.as_ref().map_or_else(|error| error.status().is_client_error(), |_| true) {
        upload.forget(app).await?;
    }
    Ok(answer(stored?).into_response())
}

/// The parts and the last one in one scratch file, with its hash.
async fn assemble(app: &App, parts: Vec<Part>, last: Received<File>) -> Result<Received<File>, ServiceError> {
    if parts.is_empty() {
        return Ok(last);
    }
    let mut whole = (app.blobs.scratch_file()?, Sha256::new(), 0);
    for part in parts {
        let mut pieces = std::pin::pin!(app.blobs.stream(part.blob, 0..part.blob.size));
        while let Some(piece) = pieces.next().await.transpose()? {
            whole = tokio::task::spawn_blocking(move || write(whole, &piece)).await??;
        }
    }
    let assembled = tokio::task::spawn_blocking(move || -> std::io::Result<_> {
        let last = FileContent::new(last.sink, last.size);
        let mut buffer = vec![0; COPY_BYTES];
        let mut at = 0;
        while at < last.size() {
            let count = (last.size() - at).min(COPY_BYTES as u64) as usize;
            last.read_at(&mut buffer[..count], at)?;
            whole = write(whole, &buffer[..count])?;
            at += count as u64;
        }
        let (sink, hasher, size) = whole;
        Ok(Received { sink, hash: ContentHash::new(hasher.finalize().into()), size })
    });
    Ok(assembled.await??)
}

fn write(
    (mut file, mut hasher, size): (File, Sha256, u64),
    piece: &[u8],
) -> std::io::Result<(File, Sha256, u64)> {
    file.write_all(piece)?;
    hasher.update(piece);
    Ok((file, hasher, size + piece.len() as u64))
}
