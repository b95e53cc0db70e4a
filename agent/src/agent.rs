//! Starting and stopping an agent.
//!
//! An agent is a thread that samples (`sampling`) and a runtime of two threads for the network. It can
//! live in any process, with or without a runtime of its own: `windlass-agent` runs one for a host,
//! `windlass profile` one for some seconds.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::oneshot;
use windlass_schema::StopReason;

use crate::alarm::Alarm;
use crate::audit::{AuditReport, Auditor, SharedReport};
use crate::backend::Backend;
use crate::choice::Choice;
use crate::compression::Compression;
use crate::copied::{AttachError, CopiedStacks};
use crate::eviction::IN_USE;
use crate::jit_code::JitCode;
use crate::kallsyms::KernelImage;
use crate::kernel::{DEFAULT_TABLE_BUDGET_BYTES, Kernel, LoadError, Options, Turns};
use crate::kernel_modules::KernelModules;
use crate::metrics::Metrics;
use crate::owners::Owners;
use crate::processes::Processes;
use crate::promptness;
use crate::sampling::{OpenBatch, Sampling};
use crate::selection::Selection;
use crate::service::{Service, ServiceError};
use crate::shipper::{SPOOL_BUDGET_BYTES, Shipped, Shipper};
use crate::spool::Spool;
use crate::status::StatusListener;
use crate::symbol_upload::SymbolUpload;
use crate::table_cache::{TableCache, TableCacheError};
use crate::table_refresh::DEFAULT_REFRESH_AFTER;
use crate::tables::Tables;
use crate::token::Token;

/// Samples a second on each CPU, unless said otherwise: odd, so as not to beat with timers.
pub const DEFAULT_FREQUENCY_HZ: u32 = 19;
/// Highest sampling frequency; the kernel's own limit is higher (`kernel.perf_event_max_sample_rate`).
pub const MAX_FREQUENCY_HZ: u32 = 10_000;
/// How often a batch is shipped, unless said otherwise.
pub const DEFAULT_SHIP_INTERVAL: Duration = Duration::from_secs(5);
/// Most bytes of tables on disk, unless said otherwise: those of about ten thousand images.
pub const DEFAULT_TABLE_CACHE_BYTES: u64 = 256 * 1024 * 1024;
/// Threads of the runtime: one may be busy compressing while the other answers.
const RUNTIME_THREADS: usize = 2;

/// What an agent is to do.
#[derive(Clone, Debug)]
pub struct Config {
    /// Address of the service, without a path.
    pub server: String,
    /// Samples a second on each CPU.
    pub frequency_hz: u32,
    /// Where tables and unsent profiles are kept.
    pub cache_dir: PathBuf,
    /// Only this process and its descendants.
    pub only_pid: Option<u32>,
    /// Which of those count.
    pub choice: Choice,
    /// What takes the samples.
    pub backend: BackendChoice,
    /// How often a batch is shipped.
    pub ship_interval: Duration,
    /// How batches are compressed.
    pub compression: Compression,
    /// What samples carry as the host's name; the kernel's, if there is none.
    pub host_name: Option<String>,
    /// Where `/metrics` and `/healthz` are answered.
    pub listen: Option<SocketAddr>,
    /// Bearer token for the service.
    pub token: Token,
    /// Most bytes of kernel memory for tables.
    pub table_budget_bytes: u64,
    /// How long a table makes no room for others after a sample that went through it.
    pub table_in_use: Duration,
    /// Most bytes of tables on disk.
    pub table_cache_bytes: u64,
    /// How long a table counts before the service is asked whether it has another.
    pub refresh_after: Duration,
    /// Most bytes of unsent profiles on disk.
    pub spool_bytes: u64,
    /// Longest time at the start in which samples are taken only to learn which tables are needed, and
    /// are not kept; it ends when those are there. Zero keeps every sample.
    pub warm_up: Duration,
    /// How walks in the kernel make their turns.
    pub turns: Turns,
    /// One walk of the BPF program in so many is held against the CFI of its images; `None` for none.
    pub audit: Option<NonZeroU32>,
}

