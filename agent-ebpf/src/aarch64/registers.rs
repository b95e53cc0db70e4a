//! The registers of a frame.

use windlass_schema::{Record, StopReason};

use crate::machine::Machine;
use crate::memory::StackMemory;

/// Number of general-purpose registers, the stack pointer among them: DWARF numbers 0 to 31.
pub(super) const REGISTERS: usize = 32;
/// DWARF numbers of x29, x30 and sp (DWARF for the Arm 64-bit Architecture, 4.1).
pub(super) const DWARF_X29: u8 = windlass_schema::Register::X29.number();
pub(super) const DWARF_X30: u8 = windlass_schema::Register::X30.number();
pub(super) const DWARF_SP: u8 = windlass_schema::Register::SP.number();

/// Bits that a pointer authentication code takes in a return address where user addresses have 48 bits, as in
/// most kernels: 54 to 48. Bit 55 tells user from kernel addresses, and a tag is above it
/// (Documentation/arch/arm64/pointer-authentication.rst). The kernel states it for a process as `insn_mask` of
/// `NT_ARM_PAC_MASK`.
pub const PAC_MASK: u64 = 0x7f << 48;

/// The registers of one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Registers {
    /// x0 to x30 and sp, by DWARF number.
    pub general: [u64; REGISTERS],
    /// The program counter: an instruction's address if `exact`, else a return address without its
    /// authentication code.
    pub pc: u64,
    /// Bits of the process's return addresses that are no address; see [`PAC_MASK`].
    pub pac_mask: u64,
    /// Bit for each general-purpose register that is known.
    pub known: u32,
    /// 1 in the innermost frame and in one that a signal interrupted, else 0.
    pub exact: u32,
}

impl Default for Registers {
    fn default() -> Self {
        Self { general: [0; REGISTERS], pc: 0, pac_mask: PAC_MASK, known: 0, exact: 0 }
    }
}

impl Registers {
    /// Every general-purpose register.
    pub(super) const ALL: u32 = u32::MAX;

    /// Registers as the kernel saved them: all known, pc exact.
    pub const fn innermost(general: [u64; REGISTERS], pc: u64) -> Self {
        Self { general, pc, pac_mask: PAC_MASK, known: Self::ALL, exact: 1 }
    }

    #[inline(always)]
    pub(super) fn get(&self, register: u8) -> Result<u64, StopReason> {
        let register = register & 31;
        if self.known >> register & 1 == 0 {
            return Err(StopReason::RegisterUnknown);
        }
        Ok(self.general[register as usize])
    }
}

impl Machine for Registers {
    #[inline(always)]
    fn program_counter(&self) -> u64 {
        self.pc
    }

    #[inline(always)]
    fn is_exact(&self) -> bool {
        self.exact != 0
    }

    #[inline(always)]
    fn step<M: StackMemory>(&mut self, record: Record, memory: &M) -> Result<(), StopReason> {
        super::step(self, record, memory)
    }
}
