//! From what went wrong to what the client is told: the one place.
//!
//! | error | status under `/api/` | on the debuginfod paths |
//! |---|---|---|
//! | malformed ID, header, query or body | 400 | 503 in elfutils' words, see module `protocol` |
//! | no, wrong or ended token | 401 | 401, with `--private` |
//! | token without the scope | 403 | 403, with `--private` |
//! | not stored | 404 | 404 `not found` |
//! | other content under the name | 409 | - |
//! | body beyond its limit, on the wire or in memory | 413 | - |
//! | namespace over its quota | 413 | - |
//! | unknown Content-Encoding | 415 | - |
//! | not what it claims, cannot be compiled | 422 | - |
//! | storage, catalog, upstream trouble | 500 | connection reset |
//! | too much at once | 503 | connection reset |
//! | no room where the service stores | 507 | connection reset |
//!
//! The last lines matter: a debuginfod client takes any status but 200 for "does not
//! exist" and believes it for ten minutes, while it retries a reset connection and remembers nothing.

use std::error::Error;
use std::io;

use axum::Json;
use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use windlass_schema::BuildIdError;
use windlass_schema::http::{ErrorBody, UPLOAD_OFFSET_HEADER, UnknownArtefactKind};

use crate::blob::BlobError;
use crate::catalog::CatalogError;
use crate::conflict::Stays;
use crate::content_hash::ContentHash;
use crate::elf::ContentError;
use crate::namespace::Namespace;
use crate::profiles::{OtlpError, TooManyParts};

/// When to try again what was too much at once, in seconds.
const BUSY_RETRY_S: u64 = 5;

