//! What is served from checked copies: the same answers, without the storage.

use std::path::Path;

use reqwest::header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, IF_RANGE, RANGE};
use reqwest::{Client, StatusCode};
use windlass_debuginfod::tls::TlsFiles;

use crate::server::{Server, blob_path, build};
use crate::tls::{certify, trusting};

/// A source of this many bytes, half of which zstd can shrink.
fn content(size: usize) -> Vec<u8> {
    let mut state = 1u32;
    let next = |at: usize| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        if at.is_multiple_of(2) { (state >> 24) as u8 } else { b'x' }
    };
    (0..size).map(next).collect()
}

struct Asked<'a> {
    client: &'a Client,
    url: String,
    content: &'a [u8],
}

impl Asked<'_> {
    /// Every way to ask for it, and every answer as it must be.
    async fn check(&self) {
        let Self { client, url, content } = self;
        let size = content.len();
        let whole = client.get(url).send().await.expect("an answer");
        let tag = whole.headers()["etag"].to_str().expect("text").to_owned();
        assert!(whole.headers().contains_key("last-modified"));
        assert_eq!(whole.headers()[CONTENT_LENGTH], size.to_string().as_str());
        assert!(whole.bytes().await.expect("a body") == *content, "{size}");
        let head = client.head(url).send().await.expect("an answer");
        assert_eq!(head.headers()[CONTENT_LENGTH], size.to_string().as_str());
        for range in [0..1, 5..size - 7, size - 20_000..size, size - 1..size] {
            let asked = format!("bytes={}-{}", range.start, range.end - 1);
            let part = client.get(url).header(RANGE, asked).header(IF_RANGE, &tag);
            let part = part.send().await.expect("an answer");
            assert_eq!(part.status(), StatusCode::PARTIAL_CONTENT);
            assert!(part.bytes().await.expect("a body") == content[range.clone()], "{range:?} of {size}");
        }
        let stored = client.get(url).header(ACCEPT_ENCODING, "zstd").send().await.expect("an answer");
        assert_eq!(stored.headers()[CONTENT_ENCODING], "zstd");
        assert_ne!(stored.headers()["etag"], tag.as_str());
        let stored = stored.bytes().await.expect("a body");
        assert!(stored.len() < size);
        assert!(zstd::stream::decode_all(&stored[..]).expect("zstd") == *content, "{size}");
    }
}

/// Large contents are copied in the background, from the second request on: asks until the storage is not needed.
async fn check_without_storage(folder: &Path, asked: &Asked<'_>) {
    for _ in 0..3 {
        asked.check().await;
    }
    let (blob, away) = (blob_path(folder, asked.content), folder.join("away"));
    std::fs::rename(&blob, &away).expect("it is stored there");
    let since = std::time::Instant::now();
    let mut complete = 0;
    while complete < 2 {
        assert!(since.elapsed().as_secs() < 60, "never served without the storage");
        complete = 0;
        for encoding in ["identity", "zstd"] {
            let request = asked.client.get(&asked.url).header(ACCEPT_ENCODING, encoding);
            if let Ok(answer) = request.send().await {
                complete += usize::from(answer.bytes().await.is_ok());
            }
        }
        if complete < 2 {
            // A copy was not ready when the storage went away.
            std::fs::rename(&away, &blob).expect("back");
            asked.check().await;
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            std::fs::rename(&blob, &away).expect("away again");
        }
    }
    asked.check().await;
    std::fs::rename(&away, &blob).expect("back");
}

const SIZES: [usize; 4] = [30_000, 200_000, 1 << 20, 5_000_001];

#[tokio::test(flavor = "multi_thread")]
async fn copies_answer_as_the_storage_does() {
    let server = Server::start().await;
    for size in SIZES {
        let (name, content) = (format!("{}/source/{size}", build().id), content(size));
        server.expect_put(&name, &content, StatusCode::CREATED).await;
        let asked =
            Asked { client: &server.client, url: server.url(&format!("/buildid/{name}")), content: &content };
        check_without_storage(server.folder.path(), &asked).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn under_tls_they_are_sent_as_well() {
    let folder = tempfile::tempdir().expect("a folder");
    let client = trusting(&certify(folder.path()));
    let files = |name: &str| folder.path().join(name);
    let tls = TlsFiles { certificate: files("certificate.pem"), key: files("key.pem") };
    let server = Server::start_in(folder, |config| config.tls = Some(tls)).await;
    let server = Server { client, ..server };
    for size in SIZES {
        let (name, content) = (format!("{}/source/{size}", build().id), content(size));
        server.expect_put(&name, &content, StatusCode::CREATED).await;
        let asked =
            Asked { client: &server.client, url: server.url(&format!("/buildid/{name}")), content: &content };
        check_without_storage(server.folder.path(), &asked).await;
    }
}

/// Bytes of files without names that this process has open in a folder.
fn unnamed_bytes(folder: &Path) -> u64 {
    let open = std::fs::read_dir("/proc/self/fd").expect("Linux has it").flatten();
    let unnamed = open.filter(|entry| {
        let target = std::fs::read_link(entry.path()).unwrap_or_default();
        target.starts_with(folder) && target.to_string_lossy().ends_with("(deleted)")
    });
    unnamed.filter_map(|entry| Some(std::fs::metadata(entry.path()).ok()?.len())).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_keep_to_their_budget() {
    const BUDGET_BYTES: u64 = 2 << 20;
    let server = Server::start_with(|config| config.max_copies_bytes = BUDGET_BYTES).await;
    let scratch = server.folder.path().canonicalize().expect("it is there").join("tmp");
    let mut most = 0;
    for number in 0..30 {
        let name = format!("{}/source/{number}", build().id);
        let content = content(200_000 + number);
        server.expect_put(&name, &content, StatusCode::CREATED).await;
        let url = server.url(&format!("/buildid/{name}"));
        let body = server.client.get(url).send().await.expect("an answer").bytes().await.expect("a body");
        assert!(body == content, "{number}");
        let since = std::time::Instant::now();
        // What made room is given up in the background.
        while unnamed_bytes(&scratch) > BUDGET_BYTES {
            assert!(since.elapsed().as_secs() < 60, "{} bytes", unnamed_bytes(&scratch));
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        most = most.max(unnamed_bytes(&scratch));
    }
    assert!(most > BUDGET_BYTES / 2, "there are copies: {most}");
}