impl Config {
    /// The whole host through BPF, at the defaults.
    pub fn new(server: impl Into<String>, cache_dir: impl Into<PathBuf>) -> Self {
        Self {
            server: server.into(),
            frequency_hz: DEFAULT_FREQUENCY_HZ,
            cache_dir: cache_dir.into(),
            only_pid: None,
            choice: Choice::default(),
            backend: BackendChoice::Bpf,
            ship_interval: DEFAULT_SHIP_INTERVAL,
            compression: Compression::default(),
            host_name: None,
            listen: None,
            token: Token::default(),
            table_budget_bytes: DEFAULT_TABLE_BUDGET_BYTES,
            table_in_use: IN_USE,
            table_cache_bytes: DEFAULT_TABLE_CACHE_BYTES,
            refresh_after: DEFAULT_REFRESH_AFTER,
            spool_bytes: SPOOL_BUDGET_BYTES,
            warm_up: Duration::ZERO,
            turns: Turns::from_environment(),
            audit: None,
        }
    }

    fn selection(&self) -> Selection {
        let root = self.only_pid.or(match self.backend {
            BackendChoice::Bpf => None,
            BackendChoice::CopiedStacks { pid } => Some(pid),
        });
        Selection::new(root, self.choice.clone())
    }
}

/// What takes the samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendChoice {
    /// The BPF program: every process of the host. Takes privilege.
    Bpf,
    /// Copies of the stacks of one process, walked in user space. Takes none.
    CopiedStacks {
        /// The process.
        pid: u32,
    },
}

/// An agent did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// BPF.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Copied stacks.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The service's address.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// The frequency.
    #[error("sampling frequency of {0} Hz, expected 1 to {MAX_FREQUENCY_HZ}")]
    Frequency(u32),
    /// The cache directory.
    #[error(transparent)]
    Cache(#[from] TableCacheError),
    /// The spool.
    #[error("spool directory {0}: {1}")]
    Spool(PathBuf, std::io::Error),
    /// The address for status pages.
    #[error("{0} cannot be listened at: {1}")]
    Listen(SocketAddr, std::io::Error),
    /// What wakes the agent's thread.
    #[error("no eventfd can be had: {0}")]
    Alarm(std::io::Error),
    /// A thread.
    #[error("no thread can be started: {0}")]
    Thread(std::io::Error),
    /// The agent's thread ended before it answered.
    #[error("agent ended while it started")]
    Ended,
}

/// An agent's thread did not end as it should.
#[derive(Debug, thiserror::Error)]
#[error("agent thread panicked")]
pub struct StopError;

/// What an agent saw and did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Samples taken of the selected processes.
    pub samples: u64,
    /// Those whose walk reached the end of the stack.
    pub complete: u64,
    /// Samples by the reason at which their walk ended.
    pub stop_reasons: BTreeMap<StopReason, u64>,
    /// Samples that the backend lost before the agent could read them.
    pub lost_samples: u64,
    /// Batches that the service took.
    pub sent_batches: u64,
    /// Batches that wait on disk for the next agent.
    pub spooled_batches: u64,
    /// Batches that are lost.
    pub dropped_batches: u64,
    /// Tables placed.
    pub tables_loaded: u64,
    /// Images that were without a table at some time: path and last reason.
    pub tables_unavailable: Vec<(String, String)>,
    /// What audits found, if there were any.
    pub audit: Option<AuditReport>,
}

impl Summary {
    pub(crate) fn count(&mut self, stop: StopReason) {
        self.samples += 1;
        self.complete += u64::from(stop.is_complete());
        *self.stop_reasons.entry(stop).or_default() += 1;
    }
}

/// What [`Config::warm_up`] came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WarmUp {
    /// How long it took.
    pub duration: Duration,
    /// Samples that were taken and not kept.
    pub samples: u64,
    /// Those of them whose walk reached the end of the stack.
    pub complete: u64,
}

/// A running agent. Dropped without [`Agent::stop`], it ends by itself soon after.
pub struct Agent {
    stop: Arc<AtomicBool>,
    alarm: Alarm,
    thread: Option<JoinHandle<Summary>>,
    /// Closed when the thread ends, however it does.
    end: oneshot::Receiver<()>,
    warm_up: WarmUp,
    agent_id: String,
    status_address: Option<SocketAddr>,
    audit: Option<SharedReport>,
}

/// By what others know an agent, before it runs.
struct Presence {
    agent_id: String,
    alarm: Alarm,
    listener: Option<StatusListener>,
    audit: Option<SharedReport>,
}

