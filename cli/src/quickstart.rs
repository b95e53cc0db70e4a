//! `windlass quickstart`: one command from nothing to a flame graph.
//!
//! A service on embedded storage, an agent and a workload of known shape, all from this binary. Most
//! profilers ask for a backend, a daemon and privileges before the first stack is seen; this shows real
//! stacks of this machine at once, and without privileges still those of its own workload, saying so.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use tokio::process::{Child, Command};

use windlass_agent::privilege::Privilege;

use crate::recording::{Mode, Recording, Target, embedded_service};
use crate::server::Server;
use crate::summary::Summary;
use crate::upload;

const EXAMPLES: &str = "\
Examples:
  sudo windlass quickstart                  the whole machine
  windlass quickstart                       without root: the bundled workload alone
  windlass quickstart --seconds 5 --json | jq .functions[0]

Exit status: 0 done, 1 no sample was taken, 2 could not.";

/// Samples per second for each CPU: prime, so that it does not beat with timers.
const FREQUENCY_HZ: u32 = 97;
/// How long the workload outlives the sampling, should this process be killed and not end it.
const WORKLOAD_MARGIN_SECONDS: u32 = 60;
/// Folders named `windlass-quickstart-N` to try in the current directory.
const MAX_FOLDERS: u32 = 100;
/// Tries to run the workload while another thread's fork still holds it open for writing (ETXTBSY).
const SPAWN_ATTEMPTS: u32 = 20;

/// Arguments of `windlass quickstart`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct QuickstartArgs {
    /// How long to sample; Ctrl-C ends it earlier
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// Print the summary as JSON
    #[arg(long)]
    json: bool,
    /// Folder for the service's data and the profile [default: a new windlass-quickstart folder here]
    #[arg(long)]
    dir: Option<PathBuf>,
}

/// Runs `windlass quickstart`.
pub(crate) async fn run(args: QuickstartArgs) -> anyhow::Result<ExitCode> {
    let dir = folder(args.dir.as_deref())?;
    eprintln!("windlass: data and results go to {}", dir.display());
    let service = embedded_service(dir.join("service")).await?;
    eprintln!("windlass: service at {}", service.url());
    let result = async {
        let server = Server::new(&service.url(), None)?;
        profile_workload(&args, &dir, &server).await
    }
    .await;
    service.stop().await;
    result
}

async fn profile_workload(args: &QuickstartArgs, dir: &Path, server: &Server) -> anyhow::Result<ExitCode> {
    let program = windlass_workload::write_executable(dir)
        .with_context(|| format!("failed to write the workload to {}", dir.display()))?;
    let report = upload::upload(server, std::slice::from_ref(&program), upload::Options::default()).await?;
    anyhow::ensure!(report.exit_status() == crate::DONE, "failed to upload the workload\n{report}");

    let mut child = spawn(&program, args.seconds + WORKLOAD_MARGIN_SECONDS).await?;
    let pid = child.id().context("the workload ended at once")?;
    eprintln!("windlass: workload runs as process {pid}");
    let (mode, recording) = start(server, &dir.join("tables"), pid).await?;
    let recorded = recording.finish_after(Duration::from_secs(args.seconds.into())).await;
    // It may have ended with the interrupt that ended the sampling.
    let _ = child.kill().await;

    let recorded = recorded?;
    let mut summary = Summary::new(&recorded, mode, Some(pid));
    summary.write_all(dir, "windlass quickstart")?;
    crate::die_quietly_of_a_closed_pipe();
    if args.json {
        println!("{}", summary.json()?);
    } else {
        print!("{}", summary.text());
        println!(
            "  {}  (the service's data: `windlassd serve --data-dir` it)",
            dir.join("service").display()
        );
    }
    if summary.is_empty() {
        eprintln!("windlass: no sample was taken");
        return Ok(ExitCode::from(crate::FINDINGS));
    }
    Ok(ExitCode::from(crate::DONE))
}

/// Samples the machine in the kernel, or if that is refused the workload through copies of its stacks.
async fn start(server: &Server, cache_dir: &Path, pid: u32) -> anyhow::Result<(Mode, Recording)> {
    let machine = Target { mode: Mode::Bpf, pid: None, frequency_hz: FREQUENCY_HZ };
    let error = match Recording::start(server, cache_dir.to_owned(), machine).await {
        Ok(recording) => return Ok((Mode::Bpf, recording)),
        Err(error) => error,
    };
    let privilege = Privilege::current();
    eprintln!("windlass: cannot sample the whole machine: {error:#}");
    eprintln!("  {}", privilege.bpf_advice().join("\n  "));
    eprintln!("windlass: sampling the workload alone instead, through copies of its stacks");
    let workload = Target { mode: Mode::User, pid: Some(pid), ..machine };
    let recording = Recording::start(server, cache_dir.to_owned(), workload).await.with_context(|| {
        format!("failed to sample even the workload\n  {}\n ", privilege.copied_stacks_advice().join("\n  "))
    })?;
    Ok((Mode::User, recording))
}

async fn spawn(program: &Path, seconds: u32) -> anyhow::Result<Child> {
    let mut attempts = 0;
    loop {
        let mut command = Command::new(program);
        command.arg(seconds.to_string()).stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);
        match command.spawn() {
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy && attempts < SPAWN_ATTEMPTS => {
                attempts += 1;
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            result => {
                return result.with_context(|| {
                    format!(
                        "failed to run {} (if its folder is mounted noexec, name another with --dir)",
                        program.display()
                    )
                });
            }
        }
    }
}

/// The folder asked for, else a new one here, else a new one for temporary files. The path is absolute.
fn folder(asked: Option<&Path>) -> anyhow::Result<PathBuf> {
    let made = match asked {
        Some(dir) => fs::create_dir_all(dir).map(|()| dir.to_owned()),
        None => fresh_folder(Path::new(".")).or_else(|_| {
            tempfile::Builder::new().prefix("windlass-quickstart-").tempdir().map(|dir| dir.keep())
        }),
    };
    let named =
        || format!("failed to make the folder {}", asked.unwrap_or("windlass-quickstart".as_ref()).display());
    made.and_then(fs::canonicalize).with_context(named)
}

fn fresh_folder(parent: &Path) -> io::Result<PathBuf> {
    for number in 1..=MAX_FOLDERS {
        let name = match number {
            1 => "windlass-quickstart".to_owned(),
            _ => format!("windlass-quickstart-{number}"),
        };
        match fs::create_dir(parent.join(&name)) {
            Ok(()) => return Ok(parent.join(name)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_run_gets_a_folder_of_its_own() {
        let parent = tempfile::tempdir().unwrap();
        assert_eq!(fresh_folder(parent.path()).unwrap(), parent.path().join("windlass-quickstart"));
        assert_eq!(fresh_folder(parent.path()).unwrap(), parent.path().join("windlass-quickstart-2"));
        assert!(fresh_folder(&parent.path().join("absent")).is_err());
    }

    #[test]
    fn a_named_folder_may_exist() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("a/b");
        assert_eq!(folder(Some(&dir)).unwrap(), dir.canonicalize().unwrap());
        assert!(folder(Some(&dir)).is_ok());
    }
}
