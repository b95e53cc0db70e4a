//! Which piece of code of HotSpot an address is in, and what is known of its frame.
//!
//! # Why this shape
//! Everything that HotSpot makes at run time is a `CodeBlob`: a compiled method, a stub, the interpreter as one. In front of
//! the code is a header which says where the code starts and ends, so that no other words are taken for one, and how large
//! the frame is. It begins a segment of the code cache (`CodeCacheSegmentSize`), so that only these places are asked.
//!
//! ```text
//! header + 0     length         in segments (HeapBlock::Header, memory/heap.hpp)
//! header + 8     used           1 byte
//! header + 16    CodeBlob       code/codeBlob.hpp
//! header + 36      frame complete   4 bytes: where in the code; -1 where nothing is said of that
//! header + 44      frame size       4 bytes: in words, from the caller's rsp down. 0 if there is more than one function, -1 if
//!                                   it is not said
//! header + 48      code begin
//! header + 56      code end
//! header + 112     name
//! ```
//!
//! A compiled method, and a stub of one function, begin in one of three ways, the first two at a multiple of 16:
//!
//! 1. `mov %eax, -n(%rsp); push %rbp`: makes sure that there is a stack; perhaps `mov %rsp, %rbp`
//! 2. `sub $n, %rsp; mov %rbp, n-8(%rsp)`, perhaps `mov %rsp, %rbp; add $n-8, %rbp`: where n-8 takes one byte, none as it is 0,
//!    or four
//! 3. `push %rbp; mov %rsp, %rbp`: a stub that keeps registers below. Where no size is said (`Runtime1::generate_blob` in
//!    c1_Runtime1.cpp), what such a stub calls returns into its body
//!
//! What takes frames of others away, so that its own is not where it was, begins otherwise: `generate_uncommon_trap_blob` and
//! `generate_deopt_blob` in sharedRuntime_x86_64.cpp, `OptoRuntime::generate_exception_blob`.
//!
//! Of a method that is not to be entered any more the first five bytes are a `jmp` (`NativeJump::patch_verified_entry`); threads
//! that are in it stay.
//!
//! Where that sets rbp, CFA = rbp + 16 from there on, whatever old return addresses the frame is full of. Where it does
//! not (-XX:-PreserveFramePointer), CFA = rsp + 8 * frame size, but where something is pushed for a stub (`push`es in front of
//! the address, `pop`s behind), and in a [`barrier`](super::barrier). Between calls rsp has to be a multiple of 16, as it is in a
//! frame that is complete (StackAlignmentInBytes) and not behind the `pop %rbp` of its end.

use windlass_schema::StopReason;
use windlass_schema::record::{DWARF_RBP, DWARF_RSP};

use super::{
    JUMP, LOW_3, LOW_4, POP_RBP, PROLOGUE, PUSH_RBP, SAVE_RBP, SET_RBP, TAKE_FRAME, TAKE_FRAME_BYTES,
    TO_HEADER, TOUCH_STACK, saves_rbp,
};
use crate::frame_pointer::{Candidate, CodeWithoutTable, Search};
use crate::memory::StackMemory;
use crate::x86_64::Registers;
use crate::x86_64::frame_pointer::{byte_before, is_zero};

/// Where headers may begin, in bytes, and how many of these places each turn asks.
const SEGMENT_BYTES: u64 = 128;
const SEGMENTS: u64 = 4;
/// Farthest header in front of an address, in bytes: the interpreter has 80 kB, few methods more than 64.
const MAX_BITS: u32 = 17;
const MAX_BYTES: u64 = 1 << MAX_BITS;
/// Farthest code behind its header, in bytes: in between are constants, and where the method refers to others.
const MAX_HEADER_BITS: u32 = 14;
/// Largest length of a blob, in segments.
const MAX_LENGTH: u64 = 2 * MAX_BYTES / SEGMENT_BYTES;
/// Largest frame, in words.
const MAX_FRAME_WORDS: u64 = 1 << 16;
/// The size of a frame of which none is said, in words.
const SIZE_NOT_SAID: u64 = 0xffff_ffff;

