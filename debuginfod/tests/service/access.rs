//! Tokens and their scopes, and the log of what was done with them: with the binary that people run.

use std::path::Path;
use std::process::Command;

use reqwest::{Client, Response};
use serde_json::Value;
use windlass_debuginfod::start;
use windlass_schema::http::{NAMESPACE_HEADER, SHA256_HEADER};

use crate::administered::{Program, administer, administered, eventually};
use crate::server::{build, client, config, sha256};

async fn put(client: &Client, url: &str, token: &str, namespace: Option<&str>, content: &str) -> Response {
    let url = format!("{url}/api/v1/buildid/{}/source/a.c", build().id);
    let mut request = client.put(url).header(SHA256_HEADER, sha256(content.as_bytes())).bearer_auth(token);
    if let Some(namespace) = namespace {
        request = request.header(NAMESPACE_HEADER, namespace);
    }
    request.body(content.to_owned()).send().await.expect("an answer")
}

#[track_caller]
fn expect(response: Response, status: u16, words: &[&str]) -> impl Future<Output = ()> {
    let at = std::panic::Location::caller();
    async move {
        let found = response.status().as_u16();
        let text = response.text().await.expect("a body");
        assert_eq!(found, status, "{at}: {text}");
        // As in JSON.
        let text = text.replace("\\\"", "\"");
        for word in words {
            assert!(text.contains(word), "{at}: {word:?} in {text}");
        }
    }
}

fn create(data: &Path, name: &str, scopes: &[&str]) -> String {
    let mut arguments = vec!["token", "create", name];
    scopes.iter().for_each(|scope| arguments.extend(["--scope", scope]));
    administered(data, &arguments)
}

