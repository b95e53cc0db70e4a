//! The symbol index against binutils' addr2line and readelf, and against damaged bytes.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod addr2line;
mod agreement;
mod bomb;
mod crafted;
mod damaged;
mod described;
mod format;
mod program;
mod relocatable;
mod split;
mod unnamed;
