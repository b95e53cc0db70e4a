//! What `windlassd check --repair` makes good, and what it says is lost.

use std::path::{Path, PathBuf};

use reqwest::StatusCode;
use rusqlite::Connection;
use windlass_debuginfod::{CheckReport, check};
use windlass_schema::http::{
    ImageAddresses, SHA256_HEADER, UPLOAD_COMPLETE_HEADER, UPLOAD_LENGTH_HEADER, UPLOAD_OFFSET_HEADER,
};

use crate::administered::administer;
use crate::naming::symbolize;
use crate::server::{Server, blob_path, build, config, sha256, symbol};

const MIB: usize = 1 << 20;

fn catalog(folder: &Path) -> Connection {
    Connection::open(folder.join("catalog.sqlite")).expect("the catalog of the service")
}

/// The objects of what was derived.
fn derived(folder: &Path) -> Vec<PathBuf> {
    let catalog = catalog(folder);
    let mut statement = catalog
        .prepare("SELECT lower(hex(sha256)), write FROM derived JOIN blob USING (sha256)")
        .expect("the tables");
    let objects = statement.query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?)));
    let path = |(name, write): (String, i64)| {
        folder.join("blobs").join(&name[..2]).join(format!("{name}-{write:016x}"))
    };
    objects.expect("rows").map(|object| path(object.expect("a row"))).collect()
}

async fn checked(folder: &Path, repair: bool) -> CheckReport {
    check(&config(folder), repair).await.expect("a check")
}

fn expect_one(lines: &[String], words: &[&str]) {
    assert_eq!(lines.len(), 1, "{lines:#?}");
    words.iter().for_each(|word| assert!(lines[0].contains(word), "{word}: {}", lines[0]));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_derived_is_made_again() {
    let server = Server::start().await;
    let (folder, id) = (server.folder.path(), build().id);
    server.expect_put(&format!("{id}/executable"), &build().full, StatusCode::CREATED).await;
    let table = server.get(&format!("/api/v1/buildid/{id}/unwind")).await.bytes().await.expect("a body");
    let address = symbol(&build().full, "outer");
    let image = || ImageAddresses { build_id: id, addresses: vec![address], return_addresses: false };
    let names = symbolize(&server, vec![image()]).await;
    assert_eq!(derived(folder).len(), 2);
    // One cannot be decoded; of the other the row says that it is the executable, which is no index.
    std::fs::write(blob_path(folder, &table), b"gone").expect("the store is ours");
    let wrong = "UPDATE derived SET sha256 = (SELECT sha256 FROM artefact) WHERE kind = 'symbols'";
    assert_eq!(catalog(folder).execute(wrong, []).expect("the tables"), 1);
    let report = checked(folder, false).await;
    assert_eq!((report.findings.len(), report.repaired.len()), (2, 0), "{:#?}", report.findings);
    assert!(report.findings.iter().all(|finding| finding.contains("--repair would help: made again")));
    let report = checked(folder, true).await;
    assert_eq!((report.findings.len(), report.repaired.len()), (0, 2), "{:#?}", report.findings);
    assert_eq!(derived(folder).len(), 2, "made again at once");
    assert!(checked(folder, false).await.findings.is_empty());
    let server = server.restart().await;
    assert_eq!(
        server.get(&format!("/api/v1/buildid/{id}/unwind")).await.bytes().await.expect("a body"),
        table
    );
    assert_eq!(symbolize(&server, vec![image()]).await, names);
    assert_eq!(server.counter("windlass_derived_made_total{kind=\"unwind\"}").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_catalog_says_is_corrected() {
    let server = Server::start().await;
    let (folder, id) = (server.folder.path(), build().id);
    server.expect_put(&format!("{id}/executable"), &build().full, StatusCode::CREATED).await;
    let rows = catalog(folder);
    let facts = "UPDATE artefact SET facts = '{\"dwarf\":false,\"symtab\":false,\"unwind\":false,\"code\":false,\"sections\":[]}'";
    assert_eq!(rows.execute(facts, []).expect("the table"), 1);
    assert_eq!(rows.execute("UPDATE usage SET bytes = 1", []).expect("the table"), 1);
    assert_eq!(checked(folder, false).await.findings.len(), 2);
    let report = checked(folder, true).await;
    assert_eq!((report.findings.len(), report.repaired.len()), (0, 2), "{report:#?}");
    let report = checked(folder, false).await;
    assert!(report.findings.is_empty(), "{report:#?}");
    let section = server.get(&format!("/buildid/{id}/section/.text")).await;
    assert_eq!(section.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_can_make_again_is_lost_and_said_to_be() {
    let server = Server::start().await;
    let (folder, id) = (server.folder.path(), build().id);
    server.expect_put(&format!("{id}/skeleton"), &build().stripped, StatusCode::CREATED).await;
    let damage =
        |content: &[u8]| std::fs::write(blob_path(folder, content), b"gone").expect("the store is ours");
    damage(&build().stripped);
    expect_one(&checked(folder, true).await.findings, &["skeleton of", "upload it again"]);
    server.expect_put(&format!("{id}/executable"), &build().full, StatusCode::CREATED).await;
    expect_one(&checked(folder, false).await.findings, &["skeleton of", "--repair would help"]);
    let report = checked(folder, true).await;
    assert_eq!(report.findings, Vec::<String>::new());
    expect_one(&report.repaired, &["skeleton of", "the executable has all"]);
    assert_eq!(server.get(&format!("/api/v1/buildid/{id}/unwind")).await.status(), 200);

    let part = vec![7; MIB];
    let url = server.url(&format!("/api/v1/uploads/{id}/debuginfo/{}", sha256(b"whole")));
    let request =
        server.client.patch(&url).header(UPLOAD_OFFSET_HEADER, 0).header(UPLOAD_COMPLETE_HEADER, "?0");
    let request = request.header(UPLOAD_LENGTH_HEADER, 3 * MIB).header(SHA256_HEADER, sha256(&part));
    assert_eq!(request.body(part.clone()).send().await.expect("an answer").status(), 204);
    damage(&part);
    expect_one(&checked(folder, true).await.repaired, &["a part of an upload of debuginfo"]);
    let progress = server.client.head(&url).send().await.expect("an answer");
    assert_eq!(progress.headers()[UPLOAD_OFFSET_HEADER], "0");

    damage(&build().full);
    let report = checked(folder, true).await;
    expect_one(&report.findings, &["executable of", "upload it again"]);
    let output = administer(folder, &["check", "--repair"]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("0 repaired, 1 findings"), "{text}");
}
