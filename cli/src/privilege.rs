//! What this process may not do, and how to be allowed to: the advice behind a refusal to sample.
//!
//! The kernel answers EPERM or EACCES for half a dozen different reasons; this reads the settings that
//! decide and names those that stand in the way.

use std::fs;
use std::path::Path;

use windlass_agent::kernel::SETCAP;

/// What decides whether the kernel lets a process sample.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Privilege {
    /// Effective capabilities, a bit each.
    capabilities: u64,
    /// `kernel.perf_event_paranoid`.
    perf_event_paranoid: Option<i64>,
    /// `kernel.yama.ptrace_scope`.
    ptrace_scope: Option<i64>,
    /// Type information of the running kernel is there.
    kernel_types: bool,
}

/// Bits of capabilities, from the kernel's `linux/capability.h`.
const CAP_SYS_PTRACE: u32 = 19;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;
/// Highest `kernel.perf_event_paranoid` at which a process may sample its own user-mode code.
const PARANOID_USER: i64 = 2;

impl Privilege {
    /// Of this process.
    pub(crate) fn current() -> Self {
        let number = |path: &str| fs::read_to_string(path).ok()?.trim().parse().ok();
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let capabilities = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        Self {
            capabilities: capabilities.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0),
            perf_event_paranoid: number("/proc/sys/kernel/perf_event_paranoid"),
            ptrace_scope: number("/proc/sys/kernel/yama/ptrace_scope"),
            kernel_types: Path::new("/sys/kernel/btf/vmlinux").exists(),
        }
    }

    fn has(&self, capability: u32) -> bool {
        self.capabilities & (1 << capability) != 0
    }

    /// Why the BPF program may have been refused, and what to do, one point a line.
    pub(crate) fn bpf_advice(&self) -> Vec<String> {
        let mut advice = Vec::new();
        let names = [(CAP_BPF, "CAP_BPF"), (CAP_PERFMON, "CAP_PERFMON"), (CAP_SYS_PTRACE, "CAP_SYS_PTRACE")];
        // CAP_SYS_ADMIN implies CAP_BPF and CAP_PERFMON, for compatibility.
        let implied = |bit| bit != CAP_SYS_PTRACE && self.has(CAP_SYS_ADMIN);
        let lacking = names.iter().filter(|(bit, _)| !self.has(*bit) && !implied(*bit));
        let lacking: Vec<_> = lacking.map(|(_, name)| *name).collect();
        if !lacking.is_empty() {
            let program =
                std::env::current_exe().map_or("windlass".into(), |path| path.display().to_string());
            advice.push(format!(
                "this process lacks {}: run as root (sudo), or once `sudo setcap {SETCAP} {program}`; \
                 in a container run with --cap-add and each of them",
                lacking.join(", ")
            ));
        }
        if !self.kernel_types {
            advice.push(
                "this kernel has no /sys/kernel/btf/vmlinux: it needs CONFIG_DEBUG_INFO_BTF, \
                 or /sys is not mounted in this container"
                    .to_owned(),
            );
        }
        if advice.is_empty() {
            advice.push(
                "this process has the capabilities; the container's seccomp profile, a security module or \
                 kernel lockdown may forbid bpf() and perf_event_open()"
                    .to_owned(),
            );
        }
        advice
    }

    /// Why even one process's stacks may not be copied, and what to do, one point a line.
    pub(crate) fn copied_stacks_advice(&self) -> Vec<String> {
        let mut advice = Vec::new();
        let privileged = self.has(CAP_PERFMON) || self.has(CAP_SYS_ADMIN);
        match self.perf_event_paranoid {
            Some(level) if level > PARANOID_USER && !privileged => advice.push(format!(
                "kernel.perf_event_paranoid is {level}: run `sudo sysctl kernel.perf_event_paranoid={PARANOID_USER}`, \
                 or run as root"
            )),
            None => advice.push("this kernel has no perf events (CONFIG_PERF_EVENTS), or hides /proc/sys".to_owned()),
            Some(_) => {}
        }
        if self.ptrace_scope.is_some_and(|scope| scope >= 2) && !self.has(CAP_SYS_PTRACE) {
            advice.push(
                "kernel.yama.ptrace_scope forbids reading another process: run `sudo sysctl \
                 kernel.yama.ptrace_scope=1`, or run as root"
                    .to_owned(),
            );
        }
        if advice.is_empty() {
            advice.push(
                "the container's seccomp profile or a security module may forbid perf_event_open(): \
                 run with --cap-add PERFMON or outside of the container"
                    .to_owned(),
            );
        }
        advice
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: Privilege = Privilege {
        capabilities: u64::MAX,
        perf_event_paranoid: Some(2),
        ptrace_scope: Some(1),
        kernel_types: true,
    };

    #[track_caller]
    fn check(advice: &[String], naming: &[&str], not: &[&str]) {
        let text = advice.join("\n");
        for word in naming {
            assert!(text.contains(word), "{word} not in: {text}");
        }
        for word in not {
            assert!(!text.contains(word), "{word} in: {text}");
        }
    }

    #[test]
    fn advice_names_what_stands_in_the_way() {
        let user = Privilege { capabilities: 0, ..ROOT };
        check(&user.bpf_advice(), &["CAP_BPF, CAP_PERFMON, CAP_SYS_PTRACE", "setcap", "root"], &["btf"]);
        check(&user.bpf_advice(), &["cap_dac_read_search", "cap_checkpoint_restore", "cap_syslog"], &[]);
        let admin = Privilege { capabilities: 1 << CAP_SYS_ADMIN | 1 << CAP_SYS_PTRACE, ..ROOT };
        check(&admin.bpf_advice(), &["seccomp"], &["setcap"]);
        check(
            &Privilege { kernel_types: false, ..ROOT }.bpf_advice(),
            &["CONFIG_DEBUG_INFO_BTF"],
            &["setcap"],
        );
        check(&ROOT.bpf_advice(), &["seccomp"], &["setcap"]);
        let paranoid = Privilege { perf_event_paranoid: Some(3), ..user };
        check(&paranoid.copied_stacks_advice(), &["perf_event_paranoid is 3", "=2"], &["ptrace"]);
        check(&user.copied_stacks_advice(), &["seccomp"], &["paranoid"]);
        check(&Privilege { ptrace_scope: Some(2), ..user }.copied_stacks_advice(), &["ptrace_scope"], &[]);
        check(&Privilege { perf_event_paranoid: Some(4), ..ROOT }.copied_stacks_advice(), &[], &["paranoid"]);
    }

    #[test]
    fn this_process_can_be_read() {
        let privilege = Privilege::current();
        assert!(!privilege.bpf_advice().is_empty());
        assert!(!privilege.copied_stacks_advice().is_empty());
    }
}
