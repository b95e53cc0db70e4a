//! The walk on aarch64.

mod frame_pointer;
mod registers;
mod step;

pub use registers::{PAC_MASK, Registers};
pub use step::step;
