//! The unwinder: plain functions over how memory is read, the same code in the kernel and on the host.
//!
//! The strongest BPF unwinders keep their step in C inside the program and test it by compiling that
//! file once more for the host with the helpers stubbed. Here the walk is an ordinary `no_std`
//! library: the BPF program instantiates it over map lookups and `bpf_probe_read_user`, the host over
//! chunks in its own memory and captured stack bytes, so that property tests, differential tests and
//! the unprivileged mode run the very code that runs in the kernel. In reading order:
//!
//! - [`memory`]: what a walk reads from: a stack, and the tables' chunks
//! - [`search`]: address -> mapping -> page -> record
//! - [`recent`]: address -> record, where a walk has been before
//! - [`stack_window`]: the stack, read for several frames at once
//! - [`machine`]: what a walk needs of an instruction set
//! - [`x86_64`], [`aarch64`]: the registers of each; record and registers -> the caller's registers
//! - [`frame_pointer`]: the same where there is no record
//! - [`walk`]: one frame after the other, until there is a reason to stop

#![cfg_attr(not(test), no_std)]

pub mod aarch64;
pub mod frame_pointer;
pub mod machine;
pub mod memory;
pub mod recent;
pub mod search;
pub mod stack_window;
pub mod walk;
pub mod x86_64;
