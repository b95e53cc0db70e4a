//! Which contents lie checked in plain local files, so that the kernel can send them?
//!
//! elfutils serves the files of a build where they lie, and may: nobody else writes there. Here contents are compressed, and may be in
//! a bucket far away, so each answer would cost a decoder or a round trip. A content that is asked for is therefore decoded
//! and held against its hash once, into a file without a name, and served from there. The stored zstd form of it is a
//! copy of its own, for clients that take it. Copies are gone with the process, and the least wanted ones with the budget.
//!
//! What is small is kept in memory instead: to send a file costs more than to write a few kilobytes, and a section of 36 bytes needs no
//! copy of all that is around it. A large content is sent to the first who asks while it is decoded, and copied when it is asked for again: most
//! debuginfo is wanted once by each client, and nobody waits until four gigabytes are checked.

use std::collections::HashSet;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt, stream};
use memmap2::Mmap;
use rustix::process::{Resource, getrlimit};

use crate::blob::{Blob, BlobError, BlobStore, Form, map_private};
use crate::content_hash::ContentHash;
use crate::flight::Flights;
use crate::recent::Recent;

/// Contents up to this size in bytes are copied before the first answer: some milliseconds.
const AT_ONCE_BYTES: u64 = 1 << 20;
/// Answers up to this size in bytes are kept in memory.
const SMALL_BYTES: u64 = 16 * 1024;
/// What they take together, in bytes of memory.
const SMALL_BUDGET_BYTES: u64 = 32 << 20;
/// What each takes beside its bytes: its key and its place, some hundred.
const SMALL_OVERHEAD_BYTES: u64 = 200;
/// Copies at most: each is a mapping, of which Linux gives a process 65,530, and an open file, of which it may have half of those
/// that this process is granted.
const MAX_COPIES: u64 = 16_384;
/// Large contents that were asked for once; at the limit all are forgotten.
const MAX_ASKED: usize = 4096;
/// Bytes read at once where the kernel cannot send.
const PIECE_BYTES: usize = 256 * 1024;

type Key = (ContentHash, Form);
type SmallKey = (ContentHash, Form, Range<u64>);

/// From where bytes can be sent at once.
pub(crate) enum Source {
    /// Here they are.
    Memory(Bytes),
    /// The whole form of the content that they are of.
    Copy(Arc<LocalCopy>),
}

/// A checked file that nobody else knows, and which the kernel can send.
pub(crate) struct LocalCopy {
    /// `None` only while it is dropped.
    open: Option<(File, Mmap)>,
}

impl LocalCopy {
    /// Maps a file of [`BlobStore::checked_file`].
    pub(crate) fn new(file: File) -> std::io::Result<Self> {
        let map = map_private(&file)?;
        Ok(Self { open: Some((file, map)) })
    }

    fn open(&self) -> &(File, Mmap) {
        self.open.as_ref().expect("taken by drop alone")
    }

    /// Whether it has as many bytes. Of a content that was stored again, perhaps by another version, the stored form may differ.
    fn is_of(&self, size: u64) -> bool {
        self.open().1.len() as u64 == size
    }

    /// The file, for the kernel to send from.
    pub(crate) fn file(&self) -> BorrowedFd<'_> {
        self.open().0.as_fd()
    }

    /// Where in the file these bytes lie, if they are bytes of its mapping.
    pub(crate) fn offset_of(&self, bytes: &[u8]) -> Option<u64> {
        let (mapped, asked) = (self.open().1.as_ptr_range(), bytes.as_ptr_range());
        (mapped.start <= asked.start && asked.end <= mapped.end)
            .then(|| (asked.start.addr() - mapped.start.addr()) as u64)
    }

    /// A range of it, not read yet: a connection that knows the copy has the kernel send it.
    pub(crate) fn mapped(self: &Arc<Self>, range: Range<u64>) -> Bytes {
        Bytes::from_owner(Mapped(Arc::clone(self))).slice(range.start as usize..range.end as usize)
    }

    /// A range of it in pieces, read on a blocking thread.
    pub(crate) fn pieces(
        self: Arc<Self>,
        range: Range<u64>,
    ) -> impl Stream<Item = Result<Bytes, BlobError>> + Send + 'static {
        stream::try_unfold((self, range), |(copy, mut left)| async move {
            if left.is_empty() {
                return Ok(None);
            }
            let count = PIECE_BYTES.min((left.end - left.start) as usize);
            let (source, at) = (Arc::clone(&copy), left.start);
            let piece = tokio::task::spawn_blocking(move || {
                let mut piece = vec![0; count];
                source.open().0.read_exact_at(&mut piece, at).map(|()| Bytes::from(piece))
            });
            let piece = piece.await??;
            left.start += count as u64;
            Ok(Some((piece, (copy, left))))
        })
    }
}

/// To give up the last handle of a large file takes the kernel a while.
impl Drop for LocalCopy {
    fn drop(&mut self) {
        let open = self.open.take();
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn_blocking(move || drop(open));
        }
    }
}

/// The mapping of a copy as [`Bytes`] take it.
struct Mapped(Arc<LocalCopy>);

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.0.open().1
    }
}

async fn gather(pieces: impl Stream<Item = Result<Bytes, BlobError>>) -> Result<Vec<u8>, BlobError> {
    pieces.map_ok(|piece| piece.to_vec()).try_concat().await
}

/// The copies there are.
pub(crate) struct Copies {
    small: Mutex<Recent<SmallKey, Bytes>>,
    /// What a copy weighs at least, in bytes: so there are never more than there may be.
    least_weight: u64,
    kept: Arc<Mutex<Recent<Key, Arc<LocalCopy>>>>,
    asked: Mutex<HashSet<Key>>,
    flights: Flights<Key, Result<Arc<LocalCopy>, Arc<BlobError>>>,
}

