//! The instruction sets, and their registers by DWARF number.

use core::fmt;

/// The instruction set of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Architecture {
    /// AMD64.
    X86_64 = 1,
    /// 64-bit Arm.
    Aarch64 = 2,
}

impl Architecture {
    /// The instruction set with this code in a table's header.
    pub const fn of_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::X86_64),
            2 => Some(Self::Aarch64),
            _ => None,
        }
    }

    /// The name used in JSON and dumps.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    /// rsp or sp.
    pub const fn stack_pointer(self) -> Register {
        match self {
            Self::X86_64 => Register::RSP,
            Self::Aarch64 => Register::SP,
        }
    }

    /// rbp or x29.
    pub const fn frame_pointer(self) -> Register {
        match self {
            Self::X86_64 => Register::RBP,
            Self::Aarch64 => Register::X29,
        }
    }
}

/// A general-purpose register, or the stack pointer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Register {
    architecture: Architecture,
    number: u8,
}

impl Register {
    /// The stack pointer of x86-64.
    pub const RSP: Self = Self { architecture: Architecture::X86_64, number: 7 };
    /// The frame pointer of x86-64.
    pub const RBP: Self = Self { architecture: Architecture::X86_64, number: 6 };
    /// The stack pointer of aarch64.
    pub const SP: Self = Self { architecture: Architecture::Aarch64, number: 31 };
    /// The frame pointer of aarch64.
    pub const X29: Self = Self { architecture: Architecture::Aarch64, number: 29 };
    /// The link register of aarch64.
    pub const X30: Self = Self { architecture: Architecture::Aarch64, number: 30 };

    /// The register with this DWARF number: 0 to 15 (System V ABI for AMD64, figure 3.36), 0 to 31 (DWARF for
    /// the Arm 64-bit Architecture, 4.1).
    pub const fn new(architecture: Architecture, dwarf_number: u16) -> Option<Self> {
        let registers = match architecture {
            Architecture::X86_64 => 16,
            Architecture::Aarch64 => 32,
        };
        if dwarf_number < registers { Some(Self { architecture, number: dwarf_number as u8 }) } else { None }
    }

    /// The DWARF number.
    pub const fn number(self) -> u8 {
        self.number
    }

    /// The instruction set that it belongs to.
    pub const fn architecture(self) -> Architecture {
        self.architecture
    }

    /// The assembler's name.
    pub const fn name(self) -> &'static str {
        const X86_64: [&str; 16] = [
            "rax", "rdx", "rcx", "rbx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13",
            "r14", "r15",
        ];
        const AARCH64: [&str; 32] = [
            "x0", "x1", "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9", "x10", "x11", "x12", "x13", "x14",
            "x15", "x16", "x17", "x18", "x19", "x20", "x21", "x22", "x23", "x24", "x25", "x26", "x27", "x28",
            "x29", "x30", "sp",
        ];
        match self.architecture {
            Architecture::X86_64 => X86_64[self.number as usize],
            Architecture::Aarch64 => AARCH64[self.number as usize],
        }
    }
}

impl fmt::Debug for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