const CODE_BEGIN: u64 = 48;
const NAME: u64 = 112;

/// What methods begin at a multiple of.
const METHOD_ALIGNMENT: u64 = 16;
/// Largest distance from a method's first instruction, which looks whether it is the right one, to where its frame is
/// complete, in bytes.
const MAX_BYTES_OF_ENTRY: u64 = 128;
/// How many blocks of 16 bytes lie in front of the one in which a method's frame is complete, at most. Where frames are built
/// takes up to 25 bytes; a collector that changes methods has each compare a number and call behind that, 19 bytes aligned
/// to 8 (`BarrierSetAssembler::nmethod_entry_barrier`).
const MAX_BLOCKS_BACK: u64 = 3;
/// What a complete frame is aligned to.
const STACK_ALIGNMENT: u64 = 16;

/// `mov %rbp, (%rsp)`, and `mov %rbp, n(%rsp)` with n of four bytes; behind their first byte.
const SAVE_RBP_AT_0: u64 = 0x24_2c89;
const SAVE_RBP_FAR: u64 = 0x24_ac89;
/// `sub $n, %rsp` with n of one byte.
const TAKE_SMALL_FRAME: u64 = 0xec_8348;
/// Most bytes up to where rbp is set, if `sub` comes first.
const MAX_BYTES_OF_TAKING: u64 = 25;

/// Names' first eight bytes: `vtable chunks`, which look where a method is and jump there; `native signature handlers`,
/// which take arguments from an interpreted method's locals;
const VTABLE: u64 = u64::from_le_bytes(*b"vtable c");
const SIGNATURE: u64 = u64::from_le_bytes(*b"native s");
/// `StubRoutines (1)` and `(2)`, see [`stub`](super::stub).
const STUBS: u64 = u64::from_le_bytes(*b"StubRout");
/// and `Interpreter`.
const INTERPRETER: u64 = u64::from_le_bytes(*b"Interpre");

/// From rbp down to the last word of an interpreted method's frame that is always there, in bytes (`frame_x86.hpp`,
/// `interpreter_frame_initial_sp_offset`).
const INTERPRETER_FRAME_BYTES: u64 = 72;
/// Largest distance of words that the frame points at, in bytes: a method has at most 65,535 locals.
const MAX_LOCALS_BYTES: u64 = 1 << 19;

/// How a search came to look for a header: from a `jmp` behind a `pop %rbp`;
pub(super) const JUMPS_BEHIND_POP: u64 = 1;
/// from a return address, with nothing ahead that leaves or builds a frame.
pub(super) const NOTHING_AHEAD: u64 = 2;

/// How a piece of code begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Beginning {
    Touch,
    Take,
    Prologue,
}

impl Beginning {
    /// Of three words of code, and whether it sets rbp.
    #[inline(always)]
    const fn of([first, second, third]: [u64; 3]) -> Option<(Self, bool)> {
        // Behind a `jmp` is left what the first instruction's number ends with: all bits of a negative one, none of a small one.
        let is_left = first & 0xff == JUMP;
        let builds =
            second & LOW_3 == SET_RBP || second & LOW_3 == TAKE_FRAME || second & LOW_3 == TAKE_SMALL_FRAME;
        let touches = first & LOW_3 == TOUCH_STACK || is_left && first >> 48 & 0xff == 0xff && builds;
        if touches && first >> 56 == PUSH_RBP {
            return Some((Self::Touch, second & LOW_3 == SET_RBP));
        }
        // The second instruction begins with the first word's last byte.
        let takes = first & LOW_3 == TAKE_FRAME || is_left && first >> 40 & 0xffff == 0;
        if takes && first >> 56 == SAVE_RBP & 0xff {
            let behind = if second & LOW_3 == SAVE_RBP_AT_0 {
                second >> 24
            } else if second & LOW_3 == SAVE_RBP_FAR {
                second >> 56 | third << 8
            } else if saves_rbp(first >> 56 | second << 8) {
                second >> 32 | third << 32
            } else {
                return None;
            };
            return Some((Self::Take, behind & LOW_3 == SET_RBP));
        }
        if first & LOW_4 == PROLOGUE {
            return Some((Self::Prologue, true));
        }
        None
    }