impl Copies {
    /// At most `budget_bytes` of the disk; without any, none in memory either.
    pub(crate) fn new(budget_bytes: u64) -> Self {
        let open_files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let most_copies = MAX_COPIES.min(open_files / 2).max(1);
        Self {
            least_weight: budget_bytes / most_copies,
            small: Mutex::new(Recent::new(SMALL_BUDGET_BYTES.min(budget_bytes))),
            kept: Arc::new(Mutex::new(Recent::new(budget_bytes))),
            asked: Mutex::default(),
            flights: Flights::default(),
        }
    }

    /// From where to send `range` of a form of `blob`, unless from the storage. `Err` says that nothing can be read; that no copy
    /// can be made is no error.
    pub(crate) async fn source(
        &self,
        blobs: &BlobStore,
        blob: Blob,
        form: Form,
        range: &Range<u64>,
    ) -> Result<Option<Source>, BlobError> {
        let size = range.end - range.start;
        if size > SMALL_BYTES {
            return Ok(self.copy(blobs, blob, form).await?.map(Source::Copy));
        }
        let key = (blob.hash, form, range.clone());
        let lock = || self.small.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bytes) = lock().get(&key) {
            return Ok(Some(Source::Memory(bytes)));
        }
        let bytes = match form {
            Form::Content if size == blob.size => blobs.read(blob).await?,
            Form::Content => gather(blobs.stream(blob, range.clone())).await?,
            Form::Stored => gather(blobs.stream_stored(blob)).await?,
        };
        let bytes = Bytes::from(bytes);
        lock().insert(key, size + SMALL_OVERHEAD_BYTES, bytes.clone());
        Ok(Some(Source::Memory(bytes)))
    }

    async fn copy(
        &self,
        blobs: &BlobStore,
        blob: Blob,
        form: Form,
    ) -> Result<Option<Arc<LocalCopy>>, BlobError> {
        let key = (blob.hash, form);
        let size = match form {
            Form::Content => blob.size,
            Form::Stored => blob.stored_size,
        };
        let most = {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(copy) = kept.get(&key).filter(|copy| copy.is_of(size)) {
                return Ok(Some(copy));
            }
            kept.most()
        };
        // An empty file cannot be mapped, and need not be.
        if size == 0 || size > most {
            return Ok(None);
        }
        if blob.size > AT_ONCE_BYTES {
            let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
            if asked.len() >= MAX_ASKED {
                asked.clear();
            }
            if !asked.insert(key) {
                drop(self.make(blobs, blob, form, size));
            }
            return Ok(None);
        }
        match self.make(blobs, blob, form, size).await {
            Some(Ok(copy)) => Ok(Some(copy)),
            Some(Err(error)) => match &*error {
                BlobError::Damaged { hash, why } => Err(BlobError::Damaged { hash: *hash, why: why.clone() }),
                _ => Ok(None),
            },
            None => Ok(None),
        }
    }

    /// Makes the copy, in the background if nobody waits for it.
    fn make(
        &self,
        blobs: &BlobStore,
        blob: Blob,
        form: Form,
        size: u64,
    ) -> impl Future<Output = Option<Result<Arc<LocalCopy>, Arc<BlobError>>>> + use<> {
        let (kept, blobs) = (Arc::clone(&self.kept), blobs.clone());
        let weight = size.max(self.least_weight);
        let key = (blob.hash, form);
        self.flights.join(key, move || async move {
            let lock = || kept.lock().unwrap_or_else(PoisonError::into_inner);
            // A flight that began just after another one landed finds its result here.
            if let Some(copy) = lock().get(&key).filter(|copy| copy.is_of(size)) {
                return Ok(copy);
            }
            let copy = match blobs.checked_file(blob, form).await.and_then(|file| Ok(LocalCopy::new(file)?)) {
                Ok(copy) => Arc::new(copy),
                Err(error) => {
                    tracing::warn!("copying {} to serve it: {error}", blob.hash);
                    return Err(Arc::new(error));
                }
            };
            lock().insert(key, weight, Arc::clone(&copy));
            Ok(copy)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blob::Expected;

    #[tokio::test]
    async fn a_copy_of_another_stored_form_is_not_sent() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let url = reqwest::Url::from_directory_path(folder.path().join("blobs")).expect("an absolute path");
        let blobs =
            BlobStore::open(url.as_str(), folder.path().to_owned(), Expected::New).await.expect("a store");
        let content: Vec<u8> =
            (0..100_000u32).flat_map(|number| number.wrapping_mul(2_654_435_769).to_be_bytes()).collect();
        let hash = ContentHash::of(&content);
        let content = Arc::new(content);
        let [first, second] = [blobs.put(Arc::clone(&content), hash).await, blobs.put(content, hash).await];
        let (first, second) = (first.expect("stored"), second.expect("stored again"));
        let copies = Copies::new(1 << 30);
        let sent = async |blob: Blob| {
            let source = copies.source(&blobs, blob, Form::Stored, &(0..blob.stored_size)).await;
            source.map(|source| matches!(source, Some(Source::Copy(copy)) if copy.is_of(blob.stored_size)))
        };
        assert!(sent(first).await.expect("a copy"));
        blobs.remove(first.hash, first.write).await.expect("it is there");
        assert!(sent(second).await.expect("the same copy"), "whichever object it was read from");
        let other = Blob { stored_size: second.stored_size + 1, ..second };
        assert!(sent(other).await.is_err(), "of that form there is no object");
    }
}
