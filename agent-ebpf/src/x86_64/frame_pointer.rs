//! Whether rbp is the frame pointer of a frame in code without a table.
//!
//! A function that keeps a frame pointer begins with `push %rbp; mov %rsp, %rbp`, perhaps behind a few checks, and
//! ends with `leave; ret` or `pop %rbp; ret`. In between, CFA = rbp + 16.
//!
//! # What is certain
//! 1. At some instructions (the innermost frame's address is that of one) the caller is known: `ret` takes it from rsp,
//!    a prologue's `push` and an epilogue's `pop` from beside it, and `leave` is run in a frame of rbp.
//! 2. Behind a prologue, with no other ahead, a function is in its body where no word from rsp up to rbp is a return address: its
//!    own lies on the stack, at rsp or above. What stands between the prologue and the address may look like nothing but that
//!    function and yet be the end of one, by a call that does not return or a jump, and the beginning of another without a frame.
//!
//! There the innermost frame may have its return address in a register (musl's `vfork`, and V8's functions
//! that move arguments). Those have no prologue. So what looks like a function's end in front of the
//! innermost address is too much doubt, and so is an instruction that gives rsp another value, or a frame that is being moved
//! ([`moved_frame`]).
//!
//! In all these cases a prologue that is not a function's first push proves nothing: V8 builds the frame of another function so,
//! and GCC one that is realigned, whose CFA is not at rbp + 16.
//!
//! Of code of a JIT compiler that keeps frame pointers in all functions more is certain:
//!
//! 3. Behind a prologue, with no bytes in between that could be of an epilogue, or of padding or a last call in front of another
//!    function, a function is in its body.
//! 4. Callers, where V8's frame is at rbp: with a context or the frame's kind below what is saved
//!    (src/execution/frame-constants.h).
//! 5. The innermost frame, where V8's own objects say where the function starts, and it begins in a known way: [`code_object`].
//! 6. The same, where the second case holds without a prologue: V8's baseline code calls a function that builds the frame.
//!
//! In a process with that compiler, memory that is not laid out as its own may be another's: then the fourth case holds where the
//! second does too, and the third and sixth not at all.
//!
//! Of others:
//!
//! 7. Callers in modules that wasmtime compiled, and the innermost frame as in the sixth case: [`wasm_module`].
//! 8. CPython's trampolines, at each of their instructions: [`trampoline`].
//!
//! In an image, code that keeps frame pointers has rows wherever its frame is known; the rest is as doubtful as any.
//!
//! Each caller's address has to lie in executable memory, behind a call. A return address that an earlier call left in the
//! frame makes a stop, not a frame.

use windlass_schema::StopReason;
use windlass_schema::record::{DWARF_RBP, DWARF_RSP};

use super::hotspot::{
    AHEAD, IN_STUB, LEAVE as LEAVE_INTERPRETED, TO_BARRIER, TO_BARRIER_END, TO_HEADER, returns_to_interpreter,
};
use super::registers::Registers;
use crate::frame_pointer::{Candidate, CodeWithoutTable, FramePointers, Search};
use crate::memory::StackMemory;
use signs::Signs;
use wasm_module::is_wasm_module;

/// The search goes back through the code.
const IN_CODE: u32 = 1;
/// The search goes up the stack.
const ON_STACK: u32 = 2;
/// The search goes back to where the function starts.
const IN_OBJECT: u32 = 3;
/// The search goes back through the code of a module of wasmtime.
const IN_MODULE: u32 = 7;
/// No two are the same.
const _: () = {
    let all =
        [IN_CODE, ON_STACK, IN_OBJECT, IN_MODULE, AHEAD, TO_HEADER, IN_STUB, TO_BARRIER_END, TO_BARRIER];
    let (mut bits, mut at) = (1 << Search::NONE, 0u32);
    while (at as usize) < all.len() {
        bits |= 1u32 << all[at as usize];
        at += 1;
    }
    assert!(bits.count_ones() == at + 1);
};

