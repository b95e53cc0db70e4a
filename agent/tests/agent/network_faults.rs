//! A network that does not keep its word: sampling goes on, batches wait in the spool and arrive in order when it does
//! again, and so do tables.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use windlass_agent::Agent;
use windlass_agent::backend::Event;
use windlass_schema::StopReason;
use windlass_schema::maps::{EXACT_ADDRESS, no_table};

use crate::fake_backend::{View, sample};
use crate::fake_service::{FakeService, Tables};
use crate::service_faults::{get, number, send, shipped, start};
use crate::{config, own_address, own_pid, stop};

/// Longest wait for anything: some faults are noticed by a time limit of the agent's alone.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a connection does after a request came. Of answers to batches nothing but the status counts.
type Fault = fn(&mut TcpStream, Asked);

struct Asked {
    /// Whether for a table.
    is_table: bool,
    /// Whether at the path `/new`.
    is_new: bool,
    /// At this address.
    address: SocketAddr,
}

/// How an answer with a table begins that does not go on so.
const TABLE_HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\nWLUW";

/// What connections go through: to a fault until it is mended, then to a service.
struct Network {
    address: SocketAddr,
    is_mended: Arc<AtomicBool>,
    faults: Arc<AtomicUsize>,
}

impl Network {
    fn start(service: &FakeService, fault: Fault) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let behind = service.url().trim_start_matches("http://").parse().unwrap();
        let network = Self { address, is_mended: Arc::default(), faults: Arc::default() };
        let (is_mended, faults) = (network.is_mended.clone(), network.faults.clone());
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (is_mended, faults) = (is_mended.clone(), faults.clone());
                thread::spawn(move || serve(stream.unwrap(), address, behind, fault, &is_mended, &faults));
            }
        });
        network
    }

    /// How often the fault happened.
    fn faults(&self) -> usize {
        self.faults.load(Ordering::SeqCst)
    }

    fn mend(&self) {
        self.is_mended.store(true, Ordering::SeqCst);
    }
}

fn serve(
    mut stream: TcpStream,
    own: SocketAddr,
    behind: SocketAddr,
    fault: Fault,
    is_mended: &AtomicBool,
    faults: &AtomicUsize,
) {
    if !is_mended.load(Ordering::SeqCst) {
        let mut request = [0; 16 * 1024];
        // The rest of a request that is longer is never read.
        if stream.read(&mut request).is_ok_and(|bytes| bytes > 0) {
            faults.fetch_add(1, Ordering::SeqCst);
            let is_table = request.starts_with(b"GET ");
            let is_new = request.starts_with(b"GET /new ") || request.starts_with(b"POST /new ");
            fault(&mut stream, Asked { is_table, is_new, address: own });
        }
        return;
    }
    let service = TcpStream::connect(behind).unwrap();
    let (mut from, mut to) = (stream.try_clone().unwrap(), service.try_clone().unwrap());
    thread::spawn(move || {
        let _ = std::io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    });
    let _ = std::io::copy(&mut &service, &mut stream);
    let _ = stream.shutdown(Shutdown::Both);
}

