//! `windlassd check`: is everything on record there, and what it should be?
//!
//! elfutils' advice for a damaged database is to delete it. Here every content is read back, decoded and hashed, and
//! every row held against its content. A damaged content is marked, so `windlass upload` restores it.

use crate::blob::{Blob, BlobError};
use crate::catalog::Artefact;
use crate::config::Config;
use crate::elf;
use crate::error::ServiceError;
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
    /// What is wrong, one line each.
    pub findings: Vec<String>,
}

/// The check could not be done.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// Storage or catalog do not open.
    #[error("{0}")]
    Open(#[from] StartError),
    /// Storage or catalog fail on the way.
    #[error("{0}")]
    Service(#[from] ServiceError),
}

/// Checks what `config` names. The service may run meanwhile.
pub async fn check(config: &Config) -> Result<CheckReport, CheckError> {
    let app = App::open(config)?;
    let mut report =
        CheckReport { findings: app.catalog(|catalog| catalog.integrity()).await?, ..CheckReport::default() };
    let mut last = None;
    loop {
        let page = app.catalog(move |catalog| catalog.blobs(last, PAGE_ROWS)).await?;
        let Some(end) = page.last() else {
            return Ok(report);
        };
        last = Some(end.hash);
        for blob in page {
            check_blob(&app, blob, &mut report).await?;
        }
    }
}

async fn check_blob(app: &App, blob: Blob, report: &mut CheckReport) -> Result<(), CheckError> {
    let hash = blob.hash;
    report.blobs += 1;
    let artefacts = app.catalog(move |catalog| catalog.artefacts_of(hash)).await?;
    let content = match app.blobs.map(blob).await {
        Ok(content) => content,
        Err(error @ BlobError::Damaged { .. }) => {
            app.catalog(move |catalog| catalog.mark_damaged(hash)).await?;
            let names = artefacts.iter().map(name).collect::<Vec<_>>().join(", ");
            report.findings.push(format!("{error} ({names}); marked, upload it again"));
            return Ok(());
        }
        Err(error) => return Err(ServiceError::from(error).into()),
    };
    report.bytes += blob.size;
    if artefacts.iter().any(|artefact| artefact.damaged) {
        report
            .findings
            .push(format!("stored content {hash} is marked as damaged but sound again; mark removed"));
        app.catalog(move |catalog| catalog.restore_blob(blob)).await?;
    }
    report.artefacts += artefacts.len() as u64;
    let findings = tokio::task::spawn_blocking(move || {
        let check = |artefact: &Artefact| match elf::check(&content, artefact.kind, artefact.build_id) {
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

fn name(artefact: &Artefact) -> String {
    format!("{}{} of {}", artefact.kind, artefact.path, artefact.build_id)
}
