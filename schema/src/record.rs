//! The 8-byte record: how to find the caller's frame, for one row or for a run of rows.
//!
//! A table's dictionary is an array of records, each a little-endian `u64`. The low four bits of
//! byte 0 are the kind.
//!
//! # Plain records: one row
//! ```text
//! byte 0      kind (bits 0-3), frame-pointer rule (bits 4-5), return-address rule (bits 6-7)
//! byte 1      registers by DWARF number, an offset, or a reason: see below
//! bytes 2-3   i16 f: the frame-pointer rule's offset
//! bytes 4-7   i32 offset, or i16 a (bytes 4-5) and i16 b (bytes 6-7)
//! ```
//! | kind | name | CFA |
//! |---|---|---|
//! | 0 | `SP` | stack pointer + offset |
//! | 1 | `FP` | frame pointer + offset |
//! | 2 | `REGISTER` | register + offset |
//! | 3 | `DEREF` | *(register + a) + b |
//! | 4 | `DEREF_INDEXED` | *(rsp + 8 * r9 + a) + b |
//! | 5 | `PLT` | rsp + b + 8 * ((rip & 15) >= a) |
//! | 6 | `SIGNAL` | none: all registers from the saved context at stack pointer + a |
//! | 9 | `END` | none: the return address is undefined, this frame has no caller |
//! | 10 | `NO_CFI` | none: no FDE covers the address |
//! | 11 | `UNSUPPORTED` | none: byte 1 is the code of the reason |
//! | 12 | `GO_STACK` | *(*(rsp + a) + 8) - *(rsp + b) + 8 * c, c being byte 1 as i8 |
//! | 13 | `OTHER_STACK` | rbp + offset |
//! | 14 | `FAR_CFA` | register + offset, and what is saved lies near that register: see below |
//!
//! Fields that a kind does not use are 0: f without a frame-pointer rule that has one, byte 1 where the last table below has
//! nothing, bytes 2 to 7 and both rules of kinds 9 to 11 (byte 1 of 11 is the code of one of `UnsupportedReason`).
//!
//! The CFA of a frame lies above its stack pointer (or is equal to it, if the return address is in a register), but for
//! kinds 12 and 13, which lead to another stack. That is for a walk to check: a table may say otherwise.
//!
//! The stack pointer is rsp or sp, the frame pointer rbp or x29. Kinds 4, 5, 7, 8, 12
//! and 13 are for x86-64 alone, 14 for aarch64, whose frames save their return address at their lower end.
//! The saved context of `SIGNAL` is what the kernel pushes: r8 to r15, rdi, rsi, rbp, rbx, rdx, rax, rcx,
//! rsp, rip (`struct sigcontext` of x86-64), or x0 to x30, sp, pc (`regs` of that of aarch64).
//!
//! | frame-pointer rule | frame pointer of the caller |
//! |---|---|
//! | 0 `SAME` | unchanged |
//! | 1 `AT_CFA` | *(CFA + f); in kind 14 *(register + f) |
//! | 2 `AT_FP` | *(frame pointer + f), that of this frame (a DRAP save) |
//! | 3 `UNDEFINED` | lost |
//!
//! | return-address rule | return address |
//! |---|---|
//! | 0 `AT_CFA` | *(CFA - 8) |
//! | 1 `REGISTER` | a register |
//! | 2 `ABOVE_FP` | *(CFA + f + 8), right above the saved frame pointer: only with `AT_CFA`, and f + 8 is not -8; in kind 14 *(register + f + 8) |
//! | 3 `AT_CFA_WORDS` | *(CFA + 8 * g), g being byte 1 as i8; where neither of the above says the same, and byte 1 is free |
//!
//! | byte 1 | x86-64 | aarch64 |
//! |---|---|---|
//! | kinds 2 and 3 | CFA register in bits 0-3, with rule 1 the return address's in bits 4-7 | CFA register; rule 1 is x30 |
//! | kind 12 | c; rule 0 or 2 | |
//! | others, rule 1 | return address's register in bits 4-7 | return address's register |
//! | kind 14 | | CFA register |
//! | others, rule 3 | g | g |
//!
//! Kind 14 has return-address rule 2, any frame-pointer rule but `AT_FP`, and states what no other kind can: places that are more than
//! 32 KiB from the CFA, or a return address alone that is more than 128 words from it or not at a word. With frame-pointer rules 0 and 3,
//! f is a place where no frame pointer is. From the CFA both places are offsets of 32 bits.
//!
//! On aarch64 a return address may be signed; whether it is makes no difference to its lower bits, so the
//! signature is taken off wherever one is read, and no record speaks of it.
//!
//! # Runs: a prologue's pushes or an epilogue's pops
//! ```text
//! byte 0      kind 7 PUSH_RUN or 8 POP_RUN (bits 0-3), base frame-pointer rule (bit 4: SAME or
//!             AT_CFA), LAST (bit 6), FRAME (bit 7); bit 5 is 0
//! byte 1      base: CFA = rsp + 8 * base at distance 0
//! bytes 2-3   mask: bit i set means that CFA changes at distance i + 1 from the run's first byte
//! byte 4      frame-pointer event: bit 7 present, bits 0-3 its distance - 1
//! byte 5      e, a number of words for the last change
//! bytes 6-7   i16 f of the base frame-pointer rule
//! ```
//! At distance `d`, with `n` = number of set bits among mask bits 0 to `d - 1`: CFA = rsp + 8 * (base + n) in
//! a push run, rsp + 8 * (base - n) in a pop run; the return address is at CFA - 8. At and after its event's distance,
//! which need not be that of a change of the mask nor before the last of them, a push run has saved
//! rbp at the CFA's own offset (`push rbp` at CFA = rsp + 16 saves it at CFA - 16); a pop run has
//! restored it (`SAME`). Where LAST is set or e is not 0, the mask is not 0, and its last change, which then is
//! behind the event, is another one:
//!
//! | kind | LAST | FRAME | e | from the last change on | as in |
//! |---|---|---|---|---|---|
//! | push | 0 | 0 | 0 | as above | `push` |
//! | push | 0 | 0 | 1 to 255 | CFA = rsp + 8 * (base + n + e) | `sub rsp, 8 * (e + 1)` |
//! | push | 1 | 0 | 0 | CFA = rbp + 8 * (base + n - 1) | `mov rbp, rsp` |
//! | pop | 0 | 0 | 0 | as above | `pop` |
//! | pop | 1 | 0 | 0 | nothing is covered | `ret` at a function's end |
//! | pop | 1 | 0 | 1 to 255 | CFA = rsp + 8 * (base + e), frame-pointer rule of the base | `ret` amid a function |
//! | pop | 1 | 1 | 1 to 255 | CFA = rbp + 8 * e, rbp at CFA - 16 | the same, behind `leave` |
//!
//! # Example
//! `push rbp; mov rbp, rsp` of every function with a frame pointer, at distances 1 and 4:
//! `47 01 09 00 80 00 00 00` is a push run with base 1, mask 0b1001, rbp event at distance 1, the
//! last change setting rbp. Distance 0: CFA = rsp + 8. Distances 1 to 3: CFA = rsp + 16, rbp at
//! CFA - 16. From distance 4: CFA = rbp + 16, rbp at CFA - 16.
//!
//! `pop rbx; pop rbp; ret`, the function's last instructions, at distances 1, 2 and 3:
//! `58 03 07 00 81 00 f0 ff` is a pop run with base 3, mask 0b111, rbp at CFA - 16 restored at distance 2, the
//! last change ending the coverage. Distance 0: CFA = rsp + 24; 1: rsp + 16; 2: rsp + 8; from 3: none.

