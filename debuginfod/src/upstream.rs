//! What is not stored here may be on another debuginfod server.
//!
//! elfutils asks its upstreams through its client library, with that library's 90 s patience and its ten
//! minutes of remembering failures; users report gdb hanging for a minute a module when a
//! distribution's server is ill. Here all upstreams are asked at once with one deadline, a
//! server that keeps failing is left alone for a while, only a clear "not found" from all is
//! remembered, for a minute, and an upload ends even that. The first that has the file sends it; if that takes long, a second one is
//! let send it too, and whoever is ready first wins. A server that sends another file than the one asked for
//! fails too; what it has under that name is not fetched again for a minute.
//!
//! What comes is checked, stored and derived from like an upload, in a namespace that all others go in front of. The
//! catalog keeps which server it came from: `GET /api/v1/buildid/ID/provenance`.

use std::collections::VecDeque;
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use windlass_schema::BuildId;
use windlass_schema::http::ArtefactKind;

use crate::catalog::{Name, Provenance, Writer};
use crate::delivery::FILE_HEADER;
use crate::error::ServiceError;
use crate::flight::Flights;
use crate::intake::{Received, receive};
use crate::namespace::Namespace;
use crate::service::{App, now_s};
use crate::storing::{Origin, store};
use crate::upload::base_name;
use negatives::Negatives;
use server::{Outcome, Server};

pub(crate) use server::Record;

mod negatives;
mod server;

/// How long "no upstream has it" and "what this upstream has is not usable" are believed.
const NEGATIVE_TTL: Duration = Duration::from_secs(60);
/// How long an upstream that was silent is not asked for the same again: its client tries twice more at once.
const SILENCE_TTL: Duration = Duration::from_secs(10);
/// How long one server may take to send a file before another that has it is let send it too.
const HEDGE_AFTER: Duration = Duration::from_secs(2);
/// Servers that send one file at once.
const SENDERS: usize = 2;
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

type Wanted = (BuildId, ArtefactKind);

