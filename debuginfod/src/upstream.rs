//! What is not stored here may be on another debuginfod server.
//!
//! elfutils asks its upstreams through its client library, with that library's 90 s patience and its ten
//! minutes of remembering failures; users report gdb hanging for a minute a module when a
//! distribution's server is ill. Here all upstreams are asked at once with one deadline, a
//! server that keeps failing is left alone for a while, only a clear "not found" from all is
//! remembered, for a minute, and an upload ends even that. A server that sends another file than the one asked for
//! fails too; what it has under that name is not fetched again for a minute.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use reqwest::Url;
use windlass_schema::BuildId;
use windlass_schema::http::ArtefactKind;

use crate::catalog::Writer;
use crate::delivery::FILE_HEADER;
use crate::error::ServiceError;
use crate::flight::Flights;
use crate::intake::receive;
use crate::namespace::Namespace;
use crate::service::{App, now_s};
use crate::storing::{Name, Origin, store};
use crate::upload::base_name;

/// How long an upstream may take to begin its answer: well under the client's 90 s, with two retries.
const DEADLINE: Duration = Duration::from_secs(10);
/// How long "no upstream has it" and "what this upstream has is not usable" are believed.
const NEGATIVE_TTL: Duration = Duration::from_secs(60);
/// Most negative answers remembered; at the limit all are forgotten.
const MAX_NEGATIVES: usize = 100_000;
/// Failures in a row after which an upstream is left alone.
const BREAKER_FAILURES: u32 = 3;
/// For how long.
const BREAKER_PAUSE: Duration = Duration::from_secs(30);
/// Hops in `X-Forwarded-For` from which on no upstream is asked, so that servers that name each other do not
/// ask in circles. elfutils' default.
pub(crate) const MAX_HOPS: usize = 8;
/// The client's way here.
pub(crate) const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// The upstreams are not usable.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamsError {
    /// No URL.
    #[error("upstream {0:?} is no http or https URL")]
    Url(String),
    /// No HTTP client.
    #[error("HTTP client: {0}")]
    Client(#[from] reqwest::Error),
}

struct Upstream {
    base: String,
    /// Failures in a row, and until when it is left alone.
    health: Mutex<(u32, Option<Instant>)>,
}

impl Upstream {
    fn open(&self) -> bool {
        let mut health = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        match health.1 {
            Some(until) if Instant::now() < until => false,
            Some(_) => {
                *health = (BREAKER_FAILURES - 1, None); // one more failure closes it again
                true
            }
            None => true,
        }
    }

    fn record(&self, answered: bool) {
        let mut health = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        let failures = if answered { 0 } else { health.0 + 1 };
        *health = (failures, (failures >= BREAKER_FAILURES).then(|| Instant::now() + BREAKER_PAUSE));
    }
}

type Wanted = (BuildId, ArtefactKind);

/// What is known to be of no use, each for [`NEGATIVE_TTL`].
struct Negatives<K>(Mutex<HashMap<K, Instant>>);

impl<K: Eq + Hash> Negatives<K> {
    fn contains(&self, key: &K) -> bool {
        let mut until = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match until.get(key) {
            Some(end) if Instant::now() < *end => true,
            Some(_) => {
                until.remove(key);
                false
            }
            None => false,
        }
    }

    fn insert(&self, key: K) {
        let mut until = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if until.len() >= MAX_NEGATIVES {
            until.clear();
        }
        until.insert(key, Instant::now() + NEGATIVE_TTL);
    }

    fn forget(&self, is_meant: impl Fn(&K) -> bool) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|key, _| !is_meant(key));
    }
}

/// The configured upstream servers.
pub(crate) struct Upstreams {
    servers: Vec<Arc<Upstream>>,
    client: Option<reqwest::Client>,
    flights: Flights<Wanted, Result<bool, Arc<str>>>,
    /// What none has.
    missing: Negatives<Wanted>,
    /// What a server, by its number, has but should not.
    unusable: Negatives<(usize, Wanted)>,
}

/// What an upstream is told of the client.
#[derive(Clone, Default)]
pub(crate) struct Caller {
    /// Its `User-Agent`.
    pub(crate) user_agent: Option<HeaderValue>,
    /// `X-Forwarded-For` with the client's own address added.
    pub(crate) forwarded_for: String,
}

impl Upstreams {
    pub(crate) fn new(urls: &[String]) -> Result<Self, UpstreamsError> {
        let servers = urls
            .iter()
            .map(|text| match Url::parse(text) {
                Ok(url) if ["http", "https"].contains(&url.scheme()) => Ok(Arc::new(Upstream {
                    base: text.trim_end_matches('/').to_owned(),
                    health: Mutex::default(),
                })),
                _ => Err(UpstreamsError::Url(text.clone())),
            })
            .collect::<Result<Vec<_>, _>>()?;
        let client = match servers.is_empty() {
            true => None,
            false => {
                // Fails if a provider is installed already, which serves as well.
                let _ = rustls::crypto::ring::default_provider().install_default();
                Some(reqwest::Client::builder().connect_timeout(DEADLINE).read_timeout(DEADLINE).build()?)
            }
        };
        Ok(Self {
            servers,
            client,
            flights: Flights::default(),
            missing: Negatives(Mutex::default()),
            unusable: Negatives(Mutex::default()),
        })
    }

    /// Whether there are any.
    pub(crate) fn is_empty(&self) -> bool {
        self.servers.is_empty()
    }

    /// Forgets what upstreams did not have of this image.
    pub(crate) fn forget(&self, id: BuildId) {
        self.missing.forget(|(known, _)| *known == id);
        self.unusable.forget(|(_, (known, _))| *known == id);
    }
}