/// DWARF register number of rbx.
pub const DWARF_RBX: u8 = 3;
/// DWARF register number of rbp.
pub const DWARF_RBP: u8 = 6;
/// DWARF register number of rsp.
pub const DWARF_RSP: u8 = 7;
/// DWARF register number of the x86-64 return address column.
pub const DWARF_RA: u8 = 16;
/// Number of general-purpose registers, DWARF numbers 0 to 15.
pub const REGISTERS: usize = 16;

/// Longest distance, in bytes, that a run spans: the bits of its mask.
pub const MAX_RUN_BYTES: u32 = 16;

/// Kinds of record; see the [module documentation](self).
#[expect(missing_docs, reason = "the table in the module documentation defines each")]
pub mod kind {
    pub const SP: u8 = 0;
    pub const FP: u8 = 1;
    pub const REGISTER: u8 = 2;
    pub const DEREF: u8 = 3;
    pub const DEREF_INDEXED: u8 = 4;
    pub const PLT: u8 = 5;
    pub const SIGNAL: u8 = 6;
    pub const PUSH_RUN: u8 = 7;
    pub const POP_RUN: u8 = 8;
    pub const END: u8 = 9;
    pub const NO_CFI: u8 = 10;
    pub const UNSUPPORTED: u8 = 11;
    pub const GO_STACK: u8 = 12;
    pub const OTHER_STACK: u8 = 13;
    pub const FAR_CFA: u8 = 14;
}

