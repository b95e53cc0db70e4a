//! `windlassd gc`: what may go, why, and its removal beside running uploads.
//!
//! 1. Parts of uploads that nobody went on with for a week.
//! 2. Images that retention or a quota lets go ([`crate::retention`]): their rows, labels and what was derived of them.
//! 3. Profiles that are kept no longer.
//! 4. What was derived of images that are gone.
//! 5. Contents that nothing names: withdrawn first, forgotten a grace time later, and then their objects removed (module
//!    `catalog::collection`).
//! 6. Objects that no content on record has, written before the grace time: what was cut off between writing and the commit.
//! 7. Files of objects that were never finished, which the process was killed over.
//!
//! Each step is right by itself, at any replica, and may be cut off: what a run leaves the next one finds. A commit comes before
//! the removal that it allows.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};
use serde::Serialize;
use tokio_util::sync::CancellationToken;
use windlass_schema::BuildId;

use crate::blob::StoredObject;
use crate::catalog::{Catalog, CatalogError, Image, ImageQuery, Removal, Writer};
use crate::config::Config;
use crate::content_hash::ContentHash;
use crate::error::ServiceError;
use crate::holding::GRACE_S;
use crate::namespace::Namespace;
use crate::retention::{Excess, Retention};
use crate::service::{App, StartError, now_s};
use crate::token::LOCAL;
use crate::unfinished::MAX_AGE_S;

/// Rows and objects looked at in one step, between which others get their turn.
const PAGE: usize = 1000;
/// Most unfinished uploads of a run.
const MAX_STALE_UPLOADS: usize = 100_000;
/// Most rows of profiles and of derived artefacts of a run.
const MAX_ROWS: usize = 1_000_000;
const DAY_S: u64 = 24 * 3600;
/// Who the log says it was.
const COLLECTOR: &str = "gc";

/// How to collect.
#[derive(Clone, Debug)]
pub struct Collect {
    /// What is kept.
    pub retention: Retention,
    /// Only find out.
    pub dry_run: bool,
    /// How long ago a content must have been withdrawn or its object written to be removed, in seconds. Less than
    /// [`GRACE_S`] is safe only if nothing else works on storage and catalog.
    pub grace_s: u64,
}

impl Default for Collect {
    fn default() -> Self {
        Self { retention: Retention::default(), dry_run: false, grace_s: GRACE_S }
    }
}

/// An image that goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Gone {
    /// What there is, or was, of it.
    #[serde(flatten)]
    pub image: Image,
    /// Why.
    pub why: String,
}

/// A number of things and the bytes that they take in the store, or, of artefacts and parts, decoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Amount {
    /// How many.
    pub count: u64,
    /// Bytes.
    pub bytes: u64,
}

impl Amount {
    fn add(&mut self, bytes: u64) {
        self.count += 1;
        self.bytes += bytes;
    }
}

/// What went, or would.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GcReport {
    /// Uploads in parts that nobody went on with.
    pub unfinished: u64,
    /// Images of a namespace, and the decoded bytes of their artefacts.
    pub images: Amount,
    /// Images that a label keeps, which would have gone otherwise.
    pub kept_by_label: u64,
    /// Batches of profiles.
    pub profiles: u64,
    /// Derived artefacts without an image.
    pub derived: u64,
    /// Contents that were withdrawn: they go after the grace time.
    pub withdrawn: Amount,
    /// Contents that nothing named, and their objects.
    pub contents: Amount,
    /// Objects that no content on record has.
    pub orphans: Amount,
    /// Such objects that are younger than the grace time.
    pub young_orphans: u64,
    /// Files that were never finished.
    pub staging: Amount,
}

