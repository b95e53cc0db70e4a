//! What does the program send of a walk that is to be audited?

use std::mem::offset_of;
use std::os::fd::{AsRawFd as _, RawFd};

use aya::maps::{Map, MapData, MapError, RingBuf};
use windlass_agent_ebpf::x86_64::Registers;
use windlass_schema::maps::{
    AUDIT_PIECE_BYTES, AUDIT_PIECES, AUDIT_RBP_UNKNOWN, AuditRecord, MAX_USER_FRAMES, SampleHeader,
    WalkedFrame,
};

use super::sample_of;
use crate::audit::{AuditedFrame, AuditedWalk, StackCopy};

type Record = AuditRecord<Registers>;

/// The ring buffer of audits.
pub(super) struct Audits(RingBuf<MapData>);

impl Audits {
    pub(super) fn new(ring: Map) -> Result<Self, MapError> {
        RingBuf::try_from(ring).map(Self)
    }

    /// What becomes readable when there are some.
    pub(super) fn descriptor(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Takes out what is there.
    pub(super) fn drain(&mut self) -> Vec<AuditedWalk> {
        let mut walks = Vec::new();
        while let Some(item) = self.0.next() {
            walks.extend(decode(&item));
        }
        walks
    }
}

/// A walk from its record's bytes.
fn decode(bytes: &[u8]) -> Option<AuditedWalk> {
    if bytes.len() < size_of::<Record>() {
        return None;
    }
    // SAFETY: integers alone, valid for any bytes; the record is inside of them.
    let (header, registers, starts, read) = unsafe {
        (
            read_at::<SampleHeader>(bytes, offset_of!(Record, header)),
            read_at::<Registers>(bytes, offset_of!(Record, registers)),
            read_at::<[u64; 2]>(bytes, offset_of!(Record, starts)),
            read_at::<u64>(bytes, offset_of!(Record, read)),
        )
    };
    let frames = (0..usize::from(header.user_frames).min(MAX_USER_FRAMES)).map(|frame| {
        // SAFETY: as above; the frame is one of the arrays'.
        let (address, walked) = unsafe {
            (
                read_at::<u64>(bytes, offset_of!(Record, addresses) + size_of::<u64>() * frame),
                read_at::<WalkedFrame>(bytes, offset_of!(Record, frames) + size_of::<WalkedFrame>() * frame),
            )
        };
        let is_known = walked.stack_pointer & AUDIT_RBP_UNKNOWN == 0;
        AuditedFrame {
            address,
            rsp: walked.stack_pointer & !AUDIT_RBP_UNKNOWN,
            rbp: is_known.then_some(walked.frame_pointer),
        }
    });
    let frames: Vec<_> = frames.collect();
    let half = AUDIT_PIECES / 2;
    let pieces = (0..AUDIT_PIECES).filter(|piece| read >> piece & 1 != 0).map(|piece| {
        let start = starts[piece / half].wrapping_add((piece % half * AUDIT_PIECE_BYTES) as u64);
        let at = offset_of!(Record, stack) + piece * AUDIT_PIECE_BYTES;
        (start, &bytes[at..at + AUDIT_PIECE_BYTES])
    });
    let stack = StackCopy::of_pieces(pieces);
    let user = frames.iter().map(|frame| frame.address).collect();
    let sample = sample_of(&header, user, Vec::new());
    Some(AuditedWalk { sample, general: registers.general, frames, stack })
}

/// The `T` at an offset.
///
/// # Safety
/// Any bytes are a `T`, and there are as many behind the offset.
unsafe fn read_at<T>(bytes: &[u8], at: usize) -> T {
    let bytes = &bytes[at..at + size_of::<T>()];
    // SAFETY: there are as many bytes as a `T` has, of which the caller says that any are one.
    unsafe { bytes.as_ptr().cast::<T>().read_unaligned() }
}

#[cfg(test)]
mod tests {
    use windlass_schema::maps::EXACT_ADDRESS;
    use windlass_schema::record::DWARF_RSP;

    use super::*;

    #[test]
    fn a_record_gives_its_walk_and_the_pieces_of_the_stack_that_were_read() {
        let mut bytes = vec![0; size_of::<Record>()];
        let mut put = |at: usize, content: &[u8]| bytes[at..at + content.len()].copy_from_slice(content);
        let header = offset_of!(Record, header);
        put(header + offset_of!(SampleHeader, tgid), &7u32.to_ne_bytes());
        put(header + offset_of!(SampleHeader, user_frames), &2u16.to_ne_bytes());
        put(header + offset_of!(SampleHeader, kernel_frames), &3u16.to_ne_bytes());
        let general = offset_of!(Record, registers) + offset_of!(Registers, general);
        put(general + 8 * usize::from(DWARF_RSP), &0x7010u64.to_ne_bytes());
        put(offset_of!(Record, starts), &0x7000u64.to_ne_bytes());
        put(offset_of!(Record, starts) + 8, &0x2_0000u64.to_ne_bytes());
        let half = AUDIT_PIECES / 2;
        put(offset_of!(Record, read), &(0b1u64 | 0b10 << half).to_ne_bytes());
        put(offset_of!(Record, addresses), &(0x1000 | EXACT_ADDRESS).to_ne_bytes());
        put(offset_of!(Record, addresses) + 8, &0x2000u64.to_ne_bytes());
        let walked = |frame: usize, word: usize| offset_of!(Record, frames) + 16 * frame + 8 * word;
        put(walked(0, 0), &0x7010u64.to_ne_bytes());
        put(walked(0, 1), &0x7100u64.to_ne_bytes());
        put(walked(1, 0), &(0x7020 | AUDIT_RBP_UNKNOWN).to_ne_bytes());
        put(walked(1, 1), &0x9999u64.to_ne_bytes());
        let stack = offset_of!(Record, stack);
        put(stack + 0x10, &0x42u64.to_ne_bytes());
        put(stack + (half + 1) * AUDIT_PIECE_BYTES, &0x43u64.to_ne_bytes());
        let walk = decode(&bytes).unwrap();
        assert_eq!((walk.sample.tgid, &walk.sample.user[..]), (7, &[0x1000 | EXACT_ADDRESS, 0x2000][..]));
        assert_eq!(walk.sample.kernel, [0; 0], "they are not part of it");
        assert_eq!(walk.general[usize::from(DWARF_RSP)], 0x7010);
        let frame = |address, rsp, rbp| AuditedFrame { address, rsp, rbp };
        assert_eq!(walk.frames[0], frame(0x1000 | EXACT_ADDRESS, 0x7010, Some(0x7100)));
        assert_eq!(walk.frames[1], frame(0x2000, 0x7020, None));
        let words = [0x7010, 0x7ff8, 0x7ffc, 0x8000, 0x2_0000, 0x2_1000].map(|at| walk.stack.word(at));
        assert_eq!(words, [Some(0x42), Some(0), None, None, None, Some(0x43)]);
        for length in [0, 40, 200, 5000, bytes.len() - 1] {
            assert!(decode(&bytes[..length]).is_none());
        }
    }
}
