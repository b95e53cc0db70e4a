//! The agent: samples the stacks of every process of a host in the kernel, and ships raw addresses.
//!
//! It compiles no DWARF and knows no symbols: unwind tables come compiled from the service, by build-ID,
//! and addresses go back to it. In reading order:
//!
//! - [`agent`]: starting and stopping one
//! - `sampling`: the loop; [`alarm`]: what wakes it beside its backend; `promptness`: how soon
//! - [`backend`]: the boundary to what takes samples: [`kernel`] (BPF) or [`copied`] (no privilege)
//! - [`processes`]: which processes there are; [`selection`], [`choice`],
//!   [`scan_schedule`]
//! - [`process`]: what one maps; `process_reading` on `file_threads` (where they may hang: `visits`, `held_memory`), [`proc_maps`],
//!   [`mapped_file`]
//! - [`images`], [`image`] and [`image_file`]: what is mapped; `frame_pointers`: which of it can be walked without a table
//! - [`tables`]: how an image gets its table; `table_queue`, [`table_cache`], [`skeleton`], [`packed_skeleton`];
//!   `table_refresh`: whether it is still the service's
//! - [`otlp`], [`shipper`], [`spool`], [`compression`]: how samples become profiles and reach the service
//! - [`resource`], [`cgroup`]: of which service, container and pod they are; `owners`: when that is known
//! - [`kallsyms`], [`kernel_modules`]: the kernel's own addresses
//! - [`jit_code`]: code of just-in-time compilers; [`code_file`], [`code_records`] ([`mod@perf_map`], [`jitdump`]),
//!   `code_reading` on `file_threads`, `time_namespace`, [`code_map`], [`symbol_upload`]
//! - [`audit`]: whether the kernel's walks are right
//! - [`metrics`], `own_cost`, `status`: what it says of itself; [`privilege`]: what it may not do
//! - [`service`]: what is asked of the service; [`token`]: by which right
//! - [`chunks`], [`kernel_memory`]: how tables lie in kernel memory; `eviction`: which of them go for others

pub mod agent;
pub mod alarm;
pub mod audit;
pub mod backend;
pub mod cgroup;
pub mod choice;
pub mod chunks;
pub mod code_file;
pub mod code_map;
mod code_reading;
pub mod code_records;
mod code_without_cfi;
pub mod compression;
pub mod copied;
mod coroutine_code;
mod eviction;
mod file_threads;
mod frame_pointers;
mod held_memory;
pub mod image;
pub mod image_file;
pub mod images;
pub mod jit_code;
pub mod jitdump;
pub mod kallsyms;
pub mod kernel;
pub mod kernel_memory;
pub mod kernel_modules;
pub mod mapped_file;
pub mod metrics;
pub mod otlp;
mod own_cost;
pub mod owners;
pub mod packed_skeleton;
pub mod perf_map;
mod perf_ring;
pub mod privilege;
pub mod proc_maps;
pub mod process;
mod process_reading;
pub mod processes;
mod promptness;
pub mod resource;
mod sampling;
pub mod scan_schedule;
pub mod selection;
pub mod service;
pub mod shipper;
pub mod skeleton;
pub mod spool;
mod status;
pub mod symbol_upload;
pub mod table_cache;
mod table_queue;
mod table_refresh;
pub mod tables;
mod time_namespace;
pub mod token;
mod visits;

pub use agent::{Agent, BackendChoice, Config, StartError, StopError, Summary, WarmUp};
