//! By how much is a process's `CLOCK_MONOTONIC` off the one of samples?
//!
//! A process in a time namespace reads that clock with an offset (time_namespaces(7)), as containers do that were restored
//! after a move from another host. Samples have the kernel's own, so times that a process wrote down mean nothing without
//! the offset:
//!
//! ```text
//! time of samples = time of the process - offset
//! ```
//! `/proc/PID/timens_offsets` has that of the namespace of the process's future children (`proc_timens_show_offsets`,
//! kernel/time/namespace.c), which is not the process's own until it runs another program.

use std::fs;
use std::io;

/// The offset of process `pid` in nanoseconds; `None` if it is not to be known.
pub(crate) fn monotonic_offset_ns(pid: u32) -> io::Result<Option<i64>> {
    let own = |name: &str| fs::read_link(format!("/proc/{pid}/ns/{name}"));
    let text = match fs::read_to_string(format!("/proc/{pid}/timens_offsets")) {
        Ok(text) => text,
        // Before Linux 5.6 there are no such namespaces.
        Err(_) if !fs::exists("/proc/self/timens_offsets")? => return Ok(Some(0)),
        Err(error) => return Err(error),
    };
    Ok(if own("time")? == own("time_for_children")? { offset_ns(&text) } else { None })
}

/// Reads `CLOCK SECONDS NANOSECONDS` of the monotonic clock, of which only the seconds may be negative.
fn offset_ns(text: &str) -> Option<i64> {
    let mut fields = text.lines().find_map(|line| line.strip_prefix("monotonic"))?.split_whitespace();
    let (seconds, nanoseconds): (i64, i64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    seconds.checked_mul(1_000_000_000)?.checked_add(nanoseconds)
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    #[test]
    fn offsets_as_the_kernel_writes_them() {
        for (text, expect) in [
            ("monotonic           0         0\nboottime            0         0\n", Some(0)),
            ("monotonic         -100  250000000\nboottime            7         0\n", Some(-99_750_000_000)),
            ("boottime 1 0\nmonotonic 1 1\n", Some(1_000_000_001)),
            ("boottime 1 0\n", None),
            ("monotonic 1\n", None),
            ("monotonic 9223372036854775807 0\n", None),
        ] {
            assert_eq!(offset_ns(text), expect, "{text}");
        }
        assert!(monotonic_offset_ns(std::process::id()).expect("this process").is_some());
        assert!(monotonic_offset_ns(u32::MAX).is_err());
    }

    struct Ended(Child);

    impl Drop for Ended {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_process_with_another_clock() {
        // The child of `unshare` is there when it has printed its number.
        let script = "echo $$; exec sleep 60";
        let started = Command::new("unshare")
            .args(["--time", "--monotonic=-100", "--fork", "--kill-child", "sh", "-c", script])
            .stdout(std::process::Stdio::piped())
            .spawn();
        let Ok(child) = started else { return eprintln!("skipped: no unshare") };
        let mut child = Ended(child);
        let mut line = String::new();
        let output = child.0.stdout.take().expect("it is piped");
        io::BufRead::read_line(&mut io::BufReader::new(output), &mut line).expect("a pipe");
        let Ok(pid) = line.trim().parse() else { return eprintln!("skipped: needs CAP_SYS_ADMIN") };
        assert_eq!(monotonic_offset_ns(pid).expect("it runs"), Some(-100_000_000_000));
        // That process is in its parent's, and only its children are not.
        assert_eq!(monotonic_offset_ns(child.0.id()).expect("it waits"), None);
    }
}
