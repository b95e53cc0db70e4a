//! Cases of [`crate::catalog::Provenances`].

use windlass_schema::http::ArtefactKind;

use super::{Open, blob, build_id};
use crate::catalog::Provenance;

pub(crate) fn the_first_server_that_a_content_came_from_counts(open: Open<'_>) {
    let catalog = open();
    let first = Provenance {
        build_id: build_id(1),
        kind: ArtefactKind::Debuginfo,
        hash: blob("first").hash,
        upstream: "https://one.example".to_owned(),
        fetched_s: 5,
    };
    let again = Provenance { upstream: "https://two.example".to_owned(), fetched_s: 9, ..first.clone() };
    let other = Provenance { hash: blob("other").hash, fetched_s: 7, ..again.clone() };
    let earlier = Provenance { kind: ArtefactKind::Executable, fetched_s: 3, ..again.clone() };
    for provenance in [&first, &again, &other, &earlier] {
        catalog.put_provenance(provenance).unwrap();
    }
    assert_eq!(open().provenances(build_id(1)).unwrap(), [earlier, first, other]);
    assert_eq!(catalog.provenances(build_id(2)).unwrap(), []);
}
