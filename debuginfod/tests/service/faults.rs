//! When storage fails: never a wrong byte, never an answer that a client believes for ten minutes.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::Duration;

use opentelemetry_proto::tonic::collector::profiles::v1development::ExportProfilesServiceRequest;
use opentelemetry_proto::tonic::profiles::v1development::{Profile, ResourceProfiles, ScopeProfiles};
use prost::Message;
use reqwest::StatusCode;
use windlass_debuginfod::{check, start};
use windlass_schema::http::{ArtefactKind, ArtefactName, MissingRequest, MissingResponse};

use crate::server::{Server, build, config, sha256};

fn blob_path(server: &Server, content: &[u8]) -> PathBuf {
    crate::server::blob_path(server.folder.path(), content)
}

/// What a client reads of the answer to GET `path`, and how the connection ends.
async fn raw_get(server: &Server, path: &str, accept: &'static str) -> (Vec<u8>, Result<(), ErrorKind>) {
    let (address, path) = (server.service.address(), path.to_owned());
    tokio::task::spawn_blocking(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nAccept-Encoding: {accept}\r\n\r\n").unwrap();
        let (mut read, mut buffer) = (Vec::new(), [0; 65536]);
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => return (read, Ok(())),
                Ok(count) => read.extend_from_slice(&buffer[..count]),
                Err(error) => return (read, Err(error.kind())),
            }
        }
    })
    .await
    .unwrap()
}

/// Bytes that zstd cannot shrink.
fn noise(size: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    })
    .take(size)
    .collect()
}

