//! Cases of [`crate::catalog::Labels`].

use super::{Open, artefact_in, build_id, debuginfo, writer};
use crate::catalog::{Action, Catalog, Label, LabelChange, LabelOutcome, MAX_LABELS};

fn change(namespace: &str, add: &[&str], remove: &[&str], at_s: u64) -> LabelChange {
    let labels = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    LabelChange { namespace: namespace.parse().unwrap(), add: labels(add), remove: labels(remove), at_s }
}

fn labels(catalog: &dyn Catalog, id: u8) -> Vec<String> {
    let labels = catalog.labels(build_id(id)).unwrap().into_iter();
    labels.map(|found| format!("{} {} {}", found.namespace, found.label, found.since_s)).collect()
}

pub(crate) fn labels_are_given_and_taken_in_a_namespace(open: Open<'_>) {
    let catalog = open();
    catalog.put_artefact(&artefact_in("main", debuginfo(1, "one")), &writer(), None).unwrap();
    let ids = [build_id(1), build_id(2)];
    let add = change("main", &["release=1", "branch=a/b"], &[], 10);
    use LabelOutcome::{Changed, Unchanged, Unknown};
    assert_eq!(catalog.change_labels(&ids, &add, &writer()).unwrap(), [Changed, Unknown]);
    let again = change("main", &["release=1"], &["release=7"], 20);
    assert_eq!(catalog.change_labels(&ids, &again, &writer()).unwrap(), [Unchanged, Unknown]);
    let elsewhere = change("try", &["release=1"], &[], 30);
    assert_eq!(catalog.change_labels(&ids[..1], &elsewhere, &writer()).unwrap(), [Changed]);
    assert_eq!(labels(&*open(), 1), ["main branch=a/b 10", "main release=1 10", "try release=1 30"]);
    let moved = change("main", &["release=2"], &["release=1"], 40);
    assert_eq!(catalog.change_labels(&ids[..1], &moved, &writer()).unwrap(), [Changed]);
    assert_eq!(labels(&*open(), 1), ["main branch=a/b 10", "main release=2 40", "try release=1 30"]);
    assert_eq!(labels(&*open(), 2), Vec::<String>::new());
    let log = catalog.audit(None, 1).unwrap();
    assert_eq!((log[0].entry.action, log[0].entry.at_s), (Action::Label, 40));
    assert_eq!(log[0].entry.result, "removed release=1, added release=2");
}

pub(crate) fn labels_have_a_limit(open: Open<'_>) {
    let catalog = open();
    catalog.put_artefact(&debuginfo(1, "one"), &writer(), None).unwrap();
    let add: Vec<Label> = (0..MAX_LABELS).map(|number| format!("n={number}").parse().unwrap()).collect();
    let all = LabelChange { add, ..change("release", &[], &[], 1) };
    let outcome = |change: &LabelChange| catalog.change_labels(&[build_id(1)], change, &writer()).unwrap()[0];
    assert_eq!(outcome(&all), LabelOutcome::Changed);
    let more = change("release", &["n=x", "n=y"], &["n=0"], 2);
    assert_eq!(outcome(&more), LabelOutcome::TooMany);
    let found = labels(&*catalog, 1);
    assert!(found.len() == MAX_LABELS && found.contains(&"release n=0 1".to_owned()), "nothing changed");
    assert_eq!(outcome(&change("release", &["n=x"], &["n=0"], 2)), LabelOutcome::Changed);
}
