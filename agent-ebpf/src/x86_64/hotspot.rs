//! Where the caller is in code of HotSpot: its interpreter, and how the methods end that its compilers make.
//!
//! # Why this shape
//! The interpreter keeps a frame pointer in rbp, but its code is a function only on paper: one piece for each bytecode, jumped
//! to by a table, with one prologue for all, some hundred kilobytes away. And what it calls returns to an address
//! that it pushed, with no call in front. What tells its code is what it does to get on: it takes the next
//! bytecode by r13, or keeps r13 and the stack pointer in words of its frame, which lie below rbp. Where an instruction
//! ahead does that, with nothing on the way that gives rbp another value or leaves, rbp is the frame's own.
//! On the way into a method and back out of it, for some instructions, the return address is in a register; there the
//! instructions name it.
//!
//! Where nothing ahead says so, HotSpot itself does: what it makes has a header in front, [`code_blob`]. Its stubs share one, [`stub`].
//!
//! Layout and instructions are those of OpenJDK 17 (`frame_x86.hpp`, `templateInterpreterGenerator_x86.cpp`,
//! `interp_masm_x86.cpp`, `templateTable_x86.cpp`, `x86_64.ad`). Where others differ, nothing is proved.

use windlass_schema::StopReason;
use windlass_schema::record::{DWARF_RBP, DWARF_RSP};

use self::code_blob::{JUMPS_BEHIND_POP, NOTHING_AHEAD};
use super::frame_pointer::{byte_before, is_zero};
use super::registers::Registers;
use crate::frame_pointer::{Candidate, CodeWithoutTable, Search};
use crate::memory::StackMemory;

/// The search goes on through the code ahead.
pub(super) const AHEAD: u32 = 4;
/// It goes back to the header in front of the code.
pub(super) const TO_HEADER: u32 = 5;
/// It goes back to the beginning of a stub.
pub(super) const IN_STUB: u32 = 6;
/// It goes on to the end of a barrier.
pub(super) const TO_BARRIER_END: u32 = 8;
/// It goes back to what may begin one.
pub(super) const TO_BARRIER: u32 = 9;

/// How far ahead of an instruction that is being run it is looked, in bytes: pieces of the interpreter have up to some
/// hundred up to where they end or go on elsewhere.
const MAX_BYTES_AHEAD: u64 = 1024;
/// The same of a return address, in bytes: behind a call of the interpreter's into the runtime, the bytecode's
/// address is restored at once.
const MAX_BYTES_AHEAD_OF_CALLER: u64 = 128;
/// From the return address's `pop %rax` to its `push %rax`, in bytes, where a method's locals are made.
const MAX_BYTES_OF_LOCALS: u64 = 23;

const DWARF_RAX: u8 = 0;
const DWARF_RBX: u8 = 3;
const DWARF_R13: u8 = 13;

/// Seen on the way: a byte that may be `ret`.
const RETURN: u64 = 4;
/// Seen on the way: the return address's `pop %rax`.
const POP: u64 = 8;

const LOW_2: u64 = 0xffff;
const LOW_3: u64 = 0xff_ffff;
const LOW_4: u64 = 0xffff_ffff;
const LOW_5: u64 = 0xff_ffff_ffff;
const LOW_6: u64 = 0xffff_ffff_ffff;

/// Where a method returns to that the interpreter has called: `mov -0x10(%rbp), %rsp; movq $0, -0x10(%rbp)`, the first
/// eight bytes. It puts the stack pointer back that it had kept for the time of the call.
const RETURN_ENTRY: u64 = 0xf045_c748_f065_8b48;

/// `mov %r13, -0x10(%rbp)` keeps the stack pointer, in front of the jump to a method.
const KEEP_STACK_POINTER: u64 = 0xf06d_894c;
/// `mov %r13, -0x40(%rbp)` keeps the bytecode's address, and `mov -0x40(%rbp), %r13` takes it back.
const KEEP_BYTECODE: u64 = 0xc06d_894c;
const TAKE_BYTECODE: u64 = 0xc06d_8b4c;
/// `movzbl n(%r13), %ebx` takes the next bytecode; n is below 8.
const NEXT_BYTECODE: u64 = 0x5db6_0f41;
const NEXT_BYTECODE_MASK: u64 = 0xf8_ffff_ffff;

/// `mov n, %r10`, ten bytes, and `jmp *(%r10, %rbx, 8)` to the code of the next bytecode. Compiled code has its tables
/// near enough to take their addresses from rip.
const MOVE_TO_R10: u64 = 0xba49;
const MOVE_TO_R10_BYTES: u64 = 10;
const DISPATCH: u64 = 0xda24_ff41;

