//! Cases of [`crate::catalog::ChangeList`].

use windlass_schema::BuildId;

use super::{Open, build_id, debuginfo, source, writer};
use crate::blob::Blob;
use crate::catalog::{Catalog, Changed, Removal};
use crate::elf::Facts;
use crate::namespace::Namespace;

/// What changed since `position`, which is moved to the end of the list.
fn changed(catalog: &dyn Catalog, position: &mut u64) -> Changed {
    let changes = catalog.changes(Some(*position)).unwrap();
    *position = changes.position;
    changes.changed
}

fn images(ids: &[u8]) -> Changed {
    Changed::Images(ids.iter().map(|id| build_id(*id)).collect())
}

pub(crate) fn every_change_is_listed_for_everyone(open: Open<'_>) {
    let (here, there) = (open(), open());
    here.put_artefact(&debuginfo(9, "before"), &writer(), None).unwrap();
    let start = there.changes(None).unwrap();
    assert_eq!(start.changed, images(&[]));
    let mut position = start.position;
    let (first, second) = (debuginfo(1, "poor"), debuginfo(2, "second"));
    here.put_artefact(&second, &writer(), None).unwrap();
    here.put_artefact(&first, &writer(), None).unwrap();
    here.put_artefact(&source(2, "/a.c", "poor"), &writer(), None).unwrap();
    assert_eq!(changed(&*there, &mut position), images(&[1, 2]));
    assert_eq!(changed(&*there, &mut position), images(&[]));
    here.put_artefact(&first, &writer(), None).unwrap();
    assert_eq!(changed(&*there, &mut position), images(&[]), "it was there");
    here.replace_artefact(&debuginfo(1, "rich"), first.blob.hash, &writer(), None).unwrap();
    assert_eq!(changed(&*there, &mut position), images(&[1]));
    there.mark_damaged(second.blob.hash).unwrap();
    assert_eq!(changed(&*here, &mut position), images(&[2]));
    let again = Blob { write: second.blob.write + 1, ..second.blob };
    there.restore_blob(again).unwrap();
    assert_eq!(changed(&*here, &mut position), images(&[2]));
    let later_s = second.used_s + 1;
    assert_eq!(there.note_uses(&[(second.name(), later_s)]).unwrap(), [true]);
    assert_eq!(changed(&*here, &mut position), images(&[]), "a use is no change");
    there
        .correct_facts(&second.name(), second.blob.hash, &Facts { dwarf: true, ..Facts::default() })
        .unwrap();
    assert_eq!(changed(&*here, &mut position), images(&[2]));
    there.remove(&removal(1), &writer()).unwrap();
    assert_eq!(changed(&*here, &mut position), images(&[1]), "it goes");
    there.remove(&removal(1), &writer()).unwrap();
    assert_eq!(changed(&*here, &mut position), images(&[]), "it was gone");
}

fn removal(id: u8) -> Removal {
    Removal {
        build_id: build_id(id),
        namespace: Namespace::release(),
        kind: None,
        path: None,
        unless_used_since_s: None,
        at_s: 1_700_000_002,
        why: "deleted".to_owned(),
    }
}

pub(crate) fn a_list_that_was_not_read_in_time_has_an_end(open: Open<'_>) {
    let catalog = open();
    let start = catalog.changes(None).unwrap().position;
    let mut position = start;
    for number in 0u32..1300 {
        let build_id = BuildId::new(&number.to_be_bytes()).unwrap();
        catalog
            .put_artefact(&crate::catalog::Artefact { build_id, ..debuginfo(0, "x") }, &writer(), None)
            .unwrap();
        if number == 99 {
            let Changed::Images(listed) = changed(&*catalog, &mut position) else { panic!("a hundred") };
            assert_eq!(listed.len(), 100);
        }
    }
    assert_eq!(changed(&*catalog, &mut { start }), Changed::Any);
    assert_eq!(changed(&*catalog, &mut position), Changed::Any);
    assert_eq!(changed(&*catalog, &mut position), images(&[]), "from its end on it is a list again");
    assert_eq!(changed(&*catalog, &mut (position + 1000)), Changed::Any, "a list that knows less is another");
}
