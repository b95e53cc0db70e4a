//! From a build's ELF files to named stacks, end to end; and the rules that no single crate can check.

mod aarch64;
mod agent_process;
mod architecture;
mod audit;
mod bpf;
mod chunks;
mod corpus;
mod debuginfod;
mod go_walks;
mod hanging_files;
mod kernel_maps;
mod live;
mod made_code;
mod mixed_stacks;
mod packaging;
mod python_trampolines;
mod quickstart;
mod readme;
mod rule_walks;
mod second_reader;
mod untrusted_service;
mod unwind;
mod upload;
mod user_mode;
mod walks;
mod web_assembly;
