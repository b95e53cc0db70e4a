//! Where contents are kept: a folder or an object store, each content named by its SHA-256.
//!
//! Parca and Pyroscope key their buckets by build-ID, so equal files are stored again for each name and a
//! half-written object is served as if it were whole. Here the name is the hash of the
//! content: equal contents are one blob, writing twice is harmless, and whatever is read can be
//! checked. A blob without a catalog row is never served. Blobs are in [`crate::seekable`] form.
//!
//! Each write of a content is an object of its own, `HASH-NUMBER`, and the catalog says which one counts. So an object that
//! nothing names can be removed while somebody stores the same content again: nobody will ever name this one.
//!
//! A disk that is not mounted looks like an empty folder, and a bucket of the wrong name like an empty bucket. So
//! the store holds one more object, [`MARKER`]: where that is missing the storage is away, and nothing in it is
//! taken for lost.

mod object;
mod reading;
mod storage_url;

use std::fs::File;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt};
use memmap2::Mmap;
use object_store::buffered::BufWriter;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use tokio::io::AsyncWriteExt;
use tokio::sync::{Semaphore, mpsc};

use crate::content::Content;
use crate::content_hash::ContentHash;
use crate::seekable::{FRAME_BYTES, FrameEncoder};
pub use object::StoredObject;
use object::{new_number, object_name, parse_object_name, remove_staging};
pub use reading::Form;
use reading::{BATCH_FRAMES, LARGE_BATCHES};
use storage_url::{connect, create_folders, local_root};

/// Contents up to this size in bytes are encoded in memory and written with one request.
const WHOLE_PUT_BYTES: u64 = 1 << 20;
/// Bytes of one part of a larger object: S3's least, and two thousand of them are the largest upload.
const UPLOAD_PART_BYTES: usize = 5 << 20;
/// Parts under way to the store at once for one object. With the one that is gathered, a large put holds 15 MiB.
const UPLOAD_PARTS_AT_ONCE: usize = 2;
/// Large puts at once. Further ones wait, as files on the disk.
const LARGE_PUTS: usize = 3;

/// Name of the object that says that this is the storage, beneath its prefix.
pub const MARKER: &str = "windlass-storage";
/// What it holds, for whoever finds it.
const MARKER_TEXT: &[u8] =
    b"Contents stored by windlassd. It does not start on a storage without this object.\n";

/// What a storage must be to be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// Nothing is on record: whatever is missing is created, the marker too.
    New,
    /// Contents are on record: it must be there, with its marker.
    Marked,
}

/// A stored content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blob {
    /// Its name.
    pub hash: ContentHash,
    /// Decoded size in bytes.
    pub size: u64,
    /// Stored size in bytes.
    pub stored_size: u64,
    /// Number of the write that made its object; 0 of those from before there were numbers, whose objects have none in their
    /// names.
    pub write: u64,
}

