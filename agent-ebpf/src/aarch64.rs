//! The walk on aarch64.

mod registers;
mod step;

pub use registers::{PAC_MASK, Registers};
pub use step::step;
