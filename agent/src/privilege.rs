//! What may this process not do, and how would it be allowed to?
//!
//! The kernel answers EPERM or EACCES for half a dozen different reasons; this reads the settings that
//! decide and names those that stand in the way: as advice behind a refusal to sample, and as a warning of
//! what will be missing where only a part is allowed.

use std::fs;
use std::path::Path;

/// What a file needs for everything that the agent does, as `setcap` takes it; the [`CAPABILITIES`].
pub const SETCAP: &str =
    "cap_bpf,cap_perfmon,cap_sys_ptrace,cap_dac_read_search,cap_checkpoint_restore,cap_syslog+ep";

/// A capability that the agent uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Its name.
    pub name: &'static str,
    /// Its bit (include/uapi/linux/capability.h).
    bit: u32,
    /// Whether CAP_SYS_ADMIN will do, for compatibility (`bpf_capable`, `perfmon_capable` and
    /// `checkpoint_restore_ns_capable` in include/linux/capability.h).
    by_admin: bool,
    /// What is missing without it; `None` if there is no sampling at all.
    without: Option<&'static str>,
}

/// The capabilities that the agent uses.
pub const CAPABILITIES: [Capability; 6] = [
    Capability { name: "CAP_BPF", bit: 39, by_admin: true, without: None },
    Capability { name: "CAP_PERFMON", bit: 38, by_admin: true, without: None },
    Capability {
        name: "CAP_SYS_PTRACE",
        bit: 19,
        by_admin: false,
        without: Some("stacks are walked only of processes of the same user that have no more capabilities"),
    },
    Capability {
        name: "CAP_DAC_READ_SEARCH",
        bit: 2,
        by_admin: false,
        without: Some(
            "stacks end in files that not everyone may read, and in folders that not everyone may enter",
        ),
    },
    Capability {
        name: "CAP_CHECKPOINT_RESTORE",
        bit: 40,
        by_admin: true,
        without: Some("stacks end in files that were deleted or replaced while they run"),
    },
    Capability {
        name: "CAP_SYSLOG",
        bit: 34,
        by_admin: false,
        without: Some("kernel functions may have no names (kernel.kptr_restrict)"),
    },
];

/// What decides whether the kernel lets a process sample.
#[derive(Clone, Debug)]
pub struct Privilege {
    /// Effective capabilities, a bit each.
    effective: u64,
    /// Those that it can ever have.
    bounding: u64,
    /// Whether its user namespace is the first; capabilities in others do not count for BPF.
    first_user_namespace: bool,
    /// Whether its PID namespace is the first: samples say whose they are by the numbers that processes have there.
    first_pid_namespace: bool,
    /// Whether a seccomp filter is on it.
    seccomp: bool,
    /// `/sys/kernel/security/lockdown`.
    lockdown: String,
    /// `kernel.perf_event_paranoid`.
    perf_event_paranoid: Option<i64>,
    /// `kernel.yama.ptrace_scope`.
    ptrace_scope: Option<i64>,
    /// Type information of the running kernel is there.
    kernel_types: bool,
}

const CAP_SYS_PTRACE: u32 = 19;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_PERFMON: u32 = 38;
/// Highest `kernel.perf_event_paranoid` at which a process may sample its own user-mode code.
const PARANOID_USER: i64 = 2;
/// Users that the first user namespace maps: all (user_namespaces(7)).
const ALL_USERS: &str = "4294967295";
/// The first PID namespace (`PROC_PID_INIT_INO` in include/linux/proc_ns.h).
const FIRST_PID_NAMESPACE: &str = "pid:[4026531836]";

