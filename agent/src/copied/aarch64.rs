//! The registers in a copied sample, on aarch64.

pub(super) use windlass_agent_ebpf::aarch64::Registers;
use windlass_schema::Register;

/// Those that are asked for: bits of `enum perf_event_arm_regs` for x0 to x29, lr, sp and pc.
pub(super) const REGISTERS: u64 = (1 << 33) - 1;
const WORDS: usize = REGISTERS.count_ones() as usize;
/// Where pc is; all before it are in the order of DWARF numbers.
const PC: usize = 32;

/// The registers, from their words in the order of the bits.
pub(super) fn registers(words: &[u64; WORDS]) -> Registers {
    let mut general = [0; PC];
    general.copy_from_slice(&words[..PC]);
    Registers::innermost(general, words[PC])
}

/// Where the stack begins that is copied with them.
pub(super) fn stack_pointer(registers: &Registers) -> u64 {
    registers.general[usize::from(Register::SP.number())]
}
