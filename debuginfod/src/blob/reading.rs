//! How is a stored content read, by frames, and never passed on unchecked?
//!
//! What a reader is given next depends on how fast it was: much at once to a few that keep up, little to slow ones, so that
//! many of those do not hold much together.

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt, stream};
use memmap2::Mmap;
use object_store::ObjectStoreExt;
use sha2::{Digest, Sha256};
use tokio::sync::OwnedSemaphorePermit;

use super::{Blob, BlobError, BlobStore, damaged, map_private};
use crate::content_hash::ContentHash;
use crate::seekable::{FRAME_BYTES, SeekTable};

/// Frames fetched and decoded at once for a reader that keeps up: 1 MiB of content held for it.
pub(super) const BATCH_FRAMES: usize = 4;
/// Readers that may be given that much at once. Those beyond are given a frame: 200 slow ones hold 58 MiB and not 200.
pub(super) const LARGE_BATCHES: usize = 8;
/// A reader that takes longer than this for what it was given is slow, in milliseconds. It holds its piece for that long, so
/// there may be many of them, and each is given little.
const SLOW_READER: Duration = Duration::from_millis(100);
/// What a slow reader is given at once in bytes, at the price of decoding a frame four times.
const SLOW_PIECE_BYTES: u64 = 64 * 1024;
/// Blobs up to this stored size in bytes are fetched with one read, seek table included.
const SINGLE_READ_BYTES: u64 = 256 * 1024;

/// The two shapes of a stored content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// Its bytes.
    Content,
    /// zstd in frames, as it is stored: [`crate::seekable`].
    Stored,
}

impl BlobStore {
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
        match self.store.get_range(&self.path(blob.hash, blob.write), range).await {
            Ok(bytes) if bytes.len() as u64 == expected => Ok(bytes),
            Ok(_) => Err(damaged(blob.hash, &"shorter than recorded")),
            Err(object_store::Error::NotFound { .. }) => {
                self.require_marker().await?;
                Err(damaged(blob.hash, &"the blob is gone"))
            }
            // A range beyond the end of the object, in words that differ by store.
            Err(error) => match self.store.head(&self.path(blob.hash, blob.write)).await {
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
        let reader = Reader::new(self, blob, range);
        stream::try_unfold(reader, |mut reader| async move {
            Ok(reader.next().await?.map(|piece| (piece, reader)))
        })
    }

    /// The stored form: what a client that accepts zstd is sent. Each frame is decoded before it is passed on, since
    /// a client cannot tell a damaged one from a missing file.
    pub fn stream_stored(&self, blob: Blob) -> impl Stream<Item = Result<Bytes, BlobError>> + Send + 'static {
        let reader = Reader::new(self, blob, 0..blob.size);
        stream::try_unfold(Some(reader), |reader| async move {
            let Some(mut reader) = reader else {
                return Ok(None);
            };
            if let Some((stored, _)) = reader.next_frames(u64::MAX).await? {
                return Ok(Some((stored, Some(reader))));
            }
            Ok(Some((reader.blobs.stored_table(reader.blob).await?, None)))
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
        Ok(map_private(&self.checked_file(blob, Form::Content).await?)?)
    }

    /// The whole of a form as a file without a name: every frame decoded, the content's SHA-256 checked.
    pub async fn checked_file(&self, blob: Blob, form: Form) -> Result<File, BlobError> {
        let mut state = (self.scratch_file()?, Sha256::new());
        let mut reader = Reader::new(self, blob, 0..blob.size);
        while let Some((stored, content)) = reader.next_frames(u64::MAX).await? {
            state = tokio::task::spawn_blocking(move || -> std::io::Result<_> {
                state.0.write_all(if form == Form::Stored { &stored } else { &content })?;
                state.1.update(&content);
                Ok(state)
            })
            .await??;
        }
        let (mut file, hasher) = state;
        match ContentHash::new(hasher.finalize().into()) {
            found if found == blob.hash => {}
            found => return Err(damaged(blob.hash, &format_args!("its SHA-256 is {found}"))),
        }
        if form == Form::Stored {
            file.write_all(&self.stored_table(blob).await?)?;
        }
        Ok(file)
    }

    /// The end of the stored form.
    async fn stored_table(&self, blob: Blob) -> Result<Bytes, BlobError> {
        let start = blob.stored_size.saturating_sub(SeekTable::stored_bytes(blob.size));
        self.read_stored(blob, start..blob.stored_size).await
    }
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
    fn new(blobs: &BlobStore, blob: Blob, range: Range<u64>) -> Self {
        Self { blobs: blobs.clone(), blob, range, table: None, given: None, large_batch: None }
    }

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
