//! Cases of [`crate::catalog::UnfinishedUploads`].

use windlass_schema::http::ArtefactKind;

use super::{Open, blob, build_id};
use crate::catalog::{Appended, Part, UploadName};
use crate::content_hash::ContentHash;
use crate::namespace::Namespace;

fn upload(id: u8, whole: &str) -> UploadName {
    let sha256 = ContentHash::of(whole.as_bytes());
    UploadName {
        build_id: build_id(id),
        kind: ArtefactKind::Executable,
        namespace: Namespace::release(),
        sha256,
    }
}

fn part(start: u64, text: &str, received_s: u64) -> Part {
    Part { start, blob: blob(text), total: 10, received_s }
}

pub(crate) fn parts_follow_one_another(open: Open<'_>) {
    let catalog = open();
    let (first, second) = (part(0, "first", 1), part(5, "next", 2));
    let upload = upload(1, "whole");
    assert_eq!(catalog.parts(&upload).unwrap(), []);
    assert_eq!(catalog.append_part(&upload, &second).unwrap(), Appended::At(0));
    assert_eq!(catalog.append_part(&upload, &first).unwrap(), Appended::Yes);
    // The answer was lost, and the sender tries again.
    assert_eq!(catalog.append_part(&upload, &first).unwrap(), Appended::At(5));
    let other = Part { total: 11, ..second };
    assert_eq!(catalog.append_part(&upload, &other).unwrap(), Appended::OtherTotal(10));
    // Another replica goes on.
    let replica = open();
    assert_eq!(replica.append_part(&upload, &second).unwrap(), Appended::Yes);
    assert_eq!(catalog.parts(&upload).unwrap(), [first, second]);
    let others = self::upload(1, "other whole");
    assert_eq!(catalog.append_part(&others, &first).unwrap(), Appended::Yes);
    let elsewhere = UploadName { namespace: "try".parse().unwrap(), ..upload.clone() };
    assert_eq!(catalog.append_part(&elsewhere, &first).unwrap(), Appended::Yes);
    catalog.forget_upload(&upload).unwrap();
    assert_eq!(replica.parts(&elsewhere).unwrap(), [first]);
    assert_eq!(replica.parts(&upload).unwrap(), []);
    assert_eq!(replica.parts(&others).unwrap(), [first]);
    assert_eq!(catalog.integrity().unwrap(), Vec::<String>::new());
}

pub(crate) fn uploads_age_by_their_last_part(open: Open<'_>) {
    let catalog = open();
    let (old, young) = (upload(1, "old"), upload(2, "young"));
    for (upload, part) in
        [(&old, part(0, "first", 10)), (&young, part(0, "first", 10)), (&young, part(5, "next", 30))]
    {
        assert_eq!(catalog.append_part(upload, &part).unwrap(), Appended::Yes);
    }
    assert_eq!(catalog.stale_uploads(10, 5).unwrap(), []);
    assert_eq!(catalog.stale_uploads(11, 5).unwrap(), std::slice::from_ref(&old));
    assert_eq!(catalog.stale_uploads(31, 5).unwrap(), [old.clone(), young]);
    assert_eq!(catalog.stale_uploads(31, 1).unwrap(), [old]);
}

pub(crate) fn only_a_stale_upload_is_forgotten(open: Open<'_>) {
    let catalog = open();
    let upload = upload(1, "whole");
    for part in [part(0, "first", 10), part(5, "next", 30)] {
        assert_eq!(catalog.append_part(&upload, &part).unwrap(), Appended::Yes);
    }
    assert!(!catalog.forget_stale_upload(&upload, 30).unwrap(), "somebody goes on with it");
    assert_eq!(open().parts(&upload).unwrap().len(), 2);
    assert!(catalog.forget_stale_upload(&upload, 31).unwrap());
    assert_eq!(open().parts(&upload).unwrap(), []);
}
