//! Cases of [`crate::catalog::ProfileBatches`].

use super::{Open, blob};
use crate::catalog::ProfileBatch;

pub(crate) fn batches_are_found_by_time_and_counted_once(open: Open<'_>) {
    let catalog = open();
    let batch =
        |content, start_ns, end_ns| ProfileBatch { blob: blob(content), start_ns, end_ns, damaged: false };
    let (early, late) = (batch("early", 10, 20), batch("late", 20, 30));
    for stored in [late, early, early] {
        catalog.put_profiles(stored).unwrap();
    }
    let catalog = open();
    assert_eq!(catalog.profiles(0..100, 10).unwrap(), [early, late]);
    assert_eq!(catalog.profiles(0..100, 1).unwrap(), [early]);
    assert_eq!(catalog.profiles(0..20, 10).unwrap(), [early]);
    assert_eq!(catalog.profiles(21..100, 10).unwrap(), [late]);
    assert_eq!(catalog.profiles(31..100, 10).unwrap(), []);
    assert_eq!(catalog.profiles_of(early.blob.hash).unwrap(), Some(early));
    assert_eq!(catalog.profiles_of(blob("neither").hash).unwrap(), None);
    catalog.mark_damaged(late.blob.hash).unwrap();
    assert_eq!(catalog.profiles(0..100, 10).unwrap(), [early, ProfileBatch { damaged: true, ..late }]);
}
