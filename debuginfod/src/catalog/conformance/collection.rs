//! Cases of [`crate::catalog::Collection`].

use windlass_schema::http::ArtefactKind;

use super::{Open, artefact_in, blob, build_id, debuginfo, writer};
use crate::blob::Blob;
use crate::catalog::{
    Appended, Catalog, DerivedKey, DerivedKind, Named, Part, ProfileBatch, Put, Removal, Unnamed, UploadName,
};
use crate::content_hash::ContentHash;

/// Takes the debuginfo of an image off record.
fn remove(catalog: &dyn Catalog, id: u8) {
    let artefact = debuginfo(id, "");
    let removal = Removal {
        build_id: artefact.build_id,
        namespace: artefact.namespace,
        kind: None,
        path: None,
        unless_used_since_s: None,
        at_s: 5,
        why: "not needed".to_owned(),
    };
    assert_eq!(catalog.remove(&removal, &writer()).unwrap().artefacts, 1);
}

pub(crate) fn what_is_named_again_stays(open: Open<'_>) {
    let (catalog, replica) = (open(), open());
    let artefact = debuginfo(1, "content");
    let old = artefact.blob;
    let hashes = [old.hash];
    assert_eq!(catalog.put_artefact(&artefact, &writer(), None).unwrap(), Put::Stored);
    assert_eq!(catalog.unnamed(None, 10).unwrap(), []);
    assert_eq!(catalog.withdraw(&hashes, 100).unwrap(), 0, "it is named");
    remove(&*catalog, 1);
    assert_eq!(catalog.unnamed(None, 10).unwrap(), [Unnamed { blob: old, withdrawn_s: None }]);
    assert_eq!(catalog.forget_blobs(&hashes, 1000).unwrap(), [], "it was not withdrawn");
    assert_eq!(catalog.withdraw(&hashes, 100).unwrap(), 1);
    assert_eq!(replica.withdraw(&hashes, 200).unwrap(), 0, "the first time counts");
    assert_eq!(replica.unnamed(None, 10).unwrap(), [Unnamed { blob: old, withdrawn_s: Some(100) }]);
    assert_eq!(replica.blob(old.hash).unwrap(), None, "who needs it stores it again");
    assert_eq!(replica.blobs(None, 10).unwrap(), []);
    assert_eq!(catalog.forget_blobs(&hashes, 99).unwrap(), [], "not long enough ago");
    // An upload that found it on record before.
    assert_eq!(replica.put_artefact(&artefact, &writer(), None).unwrap(), Put::Stored);
    assert_eq!(catalog.forget_blobs(&hashes, 1000).unwrap(), []);
    assert_eq!(catalog.blob(old.hash).unwrap(), Some(old));
    // And one that did not, and stored it again.
    remove(&*catalog, 1);
    assert_eq!(catalog.withdraw(&hashes, 100).unwrap(), 1);
    let new = Blob { write: old.write + 1, ..old };
    let again = crate::catalog::Artefact { blob: new, ..artefact.clone() };
    assert_eq!(replica.put_artefact(&again, &writer(), None).unwrap(), Put::Stored);
    assert_eq!(catalog.blob(old.hash).unwrap(), Some(new));
    // Then even the first one names what the second stored.
    let elsewhere = artefact_in("try", artefact.clone());
    assert_eq!(catalog.put_artefact(&elsewhere, &writer(), None).unwrap(), Put::Stored);
    assert_eq!(catalog.recorded(&[old.hash, blob("other").hash]).unwrap(), [new]);
}

pub(crate) fn whatever_names_a_content_keeps_it(open: Open<'_>) {
    let catalog = open();
    let blobs = ["artefact", "derived", "profiles", "part", "nothing"].map(blob);
    catalog.put_artefact(&debuginfo(1, "artefact"), &writer(), None).unwrap();
    catalog.put_derived(key(1), blobs[1]).unwrap();
    catalog.put_profiles(ProfileBatch { blob: blobs[2], start_ns: 1, end_ns: 2, damaged: false }).unwrap();
    let upload = UploadName {
        build_id: build_id(1),
        kind: ArtefactKind::Executable,
        namespace: debuginfo(1, "").namespace,
        sha256: ContentHash::of(b"whole"),
    };
    let part = Part { start: 0, blob: blobs[3], total: 1000, received_s: 1 };
    assert_eq!(catalog.append_part(&upload, &part).unwrap(), Appended::Yes);
    catalog.restore_blob(blobs[4]).unwrap();
    let all = blobs.map(|blob| blob.hash);
    assert_eq!(catalog.withdraw(&all, 1).unwrap(), 1);
    assert_eq!(catalog.forget_blobs(&all, 1).unwrap(), [blobs[4]]);
    assert_eq!(catalog.blobs(None, 10).unwrap().len(), 4);
    assert_eq!(catalog.integrity().unwrap(), Vec::<String>::new());
    let derived = Named { derived: vec![key(1)], uploads: Vec::new() };
    assert_eq!(catalog.named(blobs[1].hash).unwrap(), derived);
    let part = Named { derived: Vec::new(), uploads: vec![upload] };
    assert_eq!(catalog.named(blobs[3].hash).unwrap(), part);
    assert_eq!(catalog.named(blobs[0].hash).unwrap(), Named::default());
    catalog.forget_derived_of(build_id(1), DerivedKind::Symbols).unwrap();
    assert_eq!(catalog.derived_of(build_id(1)).unwrap().len(), 1);
    catalog.forget_derived_of(build_id(1), DerivedKind::Unwind).unwrap();
    assert_eq!(catalog.named(blobs[1].hash).unwrap(), Named::default());
}

fn key(id: u8) -> DerivedKey {
    DerivedKey {
        build_id: build_id(id),
        kind: DerivedKind::Unwind,
        version: 1,
        inputs: ContentHash::of(b"inputs"),
    }
}

pub(crate) fn rows_without_images_and_old_profiles_go(open: Open<'_>) {
    let catalog = open();
    catalog.put_artefact(&debuginfo(1, "artefact"), &writer(), None).unwrap();
    for id in 1..=3 {
        catalog.put_derived(key(id), blob(&format!("table {id}"))).unwrap();
        let (start_ns, end_ns) = (u64::from(id), u64::from(id) + 1);
        let blob = blob(&format!("profiles {id}"));
        catalog.put_profiles(ProfileBatch { blob, start_ns, end_ns, damaged: false }).unwrap();
    }
    assert_eq!(catalog.forget_derived(10, true).unwrap(), 2);
    assert_eq!(catalog.forget_derived(1, false).unwrap(), 1);
    assert_eq!(catalog.forget_derived(10, false).unwrap(), 1);
    assert_eq!(catalog.derived_of(build_id(1)).unwrap(), [(key(1), blob("table 1"))]);
    assert_eq!(catalog.derived_of(build_id(2)).unwrap(), []);
    assert_eq!(catalog.forget_profiles(4, 10, true).unwrap(), 2);
    assert_eq!(catalog.forget_profiles(4, 10, false).unwrap(), 2);
    assert_eq!(catalog.profiles(0..10, 10).unwrap().len(), 1);
}
