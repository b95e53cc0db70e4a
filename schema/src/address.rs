//! The four kinds of address, kept apart by type.
//!
//! ```text
//! process address  --(mapping: minus bias)-->  image address  <--(program header)-->  file offset
//! return address   --(minus one byte)------->  process address of the call
//! ```
//! A *process address* is what the instruction pointer held. An *image address* is the ELF virtual
//! address (`p_vaddr` space) in which symbols, line tables and CFI are written. A *file offset*
//! counts bytes from the start of the ELF file. A *return address* points behind a call, possibly
//! into the next function, so it must never be looked up as it is:
//! [`ReturnAddress::lookup_address`] is the one place where it becomes an address to look up.

use core::fmt;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// Wraps a raw 64-bit value.
            #[inline(always)]
            pub const fn new(value: u64) -> Self {
                Self(value)
            }

            /// The raw 64-bit value.
            #[inline(always)]
            pub const fn get(self) -> u64 {
                self.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address! {
    /// An address in the memory of a running process.
    ProcessAddress
}
address! {
    /// A virtual address as written in an ELF file (`p_vaddr`, symbol values, CFI, line tables).
    ImageAddress
}
address! {
    /// A byte offset from the start of an ELF file.
    FileOffset
}
address! {
    /// The address behind a call instruction, as a caller's stack holds it.
    ReturnAddress
}
address! {
    /// What is subtracted (wrapping) from a process address to give an image address.
    LoadBias
}

impl ReturnAddress {
    /// The address to look up for this return address: one byte back, inside the call instruction.
    ///
    /// ```
    /// # use windlass_schema::{ProcessAddress, ReturnAddress};
    /// assert_eq!(ReturnAddress::new(0x1005).lookup_address(), ProcessAddress::new(0x1004));
    /// ```
    #[inline(always)]
    pub const fn lookup_address(self) -> ProcessAddress {
        ProcessAddress(self.0.wrapping_sub(1))
    }
}

impl ProcessAddress {
    /// The image address of this process address in an image loaded with `bias`.
    #[inline(always)]
    pub const fn to_image(self, bias: LoadBias) -> ImageAddress {
        ImageAddress(self.0.wrapping_sub(bias.0))
    }
}

impl ImageAddress {
    /// The process address of this image address in an image loaded with `bias`.
    #[inline(always)]
    pub const fn to_process(self, bias: LoadBias) -> ProcessAddress {
        ProcessAddress(self.0.wrapping_add(bias.0))
    }
}
