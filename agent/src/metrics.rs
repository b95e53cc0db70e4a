//! What has the agent seen and done, in numbers?
//!
//! One structure of atomic counters, which the sampling thread and the runtime both add to and whoever asks
//! reads, without a lock that one could hold up the other by. Every label is a closed set, so the numbers
//! are arrays, a stop reason without a counter cannot be, and each line is there from the start: a counter
//! that appears with its first event hides that event from `rate()`. Only what audits found, if there are any, is by
//! image, and comes from their report. The text is Prometheus's exposition format,
//! version 0.0.4.

use std::fmt::{Display, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use windlass_schema::StopReason;
use windlass_schema::rule::UnsupportedReason;

use crate::audit::{AuditReport, SharedReport};
use crate::backend::TableMemory;
use crate::own_cost::OwnCost;
use crate::processes::ReadingCounts;
use crate::service::ServiceError;
use crate::shipper::Shipped;

/// `Content-Type` of the text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4";
/// How long the sampling thread may be without a turn before the agent counts as stuck: a turn waits for a second
/// at most, and to read every process of a large host takes some seconds.
pub const LONGEST_TURN: Duration = Duration::from_secs(30);

/// What is asked of the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// A table.
    Table,
    /// To take a skeleton or kernel symbols.
    Upload,
    /// Whether it lacks something.
    Missing,
    /// To take a batch of profiles.
    Profiles,
}

impl Request {
    const ALL: [Self; 4] = [Self::Table, Self::Upload, Self::Missing, Self::Profiles];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Table => "table",
            Self::Upload => "upload",
            Self::Missing => "missing",
            Self::Profiles => "profiles",
        }
    }
}

/// The kinds of [`ServiceError`].
const FAILURES: [&str; 5] = ["unreachable", "no_answer", "busy", "refused", "client"];

fn failure(error: &ServiceError) -> usize {
    match error {
        ServiceError::Unreachable(_) => 0,
        ServiceError::NoAnswer(_) => 1,
        ServiceError::Busy { .. } => 2,
        ServiceError::Refused { .. } => 3,
        ServiceError::Client(_) => 4,
    }
}

/// The numbers.
#[derive(Debug)]
pub struct Metrics {
    started: Instant,
    /// Milliseconds from the start to the last turn of the sampling thread.
    last_turn_ms: AtomicU64,
    stops: [AtomicU64; StopReason::COUNT],
    unsupported: [AtomicU64; UnsupportedReason::ALL.len()],
    lost_samples: AtomicU64,
    late_readings: AtomicU64,
    skipped_readings: AtomicU64,
    put_off_readings: AtomicU64,
    waiting_readings: AtomicU64,
    lost_process_events: AtomicU64,
    process_event_losses: AtomicU64,
    tables_loaded: AtomicU64,
    table_failures: AtomicU64,
    tables_evicted: AtomicU64,
    kernel_tables_evicted: AtomicU64,
    kernel_table_bytes: AtomicU64,
    kernel_table_budget_bytes: AtomicU64,
    requests: [AtomicU64; Request::ALL.len()],
    failures: [[AtomicU64; FAILURES.len()]; Request::ALL.len()],
    batches_sent: AtomicU64,
    /// Seconds since 1970; until there is one, those of the start.
    last_batch_sent_s: AtomicU64,
    batches_dropped: AtomicU64,
    spooled_batches: AtomicU64,
    spooled_bytes: AtomicU64,
    /// What audits found, if there are any.
    audit: Option<SharedReport>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            last_turn_ms: AtomicU64::default(),
            stops: Default::default(),
            unsupported: Default::default(),
            lost_samples: AtomicU64::default(),
            late_readings: AtomicU64::default(),
            skipped_readings: AtomicU64::default(),
            put_off_readings: AtomicU64::default(),
            waiting_readings: AtomicU64::default(),
            lost_process_events: AtomicU64::default(),
            process_event_losses: AtomicU64::default(),
            tables_loaded: AtomicU64::default(),
            table_failures: AtomicU64::default(),
            tables_evicted: AtomicU64::default(),
            kernel_tables_evicted: AtomicU64::default(),
            kernel_table_bytes: AtomicU64::default(),
            kernel_table_budget_bytes: AtomicU64::default(),
            requests: Default::default(),
            failures: Default::default(),
            batches_sent: AtomicU64::default(),
            last_batch_sent_s: AtomicU64::new(unix_s()),
            batches_dropped: AtomicU64::default(),
            spooled_batches: AtomicU64::default(),
            spooled_bytes: AtomicU64::default(),
            audit: None,
        }
    }
}

