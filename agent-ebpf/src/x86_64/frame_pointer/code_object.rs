//! Where the function starts that V8 made at run time, and what its frame is at an instruction of it.
//!
//! # Why this shape
//! The bytes in front of an address do not say where its function starts: what looks like a prologue may be of the function
//! before. V8 says it: code that it makes is in an object of its heap, whose fields end right in front of the
//! first instruction, at an address aligned as all its code is (`kCodeAlignment`, src/common/globals.h).
//!
//! ```text
//! start - 16   map                 tagged
//! start - 8    the `Code` object   tagged, which holds `start` (code_entry_point, src/objects/code.h)
//! start        instructions
//! ```
//!
//! So each aligned address is asked, downwards, whether the object that the word in front of it points at holds that very address.
//! Nothing but such a start does. With the first instruction known, it is read how the function builds its frame:
//!
//! 1. optimised code, behind a look at whether it is still wanted: `mov ..(%rcx), %rbx; testb $1, ..(%rbx); jne ..`;
//!    wrappers at once: `push %rbp; mov %rsp, %rbp`
//! 2. baseline code: `mov $.., %ebx; mov $.., %r12; call ..`, which builds it (`BaselineOutOfLinePrologue`)
//! 3. regular expressions: `jmp` to where they do so
//!
//! Up to there nothing is pushed; behind, rbp is the frame's until the function ends. JavaScript functions have one frame from
//! there on, and none of theirs leaves it but to return (src/compiler/backend/x64/code-generator-x64.cc, `AssembleReturn`).
//! Code that begins otherwise is looked at as any other is.

use windlass_schema::StopReason;

use super::{
    CodeWithoutTable, DOUBT, IN_CODE, POP_RBP, RET, RET_POPPING, is_among, is_before_prologue, is_zero,
};
use crate::frame_pointer::{Candidate, Search};
use crate::memory::StackMemory;
use crate::x86_64::Registers;

/// What V8 aligns functions to.
const ALIGNMENT: u64 = 64;
/// How far in front of an address its function's start is looked for, in bytes: each turn of the search takes 64.
const MAX_BYTES: u64 = 64 * 1024;
/// Words of a `Code` object that are looked at: its start address is among the first eight fields.
const FIELDS: usize = 8;

/// The last of the kinds of frames, doubled, with room for more: V8 has about 40 (`STACK_FRAME_TYPE_LIST`,
/// src/execution/frames.h).
const LAST_KIND_OF_FRAME: u64 = 2 * 127;

/// `push %rbp; mov %rsp, %rbp`.
const PROLOGUE: u64 = 0xe589_4855;
const PROLOGUE_MASK: u64 = 0xffff_ffff;

/// Whether a word is a reference to an object on the heap of V8: the lowest bits are 1, and the address is one of user
/// memory (`kHeapObjectTag`, include/v8-internal.h).
#[inline(always)]
const fn is_tagged(word: u64) -> bool {
    word & 3 == 1 && word >> 47 == 0
}

/// Whether the words `code` have the bits `value` where `mask` is set.
#[inline(always)]
const fn has(code: u64, mask: u64, value: u64) -> bool {
    code & mask == value
}

/// How far behind the start of a function, whose code is `code`, the frame is not begun. For a regular expression, which
/// jumps there, that is only the jump itself.
#[inline(always)]
const fn last_without_frame(code: [u64; 3]) -> Option<u64> {
    let [first, second, third] = code;
    if has(first, PROLOGUE_MASK, PROLOGUE) {
        return Some(0);
    }
    // 48 8b 59 ..  f6 43 .. 01  0f 85 .. .. .. ..  55 48 89 e5
    let is_optimised = has(first, 0xff00_ffff_00ff_ffff, 0x0100_43f6_0059_8b48)
        && has(second, 0xffff_0000_0000_ffff, 0x4855_0000_0000_850f)
        && has(third, 0xffff, 0xe589);
    if is_optimised {
        return Some(14);
    }
    // 33 db  49 bc (8 bytes)  e8, or 41 ff 95
    if has(first, 0xffff_ffff, 0xbc49_db33) && is_call(second >> 32) {
        return Some(12);
    }
    // bb (4 bytes)  49 bc (8 bytes)  e8, or 41 ff 95
    if has(first, 0x00ff_ff00_0000_00ff, 0x00bc_4900_0000_00bb) && is_call(second >> 56 | third << 8) {
        return Some(15);
    }
    None
}