impl Privilege {
    /// Of this process.
    pub fn current() -> Self {
        let number = |path: &str| fs::read_to_string(path).ok()?.trim().parse().ok();
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let field = |name: &str| status.lines().find_map(|line| Some(line.strip_prefix(name)?.trim()));
        let capabilities =
            |name: &str| field(name).and_then(|hex| u64::from_str_radix(hex, 16).ok()).unwrap_or_default();
        let users = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
        Self {
            effective: capabilities("CapEff:"),
            bounding: capabilities("CapBnd:"),
            first_user_namespace: users.split_ascii_whitespace().eq(["0", "0", ALL_USERS]),
            first_pid_namespace: fs::read_link("/proc/self/ns/pid")
                .map_or(true, |namespace| namespace.as_os_str() == FIRST_PID_NAMESPACE),
            seccomp: field("Seccomp:").is_some_and(|mode| mode != "0"),
            lockdown: fs::read_to_string("/sys/kernel/security/lockdown").unwrap_or_default(),
            perf_event_paranoid: number("/proc/sys/kernel/perf_event_paranoid"),
            ptrace_scope: number("/proc/sys/kernel/yama/ptrace_scope"),
            kernel_types: Path::new("/sys/kernel/btf/vmlinux").exists(),
        }
    }

    fn has(&self, capability: u32) -> bool {
        self.effective & (1 << capability) != 0
    }

    fn lacks(&self, capability: &Capability) -> bool {
        !(self.has(capability.bit) || capability.by_admin && self.has(CAP_SYS_ADMIN))
    }

    /// What will be missing for want of capabilities or in a namespace, one point a line.
    pub fn limits(&self) -> Vec<String> {
        let limit =
            |capability: &Capability| Some(format!("without {}, {}", capability.name, capability.without?));
        let namespace = (!self.first_pid_namespace).then(|| {
            "in a PID namespace of its own, it takes no process for the one that a sample is of, and \
             shows no stacks but the kernel's: run the container with --pid=host (hostPID: true in Kubernetes)"
                .to_owned()
        });
        let lacking = CAPABILITIES.iter().filter(|capability| self.lacks(capability));
        namespace.into_iter().chain(lacking.filter_map(limit)).collect()
    }

    /// Why the BPF program may have been refused, and what to do, one point a line.
    pub fn bpf_advice(&self) -> Vec<String> {
        let mut advice = Vec::new();
        let needed = CAPABILITIES.iter().filter(|capability| capability.without.is_none());
        let lacking: Vec<_> = needed.filter(|capability| self.lacks(capability)).collect();
        if !lacking.is_empty() {
            let names: Vec<_> = lacking.iter().map(|capability| capability.name).collect();
            let names = names.join(" and ");
            let is_bounded = lacking.iter().any(|capability| self.bounding & (1 << capability.bit) == 0);
            advice.push(if is_bounded {
                format!(
                    "this process lacks {names} and cannot get it: let the container (--cap-add, \
                     securityContext.capabilities.add) or the unit (CapabilityBoundingSet) have it"
                )
            } else {
                let program =
                    std::env::current_exe().map_or("FILE".into(), |path| path.display().to_string());
                format!(
                    "this process lacks {names}: run as root (sudo), or once `sudo setcap {SETCAP} {program}`; \
                     in a container run with --cap-add and each of them"
                )
            });
        }
        if !self.first_user_namespace {
            advice.push(
                "this process is in a user namespace, where capabilities do not count for BPF: run it outside, \
                 or the container without user namespaces"
                    .to_owned(),
            );
        }
        // The choice in force is in brackets (security/lockdown/lockdown.c).
        if self.lockdown.contains("[confidentiality]") {
            advice.push(
                "the kernel is locked down for confidentiality, and BPF may not read its memory: boot it with \
                 lockdown=integrity or none"
                    .to_owned(),
            );
        }
        if !self.kernel_types {
            advice.push(
                "this kernel has no /sys/kernel/btf/vmlinux: it needs CONFIG_DEBUG_INFO_BTF, \
                 or /sys is not mounted in this container"
                    .to_owned(),
            );
        }
        if advice.is_empty() {
            let filter =
                if self.seccomp { "the seccomp filter on it" } else { "a container's seccomp profile" };
            advice.push(format!(
                "this process has the capabilities; {filter}, a security module or kernel lockdown may forbid \
                 bpf() and perf_event_open()"
            ));
        }
        advice
    }

