//! `windlassd`: runs, checks and administers the service.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use commands::gc::{GcArguments, RetentionArguments};
use commands::token::TokenCommand;
use tracing_subscriber::EnvFilter;
use windlass_debuginfod::config::{
    DEFAULT_AUDIT_DAYS, DEFAULT_MAX_COPIES_BYTES, DEFAULT_MAX_UPLOAD_BYTES, DEFAULT_UPSTREAM_DEADLINE,
};
use windlass_debuginfod::namespace::RELEASE;
use windlass_debuginfod::tls::TlsFiles;
use windlass_debuginfod::{Config, Service, check, start};

mod commands {
    pub(crate) mod audit;
    pub(crate) mod gc;
    pub(crate) mod token;
}

/// Stores debuginfo, serves it to debuggers, compiles unwind tables and names addresses.
#[derive(Parser)]
#[command(version, after_help = EXAMPLES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  windlassd serve
  windlassd serve --listen 0.0.0.0:8002 --token-file /etc/windlass/token --upstream https://debuginfod.example.org
  DEBUGINFOD_URLS=http://127.0.0.1:8002 gdb ./program
  windlassd token create ci --scope upload:main --data-dir /var/lib/windlass
  windlassd gc --dry-run --unused-days 90 --data-dir /var/lib/windlass
  windlassd check --data-dir /var/lib/windlass

Logging follows RUST_LOG, for example RUST_LOG=debug.";

#[derive(Subcommand)]
enum Command {
    /// Run the service until SIGINT or SIGTERM
    Serve {
        #[command(flatten)]
        store: Store,
        /// Address to listen on; anything but loopback needs a token
        #[arg(long, default_value = "127.0.0.1:8002", env = "WINDLASS_LISTEN")]
        listen: SocketAddr,
        /// debuginfod server to ask for what is not stored here; may be repeated
        #[arg(long = "upstream", value_name = "URL")]
        upstreams: Vec<String>,
        /// How long an upstream may take to begin its answer, in milliseconds
        #[arg(long, value_name = "MS", default_value_t = DEFAULT_UPSTREAM_DEADLINE.as_millis() as u64)]
        upstream_deadline_ms: u64,
        #[command(flatten)]
        access: AccessArguments,
        /// Largest artefact accepted, in decoded bytes
        #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_MAX_UPLOAD_BYTES)]
        max_upload_bytes: u64,
        /// What copies of served contents may take of the data folder's disk, 0 for none
        #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_MAX_COPIES_BYTES)]
        max_copies_bytes: u64,
        #[command(flatten)]
        retention: RetentionArguments,
        /// Collect what nothing needs so often, beside all else [default: only `windlassd gc` does]
        #[arg(long, value_name = "HOURS", value_parser = clap::value_parser!(u64).range(1..))]
        gc_every: Option<u64>,
    },
    /// Remove what nothing needs: what nobody uses, what uploads that were cut off left behind
    Gc(GcArguments),
    /// Make, list and revoke access tokens
    #[command(subcommand)]
    Token(TokenCommand),
    /// Print who wrote what, and from where, latest first
    Audit {
        #[command(flatten)]
        store: Store,
        /// Most entries
        #[arg(long, value_name = "N", default_value_t = 100)]
        limit: usize,
        /// Print a JSON array
        #[arg(long)]
        json: bool,
    },
    /// Read everything back and compare it with its hash and its catalog row; exit 1 with findings
    Check {
        #[command(flatten)]
        store: Store,
        /// Make again what is derived, and correct what the catalog says; what is left is lost until it is uploaded again
        #[arg(long)]
        repair: bool,
    },
}

#[derive(Args)]
struct AccessArguments {
    /// File with a token that is good for everything, sent as `Authorization: Bearer TOKEN`
    #[arg(long, value_name = "FILE", env = "WINDLASS_TOKEN_FILE")]
    token_file: Option<PathBuf>,
    /// Reads need a token too; debuginfod clients send it when DEBUGINFOD_HEADERS_FILE names a file with the header
    #[arg(long)]
    private: bool,
    /// Namespaces of uploads, the most trusted first; all others come after them
    #[arg(long, value_name = "NAMES", value_delimiter = ',', default_value = RELEASE)]
    namespaces: Vec<String>,
    /// The last address of X-Forwarded-For is the client's: only behind a proxy that sets it
    #[arg(long)]
    trust_forwarded_for: bool,
    /// How long the audit log goes back
    #[arg(long, value_name = "DAYS", default_value_t = DEFAULT_AUDIT_DAYS)]
    audit_days: u64,
    /// File with the certificate and its chain as PEM, for https; read again on SIGHUP
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// File with the key of the certificate as PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
}

