//! A mounted file system with one program, which does not answer one process, or nobody who reads.
//!
//! A server of files that is gone cannot be had without another machine, but FUSE makes a file system of any process:
//! the kernel's requests are read from `/dev/fuse`, and one that gets no answer keeps its asker waiting, until a signal that kills
//! it. Messages and their layout are those of include/uapi/linux/fuse.h, version 7.31.

use std::ffi::CString;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread::JoinHandle;

/// What the kernel asks (`enum fuse_opcode`).
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
/// Bytes of `struct fuse_in_header`.
const HEADER_BYTES: usize = 40;
/// Largest message read: more than the kernel sends where nothing is written.
const MESSAGE_BYTES: usize = 64 * 1024;
/// How often the server looks whether it is to end, in milliseconds.
const LOOK_MS: i32 = 10;
/// The nodes.
const ROOT: u64 = 1;
const PROGRAM: u64 = 2;
/// What the program is called.
const NAME: &[u8] = b"program";

/// The file system, mounted until it is dropped.
pub struct SilentFiles {
    folder: PathBuf,
    state: Arc<State>,
    server: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    is_over: AtomicBool,
    /// The process that gets no answer; 0 for none.
    unanswered: AtomicU32,
    /// Whether nobody gets the content of a file.
    reads_unanswered: AtomicBool,
    silences: AtomicU64,
}

impl SilentFiles {
    /// Mounts one at `folder` with the bytes of `program`. An error where that is not permitted.
    pub fn mount(folder: &Path, program: &Path) -> std::io::Result<Self> {
        let content = std::fs::read(program)?;
        let device =
            File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/fuse")?;
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        let (target, options) = (CString::new(folder.as_os_str().as_bytes())?, CString::new(options)?);
        // SAFETY: all strings end with NUL and outlive the call.
        let mounted = unsafe {
            libc::mount(
                c"silent".as_ptr(),
                target.as_ptr(),
                c"fuse".as_ptr(),
                libc::MS_NOSUID,
                options.as_ptr().cast(),
            )
        };
        if mounted != 0 {
            return Err(std::io::Error::last_os_error());
        }
        let state = Arc::<State>::default();
        let server = std::thread::spawn({
            let state = state.clone();
            move || Server { device, content, state }.serve()
        });
        Ok(Self { folder: folder.to_owned(), state, server: Some(server) })
    }

    /// The program in it.
    pub fn program(&self) -> PathBuf {
        self.folder.join("program")
    }

    /// From now on process `tgid` gets no answer.
    pub fn leave_unanswered(&self, tgid: u32) {
        self.state.unanswered.store(tgid, Ordering::SeqCst);
    }

    /// From now on nobody gets what is in the program.
    pub fn leave_reads_unanswered(&self) {
        self.state.reads_unanswered.store(true, Ordering::SeqCst);
    }

    /// How many requests got no answer so far.
    pub fn silences(&self) -> u64 {
        self.state.silences.load(Ordering::SeqCst)
    }
}

impl Drop for SilentFiles {
    fn drop(&mut self) {
        self.state.is_over.store(true, Ordering::SeqCst);
        // With its descriptor goes the connection, and who still waits gets an error.
        let _ = self.server.take().map(JoinHandle::join);
        if let Ok(folder) = CString::new(self.folder.as_os_str().as_bytes()) {
            // SAFETY: the string ends with NUL and outlives the call.
            unsafe { libc::umount2(folder.as_ptr(), libc::MNT_DETACH) };
        }
    }
}

struct Server {
    device: File,
    content: Vec<u8>,
    state: Arc<State>,
}

impl Server {
    fn serve(&mut self) {
        let mut message = vec![0; MESSAGE_BYTES];
        while !self.state.is_over.load(Ordering::SeqCst) {
            let mut waited = libc::pollfd { fd: self.device.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one descriptor is there.
            unsafe { libc::poll(&raw mut waited, 1, LOOK_MS) };
            // None there, or one that was interrupted before it was read.
            let Ok(bytes) = self.device.read(&mut message) else { continue };
            self.answer(&message[..bytes]);
        }
    }

    fn answer(&mut self, message: &[u8]) {
        let word = |at: usize| {
            u32::from_le_bytes(
                message.get(at..at + 4).map_or([0; 4], |bytes| bytes.try_into().expect("4 bytes")),
            )
        };
        let double = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let (opcode, unique, node, thread) = (word(4), double(8), double(16), word(32));
        if matches!(opcode, FORGET | BATCH_FORGET) {
            return;
        }
        if opcode == INTERRUPT {
            // Who is killed is let go.
            return self.reply(double(HEADER_BYTES), Err(libc::EINTR));
        }
        let unanswered = self.state.unanswered.load(Ordering::SeqCst);
        let is_silent_read = opcode == READ && self.state.reads_unanswered.load(Ordering::SeqCst);
        if is_silent_read || unanswered != 0 && process_of(thread) == Some(unanswered) {
            self.state.silences.fetch_add(1, Ordering::SeqCst);
            return;
        }
        let body = match opcode {
            INIT => Ok(initialised(word(HEADER_BYTES + 4))),
            LOOKUP if node == ROOT && message[HEADER_BYTES..].strip_suffix(&[0]) == Some(NAME) => {
                // Nothing is remembered of names and attributes: each time the server is asked.
                Ok([doubles(&[PROGRAM, 0, 0, 0, 0]), self.attributes(PROGRAM)].concat())
            }
            LOOKUP => Err(libc::ENOENT),
            GETATTR => Ok([doubles(&[0, 0]), self.attributes(node)].concat()),
            // FOPEN_KEEP_CACHE
            OPEN => Ok(doubles(&[0, 1 << 1])),
            READ => {
                let start =
                    usize::try_from(double(HEADER_BYTES + 8)).unwrap_or(usize::MAX).min(self.content.len());
                let end = (start + word(HEADER_BYTES + 16) as usize).min(self.content.len());
                Ok(self.content[start..end].to_vec())
            }
            RELEASE | FLUSH => Ok(Vec::new()),
            _ => Err(libc::ENOSYS),
        };
        self.reply(unique, body);
    }

    /// `struct fuse_out_header` and what follows it.
    fn reply(&mut self, unique: u64, body: Result<Vec<u8>, i32>) {
        let (error, body) = match body {
            Ok(body) => (0, body),
            Err(error) => (-error, Vec::new()),
        };
        let length = 16 + body.len() as u32;
        let header = [&length.to_le_bytes()[..], &error.to_le_bytes(), &unique.to_le_bytes()].concat();
        // It fails when nobody waits any more.
        let _ = self.device.write(&[header, body].concat());
    }

    /// `struct fuse_attr`.
    fn attributes(&self, node: u64) -> Vec<u8> {
        let (mode, bytes) = match node {
            ROOT => (libc::S_IFDIR | 0o755, 0),
            _ => (libc::S_IFREG | 0o755, self.content.len() as u64),
        };
        let head = doubles(&[node, bytes, bytes.div_ceil(512), 0, 0, 0]);
        // Times' nanoseconds, mode, links, user, group, device, block size, flags.
        let tail = [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0];
        [head, tail.iter().flat_map(|word: &u32| word.to_le_bytes()).collect()].concat()
    }
}

/// `struct fuse_init_out`: version 7.31, and defaults for all but the largest write.
fn initialised(minor: u32) -> Vec<u8> {
    let mut words = [0_u32; 16];
    (words[0], words[1], words[5]) = (7, minor.min(31), 4096);
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn doubles(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// The process that a thread belongs to.
fn process_of(thread: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("Tgid:"))?.trim().parse().ok()
}
