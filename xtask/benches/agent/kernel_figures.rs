//! What the kernel says of a program and of a process: time, memory.

use std::time::Duration;

use anyhow::{Context as _, Result};
use aya::programs::loaded_programs;

/// Makes the kernel take the time of BPF programs (`kernel.bpf_stats_enabled`, Documentation/admin-guide/sysctl/kernel.rst).
const STATS: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// Times of BPF programs are taken; dropping it puts back what was there.
pub(crate) struct BpfStats {
    before: String,
}

impl BpfStats {
    pub(crate) fn enable() -> Result<Self> {
        let before = std::fs::read_to_string(STATS).with_context(|| format!("read {STATS}"))?;
        std::fs::write(STATS, "1").with_context(|| format!("write {STATS}"))?;
        Ok(Self { before })
    }
}

impl Drop for BpfStats {
    fn drop(&mut self) {
        // Nothing better could be done.
        let _ = std::fs::write(STATS, &self.before);
    }
}

/// Time and runs of the program of this name that a process holds, since it was loaded. Another agent's may run beside it.
pub(crate) fn program_time(pid: u32, name: &str) -> Result<(Duration, u64)> {
    let held = held_programs(pid)?;
    let program = loaded_programs()
        // One that goes away meanwhile is an error of its own.
        .filter_map(Result::ok)
        .find(|program| held.contains(&program.id()) && program.name_as_str() == Some(name))
        .with_context(|| format!("process {pid} holds no program {name}"))?;
    Ok((program.run_time(), program.run_count()))
}

/// What the kernel charges for the BPF maps that a process holds, in bytes (`bpf_map_show_fdinfo`, kernel/bpf/syscall.c).
pub(crate) fn maps_memory(pid: u32) -> Result<u64> {
    let mut maps = std::collections::HashMap::new();
    for descriptor in std::fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        let Ok(text) = std::fs::read_to_string(descriptor?.path()) else { continue };
        let number = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim().parse::<u64>().ok()
        };
        if let (Some(id), Some(bytes)) = (number("map_id:"), number("memlock:")) {
            maps.insert(id, bytes);
        }
    }
    Ok(maps.values().sum())
}

/// What a process has handed to write calls, to files and sockets, in bytes (`wchar`, proc_pid_io(5)).
pub(crate) fn written_bytes(pid: u32) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/io"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("wchar:")).context("io without wchar")?;
    Ok(line.trim().parse()?)
}

/// Identifiers of the programs to which a process holds descriptors (`bpf_prog_show_fdinfo`, kernel/bpf/syscall.c).
fn held_programs(pid: u32) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    for descriptor in std::fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        // A descriptor may be closed meanwhile.
        let Ok(text) = std::fs::read_to_string(descriptor?.path()) else { continue };
        ids.extend(text.lines().find_map(|line| line.strip_prefix("prog_id:")?.trim().parse::<u32>().ok()));
    }
    Ok(ids)
}

/// User and system time of a process, of threads that have ended too, by its CPU-time clock: `utime` and `stime` of
/// `/proc/PID/stat` are in hundredths of a second, of which a small agent uses two or three.
pub(crate) fn process_time(pid: u32) -> Result<Duration> {
    let (mut clock, mut time) = (0, libc::timespec { tv_sec: 0, tv_nsec: 0 });
    // SAFETY: both calls fill what they are given.
    let failed = unsafe {
        libc::clock_getcpuclockid(pid as libc::pid_t, &raw mut clock) != 0
            || libc::clock_gettime(clock, &raw mut time) != 0
    };
    anyhow::ensure!(!failed, "process {pid} has no CPU-time clock");
    Ok(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
}

/// `VmRSS` of a process in bytes, and the highest it was.
pub(crate) fn process_memory(pid: u32) -> Result<(u64, u64)> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    let (now, peak) = kib("VmRSS:").zip(kib("VmHWM:")).context("status without memory")?;
    Ok((now * 1024, peak * 1024))
}
