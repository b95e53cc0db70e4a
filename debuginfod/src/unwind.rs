//! `GET /api/v1/buildid/ID/unwind`: the compiled unwind table.
//!
//! Whoever lists [`UNWIND_WIRE_TYPE`] in `Accept` is sent the wire form, half the bytes of the compressed table; anyone else
//! the table as it is read, of which ranges make sense.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use windlass_schema::BuildId;
use windlass_schema::http::{ArtefactKind, UNWIND_TYPE, UNWIND_WIRE_TYPE};
use windlass_schema::table::VERSION;
use windlass_schema::wire::WIRE_VERSION;
use windlass_unwind_compiler::REVISION;

use crate::blob::BlobError;
use crate::catalog::{Artefact, DerivedKind};
use crate::delivery::{Delivery, REVALIDATE};
use crate::derive::{Inputs, derive};
use crate::error::ServiceError;
use crate::service::App;

/// How long a request waits for a compilation before it is answered 202.
const PATIENCE: Duration = Duration::from_secs(1);

/// Sends the table, compiling it first if need be. It may be replaced when a better file of the image
/// arrives, so caches must ask again; unchanged it costs a 304.
pub(crate) async fn table(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, ServiceError> {
    let (request, _) = request.into_parts();
    let id: BuildId = id.parse()?;
    let source = source(&app, id).await?.ok_or_else(|| {
        ServiceError::NotFound(format!(
            "neither executable, skeleton nor debuginfo with unwind sections stored for {id}"
        ))
    })?;
    match deliver(&app, source.clone(), &request).await {
        // The stored table went bad after it was checked: it is disposable, so make it again.
        Err(ServiceError::Blob(BlobError::Damaged { hash, .. })) => {
            app.mark_damaged(hash).await?;
            deliver(&app, source, &request).await
        }
        answer => answer,
    }
}

async fn deliver(app: &Arc<App>, source: Artefact, request: &Parts) -> Result<Response, ServiceError> {
    app.uses.note(&source);
    let (modified_s, file_name) = (source.modified_s, source.file_name.clone());
    let inputs = Inputs { image: Some(source), ..Inputs::default() };
    let (kind, content_type) = match accepts_wire(&request.headers) {
        true => (DerivedKind::UnwindWire, UNWIND_WIRE_TYPE),
        false => (DerivedKind::Unwind, UNWIND_TYPE),
    };
    let key = inputs.key(kind, version(kind)).expect("there is an input");
    let blob = match tokio::time::timeout(PATIENCE, derive(app, key, inputs)).await {
        Ok(outcome) => outcome?.map_err(|why| ServiceError::Compile(why.to_string()))?,
        Err(_) => {
            let headers = [(header::RETRY_AFTER, "1"), (header::CACHE_CONTROL, "no-store")];
            return Ok((StatusCode::ACCEPTED, headers).into_response());
        }
    };
    let delivery =
        Delivery { blob, part: None, modified_s, file_name, content_type, cache_control: REVALIDATE };
    let mut answer = delivery.answer(app, request).await?;
    answer.headers_mut().append(header::VARY, header::HeaderValue::from_static("accept"));
    Ok(answer)
}

/// Version of the table in a form: that of the compiler with those of the formats.
pub(crate) fn version(kind: DerivedKind) -> u32 {
    let table = u32::from(REVISION) << 16 | u32::from(VERSION);
    match kind {
        DerivedKind::UnwindWire => u32::from(WIRE_VERSION) << 24 | table,
        DerivedKind::Unwind | DerivedKind::Symbols => table,
    }
}

/// Makes the table of what is stored of `id`, if there is something to make it of.
pub(crate) async fn make(app: &Arc<App>, id: BuildId, kind: DerivedKind) -> Result<(), ServiceError> {
    let Some(source) = source(app, id).await? else { return Ok(()) };
    let inputs = Inputs { image: Some(source), ..Inputs::default() };
    let key = inputs.key(kind, version(kind)).expect("there is an input");
    derive(app, key, inputs).await?.map(drop).map_err(|why| ServiceError::Compile(why.to_string()))
}

/// Whether `Accept` lists the wire form.
fn accepts_wire(request: &HeaderMap) -> bool {
    let listed = request.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    listed.flat_map(|value| value.split(',')).any(|listed| {
        let mut parts = listed.split(';').map(str::trim);
        parts.next().is_some_and(|name| name.eq_ignore_ascii_case(UNWIND_WIRE_TYPE))
            && !parts.any(|part| part.strip_prefix("q=").is_some_and(|weight| weight.parse() == Ok(0.0)))
    })
}

/// The best file to compile from. The executable has everything, code included. So has a debug file with `.eh_frame`, which was
/// uploaded before anyone stripped it. Both are what whoever built the image says; a skeleton is what some host says that runs a
/// file with this build-ID, so it comes after them. A debug file that kept `.debug_frame` alone comes last: it may have it for a few
/// functions, and has nothing of the others.
async fn source(app: &App, id: BuildId) -> Result<Option<Artefact>, ServiceError> {
    let (mut last, mut without) = (None, None);
    for kind in [ArtefactKind::Executable, ArtefactKind::Debuginfo, ArtefactKind::Skeleton] {
        match app.sound_artefact(id, kind).await? {
            Some(artefact) if kind == ArtefactKind::Debuginfo => {
                if has_eh_frame(&artefact) {
                    return Ok(Some(artefact));
                }
                last = Some(artefact).filter(|artefact| artefact.facts.unwind);
            }
            Some(artefact) if artefact.facts.unwind => return Ok(Some(artefact)),
            // Sections may be stripped, and unwind information found without them.
            Some(artefact) => without = without.or(Some(artefact)),
            None => {}
        }
    }
    Ok(last.or(without))
}

fn has_eh_frame(artefact: &Artefact) -> bool {
    let mut sections = artefact.facts.sections.iter();
    sections.any(|section| section.name == ".eh_frame" && !section.nobits && section.size > 0)
}
