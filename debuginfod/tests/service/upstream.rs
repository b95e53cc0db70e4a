//! Asking other servers: what they have is kept, what they lack is remembered briefly, and their trouble is
//! never passed on as "not found".

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use reqwest::StatusCode;

use crate::server::{Server, build};

/// A server that gives every request this answer, counts them and keeps the last.
struct Scripted {
    url: String,
    requests: Arc<AtomicUsize>,
    last: Arc<Mutex<String>>,
}

fn scripted(answer: &'static str) -> Scripted {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (requests, last) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(String::new())));
    let (counter, keeper) = (Arc::clone(&requests), Arc::clone(&last));
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut head = [0; 4096];
            let count = stream.read(&mut head).unwrap_or(0);
            *keeper.lock().unwrap() = String::from_utf8_lossy(&head[..count]).to_lowercase();
            counter.fetch_add(1, Ordering::SeqCst);
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    Scripted { url, requests, last }
}

/// What becomes of a file on its way.
#[derive(Clone, Copy)]
enum Fate {
    /// It comes after a while.
    Late,
    /// Half of it comes, and then nothing.
    Stalls,
    /// Half of it comes, and then the end.
    Cut,
}

/// A server that sends this file to everyone, in its way, and the number of times that it began to.
fn sending(content: &'static [u8], fate: Fate) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let begun = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&begun);
    std::thread::spawn(move || {
        let mut stalled = Vec::new();
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 4096]);
            if matches!(fate, Fate::Late) {
                std::thread::sleep(Duration::from_millis(300));
            }
            counter.fetch_add(1, Ordering::SeqCst);
            let size = content.len();
            let sent = if matches!(fate, Fate::Late) { size } else { size / 2 };
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n");
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&content[..sent]));
            if matches!(fate, Fate::Stalls) {
                stalled.push(stream);
            }
        }
    });
    (url, begun)
}

/// A server that takes connections and says nothing.
fn silent() -> (String, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    (format!("http://{}", listener.local_addr().unwrap()), listener)
}

const NOT_FOUND: &str = "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
const ILL: &str = "HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
const LIAR: &str = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\nnope";

async fn behind(upstreams: &[&str]) -> Server {
    let urls = upstreams.iter().map(|url| (*url).to_owned()).collect();
    Server::start_with(|config| config.upstreams = urls).await
}

