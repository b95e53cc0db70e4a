//! What the agent costs: its walk in the kernel, its program, its process.
//!
//! # Why this shape
//! Profilers state "under 1%" of a machine that nobody sees. Here each figure is measured on the machine that prints it:
//! the walk alone with what it is made of beside it, the whole program on programs that run, the agent beside `perf record`.
//! One module answers one question and prints one Markdown table. Arguments choose tables: `cargo xtask bench agent short first`.
//!
//! - [`walk`]: nanoseconds a frame, by [`timing`] programs over the tables of this process ([`process_tables`])
//! - [`sample`]: time of the whole program for samples of one program
//! - [`live`]: time a sample and share of a core, on [`busy`] programs, of the programs as [`installed`]; [`kernel_figures`]
//! - [`complete`]: stacks of known depth and of JIT code, whole or not, beside `perf record --call-graph dwarf`
//! - [`slowdown`]: what a busy program loses to each profiler
//! - [`new_processes`]: the first complete stack of one, samples of short ones, by an agent in this process ([`watching`])
//! - [`many_processes`]: the start among 300 processes, and 10,000 processes a minute

mod busy;
mod complete;
mod installed;
mod kernel_figures;
mod live;
mod many_processes;
mod new_processes;
mod process_tables;
mod sample;
mod slowdown;
mod timing;
mod walk;
mod watching;

use anyhow::Result;

fn main() -> Result<()> {
    // Cargo itself passes `--bench`.
    let chosen: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let wants = |name: &str| chosen.is_empty() || chosen.iter().any(|word| word == name);
    let tables = [
        ("walk", walk::print as fn() -> Result<()>),
        ("sample", sample::print),
        ("live", live::print),
        ("perf", live::print_perf),
        ("complete", complete::print),
        ("slowdown", slowdown::print),
        ("short", new_processes::print_short),
        ("first", new_processes::print_first),
        ("start", many_processes::print_start),
        ("storm", many_processes::print_storm),
    ];
    for (name, print) in tables {
        if wants(name) {
            print()?;
        }
    }
    Ok(())
}
