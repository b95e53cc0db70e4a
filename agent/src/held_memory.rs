//! Does a process's memory look held?
//!
//! Whoever reads `maps` or `environ` takes the process's `mmap_lock`, and no system call takes it without waiting for it. But when it is
//! not to be had for long, that can be seen without it. The lock is fair (`rwsem`: Documentation/locking), so readers
//! wait only if somebody writes or waits to write, which is one of the process's own threads:
//!
//! ```text
//! mmap asks a file server (nfs_file_mmap in fs/nfs/file.c)     holds it for writing, and sleeps
//! another process reads, and waits for a page with the lock    mmap, munmap, brk ... waits to write, and sleeps
//! ```
//!
//! Either thread sleeps uninterruptibly (state `D`) in a system call that changes what is mapped, and `/proc` shows both.
//! So does one for a moment that waits for another thread's mmap: what looks held may be free when it is looked at again. And
//! what others hold without the process (`process_madvise`, uprobes, khugepaged) does not look so; they ask no file system.

use crate::process::threads;

/// Most threads of a process that are looked at: some 10 microseconds each.
const MAX_LOOKED_AT: usize = 1000;
/// System calls that take the lock for writing.
const CHANGE_MAPPINGS: [libc::c_long; 17] = [
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_pkey_mprotect,
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mlock,
    libc::SYS_mlock2,
    libc::SYS_munlock,
    libc::SYS_mlockall,
    libc::SYS_munlockall,
    libc::SYS_shmat,
    libc::SYS_shmdt,
    libc::SYS_io_setup,
    // Of a process.
    libc::SYS_clone,
    libc::SYS_clone3,
];

/// Whether the memory of process `pid` may be held.
pub(crate) fn looks_held(pid: u32) -> bool {
    let mut threads = threads(pid).take(MAX_LOOKED_AT);
    threads.any(|(tid, state)| {
        let system_call = || std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall"));
        // Who may not see what it waits for knows no more than that it waits.
        state == b'D' && system_call().map_or(true, |shown| changes_mappings(&shown))
    })
}

/// Whether a thread is in such a system call, by what `/proc/PID/task/TID/syscall` shows of it (proc_pid_syscall(5)): the number first, -1
/// in a page fault; `running` if it does not sleep.
fn changes_mappings(shown: &str) -> bool {
    let number = shown.split_whitespace().next().and_then(|number| number.parse().ok());
    number.is_some_and(|number| CHANGE_MAPPINGS.contains(&number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_in_another_system_call_holds_nothing() {
        let shown =
            |number: libc::c_long| format!("{number} 0x0 0x1000 0x1 0x22 0xffffffffffffffff 0x0 0x7f 0x7f\n");
        assert!(changes_mappings(&shown(libc::SYS_mmap)));
        assert!(changes_mappings(&shown(libc::SYS_brk)));
        assert!(!changes_mappings(&shown(libc::SYS_pread64)));
        assert!(!changes_mappings("-1 0x7ffd 0x7f\n"));
        assert!(!changes_mappings("running\n"));
        assert!(!changes_mappings(""));
    }

    #[test]
    fn a_process_that_sleeps_does_not_look_held() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep starts");
        // Until its exec is done it may wait for a disk.
        while looks_held(child.id()) {
            std::thread::yield_now();
        }
        child.kill().expect("it runs");
        child.wait().expect("it ends");
        assert!(!looks_held(child.id()), "it is gone");
    }
}