/// The configured upstream servers.
pub(crate) struct Upstreams {
    servers: Vec<Server>,
    /// How long one may take to begin its answer, and be silent amid it.
    deadline: Duration,
    client: Option<reqwest::Client>,
    flights: Flights<Wanted, Result<bool, Arc<str>>>,
    /// What none has.
    missing: Negatives<Wanted>,
    /// What a server, by its number, has but should not.
    unusable: Negatives<(usize, Wanted)>,
    /// What a server did not say a word to.
    silent: Negatives<(usize, Wanted)>,
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
    pub(crate) fn new(urls: &[String], deadline: Duration) -> Result<Self, UpstreamsError> {
        let servers = urls.iter().map(|text| Server::new(text)).collect::<Result<Vec<_>, _>>()?;
        let client = match servers.is_empty() {
            true => None,
            false => {
                // Fails if a provider is installed already, which serves as well.
                let _ = rustls::crypto::ring::default_provider().install_default();
                Some(reqwest::Client::builder().connect_timeout(deadline).read_timeout(deadline).build()?)
            }
        };
        Ok(Self {
            servers,
            deadline,
            client,
            flights: Flights::default(),
            missing: Negatives::new(NEGATIVE_TTL),
            unusable: Negatives::new(NEGATIVE_TTL),
            silent: Negatives::new(SILENCE_TTL),
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
        self.silent.forget(|(_, (known, _))| *known == id);
    }

    /// What each of them did.
    pub(crate) fn report(&self) -> Vec<Record> {
        self.servers.iter().map(Server::report).collect()
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
            Ok(None) => race(&shared, wanted, &caller).await,
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

/// A good answer that has begun: the number of its server, and the rest.
type Begun = (usize, reqwest::Response);

/// Asks all, and stores what the first sends that is usable. If none has it, each must have said so.
async fn race(app: &Arc<App>, wanted: Wanted, caller: &Caller) -> Result<bool, ServiceError> {
    let servers = 0..app.upstreams.servers.len();
    let mut asking: FuturesUnordered<_> = servers.map(|number| ask(app, number, wanted, caller)).collect();
    let (mut sending, mut waiting) = (FuturesUnordered::new(), VecDeque::<Begun>::new());
    let mut hedge = std::pin::pin!(tokio::time::sleep(HEDGE_AFTER));
    let mut trouble = None;
    loop {
        tokio::select! {
            Some(answer) = asking.next() => match answer {
                Ok(None) => {}
                Ok(Some(begun)) => waiting.push_back(begun),
                Err(error) => trouble = Some(error),
            },
            Some((number, sent)) = sending.next() => {
                let stored = match sent {
                    Ok(sent) => keep(app, number, wanted, sent).await,
                    Err(error) => Err(error),
                };
                judge(app, number, wanted, &stored);
                match stored {
                    Ok(()) => return Ok(true),
                    Err(error) => {
                        let (id, kind) = wanted;
                        tracing::warn!("{kind} of {id} from {}: {error}", app.upstreams.servers[number].base);
                        trouble = Some(error);
                    }
                }
            },
            () = hedge.as_mut(), if sending.len() < SENDERS && !waiting.is_empty() => {
                sending.extend(waiting.pop_front().map(|begun| take(app, begun)));
                hedge.as_mut().reset(tokio::time::Instant::now() + HEDGE_AFTER);
            }
            else => break,
        }
        if sending.is_empty()
            && let Some(begun) = waiting.pop_front()
        {
            sending.push(take(app, begun));
            hedge.as_mut().reset(tokio::time::Instant::now() + HEDGE_AFTER);
        }
    }
    trouble.map_or(Ok(false), Err)
}

/// What became of an answer that began well decides about the server: a head says nothing about the file behind it.
fn judge(app: &App, number: usize, wanted: Wanted, stored: &Result<(), ServiceError>) {
    let server = &app.upstreams.servers[number];
    match stored {
        Ok(()) | Err(ServiceError::Conflict { .. }) => server.record(Outcome::File, None),
        // The same would come again: another file than the one asked for, or one beyond the limit.
        Err(error @ (ServiceError::Content(_) | ServiceError::TooLarge { .. })) => {
            app.upstreams.unusable.insert((number, wanted));
            server.record(Outcome::Failure, Some(error.to_string()));
        }
        Err(error @ ServiceError::Body(_)) => server.record(Outcome::Failure, Some(error.to_string())),
        // Trouble of our own.
        Err(_) => {}
    }
}

/// The beginning of a server's good answer, or `None` for a clear no and for what is known to
/// be unusable.
async fn ask(
    app: &App,
    number: usize,
    wanted: Wanted,
    caller: &Caller,
) -> Result<Option<Begun>, ServiceError> {
    let (upstreams, (id, kind)) = (&app.upstreams, wanted);
    let server = &upstreams.servers[number];
    if upstreams.unusable.contains(&(number, wanted)) {
        return Ok(None);
    }
    let trouble = |why: String| Err(ServiceError::Upstream(format!("{}: {why}", server.base)));
    if upstreams.silent.contains(&(number, wanted)) {
        return trouble("did not answer when it was asked for the same just now".to_owned());
    }
    if !server.is_open() {
        return trouble("left alone after repeated failures".to_owned());
    }
    let client = upstreams.client.as_ref().expect("made with the first server");
    let mut request = client
        .get(format!("{}/buildid/{id}/{kind}", server.base))
        .header(FORWARDED_FOR, &caller.forwarded_for);
    if let Some(agent) = &caller.user_agent {
        request = request.header(header::USER_AGENT, agent);
    }
    let answer = tokio::time::timeout(upstreams.deadline, request.send()).await;
    let why = match answer {
        Ok(Ok(response)) => match response.status() {
            // Judged when all of it is here.
            StatusCode::OK => return Ok(Some((number, response))),
            StatusCode::NOT_FOUND => {
                server.record(Outcome::Lacking, None);
                return Ok(None);
            }
            status => format!("status {status}"),
        },
        Ok(Err(error)) if !error.is_timeout() => error.to_string(),
        Ok(Err(_)) | Err(_) => {
            upstreams.silent.insert((number, wanted));
            format!("no answer within {} ms", upstreams.deadline.as_millis())
        }
    };
    tracing::warn!("upstream {}: {why}", server.base);
    server.record(Outcome::Failure, Some(why.clone()));
    trouble(why)
}

/// A file that came, and what its server said of it.
struct Sent {
    received: Received<File>,
    file_name: String,
    modified_s: u64,
}

async fn take(app: &App, (number, response): Begun) -> (usize, Result<Sent, ServiceError>) {
    let text = |name: &HeaderName| response.headers().get(name).and_then(|value| value.to_str().ok());
    let file_name = text(&FILE_HEADER).map(base_name).unwrap_or_default();
    let modified_s = text(&header::LAST_MODIFIED)
        .and_then(|date| httpdate::parse_http_date(date).ok())
        .map_or_else(now_s, |date: SystemTime| {
            date.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
        });
    // The client has undone any content coding already.
    let mut body = response.bytes_stream();
    let received = async {
        let sink = app.blobs.scratch_file()?;
        receive(&HeaderMap::new(), &mut body, sink, app.max_upload_bytes).await
    };
    (number, received.await.map(|received| Sent { received, file_name, modified_s }))
}

async fn keep(app: &Arc<App>, number: usize, wanted: Wanted, sent: Sent) -> Result<(), ServiceError> {
    let upstream = app.upstreams.servers[number].base.clone();
    let Sent { received, file_name, modified_s } = sent;
    let (build_id, kind) = wanted;
    let name = Name { build_id, kind, path: String::new(), namespace: Namespace::upstream() };
    let writer = Writer { token: format!("upstream:{upstream}"), peer: String::new() };
    let provenance = Provenance { build_id, kind, hash: received.hash, upstream, fetched_s: now_s() };
    store(app, name, received, Origin { file_name, modified_s, writer }).await?;
    app.catalog(move |catalog| catalog.put_provenance(&provenance)).await
}
