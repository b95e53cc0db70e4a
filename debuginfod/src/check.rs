//! `windlassd check`: is everything on record there, and what it should be?
//!
//! elfutils' advice for a damaged database is to delete it. Here every content is read back, decoded and hashed, and
//! every row held against its content. A damaged content is marked, so `windlass upload` restores it; one that is
//! sound again loses its mark.

use std::collections::HashSet;

use futures_util::TryStreamExt;

use crate::blob::BlobError;
use crate::catalog::{Artefact, ProfileBatch, Recorded};
use crate::config::Config;
use crate::content_hash::ContentHash;
use crate::elf;
use crate::error::ServiceError;
use crate::namespace::Namespace;
use crate::service::{App, StartError};

/// Rows fetched at once.
const PAGE_ROWS: usize = 1000;

/// What a check found.
#[derive(Debug, Default)]
pub struct CheckReport {
    /// Contents read.
    pub blobs: u64,
    /// Their decoded bytes.
    pub bytes: u64,
    /// Rows of artefacts held against their content.
    pub artefacts: u64,
    /// Contents in the store that nothing is on record of: of uploads that were cut off, or are under way.
    pub orphans: u64,
    /// The bytes they take there.
    pub orphan_bytes: u64,
    /// What is wrong, one line each.
    pub findings: Vec<String>,
}

/// The check could not be done.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// Storage or catalog do not open.
    #[error(transparent)]
    Open(#[from] StartError),
    /// Storage or catalog fail on the way.
    #[error(transparent)]
    Service(#[from] ServiceError),
}

/// Checks what `config` names. The service may run meanwhile.
pub async fn check(config: &Config) -> Result<CheckReport, CheckError> {
    let app = App::open(config).await?;
    let mut report =
        CheckReport { findings: app.catalog(|catalog| catalog.integrity()).await?, ..CheckReport::default() };
    let (mut last, mut known) = (None, HashSet::new());
    loop {
        let page = app.catalog(move |catalog| catalog.blobs(last, PAGE_ROWS)).await?;
        let Some(end) = page.last() else {
            count_orphans(&app, &known, &mut report).await?;
            return Ok(report);
        };
        last = Some(end.blob.hash);
        for recorded in page {
            known.insert(recorded.blob.hash);
            check_blob(&app, recorded, &mut report).await?;
        }
    }
}

async fn count_orphans(
    app: &App,
    known: &HashSet<ContentHash>,
    report: &mut CheckReport,
) -> Result<(), CheckError> {
    let mut objects = std::pin::pin!(app.blobs.objects());
    while let Some((hash, stored_bytes)) = objects.try_next().await.map_err(ServiceError::from)? {
        if !known.contains(&hash) {
            report.orphans += 1;
            report.orphan_bytes += stored_bytes;
        }
    }
    Ok(())
}

async fn check_blob(app: &App, recorded: Recorded, report: &mut CheckReport) -> Result<(), CheckError> {
    let Recorded { blob, damaged } = recorded;
    let hash = blob.hash;
    report.blobs += 1;
    let artefacts = app.catalog(move |catalog| catalog.artefacts_of(hash)).await?;
    let content = match app.blobs.map(blob).await {
        Ok(content) => content,
        Err(error @ BlobError::Damaged { .. }) => {
            app.catalog(move |catalog| catalog.mark_damaged(hash)).await?;
            let profiles = app.catalog(move |catalog| catalog.profiles_of(hash)).await?;
            report.findings.push(format!("{error} ({}", damage(&artefacts, profiles)));
            return Ok(());
        }
        Err(error) => return Err(ServiceError::from(error).into()),
    };
    report.bytes += blob.size;
    if damaged {
        report
            .findings
            .push(format!("stored content {hash} is marked as damaged but sound again; mark removed"));
        app.catalog(move |catalog| catalog.restore_blob(blob)).await?;
    }
    report.artefacts += artefacts.len() as u64;
    let findings = tokio::task::spawn_blocking(move || {
        let check = |artefact: &Artefact| match elf::check(&content[..], artefact.kind, artefact.build_id) {
            Ok(facts) if facts == artefact.facts => None,
            Ok(_) => Some(format!("{}: the catalog states other contents than the file has", name(artefact))),
            Err(error) => Some(format!("{}: {error}", name(artefact))),
        };
        artefacts.iter().filter_map(check).collect::<Vec<_>>()
    })
    .await
    .map_err(ServiceError::from)?;
    report.findings.extend(findings);
    Ok(())
}

/// What a damaged content is to whom, and what to do about it.
fn damage(artefacts: &[Artefact], profiles: Option<ProfileBatch>) -> String {
    if let Some(ProfileBatch { start_ns, end_ns, .. }) = profiles {
        return format!(
            "profiles of {start_ns} to {end_ns} ns); marked, left out of profiles until the storage is \
             restored and checked"
        );
    }
    if artefacts.is_empty() {
        return "derived); marked, made again when it is asked for".to_owned();
    }
    let names = artefacts.iter().map(name).collect::<Vec<_>>().join(", ");
    format!("{names}); marked, upload it again")
}

fn name(artefact: &Artefact) -> String {
    let Artefact { kind, path, build_id, namespace, .. } = artefact;
    match *namespace == Namespace::release() {
        true => format!("{kind}{path} of {build_id}"),
        false => format!("{kind}{path} of {build_id} in namespace {namespace}"),
    }
}
