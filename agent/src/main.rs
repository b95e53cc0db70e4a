//! The agent as a program.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use windlass_agent::agent::{DEFAULT_FREQUENCY_HZ, DEFAULT_SHIP_INTERVAL};
use windlass_agent::choice::{Choice, Rule};
use windlass_agent::chunks::MOST_TABLE_BYTES;
use windlass_agent::compression::Compression;
use windlass_agent::kernel::{DEFAULT_TABLE_BUDGET_BYTES, LoadError};
use windlass_agent::privilege::Privilege;
use windlass_agent::table_cache::HOST_ARCHITECTURE;
use windlass_agent::token::Token;
use windlass_agent::{Agent, Config, StartError, Summary};
use windlass_schema::Architecture;

const MIB: u64 = 1024 * 1024;

/// Samples the stacks of every process of this host, and ships addresses to a windlassd.
#[derive(Parser)]
#[command(
    version,
    after_help = "\
Examples:
  windlass-agent --server http://localhost:8002
  windlass-agent --server https://windlass.example.org --token-file /etc/windlass/token
  windlass-agent --server http://localhost:8002 --include cgroup=/kubepods* --exclude command=postgres
  windlass-agent --server http://localhost:8002 --pid 4711 --frequency 97 --seconds 30

Log output follows RUST_LOG (default: info)."
)]
struct Arguments {
    /// Address of the service
    #[arg(long, env = "WINDLASS_SERVER", value_name = "URL")]
    server: String,
    /// Samples a second on each CPU
    #[arg(long, value_name = "HZ", default_value_t = DEFAULT_FREQUENCY_HZ)]
    frequency: u32,
    /// Where unwind tables and unsent profiles are kept [default: /var/cache/windlass-agent]
    #[arg(
        long,
        env = "WINDLASS_CACHE_DIR",
        value_name = "DIR",
        default_value = "/var/cache/windlass-agent",
        hide_default_value = true
    )]
    cache_dir: PathBuf,
    /// Most kernel memory for unwind tables, in MiB; those that samples needed least lately go first
    #[arg(
        long,
        env = "WINDLASS_KERNEL_MEMORY",
        value_name = "MIB",
        default_value_t = DEFAULT_TABLE_BUDGET_BYTES / MIB,
        value_parser = clap::value_parser!(u64).range(1..=MOST_TABLE_BYTES.div_ceil(MIB))
    )]
    kernel_memory: u64,
    /// Only this process and its descendants
    #[arg(long, value_name = "PID")]
    pid: Option<u32>,
    /// How profiles are compressed on their way
    #[arg(long, value_enum, value_name = "CODING", default_value_t)]
    compression: Compression,
    /// Name of the host in profiles [default: that of the kernel]
    #[arg(long, env = "WINDLASS_HOST_NAME", value_name = "NAME")]
    host_name: Option<String>,
    /// Only processes of which one of these holds: cgroup=GLOB, command=GLOB, uid=N, uid=N-M
    #[arg(long, value_name = "RULE")]
    include: Vec<Rule>,
    /// No processes of which one of these holds
    #[arg(long, value_name = "RULE")]
    exclude: Vec<Rule>,
    /// Answer /metrics (Prometheus) and /healthz at this address [default: nowhere]
    #[arg(long, env = "WINDLASS_LISTEN", value_name = "ADDR")]
    listen: Option<SocketAddr>,
    /// File with the token for the service; read again when that is refused
    #[arg(long, env = "WINDLASS_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Stop after this time; otherwise at SIGINT or SIGTERM
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,
    /// Hold one walk in N against the CFI of its images, and count in the log and in /metrics where they disagree
    #[arg(long, value_name = "1/N", value_parser = audit_share)]
    audit: Option<NonZeroU32>,
    /// Seconds between two batches of profiles
    #[arg(long, value_name = "N", default_value_t = DEFAULT_SHIP_INTERVAL.as_secs(), value_parser = clap::value_parser!(u64).range(1..))]
    ship_interval: u64,
}

