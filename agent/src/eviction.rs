//! Which tables go when there is no room for another?
//!
//! First those of images that no process maps, then those through which no sample went for longest. What
//! samples went through a moment ago stays, mapped or not: programs that run for a second map the same images
//! again and again, and of two tables that are both needed neither would stay long enough to be of use. Then the new
//! one waits, and is asked for again when samples still need it.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use windlass_schema::BuildId;
use windlass_schema::maps::Location;

/// How long a table counts as in use after a sample that went through its image, unless said otherwise. At 19 Hz it takes one part in
/// six hundred of a CPU's time to have a sample within it.
pub(crate) const IN_USE: Duration = Duration::from_secs(30);
/// Most tables of images that no process maps that go at once without need: each time, all walks are waited for.
const EVICTED_TOGETHER: usize = 16;

/// A table in the chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PlacedTable {
    pub(crate) id: BuildId,
    pub(crate) location: Location,
    /// When a sample last went through its image.
    pub(crate) sampled: Option<Instant>,
}

/// Tables that may go for another, in the order in which they go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Candidates {
    pub(crate) tables: Vec<PlacedTable>,
    /// How many of them, from the first on, are of images that no process maps.
    unmapped: usize,
}

fn is_within(time: Duration, sampled: Option<Instant>, now: Instant) -> bool {
    sampled.is_some_and(|sampled| now.duration_since(sampled) < time)
}

/// The tables that may go for one that a sample needed at `needed`, but for those through which one went within `in_use`. A table
/// that none needed lately is a guess and takes the place of no mapped one.
pub(crate) fn candidates(
    placed: impl Iterator<Item = PlacedTable>,
    mapped: &HashSet<BuildId>,
    needed: Option<Instant>,
    in_use: Duration,
    now: Instant,
) -> Candidates {
    let is_needed = is_within(IN_USE, needed, now);
    let mut tables: Vec<_> = placed
        .map(|table| (mapped.contains(&table.id), table))
        .filter(|(mapped, table)| !is_within(in_use, table.sampled, now) && (is_needed || !mapped))
        .collect();
    // By location last, so that the order is the same in each run.
    tables.sort_by_key(|(mapped, table)| (*mapped, table.sampled, table.location));
    Candidates {
        unmapped: tables.partition_point(|(mapped, _)| !mapped),
        tables: tables.into_iter().map(|(_, table)| table).collect(),
    }
}

impl Candidates {
    /// The tables to evict if the first `needed` have to go.
    pub(crate) fn evicted(&self, needed: usize) -> &[PlacedTable] {
        &self.tables[..needed.max(EVICTED_TOGETHER.min(self.unmapped)).min(self.tables.len())]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn id(number: u8) -> BuildId {
        BuildId::new(&[number; 20]).unwrap()
    }

    /// Tables as (number, whether mapped, seconds since a sample), and the numbers of those that may go.
    #[track_caller]
    fn check(tables: &[(u8, bool, Option<u32>)], needed: Option<u32>, expect: &[u8]) -> Candidates {
        let now = Instant::now() + 10_000 * SECOND;
        let ago = |seconds: Option<u32>| seconds.map(|seconds| now - seconds * SECOND);
        let mapped = tables.iter().filter(|(_, mapped, _)| *mapped).map(|(number, ..)| id(*number)).collect();
        let placed = tables.iter().map(|(number, _, sampled)| PlacedTable {
            id: id(*number),
            location: Location(u32::from(*number)),
            sampled: ago(*sampled),
        });
        let candidates = candidates(placed, &mapped, ago(needed), IN_USE, now);
        let ids: Vec<_> = candidates.tables.iter().map(|table| table.id).collect();
        assert_eq!(ids, expect.iter().map(|number| id(*number)).collect::<Vec<_>>());
        candidates
    }

    #[test]
    fn unmapped_first_then_least_recently_sampled() {
        let tables = [
            (1, true, Some(40)),
            (2, false, Some(31)),
            (3, true, Some(400)),
            (4, false, Some(50)),
            (5, true, None),
            (6, false, None),
        ];
        check(&tables, Some(0), &[6, 4, 2, 5, 3, 1]);
        // Nobody was sampled there: it may be in nobody's way.
        check(&tables, None, &[6, 4, 2]);
        check(&tables, Some(30), &[6, 4, 2]);
    }

    #[test]
    fn what_is_in_use_stays() {
        let tables = [(1, true, Some(0)), (2, false, Some(29)), (3, true, Some(29))];
        check(&tables, Some(0), &[]);
        check(&tables, None, &[]);
    }

    #[test]
    fn nothing_is_in_use_for_no_time() {
        let now = Instant::now();
        let placed = PlacedTable { id: id(1), location: Location(1), sampled: Some(now) };
        let mapped = HashSet::from([id(1)]);
        let of = |in_use, needed| candidates([placed].into_iter(), &mapped, needed, in_use, now).tables;
        assert_eq!(of(Duration::ZERO, Some(now)), [placed]);
        assert_eq!(of(IN_USE, Some(now)), []);
        assert_eq!(of(Duration::ZERO, None), [], "which nobody needs");
    }

    #[test]
    fn some_unmapped_ones_go_together_and_no_mapped_one_without_need() {
        let unmapped: Vec<_> = (0..20).map(|number| (number, false, None)).collect();
        let all: Vec<_> = (0..20).collect();
        let candidates = check(&unmapped, Some(0), &all);
        let evicted = |needed| candidates.evicted(needed).len();
        assert_eq!([evicted(1), evicted(16), evicted(17), evicted(20)], [16, 16, 17, 20]);
        let candidates = check(&[(1, true, None), (2, false, None), (3, true, None)], Some(0), &[2, 1, 3]);
        let evicted = |needed| candidates.evicted(needed).len();
        assert_eq!([evicted(1), evicted(2), evicted(3)], [1, 2, 3]);
    }
}
