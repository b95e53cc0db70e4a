//! What the instructions of x86-64 say of the stack.

pub(crate) mod by_bytes;
pub(crate) mod code;
pub(crate) mod instruction;
mod plt;
mod shift;
mod stack_switch;
mod system_call;

pub(crate) use stack_switch::returned_to;