    /// The one nearest to `last`, and where: in one of some blocks of a method, or at `last` itself.
    #[inline(always)]
    fn up_to<M: StackMemory>(last: u64, is_method: bool, memory: &M) -> Option<(u64, Self, bool)> {
        let words: [u64; 9] = memory.words(last.wrapping_sub(MAX_BLOCKS_BACK * METHOD_ALIGNMENT))?;
        let mut block = MAX_BLOCKS_BACK;
        loop {
            let at = 2 * block as usize;
            if let Some((beginning, sets_rbp)) = Self::of([words[at], words[at + 1], words[at + 2]]) {
                let entry = last.wrapping_sub((MAX_BLOCKS_BACK - block) * METHOD_ALIGNMENT);
                return Some((entry, beginning, sets_rbp));
            }
            if block == 0 || !is_method {
                return None;
            }
            block -= 1;
        }
    }
}

/// One function, with a frame of its own.
struct Function {
    /// Where it begins.
    entry: u64,
    beginning: Beginning,
    /// Where the frame is complete, or is if nothing is said of that.
    complete: u64,
    sets_rbp: bool,
    frame_bytes: u64,
}

impl Registers {
    /// Goes on with the header in front of the code.
    #[inline(always)]
    pub(super) fn search_header(
        &self,
        search: &mut Search,
        seen: u64,
    ) -> Result<Option<Candidate>, StopReason> {
        (search.phase, search.seen) = (TO_HEADER, seen);
        search.at = self.rip & !(SEGMENT_BYTES - 1);
        Ok(None)
    }

    /// Looks for the header in the next segments back.
    #[inline(always)]
    pub(in crate::x86_64) fn look_for_header<M: StackMemory>(
        &self,
        search: &mut Search,
        code: &CodeWithoutTable,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        if self.rip.wrapping_sub(search.at) >= MAX_BYTES || search.at < code.start {
            return self.search_without_blob(search, code, memory);
        }
        let address = self.rip.wrapping_sub(1 ^ u64::from(self.exact));
        let (mut header, mut found, mut segment) = (search.at, 0, 0);
        while segment < SEGMENTS {
            let [begin, end] = memory.words(header.wrapping_add(CODE_BEGIN)).unwrap_or([0; 2]);
            // Without branches, of which the verifier follows both sides, for each segment.
            let is_near = is_zero(begin.wrapping_sub(header) >> MAX_HEADER_BITS);
            let is_inside = is_zero(address.wrapping_sub(begin) >> MAX_BITS)
                & is_zero(end.wrapping_sub(address).wrapping_sub(1) >> MAX_BITS);
            found |= header & (is_near & is_inside & is_zero(found)).wrapping_neg();
            header = header.wrapping_sub(SEGMENT_BYTES);
            segment += 1;
        }
        search.at = header;
        if found == 0 {
            return Ok(None);
        }
        self.caller_in_blob(found, search, code, memory)
    }

    /// What there is to look at in code of no known blob.
    #[inline(always)]
    fn search_without_blob<M: StackMemory>(
        &self,
        search: &mut Search,
        code: &CodeWithoutTable,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        if search.seen == JUMPS_BEHIND_POP {
            Err(code.unproved)
        } else {
            self.search_code(search, code.unproved, memory)
        }
    }

