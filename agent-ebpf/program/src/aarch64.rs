//! Where the registers of user mode lie in a perf event's context and in the kernel, on aarch64.

use core::ffi::c_void;

use aya_ebpf::bindings::{bpf_user_pt_regs_t, task_struct};
use aya_ebpf::helpers::generated::{bpf_get_current_task_btf, bpf_probe_read_kernel, bpf_task_pt_regs};
use windlass_agent_ebpf::aarch64::PAC_MASK;
pub(crate) use windlass_agent_ebpf::aarch64::Registers;
use windlass_schema::StopReason;

/// Bits of pstate that are the mode, but for that of 32-bit code, and user mode among them (`user_mode` in
/// arch/arm64/include/asm/ptrace.h).
const MODE_MASK: u64 = 0xf;
const USER_MODE: u64 = 0;

/// DWARF numbers of sp and x29.
pub(crate) const STACK_POINTER: usize = windlass_schema::Register::SP.number() as usize;
pub(crate) const FRAME_POINTER: usize = windlass_schema::Register::X29.number() as usize;

/// Whether these are registers of 64-bit or 32-bit user mode.
///
/// # Safety
/// `registers` points into the context of a perf event's program.
#[inline(always)]
pub(crate) unsafe fn is_user(registers: *const bpf_user_pt_regs_t) -> bool {
    // SAFETY: as the caller says; a context is read field by field.
    unsafe { (*registers).pstate & MODE_MASK == USER_MODE }
}

/// What the registers that the kernel saved are read to, beside where they belong: nothing.
pub(crate) type SavedRegisters = ();

/// Fills the registers of user mode, which are those that an event `interrupted` or those that the kernel saved; a reason
/// if there are none.
///
/// # Safety
/// `interrupted` points into the context of a perf event's program.
#[inline(always)]
pub(crate) unsafe fn user_registers(
    interrupted: *const bpf_user_pt_regs_t,
    _: *mut SavedRegisters,
    into: &mut Registers,
) -> Result<(), StopReason> {
    // SAFETY: the context's registers may be read by their fields; `bpf_task_pt_regs` gives the saved
    // registers of the current task, which begin with these (`struct pt_regs` in arch/arm64/include/asm/ptrace.h), read
    // with a helper that checks. x0 to x30 and sp go where they belong at once: BPF's stack is small.
    unsafe {
        if is_user(interrupted) {
            copy_registers(&*interrupted, into);
            return Ok(());
        }
        let saved =
            bpf_task_pt_regs(bpf_get_current_task_btf() as *mut task_struct) as *const bpf_user_pt_regs_t;
        let mut rest = [0u64; 2];
        if !read_kernel(&raw mut into.general, saved.cast())
            || !read_kernel(&raw mut rest, (&raw const (*saved).pc).cast())
        {
            return Err(StopReason::RegistersUnavailable);
        }
        let [pc, pstate] = rest;
        // A kernel thread's saved registers are of kernel mode (copy_thread in arch/arm64/kernel/process.c).
        if pstate & MODE_MASK != USER_MODE {
            return Err(StopReason::KernelThread);
        }
        complete(pc, into);
    }
    Ok(())
}

/// Reads as many bytes of kernel memory as a value has; false if they cannot be read.
///
/// # Safety
/// `into` can be written to, and any bytes are a `T`.
#[inline(always)]
unsafe fn read_kernel<T>(into: *mut T, from: *const c_void) -> bool {
    // SAFETY: the destination has the size that is said. Any source address is allowed.
    unsafe { bpf_probe_read_kernel(into.cast(), size_of::<T>() as u32, from) == 0 }
}

/// What is left to fill in when the general-purpose registers are in place.
#[inline(always)]
fn complete(pc: u64, into: &mut Registers) {
    into.pc = pc;
    into.pac_mask = PAC_MASK;
    into.known = u32::MAX;
    into.exact = 1;
}

#[inline(always)]
fn copy_registers(from: &bpf_user_pt_regs_t, into: &mut Registers) {
    into.general[0] = from.regs[0];
    into.general[1] = from.regs[1];
    into.general[2] = from.regs[2];
    into.general[3] = from.regs[3];
    into.general[4] = from.regs[4];
    into.general[5] = from.regs[5];
    into.general[6] = from.regs[6];
    into.general[7] = from.regs[7];
    into.general[8] = from.regs[8];
    into.general[9] = from.regs[9];
    into.general[10] = from.regs[10];
    into.general[11] = from.regs[11];
    into.general[12] = from.regs[12];
    into.general[13] = from.regs[13];
    into.general[14] = from.regs[14];
    into.general[15] = from.regs[15];
    into.general[16] = from.regs[16];
    into.general[17] = from.regs[17];
    into.general[18] = from.regs[18];
    into.general[19] = from.regs[19];
    into.general[20] = from.regs[20];
    into.general[21] = from.regs[21];
    into.general[22] = from.regs[22];
    into.general[23] = from.regs[23];
    into.general[24] = from.regs[24];
    into.general[25] = from.regs[25];
    into.general[26] = from.regs[26];
    into.general[27] = from.regs[27];
    into.general[28] = from.regs[28];
    into.general[29] = from.regs[29];
    into.general[30] = from.regs[30];
    into.general[31] = from.sp;
    complete(from.pc, into);
}
