//! A process that runs, and whose memory is not to be had.
//!
//! Whoever reads a process's memory, as `environ` and `maps` do, takes its `mmap_lock` for reading. Here one reader keeps that:
//! it asks through `/proc/PID/mem` for a page of a file whose file system does not answer, and such a reader waits for the page with the
//! lock in its hand (`get_user_pages_remote` without `locked` in mm/gup.c: its faults may not be tried again). Then the process
//! maps something and waits for that reader, and all who come later wait behind it (`rwsem` is fair: Documentation/locking/
//! rwsem). Another thread of the process goes on, and is sampled; it rests most of the time, so that there may be many.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::silent_files::SilentFiles;

const PAGE_BYTES: usize = 4096;
/// When it ends by itself, should a test be killed before it ends it.
const SECONDS: u32 = 300;
/// How often its thread turns before it rests: half a millisecond or so.
const TURNS: u32 = 10_000;
/// How long it rests, in microseconds.
const REST_US: u32 = 20_000;
/// Longest wait for it to be held.
const PATIENCE: Duration = Duration::from_secs(60);

/// A process whose memory nobody may read. It ends when this is dropped, and its reader with the file system.
pub struct HeldMemory {
    pid: libc::pid_t,
}

/// A page of memory, or of a file.
struct Page(*mut libc::c_void);

impl Page {
    /// A page of a file, by its number.
    fn map_file(file: &File, number: u64) -> std::io::Result<Self> {
        let offset = number as libc::off_t * PAGE_BYTES as libc::off_t;
        Self::map(libc::PROT_READ, libc::MAP_PRIVATE, file.as_raw_fd(), offset)
    }

    /// A page of zeros, which a process that is forked sees as well.
    fn map_shared() -> std::io::Result<Self> {
        Self::map(libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, 0)
    }

    fn map(protection: i32, flags: i32, descriptor: i32, offset: libc::off_t) -> std::io::Result<Self> {
        // SAFETY: the kernel chooses where, so nothing that is there is replaced.
        let page =
            unsafe { libc::mmap(std::ptr::null_mut(), PAGE_BYTES, protection, flags, descriptor, offset) };
        if page == libc::MAP_FAILED { Err(std::io::Error::last_os_error()) } else { Ok(Self(page)) }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: it was mapped with this size, and whoever used it had it by reference.
        unsafe { libc::munmap(self.0, PAGE_BYTES) };
    }
}

/// What both processes see.
#[repr(C)]
struct Shared {
    /// Whether a reader has the lock, so that the process may wait for it.
    is_held: AtomicBool,
    /// How often its thread has rested.
    rests: AtomicU32,
}

/// What the thread does that goes on: nothing for which memory must be had, after the first time.
extern "C" fn turn(shared: *mut libc::c_void) -> *mut libc::c_void {
    // SAFETY: it is the page that is there for as long as the process.
    let shared = unsafe { &*shared.cast::<Shared>() };
    loop {
        (0..TURNS).for_each(|_| std::hint::spin_loop());
        // SAFETY: a number alone is passed.
        unsafe { libc::usleep(REST_US) };
        shared.rests.fetch_add(1, Ordering::SeqCst);
    }
}

impl HeldMemory {
    /// Starts one, whose memory is held by way of `files`: by a page of the program that was not read yet, each its own.
    ///
    /// # Errors
    /// When the kernel refuses to start it.
    ///
    /// # Panics
    /// When its memory can still be read after a minute.
    pub fn start(files: &SilentFiles) -> std::io::Result<Self> {
        files.leave_reads_unanswered();
        // Each that was asked for before is one that got no answer.
        let silences = files.silences();
        let unread = Page::map_file(&File::open(files.program())?, silences)?;
        let page = Page::map_shared()?;
        // SAFETY: the page is of zeros, of which it may be made, and is there for as long as the reference.
        let shared: &Shared = unsafe { &*page.0.cast() };
        // SAFETY: the child, whose first thread this one is, calls nothing but the C library, whose locks are good after a fork.
        let pid = unsafe { libc::fork() };
        match pid {
            -1 => return Err(std::io::Error::last_os_error()),
            // SAFETY: as above.
            0 => unsafe {
                libc::alarm(SECONDS);
                let mut thread = 0;
                libc::pthread_create(&raw mut thread, std::ptr::null(), turn, page.0);
                while !shared.is_held.load(Ordering::SeqCst) {
                    libc::usleep(1000);
                }
                let _ = Page::map_shared();
                libc::_exit(0)
            },
            _ => {}
        }
        let child = Self { pid };
        // A thread that starts needs memory: its stack is mapped, and its first writes are faults.
        wait("its thread does not run", || shared.rests.load(Ordering::SeqCst) > 0);
        let memory = File::open(format!("/proc/{pid}/mem"))?;
        let address = unread.0 as u64;
        // It comes back when the file system is gone.
        std::thread::spawn(move || memory.read_at(&mut [0], address));
        wait("nobody reads", || files.silences() > silences);
        shared.is_held.store(true, Ordering::SeqCst);
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
