//! What does the catalog say of a name, without being asked each time?
//!
//! A query of the database takes longer than all else of a small answer, and clients ask for the same again and again, most of
//! all for what is not there. So what the catalog said is kept in memory, a "no" like a "yes", until something of the image
//! changes. Of changes by this process a row is told at once ([`Rows::forget`], [`Rows::mistrust`]), before whoever made them hears of it. Of
//! changes by others, such as replicas and `windlassd check`, it is told by the catalog's [list of changes](crate::catalog::Changes), which is
//! read at most every [`BELIEVED`]: so old may an answer be.
//!
//! What is kept of a name is what readers get of it, and all who may read get the same. Whether somebody may is asked before.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use windlass_schema::BuildId;
use windlass_schema::http::ArtefactKind;

use crate::catalog::{Artefact, Changed};
use crate::error::ServiceError;
use crate::recent::Recent;
use crate::service::App;

/// How old the list of changes may be that a row is believed by.
pub(crate) const BELIEVED: Duration = Duration::from_millis(250);
/// What rows may take together, in bytes: some ten thousand images, or three times as many that are not there.
const BUDGET_BYTES: u64 = 32 << 20;
/// Parts of the memory, so that threads do not wait for one another.
const SHARDS: usize = 16;
/// What an image takes, in bytes, beside its rows: entries of two tables.
const IMAGE_BYTES: u64 = 300;

type Row = Option<Arc<Artefact>>;

/// What is known of an image. One that has been forgotten may still be filled by whoever began to before, and is seen by
/// nobody else.
#[derive(Default)]
struct Image {
    rows: Mutex<HashMap<(ArtefactKind, Box<str>), Row>>,
    bytes: AtomicU64,
}

/// How far the list of changes was read.
#[derive(Default)]
struct Position {
    /// `None` before the first time.
    at: Option<u64>,
}

/// What is known.
pub(crate) struct Rows {
    shards: Vec<Mutex<Recent<BuildId, Arc<Image>>>>,
    position: tokio::sync::Mutex<Position>,
    /// Since when the times below count.
    start: Instant,
    /// Until when rows are believed, in milliseconds.
    believed_until_ms: AtomicU64,
    /// The last doubt that was cleared up, and the last there was.
    cleared: AtomicU64,
    doubts: AtomicU64,
}

impl Default for Rows {
    fn default() -> Self {
        let shard = || Mutex::new(Recent::new(BUDGET_BYTES / SHARDS as u64));
        Self {
            shards: std::iter::repeat_with(shard).take(SHARDS).collect(),
            position: tokio::sync::Mutex::default(),
            start: Instant::now(),
            believed_until_ms: AtomicU64::new(0),
            cleared: AtomicU64::new(0),
            doubts: AtomicU64::new(0),
        }
    }
}