impl Agent {
    /// Starts an agent. Returns when samples are being taken and kept, and every process has been read.
    pub fn start(config: Config) -> Result<Self, StartError> {
        Self::spawn(config, |config| {
            Ok(match config.backend {
                BackendChoice::Bpf => {
                    let options = Options {
                        frequency_hz: config.frequency_hz,
                        table_budget_bytes: config.table_budget_bytes,
                        turns: config.turns,
                        audit_every: config.audit,
                    };
                    Box::new(Kernel::load(&options)?)
                }
                BackendChoice::CopiedStacks { pid } => {
                    Box::new(CopiedStacks::attach(pid, config.frequency_hz)?)
                }
            })
        })
    }

    /// Starts an agent that drives `backend`.
    pub fn start_with_backend(config: Config, backend: Box<dyn Backend>) -> Result<Self, StartError> {
        Self::spawn(config, |_| Ok(backend))
    }

    fn spawn(
        config: Config,
        backend: impl FnOnce(&Config) -> Result<Box<dyn Backend>, StartError> + Send + 'static,
    ) -> Result<Self, StartError> {
        if !(1..=MAX_FREQUENCY_HZ).contains(&config.frequency_hz) {
            return Err(StartError::Frequency(config.frequency_hz));
        }
        let stop = Arc::new(AtomicBool::new(false));
        let alarm = Alarm::new().map_err(StartError::Alarm)?;
        let agent_id = agent_id();
        let listener = config
            .listen
            .map(|address| StatusListener::bind(address).map_err(|error| StartError::Listen(address, error)));
        let listener = listener.transpose()?;
        let status_address = listener.as_ref().map(|listener| listener.address);
        let audit = config.audit.map(|_| SharedReport::default());
        let (started, starting) = mpsc::sync_channel(1);
        let (running, end) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("windlass-agent".to_owned())
            .spawn({
                let stop = stop.clone();
                let presence = Presence {
                    agent_id: agent_id.clone(),
                    alarm: alarm.clone(),
                    listener,
                    audit: audit.clone(),
                };
                move || {
                    let _running = running;
                    run(&config, presence, backend, &stop, &started)
                }
            })
            .map_err(StartError::Thread)?;
        let warm_up = starting.recv().map_err(|_| StartError::Ended)??;
        Ok(Self { stop, alarm, thread: Some(thread), end, warm_up, agent_id, status_address, audit })
    }

    /// What its batches carry as `windlass.agent.id`, and no other agent's do.
    pub fn agent_id(&self) -> &str {
        &self.agent_id
    }

    /// Where it answers `/metrics` and `/healthz`.
    pub fn status_address(&self) -> Option<SocketAddr> {
        self.status_address
    }

    /// What was left out at the start.
    pub fn warm_up(&self) -> WarmUp {
        self.warm_up
    }

    /// What audits have found so far, if there are any.
    pub fn audit(&self) -> Option<&SharedReport> {
        self.audit.as_ref()
    }

    /// Waits until the agent ends without being stopped, by a panic, of which [`Self::stop`] tells.
    pub async fn ended(&mut self) {
        // Nothing is ever sent.
        let _ = (&mut self.end).await;
    }

    /// Stops sampling, sends what is left, and ends the agent's threads. Takes up to 20 seconds if the service does not
    /// answer: what is under way has ten, and a second for each 256 KiB of it, and what is left has ten.
    pub fn stop(mut self) -> Result<Summary, StopError> {
        self.stop.store(true, Ordering::Release);
        self.alarm.ring();
        let thread = self.thread.take().expect("only stop takes the thread, and it consumes the agent");
        thread.join().map_err(|_| StopError)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.alarm.ring();
    }
}

/// The agent's thread.
fn run(
    config: &Config,
    presence: Presence,
    backend: impl FnOnce(&Config) -> Result<Box<dyn Backend>, StartError>,
    stop: &AtomicBool,
    started: &mpsc::SyncSender<Result<WarmUp, StartError>>,
) -> Summary {
    // The runtime lives and dies on this thread: the caller may be on one of another runtime, where
    // it could not be dropped.
    let prepared = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(RUNTIME_THREADS)
        .thread_name("windlass-net")
        .enable_all()
        .build()
        .map_err(StartError::Thread)
        .and_then(|runtime| Ok((prepare(config, presence, backend, runtime.handle())?, runtime)));
    let (mut sampling, runtime) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => {
            // Whoever waited gave up, if this fails.
            let _ = started.send(Err(error));
            return Summary::default();
        }
    };
    // Last, since threads that this one starts have what it has.
    if let Err(error) = promptness::ask() {
        promptness::note_refused(&error);
    }
    let warm_up = sampling.warm_up(config.warm_up, stop);
    let _ = started.send(Ok(warm_up));
    sampling.run(stop);
    let Sampling { backend, shipper, symbols, auditor, mut summary, .. } = sampling;
    summary.lost_samples = backend.lost_samples();
    // Sampling ends before the last batches go out.
    drop(backend);
    summary.audit = auditor.map(Auditor::finish);
    let (Shipped { sent, spooled, dropped }, ()) =
        runtime.block_on(async { tokio::join!(shipper.finish(), symbols.finish()) });
    summary.sent_batches = sent;
    summary.spooled_batches = spooled;
    summary.dropped_batches += dropped;
    runtime.shutdown_background();
    summary
}

