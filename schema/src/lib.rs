//! Every type that crosses a boundary of Windlass, and nothing else.
//!
//! Without features this is `no_std` and allocates nothing: the BPF program uses it as it is. With
//! `std` come file IDs, the HTTP bodies and the pprof messages. In reading order:
//!
//! - [`address`]: process address, image address, file offset, return address
//! - [`build_id`]: the name of an image
//! - [`rule`] and [`record`]: how to step from a frame to its caller, as meaning and as 8 bytes
//! - [`page`] and [`table`]: the unwind-table format, its search and its reader
//! - [`stop`]: why a walk ended
//! - [`wide_code`]: which code without CFI is looked at for frame pointers
//! - [`coroutines`]: where stacks of libc's coroutines end is told from what
//! - [`maps`]: layouts and limits of the BPF maps
//! - `file_id` (feature `std`): the name of an image without a build-ID note
//! - `kernel_module` (feature `std`): where the code of a kernel module is
//! - `perf_map` (feature `std`): functions that just-in-time compilers made
//! - `http` and `pprof` (feature `std`): bodies of the service's interfaces

#![cfg_attr(not(any(feature = "std", test)), no_std)]

pub mod address;
pub mod architecture;
pub mod build_id;
pub mod coroutines;
#[cfg(feature = "std")]
pub mod file_id;
#[cfg(feature = "std")]
pub mod http;
#[cfg(feature = "std")]
pub mod kernel_module;
pub mod maps;
pub mod page;
mod page_check;
#[cfg(feature = "std")]
pub mod page_writer;
#[cfg(feature = "std")]
pub mod perf_map;
#[cfg(feature = "std")]
pub mod pprof;
pub mod record;
pub mod rule;
pub mod stop;
pub mod table;
#[cfg(feature = "std")]
pub mod table_file;
#[cfg(feature = "std")]
pub mod table_writer;
pub mod wide_code;
#[cfg(feature = "std")]
pub mod wire;

pub use address::{FileOffset, ImageAddress, LoadBias, ProcessAddress, ReturnAddress};
pub use architecture::{Architecture, Register};
pub use build_id::{BuildId, BuildIdError};
pub use record::Record;
pub use rule::{CfaRule, FramePointerRule, ReturnAddressRule, Rule, UnsupportedReason};
pub use stop::StopReason;
pub use table::{Table, TableError};
#[cfg(feature = "std")]
pub use table_file::TableFile;
