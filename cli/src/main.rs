//! The Windlass command line: what a build, a script or a person says to the service, and the tools
//! that need no service at all.
//!
//! The strongest upload tools (sentry-cli, datadog-ci) ask first and send only what lacks; users
//! complain of files that were silently left out, of no answer to "why has this binary no symbols",
//! and of tools that need a running stack before they show anything. So every command says what it
//! found and what it lacks, exits 0 (done), 1 (done, with findings) or 2 (could not), and
//! `windlass quickstart` needs nothing but this binary.

mod address_input;
mod artefacts;
mod compressed_file;
mod mapped_elf;
mod profile;
mod quickstart;
mod recording;
mod render;
mod server;
mod summary;
mod symbolize;
mod symbols;
mod terminal;
mod unwind;
mod upload;

use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser, Subcommand};

const EXAMPLES: &str = "\
Examples:
  windlass quickstart                                   profile this machine for ten seconds
  windlass upload target/release --server http://debuginfod.example:8002
  windlass symbolize --build-id 6be6a8c1 0x1139 0x1150
  windlass profile --pid 4711 -o profile.html

Exit status: 0 done, 1 done but with findings, 2 could not.
Environment: WINDLASS_SERVER, WINDLASS_TOKEN; logging follows RUST_LOG (default: error).";

#[derive(Parser)]
#[command(name = "windlass", version, about = "Debug information for production: upload, symbolize, profile")]
#[command(after_help = EXAMPLES, propagate_version = true)]
struct Windlass {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Profile this machine for some seconds; needs nothing else installed
    Quickstart(quickstart::QuickstartArgs),
    /// Send the debug information of a build to the service
    Upload(upload::UploadArgs),
    /// List, show, label and delete what the service has stored
    Artefacts(artefacts::ArtefactsArgs),
    /// Profile a process or the whole machine
    Profile(profile::ProfileArgs),
    /// Turn addresses or a whole profile into functions, files and lines through the service
    Symbolize(symbolize::SymbolizeArgs),
    /// Build and query symbol indexes, without a service
    Symbols(symbols::SymbolsArgs),
    /// Compile, print and check unwind tables, without a service
    Unwind(unwind::UnwindArgs),
    /// Print a completion script for a shell
    #[command(after_help = "Example:\n  windlass completions bash > /etc/bash_completion.d/windlass")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// Done.
const DONE: u8 = 0;
/// Done, with findings.
const FINDINGS: u8 = 1;
/// Could not.
const FAILED: u8 = 2;

fn main() -> ExitCode {
    let command = Windlass::parse().command;
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("error")),
        )
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    // Fails only when a provider is there already, which serves as well.
    let _ = rustls::crypto::ring::default_provider().install_default();
    run(command).unwrap_or_else(|error| {
        eprintln!("windlass: {error:#}");
        ExitCode::from(FAILED)
    })
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Quickstart(args) => runtime()?.block_on(quickstart::run(args)),
        Command::Upload(args) => runtime()?.block_on(upload::run(args)),
        Command::Artefacts(args) => runtime()?.block_on(artefacts::run(args)),
        Command::Profile(args) => runtime()?.block_on(profile::run(args)),
        Command::Symbolize(args) => runtime()?.block_on(symbolize::run(args)),
        Command::Symbols(args) => {
            die_quietly_of_a_closed_pipe();
            symbols::run(args)
        }
        Command::Unwind(args) => {
            die_quietly_of_a_closed_pipe();
            unwind::run(args)
        }
        Command::Completions { shell } => {
            die_quietly_of_a_closed_pipe();
            let mut command = Windlass::command();
            clap_complete::generate(shell, &mut command, "windlass", &mut std::io::stdout());
            Ok(ExitCode::from(DONE))
        }
    }
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Runtime::new().context("failed to start the asynchronous runtime")
}

/// From here on `windlass unwind dump ... | head` ends like any Unix filter, instead of panicking in `println!`. Commands
/// that talk to a service call it when they have what they print: until then a connection that breaks must be
/// an error of that request, and tokio writes several buffers at once by `writev`, for which there is no MSG_NOSIGNAL.
fn die_quietly_of_a_closed_pipe() {
    // SAFETY: SIG_DFL is a valid disposition for SIGPIPE, and signal() may be called at any time.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Windlass::command().debug_assert();
    }

    #[track_caller]
    fn rejects(arguments: &str, naming: &str) {
        match Windlass::try_parse_from(arguments.split(' ')) {
            Ok(_) => panic!("{arguments:?} was accepted"),
            Err(error) => assert!(error.to_string().contains(naming), "{error}"),
        }
    }

    #[test]
    fn arguments_that_cannot_be_meant_are_refused() {
        rejects("windlass upload", "<PATH>");
        rejects("windlass upload x --jobs 0", "--jobs");
        rejects("windlass profile --pid 1 --all -o x.html", "--all");
        rejects("windlass profile --all", "--output");
        rejects("windlass profile --all --frequency 0 -o x.html", "--frequency");
        rejects("windlass quickstart --seconds 0", "--seconds");
        rejects("windlass symbolize --build-id ABCD 0x1", "lower-case");
        rejects("windlass symbolize --build-id abcd -o x.pb.gz 0x1", "--output");
        rejects("windlass symbols lookup 0x1", "--obj");
        rejects("windlass artefacts label abcd", "--add");
        rejects("windlass artefacts delete abcd --path /a.c", "--kind");
        rejects("windlass artefacts delete", "<BUILD-ID>");
    }
}
