//! What does the agent itself take?
//!
//! Whoever runs it on every host asks that first. It is told under the names that Prometheus's client libraries give
//! to any process, so that what watches the others watches this one too.

use std::fs;
use std::time::Duration;

/// What this process has taken until now. What cannot be read is left out.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct OwnCost {
    /// In user mode and in the kernel; without the samples, which interrupt others.
    pub(crate) cpu: Option<Duration>,
    /// Bytes of memory, its code included.
    pub(crate) resident_bytes: Option<u64>,
    /// Open descriptors.
    pub(crate) descriptors: Option<u64>,
}

impl OwnCost {
    pub(crate) fn read() -> Self {
        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        // SAFETY: sysconf takes no pointers.
        let (ticks, page) = unsafe { (libc::sysconf(libc::_SC_CLK_TCK), libc::sysconf(libc::_SC_PAGESIZE)) };
        let mut cost = Self::parse(&stat, ticks.try_into().unwrap_or(0), page.try_into().unwrap_or(0));
        // One is that of the folder that is read.
        let entries = fs::read_dir("/proc/self/fd").ok();
        cost.descriptors = entries.map(|entries| (entries.count() as u64).saturating_sub(1));
        cost
    }

    /// Reads `/proc/PID/stat` (proc_pid_stat(5)). The command, in parentheses, may hold anything.
    fn parse(stat: &str, ticks_a_second: u64, page_bytes: u64) -> Self {
        let behind_command = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
        let fields: Vec<&str> = behind_command.split_ascii_whitespace().collect();
        // By their numbers there, of which the third is the first behind the command.
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        let ticks = field(14).zip(field(15)).and_then(|(user, system)| user.checked_add(system));
        let cpu = ticks.zip((ticks_a_second != 0).then_some(ticks_a_second));
        Self {
            cpu: cpu.map(|(ticks, a_second)| Duration::from_secs_f64(ticks as f64 / a_second as f64)),
            resident_bytes: field(24).and_then(|pages| pages.checked_mul(page_bytes)),
            descriptors: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_counted_behind_the_command() {
        let stat = "7 (a) b 9) S 1 7 7 0 -1 4194560 100 0 0 0 250 75 3 4 20 0 8 0 500 9000000 1234 0 0";
        let cost = OwnCost::parse(stat, 100, 4096);
        assert_eq!(cost.cpu, Some(Duration::from_millis(3250)));
        assert_eq!(cost.resident_bytes, Some(1234 * 4096));
        for odd in ["", "7 (a", "7 (a) S 1 2", "7 (a) S 1 7 7 0 -1 4194560 100 0 0 0 x 75"] {
            assert_eq!(OwnCost::parse(odd, 100, 4096), OwnCost::default(), "{odd}");
        }
        assert_eq!(OwnCost::parse(stat, 0, 4096).cpu, None);
    }

    #[test]
    fn this_process_has_a_cost() {
        let cost = OwnCost::read();
        assert!(cost.resident_bytes.is_some_and(|bytes| bytes > 1 << 20), "{cost:?}");
        assert!(cost.cpu.is_some() && cost.descriptors.is_some_and(|count| count >= 2), "{cost:?}");
    }
}