impl AccessArguments {
    fn apply(self, config: Config) -> anyhow::Result<Config> {
        let read = |path: PathBuf| {
            std::fs::read_to_string(&path).with_context(|| format!("reading token from {path:?}"))
        };
        Ok(Config {
            token: self.token_file.map(read).transpose()?,
            private: self.private,
            namespaces: self.namespaces,
            trust_forwarded_for: self.trust_forwarded_for,
            audit_days: self.audit_days,
            tls: self.tls_cert.zip(self.tls_key).map(|(certificate, key)| TlsFiles { certificate, key }),
            ..config
        })
    }
}

#[derive(Args)]
struct Store {
    /// Folder for the catalog, the blobs and temporary files
    #[arg(long, value_name = "DIR", default_value = "windlass-data", env = "WINDLASS_DATA_DIR")]
    data_dir: PathBuf,
    /// Blob storage: file:///DIR or s3://BUCKET/PREFIX [default: DIR/blobs]
    #[arg(long, value_name = "URL", env = "WINDLASS_STORAGE")]
    storage: Option<String>,
    /// Catalog: sqlite:PATH [default: DIR/catalog.sqlite]
    #[arg(long, value_name = "URL", env = "WINDLASS_CATALOG")]
    catalog: Option<String>,
}

impl Store {
    fn config(self) -> Config {
        Config { storage: self.storage, catalog: self.catalog, ..Config::new(self.data_dir) }
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let ansi = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(ansi).init();
    match run(Arguments::parse().command).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("windlassd: {error:#}");
            ExitCode::from(2)
        }
    }
}

async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Serve {
            store,
            listen,
            upstreams,
            upstream_deadline_ms,
            access,
            max_upload_bytes,
            max_copies_bytes,
            retention,
            gc_every,
        } => {
            raise_open_files();
            let config = Config {
                listen,
                upstreams,
                upstream_deadline: Duration::from_millis(upstream_deadline_ms),
                max_upload_bytes,
                max_copies_bytes,
                collect_every: gc_every.map(|hours| Duration::from_secs(hours.saturating_mul(3600))),
                ..store.config()
            };
            let config = retention.apply(access.apply(config)?);
            let has_tls = config.tls.is_some();
            let service = start(config).await?;
            tokio::select! {
                stop = stop_signal() => stop?,
                failed = reload_on_hangup(&service), if has_tls => failed?,
            }
            tracing::info!("stopping");
            service.stop().await;
            Ok(ExitCode::SUCCESS)
        }
        Command::Token(command) => {
            commands::token::run(command)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Gc(arguments) => {
            commands::gc::run(arguments).await?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Audit { store, limit, json } => {
            commands::audit::run(store, limit, json)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Check { store, repair } => {
            let config = store.config();
            anyhow::ensure!(
                config.data_dir.is_dir(),
                "no data folder {:?} (give --data-dir)",
                config.data_dir
            );
            let report = check(&config, repair).await?;
            for repaired in &report.repaired {
                println!("repaired: {repaired}");
            }
            for finding in &report.findings {
                println!("{finding}");
            }
            println!(
                "{} contents, {} bytes, {} artefacts checked; {} repaired, {} findings",
                report.blobs,
                report.bytes,
                report.artefacts,
                report.repaired.len(),
                report.findings.len()
            );
            if report.orphans > 0 {
                println!(
                    "{} contents of {} bytes are not on record, of uploads that were cut off or are under way: `windlassd gc` takes \
                     them in time",
                    report.orphans, report.orphan_bytes
                );
            }
            Ok(if report.findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
    }
}

/// Lets this process have as many open files as it may: connections and copies each take one, and the usual limit is 1,024. That
/// is there for programs that use select(2), which this one does not.
fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!("raising the limit of open files: {error}");
    }
}

/// Takes a renewed certificate into use. Without TLS a SIGHUP ends the process, as it does by default.
async fn reload_on_hangup(service: &Service) -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut hangup = signal(SignalKind::hangup())?;
    while hangup.recv().await.is_some() {
        match service.reload_tls() {
            Ok(()) => tracing::info!("certificate and key read again"),
            Err(error) => tracing::error!("the certificate stays the old one: {error}"),
        }
    }
    Ok(())
}

async fn stop_signal() -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted,
        _ = terminate.recv() => Ok(()),
    }
}