/// The collection could not be done, or not to its end.
#[derive(Debug, thiserror::Error)]
pub enum GcError {
    /// Storage or catalog do not open.
    #[error(transparent)]
    Open(#[from] StartError),
    /// Storage or catalog fail on the way.
    #[error(transparent)]
    Service(#[from] ServiceError),
}

/// Collects what `config` names. Services may run meanwhile. `tell` hears of each image that goes.
pub async fn gc(
    config: &Config,
    collect: Collect,
    tell: &mut (dyn FnMut(Gone) + Send),
) -> Result<GcReport, GcError> {
    let app = Arc::new(App::open(config).await?);
    Ok(Run::new(&app, collect).all(tell).await?)
}

/// Collects every so often until `stop`.
pub(crate) async fn repeat(app: Arc<App>, retention: Retention, every: Duration, stop: CancellationToken) {
    while stop.run_until_cancelled(tokio::time::sleep(every)).await.is_some() {
        let collect = Collect { retention: retention.clone(), ..Collect::default() };
        let mut tell = |gone: Gone| {
            tracing::info!("removed {} of {}: {}", gone.image.build_id, gone.image.namespace, gone.why);
        };
        match Run::new(&app, collect).all(&mut tell).await {
            Ok(report) => tracing::info!("collected: {report:?}"),
            Err(error) => tracing::error!("collecting what nothing needs: {error}"),
        }
    }
}

struct Run<'a> {
    app: &'a App,
    retention: Retention,
    dry_run: bool,
    now_s: u64,
    /// What was withdrawn or written until then may be removed.
    until_s: u64,
    /// Decoded bytes of images that go, or would, by namespace, as long as nothing is removed.
    going: HashMap<Namespace, u64>,
    report: GcReport,
}

/// What retention lets go of a page of images, what a label keeps of those, and where the next page begins.
#[derive(Default)]
struct Page {
    going: Vec<Image>,
    kept: u64,
    next: Option<BuildId>,
}

impl<'a> Run<'a> {
    fn new(app: &'a App, Collect { retention, dry_run, grace_s }: Collect) -> Self {
        let now_s = now_s();
        let until_s = now_s.saturating_sub(grace_s);
        Self { app, retention, dry_run, now_s, until_s, going: HashMap::new(), report: GcReport::default() }
    }

    async fn all(mut self, tell: &mut (dyn FnMut(Gone) + Send)) -> Result<GcReport, ServiceError> {
        // A storage that is away looks empty, and nothing of what the catalog says of it is known to be so.
        self.app.blobs.require_marker().await?;
        self.unfinished().await?;
        self.unused(tell).await?;
        self.excess(tell).await?;
        let (dry_run, before_ns) = (self.dry_run, self.retention.profiles_before_ns(self.now_s));
        if let Some(before_ns) = before_ns {
            let forget = move |catalog: &dyn Catalog| catalog.forget_profiles(before_ns, MAX_ROWS, dry_run);
            self.report.profiles = self.app.catalog(forget).await?;
        }
        let forget = move |catalog: &dyn Catalog| catalog.forget_derived(MAX_ROWS, dry_run);
        self.report.derived = self.app.catalog(forget).await?;
        self.contents().await?;
        self.orphans().await?;
        let (count, bytes) = self.app.blobs.remove_staging(self.until_s, self.dry_run).await?;
        self.report.staging = Amount { count, bytes };
        Ok(self.report)
    }

    async fn unfinished(&mut self) -> Result<(), ServiceError> {
        let (before_s, dry_run) = (self.now_s.saturating_sub(MAX_AGE_S), self.dry_run);
        let forgotten = self.app.catalog(move |catalog| {
            let stale = catalog.stale_uploads(before_s, MAX_STALE_UPLOADS)?;
            let mut forgotten = 0;
            for upload in &stale {
                forgotten += u64::from(dry_run || catalog.forget_stale_upload(upload, before_s)?);
            }
            Ok(forgotten)
        });
        self.report.unfinished = forgotten.await?;
        Ok(())
    }

