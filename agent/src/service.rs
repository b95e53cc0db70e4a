//! What does the agent ask of the service, and what may the answers be?
//!
//! Each interface is one function with a closed set of answers. A failure is either transient (the
//! network, an overloaded or restarting server: try again later) or a refusal (try never), and that is
//! decided here alone: peers that retry refusals flood their servers, those that give up on a timeout
//! lose data. Only the service itself refuses, and its errors are an [`ErrorBody`] (or ask for a token):
//! a gateway in front of it that answers 404 while the service moves has no say in what becomes of anything.

use std::sync::Arc;
use std::time::Duration;

use reqwest::header::{
    ACCEPT, AUTHORIZATION, CONTENT_ENCODING, CONTENT_TYPE, ETAG, IF_NONE_MATCH, LOCATION, RETRY_AFTER,
};
use reqwest::{RequestBuilder, Response, StatusCode};
use sha2::{Digest as _, Sha256};
use tokio::time::error::Elapsed;
use tokio::time::{Instant, timeout_at};
use windlass_schema::BuildId;
use windlass_schema::http::{
    ArtefactKind, ArtefactName, ErrorBody, MissingRequest, MissingResponse, SHA256_HEADER, UNWIND_WIRE_TYPE,
};

use crate::compression::Compression;
use crate::metrics::{Metrics, Request};
use crate::packed_skeleton::PackedSkeleton;
use crate::spool::EncodedBatch;
use crate::token::Token;

/// Largest table taken, in bytes: as much as the chunks in the kernel hold.
pub const MAX_TABLE_BYTES: usize = 64 * 1024 * 1024;
/// How long a connection may take to come up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long an answer may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Slowest transfer of a table that is waited for, in bytes a second: a large table, of 2 MiB, takes half a minute.
/// One of some bytes a second would keep a worker from all others for hours.
const SLOWEST_TABLE: usize = 64 * 1024;
/// How long the largest table may take.
const TABLE_TIMEOUT: Duration =
    Duration::from_secs(ANSWER_TIMEOUT.as_secs() + (MAX_TABLE_BYTES / SLOWEST_TABLE) as u64);
/// Slowest transfer of a batch that is waited for, in bytes a second.
const SLOWEST_BATCH: usize = 256 * 1024;
/// How long a large upload may take: the largest skeleton, at 320 KiB/s.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(128);
/// Most bytes taken of an answer that is no table, unpacked: the ten lines of an error, one artefact's name. What a few
/// kilobytes unpack to has no end.
const MAX_ANSWER_BYTES: usize = 64 * 1024;
/// What the service answers to a batch that it will never take, in [`ErrorBody`], and to a token that it does not take. With
/// any other status it does not speak of the batch: an older or a newer service has no such route (404).
const OF_A_BATCH: [u16; 6] = [400, 401, 403, 413, 415, 422];
/// How the paths of all routes begin.
const ROUTES: [&str; 2] = ["/api/v1/", "/v1development/"];
/// Longest part of an error text that is kept.
const MAX_REASON_BYTES: usize = 500;

/// The service.
#[derive(Clone)]
pub struct Service {
    base: String,
    http: reqwest::Client,
    token: Token,
    metrics: Arc<Metrics>,
}

/// Answer to a request for a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TableAnswer {
    /// A table.
    Table {
        /// What was sent, unchecked: its wire form, if the service has it.
        sent: Vec<u8>,
        /// By what the service tells it from others (RFC 9110, 8.8.3).
        tag: Option<String>,
    },
    /// The one with the tag that was named.
    Unchanged,
    /// It is being made.
    Making {
        /// When to ask again.
        retry_after: Option<Duration>,
    },
    /// Nothing is known of the image.
    UnknownImage,
}