/// `push %rax; push %rbp; mov %rsp, %rbp`: an interpreted method's frame.
const BUILD: u64 = 0xec_8b48_5550;
/// `pop %rax; lea n(%rsp, %rcx, 8), %r14`, the address of the locals.
const TAKE_RETURN_ADDRESS: u64 = 0x748d_4c58;
/// `push %rbp; mov %rsp, %rbp`.
const PROLOGUE: u64 = 0xec8b_4855;
/// `leave; pop %r13; mov %rbx, %rsp; jmp *%r13`: an interpreted method returns, with its caller's rsp in rbx. Its first
/// two instructions, and those behind each.
pub(super) const LEAVE: u64 = 0x5d_41c9;
const BEHIND_LEAVE: u64 = 0xe5ff_41e3_8b48_5d41;
const BEHIND_POP: u64 = BEHIND_LEAVE >> 16;
const JUMP_BY_R13: u64 = BEHIND_LEAVE >> 40;
/// `mov %eax, -n(%rsp)` and `push %rbp`: a compiled method makes sure that there is a stack.
const TOUCH_STACK: u64 = 0x24_8489;
const PUSH_RBP: u64 = 0x55;
/// `sub n, %rsp; mov %rbp, m(%rsp)`: the same of one that needs little. Then `mov %rsp, %rbp; add m, %rbp`.
const TAKE_FRAME: u64 = 0xec_8148;
const TAKE_FRAME_BYTES: u64 = 7;
const SAVE_RBP: u64 = 0x246c_8948;
const SAVE_RBP_BYTES: u64 = 5;
const SET_RBP: u64 = 0xec_8b48;
const SET_RBP_BYTES: u64 = 3;
const RAISE_RBP: u64 = 0xc5_8348;
/// `mov %r10, n(%r15)`, behind `mov n, %r10` of ten bytes and in front of `jmp`: a compiled
/// method that has to wait does so
/// behind its epilogue.
const WAIT: u64 = 0x97_894d;
const WAIT_BYTES: u64 = 7;
const JUMP: u64 = 0xe9;
/// `pop %rbp`, then `cmp n(%r15), %rsp`, `ja`, `ret`: a compiled method looks whether it has to wait before it returns.
const POP_RBP: u64 = 0x5d;
const COMPARE: u64 = 0xa7_3b49;
const COMPARE_BYTES: u64 = 7;
const ABOVE: u64 = 0x870f;
const RET: u64 = 0xc3;

/// Whether the interpreter comes back from a method at `address`.
#[inline(always)]
pub(super) fn returns_to_interpreter<M: StackMemory>(address: u64, memory: &M) -> bool {
    memory.word(address) == Some(RETURN_ENTRY)
}

/// Whether `mov %rbp, n(%rsp)` begins there, with n below 128.
#[inline(always)]
const fn saves_rbp(code: u64) -> bool {
    code & LOW_4 == SAVE_RBP && code >> 39 & 1 == 0
}

/// What eight bytes of code look like, wherever an instruction may begin: a bit for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Signs {
    /// rbp is that of the interpreter's frame.
    own: u64,
    /// The same, if r10 has the address of a table.
    dispatches: u64,
    /// A frame is built or left.
    elsewhere: u64,
    /// The interpreter builds a method's frame.
    builds: u64,
    returns: u64,
    pops: u64,
}

impl Signs {
    /// Of `bytes`. `behind` are those that follow.
    #[inline(always)]
    const fn of(bytes: u64, behind: u64) -> Self {
        let (mut bytes, mut behind) = (bytes, behind);
        let mut signs = Self { own: 0, dispatches: 0, elsewhere: 0, builds: 0, returns: 0, pops: 0 };
        let mut at = 0;
        while at < 8 {
            let four = bytes & LOW_4;
            let own = is_zero(four ^ KEEP_STACK_POINTER)
                | is_zero(four ^ KEEP_BYTECODE)
                | is_zero(four ^ TAKE_BYTECODE)
                | is_zero(bytes & NEXT_BYTECODE_MASK ^ NEXT_BYTECODE);
            // Jumps to what a register holds: `ff e0` to `ff e7`.
            let elsewhere =
                is_zero(four ^ PROLOGUE) | is_zero(bytes & LOW_3 ^ LEAVE) | is_zero(bytes & 0xf8ff ^ 0xe0ff);
            signs.own |= own << at;
            signs.dispatches |= is_zero(four ^ DISPATCH) << at;
            signs.elsewhere |= elsewhere << at;
            signs.builds |= is_zero(bytes & LOW_5 ^ BUILD) << at;
            signs.returns |= is_zero(bytes & 0xff ^ RET) << at;
            signs.pops |= is_zero(four ^ TAKE_RETURN_ADDRESS) << at;
            bytes = bytes >> 8 | behind << 56;
            behind >>= 8;
            at += 1;
        }
        signs
    }

