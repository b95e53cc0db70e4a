//! A service that is away, slow, refuses, or lies: nothing unverified is loaded, nothing is sent out of order, and
//! sampling goes on.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};

use windlass_agent::backend::Event;
use windlass_agent::table_cache::TableCache;
use windlass_agent::token::Token;
use windlass_agent::{Agent, Config};
use windlass_schema::maps::{EXACT_ADDRESS, no_table};
use windlass_schema::table::checksum;
use windlass_schema::{StopReason, UnsupportedReason};

use crate::fake_backend::{FakeBackend, View, sample};
use crate::fake_service::{FakeService, Tables, table_of};
use crate::{config, eventually, own_address, own_pid, stop};

/// The body of an answer of the agent's, which must have this status.
#[track_caller]
pub(crate) fn get(address: SocketAddr, path: &str, status: u16) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: agent\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{head}");
    body.to_owned()
}

/// An agent whose numbers can be asked for.
pub(crate) fn start(mut config: Config) -> (Agent, View) {
    let (backend, view) = FakeBackend::new();
    config.listen = Some(([127, 0, 0, 1], 0).into());
    (Agent::start_with_backend(config, Box::new(backend)).unwrap(), view)
}

/// The number of one line of `/metrics`.
#[track_caller]
pub(crate) fn number(agent: &Agent, series: &str) -> u64 {
    let text = get(agent.status_address().unwrap(), "/metrics", 200);
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("windlass_agent_{series} ")));
    line.unwrap_or_else(|| panic!("no {series} in {text}")).parse().unwrap()
}

pub(crate) fn send(view: &View, tid: u32) {
    view.send(Event::Sample(sample(tid, StopReason::EndOfStack, &[own_address() | EXACT_ADDRESS])));
}

pub(crate) fn shipped(service: &FakeService) -> Vec<u32> {
    service.samples().iter().map(|sample| sample.tid).collect()
}

#[test]
fn numbers_and_health_are_told_to_whoever_asks() {
    let service = FakeService::start(Tables::FromSkeletons);
    let cache = tempfile::tempdir().unwrap();
    let (agent, view) = start(config(&service, &cache));
    let address = agent.status_address().unwrap();
    assert_eq!(get(address, "/healthz", 200), "ok\n");
    get(address, "/else", 404);
    send(&view, 1);
    let mut stopped = sample(2, StopReason::UnsupportedRule, &[own_address() | EXACT_ADDRESS]);
    stopped.unsupported = Some(UnsupportedReason::StackSwitch);
    view.send(Event::Sample(stopped));
    let counted = || number(&agent, "unsupported_rows_total{reason=\"stack_switch\"}") == 1;
    eventually("the samples are counted", counted);
    let before = number(&agent, "last_batch_sent_timestamp_seconds");
    eventually("they are sent", || number(&agent, "batches_sent_total") > 0);
    assert!(number(&agent, "last_batch_sent_timestamp_seconds") >= before && before > 0);
    assert_eq!(number(&agent, "samples_total{reason=\"end_of_stack\"}"), 1);
    assert_eq!(number(&agent, "samples_total{reason=\"unsupported_rule\"}"), 1);
    assert_eq!(number(&agent, "unsupported_rows_total{reason=\"overlap\"}"), 0);
    assert_eq!(number(&agent, "samples_total{reason=\"jit\"}"), 0);
    assert!(number(&agent, "requests_total{request=\"profiles\"}") > 0);
    let taken = FakeBackend::new().0;
    let mut config = config(&service, &cache);
    config.listen = Some(address);
    let error = Agent::start_with_backend(config, Box::new(taken)).map(stop).unwrap_err().to_string();
    assert!(error.contains(&address.to_string()), "{error}");
    stop(agent);
}

