//! What is listed, shown, labelled and deleted, and by whom.

use reqwest::{RequestBuilder, StatusCode};
use windlass_schema::http::{
    ArtefactKind, Brings, Deleted, ImageDetails, ImageList, LabelRequest, LabelResponse, NAMESPACE_HEADER,
    NamespaceUsage, SHA256_HEADER,
};

use crate::administered::{Program, administered};
use crate::server::{Server, build, client, sha256};

async fn put(server: &Server, namespace: &str, name: &str, content: &[u8]) -> StatusCode {
    let request = server.client.put(server.url(&format!("/api/v1/buildid/{}/{name}", build().id)));
    let request = request.header(SHA256_HEADER, sha256(content)).header(NAMESPACE_HEADER, namespace);
    request.body(content.to_vec()).send().await.expect("an answer").status()
}

async fn json<T: serde::de::DeserializeOwned>(request: RequestBuilder) -> T {
    let response = request.send().await.expect("an answer");
    let (status, text) = (response.status(), response.text().await.expect("a body"));
    assert!(status.is_success(), "{status}: {text}");
    serde_json::from_str(&text).expect(&text)
}

async fn refusal(request: RequestBuilder) -> (u16, String) {
    let response = request.send().await.expect("an answer");
    (response.status().as_u16(), response.text().await.expect("a body"))
}