impl Rows {
    fn shard(&self, id: BuildId) -> MutexGuard<'_, Recent<BuildId, Arc<Image>>> {
        let last = id.as_bytes().last().copied().unwrap_or_default();
        self.shards[usize::from(last) % SHARDS].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The artefact of this name that readers get.
    pub(crate) async fn find(
        &self,
        app: &App,
        id: BuildId,
        kind: ArtefactKind,
        path: &str,
    ) -> Result<Row, ServiceError> {
        self.catch_up(app).await?;
        let image = self.image(id);
        let key = (kind, Box::from(path));
        if let Some(row) = image.rows.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(row.clone());
        }
        let asked = path.to_owned();
        let versions = app.catalog(move |catalog| catalog.versions(id, kind, &asked)).await?;
        let row = app.namespaces.most_trusted(versions, path).map(Arc::new);
        self.keep(id, &image, key, &row);
        Ok(row)
    }

    /// Forgets what is known of an image.
    pub(crate) fn forget(&self, id: BuildId) {
        self.shard(id).remove(&id);
    }

    /// Believes nothing until the list of changes was read again.
    pub(crate) fn mistrust(&self) {
        self.doubts.fetch_add(1, Ordering::SeqCst);
    }

    /// What is known of an image. It is on record before the catalog is asked, so that a change in between finds it.
    fn image(&self, id: BuildId) -> Arc<Image> {
        let mut shard = self.shard(id);
        shard.get(&id).unwrap_or_else(|| {
            let image = Arc::<Image>::default();
            image.bytes.store(IMAGE_BYTES, Ordering::Relaxed);
            shard.insert(id, IMAGE_BYTES, Arc::clone(&image));
            image
        })
    }

    fn keep(&self, id: BuildId, image: &Arc<Image>, key: (ArtefactKind, Box<str>), row: &Row) {
        let added = IMAGE_BYTES + key.1.len() as u64 + row.as_deref().map_or(0, memory_bytes);
        let known = image.rows.lock().unwrap_or_else(PoisonError::into_inner).insert(key, row.clone());
        if known.is_some() {
            return;
        }
        let bytes = image.bytes.fetch_add(added, Ordering::Relaxed) + added;
        let mut shard = self.shard(id);
        if shard.holds(&id, |kept| Arc::ptr_eq(kept, image)) {
            shard.insert(id, bytes, Arc::clone(image));
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn is_believed(&self) -> bool {
        self.cleared.load(Ordering::SeqCst) == self.doubts.load(Ordering::SeqCst)
            && self.now_ms() < self.believed_until_ms.load(Ordering::SeqCst)
    }

    /// Reads the list of changes, unless that was done just now.
    async fn catch_up(&self, app: &App) -> Result<(), ServiceError> {
        if self.is_believed() {
            return Ok(());
        }
        let mut position = self.position.lock().await;
        if self.is_believed() {
            return Ok(());
        }
        let (doubts, now_ms) = (self.doubts.load(Ordering::SeqCst), self.now_ms());
        let since = position.at;
        let changes = app.catalog(move |catalog| catalog.changes(since)).await?;
        match changes.changed {
            Changed::Images(images) => images.into_iter().for_each(|id| self.forget(id)),
            Changed::Any => {
                for shard in &self.shards {
                    shard.lock().unwrap_or_else(PoisonError::into_inner).clear();
                }
            }
        }
        position.at = Some(changes.position);
        let believed_ms = u64::try_from(BELIEVED.as_millis()).expect("a moment");
        self.believed_until_ms.store(now_ms + believed_ms, Ordering::SeqCst);
        self.cleared.store(doubts, Ordering::SeqCst);
        Ok(())
    }
}

/// What an artefact takes in memory.
fn memory_bytes(artefact: &Artefact) -> u64 {
    let sections = &artefact.facts.sections;
    let names: usize = sections.iter().map(|section| section.name.len()).sum();
    let texts = artefact.path.len() + artefact.file_name.len() + artefact.namespace.as_str().len();
    (size_of::<Artefact>() + size_of_val(&sections[..]) + names + texts) as u64
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::blob::Blob;
    use crate::catalog::{Put, Writer};
    use crate::config::Config;
    use crate::content_hash::ContentHash;
    use crate::namespace::Namespace;
    use crate::service::now_s;
    use crate::uses;

    pub(crate) fn artefact(content: &str, namespace: &str) -> Artefact {
        Artefact {
            build_id: "aabb".parse().unwrap(),
            kind: ArtefactKind::Source,
            path: "/a.c".to_owned(),
            namespace: namespace.parse().unwrap(),
            blob: Blob { hash: ContentHash::of(content.as_bytes()), size: 1, stored_size: 1, write: 1 },
            file_name: String::new(),
            modified_s: 0,
            stored_s: 0,
            used_s: 0,
            facts: Default::default(),
            damaged: false,
        }
    }

    pub(crate) async fn found(app: &App) -> Row {
        app.rows.find(app, "aabb".parse().unwrap(), ArtefactKind::Source, "/a.c").await.unwrap()
    }

    pub(crate) async fn put(app: &App, artefact: Artefact) {
        let writer = Writer { token: "ci".to_owned(), peer: String::new() };
        let put = app.catalog(move |catalog| catalog.put_artefact(&artefact, &writer, None)).await.unwrap();
        assert_eq!(put, Put::Stored);
    }

    #[tokio::test]
    async fn another_replica_is_heard_soon_and_this_one_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let config = Config::new(folder.path().to_owned());
        let (here, there) = (App::open(&config).await.unwrap(), App::open(&config).await.unwrap());
        assert_eq!(found(&here).await, None);
        let first = artefact("first", "try");
        put(&there, first.clone()).await;
        let since = Instant::now();
        while found(&here).await.is_none() {
            assert!(since.elapsed() < 20 * BELIEVED, "never heard of it");
            tokio::time::sleep(BELIEVED / 10).await;
        }
        assert_eq!(found(&here).await.as_deref(), Some(&first));
        let second = artefact("second", Namespace::release().as_str());
        put(&here, second.clone()).await;
        here.rows.forget(second.build_id);
        assert_eq!(found(&here).await.as_deref(), Some(&second));
        let hash = second.blob.hash;
        here.mark_damaged(hash).await.unwrap();
        assert!(found(&here).await.unwrap().damaged);
    }

    #[tokio::test]
    async fn a_use_of_what_is_kept_is_recorded_and_known_from_then_on() {
        let folder = tempfile::tempdir().unwrap();
        let app = App::open(&Config::new(folder.path().to_owned())).await.unwrap();
        put(&app, artefact("old", "try")).await;
        assert_eq!(found(&app).await.unwrap().used_s, 0, "kept from now on");
        app.uses.note(&found(&app).await.unwrap());
        uses::flush(&app).await;
        let kept = found(&app).await.unwrap();
        assert!(!uses::is_due(&kept, now_s()), "or each use would be recorded: {}", kept.used_s);
    }

    #[tokio::test]
    async fn a_change_while_the_catalog_answers_is_not_lost() {
        let folder = tempfile::tempdir().unwrap();
        let app = App::open(&Config::new(folder.path().to_owned())).await.unwrap();
        let id = "aabb".parse().unwrap();
        app.rows.catch_up(&app).await.unwrap();
        // As a reader does that is overtaken: it has asked, an upload is stored, then it keeps its answer.
        let image = app.rows.image(id);
        put(&app, artefact("new", "try")).await;
        app.rows.forget(id);
        app.rows.keep(id, &image, (ArtefactKind::Source, "/a.c".into()), &None);
        assert!(found(&app).await.is_some());
    }

    #[tokio::test]
    async fn many_names_of_one_image_do_not_fill_the_memory() {
        let rows = Rows::default();
        let id = "aabb".parse().unwrap();
        let image = rows.image(id);
        for number in 0..10_000 {
            rows.keep(id, &image, (ArtefactKind::Source, format!("/{number}").into()), &None);
        }
        assert!(!rows.shard(id).holds(&id, |_| true));
    }
}
