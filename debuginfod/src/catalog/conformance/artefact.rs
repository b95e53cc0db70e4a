//! Cases of [`crate::catalog::Artefacts`].

use windlass_schema::http::ArtefactKind;

use super::{Open, artefact_in, blob, build_id, debuginfo, source, writer};
use crate::catalog::{Artefact, Catalog, MetadataQuery, Put};

pub(crate) fn a_name_is_taken_once_in_each_namespace(open: Open<'_>) {
    let (here, there) = (open(), open());
    let first = debuginfo(1, "first");
    assert_eq!(here.put_artefact(&first, &writer(), None).unwrap(), Put::Stored);
    assert_eq!(there.put_artefact(&first, &writer(), None).unwrap(), Put::Present(first.blob));
    assert_eq!(
        there.put_artefact(&debuginfo(1, "second"), &writer(), None).unwrap(),
        Put::Present(first.blob)
    );
    let other = artefact_in("try", debuginfo(1, "third"));
    assert_eq!(there.put_artefact(&other, &writer(), None).unwrap(), Put::Stored);
    for catalog in [here, there] {
        assert_eq!(debuginfos(&*catalog, 1), [first.clone(), other.clone()]);
        assert_eq!(catalog.versions(build_id(1), ArtefactKind::Executable, "").unwrap(), []);
        assert_eq!(debuginfos(&*catalog, 2), []);
        assert_eq!(catalog.artefacts_of(first.blob.hash).unwrap(), std::slice::from_ref(&first));
        assert_eq!(catalog.blob(blob("second").hash).unwrap(), None);
    }
}

/// In the order of their namespaces.
fn debuginfos(catalog: &dyn Catalog, id: u8) -> Vec<Artefact> {
    let mut found = catalog.versions(build_id(id), ArtefactKind::Debuginfo, "").unwrap();
    found.sort_by(|a, b| a.namespace.cmp(&b.namespace));
    found
}

pub(crate) fn a_poorer_content_makes_room(open: Open<'_>) {
    let catalog = open();
    let [poor, rich, other] = ["poor", "rich", "other"].map(|content| debuginfo(1, content));
    let above = artefact_in("main", debuginfo(1, "of another namespace"));
    for stored in [&poor, &above] {
        assert_eq!(catalog.put_artefact(stored, &writer(), None).unwrap(), Put::Stored);
    }
    // Another replica replaced it in between: what is there now is not what was found poorer.
    assert_eq!(
        catalog.replace_artefact(&rich, other.blob.hash, &writer(), None).unwrap(),
        Put::Present(poor.blob)
    );
    assert_eq!(catalog.replace_artefact(&rich, poor.blob.hash, &writer(), None).unwrap(), Put::Stored);
    assert_eq!(debuginfos(&*open(), 1), [above.clone(), rich.clone()]);
    assert_eq!(
        catalog.replace_artefact(&rich, poor.blob.hash, &writer(), None).unwrap(),
        Put::Present(rich.blob)
    );
    assert_eq!(catalog.blob(poor.blob.hash).unwrap(), Some(poor.blob), "it stays until it is collected");
    assert_eq!(catalog.artefacts_of(poor.blob.hash).unwrap(), []);
    let log = catalog.audit(None, 1).unwrap();
    assert_eq!(log[0].entry.result, format!("stored in place of {}", poor.blob.hash));
}

pub(crate) fn a_damaged_content_gives_up_its_name(open: Open<'_>) {
    let catalog = open();
    let (first, second) = (debuginfo(1, "first"), debuginfo(1, "second"));
    catalog.put_artefact(&first, &writer(), None).unwrap();
    catalog.mark_damaged(first.blob.hash).unwrap();
    assert_eq!(debuginfos(&*catalog, 1), [Artefact { damaged: true, ..first }]);
    assert_eq!(catalog.put_artefact(&second, &writer(), None).unwrap(), Put::Stored);
    assert_eq!(debuginfos(&*catalog, 1), [second]);
}

