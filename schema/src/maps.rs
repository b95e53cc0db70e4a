//! What the agent and its BPF program agree on: map names, keys, values, limits.
//!
//! ```text
//! PROCESSES  hash          tgid                 -> ProcessEntry (how many segments, where each starts)
//! MAPPINGS   hash          {tgid, segment}      -> MappingSegment (sorted executable mappings)
//! CHUNKS     array of maps chunk number         -> array of one 64 KiB value: image headers,
//!                                                  directories, dictionaries, pages, packed
//! SAMPLES    ring buffer                        <- SampleHeader, then addresses
//! SCRATCH    per-CPU array                         one sample under construction
//! RECENT     per-CPU array                         records that recent walks found
//! COUNTERS   per-CPU array Counter              -> u64
//! TURNS      array                                 nothing: one element for each turn of a walk
//! AUDITS     ring buffer                        <- AuditRecord, of one sample in AUDIT_EVERY
//! WALKED     array         CPU                  -> [WalkedFrame], of the walk under way if it is audited
//! ```
//! `AUDIT_EVERY` is no map but a constant that is set when the program is loaded; at 0 the verifier drops the
//! code behind it.
//! Everything is plain old data without padding; integers are in the byte order of the machine.
//!
//! # Locations
//! A [`Location`] names a place in the chunks: `chunk << 13 | offset / 8`. Location 0 is nowhere: the
//! first 8 bytes of chunk 0 stay unused.
//!
//! # An image in the chunks
//! An [`ImageHeader`] names its dictionary and up to [`DIRECTORY_SEGMENTS`] directory segments, each an
//! array of `u32` locations of pages (0: no page). None of these pieces crosses a chunk's end.

/// Bytes in a chunk: one value of an inner map. A power of two, so that the program can mask an
/// offset into it, and large, so that little is lost at its end.
pub const CHUNK_BYTES: u32 = 64 * 1024;
/// Bytes that one step of a location's offset stands for.
pub const GRANULE_BYTES: u32 = 8;
/// log2 of the granules in a chunk.
pub const CHUNK_GRANULES_SHIFT: u32 = 13;
/// Most chunks: 64 MiB of tables. Measured: every ELF file of a Debian developer's machine (23
/// million rows) takes about half.
pub const MAX_CHUNKS: u32 = 1024;
/// Pages that one directory segment names: 32 KiB of locations, half a chunk.
pub const DIRECTORY_SEGMENT_PAGES: u32 = 8192;
/// log2 of [`DIRECTORY_SEGMENT_PAGES`].
pub const DIRECTORY_SEGMENT_SHIFT: u32 = 13;
/// Most directory segments of an image.
pub const DIRECTORY_SEGMENTS: usize = 8;
/// Most processes known at once.
pub const MAX_PROCESSES: u32 = 32 * 1024;
/// Most mapping segments of all processes together.
pub const MAX_MAPPING_SEGMENTS: u32 = 64 * 1024;
/// Most executable mappings in a segment: what 7 probes tell apart.
pub const SEGMENT_MAPPINGS: usize = 127;
/// Slots of a segment, one more than it has mappings; unused ones start at [`UNUSED_START`].
pub const SEGMENT_SLOTS: usize = 128;
/// Start of a mapping that is not there: above any user address, and still positive as a signed
/// number, so that the sign of a difference compares.
pub const UNUSED_START: u64 = i64::MAX as u64;
/// Most segments of a process, and so 1,016 executable mappings.
pub const PROCESS_SEGMENTS: usize = 8;
/// Most user frames of a sample.
pub const MAX_USER_FRAMES: usize = 1024;
/// Most kernel frames of a sample: the kernel's own default (`sysctl kernel.perf_event_max_stack`).
pub const MAX_KERNEL_FRAMES: usize = 127;
/// Size of the ring buffer in bytes: at 19 Hz on 128 CPUs it holds the samples of a second even at
/// 400 bytes each, and it must be a power of two.
pub const SAMPLES_RING_BYTES: u32 = 1024 * 1024;
/// Bytes of stack that an audit copies at a time: of one page, whatever the page size, so that a piece is
/// there or not as a whole.
pub const AUDIT_PIECE_BYTES: usize = 4096;
/// Pieces of stack in an audit: 64 KiB hold the stacks of most programs whole, 500 bytes for each of 130 frames.
/// Of larger ones there are the inner and the outer half of that.
pub const AUDIT_PIECES: usize = 16;
/// Size of the ring buffer of audits in bytes while auditing is on: 46 records, what comes of every sample of
/// two CPUs at 199 Hz in a tenth of a second.
pub const AUDITS_RING_BYTES: u32 = 4 * 1024 * 1024;
/// Bit of [`WalkedFrame::stack_pointer`]: set when the walk did not know the frame pointer.
pub const AUDIT_RBP_UNKNOWN: u64 = 1 << 63;
/// Bit of a user address in a sample: set when the address is that of an instruction (the
/// innermost frame, or one that a signal interrupted), clear when it is a return address.
pub const EXACT_ADDRESS: u64 = 1 << 63;

