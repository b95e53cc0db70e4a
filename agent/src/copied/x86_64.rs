//! The registers in a copied sample, on x86-64.

pub(super) use windlass_agent_ebpf::x86_64::Registers;
use windlass_schema::record::{self, DWARF_RSP};

/// Those that are asked for: bits of `enum perf_event_x86_regs` for ax, bx, cx, dx, si, di, bp, sp, ip and r8 to r15.
pub(super) const REGISTERS: u64 = 0x1ff | 0xff << 16;
const WORDS: usize = REGISTERS.count_ones() as usize;
/// DWARF number of each but ip, in that order.
const DWARF_NUMBERS: [usize; record::REGISTERS] = [0, 3, 2, 1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
/// Where ip is.
const IP: usize = 8;

/// The registers, from their words in the order of the bits.
pub(super) fn registers(words: &[u64; WORDS]) -> Registers {
    let mut general = [0; record::REGISTERS];
    let words_but_ip = words[..IP].iter().chain(&words[IP + 1..]);
    for (number, word) in DWARF_NUMBERS.into_iter().zip(words_but_ip) {
        general[number] = *word;
    }
    Registers::innermost(general, words[IP])
}

/// Where the stack begins that is copied with them.
pub(super) fn stack_pointer(registers: &Registers) -> u64 {
    registers.general[DWARF_RSP as usize]
}