/// Seconds since 1970.
fn unix_s() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

impl Metrics {
    /// Nothing yet, but for what is in `audit`.
    pub(crate) fn with_audit(audit: Option<SharedReport>) -> Self {
        Self { audit, ..Self::default() }
    }

    /// The sampling thread turned.
    pub(crate) fn turned(&self, now: Instant) {
        self.last_turn_ms.store(self.since_start_ms(now), Ordering::Relaxed);
    }

    /// Whether the sampling thread turned not long ago.
    pub fn is_alive(&self, now: Instant) -> bool {
        let idle_ms = self.since_start_ms(now).saturating_sub(self.last_turn_ms.load(Ordering::Relaxed));
        u128::from(idle_ms) <= LONGEST_TURN.as_millis()
    }

    fn since_start_ms(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.started).as_millis()).unwrap_or(u64::MAX)
    }

    /// A sample's walk ended; and if it was at a row that the tables do not support, why not.
    pub(crate) fn sample(&self, stop: StopReason, unsupported: Option<UnsupportedReason>) {
        add(&self.stops[stop as usize], 1);
        let at = unsupported.and_then(|reason| UnsupportedReason::ALL.iter().position(|one| *one == reason));
        if let Some(at) = at {
            add(&self.unsupported[at], 1);
        }
    }

    /// So many samples were lost since the start. Returns how many more than the last time.
    pub(crate) fn set_lost_samples(&self, lost: u64) -> u64 {
        lost.saturating_sub(self.lost_samples.swap(lost, Ordering::Relaxed))
    }

    /// So many process events were lost since the start, as far as the kernel says how many.
    pub(crate) fn set_lost_process_events(&self, lost: u64) {
        self.lost_process_events.store(lost, Ordering::Relaxed);
    }

    /// Process events were lost, or may have been.
    pub(crate) fn process_events_lost(&self) {
        add(&self.process_event_losses, 1);
    }

    /// What tables take of kernel memory.
    pub(crate) fn set_kernel_tables(&self, memory: TableMemory) {
        self.kernel_table_bytes.store(memory.used_bytes, Ordering::Relaxed);
        self.kernel_table_budget_bytes.store(memory.budget_bytes, Ordering::Relaxed);
    }

    /// What became of readings of processes since the start.
    pub(crate) fn set_readings(&self, counts: ReadingCounts) {
        self.late_readings.store(counts.late, Ordering::Relaxed);
        self.skipped_readings.store(counts.skipped, Ordering::Relaxed);
        self.put_off_readings.store(counts.put_off, Ordering::Relaxed);
        self.waiting_readings.store(counts.waiting, Ordering::Relaxed);
    }

    pub(crate) fn table_loaded(&self) {
        add(&self.tables_loaded, 1);
    }

    pub(crate) fn table_failed(&self) {
        add(&self.table_failures, 1);
    }

    pub(crate) fn table_evicted(&self) {
        add(&self.tables_evicted, 1);
    }

    pub(crate) fn kernel_tables_evicted(&self, count: u64) {
        add(&self.kernel_tables_evicted, count);
    }

    pub(crate) fn request(&self, request: Request, error: Option<&ServiceError>) {
        add(&self.requests[request as usize], 1);
        if let Some(error) = error {
            add(&self.failures[request as usize][failure(error)], 1);
        }
    }

    /// What became of batches since the last time, and what waits.
    pub(crate) fn shipped(&self, since: Shipped, spooled_bytes: u64) {
        add(&self.batches_sent, since.sent);
        if since.sent > 0 {
            self.last_batch_sent_s.store(unix_s(), Ordering::Relaxed);
        }
        add(&self.batches_dropped, since.dropped);
        self.spooled_batches.store(since.spooled, Ordering::Relaxed);
        self.spooled_bytes.store(spooled_bytes, Ordering::Relaxed);
    }

    pub(crate) fn batch_dropped(&self) {
        add(&self.batches_dropped, 1);
    }

    /// All of them as text.
    pub fn text(&self) -> String {
        let mut text = Exposition::default();
        text.counter("samples", "Samples by the reason at which their walk ended.");
        for (reason, count) in StopReason::ALL.iter().zip(&self.stops) {
            text.line(&[("reason", reason.as_str())], count);
        }
        text.counter(
            "unsupported_rows",
            "Samples whose walk ended at a row that tables do not support, by why.",
        );
        for (reason, count) in UnsupportedReason::ALL.iter().zip(&self.unsupported) {
            text.line(&[("reason", reason.as_str())], count);
        }
        text.counter("lost_samples", "Samples taken and lost before they were read.");
        text.line(&[], &self.lost_samples);
        let help = "Events of processes that the kernel had no room for: execs, forks, ends, mappings.";
        text.counter("lost_process_events", help);
        text.line(&[], &self.lost_process_events);
        let help =
            "Times that process events were lost or may have been, so that all processes are read again.";
        text.counter("process_event_losses", help);
        text.line(&[], &self.process_event_losses);
        let help = "Readings of a process's mapped files that sampling did not wait for: a disk or a file system is slow.";
        text.counter("late_process_readings", help);
        text.line(&[], &self.late_readings);
        let help = "Times that a process was not read again because an earlier reading was not done.";
        text.counter("skipped_process_readings", help);
        text.line(&[], &self.skipped_readings);
        let help = "Readings of processes that were put off because their memory looks held, as that of several others is.";
        text.counter("put_off_process_readings", help);
        text.line(&[], &self.put_off_readings);
        text.gauge("waiting_process_readings", "Processes that are being read still.");
        text.line(&[], &self.waiting_readings);
        text.counter("tables_loaded", "Unwind tables placed.");
        text.line(&[], &self.tables_loaded);
        let help =
            "Attempts to have an image's unwind table that came to nothing; it is asked for again later.";
        text.counter("table_failures", help);
        text.line(&[], &self.table_failures);
        text.counter("tables_evicted", "Unwind tables deleted from disk to keep within the budget.");
        text.line(&[], &self.tables_evicted);
        let help = "Unwind tables that made room for others in kernel memory.";
        text.counter("kernel_tables_evicted", help);
        text.line(&[], &self.kernel_tables_evicted);
        text.gauge("kernel_table_bytes", "Kernel memory of unwind tables.");
        text.line(&[], &self.kernel_table_bytes);
        text.gauge("kernel_table_budget_bytes", "Most kernel memory of unwind tables.");
        text.line(&[], &self.kernel_table_budget_bytes);
        text.counter("requests", "Requests to the service.");
        for (request, count) in Request::ALL.iter().zip(&self.requests) {
            text.line(&[("request", request.as_str())], count);
        }
        text.counter("request_failures", "Requests to the service that failed, by how.");
        for (request, failures) in Request::ALL.iter().zip(&self.failures) {
            for (failure, count) in FAILURES.iter().zip(failures) {
                text.line(&[("request", request.as_str()), ("failure", failure)], count);
            }
        }
        text.counter("batches_sent", "Batches of profiles that the service took.");
        text.line(&[], &self.batches_sent);
        let help = "When the service last took a batch, or if it never did, when the agent started: seconds since 1970.";
        text.gauge("last_batch_sent_timestamp_seconds", help);
        text.line(&[], &self.last_batch_sent_s);
        text.counter("batches_dropped", "Batches of profiles that are lost.");
        text.line(&[], &self.batches_dropped);
        text.gauge("spooled_batches", "Batches of profiles that wait on disk.");
        text.line(&[], &self.spooled_batches);
        text.gauge("spooled_bytes", "Bytes of profiles that wait on disk.");
        text.line(&[], &self.spooled_bytes);
        if let Some(audit) = &self.audit {
            text.audit(&audit.get());
        }
        text.build(env!("CARGO_PKG_VERSION"));
        text.process(OwnCost::read());
        text.text
    }
}

