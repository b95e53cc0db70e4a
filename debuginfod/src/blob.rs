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
use std::time::{Duration, Instant};

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
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::content::Content;
use crate::content_hash::ContentHash;
use crate::seekable::{FRAME_BYTES, FrameEncoder, SeekTable};

/// Frames fetched and decoded at once for a reader that keeps up: 1 MiB of content held for it.
const BATCH_FRAMES: usize = 4;
/// Readers that may be given that much at once. Those beyond are given a frame: 200 slow ones hold 58 MiB and not 200.
const LARGE_BATCHES: usize = 8;
/// A reader that takes longer than this for what it was given is slow, in milliseconds. It holds its piece for that long, so
/// there may be many of them, and each is given little.
const SLOW_READER: Duration = Duration::from_millis(100);
/// What a slow reader is given at once in bytes, at the price of decoding a frame four times.
const SLOW_PIECE_BYTES: u64 = 64 * 1024;
/// Blobs up to this stored size in bytes are fetched with one read, seek table included.
const SINGLE_READ_BYTES: u64 = 256 * 1024;

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

    fn path(&self, hash: ContentHash) -> Path {
        let name = hash.to_string();
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
        let size = content.size();
        let stored_size = if size <= WHOLE_PUT_BYTES {
            let stored = tokio::task::spawn_blocking(move || encoded(&*content)).await??;
            let stored_size = stored.len() as u64;
            self.store.put(&self.path(hash), Bytes::from(stored).into()).await?;
            stored_size
        } else {
            let _place = self.large_puts.acquire().await.expect("never closed");
            self.put_large(content, hash).await?
        };
        Ok(Blob { hash, size, stored_size })
    }

    async fn put_large<C>(&self, content: Arc<C>, hash: ContentHash) -> Result<u64, BlobError>
    where
        C: Content + Send + Sync + 'static,
    {
        let (frames, mut encoded) = mpsc::channel::<Vec<u8>>(BATCH_FRAMES);
        let encoding = tokio::task::spawn_blocking(move || {
            // Where nobody takes frames any more the writer failed, and says so.
            encode(&*content, |frame| frames.blocking_send(frame).is_ok())
        });
        let mut writer =
            BufWriter::with_capacity(Arc::clone(&self.store), self.path(hash), UPLOAD_PART_BYTES)
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
        let reader = Reader { blobs: self.clone(), blob, range, table: None, given: None, large_batch: None };
        stream::try_unfold(reader, |mut reader| async move {
            Ok(reader.next().await?.map(|piece| (piece, reader)))
        })
    }

    /// The stored form: what a client that accepts zstd is sent. Each frame is decoded before it is passed on, since
    /// a client cannot tell a damaged one from a missing file.
    pub fn stream_stored(&self, blob: Blob) -> impl Stream<Item = Result<Bytes, BlobError>> + Send + 'static {
        let reader = Reader {
            blobs: self.clone(),
            blob,
            range: 0..blob.size,
            table: None,
            given: None,
            large_batch: None,
        };
        stream::try_unfold(Some(reader), |reader| async move {
            let Some(mut reader) = reader else {
                return Ok(None);
            };
            if let Some((stored, _)) = reader.next_frames(u64::MAX).await? {
                return Ok(Some((stored, Some(reader))));
            }
            let end = reader.blob.stored_size - SeekTable::stored_bytes(reader.blob.size);
            let table = reader.blobs.read_stored(reader.blob, end..reader.blob.stored_size).await?;
            Ok(Some((table, None)))
        })
    }

    /// Contents in the store and the bytes that they take, on record or not.
    pub fn objects(&self) -> impl Stream<Item = Result<(ContentHash, u64), BlobError>> + Send + 'static {
        let prefix = (self.prefix.parts().count() > 0).then_some(&self.prefix);
        self.store.list(prefix).map_err(BlobError::from).try_filter_map(|object| {
            let hash = object.location.filename().and_then(|name| name.parse().ok());
            std::future::ready(Ok(hash.map(|hash| (hash, object.size))))
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

/// The folder of a file URL.
fn local_root(url: &str) -> Option<PathBuf> {
    Url::parse(url).ok().filter(|url| url.scheme() == "file")?.to_file_path().ok()
}

/// Creates the folders that blobs are in, so that no upload has to: one that finds a folder which another is just creating
/// does not wait until its name is durable.
fn create_folders(root: &FilePath) -> std::io::Result<()> {
    let mut created = false;
    for byte in 0..=u8::MAX {
        match std::fs::create_dir(root.join(format!("{byte:02x}"))) {
            Ok(()) => created = true,
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    if created { File::open(root)?.sync_all() } else { Ok(()) }
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
    /// When the last piece was handed over. It is asked for the next one when that is on its way.
    given: Option<Instant>,
    /// The right to a large piece, as long as that may be held.
    large_batch: Option<OwnedSemaphorePermit>,
}

impl Reader {
    fn is_slow(&self) -> bool {
        self.given.is_some_and(|given| given.elapsed() > SLOW_READER)
    }

    /// The next piece of the content.
    async fn next(&mut self) -> Result<Option<Bytes>, BlobError> {
        let most = if self.is_slow() { SLOW_PIECE_BYTES } else { u64::MAX };
        Ok(self.next_frames(most).await?.map(|(_, content)| content))
    }

    /// The next frames as stored, and what of their content is in the range, cut to `most` bytes.
    async fn next_frames(&mut self, most: u64) -> Result<Option<(Bytes, Bytes)>, BlobError> {
        if self.range.is_empty() {
            return Ok(None);
        }
        if self.table.is_none() {
            self.table = Some(self.blobs.seek_table(self.blob).await?);
        }
        // What was given before is gone. Nobody knows yet how fast a new reader is.
        self.large_batch = None;
        if self.given.is_some() && !self.is_slow() {
            self.large_batch = Arc::clone(&self.blobs.large_batches).try_acquire_owned().ok();
        }
        let batch = if self.large_batch.is_some() { BATCH_FRAMES } else { 1 };
        let (table, whole) = self.table.as_ref().expect("set above");
        let mut frames = table.frames(&self.range);
        frames.end = frames.end.min(frames.start + batch);
        let at = table.stored_range(&frames);
        let stored = match whole {
            Some(bytes) => bytes.slice(at.start as usize..at.end as usize),
            None => self.blobs.read_stored(self.blob, at).await?,
        };
        let first = frames.start as u64 * FRAME_BYTES;
        let decoded = table.decode(frames, &stored).map_err(|why| damaged(self.blob.hash, &why))?;
        let end = self.range.end.min(first + decoded.len() as u64).min(self.range.start.saturating_add(most));
        let wanted = (self.range.start - first) as usize..(end - first) as usize;
        let content = if most < decoded.len() as u64 {
            Bytes::copy_from_slice(&decoded[wanted]) // the rest is not held
        } else {
            Bytes::from(decoded).slice(wanted)
        };
        self.range.start = end;
        self.given = Some(Instant::now());
        Ok(Some((stored, content)))
    }
}
