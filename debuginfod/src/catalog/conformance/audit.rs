//! Cases of [`crate::catalog::AuditLog`].

use super::{Open, artefact_in, debuginfo, writer};
use crate::catalog::{Action, AuditEntry, STORED, Subject};

fn entry(at_s: u64) -> AuditEntry {
    let subject = Subject { path: "ci".to_owned(), ..Subject::default() };
    AuditEntry { at_s, writer: writer(), action: Action::CreateToken, subject, result: "created".to_owned() }
}

fn times(open: Open<'_>, before: Option<u64>, limit: usize) -> Vec<u64> {
    open().audit(before, limit).unwrap().into_iter().map(|record| record.entry.at_s).collect()
}

pub(crate) fn what_is_stored_is_in_the_log_and_nothing_else(open: Open<'_>) {
    let catalog = open();
    let artefact = artefact_in("main", debuginfo(1, "content"));
    catalog.put_artefact(&artefact, &writer(), None).unwrap();
    catalog.put_artefact(&artefact, &writer(), None).unwrap();
    catalog.put_artefact(&artefact_in("main", debuginfo(1, "other")), &writer(), None).unwrap();
    let log = open().audit(None, 10).unwrap();
    let expect = AuditEntry {
        at_s: artefact.stored_s,
        writer: writer(),
        action: Action::Upload,
        subject: Subject::from(&artefact),
        result: STORED.to_owned(),
    };
    assert_eq!(log.into_iter().map(|record| record.entry).collect::<Vec<_>>(), [expect]);
}

pub(crate) fn the_log_comes_in_pages_latest_first(open: Open<'_>) {
    for at_s in 1..=5 {
        open().record(&entry(at_s)).unwrap();
    }
    let first = open().audit(None, 2).unwrap();
    assert_eq!(first.iter().map(|record| record.entry.clone()).collect::<Vec<_>>(), [entry(5), entry(4)]);
    assert_eq!(times(open, Some(first[1].id), 10), [3, 2, 1]);
    assert_eq!(times(open, Some(0), 10), [0; 0]);
}

pub(crate) fn the_log_ends_by_age_and_by_number(open: Open<'_>) {
    for at_s in 1..=6 {
        open().record(&entry(at_s)).unwrap();
    }
    open().trim_audit(3, 100).unwrap();
    assert_eq!(times(open, None, 10), [6, 5, 4, 3]);
    open().trim_audit(0, 2).unwrap();
    assert_eq!(times(open, None, 10), [6, 5]);
    let last = open().audit(None, 1).unwrap()[0].id;
    open().trim_audit(100, 100).unwrap();
    open().record(&entry(7)).unwrap();
    assert!(open().audit(None, 1).unwrap()[0].id > last, "a number is never given twice");
}