/// Frame-pointer rules; see the [module documentation](self).
#[expect(missing_docs, reason = "the table in the module documentation defines each")]
pub mod frame_pointer {
    pub const SAME: u8 = 0;
    pub const AT_CFA: u8 = 1;
    pub const AT_FP: u8 = 2;
    pub const UNDEFINED: u8 = 3;
}

/// Return-address rules; see the [module documentation](self).
#[expect(missing_docs, reason = "the table in the module documentation defines each")]
pub mod return_address {
    pub const AT_CFA: u8 = 0;
    pub const REGISTER: u8 = 1;
    pub const ABOVE_FP: u8 = 2;
    pub const AT_CFA_WORDS: u8 = 3;
}

/// One record, as it lies in a dictionary. Nothing about it is checked; [`crate::Rule`] is the
/// checked meaning.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Record(pub u64);

impl Record {
    /// No FDE covers the address.
    pub const NO_CFI: Self = Self(kind::NO_CFI as u64);
    /// The frame has no caller.
    pub const END: Self = Self(kind::END as u64);

    /// A rule that no record states.
    pub const fn unsupported(reason: crate::UnsupportedReason) -> Self {
        Self::plain(kind::UNSUPPORTED, 0, 0, reason as u8, 0, 0)
    }

    /// The kind, byte 0 bits 0-3.
    #[inline(always)]
    pub const fn kind(self) -> u8 {
        self.0 as u8 & 15
    }

    /// The frame-pointer rule, byte 0 bits 4-5.
    #[inline(always)]
    pub const fn frame_pointer(self) -> u8 {
        self.0 as u8 >> 4 & 3
    }

    /// The return-address rule, byte 0 bits 6-7.
    #[inline(always)]
    pub const fn return_address(self) -> u8 {
        self.0 as u8 >> 6
    }

    /// Byte 1.
    #[inline(always)]
    pub const fn aux(self) -> u8 {
        (self.0 >> 8) as u8
    }

    /// `f` of a plain record.
    #[inline(always)]
    pub const fn frame_pointer_offset(self) -> i16 {
        (self.0 >> 16) as i16
    }

    /// `offset` of a plain record.
    #[inline(always)]
    pub const fn offset(self) -> i32 {
        (self.0 >> 32) as i32
    }

    /// `a` of a plain record.
    #[inline(always)]
    pub const fn a(self) -> i16 {
        (self.0 >> 32) as i16
    }

    /// `b` of a plain record.
    #[inline(always)]
    pub const fn b(self) -> i16 {
        (self.0 >> 48) as i16
    }

    /// Whether this is a run.
    #[inline(always)]
    pub const fn is_run(self) -> bool {
        self.kind() == kind::PUSH_RUN || self.kind() == kind::POP_RUN
    }

    /// `mask` of a run.
    #[inline(always)]
    pub const fn run_mask(self) -> u32 {
        (self.0 >> 16) as u16 as u32
    }

    /// The greatest distance at which a run's state changes, by the mask or the event; 0 of a plain record.
    #[inline(always)]
    pub const fn last_change(self) -> u32 {
        if !self.is_run() {
            return 0;
        }
        let event = (self.0 >> 39 & 1) << (self.0 >> 32 & 15);
        let changes = self.run_mask() | event as u32;
        u32::BITS - changes.leading_zeros()
    }

    /// A plain record from its fields.
    pub const fn plain(
        kind: u8,
        frame_pointer: u8,
        return_address: u8,
        aux: u8,
        f: i16,
        offset: i32,
    ) -> Self {
        Self(
            (kind | frame_pointer << 4 | return_address << 6) as u64
                | (aux as u64) << 8
                | (f as u16 as u64) << 16
                | (offset as u32 as u64) << 32,
        )
    }

    /// The `offset` field that holds `a` and `b`.
    pub const fn pair(a: i16, b: i16) -> i32 {
        (a as u16 as u32 | (b as u16 as u32) << 16) as i32
    }

