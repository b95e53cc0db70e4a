use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;

/// A service that gives each connection the next of `answers`: bytes, or nothing and a close. Keeps the request
/// lines, with the offset of a part.
async fn scripted(answers: Vec<String>) -> (Server, Arc<Mutex<Vec<String>>>) {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("http://{}", listener.local_addr().expect("it is bound"));
    let requests = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&requests);
    tokio::spawn(async move {
        for answer in answers {
            let (mut connection, _) = listener.accept().await.expect("a connection");
            let mut request = Vec::new();
            while !is_whole(&request) {
                if connection.read_buf(&mut request).await.expect("a request") == 0 {
                    break;
                }
            }
            let head = String::from_utf8_lossy(&request).into_owned();
            let line = head.split(' ').next().unwrap_or_default();
            let offset = head.lines().find_map(|line| line.strip_prefix("upload-offset: "));
            seen.lock().expect("nobody panics with it").push(format!("{line} {}", offset.unwrap_or("-")));
            connection.write_all(answer.as_bytes()).await.expect("the client listens");
        }
    });
    (Server::new(&url, None).expect("an address"), requests)
}

/// Whether a request is there with its body, chunked or counted.
fn is_whole(request: &[u8]) -> bool {
    let Some(head) = request.windows(4).position(|bytes| bytes == b"\r\n\r\n") else { return false };
    let text = String::from_utf8_lossy(&request[..head]).to_lowercase();
    if text.contains("transfer-encoding: chunked") {
        return request.ends_with(b"\r\n0\r\n\r\n");
    }
    let length = text.lines().find_map(|line| line.strip_prefix("content-length: "));
    let length: usize = length.map_or(0, |length| length.trim().parse().expect("a number"));
    request.len() - head - 4 >= length
}

fn answer(status: &str, headers: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\nconnection: close\r\n{headers}content-length: {}\r\n\r\n{body}",
        if status.starts_with("204") { 0 } else { body.len() }
    )
}

async fn sent_to(size: u64, answers: Vec<String>) -> (Fate, Vec<String>) {
    let (server, requests) = scripted(answers).await;
    let artefact = ArtefactName {
        build_id: "abcd".parse().unwrap(),
        kind: ArtefactKind::Executable,
        path: None,
        sha256: None,
        brings: None,
    };
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(size).unwrap();
    let content = Content::whole(file.path(), file.as_file()).unwrap();
    let item = Item { artefact, content, name: "file".to_owned(), file: 0, source: None };
    let bar = ProgressBar::hidden();
    let fate = send_one(&server, &item, &bar).await;
    if matches!(fate, Fate::Sent | Fate::Present) {
        assert_eq!(bar.position(), size, "all is shown as done, and once");
    }
    let requests = requests.lock().unwrap().clone();
    (fate, requests)
}

const LARGE: u64 = 3 * PART_BYTES - 5;

fn created() -> String {
    answer("201 Created", "", "")
}

fn head(offset: u64, complete: bool) -> String {
    let complete = if complete { "?1" } else { "?0" };
    answer("204 No Content", &format!("upload-offset: {offset}\r\nupload-complete: {complete}\r\n"), "")
}

#[tokio::test]
async fn a_broken_connection_is_tried_again() {
    let (fate, requests) = sent_to(10, vec![String::new(), created()]).await;
    assert_eq!((fate, requests.len()), (Fate::Sent, 2));
}

#[tokio::test]
async fn a_refusal_is_not_tried_again() {
    let refused = answer("422 Unprocessable Entity", "", "{\"error\":\"bad\"}");
    let (fate, requests) = sent_to(10, vec![refused, created()]).await;
    assert_eq!(fate, Fate::Failed("422 Unprocessable Entity: bad".to_owned()));
    assert_eq!(requests, ["PUT -"]);
}

#[tokio::test]
async fn parts_that_arrived_are_not_sent_again() {
    // The service has one part of an earlier run; the connection breaks in the second.
    let answers = vec![
        head(PART_BYTES, false),
        String::new(),
        head(PART_BYTES, false),
        head(2 * PART_BYTES, false),
        created(),
    ];
    let (fate, requests) = sent_to(LARGE, answers).await;
    assert_eq!(fate, Fate::Sent);
    let (one, two) = (format!("PATCH {PART_BYTES}"), format!("PATCH {}", 2 * PART_BYTES));
    assert_eq!(requests, ["HEAD -", &one, "HEAD -", &one, &two]);
}

#[tokio::test]
async fn another_sender_is_followed() {
    let elsewhere = answer("409 Conflict", &format!("upload-offset: {}\r\n", 2 * PART_BYTES), "{}");
    let (fate, requests) = sent_to(LARGE, vec![head(0, false), elsewhere, created()]).await;
    assert_eq!(fate, Fate::Sent);
    assert_eq!(requests, ["HEAD -", "PATCH 0", &format!("PATCH {}", 2 * PART_BYTES)]);
    let (fate, requests) = sent_to(LARGE, vec![head(LARGE, true)]).await;
    assert_eq!((fate, requests.len()), (Fate::Present, 1));
}

#[tokio::test]
async fn a_conflict_of_contents_ends_it() {
    let other = answer("409 Conflict", "", "{\"error\":\"other content\"}");
    let (fate, _) = sent_to(LARGE, vec![head(0, false), other]).await;
    assert_eq!(fate, Fate::Failed("409 Conflict: other content".to_owned()));
}

#[tokio::test]
async fn a_service_without_parts_gets_the_whole() {
    let unknown = answer("404 Not Found", "", "");
    let (fate, requests) = sent_to(LARGE, vec![unknown, created()]).await;
    assert_eq!(fate, Fate::Sent);
    assert_eq!(requests, ["HEAD -", "PUT -"]);
}

#[test]
fn pauses_grow_up_to_a_bound() {
    for attempt in 1..100 {
        let longest = FIRST_PAUSE.saturating_mul(1 << (attempt - 1).min(16)).min(MAX_PAUSE);
        let pause = pause(attempt);
        assert!(pause >= longest / 2 && pause <= longest, "{attempt}: {pause:?}");
    }
}