/// Whether `code` begins with `call ..` or `call ..(%r13)`.
#[inline(always)]
const fn is_call(code: u64) -> bool {
    code & 0xff == 0xe8 || code & 0xff_ffff == 0x95_ff41
}

impl Registers {
    /// Whether what rbp points at is a frame of V8's: below the saved rbp is a context, or what kind of frame it is, a small
    /// number of twice its value.
    #[inline(always)]
    pub(super) fn is_in_v8_frame<M: StackMemory>(&self, memory: &M) -> bool {
        let Ok(rbp) = self.get(super::DWARF_RBP) else { return false };
        let below = memory.word(rbp.wrapping_sub(8));
        below
            .is_some_and(|word| is_tagged(word) || word.wrapping_sub(1) < LAST_KIND_OF_FRAME && word & 1 == 0)
    }

    /// Goes on with where the function starts.
    #[inline(always)]
    pub(super) fn search_object(&self, search: &mut Search) -> Result<Option<Candidate>, StopReason> {
        (search.phase, search.at, search.seen) = (super::IN_OBJECT, self.rip & !(ALIGNMENT - 1), 0);
        Ok(None)
    }

    /// Asks the next aligned address. What is not found in this way is looked for in the code.
    #[inline(always)]
    pub(super) fn look_at_object<M: StackMemory>(
        &self,
        search: &mut Search,
        code: &CodeWithoutTable,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        let start = search.at;
        search.at = start.wrapping_sub(ALIGNMENT);
        let is_inside = start > code.start && self.rip.wrapping_sub(start) < MAX_BYTES;
        let words = if is_inside { memory.words(start.wrapping_sub(16)) } else { None };
        let Some([map, object]) = words else { return self.search_code(search, code.unproved, memory) };
        if !is_tagged(map) || !is_tagged(object) {
            return Ok(None);
        }
        let Some(fields) = memory.words::<FIELDS>(object.wrapping_sub(1)) else { return Ok(None) };
        let mut differs = 1;
        for field in fields {
            differs &= is_zero(field ^ start) ^ 1;
        }
        if differs != 0 {
            return Ok(None);
        }
        let Some(first) = memory.words::<3>(start) else { return Err(code.unproved) };
        if let Some(last) = last_without_frame(first) {
            return self.caller_behind(self.rip.wrapping_sub(start) <= last, code.unproved, memory);
        }
        // e9 (4 bytes)
        let target = start.wrapping_add(5).wrapping_add((first[0] >> 8) as i32 as u64);
        if first[0] & 0xff == 0xe9 && memory.word(target).is_some_and(|at| at & PROLOGUE_MASK == PROLOGUE) {
            return self.caller_behind(self.rip == start, code.unproved, memory);
        }
        self.search_code(search, code.unproved, memory)
    }

    /// The caller of a function that has no frame yet, or had built one.
    #[inline(always)]
    fn caller_behind<M: StackMemory>(
        &self,
        is_before_frame: bool,
        unproved: StopReason,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        let rsp = self.general[super::DWARF_RSP as usize];
        if is_before_frame {
            return self.caller_at(rsp, self.get(super::DWARF_RBP)?, memory);
        }
        if self.is_leaving(memory) { Err(unproved) } else { self.caller_by_frame_pointer(memory) }
    }

    /// Whether the frame may have been left, in another way than those that are known by their instructions: `pop %rbp`
    /// behind rsp as it is in rbp, and no return since.
    #[inline(always)]
    fn is_leaving<M: StackMemory>(&self, memory: &M) -> bool {
        let Some([mut bytes, mut behind]) = memory.words(self.rip.wrapping_sub(16)) else { return true };
        let (mut leaves, mut before, mut at) = (0, 0, 0);
        while at < 16 {
            let byte = bytes & 0xff;
            leaves |= is_zero(byte ^ POP_RBP) & is_among(before, [0xe5, 0xec]);
            leaves &= is_among(byte, [RET, RET_POPPING]) ^ 1;
            before = byte;
            bytes = bytes >> 8 | behind << 56;
            behind >>= 8;
            at += 1;
        }
        leaves != 0
    }

