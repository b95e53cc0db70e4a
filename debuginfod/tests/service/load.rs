//! What uploads cost: figures, measured on request, and bounds that the suite holds.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use reqwest::header::CONTENT_ENCODING;
use windlass_schema::http::{ArtefactKind, ArtefactName, MissingRequest, MissingResponse, SHA256_HEADER};

use crate::daemon::Daemon;
use crate::server::{build, client, sha256};

/// Connections of the load program.
const CONNECTIONS: usize = 32;

/// A connection that is kept, and the status of one request on it after the other.
struct Connection(BufReader<TcpStream>);

impl Connection {
    fn open(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).expect("the service listens");
        stream.set_nodelay(true).expect("a TCP socket");
        Self(BufReader::new(stream))
    }

    fn put(&mut self, path: &str, content: &[u8], hash: &str) -> u16 {
        let mut request = format!(
            "PUT {path} HTTP/1.1\r\nhost: x\r\n{SHA256_HEADER}: {hash}\r\ncontent-length: {}\r\n\r\n",
            content.len()
        )
        .into_bytes();
        request.extend(content);
        self.0.get_mut().write_all(&request).expect("a connection");
        let (mut line, mut status, mut length) = (String::new(), None, 0);
        loop {
            line.clear();
            self.0.read_line(&mut line).expect("an answer");
            match line.trim() {
                "" => break,
                head if status.is_none() => {
                    status = head.split(' ').nth(1).and_then(|word| word.parse().ok())
                }
                header => {
                    let (name, value) = header.split_once(':').expect("a header");
                    if name.eq_ignore_ascii_case("content-length") {
                        length = value.trim().parse().expect("a number");
                    }
                }
            }
        }
        self.0.read_exact(&mut vec![0; length]).expect("the body");
        status.expect("a status")
    }
}

/// Small executables of `count` builds, and their build-IDs.
fn small_builds(count: usize) -> Vec<(String, Vec<u8>, String)> {
    let id = build().id;
    let id = id.as_bytes();
    let at = build().stripped.windows(id.len()).position(|window| window == id).expect("the note");
    let of = |number: usize| {
        let mut content = build().stripped.clone();
        content[at..at + 8].copy_from_slice(&(number as u64 + 1).to_be_bytes());
        let note: String = content[at..at + id.len()].iter().map(|byte| format!("{byte:02x}")).collect();
        let hash = sha256(&content);
        (note, content, hash)
    };
    (0..count).map(of).collect()
}

/// Uploads all on [`CONNECTIONS`] and says how long it took.
fn upload_all(address: SocketAddr, builds: &[(String, Vec<u8>, String)], expect: u16) -> Duration {
    let next = AtomicUsize::new(0);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..CONNECTIONS {
            scope.spawn(|| {
                let mut connection = Connection::open(address);
                while let Some((id, content, hash)) = builds.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let status = connection.put(&format!("/api/v1/buildid/{id}/executable"), content, hash);
                    assert_eq!(status, expect, "{id}");
                }
            });
        }
    });
    start.elapsed()
}

/// A number that the environment sets for a run that measures, with `WINDLASSD=target/release/windlassd` and `--nocapture`.
fn number(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).map_or(otherwise, |number| number.parse().expect("a number"))
}

/// So many as `WINDLASS_SMALL_UPLOADS` says.
#[tokio::test(flavor = "multi_thread")]
async fn small_uploads_are_all_there_and_asked_for_at_once() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let daemon = Daemon::start(folder.path());
    let count = number("WINDLASS_SMALL_UPLOADS", 300) as usize;
    let builds = small_builds(count);
    let took = upload_all(daemon.address, &builds, 201);
    println!(
        "{:.0} uploads of {} bytes a second, {:.2} s of processors",
        count as f64 / took.as_secs_f64(),
        builds[0].1.len(),
        daemon.processor_s()
    );
    let artefacts = builds
        .iter()
        .map(|(id, _, hash)| ArtefactName {
            build_id: id.parse().expect("hex"),
            kind: ArtefactKind::Executable,
            path: None,
            sha256: Some(hash.clone()),
            brings: None,
        })
        .collect();
    let start = Instant::now();
    let url = daemon.url("/api/v1/missing");
    let answer = client().post(url).json(&MissingRequest { artefacts }).send().await.expect("an answer");
    let answer: MissingResponse = answer.json().await.expect("its body");
    assert_eq!(answer, MissingResponse::default());
    println!("all present, asked at once: {:.2} s", start.elapsed().as_secs_f64());
    let took = upload_all(daemon.address, &builds, 200);
    println!("{:.0} uploads of what is there a second", count as f64 / took.as_secs_f64());
    println!("{} MB resident at most", daemon.peak_resident_bytes() >> 20);
}

