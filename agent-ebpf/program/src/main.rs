//! The BPF program: on each tick of a CPU's clock, walk the stack of what runs there.
//!
//! One `bpf_loop` makes one frame a turn, so that the verifier reads the body of the walk once
//! instead of once for each frame, and a walk needs no tail calls. State lives in a per-CPU map value
//! rather than on the 512-byte BPF stack: what the verifier loads from a map is an unknown scalar,
//! so turns look alike to it.
//!
//! Kernels before 5.17 have no `bpf_loop`. There a second program calls the same turn for each element of an array,
//! `bpf_for_each_map_elem`, which is as good but for the array. Tail calls would not be: the verifier follows a plain
//! loop turn by turn, its limit is reached within eight of them, and 33 programs in a row make few frames.
//!
//! Built for `bpfel-unknown-none` by `cargo xtask build-ebpf`; for other targets this is empty.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod audit;
#[cfg(all(target_arch = "bpf", feature = "aarch64"))]
#[path = "aarch64.rs"]
mod machine;
#[cfg(all(target_arch = "bpf", not(feature = "aarch64")))]
#[path = "x86_64.rs"]
mod machine;
#[cfg(target_arch = "bpf")]
mod program;
#[cfg(all(target_arch = "bpf", feature = "timing"))]
mod timing;

#[cfg(not(target_arch = "bpf"))]
fn main() {}