/// Asks the upstreams for an artefact that is not stored, and stores it. `false`: none has it.
pub(crate) async fn fetch(
    app: &Arc<App>,
    id: BuildId,
    kind: ArtefactKind,
    caller: Caller,
) -> Result<bool, ServiceError> {
    let wanted = (id, kind);
    if app.upstreams.is_empty() || app.upstreams.missing.contains(&wanted) {
        return Ok(false);
    }
    let shared = Arc::clone(app);
    let outcome = app.upstreams.flights.join(wanted, move || async move {
        let found = match shared.sound_artefact(id, kind).await {
            // A flight that began just after another one landed finds its result here.
            Ok(Some(_)) => Ok(true),
            Ok(None) => ask_all(&shared, id, kind, &caller).await,
            Err(error) => Err(error),
        };
        if matches!(found, Ok(false)) {
            shared.upstreams.missing.insert(wanted);
        }
        found.map_err(|error| Arc::from(error.to_string()))
    });
    match outcome.await {
        Some(Ok(found)) => Ok(found),
        Some(Err(why)) => Err(ServiceError::Upstream(why.to_string())),
        None => Err(ServiceError::Interrupted),
    }
}

/// The first that has it wins. If none has it, each must have said so.
async fn ask_all(
    app: &Arc<App>,
    id: BuildId,
    kind: ArtefactKind,
    caller: &Caller,
) -> Result<bool, ServiceError> {
    let mut asking: FuturesUnordered<_> =
        (0..app.upstreams.servers.len()).map(|number| ask(app, number, id, kind, caller)).collect();
    let mut trouble = None;
    while let Some(answer) = asking.next().await {
        let stored = match answer {
            Ok(None) => continue,
            Ok(Some((number, response))) => {
                let taken = take(app, number, id, kind, response).await;
                judge(app, number, (id, kind), &taken);
                taken
            }
            Err(error) => Err(error),
        };
        match stored {
            Ok(()) => return Ok(true),
            Err(error) => {
                tracing::warn!("{kind} of {id} from upstream: {error}");
                trouble = Some(error);
            }
        }
    }
    trouble.map_or(Ok(false), Err)
}

/// What became of an answer that began well decides about the server: a head says nothing about the file behind it.
fn judge(app: &App, number: usize, wanted: Wanted, taken: &Result<(), ServiceError>) {
    let server = &app.upstreams.servers[number];
    match taken {
        Ok(()) | Err(ServiceError::Conflict { .. }) => server.record(true),
        // The same would come again: another file than the one asked for, or one beyond the limit.
        Err(ServiceError::Content(_) | ServiceError::TooLarge { .. }) => {
            app.upstreams.unusable.insert((number, wanted));
            server.record(false);
        }
        Err(ServiceError::Body(_)) => server.record(false),
        // Trouble of our own.
        Err(_) => {}
    }
}

/// The number of the server and the beginning of its good answer, or `None` for a clear no and for what is known to
/// be unusable.
async fn ask(
    app: &App,
    number: usize,
    id: BuildId,
    kind: ArtefactKind,
    caller: &Caller,
) -> Result<Option<(usize, reqwest::Response)>, ServiceError> {
    let server = &app.upstreams.servers[number];
    if app.upstreams.unusable.contains(&(number, (id, kind))) {
        return Ok(None);
    }
    let trouble = |why: String| ServiceError::Upstream(format!("{}: {why}", server.base));
    if !server.open() {
        return Err(trouble("left alone after repeated failures".to_owned()));
    }
    let client = app.upstreams.client.as_ref().expect("made with the first server");
    let mut request = client
        .get(format!("{}/buildid/{id}/{kind}", server.base))
        .header(FORWARDED_FOR, &caller.forwarded_for);
    if let Some(agent) = &caller.user_agent {
        request = request.header(header::USER_AGENT, agent);
    }
    let answer = tokio::time::timeout(DEADLINE, request.send()).await;
    let answer = match answer {
        Ok(Ok(response)) => match response.status() {
            StatusCode::OK => Ok(Some((number, response))),
            StatusCode::NOT_FOUND => Ok(None),
            status => Err(trouble(format!("status {status}"))),
        },
        Ok(Err(error)) => Err(trouble(error.to_string())),
        Err(_) => Err(trouble(format!("no answer within {} s", DEADLINE.as_secs()))),
    };
    if !matches!(answer, Ok(Some(_))) {
        server.record(answer.is_ok());
    }
    answer
}

async fn take(
    app: &Arc<App>,
    number: usize,
    id: BuildId,
    kind: ArtefactKind,
    response: reqwest::Response,
) -> Result<(), ServiceError> {
    let text = |name: &HeaderName| response.headers().get(name).and_then(|value| value.to_str().ok());
    let file_name = text(&FILE_HEADER).map(base_name).unwrap_or_default();
    let modified_s = text(&header::LAST_MODIFIED)
        .and_then(|date| httpdate::parse_http_date(date).ok())
        .map_or_else(now_s, |date: SystemTime| {
            date.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
        });
    // The client has undone any content coding already.
    let mut body = response.bytes_stream();
    let sink = app.blobs.scratch_file()?;
    let received = receive(&HeaderMap::new(), &mut body, sink, app.max_upload_bytes).await?;
    let name = Name { build_id: id, kind, path: String::new(), namespace: Namespace::upstream() };
    let writer =
        Writer { token: format!("upstream:{}", app.upstreams.servers[number].base), peer: String::new() };
    store(app, name, received, Origin { file_name, modified_s, writer }).await?;
    Ok(())
}
