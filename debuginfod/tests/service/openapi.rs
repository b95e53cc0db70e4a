//! The document of the interface, asked of a running service and held against its answers.

use reqwest::Method;
use serde_json::Value;

use crate::server::Server;

/// A URL of the path that leads to a handler, if to nothing stored.
fn filled(path: &str) -> String {
    let hash = "0".repeat(64);
    let values = [
        ("{id}", "aabb"),
        ("{kind}", "executable"),
        ("{sha256}", &hash),
        ("{path}", "src/a.c"),
        ("{unit}", "0123456789abcdef"),
        ("{section}", ".text"),
    ];
    values.iter().fold(path.to_owned(), |path, (name, value)| path.replace(name, value))
}

#[tokio::test(flavor = "multi_thread")]
async fn every_documented_operation_is_answered_as_documented() {
    let server = Server::start().await;
    let response = server.get("/api/v1/openapi.json").await;
    assert_eq!(response.headers()["content-type"], "application/json");
    let document: Value = response.json().await.expect("JSON");
    let paths = document["paths"].as_object().expect("paths");
    for (path, item) in paths {
        for (method, operation) in item.as_object().expect("methods") {
            let method: Method = method.to_uppercase().parse().expect("a method");
            let url = server.url(&filled(path));
            let response = server.client.request(method.clone(), url).send().await.expect("an answer");
            let (status, text) = (response.status(), response.text().await.unwrap_or_default());
            let documented = operation["responses"].as_object().expect("responses");
            assert!(documented.contains_key(status.as_str()), "{method} {path}: {status} {text}");
            assert!(!text.contains("no interface at"), "{method} {path}: {text}");
        }
        // What is not documented is not there.
        let other = server.client.patch(server.url(&filled(path))).send().await.expect("an answer");
        let known = item.get("patch").is_some() || path.starts_with("/buildid/");
        assert!(known || other.status() == 405, "PATCH {path}: {}", other.status());
    }
    assert!(paths.len() > 20);
}
