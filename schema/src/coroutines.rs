//! Which function makes libc's coroutines?
//!
//! Their first function returns to an address that only its instructions say. Two look for that and have to find the same: the agent,
//! which puts the code there into a skeleton, and the compiler of tables, which has stacks end there.

/// glibc's libc, by the name that its symbols' versions give it. Names of symbols are looked at in no other image: there are tens of
/// thousands in some.
pub const LIBC: &[u8] = b"libc.so.6";
/// What makes its coroutines.
pub const MAKECONTEXT: &[u8] = b"makecontext";
/// Most bytes of that; glibc's have 300.
pub const MAX_MAKECONTEXT_BYTES: u64 = 4096;
