//! A perf event with its ring buffer: `perf_event_open(2)` and the records that come out of it.
//!
//! Written here because the BPF library opens perf events only to attach programs to them.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

/// `struct perf_event_attr` up to `sample_max_stack` (PERF_ATTR_SIZE_VER5, Linux 4.1).
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct PerfEventAttr {
    kind: u32,
    size: u32,
    config: u64,
    sample_period_or_frequency: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    bp_type: u32,
    config1: u64,
    config2: u64,
    branch_sample_type: u64,
    sample_regs_user: u64,
    sample_stack_user: u32,
    clockid: i32,
    sample_regs_intr: u64,
    aux_watermark: u32,
    sample_max_stack: u16,
    reserved: u16,
}

const TYPE_SOFTWARE: u32 = 1;
const CONFIG_TASK_CLOCK: u64 = 1;
const CONFIG_DUMMY: u64 = 9;
const FLAG_DISABLED: u64 = 1;
const FLAG_EXCLUDE_KERNEL: u64 = 1 << 5;
const FLAG_MMAP: u64 = 1 << 8;
const FLAG_COMM: u64 = 1 << 9;
const FLAG_FREQUENCY: u64 = 1 << 10;
const FLAG_TASK: u64 = 1 << 13;
const FLAG_WATERMARK: u64 = 1 << 14;
const FLAG_EXCLUDE_CALLCHAIN_KERNEL: u64 = 1 << 21;
const FLAG_MMAP2: u64 = 1 << 23;
const FLAG_COMM_EXEC: u64 = 1 << 24;
const FLAG_USE_CLOCKID: u64 = 1 << 25;
/// Since Linux 5.12: `PERF_RECORD_MMAP2` of a file with a build-ID has that in place of device and inode.
const FLAG_BUILD_ID: u64 = 1 << 34;
/// Records that are no samples carry the fields of `sample_type` that name a task, time and CPU too.
const FLAG_SAMPLE_ID_ALL: u64 = 1 << 18;
/// Executable mappings, exec, fork and exit.
const FLAGS_PROCESS_EVENTS: u64 =
    FLAG_MMAP | FLAG_COMM | FLAG_TASK | FLAG_MMAP2 | FLAG_COMM_EXEC | FLAG_SAMPLE_ID_ALL;
/// `PERF_FORMAT_TOTAL_TIME_ENABLED`: a read has the event's value, and how long it was enabled.
const FORMAT_TIME_ENABLED: u64 = 1;
/// `PERF_SAMPLE_TIME`.
const SAMPLE_TIME: u64 = 1 << 2;
/// `PERF_SAMPLE_TID | TIME | CPU | REGS_USER | STACK_USER`.
const SAMPLE_COPIED_STACK: u64 = 1 << 1 | SAMPLE_TIME | 1 << 7 | 1 << 12 | 1 << 13;
/// Bytes from the time to the end of a process event of [`PerfEventAttr::sideband`]: the time is all that
/// follows the record (`struct sample_id` in perf_event_open(2)).
pub(crate) const SIDEBAND_TIME_FROM_END: usize = 8;
/// The same of [`PerfEventAttr::copied_stacks`], where the CPU follows the time.
pub(crate) const COPIED_TIME_FROM_END: usize = 16;
const PERF_FLAG_FD_CLOEXEC: u64 = 8;
/// `PERF_EVENT_IOC_ENABLE` and `PERF_EVENT_IOC_DISABLE`.
const IOC_ENABLE: u64 = 0x2400;

/// Kinds of records, `enum perf_event_type` (include/uapi/linux/perf_event.h).
pub(crate) mod record {
    pub(crate) const LOST: u32 = 2;
    pub(crate) const COMM: u32 = 3;
    pub(crate) const EXIT: u32 = 4;
    pub(crate) const FORK: u32 = 7;
    pub(crate) const SAMPLE: u32 = 9;
    pub(crate) const MMAP2: u32 = 10;
}

impl PerfEventAttr {
    fn software(config: u64, flags: u64) -> Self {
        Self {
            kind: TYPE_SOFTWARE,
            size: size_of::<Self>() as u32,
            config,
            flags: flags | FLAG_USE_CLOCKID,
            clockid: libc::CLOCK_MONOTONIC,
            wakeup_events: 1,
            ..Self::default()
        }
    }