/// What is wrong with a table, and how it becomes so.
type Lie = (&'static str, fn(Vec<u8>) -> Vec<u8>);

/// With the checksum of what it has become.
fn sealed(mut table: Vec<u8>) -> Vec<u8> {
    let sum = checksum(&table);
    table[8..16].copy_from_slice(&sum.to_le_bytes());
    table
}

#[test]
fn tables_that_are_not_what_they_should_be_are_not_placed() {
    let lies: [Lie; 9] = [
        ("of another image", |_| table_of("abcd".parse().unwrap())),
        ("for another architecture", |mut table| {
            table[6] = if table[6] == 1 { 2 } else { 1 };
            sealed(table)
        }),
        ("of a later version", |mut table| {
            table[4] += 1;
            sealed(table)
        }),
        ("a bit is wrong", |mut table| {
            *table.last_mut().unwrap() ^= 1;
            table
        }),
        ("its checksum is wrong", |mut table| {
            table[8] ^= 1;
            table
        }),
        ("cut short", |table| table[..table.len() - 8].to_vec()),
        ("too long", |table| [table, vec![0; 8]].concat()),
        ("nothing", |_| Vec::new()),
        ("a page of a proxy", |_| b"<html>please log in</html>".to_vec()),
    ];
    for (lie, change) in lies {
        let service = FakeService::start(Tables::Changed(change));
        let cache = tempfile::tempdir().unwrap();
        let (agent, view) = start(config(&service, &cache));
        view.send(Event::Sample(sample(1, StopReason::TablePending, &[own_address() | EXACT_ADDRESS])));
        let unavailable = no_table::location(StopReason::TableUnavailable);
        eventually(lie, || view.mapping(own_pid(), own_address()).unwrap().mapping.image == unavailable);
        assert!(number(&agent, "table_failures_total") > 0, "{lie}");
        let summary = stop(agent);
        assert_eq!(summary.tables_loaded, 0, "{lie}");
        assert!(
            summary.tables_unavailable.iter().all(|(_, why)| why.contains("no usable table")),
            "{summary:?}"
        );
        assert_eq!(std::fs::read_dir(cache.path().join("tables")).unwrap().count(), 0, "{lie}");
    }
}

#[test]
fn a_table_whose_transfer_ends_early_is_asked_for_again() {
    let service = FakeService::start(Tables::CutOff);
    let cache = tempfile::tempdir().unwrap();
    let (agent, view) = start(config(&service, &cache));
    view.send(Event::Sample(sample(1, StopReason::TablePending, &[own_address() | EXACT_ADDRESS])));
    let failures = || number(&agent, "request_failures_total{request=\"table\",failure=\"no_answer\"}");
    eventually("it is asked for again", || failures() > 3);
    let image = view.mapping(own_pid(), own_address()).unwrap().mapping.image;
    assert_eq!(image, no_table::location(StopReason::TablePending));
    assert_eq!(number(&agent, "tables_loaded_total"), 0);
    stop(agent);
    assert_eq!(std::fs::read_dir(cache.path().join("tables")).unwrap().count(), 0);
}

#[test]
fn sampling_goes_on_while_the_service_does_not_answer() {
    const SAMPLES: u32 = 10;
    let service = FakeService::start(Tables::FromSkeletons);
    let cache = tempfile::tempdir().unwrap();
    let (agent, view) = start(config(&service, &cache));
    service.hold();
    for tid in 1..=SAMPLES {
        send(&view, tid);
        let counted = || number(&agent, "samples_total{reason=\"end_of_stack\"}");
        eventually("the sample is taken", || counted() == u64::from(tid));
    }
    assert_eq!(number(&agent, "batches_sent_total"), 0, "the service took something");
    get(agent.status_address().unwrap(), "/healthz", 200);
    service.release();
    let summary = stop(agent);
    assert_eq!(summary.dropped_batches + summary.spooled_batches, 0, "{summary:?}");
    assert_eq!(shipped(&service), (1..=SAMPLES).collect::<Vec<_>>());
}

#[test]
fn sampling_and_shipping_go_on_while_tables_are_never_answered() {
    let service = FakeService::start(Tables::Silent);
    let cache = tempfile::tempdir().unwrap();
    let (agent, view) = start(config(&service, &cache));
    for tid in 1..=3 {
        view.send(Event::Sample(sample(tid, StopReason::TablePending, &[own_address() | EXACT_ADDRESS])));
        eventually("the sample is sent", || shipped(&service).contains(&tid));
    }
    assert!(service.requests().iter().any(|line| line.ends_with("unwind 100")), "{:?}", service.requests());
    let image = view.mapping(own_pid(), own_address()).unwrap().mapping.image;
    assert_eq!(image, no_table::location(StopReason::TablePending));
    get(agent.status_address().unwrap(), "/healthz", 200);
    let summary = stop(agent);
    assert_eq!((summary.samples, summary.tables_loaded, summary.dropped_batches), (3, 0, 0), "{summary:?}");
}

/// A file system of few bytes, unmounted when dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    const BYTES: usize = 64 * 1024;

    /// `None` where this process may not mount.
    fn mount() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let path = std::ffi::CString::new(folder.path().to_str().unwrap()).unwrap();
        let options = std::ffi::CString::new(format!("size={}", Self::BYTES)).unwrap();
        // SAFETY: all strings end in a zero byte and outlive the call.
        let mounted = unsafe {
            libc::mount(c"tmpfs".as_ptr(), path.as_ptr(), c"tmpfs".as_ptr(), 0, options.as_ptr().cast())
        };
        (mounted == 0).then_some(Self(folder))
    }

    fn fill(&self) -> std::path::PathBuf {
        let path = self.0.path().join("other");
        let mut file = std::fs::File::create(&path).unwrap();
        while file.write_all(&[1; 1024]).is_ok() {}
        path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let path = std::ffi::CString::new(self.0.path().to_str().unwrap()).unwrap();
        // SAFETY: as in `mount`.
        unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
    }
}

