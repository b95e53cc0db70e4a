//! Cases of [`crate::catalog::Contents`].

use super::{Open, blob, debuginfo, writer};

pub(crate) fn damage_lasts_until_the_content_is_stored_again(open: Open<'_>) {
    let catalog = open();
    let artefact = debuginfo(1, "content");
    let content = artefact.blob;
    catalog.put_artefact(&artefact, &writer(), None).unwrap();
    assert_eq!(catalog.blob(content.hash).unwrap(), Some(content));
    catalog.mark_damaged(content.hash).unwrap();
    assert_eq!(catalog.blob(content.hash).unwrap(), None);
    assert!(open().blobs(None, 10).unwrap()[0].damaged);
    catalog.restore_blob(content).unwrap();
    assert_eq!(catalog.blob(content.hash).unwrap(), Some(content));
    catalog.mark_damaged(content.hash).unwrap();
    catalog.put_artefact(&artefact, &writer(), None).unwrap();
    assert_eq!(catalog.blob(content.hash).unwrap(), Some(content));
    assert_eq!(catalog.integrity().unwrap(), Vec::<String>::new());
}

pub(crate) fn contents_come_in_pages(open: Open<'_>) {
    let catalog = open();
    for number in 0..7 {
        catalog.put_artefact(&debuginfo(number, &number.to_string()), &writer(), None).unwrap();
    }
    let (mut found, mut last) = (Vec::new(), None);
    loop {
        let page = catalog.blobs(last, 3).unwrap();
        let Some(end) = page.last() else { break };
        last = Some(end.blob.hash);
        found.extend(page.into_iter().map(|recorded| recorded.blob));
    }
    let mut expect: Vec<_> = (0..7).map(|number| blob(&number.to_string())).collect();
    expect.sort_by_key(|blob| blob.hash);
    assert_eq!(found, expect);
}