#[tokio::test(flavor = "multi_thread")]
async fn fetched_once_and_kept() {
    let origin = Server::start().await;
    let build = build();
    origin.expect_put(&format!("{}/debuginfo", build.id), &build.debug, StatusCode::CREATED).await;
    let lacking = scripted(NOT_FOUND);
    let server = behind(&[&lacking.url, &format!("{}/", origin.service.url())]).await;
    let path = format!("/buildid/{}/debuginfo", build.id);
    let requests = (0..20).map(|_| {
        let request = server.client.get(server.url(&path));
        tokio::spawn(async move { request.send().await.unwrap().bytes().await.unwrap() })
    });
    for request in requests.collect::<Vec<_>>() {
        assert_eq!(request.await.unwrap(), build.debug);
    }
    let fetched = server.get(&path).await;
    assert_eq!(fetched.headers()["x-debuginfod-file"], "program", "passed on");
    let section = server.get(&format!("/buildid/{}/section/.debug_info", build.id)).await;
    assert_eq!(section.status(), 200);
    assert_eq!(
        origin.counter("http_requests_total{type=\"debuginfo\"}").await,
        1,
        "single flight, then local"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clear_no_is_remembered_until_an_upload() {
    let lacking = scripted(NOT_FOUND);
    let server = behind(&[&lacking.url]).await;
    let build = build();
    let path = format!("/buildid/{}/debuginfo", build.id);
    for _ in 0..3 {
        assert_eq!(server.get(&path).await.status(), 404);
    }
    assert_eq!(lacking.requests.load(Ordering::SeqCst), 1);
    server.expect_put(&format!("{}/executable", build.id), &build.stripped, StatusCode::CREATED).await;
    assert_eq!(server.get(&path).await.status(), 404);
    assert_eq!(lacking.requests.load(Ordering::SeqCst), 2, "asked again after the upload");
    server.expect_put(&format!("{}/debuginfo", build.id), &build.debug, StatusCode::CREATED).await;
    assert_eq!(server.get(&path).await.bytes().await.unwrap(), build.debug);
}

#[tokio::test(flavor = "multi_thread")]
async fn trouble_is_a_reset_and_soon_a_quick_one() {
    for answer in [ILL, LIAR] {
        let (ill, lacking) = (scripted(answer), scripted(NOT_FOUND));
        let server = behind(&[&ill.url, &lacking.url]).await;
        for number in 0..8 {
            let path = format!("/buildid/{number:04}/executable");
            let error = server.client.get(server.url(&path)).send().await.expect_err("no status at all");
            assert!(error.is_request(), "{error:?}");
        }
        let asked = ill.requests.load(Ordering::SeqCst);
        assert_eq!(asked, 3, "left alone after three failures");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_file_is_fetched_once() {
    let (liar, lacking) = (scripted(LIAR), scripted(NOT_FOUND));
    let server = behind(&[&liar.url, &lacking.url]).await;
    let path = format!("/buildid/{}/debuginfo", build().id);
    server.client.get(server.url(&path)).send().await.expect_err("it may have been an error page");
    for _ in 0..3 {
        assert_eq!(server.get(&path).await.status(), 404, "nobody has anything usable");
    }
    assert_eq!(liar.requests.load(Ordering::SeqCst), 1);
    server.expect_put(&format!("{}/debuginfo", build().id), &build().debug, StatusCode::CREATED).await;
    assert_eq!(server.get(&path).await.bytes().await.unwrap(), build().debug);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_too_large_to_keep_is_fetched_once() {
    let origin = Server::start().await;
    let build = build();
    origin.expect_put(&format!("{}/debuginfo", build.id), &build.debug, StatusCode::CREATED).await;
    let url = origin.service.url();
    let server = Server::start_with(|config| {
        config.upstreams = vec![url];
        config.max_upload_bytes = 100;
    })
    .await;
    let path = format!("/buildid/{}/debuginfo", build.id);
    server.client.get(server.url(&path)).send().await.expect_err("first the fault");
    assert_eq!(server.get(&path).await.status(), 404);
    assert_eq!(origin.counter("http_requests_total{type=\"debuginfo\"}").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn hops_are_passed_on_and_limited() {
    let lacking = scripted(NOT_FOUND);
    let server = behind(&[&lacking.url]).await;
    let get = |hops: &str| {
        let request = server.client.get(server.url("/buildid/abcd/debuginfo"));
        request.header("X-Forwarded-For", hops).header("User-Agent", "elfutils/0.192").send()
    };
    assert_eq!(get("10.0.0.1, 10.0.0.2").await.unwrap().status(), 404);
    let head = lacking.last.lock().unwrap().clone();
    assert!(head.contains("x-forwarded-for: 10.0.0.1, 10.0.0.2, 127.0.0.1\r\n"), "{head}");
    assert!(head.contains("user-agent: elfutils/0.192\r\n"), "{head}");
    let eight = get("1,2,3,4,5,6,7,8").await.unwrap();
    assert_eq!(eight.status(), 404);
    assert_eq!(
        eight.text().await.unwrap(),
        "not found, --forwared-ttl-limit reached and will not query the upstream servers"
    );
    assert_eq!(lacking.requests.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_upstream_costs_hits_nothing_and_misses_no_more_than_the_deadline() {
    let (url, listener) = silent();
    let patient = Server::start_with(|config| {
        config.upstreams = vec![url.clone()];
        config.upstream_deadline = Duration::from_secs(3600);
    })
    .await;
    let build = build();
    patient.expect_put(&format!("{}/executable", build.id), &build.stripped, StatusCode::CREATED).await;
    let path = format!("/buildid/{}/debuginfo", build.id);
    let miss = tokio::spawn(patient.client.get(patient.url(&path)).send());
    let (held, _) = tokio::task::spawn_blocking(move || listener.accept().map(|it| (it, listener)))
        .await
        .unwrap()
        .map(|((stream, _), listener)| (stream, listener))
        .unwrap();
    let hit = patient.get(&format!("/buildid/{}/executable", build.id)).await;
    assert_eq!(hit.bytes().await.unwrap(), build.stripped);
    assert!(!miss.is_finished(), "it is held, not answered");
    miss.abort();
    drop(held);

    let (url, listener) = silent();
    let server = Server::start_with(|config| {
        config.upstreams = vec![url];
        config.upstream_deadline = Duration::from_millis(300);
    })
    .await;
    // As a client does that takes a reset for what may pass: three times.
    for _ in 0..3 {
        let error = server.client.get(server.url(&path)).send().await.expect_err("no status at all");
        assert!(error.is_request(), "{error:?}");
    }
    listener.set_nonblocking(true).unwrap();
    let mut asked = 0;
    while let Ok((mut stream, _)) = listener.accept() {
        asked += usize::from(stream.read(&mut [0; 4096]).unwrap() > 0);
    }
    assert_eq!(asked, 1, "it was silent just now");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_server_sends_what_the_first_does_not_end() {
    for fate in [Fate::Stalls, Fate::Cut] {
        let (first, second) = (sending(&build().debug, fate), sending(&build().debug, Fate::Late));
        let urls = [&first, &second].map(|(url, _)| url.clone());
        let server = Server::start_with(|config| {
            config.upstreams = urls.to_vec();
            config.upstream_deadline = Duration::from_secs(3600);
        })
        .await;
        let path = format!("/buildid/{}/debuginfo", build().id);
        assert_eq!(server.get(&path).await.bytes().await.unwrap(), build().debug);
        assert_eq!([&first, &second].map(|(_, begun)| begun.load(Ordering::SeqCst)), [1, 1]);
        let came = server.get(&format!("/api/v1/buildid/{}/provenance", build().id)).await;
        let came: serde_json::Value = serde_json::from_slice(&came.bytes().await.unwrap()).unwrap();
        assert_eq!(came[0]["upstream"], second.0.as_str(), "{came}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn where_it_came_from_is_kept_and_shown() {
    let origin = Server::start().await;
    let build = build();
    origin.expect_put(&format!("{}/debuginfo", build.id), &build.debug, StatusCode::CREATED).await;
    let (lacking, ill) = (scripted(NOT_FOUND), scripted(ILL));
    let server = behind(&[&ill.url, &lacking.url, &origin.service.url()]).await;
    let json = async |server: &Server, path: &str| -> serde_json::Value {
        serde_json::from_slice(&server.get(path).await.bytes().await.unwrap()).unwrap()
    };
    let path = format!("/api/v1/buildid/{}/provenance", build.id);
    assert_eq!(json(&server, &path).await, serde_json::json!([]));
    assert_eq!(server.get(&format!("/buildid/{}/debuginfo", build.id)).await.status(), 200);
    server.expect_put(&format!("{}/executable", build.id), &build.stripped, StatusCode::CREATED).await;

    // All have answered when nobody has it.
    assert!(server.client.get(server.url("/buildid/abcd/debuginfo")).send().await.is_err());
    let upstreams = json(&server, "/api/v1/upstreams").await;
    let counts = |number: usize| ["url", "files", "lacking"].map(|key| upstreams[number][key].clone());
    assert_eq!(upstreams[0]["left_alone"], false);
    assert_eq!(upstreams[0]["last_failure"], "status 502 Bad Gateway");
    let expect: [serde_json::Value; 3] = [origin.service.url().into(), 1.into(), 1.into()];
    assert_eq!(counts(2), expect);

    let server = server.restart().await;
    let came = json(&server, &path).await;
    let entries = came.as_array().unwrap();
    assert_eq!(entries.len(), 1, "what was uploaded came from nowhere else: {came}");
    assert_eq!(entries[0]["kind"], "debuginfo");
    assert_eq!(entries[0]["sha256"], crate::server::sha256(&build.debug).as_str());
    assert_eq!(entries[0]["upstream"], origin.service.url().as_str());
    assert!(entries[0]["fetched_s"].as_u64().unwrap() > 1_700_000_000);
}
