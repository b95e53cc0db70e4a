//! From received bytes to an artefact on record: checked, durable, then named.
//!
//! The order is what an acknowledgement is worth: the blob is written and synchronised, then its folder, then the catalog
//! commits, then the uploader hears of it. Whatever is cut off in between leaves a blob without a row, which
//! is never served, and collected later.

use std::fs::File;
use std::sync::Arc;

use crate::audit;
use crate::catalog::{Artefact, Name, Put, Writer};
use crate::conflict::{Settled, Stays, depends_on_facts, settle};
use crate::content::FileContent;
use crate::content_hash::ContentHash;
use crate::elf::{self, Facts};
use crate::error::ServiceError;
use crate::holding::hold;
use crate::intake::Received;
use crate::quota;
use crate::service::{App, now_s};
use crate::uses;

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

/// What is on record that decides about an upload of `hash`, if it can be read.
async fn on_record(app: &App, name: &Name, hash: ContentHash) -> Result<Option<Artefact>, ServiceError> {
    let Name { build_id, kind, ref path, ref namespace } = *name;
    let asked = path.clone();
    let mut versions = app.catalog(move |catalog| catalog.versions(build_id, kind, &asked)).await?;
    versions.retain(|version| version.path == *path);
    Ok(app.namespaces.decisive(versions, namespace, Some(hash)))
}

/// The outcome of an upload of `hash`, if it is known before its content is: it is there, or what is there stays.
pub(crate) async fn foreseen(
    app: &App,
    name: &Name,
    hash: ContentHash,
) -> Result<Option<Outcome>, ServiceError> {
    let there = on_record(app, name, hash).await?;
    match known_beforehand(name, hash, there.as_ref())? {
        Some(outcome) if uses::keep(app, &outcome.artefact).await? => Ok(Some(outcome)),
        _ => Ok(None),
    }
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
    match known_beforehand(&name, hash, there.as_ref())? {
        Some(outcome) if uses::keep(app, &outcome.artefact).await? => return Ok(outcome),
        Some(_) => there = None, // it was removed meanwhile
        None => {}
    }
    let content = Arc::new(FileContent::new(sink, size));
    let facts = check(app, &name, Arc::clone(&content)).await?;
    let Origin { file_name, modified_s, writer } = origin;
    let quota_bytes = app.quotas.of_uploads(&name.namespace);
    for _ in 0..ATTEMPTS {
        let replaced = there.as_ref().map_or(0, |artefact| artefact.blob.size);
        let poorer = match there {
            None => None,
            Some(artefact) if artefact.blob.hash == hash => return Ok(Outcome::present(artefact)),
            Some(artefact) => match settle(name.kind, &artefact.facts, &facts) {
                Settled::Interchangeable => return Ok(Outcome::present(artefact)),
                Settled::Refused(stays) => return Err(conflict(&name, artefact.blob.hash, hash, stays)),
                Settled::Replaces => Some(artefact.blob.hash),
            },
        };
        // Before it is stored: what does not fit would only be collected again.
        quota::admit(app, &name.namespace, size.saturating_sub(replaced), None).await?;
        let held = hold(app, Arc::clone(&content), hash).await?;
        let now_s = now_s();
        let artefact = Artefact {
            build_id: name.build_id,
            kind: name.kind,
            path: name.path.clone(),
            namespace: name.namespace.clone(),
            blob: held.blob()?,
            file_name: file_name.clone(),
            modified_s,
            stored_s: now_s,
            used_s: now_s,
            facts: facts.clone(),
            damaged: false,
        };
        let (row, by) = (artefact.clone(), writer.clone());
        let put = app.catalog(move |catalog| match poorer {
            None => catalog.put_artefact(&row, &by, quota_bytes),
            Some(poorer) => catalog.replace_artefact(&row, poorer, &by, quota_bytes),
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
            Put::OverQuota(used_bytes) => {
                let (namespace, quota_bytes) = (name.namespace, quota_bytes.unwrap_or(0));
                return Err(ServiceError::Quota { namespace, used_bytes, quota_bytes, more_bytes: size });
            }
        }
    }
    Err(ServiceError::Busy("other uploads of this name keep coming in between"))
}

async fn check(app: &App, name: &Name, content: Arc<FileContent>) -> Result<Facts, ServiceError> {
    let _place = app.checking.acquire().await.expect("never closed");
    let (kind, build_id) = (name.kind, name.build_id);
    Ok(tokio::task::spawn_blocking(move || elf::check(&*content, kind, build_id)).await??)
}
