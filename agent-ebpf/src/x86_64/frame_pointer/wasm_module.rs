//! Whether code is of a module that wasmtime compiled, all of whose functions keep frame pointers.
//!
//! # Why this shape
//! Wasmtime lays a module out as an ELF image, in memory or in a file, with a number of its own for the operating system
//! (`ELFOSABI_WASMTIME`, crates/environ/src/obj.rs) and the code as the first section, a page behind the header. It walks stacks by
//! frame pointers itself, so it has its compilers keep them in every function, trampolines too, and takes no setting
//! that says otherwise (`preserve_frame_pointers`, crates/wasmtime/src/config.rs). Optimised code could be walked as any other is; what is
//! not optimised has room in its frames where earlier calls have left return addresses, and functions are larger than a
//! search for their prologue goes.
//!
//! So the header is looked at, and behind it
//! 1. a caller's rbp is its own: no function calls before its frame is built
//! 2. that of the innermost frame is its own where no word from rsp up to rbp is a return address, prologue or not, and it
//!    is not being moved ([`moved_frame`](super::moved_frame))

use windlass_schema::StopReason;

use super::IN_MODULE;
use crate::frame_pointer::{Candidate, CodeWithoutTable, Search};
use crate::memory::StackMemory;
use crate::x86_64::Registers;

/// How far the code is behind the header, in bytes: it is aligned to a page.
const HEADER_BYTES: u64 = 4096;
/// The header's first eight bytes: an ELF image of 64 bits, little-endian, of version 1, and for which system.
const HEADER: u64 = 0xc801_0102_464c_457f;

/// Whether all of `code` is of such a module.
#[inline(always)]
pub(super) fn is_wasm_module<M: StackMemory>(code: &CodeWithoutTable, memory: &M) -> bool {
    memory.word(code.start.wrapping_sub(HEADER_BYTES)) == Some(HEADER)
}

impl Registers {
    /// One turn of looking for the caller of a frame in such a module, where its instruction does not say it.
    #[inline(always)]
    pub(super) fn caller_in_module<M: StackMemory>(
        &self,
        search: &mut Search,
        code: &CodeWithoutTable,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        if self.exact == 0 {
            return self.caller_by_frame_pointer(memory);
        }
        let found = self.search_code(search, code.unproved, memory);
        search.phase = IN_MODULE;
        found
    }
}
