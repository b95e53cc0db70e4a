//! The client side of the service's HTTP interface: one method for each route that the command line
//! uses, and errors that say what to do.
//!
//! libdebuginfod's users see a missing server as "no debuginfo"; ours see the server's name, why it did
//! not answer and how to start or name one. Whether a request may be repeated is a property of the
//! error ([`ServerError::may_pass`]), decided here once.

mod inventory;
mod uploads;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderValue};
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url};
use windlass_schema::http::{ErrorBody, NAMESPACE_HEADER, SymbolizeRequest, SymbolizeResponse};

pub(crate) use inventory::{Deletion, Listing};
pub(crate) use uploads::{Appended, Part};

/// The service of `windlassd serve` without options.
pub(crate) const DEFAULT_SERVER: &str = "http://127.0.0.1:8002";
/// Media type of pprof profiles, gzipped or not.
const PPROF: &str = "application/vnd.google.pprof";
/// A host that does not take a connection in this time is away.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest silence of a working service: it fsyncs a large upload, or symbolizes a large profile.
const READ_TIMEOUT: Duration = Duration::from_secs(300);
/// Longest error text shown of an answer that is not the service's JSON, in bytes.
const MAX_ERROR_TEXT_BYTES: usize = 300;

/// Which service, and how to be let in.
#[derive(Debug, clap::Args)]
pub(crate) struct ServerArgs {
    /// The service
    #[arg(long, value_name = "URL", env = "WINDLASS_SERVER", default_value = DEFAULT_SERVER)]
    server: String,
    #[command(flatten)]
    token: TokenArgs,
}

/// How to be let in.
#[derive(Debug, clap::Args)]
pub(crate) struct TokenArgs {
    /// File with the access token (or its text in WINDLASS_TOKEN)
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

impl ServerArgs {
    pub(crate) fn client(&self) -> anyhow::Result<Server> {
        Server::new(&self.server, self.token.read()?)
    }
}

impl TokenArgs {
    /// The token, from the file or else the environment.
    pub(crate) fn read(&self) -> anyhow::Result<Option<String>> {
        let token = match &self.token_file {
            Some(path) => std::fs::read_to_string(path)
                .with_context(|| format!("failed to read the token file {}", path.display()))?,
            None => match std::env::var("WINDLASS_TOKEN") {
                Ok(token) => token,
                Err(_) => return Ok(None),
            },
        };
        let token = token.trim().to_owned();
        match &self.token_file {
            Some(path) if token.is_empty() => anyhow::bail!("the token file {} is empty", path.display()),
            _ => Ok(Some(token).filter(|token| !token.is_empty())),
        }
    }
}

/// The service did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServerError {
    /// No connection, or it broke.
    #[error(
        "cannot reach the service at {url}: {cause}; start one with `windlassd serve`, or name another with \
         --server URL or WINDLASS_SERVER"
    )]
    Unreachable {
        /// The service.
        url: String,
        /// The innermost cause.
        cause: String,
    },
    /// 401 or 403.
    #[error(
        "{url} refused access ({status}): {message}; give a token with --token-file FILE or WINDLASS_TOKEN"
    )]
    Access {
        /// The service.
        url: String,
        /// 401 or 403.
        status: StatusCode,
        /// Its words.
        message: String,
    },
    /// Any other status but success.
    #[error("{url} answered {status}: {message}")]
    Status {
        /// What was asked.
        url: String,
        /// Its answer.
        status: StatusCode,
        /// Its words.
        message: String,
    },
    /// Success with a body that is not what the interface promises.
    #[error("{url} answered something else than Windlass would: {cause}")]
    Body {
        /// What was asked.
        url: String,
        /// The innermost cause.
        cause: String,
    },
}

impl ServerError {
    /// Whether the same request may succeed a moment later. What the service refused, it refuses again.
    pub(crate) fn may_pass(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Access { .. } | Self::Body { .. } => false,
            // What a proxy in front says when it is hurried or tired of waiting.
            Self::Status { status, .. } => {
                let passing = [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_MANY_REQUESTS];
                status.is_server_error() || passing.contains(status)
            }
        }
    }
}