/// The text under construction.
#[derive(Default)]
struct Exposition {
    text: String,
    name: String,
}

impl Exposition {
    fn counter(&mut self, name: &str, help: &str) {
        self.metric(format!("windlass_agent_{name}_total"), help, "counter");
    }

    fn gauge(&mut self, name: &str, help: &str) {
        self.metric(format!("windlass_agent_{name}"), help, "gauge");
    }

    fn metric(&mut self, name: String, help: &str, kind: &str) {
        self.write(format_args!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
        self.name = name;
    }

    fn line(&mut self, labels: &[(&str, &str)], count: &AtomicU64) {
        self.number(labels, count.load(Ordering::Relaxed));
    }

    fn number(&mut self, labels: &[(&str, &str)], count: u64) {
        let labels: Vec<_> =
            labels.iter().map(|(key, value)| format!("{key}=\"{}\"", escaped(value))).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let name = std::mem::take(&mut self.name);
        self.write(format_args!("{name}{labels} {count}\n"));
        self.name = name;
    }

    fn build(&mut self, version: &str) {
        self.gauge("build_info", "The agent's version; always 1.");
        self.number(&[("version", version)], 1);
    }

    fn process(&mut self, cost: OwnCost) {
        if let Some(cpu) = cost.cpu {
            let help = "Seconds of CPU time of the agent's own.";
            self.metric("process_cpu_seconds_total".to_owned(), help, "counter");
            self.write(format_args!("process_cpu_seconds_total {}\n", cpu.as_secs_f64()));
        }
        if let Some(bytes) = cost.resident_bytes {
            self.metric("process_resident_memory_bytes".to_owned(), "Resident memory of the agent.", "gauge");
            self.number(&[], bytes);
        }
        if let Some(descriptors) = cost.descriptors {
            self.metric("process_open_fds".to_owned(), "Open file descriptors of the agent.", "gauge");
            self.number(&[], descriptors);
        }
    }

    fn audit(&mut self, report: &AuditReport) {
        self.counter("audited_walks", "Walks held against the CFI of their images, by what came of it.");
        let agreeing = report.walks - report.disagreeing;
        for (outcome, walks) in [
            ("agrees", agreeing),
            ("disagrees", report.disagreeing),
            ("outdated", report.outdated),
            ("lost", report.lost),
        ] {
            self.number(&[("outcome", outcome)], walks);
        }
        self.counter("audited_steps", "Steps of those walks by the image that each starts in.");
        for (image, outcomes) in &report.images {
            let id = image.shown_id();
            for (outcome, steps) in outcomes {
                let labels = [("image", &*image.path), ("build_id", &*id), ("outcome", outcome.as_str())];
                self.number(&labels, *steps);
            }
        }
    }

    fn write(&mut self, what: impl Display) {
        write!(self.text, "{what}").expect("writing to a string cannot fail");
    }
}

/// A label's value: paths may hold anything.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::{AuditedImage, Outcome};