    /// Why even one process's stacks may not be copied, and what to do, one point a line.
    pub fn copied_stacks_advice(&self) -> Vec<String> {
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

    fn root() -> Privilege {
        Privilege {
            effective: u64::MAX,
            bounding: u64::MAX,
            first_user_namespace: true,
            first_pid_namespace: true,
            seccomp: false,
            lockdown: "[none] integrity confidentiality".to_owned(),
            perf_event_paranoid: Some(2),
            ptrace_scope: Some(1),
            kernel_types: true,
        }
    }

    fn user() -> Privilege {
        Privilege { effective: 0, ..root() }
    }

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
        check(&user().bpf_advice(), &["CAP_BPF and CAP_PERFMON", "setcap", "root"], &["btf", "seccomp"]);
        check(&user().bpf_advice(), &["cap_dac_read_search", "cap_checkpoint_restore", "cap_syslog"], &[]);
        let admin = Privilege { effective: 1 << CAP_SYS_ADMIN, ..root() };
        check(&admin.bpf_advice(), &["seccomp profile"], &["setcap"]);
        let one = Privilege { effective: 1 << CAP_PERFMON, ..root() };
        check(&one.bpf_advice(), &["lacks CAP_BPF:"], &["CAP_PERFMON"]);
        let bounded = Privilege { bounding: 0, ..one };
        check(&bounded.bpf_advice(), &["lacks CAP_BPF and cannot", "CapabilityBoundingSet"], &["setcap"]);
        check(
            &Privilege { kernel_types: false, ..root() }.bpf_advice(),
            &["CONFIG_DEBUG_INFO_BTF"],
            &["setcap"],
        );
        check(
            &Privilege { first_user_namespace: false, ..root() }.bpf_advice(),
            &["user namespace"],
            &["lacks"],
        );
        let locked = "none integrity [confidentiality]".to_owned();
        check(&Privilege { lockdown: locked, ..root() }.bpf_advice(), &["lockdown=integrity"], &["lacks"]);
        check(
            &Privilege { seccomp: true, ..root() }.bpf_advice(),
            &["the seccomp filter on it"],
            &["setcap"],
        );
        let paranoid = Privilege { perf_event_paranoid: Some(3), ..user() };
        check(&paranoid.copied_stacks_advice(), &["perf_event_paranoid is 3", "=2"], &["ptrace"]);
        check(&user().copied_stacks_advice(), &["seccomp"], &["paranoid"]);
        check(&Privilege { ptrace_scope: Some(2), ..user() }.copied_stacks_advice(), &["ptrace_scope"], &[]);
        check(
            &Privilege { perf_event_paranoid: Some(4), ..root() }.copied_stacks_advice(),
            &[],
            &["paranoid"],
        );
    }

    #[test]
    fn limits_name_what_is_missing_and_why() {
        assert!(root().limits().is_empty());
        let two = Privilege { effective: 1 << 38 | 1 << 39, ..root() };
        assert_eq!(two.limits().len(), CAPABILITIES.len() - 2);
        check(&two.limits(), &["CAP_SYS_PTRACE", "CAP_SYSLOG"], &["CAP_BPF", "CAP_PERFMON"]);
        let admin = Privilege { effective: 1 << CAP_SYS_ADMIN, ..root() };
        check(&admin.limits(), &["CAP_SYS_PTRACE"], &["CAP_CHECKPOINT_RESTORE"]);
        check(
            &Privilege { first_pid_namespace: false, ..root() }.limits(),
            &["--pid=host", "hostPID"],
            &["CAP_"],
        );
    }

    #[test]
    fn setcap_grants_every_capability() {
        let names: Vec<_> = CAPABILITIES.iter().map(|capability| capability.name.to_lowercase()).collect();
        assert_eq!(SETCAP, format!("{}+ep", names.join(",")));
    }

    #[test]
    fn this_process_can_be_read() {
        let privilege = Privilege::current();
        assert!(!privilege.bpf_advice().is_empty());
        assert!(!privilege.copied_stacks_advice().is_empty());
    }
}
