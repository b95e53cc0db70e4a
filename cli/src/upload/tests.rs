use std::path::{Path, PathBuf};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use windlass_schema::http::{MissingRequest, MissingResponse};

use super::{Options, upload};
use crate::server::Server;

/// Head and body of the next request; nothing if it does not come to its end.
async fn request(connection: &mut TcpStream) -> Option<(String, Vec<u8>)> {
    let mut bytes = Vec::new();
    loop {
        if connection.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
        let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else { continue };
        let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        let Some(length) = length.and_then(|length| length.trim().parse::<usize>().ok()) else { continue };
        if bytes.len() - end - 4 >= length {
            return Some((head, bytes.split_off(end + 4)));
        }
    }
}

async fn respond(connection: &mut TcpStream, status: &str, body: &[u8]) {
    let head = format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
    connection.write_all(head.as_bytes()).await.expect("a service of this test");
    connection.write_all(body).await.expect("a service of this test");
}

/// A service that lacks everything, and takes what comes whole. `meanwhile` happens between question and answer.
async fn service(meanwhile: impl FnOnce() + Send + 'static) -> Server {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a service of this test");
    let url = format!("http://{}", listener.local_addr().expect("a service of this test"));
    tokio::spawn(async move {
        let (mut connection, _) = listener.accept().await.expect("a service of this test");
        let (_, body) = request(&mut connection).await.expect("a service of this test");
        let asked: MissingRequest =
            serde_json::from_slice(&zstd::decode_all(&body[..]).expect("a service of this test"))
                .expect("a service of this test");
        meanwhile();
        let answer = MissingResponse { missing: asked.artefacts, differing: Vec::new() };
        respond(&mut connection, "200 OK", &serde_json::to_vec(&answer).expect("a service of this test"))
            .await;
        loop {
            let (mut connection, _) = listener.accept().await.expect("a service of this test");
            if request(&mut connection).await.is_some() {
                respond(&mut connection, "201 Created", b"").await;
            }
        }
    });
    Server::new(&url, None).expect("a service of this test")
}

/// Uploads two programs, of which one meets with `fate` meanwhile.
async fn uploaded_while(fate: fn(&Path)) -> (u8, Vec<String>) {
    let dir = tempfile::tempdir().expect("a service of this test");
    let paths: Vec<PathBuf> = ["inlined", "small"].map(|name| dir.path().join(name)).into();
    for path in &paths {
        std::fs::copy(
            Path::new("../fixtures/elf").join(path.file_name().expect("a service of this test")),
            path,
        )
        .expect("a service of this test");
    }
    let victim = paths[0].clone();
    let server = service(move || fate(&victim)).await;
    let report = upload(&server, &paths, Options::default()).await.expect("a service of this test");
    let json = serde_json::to_value(&report).expect("a service of this test");
    let told = json["files"].as_array().expect("a service of this test").iter().map(|file| {
        format!(
            "{} {}",
            file["status"].as_str().expect("a service of this test"),
            file["reason"].as_str().unwrap_or_default()
        )
    });
    (report.exit_status(), told.collect())
}

#[tokio::test]
async fn a_file_that_vanishes_costs_itself_alone() {
    let (status, told) =
        uploaded_while(|path| std::fs::remove_file(path).expect("a service of this test")).await;
    assert!(told[0].starts_with("failed No such file"), "{told:?}");
    assert_eq!((status, told[1].as_str()), (1, "uploaded "));
}

#[tokio::test]
async fn a_file_that_changes_is_not_sent_as_what_it_was() {
    let (status, told) =
        uploaded_while(|path| std::fs::write(path, "another").expect("a service of this test")).await;
    assert!(told[0].starts_with("failed it changed since it was read"), "{told:?}");
    assert_eq!((status, told[1].as_str()), (1, "uploaded "));
}
