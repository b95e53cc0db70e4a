//! `windlassd check`: is everything on record there, and what it should be?
//!
//! elfutils' advice for a damaged database is to delete it. Here every content is read back, decoded and hashed, and
//! every row held against its content. A damaged content is marked, so `windlass upload` restores it; one that is
//! sound again loses its mark. With `--repair` what can be had without its uploader is had again:
//!
//! | damaged | repair |
//! |---|---|
//! | unwind table, symbol index | made again from what is stored |
//! | skeleton of an image whose executable is stored | taken off record: the executable has it all |
//! | what came from an upstream server | taken off record: fetched again when somebody asks |
//! | part of an unfinished upload | its upload is given up: it starts again |
//! | facts of an artefact, sums of a namespace | taken from the content, and from the rows |
//! | anything else | lost until it is uploaded again |

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use futures_util::TryStreamExt;
use windlass_schema::BuildId;
use windlass_schema::http::ArtefactKind;

use crate::blob::{Blob, BlobError};
use crate::catalog::{
    Artefact, Catalog, DerivedKey, DerivedKind, Named, ProfileBatch, Recorded, Removal, Writer,
};
use crate::config::Config;
use crate::content_hash::ContentHash;
use crate::derive::is_sound;
use crate::elf::{self, Facts};
use crate::error::ServiceError;
use crate::namespace::Namespace;
use crate::service::{App, StartError, now_s};
use crate::token::LOCAL;
use crate::{symbols, unwind};

/// Rows fetched at once.
const PAGE_ROWS: usize = 1000;
/// Who the log says it was.
const CHECKER: &str = "check";

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
    /// What was wrong, one line each.
    pub repaired: Vec<String>,
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

/// Checks what `config` names, and with `repair` repairs what it can. The service may run meanwhile.
pub async fn check(config: &Config, repair: bool) -> Result<CheckReport, CheckError> {
    let app = Arc::new(App::open(config).await?);
    // A storage that is away looks damaged from end to end.
    app.blobs.require_marker().await.map_err(ServiceError::from)?;
    let mut check = Check { app, repair, report: CheckReport::default(), remake: BTreeSet::new() };
    check.catalog().await?;
    check.contents().await?;
    check.made_again().await?;
    Ok(check.report)
}

struct Check {
    app: Arc<App>,
    repair: bool,
    report: CheckReport,
    /// What is to be made again.
    remake: BTreeSet<(BuildId, DerivedKind)>,
}

impl Check {
    /// Notes what is wrong and would be repaired in the words of `how`; whether it is to be done.
    fn repairable(&mut self, what: String, how: &str) -> bool {
        match self.repair {
            true => self.report.repaired.push(format!("{what}; {how}")),
            false => self.report.findings.push(format!("{what}; --repair would help: {how}")),
        }
        self.repair
    }

    async fn catalog(&mut self) -> Result<(), ServiceError> {
        let wrong_sums = self.app.catalog(|catalog| catalog.wrong_usage()).await?;
        if !wrong_sums.is_empty() {
            let names: Vec<_> = wrong_sums.iter().map(Namespace::as_str).collect();
            let what = format!(
                "what is on record of the sizes of {} is not the sum of their artefacts",
                names.join(", ")
            );
            if self.repairable(what, "added up again") {
                self.app.catalog(|catalog| catalog.add_up_usage()).await?;
            }
        }
        self.report.findings.extend(self.app.catalog(|catalog| catalog.integrity()).await?);
        Ok(())
    }

    async fn contents(&mut self) -> Result<(), ServiceError> {
        let (mut last, mut known) = (None, HashSet::new());
        loop {
            let page = self.app.catalog(move |catalog| catalog.blobs(last, PAGE_ROWS)).await?;
            let Some(end) = page.last() else {
                return self.count_orphans(&known).await;
            };
            last = Some(end.blob.hash);
            for recorded in page {
                known.insert((recorded.blob.hash, recorded.blob.write));
                self.content(recorded).await?;
            }
        }
    }

    async fn count_orphans(&mut self, known: &HashSet<(ContentHash, u64)>) -> Result<(), ServiceError> {
        let mut objects = std::pin::pin!(self.app.blobs.objects());
        while let Some(object) = objects.try_next().await? {
            if !known.contains(&(object.hash, object.write)) {
                self.report.orphans += 1;
                self.report.orphan_bytes += object.stored_bytes;
            }
        }
        Ok(())
    }

    async fn content(&mut self, recorded: Recorded) -> Result<(), ServiceError> {
        let Recorded { blob, damaged } = recorded;
        let hash = blob.hash;
        self.report.blobs += 1;
        let content = match self.app.blobs.map(blob).await {
            Ok(content) => content,
            Err(error @ BlobError::Damaged { .. }) => return self.damage(blob, &error).await,
            Err(error) => return Err(error.into()),
        };
        self.report.bytes += blob.size;
        if damaged {
            self.report
                .findings
                .push(format!("stored content {hash} is marked as damaged but sound again; mark removed"));
            self.app.catalog(move |catalog| catalog.restore_blob(blob)).await?;
        }
        let named = move |catalog: &dyn Catalog| Ok((catalog.artefacts_of(hash)?, catalog.named(hash)?));
        let (artefacts, Named { derived, .. }) = self.app.catalog(named).await?;
        self.report.artefacts += artefacts.len() as u64;
        let (wrong, unsound) = tokio::task::spawn_blocking(move || {
            let unsound = derived.into_iter().filter(|key| is_current(key) && !is_sound(*key, &content));
            let unsound: Vec<_> = unsound.collect();
            let checked = artefacts.into_iter().map(|artefact| {
                let facts = elf::check(&content[..], artefact.kind, artefact.build_id);
                (artefact, facts)
            });
            let wrong = checked.filter(|(artefact, facts)| facts.as_ref().ok() != Some(&artefact.facts));
            (wrong.collect::<Vec<_>>(), unsound)
        })
        .await?;
        for (artefact, facts) in wrong {
            match facts {
                Ok(facts) => self.facts(artefact, facts).await?,
                Err(error) => self.report.findings.push(format!("{}: {error}", name(&artefact))),
            }
        }
        for key in unsound {
            self.derived(key, format!("{} of {} cannot be read", key.kind.as_str(), key.build_id)).await?;
        }
        Ok(())
    }

