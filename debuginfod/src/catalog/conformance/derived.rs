//! Cases of [`crate::catalog::DerivedArtefacts`].

use super::{Open, blob, build_id};
use crate::catalog::{DerivedKey, DerivedKind};

pub(crate) fn better_inputs_are_another_key(open: Open<'_>) {
    let catalog = open();
    let poor = DerivedKey {
        build_id: build_id(1),
        kind: DerivedKind::Symbols,
        version: 3,
        inputs: blob("poor input").hash,
    };
    let good = DerivedKey { inputs: blob("good input").hash, ..poor };
    catalog.put_derived(poor, blob("poor")).unwrap();
    assert_eq!(open().derived(poor).unwrap(), Some(blob("poor")));
    for other in [
        good,
        DerivedKey { version: 4, ..poor },
        DerivedKey { kind: DerivedKind::Unwind, ..poor },
        DerivedKey { build_id: build_id(2), ..poor },
    ] {
        assert_eq!(catalog.derived(other).unwrap(), None, "{other:?}");
    }
    catalog.put_derived(good, blob("good")).unwrap();
    assert_eq!(catalog.derived(good).unwrap(), Some(blob("good")));
    assert_eq!(catalog.derived(poor).unwrap(), None, "one of each kind is kept of an image");
    catalog.mark_damaged(blob("good").hash).unwrap();
    assert_eq!(catalog.derived(good).unwrap(), None);
}