/// The service did not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ServiceError {
    /// No connection, or a redirection to another address.
    #[error("service cannot be reached: {0}")]
    Unreachable(String),
    /// A connection, but no whole answer in time, or that of something else.
    #[error("service does not answer: {0}")]
    NoAnswer(String),
    /// An answer that may be another later.
    #[error("service is not able to answer (status {status}): {reason}")]
    Busy {
        /// HTTP status.
        status: u16,
        /// What it said.
        reason: String,
        /// When to ask again.
        retry_after: Option<Duration>,
    },
    /// An answer that stands.
    #[error("service refused with status {status}: {reason}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// What it said.
        reason: String,
    },
    /// The address is no HTTP URL, or TLS cannot be set up.
    #[error("{0}")]
    Client(String),
}

impl ServiceError {
    /// Whether the same request may succeed later.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unreachable(_) | Self::NoAnswer(_) | Self::Busy { .. })
    }

    /// Whether it may once the service or its operator has mended something: a token that is missing or wrong (401,
    /// 403) gets mended.
    pub fn is_for_later(&self) -> bool {
        self.is_transient() || matches!(self, Self::Refused { status: 401 | 403, .. })
    }

    /// Whether the service failed at this request (500), and not at all that come (503).
    pub fn is_of_service(&self) -> bool {
        matches!(self, Self::Busy { status: 500, .. })
    }

    /// When the service wants to be asked again.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Busy { retry_after, .. } => *retry_after,
            Self::Unreachable(_) | Self::NoAnswer(_) | Self::Refused { .. } | Self::Client(_) => None,
        }
    }
}

/// What rustls says first of a certificate that it does not take (`Error::InvalidCertificate`). Between it and the error that
/// comes here lie types that hide it, and hand on its text.
const UNTRUSTED: &str = "invalid peer certificate";

impl From<reqwest::Error> for ServiceError {
    fn from(error: reqwest::Error) -> Self {
        // reqwest's own text repeats the URL and hides the cause in its sources.
        let mut text = String::new();
        let mut source = std::error::Error::source(&error);
        while let Some(inner) = source {
            text = inner.to_string();
            source = inner.source();
        }
        let connecting = error.is_connect();
        if text.contains(UNTRUSTED) {
            let origin = error.url().map(|url| url.origin().ascii_serialization()).unwrap_or_default();
            return Self::Unreachable(format!(
                "the certificate of {origin} is not trusted ({text}): if it is of a CA of your own, add that to the certificates of \
                 this machine, or name its file in SSL_CERT_FILE"
            ));
        }
        let text = if text.is_empty() { error.without_url().to_string() } else { text };
        if connecting { Self::Unreachable(text) } else { Self::NoAnswer(text) }
    }
}

