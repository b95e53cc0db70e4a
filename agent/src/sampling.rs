//! What does the agent do all day?
//!
//! One thread owns the backend and everything about processes, and turns in a loop: drain events, read
//! what is due, record samples, place tables, ship. It asks the network for nothing itself: tables and
//! batches pass through queues to the runtime beside it.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use prost::Message as _;
use sha2::{Digest as _, Sha256};
use windlass_schema::{ReturnAddress, StopReason};

use crate::agent::{Summary, WarmUp};
use crate::alarm::Alarm;
use crate::audit::{AuditedWalk, Auditor};
use crate::backend::{Backend, Event, Sample};
use crate::compression::Compression;
use crate::jit_code::JitCode;
use crate::kallsyms::KernelImage;
use crate::kernel_modules::KernelModules;
use crate::metrics::Metrics;
use crate::otlp::{Batch, Frame, Labels, Module, Recording};
use crate::owners::Owners;
use crate::process::{Met, frame, is_made_code, lookup_address};
use crate::processes::{Placement, Processes};
use crate::shipper::Shipper;
use crate::spool::EncodedBatch;
use crate::symbol_upload::SymbolUpload;
use crate::tables::Tables;

/// Shortest warm-up: within it each CPU has a sample or several, and the images that those touch are asked for.
const SHORTEST_WARM_UP: Duration = Duration::from_millis(200);
/// Longest wait for events while processes come and go: within it samples that wake nobody are read, so that `/proc` still
/// tells of processes that end soon.
const BUSY_WAIT: Duration = Duration::from_millis(100);
/// The same while code is made at run time: what moves between a sample and the next reading of the compiler's file has no
/// name.
const MADE_CODE_WAIT: Duration = Duration::from_millis(250);
/// The same when nothing happens. A turn takes 50 to 100 microseconds, nearly whatever it finds to do, as another program had the
/// caches: ten in a second would be most of what the agent costs.
const QUIET_WAIT: Duration = Duration::from_secs(1);
/// How long nothing has happened to any process when nothing happens.
const QUIET_AFTER: Duration = Duration::from_secs(1);
/// Pause when events cannot be read.
const FAILURE_PAUSE: Duration = Duration::from_millis(100);
/// How long a batch waits for what is still to be read for it.
const LONGEST_NAMING: Duration = Duration::from_secs(2);
/// How often it is asked at the end whether it has come.
const NAMING_PAUSE: Duration = Duration::from_millis(1);
/// Most tables that the summary names as unavailable.
const MAX_NAMED_UNAVAILABLE: usize = 1000;

/// The loop and what it owns.
pub(crate) struct Sampling {
    pub(crate) backend: Box<dyn Backend>,
    /// Rings when a result of `tables` is there, and when the agent is to stop.
    pub(crate) alarm: Alarm,
    /// When something happened to a process last.
    pub(crate) quiet_since: Instant,
    pub(crate) processes: Processes,
    pub(crate) tables: Tables,
    pub(crate) shipper: Shipper,
    pub(crate) kernel: Option<KernelImage>,
    pub(crate) modules: KernelModules,
    pub(crate) jit: JitCode,
    pub(crate) symbols: SymbolUpload,
    /// Compares walks, if any are to be audited.
    pub(crate) auditor: Option<Auditor>,
    pub(crate) frequency_hz: u32,
    pub(crate) ship_interval: Duration,
    pub(crate) host_name: String,
    pub(crate) agent_id: String,
    pub(crate) compression: Compression,
    pub(crate) owners: Owners,
    pub(crate) batch: OpenBatch,
    /// One that waits for names.
    pub(crate) closed: Option<ClosedBatch>,
    /// False while samples only make tables come.
    pub(crate) keeps_samples: bool,
    pub(crate) unkept: WarmUp,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) summary: Summary,
}

/// The batch being filled.
pub(crate) struct OpenBatch {
    batch: Batch,
    started: Instant,
    started_unix: SystemTime,
    number: u64,
    /// Kernel modules that were not where they had been, since it was opened.
    gone: Vec<Module>,
}