    /// The bit of the first byte that says where rbp points. 0 if none does.
    #[inline(always)]
    const fn first(self) -> u64 {
        let telling = self.own | self.dispatches | self.elsewhere | self.builds;
        telling & telling.wrapping_neg()
    }

    /// What is to be remembered of the bytes in front of that of `first`.
    #[inline(always)]
    const fn seen(self, first: u64) -> u64 {
        // All of them, if it is 0.
        let before = first.wrapping_sub(1);
        (is_zero(self.returns & before) ^ 1) * RETURN | (is_zero(self.pops & before) ^ 1) * POP
    }
}

impl Registers {
    /// The caller where `address` is its return address, in a register, and this its rsp.
    #[inline(always)]
    fn caller_by_register(&self, address: u64, stack_pointer: u64) -> Result<Option<Candidate>, StopReason> {
        let frame_pointer = self.get(DWARF_RBP)?;
        Ok(Some(Candidate { address, stack_pointer, frame_pointer, is_caller: true }))
    }

    /// What the instruction at the innermost address says, where a method is entered or left.
    #[inline(always)]
    pub(super) fn caller_by_method_end<M: StackMemory>(
        &self,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        let Some(code) = memory.word(self.rip) else { return Ok(None) };
        let rsp = self.general[DWARF_RSP as usize];
        if code & 0xff == POP_RBP && code >> 8 & LOW_3 == COMPARE {
            let Some(saved) = memory.word(rsp) else { return Err(memory.unreadable(rsp)) };
            return self.caller_at(rsp.wrapping_add(8), saved, memory);
        }
        let is_compare = code & LOW_3 == COMPARE && byte_before(self.rip, memory) == POP_RBP;
        let is_above = code & LOW_2 == ABOVE
            && code >> 48 & 0xff == RET
            && memory.word(self.rip.wrapping_sub(COMPARE_BYTES)).is_some_and(|word| word & LOW_3 == COMPARE);
        let is_entry = code & LOW_3 == TOUCH_STACK && code >> 56 == PUSH_RBP
            || code & LOW_3 == TAKE_FRAME
                && memory.word(self.rip.wrapping_add(TAKE_FRAME_BYTES)).is_some_and(saves_rbp);
        if is_compare || is_above || is_entry || self.waits(code, memory) {
            return self.caller_at(rsp, self.get(DWARF_RBP)?, memory);
        }
        if code == BEHIND_LEAVE {
            let found = self.caller_at(rsp, self.get(DWARF_RBP)?, memory)?;
            let stack_pointer = self.get(DWARF_RBX)?;
            return Ok(found.map(|caller| Candidate { stack_pointer, ..caller }));
        }
        if let Some(saved) = self.saving_rbp(code, memory) {
            let at = rsp.wrapping_add(saved);
            let is_set = code & LOW_3 == RAISE_RBP;
            let frame_pointer = if is_set { memory.word(at) } else { Some(self.get(DWARF_RBP)?) };
            let Some(frame_pointer) = frame_pointer else { return Err(memory.unreadable(at)) };
            return self.caller_at(at.wrapping_add(8), frame_pointer, memory);
        }
        let left = self.caller_of_left_frame(code, memory)?;
        if left.is_some() {
            return Ok(left);
        }
        let is_jump = code & LOW_3 == JUMP_BY_R13
            && memory.word(self.rip.wrapping_sub(3)).is_some_and(|word| word & LOW_6 == BEHIND_POP);
        if is_jump || code & LOW_6 == BEHIND_POP {
            let stack_pointer = if is_jump { rsp } else { self.get(DWARF_RBX)? };
            return self.caller_by_register(self.get(DWARF_R13)?, stack_pointer);
        }
        Ok(None)
    }

    /// Whether the innermost instruction is of those by which a compiled method waits before it returns: they name the
    /// one that looked whether it has to.
    #[inline(always)]
    fn waits<M: StackMemory>(&self, code: u64, memory: &M) -> bool {
        let bytes_done = if code & LOW_2 == MOVE_TO_R10 {
            0
        } else if code & LOW_3 == WAIT {
            MOVE_TO_R10_BYTES
        } else if code & 0xff == JUMP {
            MOVE_TO_R10_BYTES + WAIT_BYTES
        } else {
            return false;
        };
        let start = self.rip.wrapping_sub(bytes_done);
        let begins = |at: u64, mask: u64, with: u64| memory.word(at).is_some_and(|word| word & mask == with);
        let Some(looked) = memory.word(start.wrapping_add(2)) else { return false };
        begins(start, LOW_2, MOVE_TO_R10)
            && begins(start.wrapping_add(MOVE_TO_R10_BYTES), LOW_3, WAIT)
            && begins(looked, LOW_3, COMPARE)
    }

