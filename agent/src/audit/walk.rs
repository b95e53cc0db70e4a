//! A walk that is audited: what it found, what it started from, and the stack.

use windlass_schema::maps::AUDIT_PIECE_BYTES;
use windlass_schema::record::REGISTERS;

use crate::backend::Sample;

/// A walk of the kernel's, with all that it takes to judge it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditedWalk {
    /// The sample, without kernel addresses.
    pub sample: Sample,
    /// The general-purpose registers that the walk started from, by DWARF number.
    pub general: [u64; REGISTERS],
    /// What the walk found in each frame, innermost first.
    pub frames: Vec<AuditedFrame>,
    /// What it went over.
    pub stack: StackCopy,
}

/// What the kernel's walk found in a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AuditedFrame {
    /// As in [`Sample::user`].
    pub address: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Frame pointer, if the walk knew it.
    pub rbp: Option<u64>,
}

/// Parts of a thread's memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StackCopy {
    /// Process address of each piece, in order.
    starts: Vec<u64>,
    /// The pieces, in the same order.
    bytes: Vec<u8>,
}

impl StackCopy {
    /// The memory at these process addresses. Of pieces at one address, the last counts.
    pub(crate) fn of_pieces<'a>(pieces: impl Iterator<Item = (u64, &'a [u8])>) -> Self {
        let mut pieces: Vec<_> = pieces.filter(|(_, bytes)| bytes.len() == AUDIT_PIECE_BYTES).collect();
        pieces.sort_by_key(|(start, _)| *start);
        let starts = pieces.iter().map(|(start, _)| *start).collect();
        let bytes = pieces.iter().flat_map(|(_, bytes)| bytes.iter().copied()).collect();
        Self { starts, bytes }
    }

    fn byte(&self, address: u64) -> Option<u8> {
        let piece = self.starts.partition_point(|start| *start <= address).checked_sub(1)?;
        let at = usize::try_from(address - self.starts[piece]).ok()?;
        (at < AUDIT_PIECE_BYTES).then(|| self.bytes[piece * AUDIT_PIECE_BYTES + at])
    }

    /// The word at an address, if all of it was copied.
    pub fn word(&self, address: u64) -> Option<u64> {
        let mut word = [0; 8];
        for (number, byte) in (0..).zip(&mut word) {
            *byte = self.byte(address.checked_add(number)?)?;
        }
        Some(u64::from_ne_bytes(word))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_pieces_in_any_order() {
        let page = |byte: u8| vec![byte; AUDIT_PIECE_BYTES];
        let (a, b, c) = (page(1), page(2), page(3));
        let copy = StackCopy::of_pieces([(0x9000, &b[..]), (0x8000, &a[..]), (0x3000, &c[..])].into_iter());
        assert_eq!(copy.word(0x8ffc), Some(0x0202_0202_0101_0101), "across two pieces");
        assert_eq!(copy.word(0x3ff8), Some(0x0303_0303_0303_0303));
        for outside in [0, 0x2fff, 0x3ff9, 0x7fff, 0x9ff9, 0xa000, u64::MAX] {
            assert_eq!(copy.word(outside), None, "{outside:#x}");
        }
        assert_eq!(StackCopy::default().word(0), None);
    }
}
