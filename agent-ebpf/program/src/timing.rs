//! Programs that time the walk, and what it is made of, in the kernel.
//!
//! A program on a perf event cannot be run on request (`BPF_PROG_TEST_RUN` knows no such type), and what the kernel counts of
//! it while it samples is the whole program on whatever happened to run. A raw tracepoint's program can
//! (`bpf_prog_test_run_raw_tp`, net/bpf/test_run.c), in the process that asks. So these call what the sampling program
//! calls, on the asking thread's own stack, and put the time into a map.

use core::ffi::c_void;

use aya_ebpf::btf_maps::Array;
use aya_ebpf::helpers::generated::{
    bpf_get_current_pid_tgid, bpf_ktime_get_ns, bpf_loop, bpf_probe_read_user,
};
use aya_ebpf::macros::{btf_map, raw_tracepoint};
use aya_ebpf::programs::RawTracePointContext;
use windlass_agent_ebpf::recent::SLOTS;
use windlass_schema::maps::SegmentKey;
use windlass_schema::record::{DWARF_RBP, DWARF_RSP};

use crate::program::{PROCESSES, RECENT, SCRATCH, chunk, segment, walk_from_registers};

/// Nanoseconds, frames, code of the reason to stop.
#[btf_map]
static TIMES: Array<u64, 3> = Array::new();

fn put(slot: u32, value: u64) {
    if let Some(place) = TIMES.get_ptr_mut(slot) {
        // SAFETY: only the thread that asked reads or writes it.
        unsafe { *place = value };
    }
}

/// Walks from the instruction pointer, stack pointer and frame pointer given.
#[raw_tracepoint]
fn windlass_time_walk(context: RawTracePointContext) -> i32 {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else { return 1 };
    // SAFETY: helpers are called as their documentation asks; the scratch value is this CPU's, which a program run
    // on request does not leave.
    unsafe {
        let tgid = (bpf_get_current_pid_tgid() >> 32) as u32;
        (*scratch).walk.restart(tgid);
        let registers = &mut (*scratch).walk.registers;
        registers.rip = context.arg(0);
        registers.general[DWARF_RSP as usize] = context.arg(1);
        registers.general[DWARF_RBP as usize] = context.arg(2);
        registers.known = 1 << DWARF_RSP | 1 << DWARF_RBP;
        registers.exact = 1;
        let start = bpf_ktime_get_ns();
        let stop = walk_from_registers(scratch, tgid);
        put(0, bpf_ktime_get_ns() - start);
        put(1, u64::from((*scratch).walk.frames));
        put(2, stop as u64);
    }
    0
}

/// Forgets one record.
unsafe extern "C" fn forget(number: u64, _context: *mut c_void) -> i64 {
    if let Some(recent) = RECENT.get_ptr_mut(0) {
        // SAFETY: the value is this CPU's own.
        unsafe { (*recent).forget(number as usize) };
    }
    0
}

/// Forgets every record, so that the next walk looks up each.
#[raw_tracepoint]
fn windlass_forget(_context: RawTracePointContext) -> i32 {
    // SAFETY: helpers are called as their documentation asks.
    unsafe { bpf_loop(SLOTS as u32, forget as *const () as *mut c_void, core::ptr::null_mut(), 0) };
    0
}

/// What the turns of a primitive's loop work on.
#[repr(C)]
struct Operands {
    address: u64,
    tgid: u32,
    chunk: u32,
}

/// Defines a program that runs the expression so many times in a `bpf_loop`.
macro_rules! primitive {
    ($program:ident, $turn:ident, |$operands:ident| $body:expr) => {
        unsafe extern "C" fn $turn(_number: u64, context: *mut c_void) -> i64 {
            // SAFETY: the context is the operands below, which live until the loop ends.
            let $operands = unsafe { &*context.cast::<Operands>() };
            $body
        }

        /// Takes the number of turns, a user address, a chunk's number.
        #[raw_tracepoint]
        fn $program(context: RawTracePointContext) -> i32 {
            // SAFETY: helpers are called as their documentation asks.
            unsafe {
                let tgid = (bpf_get_current_pid_tgid() >> 32) as u32;
                let mut operands = Operands { address: context.arg(1), tgid, chunk: context.arg(2) };
                let turns: u32 = context.arg(0);
                let start = bpf_ktime_get_ns();
                bpf_loop(turns, $turn as *const () as *mut c_void, (&raw mut operands).cast(), 0);
                put(0, bpf_ktime_get_ns() - start);
            }
            0
        }
    };
}

/// Reads `N` words of user memory; the bytes go to the BPF stack. 1, which ends the loop, if that fails.
#[inline(always)]
fn read<const N: usize>(address: u64) -> i64 {
    let mut words = [0u64; N];
    // SAFETY: the destination has the size that is said.
    let failed =
        unsafe { bpf_probe_read_user((&raw mut words).cast(), 8 * N as u32, address as *const c_void) };
    i64::from(failed != 0)
}

primitive!(windlass_time_turn, empty_turn, |_operands| 0);
primitive!(windlass_time_read_8, read_8, |operands| read::<1>(operands.address));
primitive!(windlass_time_read_16, read_16, |operands| read::<2>(operands.address));
primitive!(windlass_time_read_64, read_64, |operands| read::<8>(operands.address));
primitive!(windlass_time_read_256, read_256, |operands| read::<32>(operands.address));
primitive!(windlass_time_scratch, scratch_turn, |_operands| i64::from(SCRATCH.get_ptr_mut(0).is_none()));
primitive!(windlass_time_chunk, chunk_turn, |operands| i64::from(chunk(operands.chunk).is_none()));
// SAFETY: the entry is not read.
primitive!(windlass_time_process, process_turn, |operands| unsafe {
    i64::from(PROCESSES.get(operands.tgid).is_none())
});
primitive!(windlass_time_segment, segment_turn, |operands| {
    i64::from(segment(SegmentKey { tgid: operands.tgid, segment: 0 }).is_none())
});
