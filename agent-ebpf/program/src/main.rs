//! The BPF program: on each tick of a CPU's clock, walk the stack of what runs there.
//!
//! One `bpf_loop` makes one frame a turn, so that the verifier reads the body of the walk once
//! instead of once for each frame, and a walk needs no tail calls. State lives in a per-CPU map value
//! rather than on the 512-byte BPF stack: what the verifier loads from a map is an unknown scalar,
//! so turns look alike to it.
//!
//! Built for `bpfel-unknown-none` by `cargo xtask build-ebpf`; for other targets this is empty.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod program;
#[cfg(all(target_arch = "bpf", feature = "timing"))]
mod timing;

#[cfg(not(target_arch = "bpf"))]
fn main() {}