    /// Goes on with the code in front of the address.
    #[inline(always)]
    pub(in crate::x86_64) fn search_code<M: StackMemory>(
        &self,
        search: &mut Search,
        unproved: StopReason,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        // Not worth a search where it cannot point at a frame.
        let rbp = self.get(super::DWARF_RBP)?;
        if rbp < self.general[super::DWARF_RSP as usize] || rbp & 7 != 0 {
            return Err(unproved);
        }
        let seen = if self.exact != 0 && is_before_prologue(self.rip, memory) { DOUBT } else { 0 };
        (search.phase, search.at, search.seen) = (IN_CODE, self.rip, seen);
        Ok(None)
    }

    /// The caller where the frame is left and arguments are dropped, as many as there are: V8's functions, which take as many
    /// as they are given, end with
    ///
    /// ```text
    ///     cmp $n, %rcx;  jg 1f;  ret $8*n
    /// 1:  pop %r10;  lea (%rsp, %rcx, 8), %rsp;  push %r10;  ret
    /// ```
    #[inline(always)]
    pub(super) fn caller_dropping_arguments<M: StackMemory>(
        &self,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        let Some([code, behind]) = memory.words(self.rip) else { return Ok(None) };
        let (rsp, rbp) = (self.general[super::DWARF_RSP as usize], self.get(super::DWARF_RBP)?);
        // cmp with one byte, or four: 48 83 f9, 48 81 f9
        let compared = match code & 0xff_ffff {
            0xf9_8348 => code >> 32 | behind << 32,
            0xf9_8148 => code >> 56 | behind << 8,
            _ => code,
        };
        // 7f .. c2
        if has(compared, 0xff_00ff, 0xc2_007f) {
            return self.caller_at(rsp, rbp, memory);
        }
        // 41 5a  48 8d 24 cc  41 52 c3
        let is_popping = has(code, 0xffff, 0x5a41);
        let dropping = if is_popping { code >> 16 | behind << 48 } else { code };
        let is_dropping = has(dropping, 0x00ff_ffff_ffff_ffff, 0x00c3_5241_cc24_8d48);
        if is_popping && is_dropping {
            return self.caller_at(rsp, rbp, memory);
        }
        if is_dropping || has(code, 0xff_ffff, 0xc3_5241) {
            let address = self.get(DWARF_R10)?;
            let (stack_pointer, frame_pointer) = (rsp, rbp);
            return Ok(Some(Candidate { address, stack_pointer, frame_pointer, is_caller: true }));
        }
        Ok(None)
    }

    /// The caller where the return address is being copied, to make room for arguments behind it: to rsp from where r8 points,
    /// as the first of the words that a register counts.
    ///
    /// ```text
    /// 1:  mov (%r8, %r11, 8), %r10;  mov %r10, (%rsp, %r11, 8);  inc %r11;  cmp ..;  jl 1b
    /// ```
    #[inline(always)]
    pub(super) fn caller_copying_arguments<M: StackMemory>(
        &self,
        memory: &M,
    ) -> Result<Option<Candidate>, StopReason> {
        let Some(code) = memory.word(self.rip) else { return Ok(None) };
        let offset = match code & 0xffff {
            0x8b4f => 0,
            0x894e => 4,
            0xff49 => 8,
            0x3b4c | 0x3b4d => 11,
            0xf07c | 0xf07e => 14,
            _ => return Ok(None),
        };
        let Some([first, second]) = memory.words(self.rip.wrapping_sub(offset)) else { return Ok(None) };
        // 4f 8b 14 ..  4e 89 14 ..  49 ff ..  4. 3b ..  7. f0
        let index = first >> 27 & 7;
        let is_loop = has(first, 0x00ff_ffff_00ff_ffff, 0x0014_894e_0014_8b4f)
            && has(first >> 24, 0xff, 0xc0 | index << 3)
            && has(first >> 56, 0xff, 0xc4 | index << 3)
            && has(second, 0xfffd_00ff_feff_ffff, 0xf07c_003b_4c00_ff49 | (0xc0 | index) << 16);
        if !is_loop {
            return Ok(None);
        }
        let counted = self.get(8 | index as u8)?;
        let at = if counted == 0 { self.get(DWARF_R8)? } else { self.general[super::DWARF_RSP as usize] };
        self.caller_at(at, self.get(super::DWARF_RBP)?, memory)
    }
}

/// DWARF numbers.
const DWARF_R8: u8 = 8;
const DWARF_R10: u8 = 10;
