//! Sends what the plan says: several streams at once, compressed while they are read, memory bounded
//! by a few chunks for each stream.
//!
//! A broken connection is tried again from the start of the file; what the service refused is not.

use std::fs::File;
use std::io::{self, Read as _, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::StreamExt as _;
use indicatif::ProgressBar;
use tokio::sync::mpsc;
use windlass_schema::http::ArtefactName;

use super::plan::{Fate, Plan};
use crate::server::{Server, ServerError};
use crate::terminal;

/// Tries of one file, the first included.
const ATTEMPTS: u32 = 4;
/// Pause before the second try; it doubles each time.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// zstd level: 12.3 MB of a 31.3 MB libpython in 0.3 s; level 19 saves a quarter more for a hundred times the time.
const ZSTD_LEVEL: i32 = 3;
/// Bytes read, and bytes handed to the connection, at a time.
const CHUNK_BYTES: usize = 128 << 10;
/// Compressed chunks that wait for the connection.
const CHUNKS_IN_FLIGHT: usize = 4;

/// One artefact to send, and where its fate is kept.
struct Item {
    artefact: ArtefactName,
    path: PathBuf,
    size_bytes: u64,
    file: usize,
    source: Option<usize>,
}

/// Sends everything whose fate is [`Fate::Send`], ELF files first, and settles the fates.
pub(crate) async fn send(server: &Server, plan: &mut Plan, jobs: usize) {
    let (files, sources) = (elf_items(plan), source_items(plan));
    let bytes = files.iter().chain(&sources).map(|item| item.size_bytes).sum();
    let bar = terminal::byte_bar(bytes, "sending");
    for items in [files, sources] {
        let sent = futures_util::stream::iter(items).map(|item| async {
            let fate = send_one(server, &item, &bar).await;
            (item, fate)
        });
        let mut sent = sent.buffer_unordered(jobs);
        while let Some((item, fate)) = sent.next().await {
            let planned = &mut plan.files[item.file];
            match item.source {
                Some(source) => planned.sources[source] = fate,
                None => planned.fate = fate,
            }
        }
    }
    bar.finish_and_clear();
}

fn elf_items(plan: &Plan) -> Vec<Item> {
    let files = plan.files.iter().enumerate().filter(|(_, planned)| planned.fate == Fate::Send);
    files
        .map(|(index, planned)| Item {
            artefact: planned.file.artefact(planned.kind),
            path: planned.file.path.clone(),
            size_bytes: planned.file.size_bytes,
            file: index,
            source: None,
        })
        .collect()
}

fn source_items(plan: &Plan) -> Vec<Item> {
    let mut items = Vec::new();
    for (index, planned) in plan.files.iter().enumerate() {
        for (source_index, (source, fate)) in planned.file.sources.iter().zip(&planned.sources).enumerate() {
            if *fate == Fate::Send {
                items.push(Item {
                    artefact: source.artefact(planned.file.build_id),
                    path: PathBuf::from(&source.path),
                    size_bytes: source.size_bytes,
                    file: index,
                    source: Some(source_index),
                });
            }
        }
    }
    items
}

async fn send_one(server: &Server, item: &Item, bar: &ProgressBar) -> Fate {
    let mut pause = FIRST_PAUSE;
    let mut attempt = 1;
    loop {
        let read_bytes = Arc::new(AtomicU64::new(0));
        let body = compressed(&item.path, bar.clone(), Arc::clone(&read_bytes));
        let error = match server.put(&item.artefact, &item.path, body).await {
            Ok(true) => return Fate::Sent,
            Ok(false) => return Fate::Present,
            Err(error) => error,
        };
        bar.dec(read_bytes.load(Ordering::Relaxed));
        if attempt == ATTEMPTS || !error.may_pass() {
            return Fate::Failed(reason(&error));
        }
        tracing::info!("sending {} again: {error}", item.path.display());
        tokio::time::sleep(pause).await;
        (attempt, pause) = (attempt + 1, pause * 2);
    }
}

fn reason(error: &ServerError) -> String {
    match error {
        ServerError::Status { status, message, .. } => format!("{status}: {message}"),
        other => other.to_string(),
    }
}

type Chunk = io::Result<Vec<u8>>;

/// The file's content as zstd, as the connection takes it.
fn compressed(path: &Path, bar: ProgressBar, read_bytes: Arc<AtomicU64>) -> reqwest::Body {
    let chunks = compressed_chunks(path.to_owned(), move |bytes| {
        read_bytes.fetch_add(bytes, Ordering::Relaxed);
        bar.inc(bytes);
    });
    reqwest::Body::wrap_stream(futures_util::stream::unfold(chunks, |mut chunks| async {
        chunks.recv().await.map(|chunk| (chunk, chunks))
    }))
}

/// Made by a blocking thread, a few chunks ahead of who takes them. An error is the last chunk.
fn compressed_chunks(path: PathBuf, progress: impl Fn(u64) + Send + 'static) -> mpsc::Receiver<Chunk> {
    let (sender, receiver) = mpsc::channel(CHUNKS_IN_FLIGHT);
    tokio::task::spawn_blocking(move || {
        let sink = ChunkSink { sender: sender.clone(), chunk: Vec::with_capacity(CHUNK_BYTES) };
        if let Err(error) = compress(&path, sink, progress) {
            // If no one listens any more, the request ended before, with its own error.
            let _ = sender.blocking_send(Err(error));
        }
    });
    receiver
}

fn compress(path: &Path, sink: ChunkSink, progress: impl Fn(u64)) -> io::Result<()> {
    let mut file = File::open(path)?;
    let mut encoder = zstd::Encoder::new(sink, ZSTD_LEVEL)?;
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return encoder.finish()?.flush();
        }
        encoder.write_all(&buffer[..read])?;
        progress(read as u64);
    }
}

