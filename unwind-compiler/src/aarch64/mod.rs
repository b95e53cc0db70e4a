//! What the instructions of aarch64 say of the stack.

pub(crate) mod code;
pub(crate) mod instruction;
mod plt;