pub(crate) fn a_source_is_found_by_its_resolved_path(open: Open<'_>) {
    let catalog = open();
    let (odd, exact) = (source(1, "/build//a/../b.c", "odd"), source(1, "/build/b.c", "exact"));
    catalog.put_artefact(&odd, &writer(), None).unwrap();
    let find = |path: &str| {
        let mut found = catalog.versions(build_id(1), ArtefactKind::Source, path).unwrap();
        found.sort_by(|a, b| a.path.cmp(&b.path));
        found
    };
    assert_eq!(find("/build//a/../b.c"), std::slice::from_ref(&odd));
    assert_eq!(find("/build/./b.c"), std::slice::from_ref(&odd));
    assert_eq!(find("/build/a/b.c"), []);
    catalog.put_artefact(&exact, &writer(), None).unwrap();
    assert_eq!(find("/build/b.c"), [odd, exact]);
}

pub(crate) fn metadata_is_asked_by_file_pattern_and_build_id(open: Open<'_>) {
    let catalog = open();
    catalog.put_artefact(&debuginfo(1, "one"), &writer(), None).unwrap();
    catalog.put_artefact(&source(1, "/src/main.c", "int"), &writer(), None).unwrap();
    catalog.put_artefact(&debuginfo(2, "bad"), &writer(), None).unwrap();
    catalog.mark_damaged(blob("bad").hash).unwrap();
    check_metadata(&*catalog, MetadataQuery::File("ls".to_owned()), &["one"]);
    check_metadata(&*catalog, MetadataQuery::File("/src/main.c".to_owned()), &["int"]);
    check_metadata(&*catalog, MetadataQuery::Glob("/src/*.c".to_owned()), &["int"]);
    check_metadata(&*catalog, MetadataQuery::Glob("l?".to_owned()), &["one"]);
    check_metadata(&*catalog, MetadataQuery::BuildId(build_id(1).to_string()), &["int", "one"]);
    check_metadata(&*catalog, MetadataQuery::BuildId("01".to_owned()), &[]);
    assert_eq!(catalog.metadata(&MetadataQuery::Glob("*".to_owned()), 1).unwrap().len(), 1);
}

#[track_caller]
fn check_metadata(catalog: &dyn Catalog, query: MetadataQuery, expect: &[&str]) {
    let mut found: Vec<_> =
        catalog.metadata(&query, 10).unwrap().iter().map(|artefact| artefact.blob.hash).collect();
    let mut expect: Vec<_> = expect.iter().map(|content| blob(content).hash).collect();
    found.sort();
    expect.sort();
    assert_eq!(found, expect, "{query:?}");
}

pub(crate) fn the_latest_use_is_on_record(open: Open<'_>) {
    let catalog = open();
    let (first, other) = (debuginfo(1, "first"), artefact_in("try", debuginfo(1, "other")));
    for stored in [&first, &other] {
        assert_eq!(catalog.put_artefact(stored, &writer(), None).unwrap(), Put::Stored);
    }
    let used = || debuginfos(&*open(), 1).iter().map(|artefact| artefact.used_s).collect::<Vec<_>>();
    let start_s = first.used_s;
    let uses =
        [(first.name(), start_s + 50), (first.name(), start_s + 20), (debuginfo(2, "none").name(), start_s)];
    assert_eq!(catalog.note_uses(&uses).unwrap(), [true, true, false]);
    assert_eq!(used(), [start_s + 50, start_s]);
    // What comes again is needed.
    let again = Artefact { stored_s: start_s + 70, used_s: start_s + 70, ..other };
    assert_eq!(catalog.put_artefact(&again, &writer(), None).unwrap(), Put::Present(again.blob));
    assert_eq!(used(), [start_s + 50, start_s + 70]);
    assert_eq!(debuginfos(&*catalog, 1)[1].stored_s, start_s, "but it was stored when it was");
}

pub(crate) fn facts_are_corrected_of_the_content_they_are_of(open: Open<'_>) {
    let catalog = open();
    let artefact = debuginfo(1, "content");
    catalog.put_artefact(&artefact, &writer(), None).unwrap();
    let facts = crate::elf::Facts { code: true, ..Default::default() };
    catalog.correct_facts(&artefact.name(), blob("other").hash, &facts).unwrap();
    assert_eq!(debuginfos(&*open(), 1)[0].facts, artefact.facts, "it was replaced meanwhile");
    catalog.correct_facts(&artefact.name(), artefact.blob.hash, &facts).unwrap();
    assert_eq!(debuginfos(&*open(), 1), [Artefact { facts, ..artefact }]);
}
