//! Where contents are kept: a folder or an object store, each content named by its SHA-256.
//!
//! Parca and Pyroscope key their buckets by build-ID, so equal files are stored again for each name and a
//! half-written object is served as if it were whole. Here the name is the hash of the
//! content: equal contents are one blob, writing twice is harmless, and whatever is read can be
//! checked. A blob without a catalog row is never served. Blobs are in [`crate::seekable`] form.
//!
//! A disk that is not mounted looks like an empty folder, and a bucket of the wrong name like an empty bucket. So
//! the store holds one more object, [`MARKER`]: where that is missing the storage is away, and nothing in it is
//! taken for lost.

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use memmap2::Mmap;
use object_store::buffered::BufWriter;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use reqwest::Url;
use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;

use crate::content_hash::ContentHash;
use crate::seekable::{FRAME_BYTES, FrameEncoder, SeekTable};

/// Frames fetched and decoded at once: 1 MiB of content held for each reader.
const BATCH_FRAMES: usize = 4;
/// Blobs up to this stored size in bytes are fetched with one read, seek table included.
const SINGLE_READ_BYTES: u64 = 256 * 1024;

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
}

impl BlobStore {
    /// Opens `url` (`file:///...`, `s3://bucket/prefix`; credentials come from the environment).
    /// `scratch` is a local folder for temporary files.
    pub async fn open(url: &str, scratch: PathBuf, expected: Expected) -> Result<Self, BlobError> {
        let (store, prefix) = connect(url, expected)?;
        let opened = Self { store, prefix, scratch, url: url.into() };
        match (opened.require_marker().await, expected) {
            (Err(BlobError::Away { .. }), Expected::New) => {
                opened.store.put(&opened.marker(), Bytes::from_static(MARKER_TEXT).into()).await?;
                Ok(opened)
            }
            (found, _) => found.map(|()| opened),
        }
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

    fn path(&self, hash: ContentHash) -> Path {
        let name = hash.to_string();
        self.prefix.clone().join(&name[..2]).join(name.as_str())
    }

    /// An unlinked temporary file: gone with the process, however that ends.
    pub fn scratch_file(&self) -> std::io::Result<File> {
        tempfile::tempfile_in(&self.scratch)
    }

    /// Stores `content`, whose SHA-256 is `hash`. On return it is durable. Nothing is written to a storage that is
    /// away: it would be hidden as soon as the right one is back.
    pub async fn put<C>(&self, content: Arc<C>, hash: ContentHash) -> Result<Blob, BlobError>
    where
        C: AsRef<[u8]> + Send + Sync + 'static,
    {
        self.require_marker().await?;
        let size = (*content).as_ref().len() as u64;
        let (frames, mut encoded) = mpsc::channel::<Vec<u8>>(BATCH_FRAMES);
        let encoding = tokio::task::spawn_blocking(move || -> std::io::Result<()> {
            let mut encoder = FrameEncoder::new()?;
            for raw in (*content).as_ref().chunks(FRAME_BYTES as usize) {
                if frames.blocking_send(encoder.frame(raw)?).is_err() {
                    return Ok(()); // the writer failed and says so
                }
            }
            let _ = frames.blocking_send(encoder.finish());
            Ok(())
        });
        let mut writer = BufWriter::new(Arc::clone(&self.store), self.path(hash));
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
        Ok(Blob { hash, size, stored_size })
    }

    async fn seek_table(&self, blob: Blob) -> Result<(SeekTable, Option<Bytes>), BlobError> {
        let table_bytes = SeekTable::stored_bytes(blob.size).min(blob.stored_size);
        let whole = blob.stored_size <= SINGLE_READ_BYTES;
        let start = if whole { 0 } else { blob.stored_size - table_bytes };
        let bytes = self.read_stored(blob, start..blob.stored_size).await?;
        let table = &bytes[bytes.len().saturating_sub(table_bytes as usize)..];
        let table =
            SeekTable::parse(table, blob.size, blob.stored_size).map_err(|why| damaged(blob.hash, &why))?;
        Ok((table, whole.then_some(bytes)))
    }

    async fn read_stored(&self, blob: Blob, range: Range<u64>) -> Result<Bytes, BlobError> {
        let expected = range.end - range.start;
        match self.store.get_range(&self.path(blob.hash), range).await {
            Ok(bytes) if bytes.len() as u64 == expected => Ok(bytes),
            Ok(_) => Err(damaged(blob.hash, &"shorter than recorded")),
            Err(object_store::Error::NotFound { .. }) => {
                self.require_marker().await?;
                Err(damaged(blob.hash, &"the blob is gone"))
            }
            // A range beyond the end of the object, in words that differ by store.
            Err(error) => match self.store.head(&self.path(blob.hash)).await {
                Ok(meta) if meta.size < blob.stored_size => Err(damaged(blob.hash, &"shorter than recorded")),
                _ => Err(error.into()),
            },
        }
    }

    /// The bytes `range` of the content, decoded, in pieces of at most 1 MiB.
    pub fn stream(
        &self,
        blob: Blob,
        range: Range<u64>,
    ) -> impl Stream<Item = Result<Bytes, BlobError>> + Send + 'static {
        let range = range.start.min(blob.size)..range.end.min(blob.size);
        let reader = Reader { blobs: self.clone(), blob, range, table: None };
        stream::try_unfold(reader, |mut reader| async move {
            Ok(reader.next().await?.map(|piece| (piece, reader)))
        })
    }