impl Service {
    /// A client of the service at `url`, whose requests `metrics` counts.
    pub fn new(url: &str, token: Token, metrics: Arc<Metrics>) -> Result<Self, ServiceError> {
        // Whoever came first decided; any provider will do.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let parsed = reqwest::Url::parse(url)
            .map_err(|error| ServiceError::Client(format!("service address {url:?}: {error}")))?;
        if !matches!(parsed.scheme(), "http" | "https") {
            return Err(ServiceError::Client(format!("service address {url:?} is no http or https address")));
        }
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(ANSWER_TIMEOUT)
            // A POST would go on as a GET (301, 302), and a token elsewhere.
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("windlass-agent/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| ServiceError::Client(error.to_string()))?;
        Ok(Self { base: url.trim_end_matches('/').to_owned(), http, token, metrics })
    }

    /// The answer to a request, counted.
    async fn counted<T>(
        &self,
        request: Request,
        answer: impl Future<Output = Result<T, ServiceError>>,
    ) -> Result<T, ServiceError> {
        let answer = answer.await;
        self.metrics.request(request, answer.as_ref().err());
        answer
    }

    async fn send(&self, request: RequestBuilder) -> Result<Response, ServiceError> {
        let token = self.token.current();
        // Bodies are in memory, and shared.
        let again = request.try_clone();
        let mut response = authorized(request, token.as_deref()).send().await?;
        let mut status = response.status();
        if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
            && let Some(again) = again
            && let Some(renewed) = self.token.renewed(token.as_deref()).await
        {
            response = authorized(again, Some(&renewed)).send().await?;
            status = response.status();
        }
        if !status.is_success() && status != StatusCode::NOT_MODIFIED {
            return Err(failure(response).await);
        }
        if is_web_page(&response) { Err(web_page(status)) } else { Ok(response) }
    }

    /// `GET /api/v1/buildid/ID/unwind`, unless it is the one with the tag `known`.
    pub async fn table(&self, id: BuildId, known: Option<&str>) -> Result<TableAnswer, ServiceError> {
        self.counted(Request::Table, self.table_uncounted(id, known)).await
    }

    async fn table_uncounted(&self, id: BuildId, known: Option<&str>) -> Result<TableAnswer, ServiceError> {
        let url = format!("{}/api/v1/buildid/{id}/unwind", self.base);
        let mut request = self.http.get(url).header(ACCEPT, UNWIND_WIRE_TYPE).timeout(TABLE_TIMEOUT);
        if let Some(known) = known {
            request = request.header(IF_NONE_MATCH, known);
        }
        let asked = Instant::now();
        let answer = timeout_at(asked + ANSWER_TIMEOUT, self.send(request)).await.map_err(too_slow)?;
        let mut response = match answer {
            Err(ServiceError::Refused { status: 404, .. }) => return Ok(TableAnswer::UnknownImage),
            answer => answer?,
        };
        match response.status() {
            StatusCode::ACCEPTED => {
                return Ok(TableAnswer::Making { retry_after: retry_after(&response) });
            }
            StatusCode::NOT_MODIFIED if known.is_some() => return Ok(TableAnswer::Unchanged),
            StatusCode::OK => {}
            _ => return Err(failure(response).await),
        }
        let tag = response.headers().get(ETAG).and_then(|tag| tag.to_str().ok()).map(str::to_owned);
        match up_to(&mut response, MAX_TABLE_BYTES, asked).await? {
            (sent, true) => Ok(TableAnswer::Table { sent, tag }),
            (_, false) => Err(too_long(&format!("its table of {id}"), MAX_TABLE_BYTES)),
        }
    }

    /// `PUT /api/v1/buildid/ID/KIND`. That other content is already there (409) is no failure: the
    /// service has what it needs.
    pub async fn put(&self, id: BuildId, kind: ArtefactKind, content: Vec<u8>) -> Result<(), ServiceError> {
        self.counted(Request::Upload, self.put_uncounted(id, kind, content)).await
    }

    async fn put_uncounted(
        &self,
        id: BuildId,
        kind: ArtefactKind,
        content: Vec<u8>,
    ) -> Result<(), ServiceError> {
        let (sha256, body) =
            tokio::task::spawn_blocking(move || (sha256_hex(&content), Compression::Zstd.compress(&content)))
                .await
                .map_err(|error| ServiceError::Client(error.to_string()))?;
        let body = body.map_err(|error| ServiceError::Client(error.to_string()))?;
        self.put_compressed(id, kind, sha256, body).await
    }

    /// `PUT /api/v1/buildid/ID/skeleton`.
    pub async fn put_skeleton(&self, id: BuildId, skeleton: PackedSkeleton) -> Result<(), ServiceError> {
        let PackedSkeleton { sha256, zstd } = skeleton;
        let put = self.put_compressed(id, ArtefactKind::Skeleton, sha256, zstd);
        self.counted(Request::Upload, put).await
    }

    async fn put_compressed(
        &self,
        id: BuildId,
        kind: ArtefactKind,
        sha256: String,
        body: Vec<u8>,
    ) -> Result<(), ServiceError> {
        let url = format!("{}/api/v1/buildid/{id}/{kind}", self.base);
        let request = self
            .http
            .put(url)
            .timeout(UPLOAD_TIMEOUT)
            .header(SHA256_HEADER, sha256)
            .header(CONTENT_ENCODING, Compression::Zstd.as_str())
            .header(CONTENT_TYPE, "application/octet-stream")
            .body(body);
        match self.send(request).await {
            Ok(response) if response.status().is_success() => Ok(()),
            Ok(response) => Err(failure(response).await),
            Err(ServiceError::Refused { status: 409, .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// `POST /api/v1/missing`, for one artefact: whether the service lacks it.
    pub async fn lacks(&self, id: BuildId, kind: ArtefactKind) -> Result<bool, ServiceError> {
        self.counted(Request::Missing, self.lacks_uncounted(id, kind)).await
    }

    async fn lacks_uncounted(&self, id: BuildId, kind: ArtefactKind) -> Result<bool, ServiceError> {
        let name = ArtefactName { build_id: id, kind, path: None, sha256: None, brings: None };
        let request = MissingRequest { artefacts: vec![name.clone()] };
        let url = format!("{}/api/v1/missing", self.base);
        let mut response = self.send(self.http.post(url).json(&request)).await?;
        if response.status() != StatusCode::OK {
            return Err(failure(response).await);
        }
        let (answer, is_whole) = up_to(&mut response, MAX_ANSWER_BYTES, Instant::now()).await?;
        if !is_whole {
            return Err(too_long("its answer", MAX_ANSWER_BYTES));
        }
        let answer: MissingResponse = serde_json::from_slice(&answer)
            .map_err(|error| ServiceError::NoAnswer(format!("its answer is malformed: {error}")))?;
        Ok(answer.missing.contains(&name))
    }

    /// `POST /v1development/profiles`. Refused is only what the service says of the batch itself.
    pub async fn ship(&self, batch: EncodedBatch) -> Result<(), ServiceError> {
        self.counted(Request::Profiles, self.ship_uncounted(batch)).await
    }

    async fn ship_uncounted(&self, batch: EncodedBatch) -> Result<(), ServiceError> {
        match self.send(self.profiles(batch)).await {
            Ok(response) if response.status().is_success() => Ok(()),
            Ok(response) => Err(failure(response).await),
            Err(ServiceError::Refused { status, reason }) if !OF_A_BATCH.contains(&status) => {
                Err(ServiceError::Busy { status, reason, retry_after: None })
            }
            Err(error) => Err(error),
        }
    }

    fn profiles(&self, batch: EncodedBatch) -> RequestBuilder {
        self.http
            .post(format!("{}/v1development/profiles", self.base))
            .timeout(batch_timeout(batch.bytes.len()))
            .header(CONTENT_TYPE, "application/x-protobuf")
            .header(CONTENT_ENCODING, batch.compression.as_str())
            .body(batch.bytes)
    }
}

fn authorized(request: RequestBuilder, token: Option<&str>) -> RequestBuilder {
    match token {
        Some(token) => request.header(AUTHORIZATION, format!("Bearer {token}")),
        None => request,
    }
}

/// How long a batch of so many bytes may take.
pub(crate) const fn batch_timeout(bytes: usize) -> Duration {
    Duration::from_secs(ANSWER_TIMEOUT.as_secs() + bytes.div_ceil(SLOWEST_BATCH) as u64)
}

fn too_slow(_: Elapsed) -> ServiceError {
    ServiceError::NoAnswer(format!(
        "it takes longer than {ANSWER_TIMEOUT:?} and a second for each {SLOWEST_TABLE} bytes"
    ))
}

/// Whether an answer is for people. No interface of the service has such.
fn is_web_page(response: &Response) -> bool {
    let content_type = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    content_type.is_some_and(|value| value.trim_start().to_ascii_lowercase().starts_with("text/html"))
}

fn sha256_hex(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `Retry-After` in seconds; the form with a date is not used between programs.
fn retry_after(response: &Response) -> Option<Duration> {
    let text = response.headers().get(RETRY_AFTER)?.to_str().ok()?;
    text.trim().parse().ok().map(Duration::from_secs)
}

/// The body of an answer that was `asked` for then, up to `limit` bytes, unpacked, and whether that is all of it.
async fn up_to(
    response: &mut Response,
    limit: usize,
    asked: Instant,
) -> Result<(Vec<u8>, bool), ServiceError> {
    let mut body = Vec::new();
    loop {
        let allowed = Duration::from_secs((body.len() / SLOWEST_TABLE) as u64);
        let part = timeout_at(asked + ANSWER_TIMEOUT + allowed, response.chunk());
        let Some(part) = part.await.map_err(too_slow)?? else { return Ok((body, true)) };
        let taken = part.len().min(limit - body.len());
        body.extend_from_slice(&part[..taken]);
        if taken < part.len() {
            return Ok((body, false));
        }
    }
}

fn too_long(what: &str, limit: usize) -> ServiceError {
    ServiceError::Refused { status: StatusCode::OK.as_u16(), reason: format!("{what} exceeds {limit} bytes") }
}

/// What an answer means that is not the one that was asked for.
async fn failure(response: Response) -> ServiceError {
    let (status, retry_after) = (response.status(), retry_after(&response));
    if let Some(advice) = redirection(&response) {
        return ServiceError::Unreachable(advice);
    }
    let is_page = is_web_page(&response);
    let (reason, is_own) = stated(response).await;
    match status {
        _ if status.is_server_error() => ServiceError::Busy { status: status.as_u16(), reason, retry_after },
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => {
            ServiceError::Busy { status: status.as_u16(), reason, retry_after }
        }
        _ if is_page => web_page(status),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            ServiceError::Refused { status: status.as_u16(), reason }
        }
        _ if is_own && status.is_client_error() => ServiceError::Refused { status: status.as_u16(), reason },
        _ => ServiceError::NoAnswer(format!(
            "what answers in its place (status {status}) says {reason:?}: look for a gateway in front of it, \
             or check the address"
        )),
    }
}

/// What to do about an answer that names another address. None is followed.
fn redirection(response: &Response) -> Option<String> {
    if !response.status().is_redirection() {
        return None;
    }
    let asked = response.url();
    let mut target = asked.join(response.headers().get(LOCATION)?.to_str().ok()?).ok()?;
    // What logins carry there is not for a log.
    target.set_query(None);
    let start = ROUTES.iter().find_map(|start| asked.path().find(start))?;
    Some(match target.as_str().strip_suffix(&asked.path()[start..]) {
        Some(base) => format!("the service redirects to {base}: use that as --server"),
        None => {
            format!("it redirects to {target}: check the address, or look for a proxy that wants a login")
        }
    })
}

/// What stands between may answer in the place of the service.
fn web_page(status: StatusCode) -> ServiceError {
    ServiceError::NoAnswer(format!(
        "a web page came instead (status {status}): look for a proxy that wants a login, or check the address"
    ))
}

/// What an answer says, and whether it is an error as the service makes them.
async fn stated(mut response: Response) -> (String, bool) {
    let body = up_to(&mut response, MAX_ANSWER_BYTES, Instant::now())
        .await
        .map(|(body, _)| body)
        .unwrap_or_default();
    let (mut reason, is_own) = match own_error(&body) {
        Some(ErrorBody { error }) => (error, true),
        None => (String::from_utf8_lossy(&body).lines().next().unwrap_or_default().to_owned(), false),
    };
    let mut end = reason.len().min(MAX_REASON_BYTES);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    reason.truncate(end);
    (reason, is_own)
}

/// The body of an error of the service. Gateways have an `error` too, among others (`status`, `path`).
fn own_error(body: &[u8]) -> Option<ErrorBody> {
    let json: serde_json::Value = serde_json::from_slice(body).ok()?;
    json.as_object().filter(|fields| fields.len() == 1)?;
    serde_json::from_value(json).ok()
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;

    use super::*;
    use crate::otlp::MAX_BATCH_BYTES;

    /// The address of a service that answers one request with `head` and then says `part` until nobody listens.
    fn endless(head: &'static str, part: &'static [u8]) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("it is bound");
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("the client connects");
            let mut request = [0; 4096];
            let _ = stream.read(&mut request);
            let part = part.repeat(64 * 1024 / part.len());
            let _ = stream.write_all(head.as_bytes());
            while stream.write_all(&part).is_ok() {}
        });
        format!("http://{address}")
    }

    /// The address of a service that answers one request with `answer`, and what it was asked.
    fn once(answer: String) -> (String, std::thread::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("it is bound");
        let asked = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("the client connects");
            let mut request = [0; 4096];
            let bytes = stream.read(&mut request).expect("a request comes");
            stream.write_all(answer.as_bytes()).expect("the client reads");
            String::from_utf8_lossy(&request[..bytes]).into_owned()
        });
        (format!("http://{address}"), asked)
    }