/// A blob could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// The storage URL is not usable.
    #[error("storage {url:?} is not usable: {why}")]
    Storage {
        /// As configured.
        url: String,
        /// What is wrong with it.
        why: String,
    },
    /// The marker is missing: another folder or bucket than the one that was written to.
    #[error(
        "storage {url:?} is away: the catalog lists contents, but there is no object {MARKER:?} in the storage \
         (mount or restore it, or correct --storage; if only this object was lost, create an empty one)"
    )]
    Away {
        /// As configured.
        url: String,
    },
    /// The store failed.
    #[error("object store: {0}")]
    Store(#[from] object_store::Error),
    /// A local file failed.
    #[error("temporary file: {0}")]
    Io(#[from] std::io::Error),
    /// What was read is not what was written.
    #[error("stored content {hash} is damaged: {why}")]
    Damaged {
        /// Which.
        hash: ContentHash,
        /// How it shows.
        why: String,
    },
    /// The runtime stops.
    #[error("stopping")]
    Stopping,
}

impl From<tokio::task::JoinError> for BlobError {
    fn from(_: tokio::task::JoinError) -> Self {
        Self::Stopping
    }
}

/// The store.
#[derive(Clone)]
pub struct BlobStore {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    scratch: PathBuf,
    url: Arc<str>,
    large_puts: Arc<Semaphore>,
    large_batches: Arc<Semaphore>,
}

impl BlobStore {
    /// Opens `url` (`file:///...`, `s3://bucket/prefix`; credentials come from the environment).
    /// `scratch` is a local folder for temporary files.
    pub async fn open(url: &str, scratch: PathBuf, expected: Expected) -> Result<Self, BlobError> {
        let (store, prefix) = connect(url, expected)?;
        let [large_puts, large_batches] =
            [LARGE_PUTS, LARGE_BATCHES].map(|most| Arc::new(Semaphore::new(most)));
        let opened = Self { store, prefix, scratch, url: url.into(), large_puts, large_batches };
        match (opened.require_marker().await, expected) {
            (Err(BlobError::Away { .. }), Expected::New) => {
                opened.store.put(&opened.marker(), Bytes::from_static(MARKER_TEXT).into()).await?;
            }
            (found, _) => found?,
        }
        if let Some(root) = local_root(url) {
            create_folders(&root)?;
        }
        Ok(opened)
    }

    fn marker(&self) -> Path {
        self.prefix.clone().join(MARKER)
    }

    /// Fails with [`BlobError::Away`] if the marker is missing.
    pub async fn require_marker(&self) -> Result<(), BlobError> {
        match self.store.head(&self.marker()).await {
            Ok(_) => Ok(()),
            Err(object_store::Error::NotFound { .. }) => {
                Err(BlobError::Away { url: self.url.as_ref().to_owned() })
            }
            Err(error) => Err(error.into()),
        }
    }

    fn path(&self, hash: ContentHash, write: u64) -> Path {
        let name = object_name(hash, write);
        self.prefix.clone().join(&name[..2]).join(name.as_str())
    }

    /// An unlinked temporary file: gone with the process, however that ends.
    pub fn scratch_file(&self) -> std::io::Result<File> {
        tempfile::tempfile_in(&self.scratch)
    }

    /// Stores `content`, whose SHA-256 is `hash`. On return it is durable: the object, and in a folder its name too. Nothing
    /// is written to a storage that is away: it would be hidden as soon as the right one is back.
    pub async fn put<C>(&self, content: Arc<C>, hash: ContentHash) -> Result<Blob, BlobError>
    where
        C: Content + Send + Sync + 'static,
    {
        self.require_marker().await?;
        let (size, write) = (content.size(), new_number());
        let stored_size = if size <= WHOLE_PUT_BYTES {
            let stored = tokio::task::spawn_blocking(move || encoded(&*content)).await??;
            let stored_size = stored.len() as u64;
            self.store.put(&self.path(hash, write), Bytes::from(stored).into()).await?;
            stored_size
        } else {
            let _place = self.large_puts.acquire().await.expect("never closed");
            self.put_large(content, self.path(hash, write)).await?
        };
        Ok(Blob { hash, size, stored_size, write })
    }

    async fn put_large<C>(&self, content: Arc<C>, path: Path) -> Result<u64, BlobError>
    where
        C: Content + Send + Sync + 'static,
    {
        let (frames, mut encoded) = mpsc::channel::<Vec<u8>>(BATCH_FRAMES);
        let encoding = tokio::task::spawn_blocking(move || {
            // Where nobody takes frames any more the writer failed, and says so.
            encode(&*content, |frame| frames.blocking_send(frame).is_ok())
        });
        let mut writer = BufWriter::with_capacity(Arc::clone(&self.store), path, UPLOAD_PART_BYTES)
            .with_max_concurrency(UPLOAD_PARTS_AT_ONCE);
        let mut stored_size = 0;
        while let Some(frame) = encoded.recv().await {
            stored_size += frame.len() as u64;
            if let Err(error) = writer.write_all(&frame).await {
                let _ = writer.abort().await;
                return Err(error.into());
            }
        }
        if let Err(error) = encoding.await? {
            let _ = writer.abort().await;
            return Err(error.into());
        }
        writer.shutdown().await?;
        Ok(stored_size)
    }

    /// Objects in the store, on record or not.
    pub fn objects(&self) -> impl Stream<Item = Result<StoredObject, BlobError>> + Send + 'static {
        let prefix = (self.prefix.parts().count() > 0).then_some(&self.prefix);
        self.store.list(prefix).map_err(BlobError::from).try_filter_map(|object| {
            let named = object.location.filename().and_then(parse_object_name);
            let written_s = object.last_modified.timestamp().try_into().unwrap_or(0);
            std::future::ready(Ok(named.map(|(hash, write)| StoredObject {
                hash,
                write,
                stored_bytes: object.size,
                written_s,
            })))
        })
    }

    /// When an object was written by the store's clock, in seconds since 1970, if it is there.
    pub(crate) async fn written_s(&self, hash: ContentHash, write: u64) -> Result<Option<u64>, BlobError> {
        match self.store.head(&self.path(hash, write)).await {
            Ok(meta) => Ok(Some(meta.last_modified.timestamp().try_into().unwrap_or(0))),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes an object, if it is there.
    pub(crate) async fn remove(&self, hash: ContentHash, write: u64) -> Result<(), BlobError> {
        match self.store.delete(&self.path(hash, write)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes what writers that were killed left half written in a folder until `until_s`: number of files and their bytes. A bucket
    /// has rules of its own for that.
    pub(crate) async fn remove_staging(&self, until_s: u64, dry_run: bool) -> Result<(u64, u64), BlobError> {
        let Some(root) = local_root(&self.url) else { return Ok((0, 0)) };
        Ok(tokio::task::spawn_blocking(move || remove_staging(&root, until_s, dry_run)).await??)
    }
}

/// Encodes `content` frame by frame until `take` wants no more.
fn encode(content: &(impl Content + ?Sized), mut take: impl FnMut(Vec<u8>) -> bool) -> std::io::Result<()> {
    let mut encoder = FrameEncoder::new()?;
    let mut raw = vec![0; FRAME_BYTES.min(content.size()) as usize];
    let mut at = 0;
    while at < content.size() {
        let count = FRAME_BYTES.min(content.size() - at);
        let raw = &mut raw[..count as usize];
        content.read_at(raw, at)?;
        at += count;
        if !take(encoder.frame(raw)?) {
            return Ok(());
        }
    }
    take(encoder.finish());
    Ok(())
}

/// The stored form of `content` in memory.
fn encoded(content: &(impl Content + ?Sized)) -> std::io::Result<Vec<u8>> {
    let mut stored = Vec::new();
    encode(content, |frame| {
        stored.extend(frame);
        true
    })?;
    Ok(stored)
}

/// Maps a file of [`BlobStore::scratch_file`].
pub fn map_private(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the file has no name and its only handle is ours, so nobody can write to it or cut
    // it short while it is mapped.
    unsafe { Mmap::map(file) }
}

/// A folder for temporary files inside `data`.
pub fn scratch_folder(data: &FilePath) -> std::io::Result<PathBuf> {
    let folder = data.join("tmp");
    std::fs::create_dir_all(&folder)?;
    Ok(folder)
}

fn damaged(hash: ContentHash, why: &dyn ToString) -> BlobError {
    BlobError::Damaged { hash, why: why.to_string() }
}