/// Seen on the way: bytes that may be of an epilogue, or of padding.
const DOUBT: u64 = 1;
/// Seen on the way: bytes that may be a function's last.
const FUNCTION_END: u64 = 2;

/// How far in front of an address its function's prologue is looked for, in bytes: compiled JavaScript has functions
/// of some kilobytes, and each turn of the search takes eight.
const MAX_CODE_BYTES: u64 = 4096;

/// Stands for instructions that have not been run: of no meaning behind others, and no displacement.
const NOT_RUN: u64 = 1;

/// What compilers align functions to.
const FUNCTION_ALIGNMENT: u64 = 16;

/// `push %rbp`.
const PUSH_RBP: u64 = 0x55;
/// `mov %rsp, %rbp` in its two encodings.
const SET_RBP: [u64; 2] = [0xe5_8948, 0xec_8b48];
/// `ret` and `ret n`.
const RET: u64 = 0xc3;
const RET_POPPING: u64 = 0xc2;
/// `leave`.
const LEAVE: u64 = 0xc9;
/// `pop %rbp`.
const POP_RBP: u64 = 0x5d;
/// `int3`, and `nop`. The longer forms of that begin with `0f`, `66` or `2e`, and end with a displacement of 0.
const TRAP: u64 = 0xcc;
const NOP: u64 = 0x90;

/// 1 if `value`, below 2^63, is 0, else 0; without a branch, of which the verifier follows both sides.
#[inline(always)]
pub(super) const fn is_zero(value: u64) -> u64 {
    value.wrapping_sub(1) >> 63
}

/// 1 if `byte` is one of `bytes`, else 0.
#[inline(always)]
const fn is_among<const N: usize>(byte: u64, bytes: [u64; N]) -> u64 {
    let (mut is_one, mut at) = (0, 0);
    while at < N {
        is_one |= is_zero(byte ^ bytes[at]);
        at += 1;
    }
    is_one
}

/// The byte in front of `address`. 0 if it cannot be read.
#[inline(always)]
pub(super) fn byte_before<M: StackMemory>(address: u64, memory: &M) -> u64 {
    // Of a word that does not leave the page, so that it can be read where this is the mapping's second byte.
    let before = address.wrapping_sub(1);
    memory.word(before & !7).map_or(0, |word| word >> (8 * (before & 7)) & 0xff)
}

/// Whether the prologue at `address` is behind a `pop`, which takes the return address from the stack first, as V8's
/// function does that builds the frame of another; or behind `push -8(%r10)`, which has another pushed, as GCC
/// does when it realigns a frame: then the caller's rsp is not above.
#[inline(always)]
fn is_other_prologue<M: StackMemory>(address: u64, memory: &M) -> bool {
    let last = byte_before(address, memory);
    let is_push = || {
        byte_before(address.wrapping_sub(1), memory) & 0xf8 == 0x70
            && byte_before(address.wrapping_sub(2), memory) == 0xff
    };
    last & 0xf8 == 0x58 || last == 0xf8 && is_push()
}

/// Whether a prologue begins among the bytes at `address`: then no frame is built yet, whatever is in front.
#[inline(always)]
fn is_before_prologue<M: StackMemory>(address: u64, memory: &M) -> bool {
    memory.words(address).is_some_and(|[bytes, behind]| Signs::of(bytes, behind, address).prologues != 0)
}

#[inline(always)]
fn is_return(code: u64) -> bool {
    code & 0xff == RET || code & 0xff == RET_POPPING || code & 0xffff == RET << 8 | 0xf3
}

#[inline(always)]
fn sets_rbp(code: u64) -> bool {
    code & 0xff_ffff == SET_RBP[0] || code & 0xff_ffff == SET_RBP[1]
}

