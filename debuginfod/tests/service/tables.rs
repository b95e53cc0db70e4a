//! Unwind tables: from what they are made, how often, and when they are made again.

use reqwest::header::{ACCEPT_ENCODING, CONTENT_TYPE, ETAG, IF_NONE_MATCH, RANGE};
use reqwest::{Response, StatusCode};
use windlass_schema::{ImageAddress, Rule, Table};

use crate::server::{Server, build, sha256, symbol};

const MADE: &str = "windlass_derived_made_total{kind=\"unwind\"}";

/// Asks until the table is there.
async fn table(server: &Server) -> Response {
    for _ in 0..60 {
        let response = server.get(&format!("/api/v1/buildid/{}/unwind", build().id)).await;
        if response.status() != StatusCode::ACCEPTED {
            return response;
        }
        assert_eq!(response.headers()["retry-after"], "1");
    }
    panic!("the table is not made");
}

fn blob(server: &Server, content: &[u8]) -> std::path::PathBuf {
    crate::server::blob_path(server.folder.path(), content)
}

#[tokio::test(flavor = "multi_thread")]
async fn compiled_checked_and_delivered() {
    let server = Server::start().await;
    let build = build();
    let nothing = table(&server).await;
    assert_eq!(nothing.status(), 404);
    assert!(nothing.text().await.unwrap().contains(&build.id.to_string()));
    server.expect_put(&format!("{}/skeleton", build.id), &build.stripped, StatusCode::CREATED).await;
    let response = table(&server).await;
    assert_eq!(response.status(), 200, "an answer of before is not remembered");
    assert_eq!(response.headers()[CONTENT_TYPE], "application/vnd.windlass.unwind");
    let tag = response.headers()[ETAG].clone();
    let bytes = response.bytes().await.unwrap();
    assert_eq!(tag, format!("\"sha256-{}\"", sha256(&bytes)).as_str());
    let parsed = Table::parse(&bytes).unwrap();
    assert_eq!(parsed.build_id(), build.id);
    let main = ImageAddress::new(symbol(&build.full, "main"));
    assert!(matches!(parsed.rule(main), Rule::Frame { .. }), "{:?}", parsed.rule(main));

    let url = server.url(&format!("/api/v1/buildid/{}/unwind", build.id));
    let get = || server.client.get(&url);
    assert_eq!(get().header(IF_NONE_MATCH, tag).send().await.unwrap().status(), 304);
    let part = get().header(RANGE, "bytes=0-3").send().await.unwrap();
    assert_eq!(
        (part.status(), part.bytes().await.unwrap()),
        (StatusCode::PARTIAL_CONTENT, b"WLUT"[..].into())
    );
    let stored = get().header(ACCEPT_ENCODING, "zstd").send().await.unwrap().bytes().await.unwrap();
    assert_eq!(zstd::stream::decode_all(&stored[..]).unwrap(), bytes);
    assert_eq!(server.counter(MADE).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_callers_make_one_table() {
    let server = Server::start().await;
    let build = build();
    server.expect_put(&format!("{}/executable", build.id), &build.full, StatusCode::CREATED).await;
    let url = server.url(&format!("/api/v1/buildid/{}/unwind", build.id));
    let callers = (0..1000).map(|_| {
        let request = server.client.get(&url);
        tokio::spawn(async move { request.send().await.unwrap().status() })
    });
    for caller in callers.collect::<Vec<_>>() {
        let status = caller.await.unwrap();
        assert!(status == StatusCode::OK || status == StatusCode::ACCEPTED, "{status}");
    }
    assert_eq!(table(&server).await.status(), 200);
    assert_eq!(server.counter(MADE).await, 1);

    let server = server.restart().await;
    assert_eq!(table(&server).await.status(), 200);
    assert_eq!(server.counter(MADE).await, 0, "the stored one is found");
}

#[tokio::test(flavor = "multi_thread")]
async fn made_again_from_a_better_file_or_after_damage() {
    let server = Server::start().await;
    let build = build();
    server.expect_put(&format!("{}/skeleton", build.id), &build.stripped, StatusCode::CREATED).await;
    let first = table(&server).await.bytes().await.unwrap();
    server.expect_put(&format!("{}/executable", build.id), &build.full, StatusCode::CREATED).await;
    assert_eq!(table(&server).await.bytes().await.unwrap(), first, "the same CFI");
    assert_eq!(server.counter(MADE).await, 2);

    // The stored table is changed behind the service's back.
    let file = blob(&server, &first);
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x40;
    std::fs::write(&file, bytes).unwrap();
    let Server { folder, service, .. } = server;
    service.stop().await;
    let server = Server::start_in(folder, |config| config.max_copies_bytes = 0).await;
    assert_eq!(table(&server).await.bytes().await.unwrap(), first);
    assert_eq!(server.counter(MADE).await, 1, "not trusted, made anew");

    // And while the service runs and trusts it already, without a copy of it.
    std::fs::write(blob(&server, &first), b"gone").unwrap();
    assert_eq!(table(&server).await.bytes().await.unwrap(), first);
    assert_eq!(server.counter(MADE).await, 2);
}

/// Whoever runs a file on some host may give it any build-ID.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_uploaded_of_an_image_goes_before_a_skeleton() {
    let build = build();
    let main = ImageAddress::new(symbol(&build.full, "main"));
    let rule = async |server: &Server| {
        let bytes = table(server).await.bytes().await.expect("the whole table");
        Table::parse(&bytes).expect("a table").rule(main)
    };
    // The same image, but that its CFI begins with the terminator, behind which nothing is read.
    let mut false_one = build.stripped.clone();
    let frames = section_offset(&false_one, ".eh_frame");
    false_one[frames..frames + 4].fill(0);
    for kind in ["executable", "debuginfo"] {
        let server = Server::start().await;
        server.expect_put(&format!("{}/skeleton", build.id), &false_one, StatusCode::CREATED).await;
        assert!(!matches!(rule(&server).await, Rule::Frame { .. }), "the skeleton is false");
        server.expect_put(&format!("{}/{kind}", build.id), &build.full, StatusCode::CREATED).await;
        assert!(matches!(rule(&server).await, Rule::Frame { .. }), "{kind}");
    }
    // What `strip` took away says nothing of frames.
    let server = Server::start().await;
    server.expect_put(&format!("{}/debuginfo", build.id), &build.debug, StatusCode::CREATED).await;
    server.expect_put(&format!("{}/skeleton", build.id), &build.stripped, StatusCode::CREATED).await;
    assert!(matches!(rule(&server).await, Rule::Frame { .. }), "of the skeleton");
}

/// Where a section of an ELF file begins.
fn section_offset(elf: &[u8], name: &str) -> usize {
    use object::{Object as _, ObjectSection as _};
    let elf = object::File::parse(elf).expect("an ELF file");
    let section = elf.section_by_name(name).expect("a section of the build");
    section.file_range().expect("it has bytes").0 as usize
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_compiled_says_so() {
    let server = Server::start().await;
    // The same machine code, but stated to be for another machine.
    let mut foreign = build().full.clone();
    foreign[18..20].copy_from_slice(&[8, 0]); // EM_MIPS
    server.expect_put(&format!("{}/executable", build().id), &foreign, StatusCode::CREATED).await;
    let response = table(&server).await;
    assert_eq!(response.status(), 422);
    assert!(response.text().await.unwrap().contains("cannot be compiled"));
}
