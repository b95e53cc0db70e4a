//! The protocol, request by request, as elfutils' server answers.

use std::process::Command;

use reqwest::header::{
    ACCEPT_ENCODING, ACCEPT_RANGES, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE,
    CONTENT_TYPE, ETAG, IF_NONE_MATCH, IF_RANGE, LAST_MODIFIED, RANGE, VARY,
};
use reqwest::{Method, StatusCode};

use crate::server::{Server, build, run, sha256};

async fn stocked() -> Server {
    let server = Server::start().await;
    let build = build();
    server.expect_put(&format!("{}/executable", build.id), &build.stripped, StatusCode::CREATED).await;
    server.expect_put(&format!("{}/debuginfo", build.id), &build.debug, StatusCode::CREATED).await;
    let source = format!("{}/source/src/a%2B%2B/x/program.c", build.id);
    server.expect_put(&source, b"int main;\n", StatusCode::CREATED).await;
    server
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_in_elfutils_words() {
    let server = stocked().await;
    let id = build().id;
    for (path, status, text) in [
        (format!("/buildid/{id}/section/.nosuch"), 404, "not found"),
        (format!("/buildid/{id}/section/"), 503, "invalid section suffix"),
        (format!("/buildid/{id}/section"), 503, "invalid section suffix"),
        ("/buildid/0123456789abcdef/debuginfo".to_owned(), 404, "not found"),
        ("/buildid/ab/debuginfo".to_owned(), 404, "not found"),
        ("/buildid/ABCD/debuginfo".to_owned(), 503, "invalid buildid"),
        ("/buildid/abc/debuginfo".to_owned(), 503, "invalid buildid"),
        ("/buildid/a/debuginfo".to_owned(), 503, "invalid buildid"),
        ("/buildid/xyzw/debuginfo".to_owned(), 503, "invalid buildid"),
        (format!("/buildid/{id}/bogus"), 503, "invalid artifacttype"),
        (format!("/buildid/{id}/source"), 503, "invalid source suffix"),
        (format!("/buildid/{id}"), 503, "/buildid/ webapi error, need buildid"),
        ("/etc/passwd".to_owned(), 503, "webapi error, unrecognized '/etc'"),
        (format!("/buildid/{id}/source/etc/passwd"), 404, "not found"),
        ("/metadata?key=nonsense&value=x".to_owned(), 503, "/metadata webapi error, unsupported key"),
        ("/metadata?key=file".to_owned(), 503, "/metadata webapi error, need key and value"),
    ] {
        let response = server.get(&path).await;
        assert_eq!(response.status(), status, "{path}");
        assert_eq!(response.headers()[CONTENT_TYPE], "text/plain", "{path}");
        assert_eq!(response.text().await.unwrap(), text, "{path}");
    }
    for method in [Method::OPTIONS, Method::DELETE, Method::POST] {
        let response =
            server.client.request(method, server.url("/buildid/abcd/debuginfo")).send().await.unwrap();
        assert_eq!(response.status(), 400);
        assert_eq!(response.text().await.unwrap(), "we support GET only");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_with_their_headers() {
    let server = stocked().await;
    let build = build();
    // What has debug information is never replaced; what has none may be, by what has more.
    let forever = "public, max-age=31536000, immutable";
    for (kind, content, caching) in
        [("executable", &build.stripped, "public, no-cache"), ("debuginfo", &build.debug, forever)]
    {
        for path in [
            format!("/buildid/{}/{kind}", build.id),
            format!("/buildid/{}/{kind}/", build.id),
            format!("/buildid/{}/{kind}?foo=bar", build.id),
            format!("/buildid/{}%2F{kind}", build.id),
        ] {
            let response = server.get(&path).await;
            assert_eq!(response.status(), 200, "{path}");
            let headers = response.headers().clone();
            assert_eq!(headers[CONTENT_TYPE], "application/octet-stream");
            assert_eq!(headers["x-debuginfod-size"], content.len().to_string().as_str());
            assert_eq!(headers["x-debuginfod-file"], "program");
            assert_eq!(headers[CONTENT_LENGTH], content.len().to_string().as_str());
            assert_eq!(headers[CACHE_CONTROL], caching);
            assert_eq!(headers[ETAG], format!("\"sha256-{}\"", sha256(content)).as_str());
            assert_eq!(headers[VARY], "accept-encoding");
            assert!(headers[LAST_MODIFIED].to_str().unwrap().ends_with(" GMT"));
            assert_eq!(response.bytes().await.unwrap(), content[..], "{path}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn head_conditions_and_ranges() {
    let server = stocked().await;
    let content = &build().stripped;
    let url = server.url(&format!("/buildid/{}/executable", build().id));
    let head = server.client.head(&url).send().await.unwrap();
    assert_eq!(head.status(), 200);
    assert_eq!(head.headers()[CONTENT_LENGTH], content.len().to_string().as_str());
    assert_eq!(head.headers()[ACCEPT_RANGES], "bytes");
    let tag = head.headers()[ETAG].clone();
    assert!(head.bytes().await.unwrap().is_empty());

    let same = server.client.get(&url).header(IF_NONE_MATCH, &tag).send().await.unwrap();
    assert_eq!(same.status(), 304);
    assert_eq!(same.headers()[ETAG], tag);
    let other = server.client.get(&url).header(IF_NONE_MATCH, "\"sha256-00\"").send().await.unwrap();
    assert_eq!(other.status(), 200);

    let size = content.len();
    for (range, expect) in
        [("bytes=0-99", 0..100), ("bytes=-10", size - 10..size), ("bytes=4000-", 4000..size)]
    {
        let part = server.client.get(&url).header(RANGE, range).send().await.unwrap();
        assert_eq!(part.status(), 206, "{range}");
        let stated = format!("bytes {}-{}/{size}", expect.start, expect.end - 1);
        assert_eq!(part.headers()[CONTENT_RANGE], stated.as_str());
        assert_eq!(part.bytes().await.unwrap(), content[expect]);
    }
    let beyond = server.client.get(&url).header(RANGE, format!("bytes={size}-")).send().await.unwrap();
    assert_eq!(beyond.status(), 416);
    assert_eq!(beyond.headers()[CONTENT_RANGE], format!("bytes */{size}").as_str());
    let stale = server
        .client
        .get(&url)
        .header(RANGE, "bytes=0-9")
        .header(IF_RANGE, "\"sha256-00\"")
        .send()
        .await
        .unwrap();
    assert_eq!(stale.status(), 200);

    let small = server.client.get(&url).header("X-DEBUGINFOD-MAXSIZE", "10").send().await.unwrap();
    assert_eq!(small.status(), 406);
    assert_eq!(small.text().await.unwrap(), "File too large, max size=10");
}

#[tokio::test(flavor = "multi_thread")]
async fn stored_bytes_go_to_clients_that_accept_zstd() {
    let server = stocked().await;
    let content = &build().debug;
    let path = format!("/buildid/{}/debuginfo", build().id);
    let raw =
        server.client.get(server.url(&path)).header(ACCEPT_ENCODING, "gzip, zstd").send().await.unwrap();
    assert_eq!(raw.headers()[CONTENT_ENCODING], "zstd");
    assert_eq!(raw.headers()["x-debuginfod-size"], content.len().to_string().as_str());
    let tag = raw.headers()[ETAG].clone();
    let stored = raw.bytes().await.unwrap();
    assert!(stored.len() < content.len());
    assert_eq!(&zstd::stream::decode_all(&stored[..]).unwrap(), content);
    let again =
        server.client.get(server.url(&path)).header(ACCEPT_ENCODING, "zstd").header(IF_NONE_MATCH, tag);
    assert_eq!(again.send().await.unwrap().status(), 304);

    // A client that decodes by itself, as libcurl in libdebuginfod does.
    let decoding = reqwest::Client::builder().no_proxy().build().unwrap();
    assert_eq!(decoding.get(server.url(&path)).send().await.unwrap().bytes().await.unwrap(), content[..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn sections_from_the_file_that_has_their_bytes() {
    let server = stocked().await;
    let build = build();
    let folder = tempfile::tempdir().unwrap();
    let section = |elf: &[u8], name: &str| {
        let (file, out) = (folder.path().join("file"), folder.path().join("out"));
        std::fs::write(&file, elf).unwrap();
        let dump = format!("{name}={}", out.display());
        run(Command::new("objcopy")
            .arg("--dump-section")
            .arg(dump)
            .arg(&file)
            .arg(folder.path().join("copy")));
        std::fs::read(out).unwrap()
    };
    for (name, from) in
        [(".text", &build.stripped), (".debug_info", &build.debug), (".eh_frame", &build.stripped)]
    {
        let response = server.get(&format!("/buildid/{}/section/{name}", build.id)).await;
        assert_eq!(response.status(), 200, "{name}");
        let size = response.headers()["x-debuginfod-size"].clone();
        let bytes = response.bytes().await.unwrap();
        assert_eq!(bytes, section(from, name), "{name}");
        assert_eq!(size, bytes.len().to_string().as_str());
    }
    let bss = server.get(&format!("/buildid/{}/section/.bss", build.id)).await;
    assert_eq!(bss.status(), 404, "no file holds bytes of it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_section_is_that_of_the_debuginfo_as_soon_as_there_is_one() {
    let server = Server::start().await;
    let build = build();
    let section = async |name: &str| {
        let answer = server.get(&format!("/buildid/{}/section/{name}", build.id)).await;
        let caching = answer.headers()[CACHE_CONTROL].to_str().unwrap().to_owned();
        (
            answer.status().as_u16(),
            caching,
            answer.headers().get(ETAG).cloned(),
            answer.bytes().await.unwrap(),
        )
    };
    assert_eq!(section(".comment").await.0, 404);
    server.expect_put(&format!("{}/executable", build.id), &build.full, StatusCode::CREATED).await;
    let (status, caching, first, bytes) = section(".comment").await;
    assert_eq!((status, caching.as_str()), (200, "public, no-cache"), "known to be there at once");
    server.expect_put(&format!("{}/debuginfo", build.id), &build.debug, StatusCode::CREATED).await;
    let (_, caching, second, again) = section(".comment").await;
    assert!(caching.ends_with("immutable"), "{caching}");
    assert_ne!(first, second, "another file's");
    assert_eq!(bytes, again);
    assert_eq!(section(".text").await.1, "public, no-cache", "the debuginfo has no bytes of it");
}

#[tokio::test(flavor = "multi_thread")]
async fn sources_only_as_uploaded() {
    let server = stocked().await;
    let id = build().id;
    for path in
        ["source/src/a++/x/program.c", "source/src/a%2B%2B/x/program.c", "source%2Fsrc//a++/%2e/x//program.c"]
    {
        let response = server.get(&format!("/buildid/{id}/{path}")).await;
        assert_eq!(response.status(), 200, "{path}");
        assert_eq!(response.headers()["x-debuginfod-file"], "program.c");
        assert_eq!(response.text().await.unwrap(), "int main;\n", "{path}");
    }
    assert_eq!(server.get(&format!("/buildid/{id}/source/etc/passwd")).await.status(), 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unstripped_executable_is_debuginfo_until_better_arrives() {
    let server = Server::start().await;
    let build = build();
    server.expect_put(&format!("{}/executable", build.id), &build.full, StatusCode::CREATED).await;
    let path = format!("/buildid/{}/debuginfo", build.id);
    assert_eq!(server.get(&path).await.bytes().await.unwrap(), build.full);
    server.expect_put(&format!("{}/debuginfo", build.id), &build.debug, StatusCode::CREATED).await;
    assert_eq!(server.get(&path).await.bytes().await.unwrap(), build.debug);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stripped_executable_is_no_debuginfo() {
    let server = Server::start().await;
    let build = build();
    server.expect_put(&format!("{}/executable", build.id), &build.stripped, StatusCode::CREATED).await;
    assert_eq!(server.get(&format!("/buildid/{}/debuginfo", build.id)).await.status(), 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn metadata_by_name_glob_and_id() {
    let server = stocked().await;
    let id = build().id;
    for (query, count) in [
        ("key=file&value=program".to_owned(), 2),
        ("key=glob&value=/src/*.c".to_owned(), 1),
        (format!("key=buildid&value={id}"), 3),
        ("key=glob&value=nothing*".to_owned(), 0),
    ] {
        let answer: serde_json::Value =
            serde_json::from_slice(&server.get(&format!("/metadata?{query}")).await.bytes().await.unwrap())
                .unwrap();
        assert_eq!(answer["complete"], true);
        let results = answer["results"].as_array().unwrap();
        assert_eq!(results.len(), count, "{query}: {answer}");
        assert!(results.iter().all(|result| result["buildid"] == id.to_string().as_str()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn operations() {
    let server = stocked().await;
    assert_eq!(server.get("/healthz").await.status(), 200);
    assert_eq!(server.get("/readyz").await.status(), 200);
    server.get(&format!("/buildid/{}/debuginfo", build().id)).await;
    assert_eq!(server.counter("http_requests_total{type=\"debuginfo\"}").await, 1);
    assert_eq!(server.counter("http_responses_total{result=\"file\"}").await, 1);
    assert_eq!(server.counter("ready").await, 1);
    let unknown = server.get("/api/v1/nonsense").await;
    assert_eq!(unknown.status(), 404);
    assert!(unknown.text().await.unwrap().contains("/api/v1/nonsense"));
}