/// Whether an instruction gives rsp another value than pushes and pops do, or returns to an address that is in a
/// register up to then: `lea ..., %rsp`, `push ...; ret`.
#[inline(always)]
fn moves_return_address(code: u64) -> bool {
    let (first, second) = (code & 0xff, code >> 8 & 0xff);
    let loads_rsp = first & 0xfc == 0x48 && second == 0x8d && code >> 16 & 0x38 == 0x20;
    let pushes = first & 0xf8 == 0x50 && is_return(code >> 8);
    let pushes_high = first == 0x41 && second & 0xf8 == 0x50 && is_return(code >> 16);
    loads_rsp || pushes || pushes_high
}

/// Whether a JIT compiler made the code whose functions all keep frame pointers.
#[inline(always)]
fn is_of_known_compiler(code: &CodeWithoutTable) -> bool {
    code.keeps_frame_pointers && code.is_of_known_jit
}

/// Whether that compiler may have made it.
#[inline(always)]
fn may_be_of_known_compiler(code: &CodeWithoutTable) -> bool {
    code.keeps_frame_pointers && code.is_jit
}

/// Whether a JIT compiler made the code that is not the one that is known.
#[inline(always)]
fn is_of_other_compiler(code: &CodeWithoutTable) -> bool {
    code.is_jit && !code.is_of_known_jit
}

/// Whether a JIT compiler made the code of which nothing more is known.
#[inline(always)]
fn is_of_unknown_compiler(code: &CodeWithoutTable) -> bool {
    code.is_jit && !code.keeps_frame_pointers
}

impl Registers {
    /// The caller by what lies at `at` on the stack: its address.
    #[inline(always)]
    pub(super) fn caller_at<M: StackMemory>(
        &self,
        at: u64,
        frame_pointer: u64,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        let Some(address) = memory.word(at) else { return Err(memory.unreadable(at)) };
        let stack_pointer = at.wrapping_add(8);
        Ok(Some(Candidate { address, stack_pointer, frame_pointer, is_caller: true }))
    }

    /// The caller by the frame pointer.
    #[inline(always)]
    pub(super) fn caller_by_frame_pointer<M: StackMemory>(
        &self,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        let rbp = self.get(DWARF_RBP)?;
        if rbp < self.general[DWARF_RSP as usize] || rbp & 7 != 0 {
            return Err(StopReason::FramePointer);
        }
        let Some([frame_pointer, address]) = memory.words(rbp) else { return Err(memory.unreadable(rbp)) };
        let stack_pointer = rbp.wrapping_add(16);
        Ok(Some(Candidate { address, stack_pointer, frame_pointer, is_caller: true }))
    }

    /// What the instruction at the innermost address says.
    #[inline(always)]
    fn caller_by_instruction<M: StackMemory>(
        &self,
        unproved: StopReason,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        let Some(code) = memory.word(self.rip) else { return Err(unproved) };
        let dropping = self.caller_dropping_arguments(memory)?;
        if dropping.is_some() {
            return Ok(dropping);
        }
        let rsp = self.general[DWARF_RSP as usize];
        let first = code & 0xff;
        if first == PUSH_RBP && sets_rbp(code >> 8) && is_other_prologue(self.rip, memory) {
            return Err(unproved);
        }
        if is_return(code) || first == PUSH_RBP && sets_rbp(code >> 8) {
            return self.caller_at(rsp, self.get(DWARF_RBP)?, memory);
        }
        let push = self.rip.wrapping_sub(1);
        let is_pushed = sets_rbp(code) && byte_before(self.rip, memory) == PUSH_RBP;
        if is_pushed && is_other_prologue(push, memory) {
            return Err(unproved);
        }
        if is_pushed || first == POP_RBP && is_return(code >> 8) {
            let Some(saved) = memory.word(rsp) else { return Err(memory.unreadable(rsp)) };
            if is_pushed && saved != self.get(DWARF_RBP)? {
                return Err(unproved);
            }
            return self.caller_at(rsp.wrapping_add(8), saved, memory);
        }
        if first == LEAVE {
            let is_interpreter = code & 0xff_ffff == LEAVE_INTERPRETED;
            return if is_interpreter {
                self.caller_of_interpreted(memory)
            } else {
                self.caller_by_frame_pointer(memory)
            };
        }
        if moves_return_address(code) { Err(unproved) } else { Ok(None) }
    }

