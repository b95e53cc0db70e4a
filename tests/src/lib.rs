//! What the end-to-end tests share: each module stands for something outside that a test drives.
//!
//! Peers test against recorded files; users then meet the service, the kernel and the debugger
//! together for the first time. Here one process starts the real service, samples a real program
//! through the real BPF object, and asks real debuginfod clients. Whatever a machine lacks is named,
//! and in CI a lack is a failure. In reading order:
//!
//! - [`skip`]: what cannot run here, said aloud
//! - [`program`]: programs that tests call, ours and others
//! - [`service`]: a service on embedded storage, in this process
//! - [`workload`]: the bundled program with known stacks, running
//! - [`silent_files`]: a file system that does not answer
//! - [`held_memory`]: a process whose memory nobody may read
//! - [`stacks`]: a profile as stacks of named frames
//! - [`fuzz_targets`]: the decoders, as functions that must survive any bytes

pub mod fuzz_targets;
pub mod held_memory;
pub mod program;
pub mod service;
pub mod silent_files;
pub mod skip;
pub mod stacks;
pub mod workload;
