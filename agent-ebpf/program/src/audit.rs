//! What of a walk is sent to be judged in user space.
//!
//! # Why this shape
//! To be judged frame by frame a walk has to say which stack pointer and frame pointer it found in each, and these
//! are noted while it goes: into memory that the agent makes only if it audits, and by a branch that the verifier removes if
//! it does not ([`AUDIT_EVERY`] is then known to be 0, and the pointer to that memory to be null). Registers and stack
//! are read behind the walk, and no walk that is not audited pays for them.
//!
//! # What is certain
//! The thread stands still from its interrupt to the end of the program, so the registers are those that the walk
//! started from, and what the thread itself wrote to its stack is the same. Another thread may write to it in
//! between, as may a process that shares the memory; a stack is normally written by its own thread alone. Memory that is not
//! resident is to be had neither for the walk nor for the copy.

use core::ffi::c_void;
use core::ptr::{addr_of, addr_of_mut, null_mut};

use aya_ebpf::bindings::bpf_perf_event_data;
use aya_ebpf::btf_maps::{Array, RingBuf};
use aya_ebpf::helpers::generated::{
    bpf_get_prandom_u32, bpf_get_smp_processor_id, bpf_probe_read_kernel, bpf_probe_read_user,
};
use aya_ebpf::macros::btf_map;
use windlass_schema::maps::{
    AUDIT_PIECE_BYTES, AUDIT_PIECES, AUDIT_RBP_UNKNOWN, AuditRecord, Counter, MAX_USER_FRAMES, SampleHeader,
    WalkedFrame,
};

use crate::machine::{FRAME_POINTER, Registers, STACK_POINTER, user_registers};
use crate::program::{Scratch, count};

/// The frames of a walk, as they are noted.
pub(crate) type WalkedFrames = [WalkedFrame; MAX_USER_FRAMES];

/// Sized by the agent: a page if it does not audit.
#[btf_map]
static AUDITS: RingBuf<SampleHeader, 4096> = RingBuf::new();

/// By CPU. Sized by the agent: one if it does not audit.
#[btf_map]
static WALKED: Array<WalkedFrames, 1> = Array::new();

/// One sample in so many is audited; 0 is none. No `aya_ebpf::Global`: the name of the union in it is one that
/// the kernel refuses in type information. With a section named, it is a constant of its own: LLVM's merging of equal constants
/// makes one of it and of every other 0 otherwise, map keys among them.
#[unsafe(link_section = ".rodata")]
#[unsafe(no_mangle)]
static AUDIT_EVERY: u32 = 0;

#[inline(always)]
fn audit_every() -> u32 {
    // SAFETY: a static; what it holds is known to the loader and not to the compiler.
    unsafe { addr_of!(AUDIT_EVERY).read_volatile() }
}

/// Where walks note their frames; null if none is audited. If some are, all walks do: it takes two stores a frame, and a
/// walk that might or might not is two for the verifier to follow. `None` on a CPU that there is no place for, which
/// cannot be.
#[inline(always)]
pub(crate) fn frames() -> Option<*mut WalkedFrames> {
    if audit_every() == 0 {
        return Some(null_mut());
    }
    // SAFETY: the helper has no argument.
    WALKED.get_ptr_mut(unsafe { bpf_get_smp_processor_id() } as u32)
}

/// Whether the walk that has ended is to be audited. Which are is left to chance: what runs at fixed intervals would
/// otherwise always be, or never.
#[inline(always)]
pub(crate) fn is_due() -> bool {
    let every = audit_every();
    // SAFETY: the helper has no argument.
    every != 0 && unsafe { bpf_get_prandom_u32() }.is_multiple_of(every)
}

/// What is noted of a frame.
#[inline(always)]
pub(crate) fn walked_frame(registers: &Registers) -> WalkedFrame {
    let is_unknown = registers.known >> FRAME_POINTER & 1 == 0;
    let unknown = if is_unknown { AUDIT_RBP_UNKNOWN } else { 0 };
    WalkedFrame {
        stack_pointer: registers.general[STACK_POINTER] & !AUDIT_RBP_UNKNOWN | unknown,
        frame_pointer: registers.general[FRAME_POINTER],
    }
}

/// Sends the walk whose sample is complete in `scratch`.
#[inline(never)]
pub(crate) fn send(data: *mut bpf_perf_event_data, scratch: *mut Scratch) {
    let Some(frames) = frames() else { return };
    let Some(mut entry) = AUDITS.reserve_untyped::<AuditRecord<Registers>>(0) else {
        count(Counter::AuditsLost);
        return;
    };
    let record = entry.as_mut_ptr();
    // SAFETY: the record has the size that was reserved, any bytes are one, and helpers are given sizes of
    // its fields; the sample and the frames are this CPU's own.
    unsafe {
        if user_registers(&raw const (*data).regs, &raw mut (*scratch).saved, &mut (*record).registers)
            .is_err()
        {
            entry.discard(0);
            return;
        }
        (*record).header = (*scratch).sample.header;
        bpf_probe_read_kernel(
            addr_of_mut!((*record).addresses).cast(),
            (8 * MAX_USER_FRAMES) as u32,
            addr_of!((*scratch).sample.addresses).cast(),
        );
        bpf_probe_read_kernel(
            addr_of_mut!((*record).frames).cast(),
            size_of::<WalkedFrames>() as u32,
            frames.cast_const().cast(),
        );
        let page = |address: u64| address & !(AUDIT_PIECE_BYTES as u64 - 1);
        let first = page((*record).registers.general[STACK_POINTER]);
        let last = page((*scratch).walk.registers.general[STACK_POINTER]);
        let half = (AUDIT_PIECES / 2 * AUDIT_PIECE_BYTES) as u64;
        // The second half goes on where the first ends, or ends where the walk did.
        let is_near = last.wrapping_sub(first) < 2 * half;
        let second = if is_near { first + half } else { last.wrapping_sub(half - AUDIT_PIECE_BYTES as u64) };
        (*record).starts = [first, second];
        let (mut read, mut piece) = (0, 0);
        while piece < AUDIT_PIECES {
            let into = addr_of_mut!((*record).stack).cast::<u8>().add(piece * AUDIT_PIECE_BYTES);
            let base = if piece < AUDIT_PIECES / 2 { first } else { second.wrapping_sub(half) };
            let from = base.wrapping_add((piece * AUDIT_PIECE_BYTES) as u64) as *const c_void;
            if bpf_probe_read_user(into.cast(), AUDIT_PIECE_BYTES as u32, from) == 0 {
                read |= 1 << piece;
            }
            piece += 1;
        }
        (*record).read = read;
    }
    entry.submit(0);
}
