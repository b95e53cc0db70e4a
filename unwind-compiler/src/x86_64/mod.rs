//! What the instructions of x86-64 say of the stack.

pub(crate) mod code;
pub(crate) mod instruction;
mod plt;
mod stack_switch;
