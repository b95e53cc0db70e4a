//! The registers of a frame.

use windlass_schema::record::REGISTERS;
use windlass_schema::{Record, StopReason};

use crate::machine::Machine;
use crate::memory::StackMemory;

/// The registers of one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Registers {
    /// General-purpose registers by DWARF number.
    pub general: [u64; REGISTERS],
    /// The instruction pointer: an instruction's address if `exact`, else a return address.
    pub rip: u64,
    /// Bit for each general-purpose register that is known.
    pub known: u32,
    /// 1 in the innermost frame and in one that a signal interrupted, else 0.
    pub exact: u32,
}

impl Registers {
    /// Every general-purpose register.
    pub(super) const ALL: u32 = (1 << REGISTERS) - 1;

    /// Registers as the kernel saved them: all known, rip exact.
    pub const fn innermost(general: [u64; REGISTERS], rip: u64) -> Self {
        Self { general, rip, known: Self::ALL, exact: 1 }
    }

    #[inline(always)]
    pub(super) fn get(&self, register: u8) -> Result<u64, StopReason> {
        let register = register & 15;
        if self.known >> register & 1 == 0 {
            return Err(StopReason::RegisterUnknown);
        }
        Ok(self.general[register as usize])
    }
}

impl Machine for Registers {
    #[inline(always)]
    fn program_counter(&self) -> u64 {
        self.rip
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
