//! `/api/v1/openapi.json`: the interface as OpenAPI 3.1.
//!
//! The document is written by hand, since what it is for, words that explain, no derivation from types gives. Tests hold it against
//! the route table, the fields of the bodies, and a running service.

use axum::http::{HeaderName, header};

/// The document.
const DOCUMENT: &str = include_str!("openapi.json");

/// Answers with the document.
pub(crate) async fn document() -> ([(HeaderName, &'static str); 1], &'static str) {
    ([(header::CONTENT_TYPE, "application/json")], DOCUMENT)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde::Serialize;
    use serde_json::Value;
    use windlass_schema::http::*;

    use super::*;
    use crate::catalog::Provenance;
    use crate::content_hash::ContentHash;
    use crate::upstream::Record;

    fn document() -> Value {
        serde_json::from_str(DOCUMENT).expect("JSON")
    }

    /// Method and path of each route, as `routes.rs` writes them.
    fn routes() -> BTreeSet<String> {
        let table = include_str!("routes.rs");
        let mut found = BTreeSet::new();
        for route in table.split(".route(").skip(1) {
            let path = route.split('"').nth(1).expect("a path first");
            // Up to where the call ends, which no method's handler has in it.
            let methods = route.split_once(',').expect("then methods").1.split("\n        .").next();
            for method in ["get", "head", "post", "put", "patch", "delete"] {
                let call = format!("{method}(");
                let called = |text: &str| {
                    text.match_indices(&call).any(|(at, _)| {
                        !text[..at].ends_with(|before: char| before.is_ascii_alphanumeric() || before == '_')
                    })
                };
                if methods.is_some_and(|text| called(text.split(';').next().unwrap_or_default())) {
                    found.insert(format!("{method} {}", path.replace("{*", "{")));
                }
            }
        }
        found
    }

    #[test]
    fn every_route_is_documented_and_nothing_else() {
        let document = document();
        let paths = document["paths"].as_object().expect("paths");
        let documented: BTreeSet<String> = paths
            .iter()
            // These the protocol parses itself: a test of the service asks for them.
            .filter(|(path, _)| !path.starts_with("/buildid/"))
            .flat_map(|(path, item)| {
                item.as_object().expect("methods").keys().map(move |method| format!("{method} {path}"))
            })
            .collect();
        let routes = routes();
        assert!(routes.len() > 20, "{routes:?}");
        assert_eq!(documented, routes);
    }

    #[test]
    fn references_lead_somewhere_and_parameters_are_those_of_the_path() {
        let document = document();
        for reference in DOCUMENT.split("\"$ref\": \"").skip(1) {
            let pointer = reference.split('"').next().expect("a text").trim_start_matches('#');
            assert!(document.pointer(pointer).is_some(), "{pointer}");
        }
        for (path, item) in document["paths"].as_object().expect("paths") {
            let named: BTreeSet<_> =
                path.split('{').skip(1).filter_map(|rest| rest.split('}').next()).collect();
            for (method, operation) in item.as_object().expect("methods") {
                let parameters = operation["parameters"].as_array().into_iter().flatten();
                let stated = parameters.filter(|parameter| parameter["in"] == "path");
                let stated: BTreeSet<_> = stated.filter_map(|parameter| parameter["name"].as_str()).collect();
                assert_eq!(stated, named, "{method} {path}");
            }
        }
        assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
    }

    /// Checks that the schema has the fields of `all`, which has a value in each, and demands those that `least` has.
    #[track_caller]
    fn check<T: Serialize>(schema: &str, all: &T, least: &T) {
        let document = document();
        let schema = &document["components"]["schemas"][schema];
        let fields = |value: &T| {
            let value = serde_json::to_value(value).expect("JSON");
            value.as_object().expect("an object").keys().cloned().collect::<BTreeSet<_>>()
        };
        let properties: BTreeSet<_> =
            schema["properties"].as_object().expect("a schema").keys().cloned().collect();
        assert_eq!(properties, fields(all));
        let required = schema["required"].as_array().expect("a list").iter();
        let required: BTreeSet<_> = required.map(|name| name.as_str().expect("a text").to_owned()).collect();
        assert!(required.is_subset(&fields(least)), "{required:?}");
    }

    #[test]
    fn bodies_have_the_documented_fields() {
        let build_id: windlass_schema::BuildId = "aabb".parse().expect("an ID");
        let (text, some) = (String::new, || Some(String::new()));
        let kind = ArtefactKind::Source;
        let name = |path, sha256, brings| ArtefactName { build_id, kind, path, sha256, brings };
        check("ArtefactName", &name(some(), some(), Some(Brings::Symtab)), &name(None, None, None));
        check("MissingRequest", &MissingRequest::default(), &MissingRequest::default());
        check("MissingResponse", &MissingResponse::default(), &MissingResponse::default());
        let stored = |replaced| Stored { build_id, kind, sha256: text(), size_bytes: 1, replaced };
        check("Stored", &stored(some()), &stored(None));
        let hash = ContentHash::of(b"");
        let provenance = Provenance { build_id, kind, hash, upstream: text(), fetched_s: 1 };
        check("Provenance", &provenance, &provenance);
        check("UpstreamRecord", &Record::default(), &Record::default());
        check("ErrorBody", &ErrorBody { error: text() }, &ErrorBody { error: text() });
        check("SymbolizeResponse", &SymbolizeResponse::default(), &SymbolizeResponse::default());
        let frames = |unresolved, unnamed_functions| ImageFrames {
            build_id,
            addresses: Vec::new(),
            unresolved,
            unnamed_functions,
        };
        let unresolved = vec![(0, Unresolved::NoSymbols)];
        check("ImageFrames", &frames(unresolved, vec![(0, 1)]), &frames(Vec::new(), Vec::new()));
        let line = |file, line| FrameLine { function: 0, file, line };
        check("FrameLine", &line(Some(0), Some(1)), &line(None, None));
        check("ImageList", &ImageList::default(), &ImageList::default());
        check("LabelRequest", &LabelRequest::default(), &LabelRequest::default());
        check("LabelResponse", &LabelResponse::default(), &LabelResponse::default());
        let artefact = |path| ArtefactDetails {
            kind,
            path,
            namespace: text(),
            sha256: text(),
            size_bytes: 1,
            stored_bytes: 1,
            file_name: text(),
            stored_s: 1,
            used_s: 1,
            brings: Brings::Nothing,
            unwind: true,
            code: true,
            damaged: false,
        };
        check("ArtefactDetails", &artefact("/a".to_owned()), &artefact(text()));
        let usage = |quota_bytes| NamespaceUsage {
            namespace: text(),
            artefacts: 1,
            bytes: 1,
            unfinished_bytes: 1,
            quota_bytes,
        };
        check("NamespaceUsage", &usage(Some(1)), &usage(None));
    }
}
