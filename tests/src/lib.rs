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
//! - [`stacks`]: a profile as stacks of named frames
//! - [`fuzz_targets`]: the decoders, as functions that must survive any bytes

pub mod fuzz_targets;
pub mod program;
pub mod service;
pub mod skip;
pub mod stacks;
pub mod workload;