async fn log(client: &Client, url: &str, token: &str, query: &str) -> Value {
    let request = client.get(format!("{url}/api/v1/audit{query}")).bearer_auth(token);
    request.send().await.expect("an answer").json().await.expect("JSON")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_good_for_its_scopes_and_what_it_does_is_on_record() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path();
    let (try_, reader, admin) = (
        create(data, "pull-requests", &["upload:try"]),
        create(data, "reader", &["read"]),
        create(data, "boss", &["admin"]),
    );
    let daemon = Program::serve(data, &["--namespaces", "release,main,try"]);
    let (client, url) = (client(), daemon.url.as_str());

    expect(put(&client, url, "nonsense", None, "int a;").await, 401, &["valid token"]).await;
    let anonymous = client.put(format!("{url}/api/v1/buildid/{}/source/a.c", build().id)).send().await;
    expect(anonymous.expect("an answer"), 401, &["Bearer"]).await;
    expect(
        put(&client, url, &reader, None, "int a;").await,
        403,
        &["upload:NAMESPACE", "\"reader\" has read"],
    )
    .await;
    let elsewhere = put(&client, url, &try_, Some("release"), "int a;").await;
    expect(elsewhere, 403, &["scope upload:release", "\"pull-requests\" has upload:try"]).await;
    expect(put(&client, url, &try_, Some("A/b"), "int a;").await, 400, &[NAMESPACE_HEADER]).await;
    expect(put(&client, url, &try_, None, "int a;").await, 201, &[]).await;
    expect(put(&client, url, &try_, None, "int b;").await, 409, &["namespace try"]).await;
    expect(put(&client, url, &admin, None, "int b;").await, 201, &[]).await;
    expect(
        client.get(format!("{url}/api/v1/audit")).bearer_auth(&try_).send().await.expect("an answer"),
        403,
        &["admin"],
    )
    .await;

    let all = log(&client, url, &admin, "").await;
    let records = all["records"].as_array().expect("a list");
    let column = |name: &str| records.iter().map(|record| record[name].as_str()).collect::<Vec<_>>();
    let (boss, pulls, local) = (Some("boss"), Some("pull-requests"), Some("local"));
    assert_eq!(column("token"), [boss, pulls, pulls, pulls, pulls, local, local, local]);
    let (release, try_out) = (Some("release"), Some("try"));
    assert_eq!(column("namespace"), [release, try_out, try_out, None, None, None, None, None]);
    assert_eq!(column("result")[0], Some("stored"));
    assert!(column("result")[1].is_some_and(|why| why.contains("SHA-256")));
    assert_eq!(column("action")[5..], [Some("create-token"); 3]);
    let stored = &records[0];
    assert_eq!(stored["build_id"], build().id.to_string());
    assert_eq!(stored["sha256"], sha256(b"int b;"));
    assert_eq!([&stored["kind"], &stored["path"]], ["source", "/a.c"]);
    assert_eq!(stored["size_bytes"], 6);
    assert_eq!(stored["peer"], "127.0.0.1");
    // In pages it is the same.
    let first = log(&client, url, &admin, "?limit=5").await;
    let rest = log(&client, url, &admin, &format!("?limit=5&before={}", first["next"])).await;
    let pages = [&first, &rest].map(|page| page["records"].as_array().expect("a list").clone()).concat();
    assert_eq!((&pages, &rest["next"]), (records, &Value::Null));
    let printed: Value = serde_json::from_str(&administered(data, &["audit", "--json"])).expect("JSON");
    assert_eq!(printed, all["records"]);
    assert!(administered(data, &["audit"]).contains("pull-requests upload"));

    for name in ["catalog.sqlite", "catalog.sqlite-wal"] {
        let bytes = std::fs::read(data.join(name)).expect("the database is open");
        let secret = try_.strip_prefix("windlass_").expect("a prefix").as_bytes();
        assert!(!bytes.windows(secret.len()).any(|window| window == secret), "a secret in {name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_replica_refuses_a_revoked_token_soon() {
    let folder = tempfile::tempdir().expect("a folder");
    let shared = |name: &str| folder.path().join(name).to_str().expect("text").to_owned();
    let (catalog, storage) = (format!("sqlite:{}", shared("catalog")), format!("file://{}", shared("blobs")));
    let options = ["--catalog", &catalog, "--storage", &storage];
    let data = folder.path().join("one");
    let replicas = ["one", "two"].map(|name| Program::serve(&folder.path().join(name), &options));
    let client = client();
    let audit = |url: &str, token: &str| {
        let request = client.get(format!("{url}/api/v1/audit")).bearer_auth(token);
        async move { request.send().await.expect("an answer") }
    };
    let anonymous = |url: &str| {
        let request = client.get(format!("{url}/api/v1/audit"));
        async move { request.send().await.expect("an answer").status().as_u16() }
    };
    assert_eq!(anonymous(&replicas[0].url).await, 200, "on loopback, before there is a token");

    let run =
        |command: &[&str]| administered(&data, &[command, &["--catalog", catalog.as_str()][..]].concat());
    let made: Value =
        serde_json::from_str(&run(&["token", "create", "boss", "--scope", "admin", "--days", "2", "--json"]))
            .expect("JSON");
    let token = made["secret"].as_str().expect("a secret");
    assert_eq!(
        made["expires_s"].as_u64().expect("a time") - made["created_s"].as_u64().expect("a time"),
        2 * 24 * 3600
    );
    for replica in &replicas {
        assert_eq!(audit(&replica.url, token).await.status(), 200, "a new token works at once");
        eventually("closed", || async { anonymous(&replica.url).await == 401 }).await;
    }
    let last_used = || {
        let list: Value = serde_json::from_str(&run(&["token", "list", "--json"])).expect("JSON");
        list[0]["last_used_s"].as_u64()
    };
    eventually("used", || async { last_used().is_some() }).await;
    let used = last_used();
    assert_eq!(audit(&replicas[0].url, token).await.status(), 200);
    assert_eq!(last_used(), used, "written once an hour");

    run(&["token", "revoke", "boss"]);
    for replica in &replicas {
        eventually("refused", || async { audit(&replica.url, token).await.status() == 401 }).await;
        expect(audit(&replica.url, token).await, 401, &["\"boss\" was revoked"]).await;
    }
    let again = administer(&data, &["token", "create", "boss", "--scope", "read", "--catalog", &catalog]);
    assert!(!again.status.success() && String::from_utf8_lossy(&again.stderr).contains("for good"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_private_service_is_read_with_a_token() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path();
    let refused = administer(data, &["serve", "--private"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("windlassd token create"));
    let (reader, writer) = (create(data, "gdb", &["read"]), create(data, "ci", &["upload:release"]));
    let daemon = Program::serve(data, &["--private"]);
    let (client, url) = (client(), daemon.url.as_str());
    expect(put(&client, url, &writer, None, "int a;").await, 201, &[]).await;
    let source = format!("/buildid/{}/source/a.c", build().id);
    for (path, without, upload, read) in [
        ("/healthz", 200, 200, 200),
        ("/readyz", 200, 200, 200),
        ("/metrics", 401, 403, 200),
        (source.as_str(), 401, 403, 200),
        ("/metadata?key=glob&value=*", 401, 403, 200),
        ("/api/v1/profiles?start=1&end=2", 401, 403, 200),
        ("/api/v1/audit", 401, 403, 403),
        ("/api/v1/bogus", 401, 403, 404),
        ("/", 401, 403, 200),
    ] {
        let get = || client.get(format!("{url}{path}"));
        let mut found = [0; 3];
        for (status, request) in
            found.iter_mut().zip([get(), get().bearer_auth(&writer), get().bearer_auth(&reader)])
        {
            *status = request.send().await.expect("an answer").status().as_u16();
        }
        assert_eq!(found, [without, upload, read], "{path}");
    }
    for (token, status) in [(&reader, 200), (&writer, 200), (&"wrong".to_owned(), 401)] {
        let missing =
            client.post(format!("{url}/api/v1/missing")).bearer_auth(token).body(r#"{"artefacts":[]}"#);
        assert_eq!(missing.send().await.expect("an answer").status(), status);
    }

    // As a debugger sends it.
    if Command::new("debuginfod-find").arg("--version").output().is_err() {
        return eprintln!("skipped: there is no debuginfod-find");
    }
    for (number, token, found) in [(1, &reader, true), (2, &writer, false)] {
        let headers = data.join(format!("headers-{number}"));
        std::fs::write(&headers, format!("Authorization: Bearer {token}\n")).expect("written");
        let output = Command::new("debuginfod-find")
            .args(["source", &build().id.to_string(), "/a.c"])
            .env("DEBUGINFOD_URLS", url)
            .env("DEBUGINFOD_HEADERS_FILE", &headers)
            .env("DEBUGINFOD_CACHE_PATH", data.join(format!("cache-{number}")))
            .output()
            .expect("it runs");
        assert_eq!(output.status.success(), found, "{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_the_catalog_suffices_for_an_open_address() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut config = config(folder.path());
    config.listen = "0.0.0.0:0".parse().expect("an address");
    let Err(error) = start(config.clone()).await else { panic!("started without a token") };
    assert!(error.to_string().contains("windlassd token create"), "{error}");
    create(folder.path(), "ci", &["upload:main"]);
    start(config.clone()).await.expect("there is a token").stop().await;
    administered(folder.path(), &["token", "revoke", "ci"]);
    start(config).await.expect("a restart never fails since a token was revoked").stop().await;
}
