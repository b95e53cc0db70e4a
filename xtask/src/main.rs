//! The project's chores, in Rust: `cargo xtask COMMAND`.
//!
//! A Makefile or a CI file grows a second truth that nobody can run at home (the complaint about
//! most profilers' build systems), so what CI runs, what the README says and what a contributor runs
//! are the same command here, as in rust-analyzer. Nothing of Windlass depends on this crate.

mod bench;
mod checkout;
mod ebpf;
mod fixtures;
mod fuzz;
mod licence;
mod programs;
mod suite;
mod vm;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// The project's chores.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs every check and test: what CI runs
    Test {
        /// Nothing may be skipped; also in force when the environment says CI=true
        #[arg(long)]
        ci: bool,
        /// Leave out what takes other programs or long: their installation, docs, the BPF build
        #[arg(long)]
        fast: bool,
    },
    /// Builds the BPF program for each instruction set into agent/bpf
    BuildEbpf {
        /// Build elsewhere and compare with the committed object
        #[arg(long)]
        check: bool,
        /// Build the object with the programs that time the walk into target/bpf/timing.bpf.o
        #[arg(long, conflicts_with = "check")]
        timing: bool,
    },
    /// Checks the licences of all dependencies against deny.toml
    Licences,
    /// Measures, and writes the tables of docs/benchmarks.md
    Bench {
        /// Which table
        #[arg(default_value = "unwind", value_parser = bench::NAMES)]
        name: String,
        /// Only these of its tables; they are printed and not written
        tables: Vec<String>,
    },
    /// Rebuilds the ELF files under fixtures/elf as fixtures/MANIFEST.md says, and their hashes in it
    Fixtures {
        /// Only compare the committed files with the manifest
        #[arg(long)]
        check: bool,
    },
    /// Fuzzes the decoders with cargo-fuzz
    Fuzz {
        /// One target; all in turn if none is named
        target: Option<String>,
        /// For how long, each
        #[arg(long, default_value_t = 60)]
        seconds: u64,
    },
    /// Runs the agent inside other kernels, in QEMU without KVM, and checks the stacks of the bundled workload
    Vm {
        /// Series of kernels, as `6.12`; packages of Debian are searched for the newest of each
        #[arg(default_values_t = vm::DEFAULT_SERIES.map(str::to_owned))]
        series: Vec<String>,
        /// Instruction set of the machine; may be given again
        #[arg(long = "guest", value_name = "NAME", default_values_t = vm::GUEST_NAMES.map(str::to_owned))]
        guests: Vec<String>,
        /// How long to sample in each
        #[arg(long, default_value_t = 20)]
        seconds: u32,
    },
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Command::Test { ci, fast } => suite::run(ci || checkout::is_ci(), fast),
        Command::BuildEbpf { timing: true, .. } => ebpf::build_timing().map(drop),
        Command::BuildEbpf { check: true, .. } => {
            if let Some(reason) = ebpf::check()? {
                println!("{reason}");
            }
            Ok(())
        }
        Command::BuildEbpf { check: false, .. } => ebpf::update(),
        Command::Licences => licence::check(),
        Command::Bench { name, tables } => bench::run(&name, &tables),
        Command::Fixtures { check: true } => fixtures::check(),
        Command::Fixtures { check: false } => fixtures::rebuild(),
        Command::Fuzz { target, seconds } => fuzz::run(target.as_deref(), seconds),
        Command::Vm { series, guests, seconds } => vm::run(&series, &guests, seconds, checkout::is_ci()),
    }
}
