//! A process that runs, and whose memory is not to be had.
//!
//! Whoever reads a process's memory, as `environ` and `maps` do, takes its `mmap_lock` for reading. Here one reader keeps that:
//! it asks through `/proc/PID/mem` for a page of a file whose file system does not answer, and such a reader waits for the page with the
//! lock in its hand (`get_user_pages_remote` without `locked` in mm/gup.c: its faults may not be tried again). Then the process
//! maps something and waits for that reader, and all who come later wait behind it (`rwsem` is fair: Documentation/locking/
//! rwsem). Another thread of the process goes on, and is sampled.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::silent_files::SilentFiles;

const PAGE_BYTES: usize = 4096;
/// When it ends by itself, should a test be killed before it ends it.
const SECONDS: u32 = 300;
/// Longest wait for it to be held.
const PATIENCE: Duration = Duration::from_secs(60);

/// A process whose memory nobody may read. It ends when this is dropped, and its reader with the file system.
pub struct HeldMemory {
    pid: libc::pid_t,
}

/// A page of memory, or of a file.
struct Page(*mut libc::c_void);

impl Page {
    fn map(file: Option<&File>, protection: i32, flags: i32) -> std::io::Result<Self> {
        let descriptor = file.map_or(-1, |file| file.as_raw_fd());
        // SAFETY: the kernel chooses where, so nothing that is there is replaced.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), PAGE_BYTES, protection, flags, descriptor, 0) };
        if page == libc::MAP_FAILED { Err(std::io::Error::last_os_error()) } else { Ok(Self(page)) }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: it was mapped with this size, and whoever used it had it by reference.
        unsafe { libc::munmap(self.0, PAGE_BYTES) };
    }
}

/// What the thread does that goes on: nothing for which memory must be had, once it said that it runs.
extern "C" fn spin(runs: *mut libc::c_void) -> *mut libc::c_void {
    // SAFETY: it points to a byte of a page that stays for as long as the process.
    unsafe { AtomicBool::from_ptr(runs.cast()) }.store(true, Ordering::SeqCst);
    loop {
        std::hint::spin_loop();
    }
}

impl HeldMemory {
    /// Starts one, whose memory is held by way of `files`, in which no page was read yet, and none will be.
    ///
    /// # Errors
    /// When the kernel refuses to start it.
    ///
    /// # Panics
    /// When its memory can still be read after a minute.
    pub fn start(files: &SilentFiles) -> std::io::Result<Self> {
        files.leave_reads_unanswered();
        let unread = Page::map(Some(&File::open(files.program())?), libc::PROT_READ, libc::MAP_PRIVATE)?;
        let shared = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let shared = Page::map(None, libc::PROT_READ | libc::PROT_WRITE, shared)?;
        // SAFETY: the page is of zeros, which is false, and is there for as long as the references.
        let [is_held, runs] =
            [0, 1].map(|byte| unsafe { AtomicBool::from_ptr(shared.0.cast::<bool>().add(byte)) });
        // SAFETY: the child, whose first thread this one is, calls nothing but the C library, whose locks are good after a fork.
        let pid = unsafe { libc::fork() };
        match pid {
            -1 => return Err(std::io::Error::last_os_error()),
            // SAFETY: as above.
            0 => unsafe {
                libc::alarm(SECONDS);
                let mut thread = 0;
                libc::pthread_create(&raw mut thread, std::ptr::null(), spin, runs.as_ptr().cast());
                while !is_held.load(Ordering::SeqCst) {
                    libc::usleep(1000);
                }
                let _ = Page::map(None, libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
                libc::_exit(0)
            },
            _ => {}
        }
        let child = Self { pid };
        // A thread that starts needs memory: its stack is mapped, and its first writes are faults.
        wait("its thread does not run", || runs.load(Ordering::SeqCst));
        let memory = File::open(format!("/proc/{pid}/mem"))?;
        let address = unread.0 as u64;
        // It comes back when the file system is gone.
        std::thread::spawn(move || memory.read_at(&mut [0], address));
        wait("nobody reads", || files.silences() > 0);
        is_held.store(true, Ordering::SeqCst);
        wait("it does not wait", || child.is_waiting());
        Ok(child)
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.pid.cast_unsigned()
    }

    /// Whether its first thread waits as for a disk, the field behind the name in `stat` (proc_pid_stat(5)).
    fn is_waiting(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        stat.rsplit_once(')').is_some_and(|(_, fields)| fields.starts_with(" D"))
    }
}

#[track_caller]
fn wait(what: &str, holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

impl Drop for HeldMemory {
    fn drop(&mut self) {
        // SAFETY: the process is a child of this one, and is waited for nowhere else.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, std::ptr::null_mut(), 0);
        }
    }
}
