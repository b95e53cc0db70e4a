//! Receiving a body: decoded, hashed and bounded while it streams in.
//!
//! Sentry, Tecken and Parca's client hold whole files in memory, and limits show up as a 503 late in the
//! transfer. Here a body goes to its sink in steps of a megabyte, so its size costs disk, not
//! memory; the limits hold for the decoded size, so a compressed bomb ends at the limit too.

use std::io::{self, Write};
use std::time::Duration;

use axum::body::BodyDataStream;
use axum::http::{HeaderMap, header};
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use sha2::{Digest, Sha256};
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::content_hash::ContentHash;
use crate::error::ServiceError;

/// How long a sender may pause, in seconds: behind a slow uplink a megabyte still arrives.
const IDLE_LIMIT: Duration = Duration::from_secs(60);
/// Bytes handed to a blocking thread at once.
const STEP_BYTES: usize = 1 << 20;
/// How much of a refused body is read in bytes, so that its sender gets to read the refusal.
const DRAIN_BYTES: usize = 16 << 20;
/// How long that may take.
const DRAIN_TIME: Duration = Duration::from_secs(5);
/// Largest zstd window accepted as a power of two: 8 MiB, the most that HTTP allows (RFC 9659, section 3). Levels of zstd up
/// to 19 stay within it.
const ZSTD_WINDOW_LOG: u32 = 23;

/// Compressed uploads received at once: what they may hold of their content in windows is 512 MiB, if each of them takes the
/// largest. Level 3 takes a quarter of that.
const COMPRESSED_UPLOADS: usize = 64;
/// How long one waits for its turn, in seconds: shorter than clients wait for an answer.
const TURN_LIMIT: Duration = Duration::from_secs(60);

/// How many uploads are decoded at the same time.
pub(crate) struct Receiving(Semaphore);

impl Default for Receiving {
    fn default() -> Self {
        Self(Semaphore::new(COMPRESSED_UPLOADS))
    }
}

impl Receiving {
    /// Waits for a place for the body that `headers` announce. One that is not compressed needs none.
    pub(crate) async fn place(
        &self,
        headers: &HeaderMap,
    ) -> Result<Option<SemaphorePermit<'_>>, ServiceError> {
        match headers.get(header::CONTENT_ENCODING).map(|value| value.as_bytes()) {
            None | Some(b"identity") => Ok(None),
            Some(_) => match tokio::time::timeout(TURN_LIMIT, self.0.acquire()).await {
                Ok(place) => Ok(Some(place.expect("never closed"))),
                Err(_) => Err(ServiceError::Busy("many compressed uploads are being received")),
            },
        }
    }
}

/// A received body.
pub(crate) struct Received<W> {
    /// What it was written to.
    pub(crate) sink: W,
    /// SHA-256 of the decoded bytes.
    pub(crate) hash: ContentHash,
    /// Their number.
    pub(crate) size: u64,
}

/// Marks an error as ours: the disk, not the sender's data.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct SinkError(io::Error);

struct Measured<W> {
    sink: W,
    hasher: Sha256,
    size: u64,
    limit: u64,
}

impl<W: Write> Write for Measured<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.size += bytes.len() as u64;
        if self.size > self.limit {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.hasher.update(bytes);
        self.sink.write_all(bytes).map_err(|e| io::Error::other(SinkError(e)))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

enum Decoder<W: Write> {
    Identity(Measured<W>),
    Zstd(zstd::stream::write::Decoder<'static, Measured<W>>),
    Gzip(Box<flate2::write::MultiGzDecoder<Measured<W>>>),
}

impl<W: Write> Decoder<W> {
    fn new(headers: &HeaderMap, sink: W, limit: u64) -> Result<Self, ServiceError> {
        let measured = Measured { sink, hasher: Sha256::new(), size: 0, limit };
        match headers.get(header::CONTENT_ENCODING).map(|value| value.as_bytes()) {
            None | Some(b"identity") => Ok(Self::Identity(measured)),
            Some(b"zstd") => {
                let mut decoder = zstd::stream::write::Decoder::new(measured)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG)?;
                Ok(Self::Zstd(decoder))
            }
            Some(b"gzip") => Ok(Self::Gzip(Box::new(flate2::write::MultiGzDecoder::new(measured)))),
            Some(other) => Err(ServiceError::Encoding(String::from_utf8_lossy(other).into_owned())),
        }
    }

    fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Identity(sink) => sink.write_all(bytes),
            Self::Zstd(decoder) => decoder.write_all(bytes),
            Self::Gzip(decoder) => decoder.write_all(bytes),
        }
    }

    fn finish(self) -> io::Result<Measured<W>> {
        match self {
            Self::Identity(sink) => Ok(sink),
            Self::Zstd(mut decoder) => {
                decoder.flush()?;
                Ok(decoder.into_inner())
            }
            Self::Gzip(decoder) => decoder.finish(),
        }
    }
}

/// Writes `body`, decoded as `headers` say, to `sink`; more than `limit` decoded bytes are refused.
pub(crate) async fn receive<W: Write + Send + 'static, E: std::fmt::Display>(
    headers: &HeaderMap,
    body: &mut (impl Stream<Item = Result<Bytes, E>> + Unpin),
    sink: W,
    limit: u64,
) -> Result<Received<W>, ServiceError> {
    let mut decoder = Decoder::new(headers, sink, limit)?;
    let mut pending: Vec<Bytes> = Vec::new();
    loop {
        let piece = tokio::time::timeout(IDLE_LIMIT, body.next())
            .await
            .map_err(|_| ServiceError::Body(format!("nothing arrived for {} s", IDLE_LIMIT.as_secs())))?
            .transpose()
            .map_err(|e| ServiceError::Body(e.to_string()))?;
        let last = piece.is_none();
        pending.extend(piece);
        if last || pending.iter().map(Bytes::len).sum::<usize>() >= STEP_BYTES {
            let step = std::mem::take(&mut pending);
            decoder = tokio::task::spawn_blocking(move || {
                step.iter().try_for_each(|bytes| decoder.push(bytes)).map(|()| decoder)
            })
            .await?
            .map_err(|e| refusal(e, limit))?;
        }
        if last {
            break;
        }
    }
    let measured = decoder.finish().map_err(|e| refusal(e, limit))?;
    let hash = ContentHash::new(measured.hasher.finalize().into());
    Ok(Received { sink: measured.sink, hash, size: measured.size })
}

/// [`receive`] into memory, for bodies with a small limit.
pub(crate) async fn receive_bytes(
    headers: &HeaderMap,
    body: &mut BodyDataStream,
    limit: u64,
) -> Result<Received<Vec<u8>>, ServiceError> {
    receive(headers, body, Vec::new(), limit).await
}

/// Reads on for a while before a refusal is sent: a connection closed on unread data is reset, and
/// the reason would be lost on its way.
pub(crate) async fn drain(mut body: BodyDataStream) {
    let drained = async {
        let mut read = 0;
        while let Some(Ok(piece)) = body.next().await {
            read += piece.len();
            if read > DRAIN_BYTES {
                break;
            }
        }
    };
    let _ = tokio::time::timeout(DRAIN_TIME, drained).await;
}

fn refusal(error: io::Error, limit: u64) -> ServiceError {
    if error.kind() == io::ErrorKind::FileTooLarge {
        return ServiceError::TooLarge { limit };
    }
    match error.downcast::<SinkError>() {
        Ok(SinkError(error)) => ServiceError::Io(error),
        Err(error) => ServiceError::Body(format!("does not decode as its Content-Encoding says: {error}")),
    }
}
