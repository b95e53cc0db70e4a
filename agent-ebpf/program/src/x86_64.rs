//! Where the registers of user mode lie in a perf event's context and in the kernel, on x86-64.

use aya_ebpf::bindings::{bpf_user_pt_regs_t, pt_regs, task_struct};
use aya_ebpf::helpers::generated::{bpf_get_current_task_btf, bpf_probe_read_kernel, bpf_task_pt_regs};
pub(crate) use windlass_agent_ebpf::x86_64::Registers;
use windlass_schema::StopReason;

/// DWARF numbers of rsp and rbp.
pub(crate) const STACK_POINTER: usize = windlass_schema::record::DWARF_RSP as usize;
pub(crate) const FRAME_POINTER: usize = windlass_schema::record::DWARF_RBP as usize;

/// Whether these are registers of 64-bit or 32-bit user mode: the privilege level is in the low bits of cs.
///
/// # Safety
/// `registers` points into the context of a perf event's program, or can be read.
#[inline(always)]
pub(crate) unsafe fn is_user(registers: *const bpf_user_pt_regs_t) -> bool {
    // SAFETY: as the caller says; a context is read field by field.
    unsafe { (*registers).cs & 3 == 3 }
}

/// Where the registers that the kernel saved are read to. BPF's stack of 512 bytes is that of the turns of a walk as well, which need
/// four fifths of it.
pub(crate) type SavedRegisters = pt_regs;

/// Fills the registers of user mode, which are those that an event `interrupted` or those that the kernel saved; a reason
/// if there are none.
///
/// # Safety
/// `interrupted` points into the context of a perf event's program; `registers` can be written to.
#[inline(always)]
pub(crate) unsafe fn user_registers(
    interrupted: *const bpf_user_pt_regs_t,
    registers: *mut SavedRegisters,
    into: &mut Registers,
) -> Result<(), StopReason> {
    // SAFETY: the context's registers may be read by their fields; `bpf_task_pt_regs` gives the saved
    // registers of the current task, read with a helper that checks.
    unsafe {
        if is_user(interrupted) {
            copy_registers(&*interrupted, into);
            return Ok(());
        }
        let saved = bpf_task_pt_regs(bpf_get_current_task_btf() as *mut task_struct) as *const pt_regs;
        if bpf_probe_read_kernel(registers.cast(), size_of::<SavedRegisters>() as u32, saved.cast()) != 0 {
            return Err(StopReason::RegistersUnavailable);
        }
        let registers = &*registers;
        // A kernel thread's saved registers are zero; those of a worker that the kernel runs for a process (io_uring) are
        // the process's, but for where it is and its stack (copy_thread in arch/x86/kernel/process.c).
        if !is_user(registers) || registers.rip | registers.rsp == 0 {
            return Err(StopReason::KernelThread);
        }
        copy_registers(registers, into);
    }
    Ok(())
}

#[inline(always)]
fn copy_registers(from: &pt_regs, into: &mut Registers) {
    // In the order of DWARF numbers.
    into.general[0] = from.rax;
    into.general[1] = from.rdx;
    into.general[2] = from.rcx;
    into.general[3] = from.rbx;
    into.general[4] = from.rsi;
    into.general[5] = from.rdi;
    into.general[6] = from.rbp;
    into.general[7] = from.rsp;
    into.general[8] = from.r8;
    into.general[9] = from.r9;
    into.general[10] = from.r10;
    into.general[11] = from.r11;
    into.general[12] = from.r12;
    into.general[13] = from.r13;
    into.general[14] = from.r14;
    into.general[15] = from.r15;
    into.rip = from.rip;
    into.known = 0xffff;
    into.exact = 1;
}