/// A batch that is full, but for the names of code that processes made, and for whose its samples are.
pub(crate) struct ClosedBatch {
    batch: Batch,
    recording: Recording,
    /// Kernel modules that were not where they had been, while it was open.
    gone: Vec<Module>,
    /// The last reading that says something for it.
    last_reading: u64,
    /// When it is shipped without.
    due: Instant,
}

impl OpenBatch {
    pub(crate) fn new(number: u64) -> Self {
        let (started, started_unix) = (Instant::now(), SystemTime::now());
        Self { batch: Batch::default(), started, started_unix, number, gone: Vec::new() }
    }
}

impl Sampling {
    /// Takes samples without keeping them until no table is pending, at most for `longest`.
    pub(crate) fn warm_up(&mut self, longest: Duration, stop: &AtomicBool) -> WarmUp {
        let start = Instant::now();
        if longest.is_zero() {
            return WarmUp::default();
        }
        self.keeps_samples = false;
        while start.elapsed() < longest && !stop.load(Ordering::Acquire) {
            if start.elapsed() >= SHORTEST_WARM_UP && self.processes.pending_tables() == 0 {
                break;
            }
            self.turn(SHORTEST_WARM_UP / 10);
        }
        self.keeps_samples = true;
        self.batch = OpenBatch::new(self.batch.number);
        WarmUp { duration: start.elapsed(), ..std::mem::take(&mut self.unkept) }
    }

    /// Runs until `stop` is set.
    pub(crate) fn run(&mut self, stop: &AtomicBool) {
        while !stop.load(Ordering::Acquire) {
            let now = Instant::now();
            let until_ship = self.ship_interval.saturating_sub(now.duration_since(self.batch.started));
            let due = [self.processes.next_due(now), self.owners.next_review()];
            let until_due = due.into_iter().flatten().min().unwrap_or(QUIET_WAIT);
            self.turn(self.longest_wait(now).min(until_ship).min(until_due));
        }
        self.turn(Duration::ZERO);
        self.ship();
        while self.closed.is_some() {
            std::thread::sleep(NAMING_PAUSE);
            let now = Instant::now();
            self.owners.review(now);
            self.read_code(now);
        }
    }

    /// Reads what compilers wrote of their code, and ships the batch that waits for it.
    fn read_code(&mut self, now: Instant) {
        self.jit.read(now, &|tgid, is_wanted| self.processes.mapped_path(tgid, is_wanted));
        let jit = &self.jit;
        let is_due = |closed: &mut ClosedBatch| {
            jit.has_read(closed.last_reading) && closed.batch.is_settled(now) || closed.due <= now
        };
        if let Some(closed) = self.closed.take_if(is_due) {
            self.ship_closed(closed);
        }
    }

    fn longest_wait(&self, now: Instant) -> Duration {
        if now.duration_since(self.quiet_since) < QUIET_AFTER || self.closed.is_some() {
            BUSY_WAIT
        } else if self.jit.has_files() {
            MADE_CODE_WAIT
        } else {
            QUIET_WAIT
        }
    }

    fn turn(&mut self, wait: Duration) {
        let mut events = Vec::new();
        if let Err(error) = self.backend.poll(wait, &mut |event| events.push(event)) {
            tracing::warn!(error = format!("{error:#}"), "events cannot be read");
            std::thread::sleep(FAILURE_PAUSE);
        }
        self.alarm.silence();
        let now = Instant::now();
        self.metrics.turned(now);
        let mut without_mappings = Vec::new();
        for event in events {
            if !matches!(event, Event::Sample(_) | Event::Audit(_)) {
                self.quiet_since = now;
            }
            self.processes.note(&event, &mut *self.backend, now);
            match event {
                // What is known of its process holds now, but a later event may change that.
                Event::Sample(sample) if self.processes.mappings_of(&sample).is_some() => {
                    self.record(&sample, now)
                }
                Event::Sample(sample) => without_mappings.push(sample),
                Event::Forked { tgid, parent, .. } => {
                    self.jit.forget(tgid);
                    self.owners.forked(tgid, parent, now);
                }
                Event::Exec { tgid, .. } => {
                    self.jit.forget(tgid);
                    self.owners.exec(tgid);
                }
                Event::Audit(walk) => self.audit(*walk),
                Event::Lost { .. } => {
                    self.metrics.process_events_lost();
                    self.owners.lost();
                }
                Event::Exited { tgid } => {
                    self.jit.exited(tgid, now);
                    self.owners.exited(tgid, now);
                }
                Event::Mapped { .. } => {}
            }
        }
        // Before the other samples: the first sample of a process is what has it read.
        self.processes.scan_due(&mut *self.backend, now);
        self.metrics.set_lost_process_events(self.backend.lost_process_events());
        self.metrics.set_readings(self.processes.reading_counts());
        for wish in self.processes.prefetch(now) {
            self.tables.request(wish);
        }
        for sample in without_mappings {
            self.record(&sample, now);
        }
        self.owners.review(now);
        self.read_code(now);
        self.batch.gone.extend(self.modules.review_if_due());
        self.place_tables(now);
        self.processes.expire(&mut *self.backend, now);
        if self.batch.started.elapsed() >= self.ship_interval || self.batch.batch.is_full() {
            self.ship();
        }
    }