    /// Where from rsp a small method's frame has saved rbp, or does now, from the `mov` that does up to the `add`.
    #[inline(always)]
    fn saving_rbp<M: StackMemory>(&self, code: u64, memory: &M) -> Option<u64> {
        let bytes_done = if saves_rbp(code) {
            0
        } else if code & LOW_3 == SET_RBP {
            SAVE_RBP_BYTES
        } else if code & LOW_3 == RAISE_RBP {
            SAVE_RBP_BYTES + SET_RBP_BYTES
        } else {
            return None;
        };
        let save = self.rip.wrapping_sub(bytes_done);
        let [taken, saving, behind] = [
            memory.word(save.wrapping_sub(TAKE_FRAME_BYTES))?,
            memory.word(save)?,
            memory.word(save.wrapping_add(SAVE_RBP_BYTES))?,
        ];
        let saved = saving >> 32 & 0x7f;
        let is_taken = taken & LOW_3 == TAKE_FRAME && taken >> 24 & LOW_4 == saved + 8 && saves_rbp(saving);
        // The same as a `push`, and then `mov`: rbp points at what is saved once it is raised by as much.
        let is_set = behind & LOW_3 == SET_RBP && behind >> 24 & LOW_4 == RAISE_RBP | saved << 24;
        (is_taken && (bytes_done == 0 || is_set)).then_some(saved)
    }

    /// Looks at the next eight bytes of code. What proves nothing leaves it to the code in front of the address.
    #[inline(always)]
    pub(super) fn look_ahead<M: StackMemory>(
        &self,
        search: &mut Search,
        code: &CodeWithoutTable,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        let distance = search.at.wrapping_sub(self.rip);
        let most = if self.exact != 0 { MAX_BYTES_AHEAD } else { MAX_BYTES_AHEAD_OF_CALLER };
        let Some([bytes, behind]) = memory.words(search.at).filter(|_| distance < most) else {
            let seen = if self.exact != 0 { 0 } else { NOTHING_AHEAD };
            return self.search_header(search, seen);
        };
        let signs = Signs::of(bytes, behind);
        let first = signs.first();
        search.seen |= signs.seen(first);
        if first == 0 {
            search.at = search.at.wrapping_add(8);
            return Ok(None);
        }
        let at = search.at.wrapping_add(first.wrapping_sub(1).count_ones().into());
        let is_own = signs.own & first != 0
            || signs.dispatches & first != 0
                && memory
                    .word(at.wrapping_sub(MOVE_TO_R10_BYTES))
                    .is_some_and(|word| word & LOW_2 == MOVE_TO_R10);
        if is_own && search.seen & RETURN == 0 {
            return self.caller_of_interpreted(memory);
        }
        if self.exact == 0 {
            return self.search_header(search, 0);
        }
        if is_own {
            return self.search_stack(search);
        }
        if signs.builds & first == 0 || search.seen & RETURN != 0 {
            return self.search_header(search, 0);
        }
        let rsp = self.general[DWARF_RSP as usize];
        if search.seen & POP == 0 {
            let is_near =
                distance.wrapping_add(first.wrapping_sub(1).count_ones().into()) < MAX_BYTES_OF_LOCALS;
            return if is_near {
                self.caller_by_register(self.get(DWARF_RAX)?, self.get(DWARF_R13)?)
            } else {
                Err(code.unproved)
            };
        }
        // Whoever jumped here from the interpreter left its stack pointer in r13, above the return address.
        if self.get(DWARF_R13)? != rsp.wrapping_add(8) {
            return Err(code.unproved);
        }
        self.caller_at(rsp, self.get(DWARF_RBP)?, memory)
    }

    /// Starts with the code ahead.
    #[inline(always)]
    pub(super) fn search_ahead<M: StackMemory>(
        &self,
        search: &mut Search,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        // Not worth a search ahead where rbp cannot point at a frame.
        let rbp = self.get(DWARF_RBP)?;
        if self.jumps_behind_pop(memory) {
            return self.search_header(search, JUMPS_BEHIND_POP);
        }
        if rbp < self.general[DWARF_RSP as usize] || rbp & 7 != 0 {
            return self.search_header(search, 0);
        }
        (search.phase, search.at, search.seen) = (AHEAD, self.rip, 0);
        Ok(None)
    }
}

mod barrier;
mod code_blob;
mod left_frame;
mod stub;