    /// Looks at eight bytes of code in front of where the search has come to. What proves nothing is an error.
    #[inline(always)]
    fn look_at_code<M: StackMemory>(
        &self,
        search: &mut Search,
        code: &CodeWithoutTable,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        if search.at <= code.start || self.rip.wrapping_sub(search.at) >= MAX_CODE_BYTES {
            return self.without_prologue(search, code);
        }
        // What stands at the address itself has not been run yet.
        let is_first = is_zero(self.rip.wrapping_sub(search.at));
        if is_first != 0 && self.exact != 0 && self.may_be_in_moved_frame(code, memory)? {
            return Err(code.unproved);
        }
        // The first bytes of a mapping are looked at with what is behind them.
        let count = (search.at - code.start).min(8);
        let at = search.at.wrapping_sub(count);
        let Some([bytes, behind]) = memory.words(at) else { return Err(code.unproved) };
        let behind = behind & is_first.wrapping_sub(1) | is_first * NOT_RUN;
        let signs = Signs::of(bytes, behind, at).first(count);
        search.at = at;
        search.seen |= signs.seen();
        let is_known = search.phase == IN_MODULE || is_of_known_compiler(code);
        if is_known && signs.is_behind_padding() {
            return self.search_stack(search);
        }
        if signs.prologues == 0 {
            return Ok(None);
        }
        if is_other_prologue(at.wrapping_add(signs.last_prologue()), memory) {
            return Err(code.unproved);
        }
        match search.seen {
            0 if is_known => self.caller_by_frame_pointer(memory),
            seen if self.exact != 0 && seen & FUNCTION_END != 0 && !is_known => Err(code.unproved),
            _ => self.search_stack(search),
        }
    }

    /// What is left to look at where no prologue was met.
    #[inline(always)]
    fn without_prologue(
        &self,
        search: &mut Search,
        code: &CodeWithoutTable,
    ) -> Result<Option<Candidate>, StopReason> {
        let is_known = search.phase == IN_MODULE || is_of_known_compiler(code);
        if is_known { self.search_stack(search) } else { Err(code.unproved) }
    }

    /// Goes on with the words on the stack.
    #[inline(always)]
    pub(super) fn search_stack(&self, search: &mut Search) -> Result<Option<Candidate>, StopReason> {
        search.phase = ON_STACK;
        search.at = self.general[DWARF_RSP as usize];
        Ok(None)
    }

    /// Looks at the next word from rsp up to rbp.
    #[inline(always)]
    fn look_at_stack<M: StackMemory>(
        &self,
        search: &mut Search,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        let at = search.at;
        if at >= self.get(DWARF_RBP)? {
            return self.caller_by_frame_pointer(memory);
        }
        let Some(address) = memory.word(at) else { return Err(memory.unreadable(at)) };
        search.at = at.wrapping_add(8);
        Ok(Some(Candidate { address, stack_pointer: 0, frame_pointer: 0, is_caller: false }))
    }
}

