//! The rows of all FDEs as one list: sorted, disjoint, each different from the one before it.
//!
//! # Why this shape
//! Unwinders find an FDE through a table sorted by start and so pick one of those that overlap, depending on
//! the search; peers let the next FDE cut off the one before, and stretch a function over the gap
//! behind it. Here code under two FDEs keeps its rule only if they agree, and a gap, however short, has none.

use std::collections::BTreeMap;

use windlass_schema::{Record, UnsupportedReason};

/// From `address` on, up to the next row, `record` holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) address: u64,
    pub(crate) record: Record,
}

/// `record` holds from `start` up to `end`, says one source.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Interval {
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// Where several sources cover an address, those of the lowest rank count.
    pub(crate) rank: u8,
    pub(crate) record: Record,
}

/// Appends a row, unless it repeats the last; replaces the last if it is at the same address.
pub(crate) fn push(rows: &mut Vec<Row>, address: u64, record: Record) {
    if rows.last().is_some_and(|last| last.address == address) {
        rows.pop();
    }
    if rows.last().map_or(Record::NO_CFI, |last| last.record) != record {
        rows.push(Row { address, record });
    }
}

/// Merges the intervals of all FDEs into rows. The last row, if there is any, is `NO_CFI`.
pub(crate) fn merge(mut intervals: Vec<Interval>) -> Vec<Row> {
    intervals.sort_by_key(|interval| interval.start);
    let mut rows = Vec::with_capacity(intervals.len());
    let mut rest = &intervals[..];
    while let Some(first) = rest.first() {
        let mut end = first.end;
        let mut len = 1;
        while let Some(next) = rest.get(len).filter(|next| next.start < end) {
            end = end.max(next.end);
            len += 1;
        }
        let (cluster, behind) = rest.split_at(len);
        match cluster {
            [only] => push(&mut rows, only.start, only.record),
            several => push_overlapping(&mut rows, several),
        }
        push(&mut rows, end, Record::NO_CFI);
        rest = behind;
    }
    rows
}

/// Appends the rows of intervals that overlap.
fn push_overlapping(rows: &mut Vec<Row>, intervals: &[Interval]) {
    let overlap = Record::unsupported(UnsupportedReason::Overlap);
    let mut edges: Vec<(u64, (u8, Record), isize)> = intervals
        .iter()
        .flat_map(|interval| {
            let stated = (interval.rank, interval.record);
            [(interval.start, stated, 1), (interval.end, stated, -1)]
        })
        .collect();
    edges.sort_by_key(|(address, ..)| *address);
    // How many intervals state each record at the address that the sweep has come to.
    let mut stated: BTreeMap<(u8, Record), isize> = BTreeMap::new();
    for here in edges.chunk_by(|a, b| a.0 == b.0) {
        for (_, one, change) in here {
            *stated.entry(*one).or_default() += change;
        }
        for (_, one, _) in here {
            if stated.get(one) == Some(&0) {
                stated.remove(one);
            }
        }
        let mut first = stated.keys();
        let record = match (first.next(), first.next()) {
            (None, _) => Record::NO_CFI,
            (Some((rank, _)), Some((other_rank, _))) if rank == other_rank => overlap,
            (Some((_, record)), _) => *record,
        };
        push(rows, here[0].0, record);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use windlass_schema::record::kind;
    use windlass_schema::{Architecture, Rule};

    fn record(words: i32) -> Record {
        Record::plain(kind::SP, 0, 0, 0, 0, 8 * words)
    }

    #[track_caller]
    fn check(intervals: &[(u64, u64, i32)], expect: &[(u64, &str)]) {
        let intervals = intervals.iter().map(|(start, end, words)| Interval {
            start: *start,
            end: *end,
            rank: 0,
            record: record(*words),
        });
        let rows: Vec<_> = merge(intervals.collect())
            .into_iter()
            .map(|row| (row.address, Rule::of_record(row.record, Architecture::X86_64).unwrap().to_string()))
            .collect();
        let expect: Vec<_> = expect.iter().map(|(address, text)| (*address, text.to_string())).collect();
        assert_eq!(rows, expect);
    }

    const ONE: &str = "cfa=rsp+8 ra=*(cfa-8) rbp=same";
    const TWO: &str = "cfa=rsp+16 ra=*(cfa-8) rbp=same";

    #[test]
    fn neighbours_merge_and_gaps_stay() {
        check(&[], &[]);
        check(&[(16, 20, 1), (20, 24, 1)], &[(16, ONE), (24, "no_cfi")]);
        check(&[(20, 24, 2), (16, 20, 1)], &[(16, ONE), (20, TWO), (24, "no_cfi")]);
        check(&[(16, 20, 1), (21, 24, 1)], &[(16, ONE), (20, "no_cfi"), (21, ONE), (24, "no_cfi")]);
    }

    #[test]
    fn overlaps_keep_what_they_agree_on() {
        check(&[(0, 8, 1), (0, 8, 1)], &[(0, ONE), (8, "no_cfi")]);
        check(&[(0, 8, 1), (4, 12, 1)], &[(0, ONE), (12, "no_cfi")]);
        check(
            &[(0, 8, 1), (4, 12, 2), (20, 24, 2)],
            &[(0, ONE), (4, "unsupported overlap"), (8, TWO), (12, "no_cfi"), (20, TWO), (24, "no_cfi")],
        );
        check(
            &[(0, 100, 1), (4, 8, 2), (8, 12, 2)],
            &[(0, ONE), (4, "unsupported overlap"), (12, ONE), (100, "no_cfi")],
        );
    }

    #[test]
    fn a_source_of_lower_rank_has_precedence() {
        let interval = |start, end, rank, words| Interval { start, end, rank, record: record(words) };
        let rows = merge(vec![interval(0, 20, 1, 2), interval(4, 8, 0, 1), interval(12, 16, 1, 1)]);
        let text = |row: Row| Rule::of_record(row.record, Architecture::X86_64).unwrap().to_string();
        let found: Vec<_> = rows.into_iter().map(|row| (row.address, text(row))).collect();
        let expect = [(0, TWO), (4, ONE), (8, TWO), (12, "unsupported overlap"), (16, TWO), (20, "no_cfi")];
        assert_eq!(found, expect.map(|(address, text)| (address, text.to_owned())));
    }
}
