//! Uploads: each status, and what is durable after it.

use std::io::Write;

use reqwest::StatusCode;
use reqwest::header::CONTENT_ENCODING;
use windlass_debuginfod::{check, start};
use windlass_schema::http::{
    ArtefactKind, ArtefactName, Brings, MissingRequest, MissingResponse, SHA256_HEADER, Stored,
};

use crate::server::{Server, build, build_with, build_without_note, config, sha256};

#[tokio::test(flavor = "multi_thread")]
async fn stored_once_then_known_then_defended() {
    let server = Server::start().await;
    let build = build();
    let name = format!("{}/debuginfo", build.id);
    let text = server.expect_put(&name, &build.debug, StatusCode::CREATED).await;
    let stored: Stored = serde_json::from_str(&text).unwrap();
    assert_eq!((stored.build_id, stored.kind), (build.id, ArtefactKind::Debuginfo));
    assert_eq!((stored.sha256, stored.size_bytes), (sha256(&build.debug), build.debug.len() as u64));
    server.expect_put(&name, &build.debug, StatusCode::OK).await;
    // The same build-ID with other content: here the unstripped file.
    let text = server.expect_put(&name, &build.full, StatusCode::CONFLICT).await;
    assert!(text.contains(&sha256(&build.debug)) && text.contains(&sha256(&build.full)), "{text}");

    let server = server.restart().await;
    let served = server.get(&format!("/buildid/{}/debuginfo", build.id)).await;
    assert_eq!(served.bytes().await.unwrap(), build.debug, "after a restart");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_richer_content_replaces_the_poorer_and_is_not_shadowed() {
    let server = Server::start().await;
    let build = build();
    let (id, kind) = (build.id, ArtefactKind::Executable);
    let name = format!("{id}/executable");
    server.expect_put(&name, &build.stripped, StatusCode::CREATED).await;
    let ask = async |content: &[u8], brings| {
        let artefact = ArtefactName { build_id: id, kind, path: None, sha256: Some(sha256(content)), brings };
        let request = MissingRequest { artefacts: vec![artefact] };
        let response = server.client.post(server.url("/api/v1/missing")).json(&request).send().await;
        let answer: MissingResponse = response.expect("an answer").json().await.expect("its body");
        (answer.missing.len(), answer.differing.len())
    };
    assert_eq!(ask(&build.full, None).await, (0, 1));
    assert_eq!(ask(&build.full, Some(Brings::Dynsym)).await, (0, 1));
    assert_eq!(ask(&build.full, Some(Brings::DebugInfo)).await, (1, 0));

    let text = server.expect_put(&name, &build.full, StatusCode::CREATED).await;
    let stored: Stored = serde_json::from_str(&text).expect("the body of a stored upload");
    assert_eq!(stored.replaced, Some(sha256(&build.stripped)));
    assert_eq!(server.get(&format!("/buildid/{name}")).await.bytes().await.expect("all of it"), build.full);
    let text = server.expect_put(&name, &build.stripped, StatusCode::CONFLICT).await;
    assert!(text.contains("brings debug_info, the upload dynamic symbols"), "{text}");
    assert!(text.contains(&sha256(&build.full)) && text.contains(&sha256(&build.stripped)), "{text}");
    assert_eq!(server.get(&format!("/buildid/{name}")).await.bytes().await.expect("all of it"), build.full);
    let report = check(&config(server.folder.path()), false).await.expect("a check");
    assert!(report.findings.is_empty(), "{:?}", report.findings);
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_with_the_reason() {
    let server = Server::start().await;
    let build = build();
    let id = build.id;
    let other = build_with(&["-DOTHER", "-O2"]);
    for (name, content, status, reason) in [
        (format!("{id}/debuginfo"), &b"not an ELF file"[..], 422, "not a readable ELF file"),
        (format!("{id}/debuginfo"), &build.stripped, 422, "neither .debug_info nor .symtab"),
        (format!("{id}/executable"), &build.debug, 422, "no code"),
        (format!("{id}/executable"), &other.full, 422, "build-ID note"),
        (format!("{id}/executable"), &build.full[..2000], 422, "not a readable ELF file"),
        (format!("{id}/kallsyms"), b"nonsense", 422, "line 1"),
        (format!("{id}/bogus"), b"", 404, "bogus"),
        (format!("{id}/source"), b"", 400, "ABSOLUTE/PATH"),
        ("ABCD/debuginfo".to_owned(), b"", 400, "lower-case hex"),
        ("abc/debuginfo".to_owned(), b"", 400, "odd number"),
    ] {
        let response = server.put(&name, content).await;
        let found = response.status();
        let text = response.text().await.unwrap();
        assert_eq!(found, status, "{name}: {text}");
        assert!(serde_json::from_str::<windlass_schema::http::ErrorBody>(&text).is_ok(), "{text}");
        assert!(text.contains(reason), "{name}: {text}");
    }
    assert_eq!(server.get(&format!("/buildid/{id}/executable")).await.status(), 404, "nothing was kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_declared_hash_is_required_and_checked() {
    let server = Server::start().await;
    let url = server.url(&format!("/api/v1/buildid/{}/executable", build().id));
    let put = || server.client.put(&url).body(build().full.clone());
    let lacking = put().send().await.unwrap();
    assert_eq!(lacking.status(), 400);
    assert!(lacking.text().await.unwrap().contains(SHA256_HEADER));
    assert_eq!(put().header(SHA256_HEADER, "xyz").send().await.unwrap().status(), 400);
    let wrong = put().header(SHA256_HEADER, sha256(b"something else")).send().await.unwrap();
    assert_eq!(wrong.status(), 422);
}

#[tokio::test(flavor = "multi_thread")]
async fn compressed_uploads_count_by_their_content() {
    let build = build();
    let server = Server::start_with(|config| config.max_upload_bytes = 1 << 20).await;
    let put = |name: String, encoding: &'static str, content: Vec<u8>, hash: String| {
        server
            .client
            .put(server.url(&format!("/api/v1/buildid/{name}")))
            .header(SHA256_HEADER, hash)
            .header(CONTENT_ENCODING, encoding)
            .body(content)
            .send()
    };
    let zstd = |content: &[u8]| zstd::stream::encode_all(content, 3).unwrap();
    let gzip = |content: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    };
    let (exe, debug) = (format!("{}/executable", build.id), format!("{}/debuginfo", build.id));
    let stored = put(exe.clone(), "zstd", zstd(&build.stripped), sha256(&build.stripped)).await.unwrap();
    assert_eq!(stored.status(), 201);
    let served = server.get(&format!("/buildid/{exe}")).await.bytes().await.unwrap();
    assert_eq!(served, build.stripped);
    let stored = put(debug.clone(), "gzip", gzip(&build.debug), sha256(&build.debug)).await.unwrap();
    assert_eq!(stored.status(), 201);

    let unknown = put(exe.clone(), "br", zstd(&build.full), sha256(&build.full)).await.unwrap();
    assert_eq!(unknown.status(), 415);
    let broken = put(exe.clone(), "zstd", build.full.clone(), sha256(&build.full)).await.unwrap();
    assert_eq!(broken.status(), 400);
    let cut = zstd(&build.full);
    let cut = put(exe.clone(), "zstd", cut[..cut.len() / 2].to_vec(), sha256(&build.full)).await.unwrap();
    assert!(cut.status() == 400 || cut.status() == 422, "{}", cut.status());
    // Two kilobytes that decode to 64 MB.
    let bomb = vec![0; 64 << 20];
    let refused = put(format!("{}/source/bomb", build.id), "zstd", zstd(&bomb), sha256(&bomb)).await.unwrap();
    assert_eq!(refused.status(), 413);
    assert!(refused.text().await.unwrap().contains("1048576"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_without_a_note_goes_by_its_hash() {
    let server = Server::start().await;
    let (content, id) = build_without_note();
    server.expect_put(&format!("{id}/executable"), &content, StatusCode::CREATED).await;
    let text = server
        .expect_put("0123456789abcdef0123456789abcdef/executable", &content, StatusCode::UNPROCESSABLE_ENTITY)
        .await;
    assert!(text.contains(&id), "the answer names the hash: {text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_skeleton_is_kept() {
    let server = Server::start().await;
    let build = build();
    let name = format!("{}/skeleton", build.id);
    server.expect_put(&name, &build.stripped, StatusCode::CREATED).await;
    let text = server.expect_put(&name, &build.full, StatusCode::OK).await;
    let stored: Stored = serde_json::from_str(&text).unwrap();
    assert_eq!(stored.sha256, sha256(&build.stripped));
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_and_differing() {
    let server = Server::start().await;
    let build = build();
    server.expect_put(&format!("{}/executable", build.id), &build.stripped, StatusCode::CREATED).await;
    server.expect_put(&format!("{}/source/a.c", build.id), b"int a;", StatusCode::CREATED).await;
    let name = |kind, path: Option<&str>, content: Option<&[u8]>| ArtefactName {
        build_id: build.id,
        kind,
        path: path.map(str::to_owned),
        sha256: content.map(sha256),
        brings: None,
    };
    let present = [
        name(ArtefactKind::Executable, None, None),
        name(ArtefactKind::Executable, None, Some(&build.stripped)),
        name(ArtefactKind::Source, Some("/a.c"), Some(b"int a;")),
    ];
    let missing = [name(ArtefactKind::Debuginfo, None, None), name(ArtefactKind::Source, Some("/b.c"), None)];
    let differing = [name(ArtefactKind::Executable, None, Some(&build.full))];
    let artefacts = [&present[..], &missing[..], &differing[..]].concat();
    let response =
        server.client.post(server.url("/api/v1/missing")).json(&MissingRequest { artefacts }).send();
    let answer: MissingResponse = response.await.unwrap().json().await.unwrap();
    assert_eq!(answer, MissingResponse { missing: missing.to_vec(), differing: differing.to_vec() });
    let malformed = server.client.post(server.url("/api/v1/missing")).body("{").send().await.unwrap();
    assert_eq!(malformed.status(), 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_need_the_token() {
    let server = Server::start_with(|config| config.token = Some("secret".to_owned())).await;
    let build = build();
    let url = server.url(&format!("/api/v1/buildid/{}/executable", build.id));
    let put = || server.client.put(&url).header(SHA256_HEADER, sha256(&build.full)).body(build.full.clone());
    let refused = put().send().await.unwrap();
    assert_eq!(refused.status(), 401);
    assert_eq!(refused.headers()["www-authenticate"], "Bearer");
    assert_eq!(put().bearer_auth("wrong").send().await.unwrap().status(), 401);
    assert_eq!(put().bearer_auth("secret").send().await.unwrap().status(), 201);
    let profiles = server.client.post(server.url("/v1development/profiles")).send().await.unwrap();
    assert_eq!(profiles.status(), 401);
    assert_eq!(
        server.get(&format!("/buildid/{}/executable", build.id)).await.status(),
        200,
        "reading is free"
    );
}

#[tokio::test]
async fn an_open_address_needs_a_token() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(folder.path());
    config.listen = "0.0.0.0:0".parse().unwrap();
    let Err(error) = start(config.clone()).await else { panic!("started without a token") };
    assert!(error.to_string().contains("--token-file"), "{error}");
    config.token = Some("secret".to_owned());
    start(config).await.unwrap().stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kernel_symbols_without_addresses_are_refused() {
    let server = Server::start().await;
    let name = format!("{}/kallsyms", build().id);
    let hidden = b"0000000000000000 T _text\n0000000000000000 t helper\n";
    let text = server.expect_put(&name, hidden, StatusCode::UNPROCESSABLE_ENTITY).await;
    assert!(text.contains("as root"), "{text}");
    server.expect_put(&name, b"ffffffff81000000 T _text\n", StatusCode::CREATED).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_beyond_the_memory_for_decoding_is_refused() {
    let server = Server::start().await;
    let bomb = zstd::stream::encode_all(&vec![0; (16 << 20) + 1][..], 3).unwrap();
    let request = server.client.post(server.url("/v1development/profiles"));
    let refused = request.header(CONTENT_ENCODING, "zstd").body(bomb).send().await.unwrap();
    assert_eq!(refused.status(), 413);
    assert!(refused.text().await.unwrap().contains("16777216"));
}
