//! What a walk reads from.

use windlass_schema::maps::{Chunk, MappingSegment, SegmentKey};

/// Registers in the kernel's `sigcontext` for x86-64, in words: r8 to r15, rdi, rsi, rbp, rbx, rdx,
/// rax, rcx, rsp, rip (`arch/x86/include/uapi/asm/sigcontext.h`).
pub const SIGNAL_CONTEXT_WORDS: usize = 17;

/// The memory of the thread being walked.
pub trait StackMemory {
    /// The 8 bytes at `address`.
    fn word(&self, address: u64) -> Option<u64>;

    /// The 16 bytes at `address`: a saved rbp and the return address above it cost one read, because
    /// a user read costs the same for 8 and for 16 bytes.
    fn pair(&self, address: u64) -> Option<[u64; 2]>;

    /// The register words of the `sigcontext` at `address`.
    fn signal_context(&self, address: u64) -> Option<[u64; SIGNAL_CONTEXT_WORDS]>;

    /// The stop reason when [`word`](Self::word) has nothing at `address`.
    fn unreadable(&self, address: u64) -> windlass_schema::StopReason;
}

/// Where mappings and unwind tables lie.
pub trait Tables {
    /// The chunk with this number.
    fn chunk(&self, number: u32) -> Option<&Chunk>;

    /// A segment of a process's mappings.
    fn segment(&self, key: SegmentKey) -> Option<&MappingSegment>;
}