fn labels(add: &[&str], remove: &[&str]) -> LabelRequest {
    let texts = |labels: &[&str]| labels.iter().map(|label| (*label).to_owned()).collect();
    LabelRequest { build_ids: vec![build().id], add: texts(add), remove: texts(remove) }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_stored_is_listed_labelled_and_deleted() {
    let server = Server::start_with(|config| config.quotas = vec!["try=1G".parse().expect("a quota")]).await;
    let (client, id) = (&server.client, build().id);
    let url = |path: &str| server.url(&format!("/api/v1/{path}"));
    assert_eq!(json::<ImageList>(client.get(url("artefacts"))).await, ImageList::default());
    assert_eq!(refusal(client.get(url(&format!("artefacts/{id}")))).await.0, 404);
    assert_eq!(refusal(client.get(url("artefacts?limit=x"))).await.0, 400);
    for (namespace, name, content) in [
        ("release", "executable", &build().full[..]),
        ("release", "source/a.c", b"int"),
        ("try", "source/a.c", b"int b"),
    ] {
        assert_eq!(put(&server, namespace, name, content).await, 201);
    }
    let table = server.get(&format!("/api/v1/buildid/{id}/unwind")).await.status();
    assert!(table.is_success());

    let changed: LabelResponse =
        json(client.post(url("labels")).json(&labels(&["release=1", "branch=a/b"], &[]))).await;
    assert_eq!((changed.changed, changed.unchanged), (1, 0));
    let again = client.post(url("labels")).header(NAMESPACE_HEADER, "try").json(&labels(&["release=1"], &[]));
    assert_eq!(json::<LabelResponse>(again).await.changed, 1, "in another namespace");
    let unknown = LabelRequest { build_ids: vec!["aabb".parse().expect("an ID")], ..labels(&["a=b"], &[]) };
    let unknown: LabelResponse = json(client.post(url("labels")).json(&unknown)).await;
    assert_eq!(unknown.unknown.len(), 1);
    assert_eq!(refusal(client.post(url("labels")).json(&labels(&["no label"], &[]))).await.0, 400);

    let list: ImageList = json(client.get(url("artefacts"))).await;
    let found: Vec<_> =
        list.images.iter().map(|image| (&image.namespace[..], image.artefacts, image.bytes)).collect();
    assert_eq!(found, [("release", 2, build().full.len() as u64 + 3), ("try", 1, 5)]);
    assert_eq!(list.images[0].labels, ["branch=a/b", "release=1"]);
    let only: ImageList = json(client.get(url("artefacts?namespace=try&label=branch%3Da%2Fb"))).await;
    assert_eq!(only.images.len(), 1);
    let none: ImageList = json(client.get(url("artefacts?label=branch%3Da"))).await;
    assert_eq!(none.images.len(), 0);
    let page: ImageList = json(client.get(url("artefacts?limit=1"))).await;
    assert_eq!((page.images.len(), page.next), (2, Some(id)), "an image is not cut");
    let rest: ImageList = json(client.get(url(&format!("artefacts?after={id}")))).await;
    assert_eq!(rest, ImageList::default());

    let shown: ImageDetails = json(client.get(url(&format!("artefacts/{id}")))).await;
    assert!(shown.complete && shown.labels.len() == 3, "{shown:?}");
    let executable = &shown.artefacts[0];
    assert_eq!((executable.kind, executable.brings), (ArtefactKind::Executable, Brings::DebugInfo));
    assert_eq!(executable.sha256, sha256(&build().full));
    assert!(executable.unwind && executable.code && !executable.damaged && executable.stored_bytes > 0);
    assert_eq!(shown.artefacts[2].path, "/a.c");
    assert_eq!(shown.derived[0].kind, "unwind");
    let usage: Vec<NamespaceUsage> = json(client.get(url("namespaces"))).await;
    assert_eq!((usage[0].quota_bytes, usage[1].quota_bytes, usage[1].bytes), (None, Some(1 << 30), 5));

    let delete = |query: &str| client.delete(url(&format!("artefacts/{id}{query}")));
    assert_eq!(refusal(delete("?kind=bogus")).await.0, 404);
    let (status, text) = refusal(delete("?namespace=main")).await;
    assert!(status == 404 && text.contains("release, try"), "{status} {text}");
    assert_eq!(json::<Deleted>(delete("?kind=source&path=/a.c")).await, Deleted { artefacts: 1, bytes: 3 });
    let left = server.get(&format!("/buildid/{id}/source/a.c")).await;
    assert_eq!(left.bytes().await.expect("a body")[..], *b"int b", "what is less trusted is in front now");
    assert_eq!(json::<Deleted>(delete("?namespace=try")).await.artefacts, 1);
    assert_eq!(server.get(&format!("/buildid/{id}/source/a.c")).await.status(), 404);
    assert_eq!(json::<Deleted>(delete("")).await.artefacts, 1);
    assert_eq!(refusal(delete("")).await.0, 404);
    assert_eq!(json::<ImageList>(client.get(url("artefacts"))).await, ImageList::default());
    assert_eq!(put(&server, "release", "executable", &build().full).await, 201, "it may come again");
    assert_eq!(
        server.get(&format!("/buildid/{id}/executable")).await.bytes().await.expect("a body"),
        build().full
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_look_uploaders_label_and_administrators_delete() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data = folder.path();
    let token = |name: &str, scope: &str| administered(data, &["token", "create", name, "--scope", scope]);
    let (reader, uploader, admin) = (token("r", "read"), token("u", "upload:try"), token("a", "admin"));
    let program = Program::serve(data, &["--private"]);
    let (client, id) = (client(), build().id);
    let content = b"int a;";
    let put = client
        .put(format!("{}/api/v1/buildid/{id}/source/a.c", program.url))
        .header(SHA256_HEADER, sha256(content));
    let stored = put.bearer_auth(&uploader).body(content.to_vec()).send().await.expect("an answer");
    assert_eq!(stored.status(), 201);
    let status = async |request: RequestBuilder, token: &str| {
        request.bearer_auth(token).send().await.expect("an answer").status().as_u16()
    };
    let url = |path: &str| format!("{}/api/v1/{path}", program.url);
    for path in ["artefacts".to_owned(), format!("artefacts/{id}"), "namespaces".to_owned()] {
        assert_eq!(status(client.get(url(&path)), &reader).await, 200, "{path}");
        assert_eq!(status(client.get(url(&path)), &uploader).await, 403, "{path}");
    }
    let label = || client.post(url("labels")).json(&labels(&["release=1"], &[]));
    assert_eq!(status(label(), &reader).await, 403);
    assert_eq!(status(label().header(NAMESPACE_HEADER, "release"), &uploader).await, 403);
    assert_eq!(status(label(), &uploader).await, 200);
    let delete = || client.delete(url(&format!("artefacts/{id}?namespace=try")));
    assert_eq!(status(delete(), &reader).await, 403);
    assert_eq!(status(delete(), &uploader).await, 403);
    assert_eq!(status(delete(), &admin).await, 200);
    let log = administered(data, &["audit", "--limit", "2"]);
    let lines: Vec<_> = log.lines().collect();
    assert!(lines[0].contains(" a delete ") && lines[0].contains("removed 1 artefacts: deleted"), "{log}");
    assert!(lines[1].contains(" u label ") && lines[1].contains("added release=1"), "{log}");
}