    /// What retention lets go for its age.
    async fn unused(&mut self, tell: &mut (dyn FnMut(Gone) + Send)) -> Result<(), ServiceError> {
        let (Some(since_s), Some(days)) =
            (self.retention.unused_since_s(self.now_s), self.retention.unused_days)
        else {
            return Ok(());
        };
        let mut after = None;
        loop {
            let retention = self.retention.clone();
            let page = move |catalog: &dyn Catalog| {
                let query = ImageQuery::default();
                page(catalog, &retention, &query, after, |image| image.used_s < since_s)
            };
            let Page { going, kept, next } = self.app.catalog(page).await?;
            self.report.kept_by_label += kept;
            for image in going {
                let unused_days = self.now_s.saturating_sub(image.used_s) / DAY_S;
                let why = format!("nobody used it for {unused_days} days, and it is kept for {days}");
                self.remove(image, since_s, why, tell).await?;
            }
            if next.is_none() {
                return Ok(());
            }
            after = next;
        }
    }

    /// What goes of namespaces whose quota is nearly used up.
    async fn excess(&mut self, tell: &mut (dyn FnMut(Gone) + Send)) -> Result<(), ServiceError> {
        for usage in self.app.catalog(|catalog| catalog.usage()).await? {
            let Some(quota_bytes) = self.app.quotas.of(&usage.namespace) else { continue };
            // What a dry run lets go for its age is still there.
            let bytes = usage.bytes.saturating_sub(self.going.get(&usage.namespace).copied().unwrap_or(0));
            let Some(excess) = Excess::new(bytes, quota_bytes, self.now_s) else { continue };
            let namespace = usage.namespace.clone();
            let (retention, unused_since_s) =
                (self.retention.clone(), self.retention.unused_since_s(self.now_s));
            let gathered =
                move |catalog: &dyn Catalog| gather(catalog, &retention, namespace, unused_since_s, excess);
            for image in self.app.catalog(gathered).await? {
                let why = format!(
                    "its namespace takes {bytes} bytes of a quota of {quota_bytes}, of which a tenth is kept free, and it was \
                     used longest ago"
                );
                let since_s = image.used_s + 1;
                self.remove(image, since_s, why, tell).await?;
            }
        }
        Ok(())
    }

    async fn remove(
        &mut self,
        image: Image,
        unless_used_since_s: u64,
        why: String,
        tell: &mut (dyn FnMut(Gone) + Send),
    ) -> Result<(), ServiceError> {
        if self.dry_run {
            *self.going.entry(image.namespace.clone()).or_default() += image.bytes;
        } else {
            let removal = Removal {
                build_id: image.build_id,
                namespace: image.namespace.clone(),
                kind: None,
                path: None,
                unless_used_since_s: Some(unless_used_since_s),
                at_s: self.now_s,
                why: why.clone(),
            };
            let writer = Writer { token: format!("{LOCAL}:{COLLECTOR}"), peer: String::new() };
            let removed = self.app.catalog(move |catalog| catalog.remove(&removal, &writer)).await;
            self.app.forget(image.build_id);
            let removed = removed?;
            if removed.artefacts == 0 {
                return Ok(()); // it was used meanwhile
            }
        }
        self.report.images.add(image.bytes);
        tell(Gone { image, why });
        Ok(())
    }

    async fn contents(&mut self) -> Result<(), ServiceError> {
        let (mut after, until_s, now_s) = (None, self.until_s, self.now_s);
        loop {
            let page = self.app.catalog(move |catalog| catalog.unnamed(after, PAGE)).await?;
            let Some(last) = page.last() else { return Ok(()) };
            after = Some(last.blob.hash);
            let fresh: Vec<_> = page.iter().filter(|unnamed| unnamed.withdrawn_s.is_none()).collect();
            for unnamed in &fresh {
                self.report.withdrawn.add(unnamed.blob.stored_size);
            }
            let hashes: Vec<_> = fresh.iter().map(|unnamed| unnamed.blob.hash).collect();
            let due = |at_s: Option<u64>| at_s.unwrap_or(now_s) <= until_s;
            let forgotten = if self.dry_run {
                page.iter().filter(|unnamed| due(unnamed.withdrawn_s)).map(|unnamed| unnamed.blob).collect()
            } else {
                let all: Vec<_> = page.iter().map(|unnamed| unnamed.blob.hash).collect();
                let forget = move |catalog: &dyn Catalog| {
                    catalog.withdraw(&hashes, now_s)?;
                    catalog.forget_blobs(&all, until_s)
                };
                self.app.catalog(forget).await?
            };
            for blob in forgotten {
                if !self.dry_run {
                    self.app.blobs.remove(blob.hash, blob.write).await?;
                }
                self.report.contents.add(blob.stored_size);
            }
        }
    }