    /// Counts nothing; carries records of exec, fork, exit and executable mappings, each with its time; with the
    /// build-IDs of what is mapped, if the kernel knows `build_ids`.
    pub(crate) fn sideband(build_ids: bool) -> Self {
        let build_id = if build_ids { FLAG_BUILD_ID } else { 0 };
        Self {
            sample_type: SAMPLE_TIME,
            read_format: FORMAT_TIME_ENABLED,
            ..Self::software(CONFIG_DUMMY, FLAGS_PROCESS_EVENTS | FLAG_WATERMARK | build_id)
        }
    }

    /// Samples user registers, of which `registers` has a bit each, and `stack_bytes` of the user stack; carries the
    /// thread's process events.
    pub(crate) fn copied_stacks(frequency_hz: u32, registers: u64, stack_bytes: u32) -> Self {
        let flags = FLAG_DISABLED
            | FLAG_EXCLUDE_KERNEL
            | FLAG_EXCLUDE_CALLCHAIN_KERNEL
            | FLAG_FREQUENCY
            | FLAGS_PROCESS_EVENTS;
        Self {
            sample_period_or_frequency: u64::from(frequency_hz),
            sample_type: SAMPLE_COPIED_STACK,
            sample_regs_user: registers,
            sample_stack_user: stack_bytes,
            ..Self::software(CONFIG_TASK_CLOCK, flags)
        }
    }
}

/// What an event watches.
#[derive(Clone, Copy, Debug)]
pub(crate) enum PerfScope {
    /// All tasks on a CPU.
    Cpu(u32),
    /// A thread, on whatever CPU.
    Thread(u32),
}

/// `CLOCK_MONOTONIC` in nanoseconds, the clock of records and samples.
pub(crate) fn monotonic_ns() -> u64 {
    clock_ns(libc::CLOCK_MONOTONIC)
}

/// The same, of `CLOCK_MONOTONIC_RAW`, which goes at the rate of the machine's: nobody makes it faster to set it right.
pub(crate) fn raw_ns() -> u64 {
    clock_ns(libc::CLOCK_MONOTONIC_RAW)
}

