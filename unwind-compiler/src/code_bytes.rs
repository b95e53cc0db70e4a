//! The bytes of an image's code at their addresses, and which of it is left over.
//!
//! Linkers pad functions to 16 bytes, so that an image has a gap in its call frame information behind most of its
//! functions. Finding them is one pass over ranges that are sorted already; that there is nothing but padding in one
//! is seen from its first few instructions.

use std::ops::Range;

/// The bytes of an image's code at their addresses, by sections or segments.
#[derive(Clone, Debug, Default)]
pub(crate) struct CodeBytes<'a> {
    /// Sorted, disjoint, none empty.
    pieces: Vec<(u64, &'a [u8])>,
    /// Where code is, with or without bytes: sorted, disjoint, none empty.
    ranges: Vec<Range<u64>>,
}

impl<'a> CodeBytes<'a> {
    /// Of pieces in any order. Of those that share addresses, the first counts.
    pub(crate) fn new(mut pieces: Vec<(u64, &'a [u8])>) -> Self {
        pieces.retain(|(start, bytes)| !bytes.is_empty() && start.checked_add(bytes.len() as u64).is_some());
        pieces.sort_by_key(|(start, _)| *start);
        let mut end = 0;
        pieces.retain(|(start, bytes)| {
            let is_free = *start >= end;
            end = if is_free { start + bytes.len() as u64 } else { end };
            is_free
        });
        let ranges = pieces.iter().map(|(start, bytes)| *start..*start + bytes.len() as u64).collect();
        Self { pieces, ranges }
    }

    /// Itself as a part of the code at `ranges`, in any order; of those that share addresses, the first counts.
    pub(crate) fn of(mut self, mut ranges: Vec<Range<u64>>) -> Self {
        ranges.retain(|range| range.start < range.end);
        ranges.sort_by_key(|range| range.start);
        let mut end = 0;
        ranges.retain(|range| {
            let is_free = range.start >= end;
            end = if is_free { range.end } else { end };
            is_free
        });
        self.ranges = ranges;
        self
    }

    /// How many bytes the code has, whether they are there or not.
    pub(crate) fn len(&self) -> u64 {
        self.ranges.iter().map(|range| range.end - range.start).sum()
    }

    /// The first address of code.
    pub(crate) fn start(&self) -> Option<u64> {
        self.ranges.first().map(|range| range.start)
    }

    /// The piece that `address` lies in, and its bytes.
    fn piece(&self, address: u64) -> Option<(Range<u64>, &'a [u8])> {
        let behind = self.pieces.partition_point(|(start, _)| *start <= address);
        let (start, bytes) = *self.pieces.get(behind.checked_sub(1)?)?;
        let range = start..start + bytes.len() as u64;
        range.contains(&address).then_some((range, bytes))
    }

    /// Whether `range` is a whole section or segment.
    pub(crate) fn is_section(&self, range: &Range<u64>) -> bool {
        self.ranges
            .binary_search_by_key(&range.start, |section| section.start)
            .is_ok_and(|number| self.ranges[number] == *range)
    }

    /// The bytes of a range within one piece.
    pub(crate) fn get(&self, range: &Range<u64>) -> Option<&'a [u8]> {
        let (piece, bytes) = self.piece(range.start)?;
        let length = usize::try_from(range.end.checked_sub(range.start)?).ok()?;
        bytes.get((range.start - piece.start) as usize..)?.get(..length)
    }

    /// The bytes from `address` to the end of its piece.
    pub(crate) fn from(&self, address: u64) -> Option<&'a [u8]> {
        let (piece, bytes) = self.piece(address)?;
        bytes.get((address - piece.start) as usize..)
    }

    /// Calls `visit` with the parts of the code that `covered`, sorted by start, leaves: each within a section, in order.
    pub(crate) fn gaps(
        &self,
        covered: impl IntoIterator<Item = Range<u64>>,
        mut visit: impl FnMut(Range<u64>),
    ) {
        let mut covered = covered.into_iter().peekable();
        let mut covered_to = 0;
        for &Range { start, end } in &self.ranges {
            let mut at = covered_to.max(start);
            while let Some(range) = covered.next_if(|range| range.start < end) {
                if at < range.start {
                    visit(at..range.start);
                }
                covered_to = covered_to.max(range.end);
                at = at.max(range.end);
            }
            if at < end {
                visit(at..end);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: [u8; 32] = [0; 32];

    #[track_caller]
    fn check(covered: impl IntoIterator<Item = Range<u64>>, expect: &[Range<u64>]) {
        let code = CodeBytes::new(vec![(48, &BYTES[..16]), (16, &BYTES[..]), (20, &BYTES[..2])]);
        let mut gaps = Vec::new();
        code.gaps(covered, |gap| gaps.push(gap));
        assert_eq!(gaps, expect);
    }

    #[test]
    fn gaps_are_what_no_range_covers() {
        check([], &[16..48, 48..64]);
        check(std::iter::once(0..100), &[]);
        check([0..20, 24..32, 26..28, 32..40], &[20..24, 40..48, 48..64]);
        check([40..50, 60..70], &[16..40, 50..60]);
        check(std::iter::once(64..80), &[16..48, 48..64]);
    }

    #[test]
    fn bytes_are_those_of_one_piece() {
        let code = CodeBytes::new(vec![(16, &BYTES[..]), (u64::MAX - 4, &BYTES[..]), (8, &[])]);
        assert_eq!(
            [15, 16, 47, 48].map(|at| code.from(at).map(<[u8]>::len)),
            [None, Some(32), Some(1), None]
        );
        assert_eq!((code.len(), code.start()), (32, Some(16)));
        assert_eq!(code.get(&(16..48)).map(<[u8]>::len), Some(32));
        assert_eq!(code.get(&(16..49)), None);
        assert_eq!(code.get(&(15..17)), None);
        assert_eq!(code.get(&Range { start: 20, end: 16 }), None);
        assert!(code.is_section(&(16..48)) && !code.is_section(&(16..47)));
    }

    #[test]
    fn sections_may_have_bytes_of_a_part() {
        let part = || CodeBytes::new(vec![(20, &BYTES[..4]), (30, &BYTES[..2])]);
        let code = part().of(vec![40..40, 40..48, 16..36, 24..28]);
        assert_eq!((code.len(), code.start()), (28, Some(16)));
        assert!(code.is_section(&(16..36)) && !code.is_section(&(20..24)));
        let mut gaps = Vec::new();
        code.gaps(std::iter::once(24..30), |gap| gaps.push(gap));
        assert_eq!(gaps, [16..24, 30..36, 40..48]);
        assert_eq!((code.get(&(20..24)).map(<[u8]>::len), code.get(&(16..24))), (Some(4), None));
    }
}