#[track_caller]
fn patiently(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// How often requests of one kind failed in one way.
fn failures(agent: &Agent, request: &str, failure: &str) -> u64 {
    number(agent, &format!("request_failures_total{{request=\"{request}\",failure=\"{failure}\"}}"))
}

/// This binary is in a sample, without a table.
fn want_table(view: &View, tid: u32) {
    view.send(Event::Sample(sample(tid, StopReason::TablePending, &[own_address() | EXACT_ADDRESS])));
}

#[track_caller]
fn check(expected_failure: &str, fault: Fault) {
    let service = FakeService::start(Tables::FromSkeletons);
    let network = Network::start(&service, fault);
    let cache = tempfile::tempdir().unwrap();
    let mut config = config(&service, &cache);
    config.server = format!("http://{}", network.address);
    let (agent, view) = start(config);
    let image = || view.mapping(own_pid(), own_address()).unwrap().mapping.image;
    want_table(&view, 1);
    patiently("a batch is spooled", || number(&agent, "spooled_batches") == 1);
    for tid in 2..=4 {
        send(&view, tid);
        patiently("the next is spooled", || number(&agent, "spooled_batches") == u64::from(tid));
    }
    patiently("a table fails", || failures(&agent, "table", expected_failure) > 0);
    assert!(failures(&agent, "profiles", expected_failure) > 0, "{expected_failure}");
    assert!(network.faults() >= 2);
    assert_eq!(number(&agent, "batches_dropped_total"), 0);
    assert_eq!(image(), no_table::location(StopReason::TablePending));
    get(agent.status_address().unwrap(), "/healthz", 200);

    network.mend();
    patiently("the spool is empty", || number(&agent, "spooled_batches") == 0);
    patiently("the table is placed", || no_table::reason(image()).is_none());
    send(&view, 5);
    patiently("the next is sent", || shipped(&service).len() == 5);
    assert_eq!(shipped(&service), [1, 2, 3, 4, 5]);
    stop(agent);
}

fn answer(stream: &mut TcpStream, text: &str) {
    let _ = stream.write_all(text.as_bytes());
    let _ = stream.shutdown(Shutdown::Write);
    // What is closed with bytes unread is reset.
    let _ = stream.read_to_end(&mut Vec::new());
}

#[test]
fn connections_that_are_reset_within_an_answer() {
    check("no_answer", |stream, asked| {
        let head = if asked.is_table { TABLE_HEAD } else { "HTTP/1.1" };
        let _ = stream.write_all(head.as_bytes());
        let at_once = libc::linger { l_onoff: 1, l_linger: 0 };
        // SAFETY: the descriptor is open, and the kernel reads the structure, of the length given.
        let set = unsafe {
            libc::setsockopt(
                stream.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_LINGER,
                (&raw const at_once).cast(),
                size_of_val(&at_once) as u32,
            )
        };
        assert_eq!(set, 0);
    });
}

#[test]
fn redirections_without_end() {
    check("unreachable", |stream, asked| {
        let to = format!("HTTP/1.1 307 Moved\r\nlocation: http://{}/again\r\n", asked.address);
        answer(stream, &format!("{to}content-length: 0\r\nconnection: close\r\n\r\n"));
    });
}

#[test]
fn a_redirection_to_what_takes_no_profiles() {
    check("unreachable", |stream, asked| {
        let status = if asked.is_new { "405 Method Not Allowed" } else { "302 Found" };
        let to = format!("HTTP/1.1 {status}\r\nlocation: http://{}/new\r\n", asked.address);
        answer(stream, &format!("{to}content-length: 0\r\nconnection: close\r\n\r\n"));
    });
}

#[test]
fn pages_of_a_proxy_are_no_answer_of_the_service() {
    for status in ["200 OK", "404 Not Found"] {
        let fault: Fault = match status {
            "200 OK" => |stream, _| answer(stream, &page("200 OK")),
            _ => |stream, _| answer(stream, &page("404 Not Found")),
        };
        check("no_answer", fault);
    }
}

fn page(status: &str) -> String {
    text(status, "Text/HTML; charset=utf-8", "<html>Please log in</html>")
}

fn text(status: &str, kind: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
    )
}

#[test]
fn a_gateway_that_does_not_know_the_service_just_now() {
    let faults: [Fault; 4] = [
        |stream, _| answer(stream, &text("404 Not Found", "text/plain", "default backend - 404")),
        |stream, _| answer(stream, &text("405 Method Not Allowed", "text/plain", "")),
        |stream, _| {
            let json = "{\"status\":413,\"error\":\"Payload Too Large\"}";
            answer(stream, &text("413 Payload Too Large", "application/json", json));
        },
        |stream, _| answer(stream, &text("410 Gone", "application/json", "{\"message\":\"no Route\"}")),
    ];
    for fault in faults {
        check("no_answer", fault);
    }
}

#[test]
fn a_service_with_too_much_to_do() {
    check("busy", |stream, _| {
        let head = "HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\n";
        answer(stream, &format!("{head}connection: close\r\n\r\n"));
    });
}

#[test]
fn a_byte_now_and_then() {
    check("no_answer", |stream, asked| {
        let head = if asked.is_table { TABLE_HEAD } else { "HTTP/1.1 200 OK\r\nx: " };
        let _ = stream.write_all(head.as_bytes());
        while stream.write_all(b"W").is_ok() {
            thread::sleep(Duration::from_millis(500));
        }
    });
}

/// A service of which no request ever gets an answer, at `server`.
#[track_caller]
fn check_unreachable(server: &str) {
    let cache = tempfile::tempdir().unwrap();
    let mut config = config(&FakeService::reserve(), &cache);
    config.server = server.to_owned();
    let (agent, view) = start(config);
    want_table(&view, 1);
    patiently("the batch is spooled", || number(&agent, "spooled_batches") == 1);
    patiently("a table is asked for", || failures(&agent, "table", "unreachable") > 0);
    send(&view, 2);
    patiently("the next is spooled", || number(&agent, "spooled_batches") == 2);
    assert_eq!(
        failures(&agent, "profiles", "unreachable"),
        number(&agent, "requests_total{request=\"profiles\"}")
    );
    get(agent.status_address().unwrap(), "/healthz", 200);
    let summary = stop(agent);
    assert_eq!((summary.samples, summary.spooled_batches, summary.dropped_batches), (2, 2, 0), "{summary:?}");
}

#[test]
fn a_service_without_the_tls_that_is_asked_of_it() {
    let service = FakeService::start(Tables::FromSkeletons);
    check_unreachable(&service.url().replace("http://", "https://"));
    assert!(service.requests().is_empty());
}

#[test]
fn a_name_that_nobody_has() {
    // RFC 6761, 6.4: there never is such a name.
    check_unreachable("http://windlass.invalid:8002");
}