    async fn orphans(&mut self) -> Result<(), ServiceError> {
        let mut pages = std::pin::pin!(self.app.blobs.objects().try_chunks(PAGE));
        while let Some(page) = pages.next().await {
            let page = page.map_err(|error| ServiceError::from(error.1))?;
            let hashes: Vec<ContentHash> = page.iter().map(|object| object.hash).collect();
            let recorded = self.app.catalog(move |catalog| catalog.recorded(&hashes)).await?;
            let recorded: HashMap<_, _> = recorded.into_iter().map(|blob| (blob.hash, blob.write)).collect();
            for object in page {
                self.orphan(object, recorded.get(&object.hash).copied()).await?;
            }
        }
        Ok(())
    }

    /// Removes an object unless it is the one on record, whose number is `recorded`, or too young. Where another is on record,
    /// somebody may still name this one who found it there before: until the other is as old.
    async fn orphan(&mut self, object: StoredObject, recorded: Option<u64>) -> Result<(), ServiceError> {
        if recorded == Some(object.write) {
            return Ok(());
        }
        let other_s = match recorded {
            Some(write) => self.app.blobs.written_s(object.hash, write).await?,
            None => None,
        };
        if object.written_s.max(other_s.unwrap_or(0)) > self.until_s {
            self.report.young_orphans += 1;
            return Ok(());
        }
        if !self.dry_run {
            self.app.blobs.remove(object.hash, object.write).await?;
        }
        self.report.orphans.add(object.stored_bytes);
        Ok(())
    }
}

/// Of a page of images those that `wanted` lets go and no label keeps.
fn page(
    catalog: &dyn Catalog,
    retention: &Retention,
    query: &ImageQuery,
    after: Option<BuildId>,
    wanted: impl Fn(&Image) -> bool,
) -> Result<Page, CatalogError> {
    let found = catalog.images(query, after, PAGE)?;
    let mut page = Page { next: found.next, ..Page::default() };
    for image in found.images.into_iter().filter(wanted) {
        match retention.kept_by(&catalog.labels(image.build_id)?) {
            Some(_) => page.kept += 1,
            None => page.going.push(image),
        }
    }
    Ok(page)
}

/// The images of `namespace` that go for its quota, beside those that go for their age.
fn gather(
    catalog: &dyn Catalog,
    retention: &Retention,
    namespace: Namespace,
    unused_since_s: Option<u64>,
    mut excess: Excess,
) -> Result<Vec<Image>, CatalogError> {
    let query = ImageQuery { namespace: Some(namespace), label: None };
    let mut after = None;
    loop {
        let page = page(catalog, retention, &query, after, |image| {
            unused_since_s.is_none_or(|since_s| image.used_s >= since_s) && excess.wants(image)
        })?;
        for image in page.going {
            if excess.wants(&image) {
                excess.add(image);
            }
        }
        if page.next.is_none() {
            return Ok(excess.into_images());
        }
        after = page.next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::tests::{artefact, found, put};

    #[tokio::test]
    async fn what_a_service_removes_it_serves_no_more() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let app = App::open(&Config::new(folder.path().to_owned())).await.expect("a new service");
        put(&app, artefact("unused", "try")).await;
        assert!(found(&app).await.is_some());
        let retention = Retention { unused_days: Some(1), ..Retention::default() };
        let collect = Collect { retention, ..Collect::default() };
        let report = Run::new(&app, collect).all(&mut |_| {}).await.expect("a collection");
        assert_eq!((report.images.count, found(&app).await), (1, None));
    }
}