/// Changes one bit of a stored content.
fn damage(server: &Server, content: &[u8], at: impl Fn(usize) -> usize) {
    let file = blob_path(server, content);
    let mut stored = std::fs::read(&file).unwrap();
    let at = at(stored.len());
    stored[at] ^= 1;
    std::fs::write(&file, &stored).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_found_by_the_check_resets_and_heals_by_upload() {
    let server = Server::start().await;
    let build = build();
    let name = format!("{}/executable", build.id);
    let path = format!("/buildid/{name}");
    server.expect_put(&name, &build.full, StatusCode::CREATED).await;
    damage(&server, &build.full, |size| size / 2);

    let report = check(&config(server.folder.path()), false).await.unwrap();
    assert_eq!(report.findings.len(), 1, "{:?}", report.findings);
    assert!(report.findings[0].contains(&sha256(&build.full)));
    assert_eq!(raw_get(&server, &path, "identity").await, (Vec::new(), Err(ErrorKind::ConnectionReset)));
    let artefacts = vec![ArtefactName {
        build_id: build.id,
        kind: ArtefactKind::Executable,
        path: None,
        sha256: None,
        brings: None,
    }];
    let request = MissingRequest { artefacts: artefacts.clone() };
    let missing = server.client.post(server.url("/api/v1/missing")).json(&request).send().await.unwrap();
    assert_eq!(missing.json::<MissingResponse>().await.unwrap().missing, artefacts);

    server.expect_put(&name, &build.full, StatusCode::OK).await;
    assert_eq!(server.get(&path).await.bytes().await.unwrap(), build.full);
    let report = check(&config(server.folder.path()), false).await.unwrap();
    assert!(report.findings.is_empty(), "{:?}", report.findings);
    assert_eq!((report.blobs, report.artefacts), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_met_while_serving_resets_and_heals_by_upload() {
    let server = Server::start().await;
    // In the first frame nothing has been sent yet; later a part has. A client that accepts zstd would
    // take damaged bytes for a file that does not exist, so they are not sent to it either.
    for (case, accept, early) in
        [("a", "identity", true), ("b", "zstd", true), ("c", "identity", false), ("d", "zstd", false)]
    {
        let name = format!("{}/source/{case}", build().id);
        let mut content = noise(6 << 20);
        content.extend(case.bytes());
        server.expect_put(&name, &content, StatusCode::CREATED).await;
        damage(&server, &content, |size| if early { 1000 } else { size - 100_000 });
        let (read, end) = raw_get(&server, &format!("/buildid/{name}"), accept).await;
        assert_eq!(end, Err(ErrorKind::ConnectionReset), "{case}");
        assert_eq!(read.is_empty(), early, "{case}: {} bytes", read.len());
        assert!(read.len() < content.len());
        // It is recorded in the background; then an upload stores it again.
        let mut healed = false;
        for _ in 0..100 {
            healed =
                server.put(&name, &content).await.status() == 200 && serves(&server, &name, &content).await;
            if healed {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(healed, "{case}");
    }
}

async fn serves(server: &Server, name: &str, content: &[u8]) -> bool {
    match server.client.get(server.url(&format!("/buildid/{name}"))).send().await {
        Ok(response) => response.bytes().await.is_ok_and(|bytes| bytes == content),
        Err(_) => false,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_or_cut_blob_resets() {
    let server = Server::start().await;
    for (path, size) in [("small", 1000), ("large", 2 << 20)] {
        let name = format!("{}/source/{path}", build().id);
        let content = noise(size);
        server.expect_put(&name, &content, StatusCode::CREATED).await;
        let file = blob_path(&server, &content);
        let stored = std::fs::read(&file).unwrap();
        std::fs::write(&file, &stored[..stored.len() - 1]).unwrap();
        assert_eq!(
            raw_get(&server, &format!("/buildid/{name}"), "zstd").await.1,
            Err(ErrorKind::ConnectionReset),
            "cut"
        );
        std::fs::remove_file(&file).unwrap();
        assert_eq!(
            raw_get(&server, &format!("/buildid/{name}"), "zstd").await.1,
            Err(ErrorKind::ConnectionReset),
            "lost"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_upload_leaves_is_not_served() {
    let server = Server::start().await;
    let build = build();
    // Killed while the body came in: the connection just ends.
    let mut stream = TcpStream::connect(server.service.address()).unwrap();
    let head = format!(
        "PUT /api/v1/buildid/{}/executable HTTP/1.1\r\nHost: x\r\nx-windlass-sha256: {}\r\nContent-Length: {}\r\n\r\n",
        build.id,
        sha256(&build.full),
        build.full.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(&build.full[..build.full.len() / 2]).unwrap();
    drop(stream);
    // Killed after the blob was written, before the catalog's commit; and halfway through the blob.
    let name = sha256(&build.full);
    let file = server.folder.path().join("blobs").join(&name[..2]).join(&name);
    std::fs::write(&file, b"half of a blob").unwrap();
    std::fs::write(file.with_extension("tmp"), b"half of a blob").unwrap();
    std::fs::write(server.folder.path().join("tmp/left-behind"), &build.full).unwrap();

    let server = server.restart().await;
    let path = format!("/buildid/{}/executable", build.id);
    assert_eq!(server.get(&path).await.status(), 404);
    server.expect_put(&format!("{}/executable", build.id), &build.full, StatusCode::CREATED).await;
    assert_eq!(server.get(&path).await.bytes().await.unwrap(), build.full);
    assert!(check(&config(server.folder.path()), false).await.unwrap().findings.is_empty());
}

/// Stores a batch of profiles of the nanoseconds 1000 to 2000 and returns its bytes.
async fn send_batch(server: &Server) -> Vec<u8> {
    let profile = Profile { time_unix_nano: 1000, duration_nano: 1000, ..Profile::default() };
    let scope = ScopeProfiles { profiles: vec![profile], ..ScopeProfiles::default() };
    let resource = ResourceProfiles { scope_profiles: vec![scope], ..ResourceProfiles::default() };
    let batch = ExportProfilesServiceRequest { resource_profiles: vec![resource], dictionary: None };
    let batch = batch.encode_to_vec();
    let request = server.client.post(server.url("/v1development/profiles")).body(batch.clone());
    assert_eq!(request.send().await.unwrap().status(), 200);
    batch
}

/// Status of the merged profile, and how many batches it says it lacks.
async fn merged(server: &Server) -> (u16, Option<String>) {
    let response = server.get("/api/v1/profiles?start=1&end=5000").await;
    let skipped = response.headers().get("x-windlass-skipped-batches");
    (response.status().as_u16(), skipped.map(|count| count.to_str().unwrap().to_owned()))
}

#[tokio::test(flavor = "multi_thread")]
async fn storage_that_is_away_for_a_moment_costs_nothing() {
    let server = Server::start().await;
    let name = format!("{}/source/a.c", build().id);
    server.expect_put(&name, b"int a;", StatusCode::CREATED).await;
    send_batch(&server).await;
    let (blobs, away) = (server.folder.path().join("blobs"), server.folder.path().join("away"));
    let path = format!("/buildid/{name}");

    // Unmounted while it runs: the folder is gone, or an empty one is in its place.
    std::fs::rename(&blobs, &away).unwrap();
    for empty in [false, true] {
        if empty {
            std::fs::create_dir(&blobs).unwrap();
        }
        assert_eq!(merged(&server).await.0, 500);
        assert_eq!(raw_get(&server, &path, "identity").await, (Vec::new(), Err(ErrorKind::ConnectionReset)));
        let upload = server.put(&format!("{}/source/b.c", build().id), b"int b;").await;
        assert_eq!(upload.status(), 500, "not acknowledged into the wrong place");
        assert!(upload.text().await.unwrap().contains("--storage"));
        assert_eq!(server.get("/readyz").await.status(), 503);
        assert_eq!(blobs.read_dir().map_or(0, Iterator::count), 0, "nothing is written there");
    }

    // Not mounted at the start.
    let Server { folder, service, .. } = server;
    service.stop().await;
    for empty in [true, false] {
        let Err(error) = start(config(folder.path())).await else { panic!("started without its storage") };
        let text = error.to_string();
        assert!(text.contains("blobs") && text.contains("is away"), "{text}");
        assert!(check(&config(folder.path()), false).await.is_err());
        assert!(std::error::Error::source(&error).is_none(), "said once");
        if empty {
            std::fs::remove_dir(&blobs).unwrap();
        }
    }
    assert!(!blobs.exists());

    std::fs::rename(&away, &blobs).unwrap();
    let server = Server::start_in(folder, |_| {}).await;
    assert_eq!(merged(&server).await, (200, None));
    assert!(serves(&server, &name, b"int a;").await);
    assert!(check(&config(server.folder.path()), false).await.unwrap().findings.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_batch_is_told_and_counts_again_once_it_is_sound() {
    let server = Server::start().await;
    let batch = send_batch(&server).await;
    damage(&server, &batch, |size| size / 2);
    for _ in 0..2 {
        assert_eq!(merged(&server).await, (200, Some("1".to_owned())));
    }
    let report = check(&config(server.folder.path()), false).await.unwrap();
    assert!(report.findings[0].contains("profiles of 1000 to 2000"), "{:?}", report.findings);

    damage(&server, &batch, |size| size / 2); // undoes itself
    let report = check(&config(server.folder.path()), false).await.unwrap();
    assert!(report.findings[0].contains("sound again"), "{:?}", report.findings);
    assert_eq!(merged(&server).await, (200, None));
    assert!(check(&config(server.folder.path()), false).await.unwrap().findings.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_content_makes_room_for_another_hosts() {
    let server = Server::start().await;
    let build = build();
    let kernel: [&[u8]; 2] = [b"ffffffff81000000 T _text\n", b"ffffffff81000000 T _text\n0 A _end\n"];
    for (kind, [first, second]) in [("skeleton", [&build.stripped[..], &build.full]), ("kallsyms", kernel)] {
        let name = format!("{}/{kind}", build.id);
        server.expect_put(&name, first, StatusCode::CREATED).await;
        server.expect_put(&name, second, StatusCode::OK).await;
        damage(&server, first, |size| size / 2);
        assert_eq!(check(&config(server.folder.path()), false).await.unwrap().findings.len(), 1);
        let text = server.expect_put(&name, second, StatusCode::CREATED).await;
        assert!(text.contains(&sha256(second)), "{text}");
        server.expect_put(&name, second, StatusCode::OK).await;
        damage(&server, first, |size| size / 2); // undoes itself
        assert_eq!(
            check(&config(server.folder.path()), false).await.unwrap().findings.len(),
            1,
            "sound again"
        );
        assert_eq!(server.put(&name, first).await.text().await.unwrap(), text, "the new one stays");
    }
}
