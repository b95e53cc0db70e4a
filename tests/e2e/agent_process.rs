//! The agent as a process of its own: with few capabilities, without, and killed.

use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use windlass_agent::spool::Spool;
use windlass_agent::table_cache::TableCache;
use windlass_schema::BuildId;
use windlass_schema::http::ArtefactKind;
use windlass_tests::program::windlass;
use windlass_tests::service::TestService;
use windlass_tests::skip::{may_use_bpf, skip};
use windlass_tests::workload::Workload;
use windlass_unwind_compiler::build_id_of;
use windlass_workload::ELF;

/// Bits of capabilities (include/uapi/linux/capability.h).
const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;
/// Longest wait for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);
/// `BPF_PROG_GET_NEXT_ID` of bpf(2).
const PROG_GET_NEXT_ID: libc::c_long = 11;
const FREQUENCY_HZ: &str = "199";

/// A running agent; dropping it kills it.
pub(crate) struct AgentProcess {
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
}

impl Drop for AgentProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Leaves `command` no capabilities but `kept`, even as root.
fn keep_capabilities(command: &mut Command, kept: &'static [u32]) {
    let bound = move || {
        for capability in 0..64 {
            // SAFETY: prctl with integers alone; it fails for capabilities that the kernel does not know.
            if !kept.contains(&capability) && unsafe { libc::prctl(libc::PR_CAPBSET_READ, capability) } == 1 {
                // SAFETY: as above.
                let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability) };
                if dropped != 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec only prctl is called, which is safe there.
    unsafe { command.pre_exec(bound) };
}

impl AgentProcess {
    pub(crate) fn command(url: &str, cache_dir: &Path) -> Command {
        let mut command = windlass("windlass-agent");
        command.args(["--server", url, "--frequency", FREQUENCY_HZ, "--listen", "127.0.0.1:0"]);
        command.args(["--ship-interval", "1", "--cache-dir"]).arg(cache_dir);
        command.env("RUST_LOG", "info").env_remove("WINDLASS_TOKEN_FILE");
        command
    }

    pub(crate) fn start(command: &mut Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().expect("the agent starts");
        let log = Arc::new(Mutex::new(Vec::new()));
        let lines = BufReader::new(child.stderr.take().expect("a piped stderr")).lines();
        std::thread::spawn({
            let log = log.clone();
            move || lines.map_while(Result::ok).for_each(|line| log.lock().expect("no panic").push(line))
        });
        Self { child, log }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Asks it to end.
    pub(crate) fn terminate(&self) {
        // SAFETY: the call takes numbers alone, and the child is not waited for yet.
        unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) };
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("a child can be waited for").is_none()
    }

    pub(crate) fn log(&self) -> String {
        self.log.lock().expect("no panic").join("\n")
    }

    pub(crate) async fn eventually(&mut self, what: &str, mut holds: impl AsyncFnMut(&Self) -> bool) {
        let start = Instant::now();
        while !holds(self).await {
            if start.elapsed() >= PATIENCE {
                let metrics = self.metrics().await;
                panic!("{what}: not within {PATIENCE:?}\n{}\n{metrics}", self.log());
            }
            let ended = self.child.try_wait().expect("a child can be waited for");
            assert_eq!(ended, None, "{what}: the agent ended\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The text of `/metrics`; nothing while the agent starts.
    pub(crate) async fn metrics(&self) -> String {
        let log = self.log();
        let Some(at) = log.find("http://127.0.0.1:") else { return String::new() };
        let url = log[at..].split(' ').next().unwrap_or_default();
        match reqwest::get(url).await {
            Ok(answer) => answer.text().await.unwrap_or_default(),
            Err(_) => String::new(),
        }
    }

    /// The IDs of the BPF programs that it holds (`bpf_prog_show_fdinfo` in kernel/bpf/syscall.c).
    fn programs(&self) -> Vec<u32> {
        let entries = std::fs::read_dir(format!("/proc/{}/fdinfo", self.child.id()));
        let infos = entries.into_iter().flatten().flatten();
        let text = infos.filter_map(|info| std::fs::read_to_string(info.path()).ok());
        let id = |text: String| {
            let line = text.lines().find_map(|line| line.strip_prefix("prog_id:"))?;
            line.trim().parse().ok()
        };
        text.filter_map(id).collect()
    }
}

/// The sum of the numbers in `/metrics` whose lines begin so.
pub(crate) fn total(metrics: &str, begin: &str) -> u64 {
    let lines = metrics.lines().filter(|line| line.starts_with(begin));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
}

/// Whether the kernel has a BPF program with this ID.
fn is_loaded(program: u32) -> bool {
    // start_id, next_id, open_flags.
    let mut attributes = [program - 1, 0, 0];
    // SAFETY: the kernel reads and writes these 12 bytes.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, PROG_GET_NEXT_ID, attributes.as_mut_ptr(), size_of_val(&attributes))
    };
    result == 0 && attributes[1] == program
}

/// Whether this process may take capabilities from its children; if not, `test` is skipped.
pub(crate) fn may_drop_capabilities(test: &str) -> bool {
    if !may_use_bpf(test) {
        return false;
    }
    let mut probe = Command::new("true");
    keep_capabilities(&mut probe, &[]);
    let may = probe.status().is_ok();
    if !may {
        skip(test, "dropping capabilities needs CAP_SETPCAP");
    }
    may
}

#[tokio::test(flavor = "multi_thread")]
async fn two_capabilities_suffice_to_sample() {
    if !may_drop_capabilities("agent_process::two_capabilities_suffice_to_sample") {
        return;
    }
    let service = TestService::start().await;
    let build_id = build_id_of(ELF).expect("the workload has a build-ID");
    service.put(build_id, ArtefactKind::Executable, ELF.to_vec()).await;
    // Of no more capabilities than the agent, so that it may look at it.
    let _workload = Workload::start_by(service.folder(), |command| keep_capabilities(command, &[]));
    let mut command = AgentProcess::command(&service.url(), &service.folder().join("cache"));
    keep_capabilities(&mut command, &[CAP_BPF, CAP_PERFMON]);
    let mut agent = AgentProcess::start(&mut command);
    let whole = "windlass_agent_samples_total{reason=\"end_of_stack\"}";
    agent.eventually("a whole stack", async |agent| total(&agent.metrics().await, whole) > 0).await;
    // The two numbers are counted one after the other.
    let each_has_its_reason = async |agent: &AgentProcess| {
        let metrics = agent.metrics().await;
        let stopped = total(&metrics, "windlass_agent_samples_total{reason=\"unsupported_rule\"}");
        total(&metrics, "windlass_agent_unsupported_rows_total{") == stopped
    };
    agent.eventually("unsupported rows have their reasons", each_has_its_reason).await;
    for missing in ["CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH", "CAP_CHECKPOINT_RESTORE", "CAP_SYSLOG"] {
        let warning = format!("without {missing}, ");
        agent.eventually(&warning, async |agent| agent.log().contains(&warning)).await;
    }
    service.stop().await;
}

#[test]
fn a_missing_capability_is_named() {
    if !may_drop_capabilities("agent_process::a_missing_capability_is_named") {
        return;
    }
    let cache = tempfile::tempdir().expect("temporary folder");
    let cases: [(&'static [u32], &str); 3] = [
        (&[], "lacks CAP_BPF and CAP_PERFMON "),
        (&[CAP_BPF], "lacks CAP_PERFMON "),
        (&[CAP_PERFMON], "lacks CAP_BPF "),
    ];
    for (kept, expect) in cases {
        let mut command = AgentProcess::command("http://127.0.0.1:1", cache.path());
        keep_capabilities(&mut command, kept);
        let output = command.output().expect("the agent starts");
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert_eq!(text.matches("windlass-agent: ").count(), 1, "{text}");
        assert!(text.contains("not permitted") && text.contains(expect), "{expect} in {text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_agent_leaves_no_program_and_no_torn_file() {
    if !may_use_bpf("agent_process::a_killed_agent_leaves_no_program_and_no_torn_file") {
        return;
    }
    let service = TestService::start().await;
    let _workload = Workload::start(service.folder());
    for tables in 0..3 {
        let cache_dir = service.folder().join(format!("cache-{tables}"));
        let folder = cache_dir.join("tables");
        let mut agent = AgentProcess::start(&mut AgentProcess::command(&service.url(), &cache_dir));
        agent.eventually("the program is loaded", async |agent| !agent.programs().is_empty()).await;
        // Somewhere on its way to many tables.
        agent.eventually("tables come", async |_| cached(&folder).len() >= tables).await;
        let programs = agent.programs();
        assert!(programs.iter().all(|program| is_loaded(*program)));
        agent.child.kill().expect("the agent runs");
        agent.child.wait().expect("a child can be waited for");
        // The kernel frees a program after the last of its readers.
        let start = Instant::now();
        while programs.iter().any(|program| is_loaded(*program)) {
            assert!(start.elapsed() < PATIENCE, "{programs:?} stay loaded");
            std::thread::sleep(Duration::from_millis(5));
        }
        let ids = cached(&folder);
        assert!(ids.len() >= tables);
        let cache = TableCache::open(&folder, u64::MAX, Arc::default()).expect("the cache opens");
        for id in ids {
            assert!(cache.get(id).is_some(), "the table of {id} is torn");
        }
        let files = std::fs::read_dir(&folder).expect("the cache is there").flatten();
        let hidden = files.filter(|file| file.file_name().to_string_lossy().starts_with('.'));
        assert_eq!(hidden.count(), 0, "unfinished files stay");
        Spool::open(&cache_dir.join("spool"), u64::MAX).expect("its lock went with the agent");
    }
    service.stop().await;
}

/// The images whose tables are in a cache.
fn cached(folder: &Path) -> Vec<BuildId> {
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let tables = files.map(|file| file.path()).filter(|path| path.extension().is_some_and(|it| it == "wluw"));
    tables.filter_map(|path| path.file_stem()?.to_str()?.parse().ok()).collect()
}
