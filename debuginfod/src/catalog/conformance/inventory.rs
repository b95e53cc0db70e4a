//! Cases of [`crate::catalog::Inventory`].

use windlass_schema::http::ArtefactKind;

use super::{Open, artefact_in, blob, build_id, debuginfo, source, writer};
use crate::catalog::{
    Action, Artefact, Catalog, DerivedKey, DerivedKind, Image, ImageQuery, LabelChange, Put, Removal,
    Removed, Usage,
};
use crate::content_hash::ContentHash;

fn put(catalog: &dyn Catalog, artefact: &Artefact) {
    assert_eq!(catalog.put_artefact(artefact, &writer(), None).unwrap(), Put::Stored);
}

fn all(catalog: &dyn Catalog, query: &ImageQuery, limit: usize) -> Vec<Image> {
    let (mut images, mut after) = (Vec::new(), None);
    loop {
        let page = catalog.images(query, after, limit).unwrap();
        images.extend(page.images);
        after = page.next;
        if after.is_none() {
            return images;
        }
    }
}

fn used(artefact: Artefact, used_s: u64) -> Artefact {
    Artefact { used_s, ..artefact }
}

fn label(catalog: &dyn Catalog, id: u8, text: &str) {
    let namespace = "main".parse().unwrap();
    let change = LabelChange { namespace, add: vec![text.parse().unwrap()], remove: Vec::new(), at_s: 1 };
    catalog.change_labels(&[build_id(id)], &change, &writer()).unwrap();
}

pub(crate) fn images_come_in_pages(open: Open<'_>) {
    let catalog = open();
    for id in [1, 2, 3, 5, 8] {
        put(&*catalog, &used(debuginfo(id, "debuginfo"), 10));
    }
    put(&*catalog, &used(source(2, "/a.c", "int"), 30));
    put(&*catalog, &used(artefact_in("try", debuginfo(2, "other debuginfo")), 20));
    put(&*catalog, &artefact_in("try", debuginfo(9, "debuginfo")));
    label(&*catalog, 3, "release=1");
    let names = |images: &[Image]| {
        let names =
            images.iter().map(|image| format!("{} {}", image.build_id.as_bytes()[0], image.namespace));
        names.collect::<Vec<_>>()
    };
    let expect = ["1 release", "2 release", "2 try", "3 release", "5 release", "8 release", "9 try"];
    for limit in [1, 2, 3, 6, 100] {
        assert_eq!(names(&all(&*catalog, &ImageQuery::default(), limit)), expect, "{limit} a page");
    }
    let images = all(&*catalog, &ImageQuery::default(), 10);
    let second = &images[1];
    assert_eq!((second.artefacts, second.bytes, second.used_s), (2, "debuginfoint".len() as u64, 30));
    assert_eq!(second.file_name, "ls");
    let of_try = ImageQuery { namespace: Some("try".parse().unwrap()), label: None };
    assert_eq!(names(&all(&*catalog, &of_try, 1)), ["2 try", "9 try"]);
    let labelled = ImageQuery { namespace: None, label: Some("release=1".parse().unwrap()) };
    assert_eq!(names(&all(&*catalog, &labelled, 1)), ["3 release"]);
    let paths: Vec<_> =
        catalog.artefacts(build_id(2), 10).unwrap().into_iter().map(|found| found.path).collect();
    assert_eq!(paths, ["", "", "/a.c"]);
    assert_eq!(catalog.artefacts(build_id(2), 1).unwrap().len(), 1);
}

fn removal(id: u8) -> Removal {
    Removal {
        build_id: build_id(id),
        namespace: debuginfo(id, "").namespace,
        kind: None,
        path: None,
        unless_used_since_s: None,
        at_s: 99,
        why: "too old".to_owned(),
    }
}

pub(crate) fn what_was_used_stays_and_what_goes_takes_all_with_it(open: Open<'_>) {
    let catalog = open();
    let other = artefact_in("try", debuginfo(1, "other"));
    for artefact in [&used(debuginfo(1, "debuginfo"), 10), &used(source(1, "/a.c", "int"), 30), &other] {
        put(&*catalog, artefact);
    }
    label(&*catalog, 1, "release=1");
    let key = DerivedKey {
        build_id: build_id(1),
        kind: DerivedKind::Symbols,
        version: 1,
        inputs: ContentHash::of(b"inputs"),
    };
    catalog.put_derived(key, blob("index")).unwrap();
    let unused = |since_s| Removal { unless_used_since_s: Some(since_s), ..removal(1) };
    assert_eq!(catalog.remove(&unused(30), &writer()).unwrap(), Removed::default(), "its source is used");
    assert_eq!(catalog.artefacts(build_id(1), 10).unwrap().len(), 3);
    let kind = Removal { kind: Some(ArtefactKind::Source), path: Some("/b.c".to_owned()), ..removal(1) };
    assert_eq!(catalog.remove(&kind, &writer()).unwrap(), Removed::default());
    assert_eq!(catalog.remove(&unused(31), &writer()).unwrap(), Removed { artefacts: 2, bytes: 12 });
    assert_eq!(open().artefacts(build_id(1), 10).unwrap(), std::slice::from_ref(&other));
    assert_eq!(catalog.derived_of(build_id(1)).unwrap(), []);
    assert_eq!(catalog.labels(build_id(1)).unwrap().len(), 1, "something is left");
    let log = &catalog.audit(None, 1).unwrap()[0].entry;
    assert_eq!((log.action, log.at_s, log.subject.size_bytes), (Action::Delete, 99, Some(12)));
    assert_eq!(log.result, "removed 2 artefacts: too old");
    let rest = Removal { namespace: other.namespace, ..removal(1) };
    assert_eq!(catalog.remove(&rest, &writer()).unwrap().artefacts, 1);
    assert_eq!(catalog.labels(build_id(1)).unwrap(), []);
    assert_eq!(catalog.usage().unwrap(), []);
    assert_eq!(catalog.wrong_usage().unwrap(), []);
    assert_eq!(catalog.integrity().unwrap(), Vec::<String>::new());
}

pub(crate) fn quotas_are_exact(open: Open<'_>) {
    let catalog = open();
    let offer = |artefact: &Artefact, quota| catalog.put_artefact(artefact, &writer(), Some(quota)).unwrap();
    assert_eq!(offer(&debuginfo(1, "12345"), 4), Put::OverQuota(0));
    assert_eq!(offer(&debuginfo(1, "12345"), 5), Put::Stored);
    assert_eq!(offer(&debuginfo(1, "12345"), 0), Put::Present(blob("12345")), "it takes no more");
    assert_eq!(offer(&debuginfo(2, "1"), 5), Put::OverQuota(5));
    assert_eq!(offer(&artefact_in("try", debuginfo(2, "1")), 5), Put::Stored, "each has its own");
    let replace = |content, quota| {
        let poorer = blob("12345").hash;
        catalog.replace_artefact(&debuginfo(1, content), poorer, &writer(), Some(quota)).unwrap()
    };
    assert_eq!(replace("1234567", 6), Put::OverQuota(5));
    assert_eq!(replace("1234567", 7), Put::Stored);
    let usage = |namespace: &str, bytes| Usage {
        namespace: namespace.parse().unwrap(),
        artefacts: 1,
        bytes,
        unfinished_bytes: 0,
    };
    assert_eq!(open().usage().unwrap(), [usage("release", 7), usage("try", 1)]);
    assert_eq!(catalog.wrong_usage().unwrap(), []);
    assert_eq!(catalog.integrity().unwrap(), Vec::<String>::new());
}
