//! Agent
pub mod backend;
pub mod image;
pub mod proc_maps;
pub mod skeleton;
pub mod chunks;
pub mod copied;
pub mod kernel;
pub mod kernel_memory;
mod perf_ring;