#[test]
fn a_full_disk_costs_what_it_does_not_take_and_nothing_else() {
    let Some(disk) = SmallDisk::mount() else {
        eprintln!("skipped: this process may not mount a small disk");
        return;
    };
    let other = disk.fill();
    // No service, and no room for the batch.
    let service = FakeService::reserve();
    let mut config = Config::new(service.url(), disk.0.path());
    config.ship_interval = std::time::Duration::from_millis(100);
    let (agent, view) = start(config.clone());
    send(&view, 1);
    eventually("the batch is lost", || number(&agent, "batches_dropped_total") == 1);
    get(agent.status_address().unwrap(), "/healthz", 200);
    std::fs::remove_file(&other).unwrap();
    send(&view, 2);
    eventually("the next is spooled", || number(&agent, "spooled_batches") == 1);
    let other = disk.fill();
    // A table is used though it cannot be kept.
    let service = service.open(Tables::FromSkeletons);
    eventually("the spool is empty", || number(&agent, "spooled_batches") == 0);
    view.send(Event::Sample(sample(3, StopReason::TablePending, &[own_address() | EXACT_ADDRESS])));
    let image = || view.mapping(own_pid(), own_address()).unwrap().mapping.image;
    eventually("the table is placed", || no_table::reason(image()).is_none());
    eventually("the batches are sent", || shipped(&service) == [2, 3]);
    stop(agent);
    // What was kept, if there was room after all, is whole.
    let tables = disk.0.path().join("tables");
    let cache = TableCache::open(&tables, u64::MAX, Default::default()).unwrap();
    for file in std::fs::read_dir(tables).unwrap().flatten() {
        let path = file.path();
        let id = path.file_stem().unwrap().to_str().unwrap().parse().unwrap();
        assert!(cache.get(id).is_some(), "{}", path.display());
    }
    std::fs::remove_file(other).unwrap();
}

#[test]
fn the_spool_keeps_the_newest_within_its_limit_and_sends_them_in_order() {
    let service = FakeService::reserve();
    let cache = tempfile::tempdir().unwrap();
    let (agent, view) = start(config(&service, &cache));
    send(&view, 1);
    eventually("the batch is spooled", || number(&agent, "spooled_batches") == 1);
    let batch_bytes = number(&agent, "spooled_bytes");
    stop(agent);

    let cache = tempfile::tempdir().unwrap();
    let mut config = config(&service, &cache);
    // Batches of one sample differ by some bytes.
    config.spool_bytes = batch_bytes * 7 / 2;
    let limit = config.spool_bytes;
    let (agent, view) = start(config);
    for tid in 1..=6 {
        send(&view, tid);
        let seen = || number(&agent, "spooled_batches") + number(&agent, "batches_dropped_total");
        eventually("the batch is spooled", || seen() == u64::from(tid));
        assert!(number(&agent, "spooled_bytes") <= limit);
    }
    assert_eq!(number(&agent, "batches_dropped_total"), 3);
    let service = service.open(Tables::FromSkeletons);
    eventually("the spool is empty", || number(&agent, "spooled_batches") == 0);
    assert_eq!(number(&agent, "spooled_bytes"), 0);
    send(&view, 7);
    stop(agent);
    assert_eq!(shipped(&service), [4, 5, 6, 7]);
}