    #[test]
    fn audits_are_told_by_image() {
        let image = AuditedImage { path: "/a \"b\"\\\n".into(), id: None };
        let outcomes = [(Outcome::Agrees, 7), (Outcome::Disagrees, 2)].into_iter().collect();
        let report = AuditReport {
            walks: 5,
            disagreeing: 1,
            lost: 3,
            images: [(image, outcomes)].into_iter().collect(),
            ..AuditReport::default()
        };
        let mut text = Exposition::default();
        text.audit(&report);
        for line in [
            "windlass_agent_audited_walks_total{outcome=\"agrees\"} 4",
            "windlass_agent_audited_walks_total{outcome=\"disagrees\"} 1",
            "windlass_agent_audited_walks_total{outcome=\"outdated\"} 0",
            "windlass_agent_audited_walks_total{outcome=\"lost\"} 3",
            r#"windlass_agent_audited_steps_total{image="/a \"b\"\\\n",build_id="",outcome="agrees"} 7"#,
            r#"windlass_agent_audited_steps_total{image="/a \"b\"\\\n",build_id="",outcome="disagrees"} 2"#,
        ] {
            assert!(text.text.lines().any(|it| it == line), "{line} in\n{}", text.text);
        }
        assert!(!Metrics::default().text().contains("audit"), "there are none");
    }