    /// The caller in the blob with this header.
    #[inline(always)]
    fn caller_in_blob<M: StackMemory>(
        &self,
        header: u64,
        search: &mut Search,
        code: &CodeWithoutTable,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        let Some([length, used, _, _, sizes, frame, begin, end]) = memory.words(header) else {
            return Err(code.unproved);
        };
        let (complete, frame_words) = (sizes >> 32, frame >> 32);
        let is_blob = used & 0xff == 1
            && length < MAX_LENGTH
            && end.wrapping_sub(header) <= length * SEGMENT_BYTES
            && (frame_words < MAX_FRAME_WORDS || frame_words == SIZE_NOT_SAID);
        // A method's jump tables hold addresses of its code, too.
        if !is_blob {
            search.at = header.wrapping_sub(SEGMENT_BYTES);
            return Ok(None);
        }
        if frame_words == 0 {
            return self.caller_by_name(header, search, code, memory);
        }
        if frame_words == SIZE_NOT_SAID {
            let keeps_one = memory.word(begin).is_some_and(|code| code & LOW_4 == PROLOGUE);
            return if self.exact == 0 && keeps_one {
                self.caller_by_frame_pointer(memory)
            } else {
                self.search_without_blob(search, code, memory)
            };
        }
        let is_method = complete.wrapping_sub(1) < MAX_BYTES_OF_ENTRY;
        let last = if is_method { begin.wrapping_add(complete - 1) & !(METHOD_ALIGNMENT - 1) } else { begin };
        let Some((entry, beginning, sets_rbp)) =
            Beginning::up_to(last, is_method, memory).filter(|(entry, ..)| *entry >= begin)
        else {
            return self.search_without_blob(search, code, memory);
        };
        let complete =
            if is_method { begin.wrapping_add(complete) } else { entry.wrapping_add(MAX_BYTES_OF_TAKING) };
        let frame_bytes = 8 * frame_words;
        self.caller_in_function(
            &Function { entry, beginning, complete, sets_rbp, frame_bytes },
            search,
            code,
            memory,
        )
    }

    /// The caller in a function.
    #[inline(always)]
    fn caller_in_function<M: StackMemory>(
        &self,
        function: &Function,
        search: &mut Search,
        code: &CodeWithoutTable,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        let rsp = self.general[DWARF_RSP as usize];
        if self.exact != 0 {
            let rbp = self.get(DWARF_RBP)?;
            let done = self.rip.wrapping_sub(function.entry);
            // Before that it looks whether it is the method that is meant.
            if self.rip <= function.entry {
                return self.caller_at(rsp, rbp, memory);
            }
            if function.beginning == Beginning::Prologue {
                return self.search_without_blob(search, code, memory);
            }
            // sub $n, %rsp; mov %rbp, n-8(%rsp); mov %rsp, %rbp; add $n-8, %rbp
            if function.beginning == Beginning::Take && done == TAKE_FRAME_BYTES {
                return self.caller_at(rsp.wrapping_add(function.frame_bytes).wrapping_sub(8), rbp, memory);
            }
            if function.beginning == Beginning::Take && done < MAX_BYTES_OF_TAKING {
                return self.caller_by_frame_size(function.frame_bytes, memory);
            }
            // mov %eax, -n(%rsp); push %rbp; mov %rsp, %rbp
            if function.sets_rbp && function.beginning == Beginning::Touch && done == 11 {
                return self.caller_by_frame_pointer(memory);
            }
            if self.rip < function.complete {
                return Err(code.unproved);
            }
            let is_aligned = rsp & (STACK_ALIGNMENT - 1) == 0;
            if search.seen == JUMPS_BEHIND_POP && !is_aligned {
                return self.caller_at(rsp, rbp, memory);
            }
            if !is_aligned {
                return self.search_without_blob(search, code, memory);
            }
        }
        if function.sets_rbp {
            return self.caller_by_frame_pointer(memory);
        }
        if self.has_pushed(memory) {
            return Err(code.unproved);
        }
        self.search_barrier(search, function.frame_bytes, self.rip.wrapping_sub(function.complete))
    }

