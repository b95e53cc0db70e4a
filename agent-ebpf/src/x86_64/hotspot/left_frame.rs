//! Where the caller is behind the frame of a method that called native code, and of a stub that goes on at a handler.
//!
//! # Why this shape
//! Most code of HotSpot leaves its frame right in front of `ret`. Three kinds do something in between, when rbp is already the
//! caller's, and nothing around them says so. Each has one sequence of instructions for that, which is demanded whole:
//!
//! ```text
//! leave;  cmpq $0, 8(%r15);  jne 1f;  ret;  1: jmp       a compiled native method: is there an exception?
//!                                                        (generate_native_wrapper, sharedRuntime_x86_64.cpp)
//! leave;  pop %rdi;  mov %r11, %rsp;  jmp *%rdi          an interpreted one (generate_native_entry,
//!                                                        templateInterpreterGenerator_x86.cpp)
//! pop %rbp;  pop %rdx;  jmp *%r..                        a stub that found a handler (tailjmpInd, x86_64.ad)
//! ```

use windlass_schema::StopReason;
use windlass_schema::record::{DWARF_RBP, DWARF_RSP};

use super::{JUMP, LOW_2, LOW_4, LOW_6, POP_RBP};
use crate::frame_pointer::Candidate;
use crate::memory::StackMemory;
use crate::x86_64::Registers;
use crate::x86_64::frame_pointer::byte_before;

const DWARF_RDX: u8 = 1;
const DWARF_RDI: u8 = 5;
const DWARF_R11: u8 = 11;

const LEAVE: u64 = 0xc9;
/// `cmpq $0, 8(%r15)`, the first four bytes, with `$0` of four bytes or, where this bit is set, of one.
const COMPARE: u64 = 0x087f_8149;
const IS_SHORT: u64 = 1 << 9;
/// Both with `leave` in front, up to eight bytes.
const LEAVE_AND_COMPARE: u64 = 0x08_7f81_49c9;
const LEAVE_AND_COMPARE_SHORT: u64 = 0x08_7f83_49c9;
const LEAVE_AND_COMPARE_BYTES: u64 = 9;
const LEAVE_AND_COMPARE_SHORT_BYTES: u64 = 6;
/// `jne 1f; ret`, where the jump is behind.
const NOT_EQUAL: u64 = 0x850f;
const BRANCH: u64 = 0x00c3_0000_0001_850f;
const BRANCH_MASK: u64 = u64::MAX >> 8;
const BRANCH_BYTES: u64 = 7;

/// What is behind `leave`, and behind each instruction that follows.
const BEHIND_LEAVE: u64 = 0xe7ff_e38b_495f;
const BEHIND_POP: u64 = BEHIND_LEAVE >> 8;
const BEHIND_POP_MASK: u64 = LOW_6 >> 8;
const JUMP_BY_RDI: u64 = BEHIND_LEAVE >> 32;

/// `pop %rdx`, and `jmp` by a register: `ff e0` to `ff e7`, by r8 to r15 with `41` in front.
const POP_RDX: u64 = 0x5a;
const POPS: u64 = POP_RDX << 8 | POP_RBP;

/// Whether code begins with `jmp` by a register.
#[inline(always)]
const fn jumps_by_register(code: u64) -> bool {
    let code = if code & 0xff == 0x41 { code >> 8 } else { code };
    code & 0xf8ff == 0xe0ff
}

/// Whether `leave` and the comparison are in front of `address`.
#[inline(always)]
fn is_behind_comparison<M: StackMemory>(address: u64, memory: &M) -> bool {
    let long = memory.word(address.wrapping_sub(LEAVE_AND_COMPARE_BYTES));
    let short = memory.word(address.wrapping_sub(LEAVE_AND_COMPARE_SHORT_BYTES));
    long == Some(LEAVE_AND_COMPARE) || short.is_some_and(|word| word & LOW_6 == LEAVE_AND_COMPARE_SHORT)
}

impl Registers {
    /// The caller, if the innermost instruction, which begins with `code`, is one of these.
    #[inline(always)]
    pub(super) fn caller_of_left_frame<M: StackMemory>(
        &self,
        code: u64,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        let (rsp, rbp) = (self.general[DWARF_RSP as usize], self.get(DWARF_RBP)?);
        let before = |bytes: u64| memory.word(self.rip.wrapping_sub(bytes));
        let is_on_stack = if code & LOW_4 & !IS_SHORT == COMPARE {
            byte_before(self.rip, memory) == LEAVE
        } else if code & LOW_2 == NOT_EQUAL {
            is_behind_comparison(self.rip, memory)
        } else if code & 0xff == JUMP {
            before(BRANCH_BYTES).is_some_and(|word| word & BRANCH_MASK == BRANCH)
                && is_behind_comparison(self.rip.wrapping_sub(BRANCH_BYTES), memory)
        } else if code & 0xff == POP_RDX {
            byte_before(self.rip, memory) == POP_RBP && jumps_by_register(code >> 8)
        } else {
            code & LOW_6 == BEHIND_LEAVE && byte_before(self.rip, memory) == LEAVE
        };
        if is_on_stack {
            return self.caller_at(rsp, rbp, memory);
        }
        let (register, stack_pointer) = if code & BEHIND_POP_MASK == BEHIND_POP {
            (DWARF_RDI, self.get(DWARF_R11)?)
        } else if code & LOW_2 == JUMP_BY_RDI && before(4).is_some_and(|word| word & LOW_6 == BEHIND_LEAVE) {
            (DWARF_RDI, rsp)
        } else if jumps_by_register(code) && before(2).is_some_and(|word| word & LOW_2 == POPS) {
            (DWARF_RDX, rsp)
        } else {
            return Ok(None);
        };
        let address = self.get(register)?;
        Ok(Some(Candidate { address, stack_pointer, frame_pointer: rbp, is_caller: true }))
    }
}
