//! Which of several artefacts of one name is served, and what is made from it.

use reqwest::header::CACHE_CONTROL;
use reqwest::{Response, StatusCode};
use windlass_schema::http::{
    ArtefactKind, ArtefactName, ImageAddresses, MissingRequest, MissingResponse, NAMESPACE_HEADER,
    SHA256_HEADER,
};

use crate::naming::symbolize;
use crate::server::{Server, build, sha256, symbol};

async fn ordered() -> Server {
    Server::start_with(|config| {
        config.namespaces = ["release", "main", "try"].map(str::to_owned).to_vec();
    })
    .await
}

async fn put(server: &Server, namespace: &str, name: &str, content: &[u8]) -> StatusCode {
    let request = server.client.put(server.url(&format!("/api/v1/buildid/{}/{name}", build().id)));
    let request = request.header(SHA256_HEADER, sha256(content)).header(NAMESPACE_HEADER, namespace);
    request.body(content.to_vec()).send().await.expect("an answer").status()
}

async fn get(server: &Server, name: &str) -> Response {
    server.get(&format!("/buildid/{}/{name}", build().id)).await
}

#[track_caller]
fn expect<'a>(server: &'a Server, name: &'a str, content: &'a [u8]) -> impl Future<Output = ()> + 'a {
    let at = std::panic::Location::caller();
    async move { assert_eq!(get(server, name).await.bytes().await.expect("a body"), content, "{at}") }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_most_trusted_is_served_whenever_it_comes() {
    let server = ordered().await;
    let name = "source/src//a.c";
    assert_eq!(put(&server, "try", name, b"try").await, 201);
    expect(&server, name, b"try").await;
    assert!(!get(&server, name).await.headers()[CACHE_CONTROL].to_str().expect("text").contains("immutable"));
    assert_eq!(put(&server, "release", name, b"release").await, 201, "what is below is no conflict");
    expect(&server, name, b"release").await;
    assert!(get(&server, name).await.headers()[CACHE_CONTROL].to_str().expect("text").contains("immutable"));
    assert_eq!(put(&server, "main", name, b"main").await, 201, "and nor is what is above");
    assert_eq!(put(&server, "try", "source/src/a.c", b"other spelling").await, 201);
    for path in [name, "source/src/a.c", "source//src/a.c"] {
        expect(&server, path, b"release").await;
    }
    assert_eq!(put(&server, "main", name, b"main 2").await, 409, "in a namespace, content stays");
    assert_eq!(put(&server, "main", name, b"release").await, 200, "what is trusted more is there already");
    assert_eq!(put(&server, "release", name, b"main").await, 409);
    // Namespaces that nobody listed are equals, below the listed ones.
    assert_eq!(put(&server, "zebra", "source/b.c", b"zebra").await, 201);
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await; // stored in another second
    assert_eq!(put(&server, "ant", "source/b.c", b"ant").await, 201);
    expect(&server, "source/b.c", b"zebra").await;
    assert_eq!(put(&server, "try", "source/b.c", b"try").await, 201);
    expect(&server, "source/b.c", b"try").await;
    assert_eq!(put(&server, "upstream", name, b"x").await, 400);

    let metadata = server.get("/metadata?key=glob&value=/src//*").await.text().await.expect("a body");
    assert_eq!(metadata.matches("a.c").count(), 1, "one entry for one name: {metadata}");
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_made_from_what_is_trusted_most() {
    let server = ordered().await;
    let build = build();
    let outer = symbol(&build.full, "outer");
    let named = || async {
        let image = ImageAddresses { build_id: build.id, addresses: vec![outer], return_addresses: false };
        !symbolize(&server, vec![image]).await.images[0].addresses[0].is_empty()
    };
    assert_eq!(put(&server, "main", "executable", &build.stripped).await, 201);
    assert!(!named().await, "stripped");
    assert_eq!(put(&server, "try", "executable", &build.full).await, 201);
    assert!(!named().await, "less trust shadows nothing");
    assert_eq!(put(&server, "release", "executable", &build.full).await, 201);
    assert!(named().await, "more trust is in front at once");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_depends_on_where_it_would_go() {
    let server = ordered().await;
    assert_eq!(put(&server, "main", "source/a.c", b"main").await, 201);
    let ask = |namespace: &'static str, content: &'static [u8]| {
        let name = ArtefactName {
            build_id: build().id,
            kind: ArtefactKind::Source,
            path: Some("/a.c".to_owned()),
            sha256: Some(sha256(content)),
            brings: None,
        };
        let request = MissingRequest { artefacts: vec![name] };
        let request = server.client.post(server.url("/api/v1/missing")).json(&request);
        let request = request.header(NAMESPACE_HEADER, namespace);
        async move {
            let answer: MissingResponse =
                request.send().await.expect("an answer").json().await.expect("JSON");
            (answer.missing.len(), answer.differing.len())
        }
    };
    assert_eq!(ask("release", b"main").await, (1, 0), "of less trust");
    assert_eq!(ask("main", b"main").await, (0, 0));
    assert_eq!(ask("main", b"other").await, (0, 1));
    assert_eq!(ask("try", b"main").await, (0, 0), "of more trust");
    assert_eq!(ask("try", b"other").await, (1, 0), "it may stand below");
}