impl FramePointers for Registers {
    #[inline(always)]
    fn look_for_caller<M: StackMemory>(
        &self,
        search: &mut Search,
        code: &CodeWithoutTable,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        if search.left == 0 {
            return Err(StopReason::FramePointer);
        }
        search.left -= 1;
        match search.phase {
            Search::NONE => {
                if self.exact != 0 {
                    let caller = self.caller_by_instruction(code.unproved, memory)?;
                    if caller.is_some() {
                        return Ok(caller);
                    }
                }
                if is_of_other_compiler(code) {
                    let caller = self.caller_of_trampoline(memory)?;
                    if caller.is_some() {
                        return Ok(caller);
                    }
                    if is_wasm_module(code, memory) {
                        return self.caller_in_module(search, code, memory);
                    }
                }
                if self.exact != 0 {
                    if may_be_of_known_compiler(code) {
                        return self.search_object(search);
                    }
                    if is_of_unknown_compiler(code) {
                        let caller = self.caller_by_method_end(memory)?;
                        if caller.is_some() {
                            return Ok(caller);
                        }
                    }
                    if code.keeps_frame_pointers {
                        let caller = self.caller_copying_arguments(memory)?;
                        if caller.is_some() {
                            return Ok(caller);
                        }
                    }
                } else if may_be_of_known_compiler(code) && self.is_in_v8_frame(memory) {
                    // Code of another has its return address below V8's frame.
                    return if is_of_known_compiler(code) {
                        self.caller_by_frame_pointer(memory)
                    } else {
                        self.search_stack(search)
                    };
                }
                if is_of_unknown_compiler(code) {
                    return self.search_ahead(search, memory);
                }
                self.search_code(search, code.unproved, memory)
            }
            AHEAD => self.look_ahead(search, code, memory),
            TO_HEADER => self.look_for_header(search, code, memory),
            IN_STUB => self.look_at_stub(search, code, memory),
            TO_BARRIER_END => self.look_for_barrier_end(search, memory),
            TO_BARRIER => self.look_for_barrier(search, code, memory),
            IN_CODE | IN_MODULE => self.look_at_code(search, code, memory),
            IN_OBJECT => self.look_at_object(search, code, memory),
            _ => self.look_at_stack(search, memory),
        }
    }

    #[inline(always)]
    fn follows_call<M: StackMemory>(address: u64, memory: &M) -> Option<bool> {
        let is_called = memory.word(address.wrapping_sub(8)).map(ends_with_call)?;
        Some(is_called || returns_to_interpreter(address, memory))
    }

    #[inline(always)]
    fn return_to(&mut self, caller: &Candidate) {
        self.general[DWARF_RSP as usize] = caller.stack_pointer;
        self.general[DWARF_RBP as usize] = caller.frame_pointer;
        self.rip = caller.address;
        self.known = 1 << DWARF_RSP | 1 << DWARF_RBP;
        self.exact = 0;
    }
}

/// Whether the last of eight bytes of code are a near call (Intel SDM, volume 2, CALL): `e8` and a displacement, or `ff`
/// with 2 in the middle of its ModRM byte, of two to seven bytes.
#[inline(always)]
fn ends_with_call(bytes: u64) -> bool {
    let byte = |number: u32| bytes >> (8 * number) & 0xff;
    byte(3) == 0xe8
        || byte(6) == 0xff && call_bytes(byte(7), 0) == 2
        || byte(5) == 0xff && call_bytes(byte(6), byte(7)) == 3
        || byte(4) == 0xff && call_bytes(byte(5), byte(6)) == 4
        || byte(2) == 0xff && call_bytes(byte(3), byte(4)) == 6
        || byte(1) == 0xff && call_bytes(byte(2), byte(3)) == 7
}

/// Length of the call that `ff` begins, with this ModRM byte and what may be a SIB byte; 0 if it is no call.
#[inline(always)]
const fn call_bytes(modrm: u64, sib: u64) -> u64 {
    if modrm & 0x38 != 0x10 {
        return 0;
    }
    let has_sib = (modrm & 7 == 4) as u64;
    match modrm >> 6 {
        0 if modrm & 7 == 5 => 6,
        0 if has_sib != 0 && sib & 7 == 5 => 7,
        0 => 2 + has_sib,
        1 => 3 + has_sib,
        2 => 6 + has_sib,
        _ => 2,
    }
}

mod code_object;
mod moved_frame;
mod signs;
#[cfg(test)]
mod tests;
mod trampoline;
mod wasm_module;
