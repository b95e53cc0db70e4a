//! A machine for one kernel: QEMU without KVM, with a console and nothing else.
//!
//! The virtual machines that CI runs in rarely offer KVM, so instructions are translated (TCG), ten to twenty times
//! slower than the processor's own: what a guest says of times compares with other guests only.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::guest::Guest;
use crate::checkout::command;

/// Longest time for all but the sampling: twice what the slowest kernel took on a busy machine of two cores, rounded up.
const MARGIN: Duration = Duration::from_secs(240);
/// Between two looks at whether it has ended.
const POLL: Duration = Duration::from_millis(200);
/// Memory in MiB: 200 are in use at the end.
const MEMORY_MIB: &str = "1024";
/// Two processors, so that maps for each of them and walks at the same time are tried.
const PROCESSORS: &str = "2";

/// Boots `kernel`, lets it sample for `seconds` by walks that make their turns as `turns` says, and returns what it wrote on its console; that is all there is to
/// read also of one that was ended because it took too long.
pub(super) fn run(
    guest: &Guest,
    kernel: &Path,
    initramfs: &Path,
    seconds: u32,
    turns: &str,
) -> Result<String> {
    let console = tempfile::NamedTempFile::new()?;
    // Both streams write behind what is there, whoever writes first.
    let written = File::options().append(true).open(console.path())?;
    // A panic reboots at once, which `-no-reboot` turns into an end.
    let words =
        format!("console={} quiet loglevel=1 panic=-1 rdinit=/init -- {seconds} {turns}", guest.console);
    let mut child = command(guest.emulator)
        .args(guest.machine)
        .args(["-accel", "tcg,thread=multi", "-smp", PROCESSORS, "-m", MEMORY_MIB])
        .args(["-nographic", "-no-reboot", "-nic", "none", "-append", &words])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initramfs)
        .stdin(Stdio::null())
        .stdout(written.try_clone()?)
        .stderr(written)
        .spawn()
        .with_context(|| format!("start {}", guest.emulator))?;
    let ended = wait(&mut child, Duration::from_secs(seconds.into()) + MARGIN);
    if !matches!(ended, Ok(true)) {
        child.kill().context("end QEMU")?;
        child.wait()?;
    }
    ended?;
    let bytes = std::fs::read(console.path())?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Whether it ended by itself within `limit`.
fn wait(child: &mut Child, limit: Duration) -> Result<bool> {
    let start = Instant::now();
    while start.elapsed() < limit {
        if child.try_wait()?.is_some() {
            return Ok(true);
        }
        thread::sleep(POLL);
    }
    Ok(false)
}