    /// The plain record that holds at `distance` bytes from the first byte of this record's entry.
    ///
    /// Plain records hold at any distance.
    #[inline(always)]
    pub const fn at(self, distance: u32) -> Self {
        if !self.is_run() {
            return self;
        }
        let event_distance = (self.0 >> 32 & 15) + 1;
        let reach = if distance > MAX_RUN_BYTES { MAX_RUN_BYTES } else { distance } as u64;
        let [changes, changes_at_event] = self.count_changes(reach, event_distance);
        let base = self.0 >> 8 & 0xff;
        let extra = self.0 >> 40 & 0xff;
        let has_event = self.0 >> 39 & 1 != 0 && reach >= event_distance;
        let is_behind = (self.0 >> 16 & 0xffff) >> reach == 0 && changes != 0;
        let is_last = self.0 & 0x40 != 0 && is_behind;
        let is_push = self.kind() == kind::PUSH_RUN;
        // Selected by arithmetic: which of these holds is random to a processor that has to guess, and each guess is a path
        // more for the BPF verifier.
        let is_resumed = !is_push & is_last;
        let is_framed = is_resumed & (self.0 & 0x80 != 0);
        let pushed = base + changes - is_last as u64 + select(is_behind, extra, 0);
        let resumed = extra + select(is_framed, 0, base);
        let words = select(is_push, pushed, select(is_last, resumed, base.wrapping_sub(changes)));
        // The run's own, unless the event or what follows the last change sets another.
        let own = self.0 >> 48 << 16 | self.0 & 0x10;
        let saved_here = saved_at((base + changes_at_event).wrapping_neg());
        let saved = select(has_event & !is_resumed, select(is_push, saved_here, 0), own);
        let saved = select(is_framed, saved_at(2u64.wrapping_neg()), saved);
        let cfa_kind = select(is_push & is_last | is_framed, kind::FP as u64, kind::SP as u64);
        let state = cfa_kind | saved | words << 35;
        Self(select(is_resumed & (extra == 0), Self::NO_CFI.0, state))
    }

    /// Changes of the run at distances up to `reach` and to `event_distance`.
    #[inline(always)]
    const fn count_changes(self, reach: u64, event_distance: u64) -> [u64; 2] {
        let mask = self.0 >> 16 & 0xffff;
        // BPF has no instruction that counts bits, so it is spelled out; once for both, 16 bits each.
        let lanes = mask & ((1 << reach) - 1) | (mask & ((1 << event_distance) - 1)) << 16;
        let pairs = lanes - (lanes >> 1 & 0x5555_5555);
        let nibbles = (pairs & 0x3333_3333) + (pairs >> 2 & 0x3333_3333);
        let bytes = (nibbles + (nibbles >> 4)) & 0x0f0f_0f0f;
        let sums = bytes + (bytes >> 8);
        [sums & 0x1f, sums >> 16 & 0x1f]
    }
}

/// The fields of a plain record whose frame pointer is saved at so many words from the CFA.
#[inline(always)]
const fn saved_at(words: u64) -> u64 {
    (frame_pointer::AT_CFA as u64) << 4 | (words << 3 & 0xffff) << 16
}

/// `yes` if `condition`, else `no`, without a branch.
#[inline(always)]
const fn select(condition: bool, yes: u64, no: u64) -> u64 {
    no ^ ((yes ^ no) & (condition as u64).wrapping_neg())
}

impl core::fmt::Debug for Record {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Record({:016x})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_counted() {
        for mask in 0..=0xffffu64 {
            let run = Record(u64::from(kind::PUSH_RUN) | mask << 16);
            for reach in [0, 1, 7, 16] {
                let event = 1 + mask % 16;
                let ones = |bits: u64| u64::from((mask & ((1 << bits) - 1)).count_ones());
                assert_eq!(run.count_changes(reach, event), [ones(reach), ones(event)]);
            }
        }
    }

    #[test]
    fn worked_example_of_the_module_documentation() {
        let run = Record(u64::from_le_bytes([0x47, 0x01, 0x09, 0x00, 0x80, 0x00, 0x00, 0x00]));
        let rsp = |words: i32, fp, f| Record::plain(kind::SP, fp, 0, 0, f, 8 * words);
        assert_eq!(run.at(0), rsp(1, frame_pointer::SAME, 0));
        for distance in 1..4 {
            assert_eq!(run.at(distance), rsp(2, frame_pointer::AT_CFA, -16));
        }
        for distance in [4, 5, 16, 17, u32::MAX] {
            assert_eq!(run.at(distance), Record::plain(kind::FP, frame_pointer::AT_CFA, 0, 0, -16, 16));
        }

        let run = Record(u64::from_le_bytes([0x58, 0x03, 0x07, 0x00, 0x81, 0x00, 0xf0, 0xff]));
        assert_eq!(run.at(0), rsp(3, frame_pointer::AT_CFA, -16));
        assert_eq!(run.at(1), rsp(2, frame_pointer::AT_CFA, -16));
        assert_eq!(run.at(2), rsp(1, frame_pointer::SAME, 0));
        for distance in [3, 4, 16, 17, u32::MAX] {
            assert_eq!(run.at(distance), Record::NO_CFI);
        }
    }
}