/// Gathers bytes into chunks and hands them to the connection, waiting while it is busy.
struct ChunkSink {
    sender: mpsc::Sender<Chunk>,
    chunk: Vec<u8>,
}

impl Write for ChunkSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.chunk.extend_from_slice(bytes);
        if self.chunk.len() >= CHUNK_BYTES {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.chunk.is_empty() {
            return Ok(());
        }
        let chunk = std::mem::replace(&mut self.chunk, Vec::with_capacity(CHUNK_BYTES));
        self.sender.blocking_send(Ok(chunk)).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn chunks_decompress_to_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let content: Vec<u8> =
            (0..1_000_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        std::fs::write(&path, &content).unwrap();
        let mut chunks = compressed_chunks(path, |_| ());
        let mut body = Vec::new();
        while let Some(chunk) = chunks.recv().await {
            let chunk = chunk.unwrap();
            assert!(chunk.len() < 4 * CHUNK_BYTES, "{} bytes at once", chunk.len());
            body.extend(chunk);
        }
        assert!(zstd::decode_all(&body[..]).unwrap() == content);
    }

    #[tokio::test]
    async fn a_file_that_vanished_ends_the_request_with_an_error() {
        let mut chunks = compressed_chunks("/nonexistent/file".into(), |_| ());
        assert_eq!(chunks.recv().await.unwrap().unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(chunks.recv().await.is_none());
    }

    /// A service that gives each connection the next of `answers`: bytes, or nothing and a close. Counts them.
    async fn scripted(answers: &'static [&'static str]) -> (Server, Arc<AtomicU64>) {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let _ = rustls::crypto::ring::default_provider().install_default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let count = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&count);
        tokio::spawn(async move {
            for answer in answers {
                let (mut connection, _) = listener.accept().await.unwrap();
                counted.fetch_add(1, Ordering::Relaxed);
                let mut request = Vec::new();
                while !answer.is_empty() && !request.ends_with(b"\r\n0\r\n\r\n") {
                    connection.read_buf(&mut request).await.unwrap();
                }
                connection.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        (Server::new(&url, None).unwrap(), count)
    }

    async fn sent_to(answers: &'static [&'static str]) -> (Fate, u64) {
        let (server, count) = scripted(answers).await;
        let artefact = ArtefactName {
            build_id: "abcd".parse().unwrap(),
            kind: windlass_schema::http::ArtefactKind::Executable,
            path: None,
            sha256: None,
        };
        let path = PathBuf::from(file!().strip_prefix("cli/").unwrap());
        let item = Item { artefact, path, size_bytes: 1, file: 0, source: None };
        let fate = send_one(&server, &item, &ProgressBar::hidden()).await;
        (fate, count.load(Ordering::Relaxed))
    }

    const CREATED: &str = "HTTP/1.1 201 Created\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
    const REFUSED: &str = "HTTP/1.1 422 Unprocessable Entity\r\nconnection: close\r\ncontent-length: 15\r\n\r\n\
                           {\"error\":\"bad\"}";

    #[tokio::test]
    async fn a_broken_connection_is_tried_again() {
        assert_eq!(sent_to(&["", CREATED]).await, (Fate::Sent, 2));
    }

    #[tokio::test]
    async fn a_refusal_is_not_tried_again() {
        let failed = Fate::Failed("422 Unprocessable Entity: bad".to_owned());
        assert_eq!(sent_to(&[REFUSED, CREATED]).await, (failed, 1));
    }
}
