//! What breaks in the middle of an upload is gone on with.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use windlass_tests::program::{fixture, text, windlass};
use windlass_tests::service::TestService;
use windlass_unwind_compiler::build_id_of;

/// Passes connections on to a service, and cuts those that bring more than `CUT_BYTES`, `cuts` times.
struct Proxy {
    url: String,
    /// Bytes that came from clients.
    bytes: Arc<AtomicU64>,
    cuts: Arc<AtomicU64>,
}

impl Proxy {
    const CUT_BYTES: u64 = 40 << 20;

    async fn start(service: &TestService, cuts: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let target = service.url().trim_start_matches("http://").to_owned();
        let (bytes, cuts) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(cuts)));
        let (counted, left) = (Arc::clone(&bytes), Arc::clone(&cuts));
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(&target).await.expect("the service listens");
                tokio::spawn(Self::pass(client, server, Arc::clone(&counted), Arc::clone(&left)));
            }
        });
        Self { url, bytes, cuts }
    }

    async fn pass(client: TcpStream, server: TcpStream, counted: Arc<AtomicU64>, left: Arc<AtomicU64>) {
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_server, mut to_server) = server.into_split();
        let there = async {
            let (mut buffer, mut passed) = (vec![0; 64 << 10], 0);
            loop {
                let read = from_client.read(&mut buffer).await.unwrap_or(0);
                passed += read as u64;
                counted.fetch_add(read as u64, Ordering::Relaxed);
                let may_cut = |left: u64| left.checked_sub(1);
                let is_over = passed > Self::CUT_BYTES
                    && left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, may_cut).is_ok();
                if read == 0 || is_over || to_server.write_all(&buffer[..read]).await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            () = there => {}
            _ = tokio::io::copy(&mut from_server, &mut to_client) => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_upload_comes_to_its_end() {
    const SIZE: usize = 120 << 20;
    let service = TestService::start().await;
    let proxy = Proxy::start(&service, 2).await;
    let mut elf = std::fs::read(fixture("inlined")).expect("fixture");
    let id = build_id_of(&elf).expect("the fixture has a build-ID");
    // Bytes behind the sections that do not get smaller by compression.
    let mut state = 1u64;
    while elf.len() < SIZE {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        elf.extend(((state >> 32) as u32).to_le_bytes());
    }
    let path = service.folder().join("large");
    std::fs::write(&path, &elf).expect("write");
    let mut upload = windlass("windlass");
    upload.args(["upload", "--server", &proxy.url]).arg(&path);
    let shown = text(&mut upload);
    assert!(shown.starts_with("uploaded"), "{shown}");
    assert_eq!(proxy.cuts.load(Ordering::Relaxed), 0, "it was interrupted");
    let served = service.client.get(format!("{}/buildid/{id}/executable", service.url())).send().await;
    let served = served.expect("an answer").bytes().await.expect("the whole body");
    assert!(served == elf);
    let before = proxy.bytes.load(Ordering::Relaxed);
    assert!(text(&mut upload).starts_with("present"));
    assert!(proxy.bytes.load(Ordering::Relaxed) - before < 10_000, "asked, not sent");

    // A cut costs what its connection brought of the part under way: 8 MiB.
    assert!(before < (SIZE + 2 * (16 << 20)) as u64, "{before} bytes");
    service.stop().await;
}