    #[test]
    fn every_number_has_its_line() {
        let metrics = Metrics::default();
        metrics.sample(StopReason::EndOfStack, None);
        metrics.sample(StopReason::UnsupportedRule, Some(UnsupportedReason::StackSwitch));
        assert_eq!(metrics.set_lost_samples(5), 5);
        assert_eq!(metrics.set_lost_samples(7), 2);
        metrics.set_readings(ReadingCounts { late: 9, skipped: 8, put_off: 7, waiting: 1 });
        metrics.set_lost_process_events(11);
        metrics.process_events_lost();
        metrics.table_failed();
        metrics.set_kernel_tables(TableMemory { used_bytes: 70_000, budget_bytes: 80_000 });
        metrics.table_loaded();
        metrics.kernel_tables_evicted(3);
        metrics.request(Request::Table, None);
        metrics.request(Request::Profiles, Some(&ServiceError::NoAnswer("x".to_owned())));
        metrics.shipped(Shipped { sent: 2, spooled: 3, dropped: 1 }, 300);
        metrics.shipped(Shipped { sent: 1, spooled: 1, dropped: 0 }, 100);
        let text = metrics.text();
        for line in [
            "# TYPE windlass_agent_samples_total counter",
            "windlass_agent_samples_total{reason=\"end_of_stack\"} 1",
            "windlass_agent_samples_total{reason=\"jit\"} 0",
            "windlass_agent_unsupported_rows_total{reason=\"stack_switch\"} 1",
            "windlass_agent_lost_samples_total 7",
            "windlass_agent_lost_process_events_total 11",
            "windlass_agent_process_event_losses_total 1",
            "windlass_agent_table_failures_total 1",
            "# TYPE windlass_agent_kernel_table_bytes gauge",
            "windlass_agent_kernel_table_bytes 70000",
            "windlass_agent_kernel_table_budget_bytes 80000",
            "windlass_agent_late_process_readings_total 9",
            "windlass_agent_skipped_process_readings_total 8",
            "windlass_agent_put_off_process_readings_total 7",
            "windlass_agent_waiting_process_readings 1",
            "windlass_agent_tables_loaded_total 1",
            "windlass_agent_kernel_tables_evicted_total 3",
            "windlass_agent_requests_total{request=\"table\"} 1",
            "windlass_agent_request_failures_total{request=\"profiles\",failure=\"no_answer\"} 1",
            "windlass_agent_batches_sent_total 3",
            "windlass_agent_batches_dropped_total 1",
            "# TYPE windlass_agent_spooled_bytes gauge",
            "windlass_agent_spooled_batches 1",
            "windlass_agent_spooled_bytes 100",
            concat!("windlass_agent_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
            "# TYPE process_cpu_seconds_total counter",
            "# TYPE process_resident_memory_bytes gauge",
            "# TYPE process_open_fds gauge",
        ] {
            assert!(text.lines().any(|it| it == line), "{line} in\n{text}");
        }
        for reason in StopReason::ALL {
            assert!(text.contains(&format!("samples_total{{reason=\"{}\"}}", reason.as_str())));
        }
    }

    #[test]
    fn what_is_not_sent_leaves_the_time_as_it_was() {
        let metrics = Metrics::default();
        let start = unix_s();
        let told = || {
            let text = metrics.text();
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix("windlass_agent_last_batch_sent_timestamp_seconds "));
            line.and_then(|seconds| seconds.parse::<u64>().ok()).expect("a number")
        };
        assert!(told().abs_diff(start) <= 1, "of the start");
        metrics.last_batch_sent_s.store(7, Ordering::Relaxed);
        metrics.shipped(Shipped { sent: 0, spooled: 1, dropped: 1 }, 100);
        assert_eq!(told(), 7);
        metrics.shipped(Shipped { sent: 1, spooled: 0, dropped: 0 }, 0);
        assert!(told() >= start);
    }

    #[test]
    fn the_text_is_of_its_format() {
        let text = Metrics::default().text();
        let mut typed = String::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                typed = rest.split(' ').next().unwrap().to_owned();
            } else if !line.starts_with("# HELP ") {
                let (series, value) = line.rsplit_once(' ').unwrap();
                assert_eq!(series.split('{').next(), Some(typed.as_str()), "{line}");
                value.parse::<f64>().unwrap();
            }
        }
        let mut series: Vec<_> = text.lines().filter_map(|line| line.rsplit_once(' ')).collect();
        let lines = series.len();
        series.sort_unstable();
        series.dedup_by_key(|(name, _)| *name);
        assert_eq!(series.len(), lines, "no series is there twice");
    }

    #[test]
    fn an_agent_is_alive_while_it_turns() {
        let metrics = Metrics::default();
        let now = metrics.started + Duration::from_secs(3600);
        assert!(!metrics.is_alive(now));
        metrics.turned(now);
        assert!(metrics.is_alive(now) && metrics.is_alive(now + LONGEST_TURN));
        assert!(!metrics.is_alive(now + LONGEST_TURN + Duration::from_secs(1)));
    }
}