/// An executable of `size` bytes, most of them zeros, compressed: the build with much behind it.
fn sparse_build(size: u64) -> (Vec<u8>, String) {
    use sha2::{Digest as _, Sha256};
    let mut hasher = Sha256::new();
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).expect("a context");
    let mut write = |bytes: &[u8]| {
        hasher.update(bytes);
        encoder.write_all(bytes).expect("in memory");
    };
    write(&build().full);
    let (zeros, mut left) = (vec![0; 1 << 20], size - build().full.len() as u64);
    while left > 0 {
        let count = left.min(zeros.len() as u64);
        write(&zeros[..count as usize]);
        left -= count;
    }
    let compressed = encoder.finish().expect("in memory");
    (compressed, hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Uploads `size` bytes while `readers` read a file of 8 MB slowly and one client asks for a small one all the time. Says
/// how long the upload took, and each of the small requests.
fn large_upload(daemon: &Daemon, size: u64, readers: usize) -> (Duration, Vec<Duration>) {
    let runtime = tokio::runtime::Runtime::new().expect("threads");
    let client = client();
    let mut read = vec![0; 8 << 20];
    let mut state = 1u32;
    read.fill_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    });
    for (path, content) in [("slow", &read[..]), ("small", b"int main;")] {
        let url = daemon.url(&format!("/api/v1/buildid/{}/source/{path}", build().id));
        let put = client.put(url).header(SHA256_HEADER, sha256(content)).body(content.to_vec());
        let status = runtime.block_on(put.send()).expect("an answer").status();
        assert_eq!(status, StatusCode::CREATED);
    }
    let (address, stop) = (daemon.address, AtomicBool::new(false));
    let source = |path: &str| format!("/buildid/{}/source/{path}", build().id);
    let (compressed, hash) = sparse_build(size);
    std::thread::scope(|scope| {
        for _ in 0..readers {
            scope.spawn(|| {
                let mut stream = TcpStream::connect(address).expect("the service listens");
                write!(stream, "GET {} HTTP/1.1\r\nhost: x\r\n\r\n", source("slow")).expect("a connection");
                let mut buffer = [0; 4096];
                while !stop.load(Ordering::Relaxed) {
                    let _ = stream.read(&mut buffer);
                    std::thread::sleep(Duration::from_millis(50));
                }
            });
        }
        let asker = scope.spawn(|| {
            let mut took = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let start = Instant::now();
                let mut stream = TcpStream::connect(address).expect("the service listens");
                let path = source("small");
                write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                    .expect("a connection");
                let mut answer = Vec::new();
                stream.read_to_end(&mut answer).expect("an answer");
                assert!(answer.ends_with(b"int main;"));
                took.push(start.elapsed());
                std::thread::sleep(Duration::from_millis(10));
            }
            took
        });
        let start = Instant::now();
        let url = daemon.url(&format!("/api/v1/buildid/{}/executable", build().id));
        let put =
            client.put(url).header(SHA256_HEADER, hash).header(CONTENT_ENCODING, "zstd").body(compressed);
        let status = runtime.block_on(put.send()).expect("an answer").status();
        let took = start.elapsed();
        stop.store(true, Ordering::Relaxed);
        assert_eq!(status, StatusCode::CREATED);
        (took, asker.join().expect("all answers were right"))
    })
}

/// Of `WINDLASS_LARGE_BYTES`, beside `WINDLASS_SLOW_READERS`.
#[test]
fn a_large_upload_takes_disk_and_not_memory() {
    let (size, readers) = (number("WINDLASS_LARGE_BYTES", 300 << 20), number("WINDLASS_SLOW_READERS", 20));
    let folder = tempfile::tempdir().expect("a temporary folder");
    let daemon = Daemon::start(folder.path());
    let (took, mut small) = large_upload(&daemon, size, readers as usize);
    small.sort_unstable();
    let of_hundred =
        |part: usize| small.get(small.len() * part / 100).map_or(0.0, |took| took.as_secs_f64() * 1e3);
    let peak = daemon.peak_resident_bytes();
    println!(
        "{} MB in {:.1} s, {} small requests within {:.1} ms (half), {:.0} ms (99 of 100); {} MB resident at most",
        size >> 20,
        took.as_secs_f64(),
        small.len(),
        of_hundred(50),
        of_hundred(99),
        peak >> 20
    );
    assert!(peak < 128 << 20, "{} MB resident for an upload of {} MB", peak >> 20, size >> 20);
}