fn clock_ns(clock: libc::clockid_t) -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call fills the structure it is given; these clocks always exist.
    unsafe { libc::clock_gettime(clock, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// One record, in place in the ring or copied when it wraps around.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RingRecord<'a> {
    pub(crate) kind: u32,
    pub(crate) misc: u16,
    pub(crate) body: &'a [u8],
}

/// An event and its mapped ring.
pub(crate) struct PerfRing {
    descriptor: OwnedFd,
    map: NonNull<u8>,
    page_bytes: usize,
    data_bytes: usize,
    scratch: Vec<u8>,
}

// SAFETY: the mapping belongs to this value alone and may be used from any one thread.
unsafe impl Send for PerfRing {}

/// Offsets of `data_head` and `data_tail` in `struct perf_event_mmap_page`.
const DATA_HEAD: usize = 1024;
const DATA_TAIL: usize = 1032;
/// Size of `struct perf_event_header`.
const RECORD_HEADER_BYTES: usize = 8;
/// Longest process event: `PERF_RECORD_MMAP2` with a path of `PATH_MAX` bytes, and what follows it.
const MAX_RECORD_BYTES: usize = 4096 + 128;

impl PerfRing {
    /// Opens an event and maps `pages` (a power of two) of ring.
    pub(crate) fn open(attr: &PerfEventAttr, scope: PerfScope, pages: usize) -> io::Result<Self> {
        let (pid, cpu) = match scope {
            PerfScope::Cpu(cpu) => (-1, cpu as i32),
            PerfScope::Thread(tid) => (tid as i32, -1),
        };
        // SAFETY: the attribute is valid for its size; the call returns a new descriptor or -1.
        let descriptor = unsafe {
            libc::syscall(
                libc::SYS_perf_event_open,
                std::ptr::from_ref(attr),
                pid,
                cpu,
                -1,
                PERF_FLAG_FD_CLOEXEC,
            )
        };
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just returned and has no other owner.
        let descriptor = unsafe { OwnedFd::from_raw_fd(descriptor as RawFd) };
        // SAFETY: no pointers are passed.
        let page_bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        let data_bytes = pages * page_bytes;
        // SAFETY: a new shared mapping of the event; checked below.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                page_bytes + data_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                descriptor.as_raw_fd(),
                0,
            )
        };
        if map == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let map = NonNull::new(map.cast()).ok_or_else(|| io::Error::other("mmap returned null"))?;
        Ok(Self { descriptor, map, page_bytes, data_bytes, scratch: Vec::new() })
    }

    /// Starts an event that was opened disabled.
    pub(crate) fn enable(&self) -> io::Result<()> {
        // SAFETY: the request takes no pointer.
        if unsafe { libc::ioctl(self.descriptor.as_raw_fd(), IOC_ENABLE, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// For how long an event of [`PerfEventAttr::sideband`] has been enabled, in nanoseconds; `None` if it is none any more.
    pub(crate) fn enabled_ns(&self) -> Option<u64> {
        let mut value_and_time = [0_u64; 2];
        let bytes = size_of_val(&value_and_time);
        // SAFETY: the array has room for as many bytes.
        let read =
            unsafe { libc::read(self.descriptor.as_raw_fd(), value_and_time.as_mut_ptr().cast(), bytes) };
        (read == bytes as isize).then_some(value_and_time[1])
    }

    /// For `poll(2)`.
    pub(crate) fn descriptor(&self) -> RawFd {
        self.descriptor.as_raw_fd()
    }

    fn position(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: the first mapped page holds these aligned 64-bit words for the life of the mapping.
        unsafe { &*self.map.as_ptr().add(offset).cast::<AtomicU64>() }
    }

    /// Hands all records to `sink` and gives their room back. Whether there was no room left for some record, so that the kernel
    /// may have lost others behind them; it says so itself, but not before it writes the next.
    pub(crate) fn drain(&mut self, mut sink: impl FnMut(RingRecord<'_>)) -> bool {
        let head = self.position(DATA_HEAD).load(Ordering::Acquire);
        let mut tail = self.position(DATA_TAIL).load(Ordering::Relaxed);
        let was_full = head.wrapping_sub(tail) as usize + MAX_RECORD_BYTES > self.data_bytes;
        let mut scratch = std::mem::take(&mut self.scratch);
        while tail < head {
            self.copy_out(tail, RECORD_HEADER_BYTES, &mut scratch);
            let kind = u32::from_ne_bytes(scratch[0..4].try_into().expect("4 bytes"));
            let misc = u16::from_ne_bytes(scratch[4..6].try_into().expect("2 bytes"));
            let size = usize::from(u16::from_ne_bytes(scratch[6..8].try_into().expect("2 bytes")));
            if size < RECORD_HEADER_BYTES {
                // Nothing the kernel writes; skip to the head rather than loop for ever.
                tail = head;
                break;
            }
            self.copy_out(tail, size, &mut scratch);
            sink(RingRecord { kind, misc, body: &scratch[RECORD_HEADER_BYTES..] });
            tail += size as u64;
        }
        self.scratch = scratch;
        self.position(DATA_TAIL).store(tail, Ordering::Release);
        was_full
    }

    /// Copies `size` bytes at stream position `at`, which may wrap around the ring's end.
    fn copy_out(&self, at: u64, size: usize, into: &mut Vec<u8>) {
        into.clear();
        let size = size.min(self.data_bytes);
        let start = at as usize & (self.data_bytes - 1);
        let first = size.min(self.data_bytes - start);
        // SAFETY: both parts lie in the data pages, which the kernel does not write between tail and head.
        unsafe {
            let data = self.map.as_ptr().add(self.page_bytes);
            into.extend_from_slice(std::slice::from_raw_parts(data.add(start), first));
            into.extend_from_slice(std::slice::from_raw_parts(data, size - first));
        }
    }
}

impl Drop for PerfRing {
    fn drop(&mut self) {
        // SAFETY: mapped in `open` with this length, and no reference to it is left.
        unsafe { libc::munmap(self.map.as_ptr().cast(), self.page_bytes + self.data_bytes) };
    }
}