#[test]
fn a_batch_that_is_refused_holds_no_other_up() {
    let service = FakeService::start(Tables::FromSkeletons);
    let cache = tempfile::tempdir().unwrap();
    let (agent, view) = start(config(&service, &cache));
    // Overloaded; a token that is to be mended; a service without the route; and for good.
    service.answer_profiles(&[503, 401, 404, 400]);
    send(&view, 1);
    eventually("the batch is given up", || number(&agent, "batches_dropped_total") == 1);
    send(&view, 2);
    eventually("the next is sent", || number(&agent, "batches_sent_total") == 1);
    stop(agent);
    assert_eq!(shipped(&service), [2]);
    let of_profiles: Vec<_> =
        service.requests().into_iter().filter(|line| line.starts_with("POST profiles")).collect();
    assert_eq!(
        of_profiles,
        ["503", "401", "404", "400", "200"].map(|status| format!("POST profiles zstd {status}"))
    );
}

/// An agent with three batches in its spool: the first did not get through.
fn three_spooled(service: &FakeService, cache: &tempfile::TempDir) -> (Agent, View) {
    let (agent, view) = start(config(service, cache));
    for tid in 1..=3 {
        send(&view, tid);
        eventually("the batch is spooled", || number(&agent, "spooled_batches") == u64::from(tid));
    }
    (agent, view)
}

#[test]
fn a_batch_that_alone_never_gets_through_holds_no_other_up() {
    // What fails in the service itself, and what a gateway does not let through.
    for status in [500, 411] {
        let service = FakeService::start(Tables::FromSkeletons);
        let cache = tempfile::tempdir().unwrap();
        service.answer_thread(1, status);
        let (agent, _view) = three_spooled(&service, &cache);
        eventually("the others are sent", || number(&agent, "spooled_batches") == 0);
        assert_eq!(number(&agent, "batches_dropped_total"), 1);
        let summary = stop(agent);
        assert_eq!((summary.sent_batches, summary.dropped_batches), (2, 1), "{summary:?}");
        assert_eq!(shipped(&service), [2, 3]);
    }
}

#[test]
fn a_service_that_fails_for_all_loses_none() {
    // It is back for the oldest; and for the other that is tried after five failures.
    for (failures, order) in [(4, [1, 2, 3]), (5, [2, 1, 3]), (6, [1, 2, 3])] {
        let service = FakeService::start(Tables::FromSkeletons);
        let cache = tempfile::tempdir().unwrap();
        service.answer_profiles(&vec![503; failures]);
        let (agent, _view) = three_spooled(&service, &cache);
        eventually("all are sent", || number(&agent, "spooled_batches") == 0);
        let summary = stop(agent);
        assert_eq!((summary.sent_batches, summary.dropped_batches), (3, 0), "{summary:?}");
        assert_eq!(shipped(&service), order, "{failures}");
    }
}

#[test]
fn a_token_that_is_renewed_in_its_file_is_shown_from_then_on() {
    let service = FakeService::start(Tables::FromSkeletons);
    let cache = tempfile::tempdir().unwrap();
    let file = cache.path().join("token");
    std::fs::write(&file, "first\n").unwrap();
    let mut config = config(&service, &cache);
    config.token = Token::in_file(file.clone()).unwrap();
    service.demand_token("first");
    let (agent, view) = start(config);
    send(&view, 1);
    eventually("the batch is sent", || number(&agent, "batches_sent_total") == 1);
    // Renewed in time, nothing waits.
    std::fs::write(&file, "second\n").unwrap();
    service.demand_token("second");
    send(&view, 2);
    eventually("the batch is sent", || number(&agent, "batches_sent_total") == 2);
    assert_eq!(number(&agent, "request_failures_total{request=\"profiles\",failure=\"refused\"}"), 0);
    service.demand_token("third");
    send(&view, 3);
    eventually("the batch waits", || number(&agent, "spooled_batches") == 1);
    std::fs::write(&file, "third\n").unwrap();
    eventually("the batch is sent", || number(&agent, "batches_sent_total") == 3);
    assert_eq!(stop(agent).dropped_batches, 0);
    assert_eq!(shipped(&service), [1, 2, 3]);
}
