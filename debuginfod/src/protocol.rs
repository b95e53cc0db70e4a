//! The debuginfod protocol: `/buildid/ID/{debuginfo,executable,source/PATH,section/NAME}`.
//!
//! Paths, texts and statuses are those of elfutils' server, which clients, scripts and its own tests rely on.
//! What differs is on purpose: HEAD, Range and conditional requests work; a source is only
//! ever what was uploaded for that build-ID, never a path opened on this machine; and transient trouble
//! resets the connection where elfutils answers 503, which clients take for "does not exist".

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, header};
use axum::response::{IntoResponse, Response};
use windlass_schema::BuildId;
use windlass_schema::http::ArtefactKind;

use crate::blob::BlobError;
use crate::catalog::Artefact;
use crate::conflict::is_final;
use crate::connection::Peer;
use crate::delivery::{Delivery, IMMUTABLE, REVALIDATE};
use crate::elf::Section;
use crate::error::{ServiceError, reset};
use crate::service::App;
use crate::upstream::{Caller, FORWARDED_FOR, MAX_HOPS, fetch};

/// Largest file that the client wants, in bytes.
const MAX_SIZE_HEADER: HeaderName = HeaderName::from_static("x-debuginfod-maxsize");

/// An answer in elfutils' words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
enum Refusal {
    #[error("we support GET only")]
    Method,
    #[error("webapi error, unrecognized '{0}'")]
    Unrecognized(String),
    #[error("/buildid/ webapi error, need buildid")]
    NeedBuildId,
    #[error("invalid buildid")]
    BuildId,
    #[error("invalid artifacttype")]
    ArtefactType,
    #[error("invalid source suffix")]
    SourceSuffix,
    #[error("invalid section suffix")]
    SectionSuffix,
    #[error("not found")]
    NotFound,
    // The misspelling is elfutils'; its tests search for it.
    #[error("not found, --forwared-ttl-limit reached and will not query the upstream servers")]
    TooManyHops,
    #[error("File too large, max size={0}")]
    TooLarge(u64),
}

impl Refusal {
    fn status(&self) -> StatusCode {
        match self {
            Self::Method => StatusCode::BAD_REQUEST,
            Self::NotFound | Self::TooManyHops => StatusCode::NOT_FOUND,
            Self::TooLarge(_) => StatusCode::NOT_ACCEPTABLE,
            Self::Unrecognized(_)
            | Self::NeedBuildId
            | Self::BuildId
            | Self::ArtefactType
            | Self::SourceSuffix
            | Self::SectionSuffix => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let headers = [(header::CONTENT_TYPE, "text/plain"), (header::CACHE_CONTROL, "no-store")];
        (self.status(), headers, self.to_string()).into_response()
    }
}

/// Why there is no file to send.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Refused(#[from] Refusal),
    #[error("{0}")]
    Trouble(#[from] ServiceError),
}

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Wanted {
    File(ArtefactKind),
    Source(String),
    Section(String),
}

impl Wanted {
    /// The label value of `http_requests_total`.
    fn name(&self) -> &'static str {
        match self {
            Self::File(kind) => kind.as_str(),
            Self::Source(_) => "source",
            Self::Section(_) => "section",
        }
    }
}

/// Parses a path after percent-decoding. `Ok(None)` is the root.
fn parse(path: &str) -> Result<Option<(&str, Wanted)>, Refusal> {
    if path == "/" {
        return Ok(None);
    }
    let first = path.split('/').nth(1).unwrap_or_default();
    if first != "buildid" {
        return Err(Refusal::Unrecognized(format!("/{first}")));
    }
    let rest = path.strip_prefix("/buildid/").ok_or(Refusal::NeedBuildId)?;
    let (id, rest) = rest.split_once('/').ok_or(Refusal::NeedBuildId)?;
    let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if id.len() < 2 || !id.len().is_multiple_of(2) || !id.bytes().all(hex) {
        return Err(Refusal::BuildId);
    }
    let (kind, suffix) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let wanted = match kind {
        "debuginfo" => Wanted::File(ArtefactKind::Debuginfo),
        "executable" => Wanted::File(ArtefactKind::Executable),
        "source" if suffix.len() > 1 => Wanted::Source(suffix.to_owned()),
        "source" => return Err(Refusal::SourceSuffix),
        "section" if suffix.len() > 1 => Wanted::Section(suffix[1..].to_owned()),
        "section" => return Err(Refusal::SectionSuffix),
        _ => return Err(Refusal::ArtefactType),
    };
    Ok(Some((id, wanted)))
}

