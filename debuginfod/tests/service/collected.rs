//! What a collection takes and what it leaves, beside services at work.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use reqwest::StatusCode;
use rusqlite::Connection;
use windlass_debuginfod::catalog::{LabelChange, Labels, SqliteCatalog, Writer};
use windlass_debuginfod::gc::{Collect, GcReport, Gone, gc};
use windlass_debuginfod::retention::Retention;
use windlass_debuginfod::{Config, check};
use windlass_schema::http::{
    NAMESPACE_HEADER, SHA256_HEADER, UPLOAD_COMPLETE_HEADER, UPLOAD_LENGTH_HEADER, UPLOAD_OFFSET_HEADER,
};

use crate::administered::administered;
use crate::server::{Server, blob_path, build, config, sha256};

const DAY_S: u64 = 24 * 3600;
const MIB: usize = 1 << 20;
/// A service hears of what others did within a quarter of a second, on a machine with nothing else to do.
const HEARD: Duration = Duration::from_secs(30);

fn catalog(folder: &Path) -> Connection {
    Connection::open(folder.join("catalog.sqlite")).expect("the catalog of the service")
}

/// Runs a statement on the catalog, whose `?` is the time so many days ago in seconds.
fn set(folder: &Path, statement: &str, days: i64) {
    let now: i64 = catalog(folder).query_row("SELECT unixepoch()", [], |row| row.get(0)).expect("a time");
    catalog(folder).execute(statement, [now - days * DAY_S as i64]).expect(statement);
}

async fn collect(folder: &Path, collect: Collect) -> (GcReport, Vec<Gone>) {
    collect_with(&config(folder), collect).await
}

async fn collect_with(config: &Config, collect: Collect) -> (GcReport, Vec<Gone>) {
    let mut gone = Vec::new();
    let report = gc(config, collect, &mut |image| gone.push(image)).await.expect("a collection");
    (report, gone)
}

fn at_once() -> Collect {
    Collect { grace_s: 0, ..Collect::default() }
}

/// ID of another image with the sources of a test; nothing else of it is needed here.
fn other_id(number: u8) -> String {
    format!("{number:02x}").repeat(20)
}

async fn put_source(server: &Server, id: &str, path: &str, content: &[u8]) {
    server.expect_put(&format!("{id}/source/{path}"), content, StatusCode::CREATED).await;
}