    fn audit(&mut self, walk: AuditedWalk) {
        if let Some(auditor) = &self.auditor
            && self.processes.includes(walk.sample.tgid)
        {
            auditor.take(self.processes.mappings_of(&walk.sample).cloned(), walk);
        }
    }

    fn record(&mut self, sample: &Sample, now: Instant) {
        if !self.processes.includes(sample.tgid) {
            return;
        }
        for wish in self.processes.touch(sample, now) {
            self.tables.request(wish);
        }
        if !self.keeps_samples {
            self.unkept.samples += 1;
            self.unkept.complete += u64::from(sample.stop.is_complete());
            return;
        }
        let (mappings, stop) = match self.processes.mappings_of(sample) {
            Some(mappings) => (&mappings[..], sample.stop),
            None => (&[][..], without_mappings(sample)),
        };
        self.summary.count(stop);
        // Not that of a walk which turned out to be of other mappings.
        self.metrics.sample(stop, sample.unsupported.filter(|_| stop == StopReason::UnsupportedRule));
        for address in &sample.kernel {
            let Some(module) = self.modules.meet(*address) else { continue };
            let id = module.build_id();
            if !self.symbols.send_module(module) {
                self.modules.forget(id);
            }
        }
        let kernel = sample.kernel.iter().enumerate().map(|(depth, address)| {
            // Only the innermost kernel address is that of an instruction.
            let address = match depth {
                0 => *address,
                _ => ReturnAddress::new(*address).lookup_address().get(),
            };
            let in_module = self.modules.frame(address);
            let frame = in_module.or_else(|| Some(self.kernel.as_ref()?.frame(address)));
            frame.unwrap_or(Frame { module: None, address, reading: None })
        });
        let mut met = Met::new(mappings);
        let user = sample.user.iter().map(|address| {
            let address = lookup_address(*address);
            let mapping = met.find(address);
            let reading = match mapping.is_some_and(is_made_code) {
                true => self.jit.meet(sample.tgid, address.get(), sample.time_ns, now),
                false => None,
            };
            Frame { reading, ..frame(mapping, address) }
        });
        let labels = Labels { tgid: sample.tgid, tid: sample.tid, comm: &sample.comm, cpu: sample.cpu, stop };
        self.batch.batch.add(&self.owners.of(sample.tgid, now), &labels, kernel.chain(user));
    }

    fn note_unavailable(&mut self, path: String, reason: String) {
        self.metrics.table_failed();
        let named = self.summary.tables_unavailable.iter_mut().find(|(named, _)| *named == path);
        if let Some((_, last)) = named {
            *last = reason;
        } else if self.summary.tables_unavailable.len() < MAX_NAMED_UNAVAILABLE {
            self.summary.tables_unavailable.push((path, reason));
        }
    }

