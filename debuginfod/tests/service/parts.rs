//! Uploads in parts: what is durable after each, at whichever replica, and what becomes of senders that contradict themselves.

use std::io::Read as _;

use reqwest::header::CONTENT_ENCODING;
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use windlass_debuginfod::check;
use windlass_schema::http::{
    FILE_NAME_HEADER, Stored, UPLOAD_COMPLETE_HEADER, UPLOAD_LENGTH_HEADER, UPLOAD_LIMIT_HEADER,
    UPLOAD_OFFSET_HEADER,
};

use crate::server::{Build, Server, build, config, sha256};

/// The least that a part may have.
const PART: usize = 1 << 20;

/// The build with so much behind it that it comes in three parts: the ELF headers say nothing of it.
fn large(build: &Build) -> Vec<u8> {
    let mut content = build.full.clone();
    content.extend((content.len()..2 * PART + 4321).map(|at| (at ^ (at >> 9)) as u8));
    content
}

struct Upload<'s> {
    server: &'s Server,
    path: String,
    length: usize,
}

impl<'s> Upload<'s> {
    fn new(server: &'s Server, kind: &str, content: &[u8]) -> Self {
        let path = format!("/api/v1/uploads/{}/{kind}/{}", build().id, sha256(content));
        Self { server, path, length: content.len() }
    }

    fn request(&self, method: Method) -> RequestBuilder {
        self.server.client.request(method, self.server.url(&self.path))
    }

    async fn progress(&self) -> (u64, bool) {
        let response = self.request(Method::HEAD).send().await.expect("an answer");
        assert_eq!(response.status(), 204);
        assert_eq!(response.headers()["cache-control"], "no-store");
        let limit = response.headers()[UPLOAD_LIMIT_HEADER].to_str().expect("text");
        assert!(limit.contains("min-append-size=1048576, max-append-size=67108864"), "{limit}");
        let text = |name: &str| response.headers()[name].to_str().expect("text").to_owned();
        (text(UPLOAD_OFFSET_HEADER).parse().expect("a number"), text(UPLOAD_COMPLETE_HEADER) == "?1")
    }

    fn part(&self, offset: usize, part: &[u8]) -> RequestBuilder {
        let complete = if offset + part.len() == self.length { "?1" } else { "?0" };
        self.request(Method::PATCH)
            .header(UPLOAD_OFFSET_HEADER, offset)
            .header(UPLOAD_LENGTH_HEADER, self.length)
            .header(UPLOAD_COMPLETE_HEADER, complete)
            .header(FILE_NAME_HEADER, "program")
            .body(part.to_vec())
    }

    async fn append(&self, offset: usize, part: &[u8]) -> Response {
        self.part(offset, part).send().await.expect("an answer")
    }
}

#[track_caller]
fn expect(response: &Response, status: StatusCode) {
    assert_eq!(response.status(), status);
}

