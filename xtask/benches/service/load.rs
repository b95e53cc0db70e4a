//! Requests over kept connections, as many at a time as there are connections, and what each took.
//!
//! # Why this shape
//! Server and generator share the processors, so whatever the generator spends is missing from what it measures. One
//! thread, one epoll set, requests made beforehand, bodies read into one buffer: its processor time
//! stands beside each figure. A load is over when its time is; requests under way then do not count.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// Bytes read at once: what fits into a processor's own cache, as an ordinary client's buffer does.
const BUFFER_BYTES: usize = 128 << 10;
/// Longest head accepted, in bytes.
const MAX_HEAD_BYTES: usize = 8 << 10;
/// How long a server may keep all connections waiting.
const PATIENCE_MS: i32 = 60_000;

/// What to ask for.
#[derive(Clone)]
pub(crate) struct Load {
    /// Paths, in turn over all connections.
    pub(crate) paths: Vec<String>,
    pub(crate) connections: usize,
    pub(crate) time: Duration,
    /// What each answer must be.
    pub(crate) status: u16,
    /// `Accept-Encoding`.
    pub(crate) encoding: &'static str,
}

/// What a server did.
#[derive(Clone, Debug)]
pub(crate) struct Measured {
    pub(crate) requests_a_second: f64,
    /// Of bodies.
    pub(crate) megabytes_a_second: f64,
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    /// Share of one processor that the generator took, in percent.
    pub(crate) generator_percent: f64,
}

struct Connection {
    stream: TcpStream,
    head: Vec<u8>,
    /// Of the body, once the head is complete.
    left: Option<u64>,
    sent: Instant,
}