/// Answers any request that no other route takes.
pub(crate) async fn answer(State(app): State<Arc<App>>, request: Request<Body>) -> Response {
    let (parts, _) = request.into_parts();
    let (response, result) = match handle(&app, &parts).await {
        Ok(response) => (response, "file"),
        Err(Failure::Refused(refusal)) => (refusal.into_response(), "error"),
        Err(Failure::Trouble(error)) => {
            tracing::error!("{}: {error}", parts.uri.path());
            app.metrics.count("error_count", "libc", "request");
            (reset(), "reset")
        }
    };
    app.metrics.count("http_responses_total", "result", result);
    response
}

async fn handle(app: &Arc<App>, request: &Parts) -> Result<Response, Failure> {
    if request.method != Method::GET && request.method != Method::HEAD {
        return Err(Refusal::Method.into());
    }
    let path = percent_encoding::percent_decode_str(request.uri.path()).decode_utf8_lossy();
    let Some((id, wanted)) = parse(&path)? else {
        let text = concat!("windlass debuginfod ", env!("CARGO_PKG_VERSION"), "\n");
        return Ok(([(header::CONTENT_TYPE, "text/plain")], text).into_response());
    };
    app.metrics.count("http_requests_total", "type", wanted.name());
    // Legal in the protocol, but no linker writes a single byte and no client sends more than 64.
    let id: BuildId = id.parse().map_err(|_| Refusal::NotFound)?;
    let delivery = match wanted {
        Wanted::File(kind) => file(app, &*find_file(app, request, id, kind).await?, kind)?,
        Wanted::Source(path) => {
            let source = app.artefact(id, ArtefactKind::Source, &path).await?;
            file(app, &*source.ok_or(Refusal::NotFound)?, ArtefactKind::Source)?
        }
        Wanted::Section(name) => section(app, request, id, &name).await?,
    };
    let size = delivery.part.as_ref().map_or(delivery.blob.size, |part| part.end - part.start);
    if let Some(limit) = max_size(&request.headers)
        && size > limit
    {
        return Err(Refusal::TooLarge(limit).into());
    }
    Ok(delivery.answer(app, request).await?)
}

fn max_size(headers: &HeaderMap) -> Option<u64> {
    headers.get(MAX_SIZE_HEADER)?.to_str().ok()?.trim().parse().ok().filter(|limit| *limit > 0)
}

/// The stored file, or one that an upstream has. `debuginfo` may be an executable that was not stripped.
async fn find_file(
    app: &Arc<App>,
    request: &Parts,
    id: BuildId,
    kind: ArtefactKind,
) -> Result<Arc<Artefact>, Failure> {
    let stored = match (app.artefact(id, kind, "").await?, kind) {
        (None, ArtefactKind::Debuginfo) => {
            let executable = app.artefact(id, ArtefactKind::Executable, "").await?;
            executable.filter(|artefact| artefact.facts.dwarf || artefact.facts.symtab)
        }
        (stored, _) => stored,
    };
    if let Some(stored) = stored {
        return Ok(stored);
    }
    if app.upstreams.is_empty() {
        return Err(Refusal::NotFound.into());
    }
    let caller = caller(request)?;
    if !fetch(app, id, kind, caller).await? {
        return Err(Refusal::NotFound.into());
    }
    Ok(app.artefact(id, kind, "").await?.ok_or(Refusal::NotFound)?)
}

