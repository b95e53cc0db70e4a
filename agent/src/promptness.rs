//! How soon does the sampling thread run when a process event wakes it?
//!
//! What a process runs before the agent has told the program its mappings is not walked. On a busy processor a thread that wakes
//! waits until the one that runs has had its slice, some milliseconds: a tenth of what a short process lives. A thread of short
//! slices is preferred over one of longer ones and gets no more time for it, since each slice counts (the EEVDF scheduler,
//! Documentation/scheduler/sched-eevdf.rst). It takes no privilege, unlike a lower nice value.

use std::io;
use std::sync::Once;

/// Length of a slice in nanoseconds: the shortest that the kernel gives (`__setparam_fair` in kernel/sched/syscalls.c). To read
/// what woke it and to state a process's mappings takes half of it.
const SLICE_NS: u64 = 100_000;

/// `struct sched_attr` of its first version (include/uapi/linux/sched/types.h).
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct SchedulingAttributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime_ns: u64,
    deadline_ns: u64,
    period_ns: u64,
}

const ATTRIBUTES_BYTES: u32 = size_of::<SchedulingAttributes>() as u32;
const _: () = assert!(ATTRIBUTES_BYTES == 48, "SCHED_ATTR_SIZE_VER0");

/// Asks for short slices for the calling thread, and for threads that it starts from now on. Kernels before 6.12 take the length
/// and leave slices as they are.
pub(crate) fn ask() -> io::Result<()> {
    let attributes = SchedulingAttributes { runtime_ns: SLICE_NS, ..attributes()? };
    // SAFETY: the structure says its size.
    let answer = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Says, once, what it costs that `error` is the answer.
pub(crate) fn note_refused(error: &io::Error) {
    static SAID: Once = Once::new();
    SAID.call_once(|| {
        tracing::warn!(
            %error,
            "the agent may not ask for short time slices, so on busy processors it is slower to sample processes that live for \
             milliseconds: allow sched_getattr and sched_setattr in its seccomp filter (SystemCallFilter= of systemd)"
        );
    });
}

/// The attributes of the calling thread.
fn attributes() -> io::Result<SchedulingAttributes> {
    let mut attributes = SchedulingAttributes::default();
    // SAFETY: the call fills as many bytes as it is told.
    let answer =
        unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, ATTRIBUTES_BYTES, 0) };
    if answer == 0 { Ok(attributes) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_the_threads_own_and_nothing_else_changes() {
        let before = attributes().unwrap();
        let asked = std::thread::spawn(|| ask().and_then(|()| attributes())).join().unwrap().unwrap();
        let others =
            |attributes: SchedulingAttributes| (attributes.policy, attributes.nice, attributes.priority);
        assert_eq!(others(asked), others(before));
        // A kernel that does not know slices says 0, and so does one that has no say in them.
        assert!([0, SLICE_NS].contains(&asked.runtime_ns), "{asked:?}");
        assert_eq!(attributes().unwrap().runtime_ns, before.runtime_ns);
    }
}