impl Load {
    /// Puts the load on a server.
    pub(crate) fn run(&self, server: SocketAddr) -> Result<Measured> {
        let requests: Vec<Vec<u8>> =
            self.paths.iter().map(|path| request(path, self.encoding).into_bytes()).collect();
        let mut requests = requests.iter().cycle();
        let poll = Poll::new()?;
        let mut connections = Vec::new();
        for number in 0..self.connections {
            let stream = connect(server)?;
            stream.set_nonblocking(true)?;
            poll.add(&stream, number)?;
            let mut connection = Connection { stream, head: Vec::new(), left: None, sent: Instant::now() };
            connection.send(requests.next().context("no path")?)?;
            connections.push(connection);
        }
        let mut buffer = vec![0; BUFFER_BYTES];
        let (start, busy) = (Instant::now(), processor_time());
        let (mut bytes, mut times) = (0, Vec::new());
        while start.elapsed() < self.time {
            for number in poll.wait()? {
                let connection = &mut connections[number];
                while let Some(body) = connection.receive(&mut buffer, self.status)? {
                    bytes += body.bytes;
                    if body.last {
                        times.push(connection.sent.elapsed());
                        connection.send(requests.next().context("no path")?)?;
                    }
                }
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        ensure!(!times.is_empty(), "no request was answered within {:?}", self.time);
        times.sort_unstable();
        let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
        Ok(Measured {
            requests_a_second: times.len() as f64 / seconds,
            megabytes_a_second: bytes as f64 / 1e6 / seconds,
            p50_ms: at(0.5),
            p99_ms: at(0.99),
            generator_percent: (processor_time() - busy).as_secs_f64() / seconds * 100.0,
        })
    }
}

/// A piece of a body.
struct Piece {
    bytes: u64,
    last: bool,
}

impl Connection {
    fn send(&mut self, request: &[u8]) -> Result<()> {
        self.sent = Instant::now();
        // A request is smaller than any socket's buffer, and the one before has been answered.
        Ok(self.stream.write_all(request)?)
    }

    /// What has arrived; `None` if nothing has.
    fn receive(&mut self, buffer: &mut [u8], expected: u16) -> Result<Option<Piece>> {
        let count = match self.stream.read(buffer) {
            Ok(0) => bail!("the server closed a connection"),
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let mut body = count;
        let left = match self.left {
            Some(left) => left,
            None => {
                let known = self.head.len();
                self.head.extend_from_slice(&buffer[..count.min(MAX_HEAD_BYTES)]);
                let Some(end) = self.head.windows(4).position(|end| end == b"\r\n\r\n") else {
                    ensure!(self.head.len() < MAX_HEAD_BYTES, "a head without end");
                    return Ok(Some(Piece { bytes: 0, last: false }));
                };
                body = count - (end + 4 - known);
                let head = Head::parse(&self.head[..end])?;
                ensure!(head.status == expected, "status {}, expected {expected}", head.status);
                self.head.clear();
                head.length
            }
        };
        let left = left.checked_sub(body as u64).context("more than the length said")?;
        self.left = (left > 0).then_some(left);
        Ok(Some(Piece { bytes: body as u64, last: left == 0 }))
    }
}

/// What counts of an answer's head.
struct Head {
    status: u16,
    length: u64,
}

impl Head {
    fn parse(head: &[u8]) -> Result<Self> {
        let head = std::str::from_utf8(head)?;
        let mut lines = head.split("\r\n");
        let status = lines.next().and_then(|line| line.split(' ').nth(1)).context("no status")?.parse()?;
        let length = lines
            .filter_map(|line| line.split_once(": "))
            .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
            .context("an answer without length")?;
        Ok(Self { status, length: length.1.parse()? })
    }
}

fn connect(server: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(server)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn request(path: &str, encoding: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: bench\r\nUser-Agent: bench\r\nAccept-Encoding: {encoding}\r\n\r\n")
}

/// One request on a connection of its own: its status and its body as sent.
pub(crate) fn get(server: SocketAddr, path: &str, encoding: &str) -> Result<(u16, Vec<u8>)> {
    let mut stream = connect(server)?;
    stream.write_all(request(path, encoding).as_bytes())?;
    read_answer(&mut stream)
}

/// Uploads a content; fails unless it is stored.
pub(crate) fn put(server: SocketAddr, path: &str, sha256: &str, content: &[u8]) -> Result<()> {
    let mut stream = connect(server)?;
    let length = content.len();
    write!(
        stream,
        "PUT {path} HTTP/1.1\r\nHost: bench\r\nX-Windlass-Sha256: {sha256}\r\nContent-Length: {length}\r\n\r\n"
    )?;
    stream.write_all(content)?;
    let (status, body) = read_answer(&mut stream)?;
    ensure!((200..300).contains(&status), "PUT {path}: {status} {}", String::from_utf8_lossy(&body));
    Ok(())
}

fn read_answer(stream: &mut TcpStream) -> Result<(u16, Vec<u8>)> {
    let (mut answer, mut buffer) = (Vec::new(), vec![0; BUFFER_BYTES]);
    loop {
        if let Some(end) = answer.windows(4).take(MAX_HEAD_BYTES).position(|end| end == b"\r\n\r\n") {
            let head = Head::parse(&answer[..end])?;
            let mut body = answer.split_off(end + 4);
            let left = (head.length as usize).checked_sub(body.len()).context("more than the length said")?;
            let read = stream.take(left as u64).read_to_end(&mut body)?;
            ensure!(read == left, "a body cut short");
            return Ok((head.status, body));
        }
        let count = stream.read(&mut buffer)?;
        ensure!(count > 0, "no answer");
        answer.extend_from_slice(&buffer[..count]);
    }
}

/// Processor time of this thread.
fn processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one timespec to where the pointer says, which is one.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(failed, 0, "Linux has this clock");
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// An epoll set of streams by number.
struct Poll(std::os::fd::OwnedFd);

impl Poll {
    fn new() -> Result<Self> {
        // SAFETY: takes no pointers.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        ensure!(fd >= 0, std::io::Error::last_os_error());
        // SAFETY: the descriptor was made just now, and nobody else has it.
        Ok(Self(unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) }))
    }

    fn add(&self, stream: &TcpStream, number: usize) -> Result<()> {
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: number as u64 };
        // SAFETY: both descriptors are open, and the kernel reads one event through the pointer.
        let failed = unsafe {
            libc::epoll_ctl(self.0.as_raw_fd(), libc::EPOLL_CTL_ADD, stream.as_raw_fd(), &raw mut event)
        };
        ensure!(failed == 0, std::io::Error::last_os_error());
        Ok(())
    }

    /// The streams that have something to read.
    fn wait(&self) -> Result<Vec<usize>> {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 64];
        // SAFETY: the kernel writes at most as many events as the array has.
        let count = unsafe {
            libc::epoll_wait(self.0.as_raw_fd(), events.as_mut_ptr(), events.len() as i32, PATIENCE_MS)
        };
        ensure!(count != 0, "the server answered nothing for {PATIENCE_MS} ms");
        ensure!(count > 0, std::io::Error::last_os_error());
        Ok(events[..count as usize].iter().map(|event| event.u64 as usize).collect())
    }
}