async fn is_there(server: &Server, id: &str, path: &str) -> bool {
    server.get(&format!("/buildid/{id}/source/{path}")).await.status() == 200
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_uses_goes_unless_a_label_keeps_it() {
    let server = Server::start().await;
    let folder = server.folder.path();
    let [unused, in_part, released, young] = [1, 2, 3, 4].map(other_id);
    for id in [&unused, &in_part, &released, &young] {
        put_source(&server, id, "a.c", id.as_bytes()).await;
        put_source(&server, id, "b.c", b"the same in all").await;
    }
    set(folder, "UPDATE artefact SET used_s = ?", 100);
    set(
        folder,
        &format!("UPDATE artefact SET used_s = ? WHERE build_id = x'{in_part}' AND path = '/a.c'"),
        1,
    );
    set(folder, &format!("UPDATE artefact SET used_s = ? WHERE build_id = x'{young}'"), 29);
    let change = LabelChange {
        namespace: "release".parse().expect("a name"),
        add: vec!["release=1.0".parse().expect("a label")],
        remove: Vec::new(),
        at_s: 1,
    };
    let writer = Writer { token: "test".to_owned(), peer: String::new() };
    let ids = [released.parse().expect("an ID")];
    let sqlite = SqliteCatalog::open(&folder.join("catalog.sqlite")).expect("the catalog");
    sqlite.change_labels(&ids, &change, &writer).expect("a change");

    let retention = Retention { unused_days: Some(30), ..Retention::default() };
    let dry = Collect { retention: retention.clone(), dry_run: true, ..at_once() };
    let (report, gone) = collect(folder, dry).await;
    assert_eq!((report.images.count, report.kept_by_label), (1, 1));
    assert_eq!(gone[0].image.build_id.to_string(), unused);
    assert!(gone[0].why.contains("100 days") && gone[0].why.contains("30"), "{}", gone[0].why);
    assert!(is_there(&server, &other_id(1), "a.c").await, "a dry run removes nothing");

    set(folder, &format!("UPDATE artefact SET used_s = ? WHERE build_id = x'{unused}'"), 100);
    let (report, real) = collect(folder, Collect { retention, ..at_once() }).await;
    assert_eq!((report.images, real.len()), (report.images, 1));
    assert_eq!(report.contents.count, 1, "of the content that all have one name is gone");
    let since = Instant::now();
    while is_there(&server, &unused, "a.c").await {
        assert!(since.elapsed() < HEARD, "the service never heard that it is gone");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for id in [in_part, released, young] {
        assert!(is_there(&server, &id, "a.c").await && is_there(&server, &id, "b.c").await, "{id}");
    }
    let checked = check(&config(folder), false).await.expect("a check");
    assert_eq!((checked.findings, checked.orphans), (Vec::new(), 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_uploads_leave_behind_goes_after_its_time() {
    let server = Server::start().await;
    let folder = server.folder.path();
    put_source(&server, &other_id(1), "a.c", b"kept").await;
    let path = blob_path(folder, b"kept");
    let name = path.file_name().expect("a name").to_str().expect("text").to_owned();
    // Of a writer that was killed before its commit, in today's and in yesterday's names, and amid its write.
    let stray = |name: &str| path.with_file_name(name);
    let hash = sha256(b"kept");
    let strays = [stray(&format!("{hash}-0000000000000001")), stray(&hash), stray(&format!("{name}#1"))];
    for path in &strays {
        std::fs::write(path, b"stray").expect("the folder is there");
    }
    std::fs::write(stray("notes"), b"of somebody else").expect("the folder is there");
    let (report, _) = collect(folder, Collect::default()).await;
    assert_eq!(
        (report.orphans.count, report.young_orphans, report.staging.count),
        (0, 2, 0),
        "they are young"
    );
    let age = |path: &Path| {
        let file = std::fs::File::options().write(true).open(path).expect("it is there");
        file.set_modified(SystemTime::now() - Duration::from_secs(2 * DAY_S)).expect("it is ours");
    };
    strays.iter().for_each(|path| age(path));
    let (report, _) = collect(folder, Collect::default()).await;
    assert_eq!(
        (report.orphans.count, report.staging.count),
        (0, 1),
        "somebody may have found them on record"
    );
    age(&path);
    let (report, _) = collect(folder, Collect { dry_run: true, ..Collect::default() }).await;
    assert_eq!(report.orphans.count, 2);
    let (report, _) = collect(folder, Collect::default()).await;
    assert_eq!((report.orphans.count, report.orphans.bytes), (2, 10));
    assert!(strays.iter().all(|stray| !stray.exists()) && path.exists() && stray("notes").exists());
    assert!(is_there(&server, &other_id(1), "a.c").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_nobody_goes_on_with_goes_after_a_week() {
    let server = Server::start().await;
    let folder = server.folder.path();
    let part = vec![7; MIB];
    let url = server.url(&format!("/api/v1/uploads/{}/executable/{}", build().id, sha256(b"whole")));
    let request =
        server.client.patch(url).header(UPLOAD_OFFSET_HEADER, 0).header(UPLOAD_COMPLETE_HEADER, "?0");
    let sent =
        request.header(UPLOAD_LENGTH_HEADER, 3 * MIB).body(part.clone()).send().await.expect("an answer");
    assert_eq!(sent.status(), 204);
    let (report, _) = collect(folder, at_once()).await;
    assert_eq!((report.unfinished, report.contents.count, report.orphans.count), (0, 0, 0));
    set(folder, "UPDATE upload_part SET received_s = ?", 8);
    let (report, _) = collect(folder, at_once()).await;
    assert_eq!((report.unfinished, report.contents.count), (1, 1));
    assert_eq!(check(&config(folder), false).await.expect("a check").orphans, 0);
}

/// The same contents come again just while a collection takes them, withdrawn long ago, off record and out of the store.
#[tokio::test(flavor = "multi_thread")]
async fn what_comes_again_while_it_goes_is_there() {
    const CONTENTS: u8 = 40;
    // Without copies: what is served is in the storage.
    let server = Server::start_with(|config| config.max_copies_bytes = 0).await;
    let folder = server.folder.path();
    let id = other_id(1);
    let content = |number: u8| vec![number; 5000 + usize::from(number)];
    let (mut removed, mut withdrawn) = (0, 0);
    for round in 0..6 {
        for number in 0..CONTENTS {
            let status = server.put(&format!("{id}/source/{number}"), &content(number)).await.status();
            assert!(status.is_success(), "{status}");
        }
        let rows = catalog(folder);
        rows.execute_batch("DELETE FROM artefact; DELETE FROM usage").expect("the tables");
        let before = if round % 2 == 0 { 2 } else { 0 };
        set(folder, "UPDATE blob SET withdrawn_s = ?", before);
        let config = config(folder);
        let grace = Collect { grace_s: if round % 2 == 0 { DAY_S } else { 3600 }, ..Collect::default() };
        let collecting = tokio::spawn(async move { collect_with(&config, grace).await });
        let uploads = (0..CONTENTS).rev().map(|number| {
            let (name, content) = (format!("{id}/source/{number}"), content(number));
            let server = &server;
            async move { server.put(&name, &content).await.status() }
        });
        for status in futures_util::future::join_all(uploads).await {
            assert_eq!(status, 201);
        }
        let (report, _) = collecting.await.expect("no panic");
        removed += report.contents.count;
        withdrawn += u64::from(before == 0) * report.contents.count;
        for number in 0..CONTENTS {
            let served = server.get(&format!("/buildid/{id}/source/{number}")).await;
            assert_eq!(served.status(), 200, "{number}");
            assert!(served.bytes().await.expect("a body") == content(number)[..], "{number}");
        }
    }
    assert_eq!(withdrawn, 0, "what was withdrawn just now stays");
    println!("{removed} contents were removed while they came again");
    assert!(check(&config(folder), false).await.expect("a check").findings.is_empty());
}

async fn put_to(server: &Server, namespace: &str, name: &str, content: &[u8]) -> (u16, String) {
    let request = server.client.put(server.url(&format!("/api/v1/buildid/{name}")));
    let request = request.header(SHA256_HEADER, sha256(content)).header(NAMESPACE_HEADER, namespace);
    let response = request.body(content.to_vec()).send().await.expect("an answer");
    (response.status().as_u16(), response.text().await.expect("a body"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_takes_no_more_than_its_quota() {
    let quotas = ["try=3M", "*=1K"].map(|quota| quota.parse().expect(quota)).to_vec();
    let server = Server::start_with(|config| config.quotas = quotas.clone()).await;
    let folder = server.folder.path();
    let name = |number: u8| format!("{}/source/a", other_id(number));
    let content = |number: u8| vec![number; MIB];
    for number in 1..=3 {
        assert_eq!(put_to(&server, "try", &name(number), &content(number)).await.0, 201);
    }
    let (status, text) = put_to(&server, "try", &name(4), b"one more").await;
    assert_eq!(status, 413);
    for word in ["namespace try", "3145728", "artefacts list", "windlassd gc", "--quota"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    assert_eq!(put_to(&server, "try", &name(1), &content(1)).await.0, 200, "what is there takes no more");
    assert_eq!(put_to(&server, "main", &name(4), &[0; 2000]).await.0, 413);
    assert_eq!(put_to(&server, "main", &name(4), &[0; 1000]).await.0, 201, "each has its own");
    // Of an upload in parts the first says how much is to come.
    let url = server.url(&format!("/api/v1/uploads/{}/executable/{}", build().id, sha256(b"whole")));
    let request =
        server.client.patch(url).header(UPLOAD_OFFSET_HEADER, 0).header(UPLOAD_COMPLETE_HEADER, "?0");
    let request = request.header(UPLOAD_LENGTH_HEADER, 3 * MIB).header(NAMESPACE_HEADER, "try");
    assert_eq!(request.body(content(9)).send().await.expect("an answer").status(), 413);

    // The collection makes room, by what was used longest ago and nobody uses now.
    set(folder, &format!("UPDATE artefact SET used_s = ? WHERE build_id = x'{}'", other_id(2)), 3);
    set(folder, &format!("UPDATE artefact SET used_s = ? WHERE build_id = x'{}'", other_id(3)), 2);
    let limited = Config { quotas, ..config(folder) };
    let (report, gone) = collect_with(&limited, Collect::default()).await;
    assert_eq!((report.images.count, gone[0].image.build_id.to_string()), (1, other_id(2)));
    assert!(gone[0].why.contains("quota of 3145728"), "{}", gone[0].why);
    assert_eq!(put_to(&server, "try", &name(4), b"one more").await.0, 201);
    let (report, _) = collect_with(&limited, Collect::default()).await;
    assert_eq!(report.images.count, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_explains_and_the_log_tells() {
    let server = Server::start().await;
    put_source(&server, &other_id(1), "a.c", b"int a;").await;
    set(server.folder.path(), "UPDATE artefact SET used_s = ?", 50);
    let Server { folder, service, .. } = server;
    service.stop().await;
    let run = |arguments: &[&str]| {
        administered(
            folder.path(),
            &[&["gc", "--unused-days", "40", "--grace-hours", "0"], arguments].concat(),
        )
    };
    let text = run(&["--dry-run"]);
    assert!(text.contains(&format!("would remove {}", other_id(1))), "{text}");
    assert!(text.contains("nobody used it for 50 days, and it is kept for 40"), "{text}");
    let json = run(&["--json"]);
    let lines: Vec<serde_json::Value> =
        json.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!((&lines[0]["build_id"], &lines[0]["bytes"]), (&other_id(1).into(), &6.into()));
    assert_eq!((&lines[1]["images"]["count"], &lines[1]["contents"]["count"]), (&1.into(), &1.into()));
    let log = administered(folder.path(), &["audit", "--limit", "1"]);
    assert!(log.contains("local:gc delete") && log.contains("nobody used it"), "{log}");
}