/// A service.
#[derive(Clone, Debug)]
pub(crate) struct Server {
    base: Url,
    client: reqwest::Client,
    token: Option<String>,
    namespace: Option<HeaderValue>,
}

impl Server {
    pub(crate) fn new(url: &str, token: Option<String>) -> anyhow::Result<Self> {
        let expected = "expected something like http://debuginfod.example:8002";
        let base = Url::parse(url).with_context(|| format!("{url:?} is no URL of a service, {expected}"))?;
        anyhow::ensure!(
            matches!(base.scheme(), "http" | "https") && base.has_host(),
            "{url:?} is no URL of a service, {expected}"
        );
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("windlass/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT);
        if matches!(base.host_str(), Some("localhost" | "[::1]")) || url.contains("://127.") {
            // A proxy of the environment never leads back to this machine.
            builder = builder.no_proxy();
        }
        let client = builder.build().context("failed to set up the HTTP client")?;
        Ok(Self { base, client, token, namespace: None })
    }

    /// The same service, to which everything said concerns `namespace`.
    pub(crate) fn in_namespace(self, namespace: Option<&str>) -> anyhow::Result<Self> {
        // A variable of a CI job that is not set is an empty one.
        let namespace = namespace.filter(|name| !name.is_empty()).map(|name| {
            HeaderValue::from_str(name).with_context(|| format!("{name:?} cannot be the name of a namespace"))
        });
        Ok(Self { namespace: namespace.transpose()?, ..self })
    }

    /// Where it is.
    pub(crate) fn url(&self) -> &str {
        self.base.as_str().trim_end_matches('/')
    }

    /// The access token.
    pub(crate) fn token(&self) -> Option<&str> {
        self.token.as_deref()
    }

    /// Frames of addresses.
    pub(crate) async fn symbolize(
        &self,
        request: &SymbolizeRequest,
    ) -> Result<SymbolizeResponse, ServerError> {
        let answer = self.send(self.request(Method::POST, ["api", "v1", "symbolize"]).json(request)).await?;
        self.json(answer).await
    }

    /// A pprof profile with names, gzipped.
    pub(crate) async fn symbolize_pprof(&self, profile: Vec<u8>) -> Result<Vec<u8>, ServerError> {
        let request = self.request(Method::POST, ["api", "v1", "symbolize"]);
        let request = request.header(CONTENT_TYPE, PPROF).header(ACCEPT, PPROF).body(profile);
        let answer = self.send(request).await?;
        self.bytes(answer).await
    }

    /// What one agent sampled between two times (Unix time in nanoseconds), merged and symbolized: gzipped pprof.
    pub(crate) async fn profiles(
        &self,
        start_ns: u64,
        end_ns: u64,
        instance_id: &str,
    ) -> Result<Vec<u8>, ServerError> {
        let url = self.profiles_url(start_ns, end_ns, instance_id);
        let answer = self.send(self.request_to(Method::GET, url).header(ACCEPT, PPROF)).await?;
        self.bytes(answer).await
    }

    fn profiles_url(&self, start_ns: u64, end_ns: u64, instance_id: &str) -> Url {
        let mut url = self.route(["api", "v1", "profiles"]);
        let instance = percent_encoded(instance_id);
        url.set_query(Some(&format!("start={start_ns}&end={end_ns}&instance={instance}")));
        url
    }

    fn route<'a>(&self, segments: impl IntoIterator<Item = &'a str>) -> Url {
        let mut url = self.base.clone();
        url.path_segments_mut()
            .expect("http and https URLs with a host have a path")
            .pop_if_empty()
            .extend(segments);
        url
    }

