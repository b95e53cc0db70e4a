//! What cannot run here, said aloud.
//!
//! A test that returns early counts as passed, and nobody learns that it never ran. So every early
//! return goes through [`skip`], which writes past the test harness's capture to standard error and
//! into the file that the suite reads, and which fails where nothing may be skipped.

use std::fs::OpenOptions;
use std::io::Write as _;

/// Names the file in which `cargo xtask test` collects what was skipped.
const SKIPPED_FILE: &str = "WINDLASS_SKIPPED";
/// The bits of `CAP_SYS_ADMIN`, `CAP_PERFMON` and `CAP_BPF` in a capability set
/// (include/uapi/linux/capability.h).
const SYS_ADMIN: u64 = 1 << 21;
const PERFMON_AND_BPF: u64 = 1 << 38 | 1 << 39;

/// Notes that `test` cannot run here and why.
///
/// # Panics
/// When the environment says `CI=true`.
#[track_caller]
pub fn skip(test: &str, reason: &str) {
    assert!(
        !std::env::var("CI").is_ok_and(|ci| ci == "true" || ci == "1"),
        "skipped in CI: {test}: {reason}"
    );
    // Not `eprintln!`, which the test harness captures.
    let _ = writeln!(std::io::stderr(), "skipped: {test}: {reason}");
    if let Some(file) = std::env::var_os(SKIPPED_FILE)
        && let Ok(mut file) = OpenOptions::new().create(true).append(true).open(file)
    {
        let _ = writeln!(file, "{test}: {reason}");
    }
}

/// Highest `kernel.perf_event_paranoid` at which a user samples processes of their own.
const PARANOID_OWN_PROCESSES: i32 = 2;

/// Whether this process may load BPF programs and sample all CPUs.
pub fn bpf_is_permitted() -> bool {
    let capabilities = capabilities();
    capabilities & SYS_ADMIN != 0 || capabilities & PERFMON_AND_BPF == PERFMON_AND_BPF
}

/// Whether this process may load BPF programs and sample all CPUs; if not, `test` is skipped.
#[track_caller]
pub fn may_use_bpf(test: &str) -> bool {
    let may = bpf_is_permitted();
    if !may {
        skip(test, "loading BPF programs needs root, or CAP_BPF and CAP_PERFMON");
    }
    may
}

/// Whether this process may sample its children; if not, `test` is skipped.
#[track_caller]
pub fn may_sample_own_processes(test: &str) -> bool {
    let paranoid = std::fs::read_to_string("/proc/sys/kernel/perf_event_paranoid").unwrap_or_default();
    let paranoid: i32 = paranoid.trim().parse().unwrap_or(i32::MAX);
    let may = capabilities() & SYS_ADMIN != 0 || paranoid <= PARANOID_OWN_PROCESSES;
    if !may {
        skip(test, &format!("kernel.perf_event_paranoid is {paranoid}, above {PARANOID_OWN_PROCESSES}"));
    }
    may
}

/// This process's effective capabilities.
fn capabilities() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or_default()
}