#[tokio::test(flavor = "multi_thread")]
async fn any_replica_goes_on_where_another_was_cut_off() {
    let server = Server::start().await;
    let content = large(build());
    let upload = Upload::new(&server, "executable", &content);
    assert_eq!(upload.progress().await, (0, false));
    expect(&upload.append(0, &content[..PART]).await, StatusCode::NO_CONTENT);
    assert_eq!(upload.progress().await, (PART as u64, false));

    // Another process on the same catalog and storage, with a scratch folder of its own.
    let other = Server::start_with(|config| {
        let url = reqwest::Url::from_directory_path(server.folder.path().join("blobs"));
        config.storage = Some(url.expect("an absolute path").into());
        config.catalog = Some(format!("sqlite:{}/catalog.sqlite", server.folder.path().display()));
    })
    .await;
    let there = Upload { server: &other, ..upload };
    assert_eq!(there.progress().await, (PART as u64, false));
    let zstd = zstd::encode_all(&content[PART..2 * PART], 3).expect("in memory");
    let second = there.part(PART, &[]).body(zstd).header(CONTENT_ENCODING, "zstd").send();
    let second = second.await.expect("an answer");
    expect(&second, StatusCode::NO_CONTENT);
    assert_eq!(second.headers()[UPLOAD_OFFSET_HEADER], (2 * PART).to_string());

    let upload = Upload { server: &server, ..there };
    // Its answer was lost: the sender tries again and is told how far it is.
    let again = upload.append(PART, &content[PART..2 * PART]).await;
    expect(&again, StatusCode::CONFLICT);
    assert_eq!(again.headers()[UPLOAD_OFFSET_HEADER], (2 * PART).to_string());
    let last = upload.append(2 * PART, &content[2 * PART..]).await;
    expect(&last, StatusCode::CREATED);
    let stored: Stored = last.json().await.expect("the body of a stored upload");
    assert_eq!((stored.sha256, stored.size_bytes), (sha256(&content), content.len() as u64));
    assert_eq!(upload.progress().await, (content.len() as u64, true));
    let served = server.get(&format!("/buildid/{}/executable", build().id)).await;
    assert_eq!(served.headers()["x-debuginfod-file"], "program");
    assert!(served.bytes().await.expect("all of it") == content);
    // The answer to the last part was lost, too.
    expect(&upload.append(2 * PART, &content[2 * PART..]).await, StatusCode::OK);
    let report = check(&config(server.folder.path()), false).await.expect("a check");
    assert!(report.findings.is_empty(), "{:?}", report.findings);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_counts_as_a_whole_or_not_at_all() {
    let server = Server::start().await;
    let content = large(build());
    let upload = Upload::new(&server, "executable", &content);
    let refused = async |request: RequestBuilder, status: u16, reason: &str| {
        let response = request.send().await.expect("an answer");
        let found = response.status();
        let text = response.text().await.expect("a reason");
        assert_eq!(found, status, "{text}");
        assert!(text.contains(reason), "{text}");
        assert_eq!(upload.progress().await, (0, false), "{reason}");
    };
    let first = &content[..PART];
    refused(upload.part(0, &first[1..]), 400, "all but the last have 1048576").await;
    refused(upload.part(0, first).header("x-windlass-sha256", sha256(b"other")), 400, "the part has SHA-256")
        .await;
    refused(upload.part(0, first).header(CONTENT_ENCODING, "zstd"), 400, "Content-Encoding").await;
    refused(upload.part(PART, first), 409, "0 bytes of this upload are there").await;
    refused(upload.request(Method::PATCH).body("x"), 400, UPLOAD_COMPLETE_HEADER).await;
    let whole = |offset: &str, length: &str, complete: &str| {
        let request = upload.request(Method::PATCH).body(first.to_vec());
        let request = request.header(UPLOAD_OFFSET_HEADER, offset).header(UPLOAD_LENGTH_HEADER, length);
        request.header(UPLOAD_COMPLETE_HEADER, complete)
    };
    refused(whole("0", "x", "?0"), 400, "no number of bytes").await;
    refused(whole("0", "2000000", "yes"), 400, "expected ?1 or ?0").await;
    refused(whole("2", "1", "?0"), 400, "at 2 of 1").await;
    refused(whole("0", "2000000", "?1"), 400, "2000000 are left").await;
    refused(whole("0", "99999999999999", "?0"), 413, "the limit").await;
    let bomb = zstd::encode_all(std::io::repeat(0).take(70 << 20), 3).expect("in memory");
    refused(whole("0", "999999999", "?0").header(CONTENT_ENCODING, "zstd").body(bomb), 413, "67108864").await;
    let source = upload.path.replace("executable", "source");
    let source = server.client.patch(server.url(&source)).send().await.expect("an answer");
    assert_eq!(source.status(), 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_that_is_not_what_it_claims_is_given_up() {
    let server = Server::start().await;
    let content = large(build());
    let upload = Upload::new(&server, "executable", &content);
    expect(&upload.append(0, &content[..PART]).await, StatusCode::NO_CONTENT);
    let mut wrong = content[PART..].to_vec();
    wrong[7] ^= 1;
    let refused = upload.append(PART, &wrong).await;
    expect(&refused, StatusCode::UNPROCESSABLE_ENTITY);
    assert!(refused.text().await.expect("a reason").contains(&sha256(&content)));
    assert_eq!(upload.progress().await, (0, false));
    // In one part, and then not of this kind.
    let stripped = Upload::new(&server, "debuginfo", &build().stripped);
    expect(&stripped.append(0, &build().stripped).await, StatusCode::UNPROCESSABLE_ENTITY);

    expect(&upload.append(0, &content[..PART]).await, StatusCode::NO_CONTENT);
    let given_up = upload.request(Method::DELETE).send().await.expect("an answer");
    expect(&given_up, StatusCode::NO_CONTENT);
    assert_eq!(upload.progress().await, (0, false));
    expect(&upload.append(0, &content).await, StatusCode::CREATED);
}

#[tokio::test(flavor = "multi_thread")]
async fn parts_need_the_token() {
    let server = Server::start_with(|config| config.token = Some("secret".to_owned())).await;
    let content = large(build());
    let upload = Upload::new(&server, "executable", &content);
    for request in
        [upload.request(Method::HEAD), upload.request(Method::DELETE), upload.part(0, &content[..PART])]
    {
        expect(&request.send().await.expect("an answer"), StatusCode::UNAUTHORIZED);
    }
    let first = upload.part(0, &content[..PART]).bearer_auth("secret").send().await.expect("an answer");
    expect(&first, StatusCode::NO_CONTENT);
}