/// What the upstreams are told; an error if the request has been through too many servers.
fn caller(request: &Parts) -> Result<Caller, Refusal> {
    let hops: Vec<&str> = request
        .headers
        .get_all(&FORWARDED_FOR)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|hop| !hop.is_empty())
        .collect();
    if hops.len() >= MAX_HOPS {
        return Err(Refusal::TooManyHops);
    }
    let peer = request.extensions.get::<Peer>().map(|Peer(address)| address.ip().to_string());
    let forwarded_for = hops.into_iter().map(str::to_owned).chain(peer).collect::<Vec<_>>().join(", ");
    let user_agent: Option<HeaderValue> = request.headers.get(header::USER_AGENT).cloned();
    Ok(Caller { user_agent, forwarded_for })
}

fn file(app: &App, artefact: &Artefact, asked: ArtefactKind) -> Result<Delivery, Failure> {
    if artefact.damaged {
        let why = "recorded as damaged, upload it again".to_owned();
        let hash = artefact.blob.hash;
        return Err(ServiceError::Blob(BlobError::Damaged { hash, why }).into());
    }
    app.uses.note(artefact);
    // An executable with names answers for the debuginfo until that arrives.
    let is_stopgap = artefact.kind != asked;
    let is_first = app.namespaces.is_first(&artefact.namespace);
    let final_one = !is_stopgap && is_first && is_final(artefact.kind, &artefact.facts);
    Ok(Delivery {
        blob: artefact.blob,
        part: None,
        modified_s: artefact.modified_s,
        file_name: artefact.file_name.clone(),
        content_type: "application/octet-stream",
        // Another may go in front of it, or take its place, at any time.
        cache_control: if final_one { IMMUTABLE } else { REVALIDATE },
    })
}

/// The section's bytes from the debuginfo or, where that has none, from the executable. "Not found" is final
/// for a client, so both are looked for, upstream too, before it is said.
async fn section(app: &Arc<App>, request: &Parts, id: BuildId, name: &str) -> Result<Delivery, Failure> {
    for kind in [ArtefactKind::Debuginfo, ArtefactKind::Executable] {
        let artefact = match find_file(app, request, id, kind).await {
            Ok(artefact) => artefact,
            Err(Failure::Refused(Refusal::NotFound)) => continue,
            Err(failure) => return Err(failure),
        };
        let holds = |section: &&Section| section.name == name && !section.nobits;
        if let Some(section) = artefact.facts.sections.iter().find(holds) {
            let part = section.offset..section.offset + section.size;
            // That of the debuginfo goes in front of any other.
            return Ok(Delivery { part: Some(part), ..file(app, &artefact, ArtefactKind::Debuginfo)? });
        }
    }
    Err(Refusal::NotFound.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(path: &str, expect: Result<Wanted, Refusal>) {
        assert_eq!(parse(path).map(|found| found.expect("not the root").1), expect, "{path}");
    }

    #[test]
    fn paths_as_elfutils_parses_them() {
        check("/buildid/abcd/debuginfo", Ok(Wanted::File(ArtefactKind::Debuginfo)));
        check("/buildid/abcd/executable/", Ok(Wanted::File(ArtefactKind::Executable)));
        check("/buildid/abcd/source/a//b/../c.c", Ok(Wanted::Source("/a//b/../c.c".to_owned())));
        check("/buildid/abcd/section/.text", Ok(Wanted::Section(".text".to_owned())));
        check("/buildid/abcd/section/", Err(Refusal::SectionSuffix));
        check("/buildid/abcd/section", Err(Refusal::SectionSuffix));
        check("/buildid/abcd/source", Err(Refusal::SourceSuffix));
        check("/buildid/abcd/bogus", Err(Refusal::ArtefactType));
        check("/buildid/abcd/skeleton", Err(Refusal::ArtefactType));
        check("/buildid/ABCD/debuginfo", Err(Refusal::BuildId));
        check("/buildid/abc/debuginfo", Err(Refusal::BuildId));
        check("/buildid/a/debuginfo", Err(Refusal::BuildId));
        check("/buildid//debuginfo", Err(Refusal::BuildId));
        check("/buildid/abcd", Err(Refusal::NeedBuildId));
        check("/buildid", Err(Refusal::NeedBuildId));
        check("/etc/passwd", Err(Refusal::Unrecognized("/etc".to_owned())));
    }
}