/// Whatever keeps a request from its answer.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The build-ID in the path.
    #[error("{0}")]
    BuildId(#[from] BuildIdError),
    /// The kind in the path.
    #[error("{0}")]
    Kind(#[from] UnknownArtefactKind),
    /// A required header.
    #[error("the request lacks the header {0}")]
    MissingHeader(&'static str),
    /// Query, header or body that does not parse.
    #[error("{0}")]
    Malformed(String),
    /// A body that breaks off or does not decode.
    #[error("request body: {0}")]
    Body(String),
    /// A coding other than zstd and gzip.
    #[error("unknown Content-Encoding {0:?}, expected zstd or gzip")]
    Encoding(String),
    /// An OTLP request that contradicts itself.
    #[error("{0}")]
    Otlp(#[from] OtlpError),
    /// A write without a token where one is needed.
    #[error("this needs a valid token: send `Authorization: Bearer TOKEN`")]
    Unauthorized,
    /// A token that was good once.
    #[error("the token {token:?} {why}")]
    EndedToken {
        /// Its name.
        token: String,
        /// What ended it.
        why: &'static str,
    },
    /// A valid token for something else.
    #[error("this needs the scope {needed}; the token {token:?} has {scopes}")]
    Forbidden {
        /// The scope.
        needed: String,
        /// Name of the token.
        token: String,
        /// Its scopes.
        scopes: String,
    },
    /// Nothing there.
    #[error("{0}")]
    NotFound(String),
    /// Something else is there.
    #[error("{name} is stored with SHA-256 {stored}, the upload has {offered}; {stays}")]
    Conflict {
        /// Build-ID, kind and path.
        name: String,
        /// In the store.
        stored: ContentHash,
        /// In the request.
        offered: ContentHash,
        /// Which rule decided.
        stays: Stays,
    },
    /// A part that does not begin where the parts before it end.
    #[error("{durable} bytes of this upload are there: go on from there")]
    UploadOffset {
        /// In bytes.
        durable: u64,
    },
    /// More than allowed.
    #[error("the decoded body is larger than {limit} bytes, the limit")]
    TooLarge {
        /// In bytes.
        limit: u64,
    },
    /// Few bytes that decode to more than allowed.
    #[error("{0}")]
    Parts(#[from] TooManyParts),
    /// A namespace that may take no more.
    #[error(
        "the namespace {namespace} takes {used_bytes} bytes of its quota of {quota_bytes}, and this is {more_bytes} more: \
         delete what is not needed (`windlass artefacts list --namespace {namespace}`), collect it (`windlassd gc`), or raise \
         --quota"
    )]
    Quota {
        /// Whose.
        namespace: Namespace,
        /// Stored and on its way.
        used_bytes: u64,
        /// What it may take.
        quota_bytes: u64,
        /// What was to come.
        more_bytes: u64,
    },
    /// Damaged on its way.
    #[error("the body has SHA-256 {found}, its header says {declared}")]
    Checksum {
        /// Of the body.
        found: ContentHash,
        /// In the header.
        declared: ContentHash,
    },
    /// Not what its kind or build-ID says.
    #[error("{0}")]
    Content(#[from] ContentError),
    /// No table can be made.
    #[error("the unwind table cannot be compiled: {0}")]
    Compile(String),
    /// The catalog failed.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// The blob store failed.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// A local file failed.
    #[error("temporary file: {0}")]
    Io(#[from] std::io::Error),
    /// An upstream server neither has it nor says that it does not.
    #[error("upstream: {0}")]
    Upstream(String),
    /// Something else has to end first.
    #[error("too much at once: {0}; try again")]
    Busy(&'static str),
    /// A task was cut off.
    #[error("the service stops or a task of it failed")]
    Interrupted,
}

impl From<tokio::task::JoinError> for ServiceError {
    fn from(_: tokio::task::JoinError) -> Self {
        Self::Interrupted
    }
}

impl ServiceError {
    /// The table of the module.
    pub fn status(&self) -> StatusCode {
        if self.lacks_room() {
            return StatusCode::INSUFFICIENT_STORAGE;
        }
        match self {
            Self::BuildId(_)
            | Self::MissingHeader(_)
            | Self::Malformed(_)
            | Self::Body(_)
            | Self::Otlp(OtlpError::Protobuf(_) | OtlpError::Index { .. } | OtlpError::Shape { .. }) => {
                StatusCode::BAD_REQUEST
            }
            Self::Unauthorized | Self::EndedToken { .. } => StatusCode::UNAUTHORIZED,
            Self::Forbidden { .. } => StatusCode::FORBIDDEN,
            Self::Kind(_) | Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::Conflict { .. } | Self::UploadOffset { .. } => StatusCode::CONFLICT,
            Self::TooLarge { .. } | Self::Quota { .. } | Self::Parts(_) | Self::Otlp(OtlpError::Size(_)) => {
                StatusCode::PAYLOAD_TOO_LARGE
            }
            Self::Encoding(_) => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Busy(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Content(ContentError::Read(_)) => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Checksum { .. } | Self::Content(_) | Self::Compile(_) => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Catalog(_) | Self::Blob(_) | Self::Io(_) | Self::Upstream(_) | Self::Interrupted => {
                StatusCode::INTERNAL_SERVER_ERROR
            }
        }
    }
}

impl ServiceError {
    /// Whether a disk or a quota of the service is full.
    fn lacks_room(&self) -> bool {
        let mut cause: Option<&(dyn Error + 'static)> = Some(self);
        while let Some(error) = cause {
            let io = error.downcast_ref::<io::Error>().map(io::Error::kind);
            if matches!(io, Some(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)) {
                return true;
            }
            let sqlite = error.downcast_ref::<rusqlite::Error>().and_then(rusqlite::Error::sqlite_error_code);
            if sqlite == Some(rusqlite::ErrorCode::DiskFull) {
                return true;
            }
            cause = error.source();
        }
        false
    }
}

/// The answer under `/api/`.
impl IntoResponse for ServiceError {
    fn into_response(self) -> Response {
        let status = self.status();
        if status.is_server_error() {
            tracing::error!("{self}");
        }
        let mut text = self.to_string();
        if status == StatusCode::INSUFFICIENT_STORAGE {
            text = format!("no room where the service stores, nothing of this request was kept: {text}");
        }
        let mut response = (status, Json(ErrorBody { error: text })).into_response();
        response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Self::UploadOffset { durable } = self {
            response.headers_mut().insert(UPLOAD_OFFSET_HEADER, HeaderValue::from(durable));
        }
        if status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(BUSY_RETRY_S));
        }
        if status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// An answer that never arrives: its body fails before the head is sent, and the connection
/// loop resets the connection (see module `connection`).
pub fn reset() -> Response {
    Response::new(Body::from_stream(stream::once(async {
        Err::<bytes::Bytes, _>(std::io::Error::other("transient trouble"))
    })))
}