/// Smallest allocation that goes back to the system when it is freed, in bytes: glibc's initial value, which
/// it would otherwise raise to 32 MiB with the first skeleton that is freed, and keep all later ones.
#[cfg(target_env = "gnu")]
const MMAP_THRESHOLD_BYTES: i32 = 128 * 1024;

/// Keeps the agent small after it was large for a moment.
#[cfg(target_env = "gnu")]
fn return_freed_memory() {
    // SAFETY: called before any other thread is started.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES);
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

#[cfg(not(target_env = "gnu"))]
fn return_freed_memory() {}

fn main() -> ExitCode {
    return_freed_memory();
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let ansi = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(ansi).init();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("windlass-agent: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    if let Some(pid) = arguments.pid {
        anyhow::ensure!(Path::new(&format!("/proc/{pid}")).exists(), "there is no process {pid}");
    }
    let mut config = Config::new(arguments.server, arguments.cache_dir);
    config.frequency_hz = arguments.frequency;
    config.only_pid = arguments.pid;
    config.choice = Choice { include: arguments.include, exclude: arguments.exclude };
    config.listen = arguments.listen;
    config.compression = arguments.compression;
    config.host_name = arguments.host_name;
    config.table_budget_bytes = arguments.kernel_memory * MIB;
    anyhow::ensure!(
        arguments.audit.is_none() || HOST_ARCHITECTURE == Architecture::X86_64,
        "--audit is for x86-64 alone"
    );
    config.audit = arguments.audit;
    config.ship_interval = Duration::from_secs(arguments.ship_interval);
    if let Some(file) = arguments.token_file {
        let failed = || format!("failed to read token file {}", file.display());
        config.token = Token::in_file(file.clone()).with_context(failed)?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let seconds = arguments.seconds.map(Duration::from_secs);
    let mut agent = Agent::start(config).map_err(|error| {
        let advice = match error {
            StartError::Load(LoadError::NotPermitted) => Privilege::current().bpf_advice(),
            _ => Vec::new(),
        };
        let advice: String = advice.iter().map(|point| format!("\n  {point}")).collect();
        anyhow::anyhow!("failed to start: {error}{advice}")
    })?;
    for limit in Privilege::current().limits() {
        tracing::warn!("{limit}");
    }
    tracing::info!("sampling");
    runtime.block_on(end(seconds, &mut agent)).context("failed to wait for signals")?;
    report(&agent.stop()?);
    Ok(())
}

/// `N` of `1/N`.
fn audit_share(text: &str) -> Result<NonZeroU32, String> {
    let every = text.strip_prefix("1/").and_then(|every| every.parse().ok());
    every.ok_or_else(|| "expected 1/N, such as 1/100".to_owned())
}

/// Waits for SIGINT, SIGTERM, the end of the time, or the agent's own.
async fn end(seconds: Option<Duration>, agent: &mut Agent) -> std::io::Result<()> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let time = async {
        match seconds {
            Some(seconds) => tokio::time::sleep(seconds).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        () = time => {}
        () = agent.ended() => {}
    }
    Ok(())
}

fn report(summary: &Summary) {
    tracing::info!(
        samples = summary.samples,
        complete = summary.complete,
        lost_samples = summary.lost_samples,
        sent_batches = summary.sent_batches,
        spooled_batches = summary.spooled_batches,
        dropped_batches = summary.dropped_batches,
        tables_loaded = summary.tables_loaded,
        tables_unavailable = summary.tables_unavailable.len(),
        "stopped"
    );
    for (reason, samples) in &summary.stop_reasons {
        tracing::info!(samples, "walks ended with {}", reason.as_str());
    }
    if let Some(audit) = &summary.audit {
        audit.log();
        audit.log_images();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use windlass_agent::metrics::Metrics;
    use windlass_agent::privilege::{CAPABILITIES, SETCAP};

    #[test]
    fn an_audit_takes_one_in_so_many() {
        assert_eq!(audit_share("1/100"), Ok(NonZeroU32::new(100).unwrap()));
        for wrong in ["", "100", "1/", "1/0", "2/3", "1/-1", "1/4294967296"] {
            assert!(audit_share(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_process_that_is_not_there_is_an_error() {
        // Above the highest that kernel.pid_max may be.
        let arguments =
            Arguments::parse_from(["windlass-agent", "--server", "http://127.0.0.1:1", "--pid", "4194305"]);
        assert_eq!(run(arguments).unwrap_err().to_string(), "there is no process 4194305");
    }

    #[test]
    fn alerts_are_over_numbers_that_the_agent_tells() {
        let rules = include_str!("../../packaging/prometheus/windlass-agent.rules.yaml");
        let text = Metrics::default().text();
        let is_of_name = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
        let names: Vec<_> = rules
            .split(|letter| !is_of_name(letter))
            .filter(|word| word.starts_with("windlass_agent_"))
            .collect();
        assert!(names.contains(&"windlass_agent_last_batch_sent_timestamp_seconds"), "{names:?}");
        for name in names {
            assert!(text.contains(&format!("\n# TYPE {name} ")), "{name}");
        }
    }

    const UNIT: &str = include_str!("../../packaging/systemd/windlass-agent.service");
    const DAEMON_SET: &str = include_str!("../../packaging/kubernetes/daemonset.yaml");
    const CONTAINER: &str = include_str!("../../packaging/container/Containerfile");

    /// The values of a setting of the unit.
    fn settings<'a>(name: &str) -> Vec<&'a str> {
        UNIT.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('=')).collect()
    }

    #[test]
    fn packages_grant_what_the_agent_uses_and_no_more() {
        let names: Vec<_> = CAPABILITIES.iter().map(|capability| capability.name).collect();
        assert_eq!(settings("AmbientCapabilities"), [names.join(" ")]);
        assert_eq!(settings("CapabilityBoundingSet"), [names.join(" ")]);
        let short: Vec<_> = names.iter().map(|name| name.trim_start_matches("CAP_")).collect();
        assert!(
            DAEMON_SET.contains(&format!(
                "\n              drop: [ALL]\n              add: [{}]\n",
                short.join(", ")
            ))
        );
        assert!(CONTAINER.contains(&format!(" --cap-add={} ", short.join(","))));
        assert!(include_str!("../../README.md").contains(SETCAP));
    }

    #[test]
    fn packages_start_the_agent_by_arguments_that_it_has() {
        let server = ["--server", "http://127.0.0.1:1"];
        let command = settings("ExecStart").concat();
        let unit = Arguments::parse_from(command.split(' ').chain(server));
        assert_eq!(unit.listen.map(|address| address.port()), Some(8003));
        let arguments = DAEMON_SET.lines().find_map(|line| line.trim().strip_prefix("args: [")).unwrap();
        let arguments =
            arguments.trim_end_matches(']').split(", ").map(|argument| argument.trim_matches('"'));
        let pod = Arguments::parse_from(std::iter::once("windlass-agent").chain(arguments).chain(server));
        let port = pod.listen.unwrap().port();
        assert!(DAEMON_SET.contains(&format!("containerPort: {port}\n")));
        assert!(DAEMON_SET.contains(&format!("prometheus.io/port: \"{port}\"\n")));
        let command = <Arguments as clap::CommandFactory>::command();
        let known: Vec<_> =
            command.get_arguments().filter_map(|argument| argument.get_env()?.to_str()).collect();
        for text in [UNIT, DAEMON_SET, CONTAINER] {
            for word in text.split(|letter: char| !letter.is_ascii_uppercase() && letter != '_') {
                assert!(!word.starts_with("WINDLASS_") || known.contains(&word), "{word}");
            }
        }
    }
}
