//! How do bytes of a file reach a client without passing through this process?
//!
//! hyper sends what bodies give it, which are bytes in memory, and a file that is read into memory to be sent is copied twice more than
//! needed. Here a body is a part of a file's mapping that nobody reads: the connection is told beforehand which file that is
//! ([`Outlet`]), finds that the address it is to write from lies in the mapping, and has the kernel send that part of the file
//! instead: sendfile(2). Where a connection does not know the mapping, it writes what lies there, which is the same bytes.

use std::io::{self, IoSlice};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll, ready};

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use tokio::io::Interest;
use tokio::net::TcpStream;

use crate::copies::LocalCopy;

/// Most bytes sent by one call: what other connections of the thread wait for.
const CALL_BYTES: usize = 1 << 20;

/// What a connection is about to send: an extension of each request on a connection whose bytes go to the network as they are.
#[derive(Clone, Default)]
pub(crate) struct Outlet(Arc<Mutex<Weak<LocalCopy>>>);

impl Outlet {
    /// Says that the answer has a body of [`LocalCopy::mapped`]. The last word counts: HTTP/1 has one answer at a time.
    pub(crate) fn announce(&self, copy: &Arc<LocalCopy>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(copy);
    }

    /// The copy that was announced, as long as somebody else holds it: as long as it lives, its addresses are its own.
    fn announced(&self) -> Option<Arc<LocalCopy>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).upgrade()
    }

    /// Writes the beginning of `parts` to `tcp`, whichever way, and returns how much that was.
    pub(crate) fn poll_write(
        &self,
        tcp: &TcpStream,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let copy = self.announced();
        loop {
            ready!(tcp.poll_write_ready(cx))?;
            match tcp.try_io(Interest::WRITABLE, || write(tcp, copy.as_deref(), parts)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => return Poll::Ready(written),
            }
        }
    }
}

fn write(tcp: &TcpStream, copy: Option<&LocalCopy>, parts: &[IoSlice<'_>]) -> io::Result<usize> {
    let in_file = copy.and_then(|copy| {
        let at = |(number, part): (usize, &IoSlice<'_>)| Some((number, copy.offset_of(part)?));
        let (number, offset) = parts.iter().enumerate().filter(|(_, part)| !part.is_empty()).find_map(at)?;
        Some((copy, number, offset))
    });
    let Some((copy, number, offset)) = in_file else {
        return send(tcp, parts, SendFlags::NOSIGNAL);
    };
    let before: usize = parts[..number].iter().map(|part| part.len()).sum();
    if before > 0 {
        // The head waits for what follows, to go out in one packet.
        let sent = send(tcp, &parts[..number], SendFlags::NOSIGNAL | SendFlags::MORE)?;
        if sent < before {
            return Ok(sent);
        }
    }
    let mut offset = offset;
    let count = parts[number].len().min(CALL_BYTES);
    match rustix::fs::sendfile(tcp, copy.file(), Some(&mut offset), count) {
        Ok(sent) => Ok(before + sent),
        // What was sent before counts; the next call says it again.
        Err(_) if before > 0 => Ok(before),
        // A file system that has no such thing. The kernel reads what is mapped instead.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            send(tcp, &parts[number..], SendFlags::NOSIGNAL)
        }
        Err(error) => Err(error.into()),
    }
}

fn send(tcp: &TcpStream, parts: &[IoSlice<'_>], flags: SendFlags) -> io::Result<usize> {
    Ok(sendmsg(tcp, parts, &mut SendAncillaryBuffer::default(), flags)?)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read as _, Write as _};

    use super::*;

    /// Resident bytes of the mapping that holds this address.
    fn resident_bytes(address: usize) -> u64 {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut is_meant = false;
        for line in maps.lines() {
            let range = line.split_once(' ').and_then(|(range, _)| range.split_once('-'));
            let range =
                range.map(|(start, end)| (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16)));
            if let Some((Ok(start), Ok(end))) = range {
                is_meant = (start..end).contains(&address);
            } else if let Some(size) = line.strip_prefix("Rss:").filter(|_| is_meant) {
                return size.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024;
            }
        }
        panic!("no mapping at {address:#x}");
    }

    fn copy_of(content: &[u8]) -> Arc<LocalCopy> {
        let mut file: File = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        Arc::new(LocalCopy::new(file).unwrap())
    }

    /// Writes `parts` one behind the other, and returns what arrives.
    async fn transmit(outlet: &Outlet, parts: &[&[u8]]) -> Vec<u8> {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let tcp = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let reader = std::thread::spawn(move || {
            let mut received = Vec::new();
            listener.accept().unwrap().0.read_to_end(&mut received).unwrap();
            received
        });
        let mut slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
        let mut slices = &mut slices[..];
        while !slices.is_empty() {
            let written = std::future::poll_fn(|cx| outlet.poll_write(&tcp, cx, slices)).await.unwrap();
            assert_ne!(written, 0);
            IoSlice::advance_slices(&mut slices, written);
        }
        drop(tcp);
        reader.join().unwrap()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_kernel_sends_what_is_in_the_file_and_nobody_reads_it() {
        let content: Vec<u8> = (0..9 << 20).map(|at: usize| (at / 11 % 251) as u8).collect();
        let copy = copy_of(&content);
        let part = copy.mapped(4097..content.len() as u64 - 5);
        let outlet = Outlet::default();
        outlet.announce(&copy);
        let received = transmit(&outlet, &[b"head", b"", &part, b"tail"]).await;
        assert!(received == [b"head", &content[4097..content.len() - 5], b"tail"].concat());
        assert_eq!(resident_bytes(part.as_ptr().addr()), 0);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_mapping_that_was_not_announced_is_written_like_any_memory() {
        let content = vec![7; 3 << 20];
        let (copy, other) = (copy_of(&content), copy_of(b"other"));
        let outlet = Outlet::default();
        for announced in [&other, &copy_of(b"gone")] {
            outlet.announce(announced);
            let part = copy.mapped(0..content.len() as u64);
            assert!(transmit(&outlet, &[b"head", &part]).await == [b"head", &content[..]].concat());
        }
    }
}
