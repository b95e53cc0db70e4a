//! The walk on x86-64.

mod code_bytes;
mod frame_pointer;
mod hotspot;
mod registers;
mod step;

pub use registers::Registers;
pub use step::step;