    #[test]
    fn a_large_batch_has_the_time_that_it_takes() {
        let service =
            Service::new("http://127.0.0.1:1", Token::default(), Arc::default()).expect("an address");
        for (bytes, seconds) in [(0, 10), (1, 11), (256 * 1024, 11), (1024 * 1024, 14), (MAX_BATCH_BYTES, 74)]
        {
            let batch = EncodedBatch { compression: Compression::Zstd, bytes: vec![0; bytes].into() };
            let request = service.profiles(batch).build().expect("a request");
            assert_eq!(request.timeout(), Some(&Duration::from_secs(seconds)), "{bytes}");
        }
    }

    #[tokio::test]
    async fn redirections_are_told_and_not_followed() {
        for (location, advice) in [
            ("/base/v1development/profiles", "the service redirects to AT/base: use that as --server"),
            ("/login?next=1", "it redirects to AT/login: check the address"),
        ] {
            for status in [301, 302, 303, 307, 308] {
                let elsewhere = TcpListener::bind("127.0.0.1:0").expect("a port is free");
                elsewhere.set_nonblocking(true).expect("a listener may be asked");
                let at = format!("http://{}", elsewhere.local_addr().expect("it is bound"));
                let head =
                    format!("HTTP/1.1 {status} Moved\r\ncontent-length: 0\r\nlocation: {at}{location}");
                let (url, asked) = once(format!("{head}\r\n\r\n"));
                let token = Token::from(Some("secret".to_owned()));
                let service = Service::new(&url, token, Arc::default()).expect("an address");
                let batch = EncodedBatch { compression: Compression::Zstd, bytes: "batch".into() };
                let error = service.ship(batch).await.expect_err("nobody took it");
                let text = error.to_string();
                assert!(text.contains(&advice.replace("AT", &at)), "{status}: {text}");
                assert!(error.is_transient(), "{status}");
                assert!(asked.join().expect("it was asked").contains("Bearer secret"), "{status}");
                let came = elsewhere.accept().map(|_| ()).map_err(|error| error.kind());
                assert_eq!(came, Err(std::io::ErrorKind::WouldBlock), "{status}");
            }
        }
    }

    #[tokio::test]
    async fn answers_without_end_are_not_read_to_it() {
        let id = "abcd".parse().expect("a build-ID");
        let service = |url: String| Service::new(&url, Token::default(), Arc::default()).expect("an address");
        let failing = endless("HTTP/1.1 500 Oops\r\n\r\nno room\n", b"x");
        let error = service(failing).lacks(id, ArtefactKind::Skeleton).await;
        let reason = "no room".to_owned();
        assert_eq!(error, Err(ServiceError::Busy { status: 500, reason, retry_after: None }));
        assert!(error.is_err_and(|error| error.is_of_service()));
        let talking = endless("HTTP/1.1 200 OK\r\n\r\n", b" ");
        let error = service(talking).lacks(id, ArtefactKind::Skeleton).await;
        assert_eq!(error, Err(too_long("its answer", MAX_ANSWER_BYTES)));
    }
}