    /// The caller where the frame is complete, and nothing more on the stack.
    #[inline(always)]
    pub(super) fn caller_by_frame_size<M: StackMemory>(
        &self,
        bytes: u64,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        let saved = self.general[DWARF_RSP as usize].wrapping_add(bytes).wrapping_sub(16);
        let Some([frame_pointer, address]) = memory.words(saved) else {
            return Err(memory.unreadable(saved));
        };
        let stack_pointer = saved.wrapping_add(16);
        Ok(Some(Candidate { address, stack_pointer, frame_pointer, is_caller: true }))
    }

    /// Whether more is on the stack than the frame: what has been pushed for a stub, and is popped behind it. A frame that is being
    /// left has its rbp to pop.
    #[inline(always)]
    fn has_pushed<M: StackMemory>(&self, memory: &M) -> bool {
        let Some(code) = memory.word(self.rip) else { return true };
        let is_pop = code & 0xf8 == 0x58 || code & 0xf8ff == 0x5841;
        is_pop || self.exact != 0 && byte_before(self.rip, memory) & 0xf8 == 0x50
    }

    /// The caller in code of which only the blob's name is known.
    #[inline(always)]
    fn caller_by_name<M: StackMemory>(
        &self,
        header: u64,
        search: &mut Search,
        code: &CodeWithoutTable,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        let name = memory.word(header.wrapping_add(NAME)).and_then(|name| memory.word(name)).unwrap_or(0);
        if self.exact != 0 && (name == VTABLE || name == SIGNATURE) {
            return self.caller_at(self.general[DWARF_RSP as usize], self.get(DWARF_RBP)?, memory);
        }
        if name == INTERPRETER && search.seen == NOTHING_AHEAD && self.is_in_interpreted_frame(memory) {
            return self.caller_of_interpreted(memory);
        }
        if name == STUBS && search.seen != JUMPS_BEHIND_POP {
            return self.search_stub(search, code, memory);
        }
        self.search_without_blob(search, code, memory)
    }

    /// Whether rbp is at a frame of an interpreted method, by where its words point: the caller's rsp and the locals above, the
    /// expression stack below.
    #[inline(always)]
    fn is_in_interpreted_frame<M: StackMemory>(&self, memory: &M) -> bool {
        let Ok(rbp) = self.get(DWARF_RBP) else { return false };
        let bottom = rbp.wrapping_sub(INTERPRETER_FRAME_BYTES);
        let Some([expressions, _, locals, _, _, _, _, _, sender]) = memory.words(bottom) else {
            return false;
        };
        let rsp = self.general[DWARF_RSP as usize];
        bottom.wrapping_sub(expressions) < MAX_LOCALS_BYTES
            && rsp <= expressions
            && locals.wrapping_sub(rbp.wrapping_add(8)) < MAX_LOCALS_BYTES
            && sender.wrapping_sub(rbp.wrapping_add(16)) < MAX_LOCALS_BYTES
    }

    /// The caller of an interpreted method, whose rsp is above the frame by what was pushed there to have all arguments on
    /// the stack.
    #[inline(always)]
    pub(in crate::x86_64) fn caller_of_interpreted<M: StackMemory>(
        &self,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        let found = self.caller_by_frame_pointer(memory)?;
        let sender = memory.word(self.get(DWARF_RBP)?.wrapping_sub(8)).unwrap_or(0);
        Ok(found.map(|caller| {
            let is_above = sender.wrapping_sub(caller.stack_pointer) < MAX_LOCALS_BYTES;
            Candidate { stack_pointer: if is_above { sender } else { caller.stack_pointer }, ..caller }
        }))
    }

    /// Whether the innermost instruction is a `jmp` behind what may be a `pop %rbp`: with an exception in hand, a compiled
    /// method leaves so.
    #[inline(always)]
    pub(super) fn jumps_behind_pop<M: StackMemory>(&self, memory: &M) -> bool {
        self.exact != 0
            && byte_before(self.rip, memory) == POP_RBP
            && memory.word(self.rip).is_some_and(|code| code & 0xff == JUMP)
    }
}