const _: () = assert!(CHUNK_BYTES == GRANULE_BYTES << CHUNK_GRANULES_SHIFT);
const _: () = assert!(crate::table::MAX_RECORDS * 8 <= CHUNK_BYTES);
const _: () = assert!(crate::table::MAX_PAGE_BYTES <= CHUNK_BYTES);
const _: () = assert!(DIRECTORY_SEGMENT_PAGES == 1 << DIRECTORY_SEGMENT_SHIFT);
const _: () = assert!(DIRECTORY_SEGMENT_PAGES * DIRECTORY_SEGMENTS as u32 == crate::table::MAX_PAGES);
const _: () = assert!(size_of::<MappingSegment>() == 4096);
const _: () = assert!(MAX_CHUNKS <= 1 << (32 - CHUNK_GRANULES_SHIFT));

/// A place in the chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Location(pub u32);

impl Location {
    /// No place.
    pub const NOWHERE: Self = Self(0);

    /// The place `offset` bytes (a multiple of 8) into `chunk`.
    pub const fn new(chunk: u32, offset: u32) -> Self {
        Self(chunk << CHUNK_GRANULES_SHIFT | offset / GRANULE_BYTES)
    }

    /// The chunk's number.
    #[inline(always)]
    pub const fn chunk(self) -> u32 {
        self.0 >> CHUNK_GRANULES_SHIFT
    }

    /// The offset into the chunk in bytes.
    #[inline(always)]
    pub const fn offset(self) -> u32 {
        (self.0 & ((1 << CHUNK_GRANULES_SHIFT) - 1)) * GRANULE_BYTES
    }
}

/// An image's entry point in the chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct ImageHeader {
    /// Image address of page 0.
    pub base: u64,
    /// Pages in the directory.
    pub pages: u32,
    /// The dictionary.
    pub dictionary: Location,
    /// Directory segments; unused ones are nowhere.
    pub directory: [Location; DIRECTORY_SEGMENTS],
}

/// What stands in [`Mapping::image`] of a mapping whose image has no table in the chunks: locations
/// in chunk `MAX_CHUNKS`, which never exists, whose offset is a stop reason's code. Walks go on by frame pointers where that
/// is `Jit` or `FramePointer`.
pub mod no_table {
    use super::{CHUNK_GRANULES_SHIFT, Location, MAX_CHUNKS};
    use crate::StopReason;

    const BASE: u32 = MAX_CHUNKS << CHUNK_GRANULES_SHIFT;

    /// The location of code of an image that has no table and keeps frame pointers throughout.
    pub const FRAME_POINTERS: Location = location(StopReason::FramePointer);
    /// The location of code of a JIT compiler that does so.
    pub const JIT_FRAME_POINTERS: Location = Location(BASE + u8::MAX as u32);
    /// The location of code in a process that has such a compiler, which may as well be of another.
    pub const ANY_JIT_FRAME_POINTERS: Location = Location(BASE + u8::MAX as u32 - 1);

    /// The location that says why there is no table.
    pub const fn location(reason: StopReason) -> Location {
        Location(BASE + reason as u32)
    }

