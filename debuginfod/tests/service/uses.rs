//! What counts as a use of an artefact, and when it is on record.

use std::path::Path;

use reqwest::StatusCode;
use rusqlite::Connection;
use windlass_schema::http::{ArtefactKind, ArtefactName, ImageAddresses, MissingRequest};

use crate::naming::symbolize;
use crate::server::{Server, build, sha256};

/// A time long ago, in seconds since 1970.
const LONG_AGO_S: i64 = 1_000_000_000;

fn catalog(folder: &Path) -> Connection {
    Connection::open(folder.join("catalog.sqlite")).expect("the catalog of the service")
}

/// As if nobody had used anything for years.
fn age(folder: &Path) {
    catalog(folder).execute("UPDATE artefact SET used_s = ?", [LONG_AGO_S]).expect("the table");
}

/// Kinds of artefacts with a use on record since.
fn used(folder: &Path) -> Vec<String> {
    let catalog = catalog(folder);
    let mut statement =
        catalog.prepare("SELECT kind FROM artefact WHERE used_s > ? ORDER BY kind").expect("the table");
    let kinds = statement.query_map([LONG_AGO_S], |row| row.get(0)).expect("rows");
    kinds.map(|kind| kind.expect("text")).collect()
}

/// Ages a service with an executable, a debuginfo and a source, uses it, stops it and says what was used.
async fn used_by(each: impl AsyncFnOnce(&Server)) -> Vec<String> {
    let server = Server::start().await;
    let id = build().id;
    server.expect_put(&format!("{id}/executable"), &build().stripped, StatusCode::CREATED).await;
    server.expect_put(&format!("{id}/debuginfo"), &build().debug, StatusCode::CREATED).await;
    server.expect_put(&format!("{id}/source/a.c"), b"int a;", StatusCode::CREATED).await;
    age(server.folder.path());
    each(&server).await;
    let Server { folder, service, .. } = server;
    service.stop().await;
    used(folder.path())
}

async fn get(server: &Server, path: &str) -> StatusCode {
    server.get(&format!("/buildid/{}/{path}", build().id)).await.status()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_served_or_worked_with_is_used() {
    assert_eq!(used_by(async |server| drop(server.get("/metadata?key=glob&value=*").await)).await, [""; 0]);
    let debuginfo = used_by(async |server| assert_eq!(get(server, "debuginfo").await, 200)).await;
    assert_eq!(debuginfo, ["debuginfo"]);
    let source = used_by(async |server| assert_eq!(get(server, "source/./a.c").await, 200)).await;
    assert_eq!(source, ["source"]);
    let section = used_by(async |server| assert_eq!(get(server, "section/.text").await, 200)).await;
    assert_eq!(section, ["executable"]);
    let table = used_by(async |server| {
        let path = format!("/api/v1/buildid/{}/unwind", build().id);
        assert!(server.get(&path).await.status().is_success());
    });
    assert_eq!(table.await, ["executable"]);
    let names = used_by(async |server| {
        let image = ImageAddresses { build_id: build().id, addresses: vec![1], return_addresses: false };
        symbolize(server, vec![image]).await;
    });
    assert_eq!(names.await, ["debuginfo", "executable"]);
}

/// The use is on record when the answer comes: nothing is flushed here.
#[tokio::test(flavor = "multi_thread")]
async fn what_need_not_be_uploaded_is_used_before_that_is_said() {
    let server = Server::start().await;
    let (id, source) = (build().id, b"int a;");
    let name = format!("{id}/source/a.c");
    server.expect_put(&name, source, StatusCode::CREATED).await;
    age(server.folder.path());
    server.expect_put(&name, source, StatusCode::OK).await;
    assert_eq!(used(server.folder.path()), ["source"]);
    age(server.folder.path());
    let name = ArtefactName {
        build_id: id,
        kind: ArtefactKind::Source,
        path: Some("/a.c".to_owned()),
        sha256: Some(sha256(source)),
        brings: None,
    };
    let request = MissingRequest { artefacts: vec![name] };
    let answer = server.client.post(server.url("/api/v1/missing")).json(&request).send().await;
    assert!(answer.expect("an answer").status().is_success());
    assert_eq!(used(server.folder.path()), ["source"]);
}