    fn place_tables(&mut self, now: Instant) {
        for (path, reason) in self.processes.take_unreadable() {
            self.note_unavailable(path, reason);
        }
        let mut changed = HashSet::new();
        while let Some(result) = self.tables.try_result() {
            match self.processes.place(&result, &mut *self.backend, now) {
                Placement::Placed => {
                    self.summary.tables_loaded += 1;
                    self.metrics.table_loaded();
                    tracing::debug!(path = %result.path, id = %result.id, "unwind table placed");
                }
                Placement::Unavailable(reason) => {
                    tracing::warn!(path = %result.path, id = %result.id, reason, "no unwind table");
                    self.note_unavailable(result.path.to_string(), reason);
                }
                Placement::Postponed => {
                    tracing::debug!(path = %result.path, id = %result.id, "image is gone, or there is still no room");
                }
            }
            changed.insert(result.id);
        }
        self.metrics.set_kernel_tables(self.backend.table_memory());
        self.metrics.kernel_tables_evicted(self.processes.take_evicted());
        if !changed.is_empty() {
            self.processes.set_again(&changed, &mut *self.backend);
        }
    }

    fn note_lost(&mut self) {
        let lost = self.metrics.set_lost_samples(self.backend.lost_samples());
        if lost > 0 {
            tracing::warn!(lost, "samples came faster than they were read: sample less often");
        }
        if let Some(auditor) = &mut self.auditor {
            auditor.note_lost(self.backend.lost_audits());
        }
    }

    /// Closes the batch, which goes to the shipper when its names are there, and opens the next.
    fn ship(&mut self) {
        self.note_lost();
        self.owners.expire(Instant::now());
        let now = Instant::now();
        let mapped = |tgid, is_wanted: &dyn Fn(&str) -> bool| self.processes.mapped_path(tgid, is_wanted);
        let last_reading = self.jit.close_batch(now, &mapped);
        if let Some(closed) = self.closed.take() {
            self.ship_closed(closed);
        }
        let next = OpenBatch::new(self.batch.number + 1);
        let open = std::mem::replace(&mut self.batch, next);
        if open.batch.is_empty() {
            return;
        }
        let start = open.started_unix.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let recording = Recording {
            host_name: self.host_name.clone(),
            agent_id: self.agent_id.clone(),
            frequency_hz: self.frequency_hz,
            start_unix_ns: u64::try_from(start.as_nanos()).unwrap_or(u64::MAX),
            duration_ns: u64::try_from(open.started.elapsed().as_nanos()).unwrap_or(u64::MAX),
            batch_id: batch_id(&self.host_name, start, open.number),
        };
        let mut gone = open.gone;
        gone.extend(self.modules.review());
        let closed =
            ClosedBatch { batch: open.batch, recording, gone, last_reading, due: now + LONGEST_NAMING };
        match self.jit.has_read(last_reading) && closed.batch.is_settled(now) {
            true => self.ship_closed(closed),
            false => self.closed = Some(closed),
        }
    }

    /// Hands a batch to the shipper.
    fn ship_closed(&mut self, closed: ClosedBatch) {
        let code = self.jit.name_batch(closed.last_reading, &self.symbols);
        let request = closed.batch.into_request(&closed.recording, &code, &closed.gone).encode_to_vec();
        match self.compression.compress(&request) {
            Ok(request) => {
                self.shipper.ship(EncodedBatch { compression: self.compression, bytes: request.into() });
            }
            Err(error) => {
                tracing::error!(%error, "batch is lost");
                self.summary.dropped_batches += 1;
                self.metrics.batch_dropped();
            }
        }
    }
}

/// The reason to show for a walk whose mappings are not known any more: its addresses get no names, and so
/// it cannot count as complete.
fn without_mappings(sample: &Sample) -> StopReason {
    if sample.user.is_empty() || sample.stop == StopReason::ProcessUnknown {
        sample.stop
    } else {
        StopReason::MappingsChanged
    }
}

/// A name that no other batch has: of its host, its agent's process, its start and its number.
fn batch_id(host_name: &str, start: Duration, number: u64) -> [u8; 16] {
    let mut hash = Sha256::new();
    hash.update(host_name);
    hash.update(std::process::id().to_le_bytes());
    hash.update(start.as_nanos().to_le_bytes());
    hash.update(number.to_le_bytes());
    let hash = hash.finalize();
    std::array::from_fn(|at| hash[at])
}