fn prepare(
    config: &Config,
    presence: Presence,
    backend: impl FnOnce(&Config) -> Result<Box<dyn Backend>, StartError>,
    runtime: &tokio::runtime::Handle,
) -> Result<Sampling, StartError> {
    let Presence { agent_id, alarm, listener, audit } = presence;
    let metrics = Arc::new(Metrics::with_audit(audit.clone()));
    let service = Service::new(&config.server, config.token.clone(), metrics.clone())?;
    let tables = config.cache_dir.join("tables");
    let cache = TableCache::open(&tables, config.table_cache_bytes, metrics.clone())?;
    let auditor = audit.map(|report| {
        let shown = TableCache::open(&tables, config.table_cache_bytes, metrics.clone())?;
        Auditor::start(report, shown).map_err(StartError::Thread)
    });
    let auditor = auditor.transpose()?;
    let spool_dir = config.cache_dir.join("spool");
    let spool =
        Spool::open(&spool_dir, config.spool_bytes).map_err(|error| StartError::Spool(spool_dir, error))?;
    // First the backend, then the scan: what happens in between is then an event.
    let mut backend = backend(config)?;
    backend.heed(&alarm);
    let now = Instant::now();
    let mut processes = Processes::new(config.selection(), now);
    processes.keep_tables_for(config.table_in_use);
    processes.ring(&alarm);
    processes.scan_all(&mut *backend);
    let tables = Tables::start(runtime, &service, cache, config.refresh_after, alarm.clone());
    let shipper = Shipper::start(runtime, service.clone(), spool, metrics.clone());
    if let Some(listener) = listener {
        let address = listener.address;
        listener.start(runtime, metrics.clone()).map_err(|error| StartError::Listen(address, error))?;
        tracing::info!("status at http://{address}/metrics and http://{address}/healthz");
    }
    let symbols = SymbolUpload::start(runtime, service.clone());
    let mut jit = JitCode::default();
    jit.ring(&alarm);
    let kernel = match KernelImage::read() {
        Ok(kernel) => {
            runtime.spawn(kernel.clone().upload(service));
            Some(kernel)
        }
        Err(error) => {
            tracing::warn!(%error, "kernel addresses are shipped as they are, and cannot be named later");
            None
        }
    };
    Ok(Sampling {
        backend,
        alarm,
        quiet_since: now,
        processes,
        tables,
        shipper,
        kernel,
        modules: KernelModules::read(),
        jit,
        symbols,
        auditor,
        frequency_hz: config.frequency_hz,
        ship_interval: config.ship_interval,
        host_name: config.host_name.clone().unwrap_or_else(host_name),
        agent_id,
        compression: config.compression,
        owners: Owners::default(),
        batch: OpenBatch::new(0),
        closed: None,
        keeps_samples: true,
        unkept: WarmUp::default(),
        metrics,
        summary: Summary::default(),
    })
}

/// The host's name, as the kernel has it.
fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}

/// A random UUID of the kernel's, new for each agent.
fn agent_id() -> String {
    match std::fs::read_to_string("/proc/sys/kernel/random/uuid") {
        Ok(uuid) => uuid.trim().to_owned(),
        // As good as none other: which host, which process, when.
        Err(_) => {
            let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            format!("{}-{}-{}", host_name(), std::process::id(), since.as_nanos())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_instance_has_its_own_id() {
        let (one, other) = (agent_id(), agent_id());
        assert_ne!(one, other);
        assert!(one.len() >= 32 && one.is_ascii() && !one.contains(char::is_whitespace), "{one}");
    }
}
