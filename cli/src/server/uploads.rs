//! The routes that files are uploaded by: docs/uploads.md has the contract.

use reqwest::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderMap};
use reqwest::{Method, RequestBuilder, StatusCode};
use windlass_schema::http::{
    ArtefactKind, ArtefactName, FILE_NAME_HEADER, MissingRequest, MissingResponse, SHA256_HEADER,
    UPLOAD_COMPLETE_HEADER, UPLOAD_LENGTH_HEADER, UPLOAD_LIMIT_HEADER, UPLOAD_OFFSET_HEADER,
};

use super::{Server, ServerError, percent_encoded};

/// zstd level of requests that are made in memory.
const REQUEST_LEVEL: i32 = 3;

/// How far an upload in parts is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Bytes that need not be sent again.
    pub(crate) offset: u64,
    /// The whole is stored.
    pub(crate) complete: bool,
    /// Least bytes of a part that is not the last.
    pub(crate) min_part: u64,
    /// Most bytes of a part.
    pub(crate) max_part: u64,
}

/// A part of a file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    /// Where it begins.
    pub(crate) offset: u64,
    /// Bytes of the whole file.
    pub(crate) whole: u64,
    /// It ends the file.
    pub(crate) last: bool,
}

/// What became of a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Appended {
    /// It is durable, up to this offset; or it lies elsewhere, and this is where to go on.
    GoOn(u64),
    /// All is there: stored now (true), or before.
    Stored(bool),
}

impl Server {
    /// Which of `request` the service lacks.
    pub(crate) async fn missing(&self, request: &MissingRequest) -> Result<MissingResponse, ServerError> {
        let broken = |error: String| ServerError::Body { url: self.url().to_owned(), cause: error };
        let json = serde_json::to_vec(request).map_err(|error| broken(error.to_string()))?;
        let body = zstd::encode_all(&json[..], REQUEST_LEVEL).map_err(|error| broken(error.to_string()))?;
        let request = self
            .request(Method::POST, ["api", "v1", "missing"])
            .header(CONTENT_TYPE, "application/json")
            .header(CONTENT_ENCODING, "zstd")
            .body(body);
        let answer = self.send(request).await?;
        self.json(answer).await
    }

    /// Uploads one artefact, `sha256` its hash and `name` its file's base name; `body` is compressed with zstd. Says
    /// whether it was new.
    pub(crate) async fn put(
        &self,
        artefact: &ArtefactName,
        sha256: &str,
        name: &str,
        body: reqwest::Body,
    ) -> Result<bool, ServerError> {
        let id = artefact.build_id.to_string();
        let route = ["api", "v1", "buildid", &id, artefact.kind.as_str()];
        let path = artefact.path.as_deref().into_iter();
        let path = path.flat_map(|path| path.trim_start_matches('/').split('/'));
        let request = self
            .request(Method::PUT, route.into_iter().chain(path))
            .header(CONTENT_TYPE, "application/octet-stream")
            .header(CONTENT_ENCODING, "zstd")
            .header(SHA256_HEADER, sha256)
            .header(FILE_NAME_HEADER, percent_encoded(name))
            .body(body);
        Ok(self.send(request).await?.status() == StatusCode::CREATED)
    }

    /// How far the upload in parts of this content is; none if the service takes no parts of it.
    pub(crate) async fn progress(
        &self,
        artefact: &ArtefactName,
        sha256: &str,
    ) -> Result<Option<Progress>, ServerError> {
        if matches!(artefact.kind, ArtefactKind::Source | ArtefactKind::Dwo) {
            return Ok(None);
        }
        let answer = match self.send(self.parts(Method::HEAD, artefact, sha256)).await {
            Ok(answer) => answer,
            Err(ServerError::Status {
                status: StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED | StatusCode::BAD_REQUEST,
                ..
            }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let headers = answer.headers();
        let limit = |name: &str| {
            let limits = headers.get(UPLOAD_LIMIT_HEADER)?.to_str().ok()?;
            let mut limits = limits.split(',').filter_map(|limit| limit.trim().split_once('='));
            limits.find(|(key, _)| *key == name)?.1.parse().ok()
        };
        Ok(offset(headers).map(|offset| Progress {
            offset,
            complete: headers.get(UPLOAD_COMPLETE_HEADER).is_some_and(|value| value == "?1"),
            min_part: limit("min-append-size").unwrap_or(0),
            max_part: limit("max-append-size").unwrap_or(u64::MAX),
        }))
    }

    /// Sends one part; `body` is compressed with zstd.
    pub(crate) async fn append(
        &self,
        artefact: &ArtefactName,
        sha256: &str,
        name: &str,
        part: Part,
        body: reqwest::Body,
    ) -> Result<Appended, ServerError> {
        let request = self
            .parts(Method::PATCH, artefact, sha256)
            .header(UPLOAD_OFFSET_HEADER, part.offset)
            .header(UPLOAD_LENGTH_HEADER, part.whole)
            .header(UPLOAD_COMPLETE_HEADER, if part.last { "?1" } else { "?0" })
            .header(CONTENT_TYPE, "application/partial-upload")
            .header(CONTENT_ENCODING, "zstd")
            .header(FILE_NAME_HEADER, percent_encoded(name))
            .body(body);
        let answer = request.send().await.map_err(|error| self.unreachable(&error))?;
        match (answer.status(), offset(answer.headers())) {
            (StatusCode::CREATED, _) => Ok(Appended::Stored(true)),
            (StatusCode::OK, _) => Ok(Appended::Stored(false)),
            (StatusCode::NO_CONTENT | StatusCode::CONFLICT, Some(offset)) => Ok(Appended::GoOn(offset)),
            _ => {
                let url = answer.url().to_string();
                self.check(answer).await?;
                Err(ServerError::Body { url, cause: "no Upload-Offset in the answer to a part".to_owned() })
            }
        }
    }

    fn parts(&self, method: Method, artefact: &ArtefactName, sha256: &str) -> RequestBuilder {
        let id = artefact.build_id.to_string();
        self.request(method, ["api", "v1", "uploads", &id, artefact.kind.as_str(), sha256])
    }
}

fn offset(headers: &HeaderMap) -> Option<u64> {
    headers.get(UPLOAD_OFFSET_HEADER)?.to_str().ok()?.parse().ok()
}
