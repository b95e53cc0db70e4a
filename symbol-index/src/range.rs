//! Ranges of addresses, in lists that are disjoint and ascending.

/// From start to end (exclusive).
pub(crate) type Range = (u64, u64);

/// The union of `ranges`.
pub(crate) fn union(mut ranges: Vec<Range>) -> Vec<Range> {
    ranges.sort_unstable();
    let mut merged: Vec<Range> = Vec::new();
    for (start, end) in ranges {
        match merged.last_mut() {
            Some(last) if start <= last.1 => last.1 = last.1.max(end),
            _ => merged.push((start, end)),
        }
    }
    merged
}

/// One range for each start: the longest, up to where the next one starts.
pub(crate) fn cut_at_starts(mut ranges: Vec<Range>) -> Vec<Range> {
    ranges.sort_unstable_by_key(|&(start, end)| (start, std::cmp::Reverse(end)));
    ranges.dedup_by_key(|&mut (start, _)| start);
    let mut next_start = u64::MAX;
    for (start, end) in ranges.iter_mut().rev() {
        *end = next_start.min(*end);
        next_start = *start;
    }
    ranges
}

/// The range of `ranges` that contains `address`.
pub(crate) fn containing(ranges: &[Range], address: u64) -> Option<Range> {
    let behind = ranges.partition_point(|&(start, _)| start <= address);
    ranges[..behind].last().copied().filter(|&(_, end)| address < end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_ranges() {
        let ranges = vec![(0x30, 0x40), (0x10, 0x20), (0x18, 0x28), (0x10, 0x14), (0x28, 0x30)];
        assert_eq!(union(ranges.clone()), [(0x10, 0x40)]);
        assert_eq!(cut_at_starts(ranges), [(0x10, 0x18), (0x18, 0x28), (0x28, 0x30), (0x30, 0x40)]);
    }

    #[test]
    fn ends_are_exclusive() {
        let ranges = [(0x10, 0x20), (0x30, 0x40)];
        for (address, expect) in [
            (0xf, None),
            (0x10, Some(0x10)),
            (0x1f, Some(0x10)),
            (0x20, None),
            (0x3f, Some(0x30)),
            (0x40, None),
        ] {
            assert_eq!(containing(&ranges, address).map(|range| range.0), expect, "{address:#x}");
        }
    }
}
