//! From received bytes to an artefact on record: checked, durable, then named.
//!
//! The order is what an acknowledgement is worth: the blob is written and synchronised, then its folder, then the catalog
//! commits, then the uploader hears of it. Whatever is cut off in between leaves a blob without a row, which
//! is never served.

use std::fs::File;
use std::sync::Arc;

use windlass_schema::BuildId;
use windlass_schema::http::ArtefactKind;

use crate::audit;
use crate::blob::Blob;
use crate::catalog::{Artefact, Put, Subject, Writer};
use crate::conflict::{Settled, Stays, depends_on_facts, settle};
use crate::content::FileContent;
use crate::content_hash::ContentHash;
use crate::elf::{self, Facts};
use crate::error::ServiceError;
use crate::intake::Received;
use crate::namespace::Namespace;
use crate::service::{App, now_s};

/// How often a decision is made again because another upload came between it and its commit.
const ATTEMPTS: usize = 4;

/// Where a file comes from, beside its bytes.
pub(crate) struct Origin {
    /// Base name, possibly empty.
    pub(crate) file_name: String,
    /// Seconds since 1970.
    pub(crate) modified_s: u64,
    /// Who brings it.
    pub(crate) writer: Writer,
}

/// What an artefact is stored under.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Name {
    pub(crate) build_id: BuildId,
    pub(crate) kind: ArtefactKind,
    /// For sources the path as uploaded, for a `.dwo` file the ID of its unit, else empty.
    pub(crate) path: String,
    /// Whose.
    pub(crate) namespace: Namespace,
}

impl Name {
    /// What the log says of it.
    pub(crate) fn subject(&self) -> Subject {
        Subject {
            build_id: Some(self.build_id),
            kind: Some(self.kind),
            path: self.path.clone(),
            namespace: Some(self.namespace.clone()),
            ..Subject::default()
        }
    }
}

/// What became of an upload.
pub(crate) struct Outcome {
    /// What is stored now: for an interchangeable kind perhaps another content than the one sent.
    pub(crate) artefact: Artefact,
    /// Whether that is new.
    pub(crate) new: bool,
    /// The poorer content whose place it took.
    pub(crate) replaced: Option<ContentHash>,
}

impl Outcome {
    fn present(artefact: Artefact) -> Self {
        Self { artefact, new: false, replaced: None }
    }
}

/// What is on record of an upload.
struct OnRecord {
    /// What decides about it, if it can be read.
    artefact: Option<Artefact>,
    /// Its content, under whatever name.
    blob: Option<Blob>,
}

async fn on_record(app: &App, name: &Name, hash: ContentHash) -> Result<OnRecord, ServiceError> {
    let Name { build_id, kind, ref path, ref namespace } = *name;
    let asked = path.clone();
    let found =
        app.catalog(move |catalog| Ok((catalog.versions(build_id, kind, &asked)?, catalog.blob(hash)?)));
    let (mut versions, blob) = found.await?;
    versions.retain(|version| version.path == *path);
    Ok(OnRecord { artefact: app.namespaces.decisive(versions, namespace, Some(hash)), blob })
}

/// The outcome of an upload of `hash`, if it is known before its content is: it is there, or what is there stays.
pub(crate) async fn foreseen(
    app: &App,
    name: &Name,
    hash: ContentHash,
) -> Result<Option<Outcome>, ServiceError> {
    let there = on_record(app, name, hash).await?;
    known_beforehand(name, hash, there.artefact.as_ref())
}

fn known_beforehand(
    name: &Name,
    hash: ContentHash,
    there: Option<&Artefact>,
) -> Result<Option<Outcome>, ServiceError> {
    match there.cloned() {
        Some(artefact) if artefact.blob.hash == hash => Ok(Some(Outcome::present(artefact))),
        Some(artefact) if !depends_on_facts(name.kind) => {
            match settle(name.kind, &artefact.facts, &artefact.facts) {
                Settled::Refused(stays) => Err(conflict(name, artefact.blob.hash, hash, stays)),
                Settled::Interchangeable | Settled::Replaces => Ok(Some(Outcome::present(artefact))),
            }
        }
        _ => Ok(None),
    }
}

fn conflict(name: &Name, stored: ContentHash, offered: ContentHash, stays: Stays) -> ServiceError {
    let Name { build_id, kind, path, namespace } = name;
    let name = format!("{kind}{path} of build-ID {build_id} in namespace {namespace}");
    ServiceError::Conflict { name, stored, offered, stays }
}

/// Checks a received file, stores it and records it.
pub(crate) async fn store(
    app: &Arc<App>,
    name: Name,
    received: Received<File>,
    origin: Origin,
) -> Result<Outcome, ServiceError> {
    let Received { sink, hash, size } = received;
    let mut there = on_record(app, &name, hash).await?;
    if let Some(outcome) = known_beforehand(&name, hash, there.artefact.as_ref())? {
        return Ok(outcome);
    }
    let content = Arc::new(FileContent::new(sink, size));
    let facts = check(app, &name, Arc::clone(&content)).await?;
    let Origin { file_name, modified_s, writer } = origin;
    for _ in 0..ATTEMPTS {
        let poorer = match there.artefact {
            None => None,
            Some(artefact) if artefact.blob.hash == hash => return Ok(Outcome::present(artefact)),
            Some(artefact) => match settle(name.kind, &artefact.facts, &facts) {
                Settled::Interchangeable => return Ok(Outcome::present(artefact)),
                Settled::Refused(stays) => return Err(conflict(&name, artefact.blob.hash, hash, stays)),
                Settled::Replaces => Some(artefact.blob.hash),
            },
        };
        let blob = match there.blob {
            Some(blob) => blob,
            None => app.blobs.put(Arc::clone(&content), hash).await?,
        };
        let artefact = Artefact {
            build_id: name.build_id,
            kind: name.kind,
            path: name.path.clone(),
            namespace: name.namespace.clone(),
            blob,
            file_name: file_name.clone(),
            modified_s,
            stored_s: now_s(),
            facts: facts.clone(),
            damaged: false,
        };
        let (row, by) = (artefact.clone(), writer.clone());
        let put = app.catalog(move |catalog| match poorer {
            None => catalog.put_artefact(&row, &by),
            Some(poorer) => catalog.replace_artefact(&row, poorer, &by),
        });
        let put = put.await;
        app.forget(name.build_id);
        let put = put?;
        match put {
            Put::Stored => {
                audit::stored(app, &artefact, &writer);
                return Ok(Outcome { artefact, new: true, replaced: poorer });
            }
            Put::Present(present) if present.hash == hash => return Ok(Outcome::present(artefact)),
            // Another upload was faster: what it stored is what this one is held against.
            Put::Present(_) => there = on_record(app, &name, hash).await?,
        }
    }
    Err(ServiceError::Busy("other uploads of this name keep coming in between"))
}

async fn check(app: &App, name: &Name, content: Arc<FileContent>) -> Result<Facts, ServiceError> {
    let _place = app.checking.acquire().await.expect("never closed");
    let (kind, build_id) = (name.kind, name.build_id);
    Ok(tokio::task::spawn_blocking(move || elf::check(&*content, kind, build_id)).await??)
}