    fn request<'a>(&self, method: Method, segments: impl IntoIterator<Item = &'a str>) -> RequestBuilder {
        self.request_to(method, self.route(segments))
    }

    fn request_to(&self, method: Method, url: Url) -> RequestBuilder {
        let mut request = self.client.request(method, url);
        if let Some(namespace) = &self.namespace {
            request = request.header(NAMESPACE_HEADER, namespace);
        }
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    async fn send(&self, request: RequestBuilder) -> Result<Response, ServerError> {
        self.check(request.send().await.map_err(|error| self.unreachable(&error))?).await
    }

    async fn check(&self, answer: Response) -> Result<Response, ServerError> {
        let (status, url) = (answer.status(), answer.url().to_string());
        if status.is_success() {
            return Ok(answer);
        }
        let text = answer.text().await.unwrap_or_default();
        let message = match serde_json::from_str::<ErrorBody>(&text) {
            Ok(body) => body.error,
            Err(_) => text.chars().take(MAX_ERROR_TEXT_BYTES).collect(),
        };
        Err(match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                ServerError::Access { url: self.url().to_owned(), status, message }
            }
            _ => ServerError::Status { url, status, message },
        })
    }

    async fn bytes(&self, answer: Response) -> Result<Vec<u8>, ServerError> {
        Ok(answer.bytes().await.map_err(|error| self.unreachable(&error))?.into())
    }

    async fn json<T: serde::de::DeserializeOwned>(&self, answer: Response) -> Result<T, ServerError> {
        let url = answer.url().to_string();
        serde_json::from_slice(&self.bytes(answer).await?)
            .map_err(|error| ServerError::Body { url, cause: error.to_string() })
    }

    fn unreachable(&self, error: &reqwest::Error) -> ServerError {
        let mut cause: &dyn std::error::Error = error;
        while let Some(source) = cause.source() {
            cause = source;
        }
        ServerError::Unreachable { url: self.url().to_owned(), cause: cause.to_string() }
    }
}

/// RFC 3986 percent-encoding of everything but unreserved characters.
fn percent_encoded(text: &str) -> String {
    text.bytes().fold(String::new(), |mut encoded, byte| {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => encoded.push(byte.into()),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
        encoded
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(url: &str) -> anyhow::Result<Server> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        Server::new(url, None)
    }

    #[test]
    fn only_http_urls_name_a_service() {
        for bad in ["", "localhost:8002", "ftp://host", "/var/lib", "http://"] {
            let error = server(bad).expect_err(bad).to_string();
            assert!(error.contains("no URL of a service"), "{bad}: {error}");
        }
        assert_eq!(server("https://host/debug/").unwrap().url(), "https://host/debug");
    }

    #[test]
    fn routes_keep_the_prefix_and_escape_segments() {
        let server = server("http://host/prefix/").unwrap();
        let request = server.request(Method::PUT, ["api", "a b", "c++.cc", "x?y#z"]).build().unwrap();
        assert_eq!(request.url().as_str(), "http://host/prefix/api/a%20b/c++.cc/x%3Fy%23z");
    }

    #[test]
    fn a_recording_asks_for_its_own_samples() {
        let url = server("http://host").unwrap().profiles_url(1, 9, "a&b");
        assert_eq!(url.as_str(), "http://host/api/v1/profiles?start=1&end=9&instance=a%26b");
    }

    #[test]
    fn only_trouble_that_may_pass_is_retried() {
        let status = |code: u16| ServerError::Status {
            url: String::new(),
            status: StatusCode::from_u16(code).unwrap(),
            message: String::new(),
        };
        for code in [400, 404, 409, 413, 422] {
            assert!(!status(code).may_pass(), "{code}");
        }
        for code in [408, 429, 500, 503, 507] {
            assert!(status(code).may_pass(), "{code}");
        }
        assert!(ServerError::Unreachable { url: String::new(), cause: String::new() }.may_pass());
    }

    #[test]
    fn a_namespace_is_named_in_every_request() {
        let header = |name: Option<&str>| {
            let server = server("http://host").unwrap().in_namespace(name).unwrap();
            let request = server.request(Method::PUT, ["api"]).build().unwrap();
            request.headers().get(NAMESPACE_HEADER).map(|value| value.to_str().unwrap().to_owned())
        };
        assert_eq!(header(Some("release")).as_deref(), Some("release"));
        assert_eq!((header(None), header(Some(""))), (None, None));
        assert!(server("http://host").unwrap().in_namespace(Some("a\nb")).is_err());
    }

    #[test]
    fn file_names_survive_a_header() {
        assert_eq!(percent_encoded("libä +%.so"), "lib%C3%A4%20%2B%25.so");
    }
}
