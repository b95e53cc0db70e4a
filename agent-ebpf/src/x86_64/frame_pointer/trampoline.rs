//! The caller of a function that does nothing but call another: CPython's, of which it makes one for each function of
//! Python when it is to tell profilers what runs (`python3 -X perf`).
//!
//! # Why this shape
//! Python 3.12 and 3.13 have no frame pointer there (Python/asm_trampoline.S), so that by rbp the caller is skipped. But the
//! function is straight: where it stands as a whole, what rsp is at each of its instructions follows from them, wherever
//! it was copied to and whatever is around it.
//!
//! ```text
//!     [endbr64]            return address at rsp
//!     sub $8, %rsp         return address at rsp
//!     call *%rcx           rsp + 8
//!     add $8, %rsp         rsp + 8: what the call returns to
//!     ret                  rsp, as of any function
//! ```

use windlass_schema::StopReason;
use windlass_schema::record::DWARF_RSP;

use crate::frame_pointer::Candidate;
use crate::memory::StackMemory;
use crate::x86_64::Registers;

/// All from `sub` on: `48 83 ec 08  ff d1  48 83`, and `c4 08  c3`.
const FIRST: u64 = 0x8348_d1ff_08ec_8348;
const SECOND: u64 = 0xc3_08c4;
const SECOND_MASK: u64 = 0xff_ffff;
/// Where `call` and `add` are.
const CALL: u64 = 4;
const ADD: u64 = 6;
/// What they begin with.
const CALL_BYTES: u64 = 0xd1ff;
const CALL_MASK: u64 = 0xffff;
const ADD_BYTES: u64 = 0x00c4_8348;
const ADD_MASK: u64 = 0xff_ffff;
/// What `sub` takes.
const FRAME_BYTES: u64 = 8;
/// `endbr64`, where the processor is to look at jumps.
const ENDBR64: u64 = 0xfa1e_0ff3;
const ENDBR64_MASK: u64 = 0xffff_ffff;
const ENDBR64_BYTES: u64 = 4;

impl Registers {
    /// The caller, if the frame is one of such a function.
    #[inline(always)]
    pub(super) fn caller_of_trampoline<M: StackMemory>(
        &self,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        let Some(code) = memory.word(self.rip) else { return Ok(None) };
        let (start, frame_bytes) = if code & ADD_MASK == ADD_BYTES {
            (self.rip.wrapping_sub(ADD), FRAME_BYTES)
        } else if self.exact == 0 {
            return Ok(None);
        } else if code & CALL_MASK == CALL_BYTES {
            (self.rip.wrapping_sub(CALL), FRAME_BYTES)
        } else if code & ENDBR64_MASK == ENDBR64 {
            (self.rip.wrapping_add(ENDBR64_BYTES), 0)
        } else {
            (self.rip, 0)
        };
        let Some([first, second]) = memory.words(start) else { return Ok(None) };
        if first != FIRST || second & SECOND_MASK != SECOND {
            return Ok(None);
        }
        let rsp = self.general[DWARF_RSP as usize];
        self.caller_at(rsp.wrapping_add(frame_bytes), self.get(super::DWARF_RBP)?, memory)
    }
}