    /// The stored form: what a client that accepts zstd is sent. Each frame is decoded before it is passed on, since
    /// a client cannot tell a damaged one from a missing file.
    pub fn stream_stored(&self, blob: Blob) -> impl Stream<Item = Result<Bytes, BlobError>> + Send + 'static {
        let reader = Reader { blobs: self.clone(), blob, range: 0..blob.size, table: None };
        stream::try_unfold(Some(reader), |reader| async move {
            let Some(mut reader) = reader else {
                return Ok(None);
            };
            if let Some((stored, _)) = reader.next_frames().await? {
                return Ok(Some((stored, Some(reader))));
            }
            let end = reader.blob.stored_size - SeekTable::stored_bytes(reader.blob.size);
            let table = reader.blobs.read_stored(reader.blob, end..reader.blob.stored_size).await?;
            Ok(Some((table, None)))
        })
    }

    /// The whole content in memory, its SHA-256 checked.
    pub async fn read(&self, blob: Blob) -> Result<Vec<u8>, BlobError> {
        let content = self.stream(blob, 0..blob.size).map_ok(|piece| piece.to_vec()).try_concat().await?;
        match ContentHash::of(&content) {
            found if found == blob.hash => Ok(content),
            found => Err(damaged(blob.hash, &format_args!("its SHA-256 is {found}"))),
        }
    }

    /// The whole content as a mapped file, its SHA-256 checked.
    pub async fn map(&self, blob: Blob) -> Result<Mmap, BlobError> {
        let mut state = (self.scratch_file()?, Sha256::new());
        let mut pieces = std::pin::pin!(self.stream(blob, 0..blob.size));
        while let Some(piece) = pieces.next().await.transpose()? {
            state = tokio::task::spawn_blocking(move || -> std::io::Result<_> {
                state.0.write_all(&piece)?;
                state.1.update(&piece);
                Ok(state)
            })
            .await??;
        }
        let (file, hasher) = state;
        match ContentHash::new(hasher.finalize().into()) {
            found if found == blob.hash => Ok(map_private(&file)?),
            found => Err(damaged(blob.hash, &format_args!("its SHA-256 is {found}"))),
        }
    }
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

/// The store behind `url`, and the path in it. The folder of a file URL is created only if nothing is expected there.
fn connect(url: &str, expected: Expected) -> Result<(Arc<dyn ObjectStore>, Path), BlobError> {
    let fail = |why: &dyn ToString| BlobError::Storage { url: url.to_owned(), why: why.to_string() };
    let parsed = Url::parse(url).map_err(|e| fail(&e))?;
    if parsed.scheme() == "file" {
        let root = parsed.to_file_path().map_err(|()| fail(&"not an absolute path"))?;
        match expected {
            Expected::New => std::fs::create_dir_all(&root).map_err(|e| fail(&e))?,
            Expected::Marked if !root.try_exists().map_err(|e| fail(&e))? => {
                return Err(BlobError::Away { url: url.to_owned() });
            }
            Expected::Marked => {}
        }
        let store = LocalFileSystem::new_with_prefix(root)?.with_fsync(true);
        return Ok((Arc::new(store), Path::default()));
    }
    let environment = std::env::vars().map(|(key, value)| (key.to_ascii_lowercase(), value));
    let (store, prefix) = object_store::parse_url_opts(&parsed, environment).map_err(|e| fail(&e))?;
    Ok((store.into(), prefix))
}

fn damaged(hash: ContentHash, why: &dyn ToString) -> BlobError {
    BlobError::Damaged { hash, why: why.to_string() }
}

struct Reader {
    blobs: BlobStore,
    blob: Blob,
    /// What is still to be delivered.
    range: Range<u64>,
    table: Option<(SeekTable, Option<Bytes>)>,
}

impl Reader {
    /// The next piece of the content.
    async fn next(&mut self) -> Result<Option<Bytes>, BlobError> {
        Ok(self.next_frames().await?.map(|(_, content)| content))
    }

    /// The next frames as stored, and what of their content is in the range.
    async fn next_frames(&mut self) -> Result<Option<(Bytes, Bytes)>, BlobError> {
        if self.range.is_empty() {
            return Ok(None);
        }
        if self.table.is_none() {
            self.table = Some(self.blobs.seek_table(self.blob).await?);
        }
        let (table, whole) = self.table.as_ref().expect("set above");
        let mut frames = table.frames(&self.range);
        frames.end = frames.end.min(frames.start + BATCH_FRAMES);
        let at = table.stored_range(&frames);
        let stored = match whole {
            Some(bytes) => bytes.slice(at.start as usize..at.end as usize),
            None => self.blobs.read_stored(self.blob, at).await?,
        };
        let first = frames.start as u64 * FRAME_BYTES;
        let decoded = table.decode(frames, &stored).map_err(|why| damaged(self.blob.hash, &why))?;
        let end = self.range.end.min(first + decoded.len() as u64);
        let content = Bytes::from(decoded).slice((self.range.start - first) as usize..(end - first) as usize);
        self.range.start = end;
        Ok(Some((stored, content)))
    }
}
