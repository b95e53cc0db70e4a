//! `windlassd`: runs and checks the service.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use tracing_subscriber::EnvFilter;
use windlass_debuginfod::config::DEFAULT_MAX_UPLOAD_BYTES;
use windlass_debuginfod::{Config, check, start};

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
  windlassd check --data-dir /var/lib/windlass

Logging follows RUST_LOG, for example RUST_LOG=debug.";

#[derive(Subcommand)]
enum Command {
    /// Run the service until SIGINT or SIGTERM
    Serve {
        #[command(flatten)]
        store: Store,
        /// Address to listen on; anything but loopback needs --token-file
        #[arg(long, default_value = "127.0.0.1:8002", env = "WINDLASS_LISTEN")]
        listen: SocketAddr,
        /// debuginfod server to ask for what is not stored here; may be repeated
        #[arg(long = "upstream", value_name = "URL")]
        upstreams: Vec<String>,
        /// File with the token that writers must send as `Authorization: Bearer TOKEN`
        #[arg(long, value_name = "FILE", env = "WINDLASS_TOKEN_FILE")]
        token_file: Option<PathBuf>,
        /// Largest artefact accepted, in decoded bytes
        #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_MAX_UPLOAD_BYTES)]
        max_upload_bytes: u64,
    },
    /// Read everything back and compare it with its hash and its catalog row; exit 1 with findings
    Check {
        #[command(flatten)]
        store: Store,
    },
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
        Command::Serve { store, listen, upstreams, token_file, max_upload_bytes } => {
            let token = token_file
                .map(|path| {
                    std::fs::read_to_string(&path).with_context(|| format!("reading token from {path:?}"))
                })
                .transpose()?;
            let service =
                start(Config { listen, upstreams, token, max_upload_bytes, ..store.config() }).await?;
            stop_signal().await?;
            tracing::info!("stopping");
            service.stop().await;
            Ok(ExitCode::SUCCESS)
        }
        Command::Check { store } => {
            let config = store.config();
            anyhow::ensure!(
                config.data_dir.is_dir(),
                "no data folder {:?} (give --data-dir)",
                config.data_dir
            );
            let report = check(&config).await?;
            for finding in &report.findings {
                println!("{finding}");
            }
            println!(
                "{} contents, {} bytes, {} artefacts checked; {} findings",
                report.blobs,
                report.bytes,
                report.artefacts,
                report.findings.len()
            );
            Ok(if report.findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
    }
}

async fn stop_signal() -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted,
        _ = terminate.recv() => Ok(()),
    }
}