    async fn facts(&mut self, artefact: Artefact, facts: Facts) -> Result<(), ServiceError> {
        let what = format!("{}: the catalog states other contents than the file has", name(&artefact));
        if self.repairable(what, "stated as the file has them") {
            let (name, hash) = (artefact.name(), artefact.blob.hash);
            self.app.catalog(move |catalog| catalog.correct_facts(&name, hash, &facts)).await?;
        }
        Ok(())
    }

    async fn derived(&mut self, key: DerivedKey, what: String) -> Result<(), ServiceError> {
        if self.repairable(what, "made again") {
            self.app.catalog(move |catalog| catalog.forget_derived_of(key.build_id, key.kind)).await?;
            self.remake.insert((key.build_id, key.kind));
        }
        Ok(())
    }

    /// A content that cannot be read: what it is to whom, and what to do about it.
    async fn damage(&mut self, blob: Blob, error: &BlobError) -> Result<(), ServiceError> {
        let hash = blob.hash;
        let found = move |catalog: &dyn Catalog| {
            let is_current = catalog.recorded(&[hash])?.contains(&blob);
            Ok((is_current, catalog.artefacts_of(hash)?, catalog.profiles_of(hash)?, catalog.named(hash)?))
        };
        let (is_current, artefacts, profiles, Named { derived, uploads }) = self.app.catalog(found).await?;
        if !is_current {
            return Ok(()); // it was collected, or stored again, since it was read from the catalog
        }
        self.app.catalog(move |catalog| catalog.mark_damaged(hash)).await?;
        for key in derived {
            self.derived(key, format!("{error} ({} of {})", key.kind.as_str(), key.build_id)).await?;
        }
        for upload in uploads {
            let what = format!("{error} (a part of an upload of {} of {})", upload.kind, upload.build_id);
            if self.repairable(what, "the upload is given up and starts again") {
                self.app.catalog(move |catalog| catalog.forget_upload(&upload)).await?;
            }
        }
        if let Some(ProfileBatch { start_ns, end_ns, .. }) = profiles {
            self.report.findings.push(format!(
                "{error} (profiles of {start_ns} to {end_ns} ns); marked, left out of profiles until the storage is \
                 restored and checked"
            ));
        }
        let mut lost = Vec::new();
        for artefact in artefacts {
            let what = || format!("{error} ({})", name(&artefact));
            match self.replacement(&artefact).await? {
                Some(how) if self.repairable(what(), how) => self.remove(&artefact, how).await?,
                Some(_) => {}
                None => lost.push(name(&artefact)),
            }
        }
        if !lost.is_empty() {
            self.report.findings.push(format!("{error} ({}); marked, upload it again", lost.join(", ")));
        }
        Ok(())
    }

    /// Why an artefact can be done without, if it can.
    async fn replacement(&self, artefact: &Artefact) -> Result<Option<&'static str>, ServiceError> {
        if artefact.namespace == Namespace::upstream() {
            return Ok(Some("taken off record, fetched again when somebody asks for it"));
        }
        if artefact.kind != ArtefactKind::Skeleton {
            return Ok(None);
        }
        let executable = self.app.sound_artefact(artefact.build_id, ArtefactKind::Executable).await?;
        Ok(executable.map(|_| "taken off record, the executable has all that it had"))
    }

    async fn remove(&self, artefact: &Artefact, why: &str) -> Result<(), ServiceError> {
        let removal = Removal {
            build_id: artefact.build_id,
            namespace: artefact.namespace.clone(),
            kind: Some(artefact.kind),
            path: Some(artefact.path.clone()),
            unless_used_since_s: None,
            at_s: now_s(),
            why: format!("damaged, {why}"),
        };
        let writer = Writer { token: format!("{LOCAL}:{CHECKER}"), peer: String::new() };
        self.app.catalog(move |catalog| catalog.remove(&removal, &writer)).await?;
        Ok(())
    }

    /// Makes what was derived again, now that all that is damaged is marked.
    async fn made_again(&mut self) -> Result<(), ServiceError> {
        for (id, kind) in std::mem::take(&mut self.remake) {
            let made = match kind {
                DerivedKind::Unwind | DerivedKind::UnwindWire => unwind::make(&self.app, id, kind).await,
                DerivedKind::Symbols => symbols::open(&self.app, id).await.map(|_| ()),
            };
            if let Err(error) = made {
                self.report.findings.push(format!("{} of {id} is not made again: {error}", kind.as_str()));
            }
        }
        Ok(())
    }
}

/// Whether this program would read it. What another version made is made again when it is asked for.
fn is_current(key: &DerivedKey) -> bool {
    let version = match key.kind {
        DerivedKind::Unwind | DerivedKind::UnwindWire => unwind::version(key.kind),
        DerivedKind::Symbols => windlass_symbol_index::FORMAT_VERSION,
    };
    key.version == version
}

fn name(artefact: &Artefact) -> String {
    let Artefact { kind, path, build_id, namespace, .. } = artefact;
    match *namespace == Namespace::release() {
        true => format!("{kind}{path} of {build_id}"),
        false => format!("{kind}{path} of {build_id} in namespace {namespace}"),
    }
}