    /// The reason, if `location` is one of these.
    #[inline(always)]
    pub const fn reason(location: Location) -> Option<StopReason> {
        if location.0 < BASE {
            return None;
        }
        // Few enough to spell out, and a `match` is what the BPF verifier follows without a table.
        Some(match location.0 - BASE {
            code if code == StopReason::TablePending as u32 => StopReason::TablePending,
            code if code == StopReason::TableBudget as u32 => StopReason::TableBudget,
            code if code == StopReason::Jit as u32 => StopReason::Jit,
            code if code == StopReason::NoCfi as u32 => StopReason::NoCfi,
            code if code == StopReason::FramePointer as u32 => StopReason::FramePointer,
            code if code == JIT_FRAME_POINTERS.0 - BASE => StopReason::FramePointer,
            code if code == ANY_JIT_FRAME_POINTERS.0 - BASE => StopReason::FramePointer,
            _ => StopReason::TableUnavailable,
        })
    }
}

/// A process: where its mapping segments start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct ProcessEntry {
    /// Changes with every change of the mappings, so that a walk can tell that they changed under it.
    /// Never 0.
    pub generation: u32,
    /// Segments in use.
    pub segments: u32,
    /// Start of the first mapping of each segment; [`UNUSED_START`] for unused ones.
    pub first: [u64; PROCESS_SEGMENTS],
}

/// Key of the map of mappings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct SegmentKey {
    /// The process.
    pub tgid: u32,
    /// 0 to `PROCESS_SEGMENTS` - 1.
    pub segment: u32,
}

/// An executable mapping, but for its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Mapping {
    /// First process address behind it.
    pub end: u64,
    /// Process address minus image address.
    pub bias: u64,
    /// Its [`ImageHeader`], or a location of [`no_table`].
    pub image: Location,
    /// The segment's generation: equal to the process entry's, unless the segment was replaced meanwhile.
    pub generation: u32,
}

/// Up to 127 executable mappings of a process, sorted by start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct MappingSegment {
    /// First process address of each mapping; [`UNUSED_START`] for unused slots.
    pub starts: [u64; SEGMENT_SLOTS],
    /// The mappings.
    pub mappings: [Mapping; SEGMENT_SLOTS],
}

/// A sample's fixed part; `user_frames`, then `kernel_frames` addresses follow, innermost first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct SampleHeader {
    /// `CLOCK_MONOTONIC` in nanoseconds.
    pub time_ns: u64,
    /// Process.
    pub tgid: u32,
    /// Thread.
    pub tid: u32,
    /// CPU number.
    pub cpu: u32,
    /// Number of user addresses.
    pub user_frames: u16,
    /// Number of kernel addresses.
    pub kernel_frames: u16,
    /// Code of the [`crate::StopReason`].
    pub stop: u8,
    /// Code of the [`crate::UnsupportedReason`], where the walk stopped at such a row; else undefined.
    pub unsupported: u8,
    /// Zero.
    pub reserved: [u8; 2],
    /// [`ProcessEntry::generation`] of the mappings that the walk went by; 0 if it had none.
    pub generation: u32,
    /// The thread's name, zero-padded.
    pub comm: [u8; 16],
}

/// Bytes of a chunk, 8-aligned. An offset is masked into the chunk, so that no offset is out of
/// bounds, to the verifier as to the host.
#[derive(Clone)]
#[repr(C, align(8))]
pub struct Chunk(pub [u8; CHUNK_BYTES as usize]);

const CHUNK_MASK: u32 = CHUNK_BYTES - 1;

impl Chunk {
    /// The byte at `offset`.
    #[inline(always)]
    pub fn byte(&self, offset: u32) -> u8 {
        self.0[(offset & CHUNK_MASK) as usize]
    }

    /// The 16-bit value at `offset`, rounded down to its alignment.
    #[inline(always)]
    pub fn half(&self, offset: u32) -> u16 {
        // SAFETY: the masked offset is even and at most CHUNK_BYTES - 2; the chunk is 8-aligned.
        unsafe { self.0.as_ptr().add((offset & CHUNK_MASK & !1) as usize).cast::<u16>().read() }
    }

    /// The 32-bit value at `offset`, rounded down to its alignment.
    #[inline(always)]
    pub fn word(&self, offset: u32) -> u32 {
        // SAFETY: as in `half`, with a multiple of 4 and CHUNK_BYTES - 4.
        unsafe { self.0.as_ptr().add((offset & CHUNK_MASK & !3) as usize).cast::<u32>().read() }
    }

