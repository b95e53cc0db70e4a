//! `windlass artefacts` against a service: what is listed, shown, labelled and deleted.

use serde_json::Value;
use windlass_tests::program::{fixture, run, text, windlass};
use windlass_tests::service::TestService;

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_is_listed_by_its_label_and_deleted() {
    let service = TestService::start().await;
    let command = |arguments: &[&str]| {
        let mut windlass = windlass("windlass");
        windlass.args(arguments).args(["--server", &service.url()]);
        windlass
    };
    let path = fixture("inlined");
    let path = path.to_str().expect("UTF-8");
    let upload = ["upload", path, "--label", "release=1.4", "--label", "branch=main"];
    run(&mut command(&upload), &[0]);
    // The same again sends nothing, and labels all the same.
    run(&mut command(&["upload", path, "--label", "release=1.5"]), &[0]);
    let listed = |arguments: &[&str]| -> Value {
        let list = [&["artefacts", "list", "--json"], arguments].concat();
        serde_json::from_str(&text(&mut command(&list))).expect("JSON")
    };
    let images = listed(&["--label", "release=1.5"]);
    assert_eq!(images[0]["labels"], serde_json::json!(["branch=main", "release=1.4", "release=1.5"]));
    let id = images[0]["build_id"].as_str().expect("an ID").to_owned();
    assert_eq!(listed(&["--label", "release=2"]), serde_json::json!([]));

    let label = |arguments: &[&str]| command(&[&["artefacts", "label"], arguments].concat());
    let changed = text(&mut label(&["--remove", "release=1.4", "--add", "pin=yes", &id]));
    assert!(changed.contains("1 images changed"), "{changed}");
    let unknown = run(&mut label(&["--add", "pin=yes", "aabb"]), &[1]);
    assert!(String::from_utf8_lossy(&unknown.stdout).contains("aabb: nothing is stored"));
    run(&mut label(&["--add", "pin", &id]), &[2]);
    let shown = text(&mut command(&["artefacts", "show", &id]));
    for words in ["executable \"inlined\" in release", "debug_info, unwind sections, code", "label pin=yes"] {
        assert!(shown.contains(words), "{words}: {shown}");
    }
    assert!(!shown.contains("release=1.4"), "{shown}");
    let usage = text(&mut command(&["artefacts", "namespaces"]));
    assert!(usage.starts_with("release: 1 artefacts, "), "{usage}");

    let delete = ["artefacts", "delete", &id, "--kind", "executable"];
    let deleted = text(&mut command(&delete));
    assert!(deleted.contains("1 artefacts of"), "{deleted}");
    let again = run(&mut command(&delete), &[2]);
    assert!(String::from_utf8_lossy(&again.stderr).contains("nothing like that is stored"));
    assert_eq!(listed(&[]), serde_json::json!([]));
}