    /// The 64-bit value at `offset`, rounded down to its alignment.
    #[inline(always)]
    pub fn double(&self, offset: u32) -> u64 {
        // SAFETY: as in `half`, with a multiple of 8 and CHUNK_BYTES - 8.
        unsafe { self.0.as_ptr().add((offset & CHUNK_MASK & !7) as usize).cast::<u64>().read() }
    }
}

/// A page inside a chunk.
#[derive(Clone, Copy)]
pub struct ChunkPage<'a> {
    /// The chunk.
    pub chunk: &'a Chunk,
    /// Offset of the page's first byte.
    pub offset: u32,
}

impl crate::page::PageBytes for ChunkPage<'_> {
    #[inline(always)]
    fn byte(&self, offset: u32) -> u8 {
        self.chunk.byte(self.offset.wrapping_add(offset))
    }

    #[inline(always)]
    fn half(&self, offset: u32) -> u16 {
        self.chunk.half(self.offset.wrapping_add(offset))
    }

    #[inline(always)]
    fn double(&self, offset: u32) -> u64 {
        self.chunk.double(self.offset.wrapping_add(offset))
    }
}

/// A sample under construction.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct SampleBuffer {
    /// Filled last.
    pub header: SampleHeader,
    /// User addresses, then kernel addresses.
    pub addresses: [u64; MAX_USER_FRAMES + MAX_KERNEL_FRAMES + 1],
}

/// What a walk found in a frame, beside the address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct WalkedFrame {
    /// Stack pointer, and [`AUDIT_RBP_UNKNOWN`].
    pub stack_pointer: u64,
    /// Frame pointer.
    pub frame_pointer: u64,
}

/// A walk that is to be judged in user space: what it started from, what it found, and the stack. `R` are the
/// registers of the instruction set.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct AuditRecord<R> {
    /// Of the sample.
    pub header: SampleHeader,
    /// The registers at which the walk started.
    pub registers: R,
    /// Process addresses of the first bytes of the two halves of `stack`: the page of the first stack pointer, and the page
    /// behind the first half, or, if the walk went beyond that one's end, so that it ends with the last stack pointer's.
    pub starts: [u64; 2],
    /// Bit for each piece of `stack` that could be read.
    pub read: u64,
    /// The sample's user addresses; those behind `header.user_frames` have no meaning.
    pub addresses: [u64; MAX_USER_FRAMES],
    /// The same frames.
    pub frames: [WalkedFrame; MAX_USER_FRAMES],
    /// The stack.
    pub stack: [u8; AUDIT_PIECE_BYTES * AUDIT_PIECES],
}

/// Counters of the BPF program, one per-CPU slot each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Counter {
    /// Samples taken.
    Samples = 0,
    /// Samples that found the ring buffer full.
    RingFull = 1,
    /// Audits that found their ring buffer full.
    AuditsLost = 2,
}

impl Counter {
    /// Number of counters.
    pub const COUNT: u32 = 3;
}

/// Names of the maps and the program in the BPF object.
pub mod names {
    /// See the [module documentation](super).
    pub const PROCESSES: &str = "PROCESSES";
    /// See the [module documentation](super).
    pub const MAPPINGS: &str = "MAPPINGS";
    /// See the [module documentation](super).
    pub const CHUNKS: &str = "CHUNKS";
    /// See the [module documentation](super).
    pub const SAMPLES: &str = "SAMPLES";
    /// See the [module documentation](super).
    pub const COUNTERS: &str = "COUNTERS";
    /// See the [module documentation](super).
    pub const AUDITS: &str = "AUDITS";
    /// See the [module documentation](super).
    pub const WALKED: &str = "WALKED";
    /// The constant: one sample in so many is audited; 0 is none.
    pub const AUDIT_EVERY: &str = "AUDIT_EVERY";
    /// The perf_event program.
    pub const PROGRAM: &str = "windlass_sample";
    /// The one for kernels without `bpf_loop`.
    pub const PROGRAM_WITHOUT_LOOP: &str = "windlass_sample_each";
}
