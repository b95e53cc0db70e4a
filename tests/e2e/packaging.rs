//! What the packages give the agent, and what it takes for the agent to do all that it does.

use std::os::unix::fs::chown;
use std::path::PathBuf;
use std::process::Command;

use windlass_schema::http::ArtefactKind;
use windlass_tests::program::{checkout, program};
use windlass_tests::service::TestService;
use windlass_tests::skip::may_use_bpf;
use windlass_tests::workload::Workload;
use windlass_unwind_compiler::build_id_of;
use windlass_workload::ELF;

use crate::agent_process::{AgentProcess, may_drop_capabilities, total};

/// A user without a name or files.
const NOBODY: u32 = 65534;
const WHOLE_STACKS: &str = "windlass_agent_samples_total{reason=\"end_of_stack\"}";

/// `command` by way of a program that sets something and then runs it.
fn by(setter: PathBuf, arguments: &[&str], command: &Command) -> Command {
    let mut wrapped = Command::new(setter);
    wrapped.args(arguments).arg(command.get_program()).args(command.get_args()).env("RUST_LOG", "info");
    wrapped
}

async fn start_service() -> TestService {
    let service = TestService::start().await;
    let build_id = build_id_of(ELF).expect("the workload has a build-ID");
    service.put(build_id, ArtefactKind::Executable, ELF.to_vec()).await;
    service
}

/// The capabilities of the systemd unit, as `setpriv` takes a set that has no others.
fn capabilities_of_the_unit() -> String {
    let unit = checkout().join("packaging/systemd/windlass-agent.service");
    let unit = std::fs::read_to_string(unit).expect("the unit is there");
    let names = unit.lines().find_map(|line| line.strip_prefix("AmbientCapabilities="));
    let names = names.expect("a setting of the unit").split(' ');
    names.fold("-all".to_owned(), |set, name| {
        format!("{set},+{}", name.trim_start_matches("CAP_").to_lowercase())
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_unit_grants_suffices_for_processes_of_root() {
    const TEST: &str = "packaging::what_the_unit_grants_suffices_for_processes_of_root";
    let (true, Some(setpriv)) = (may_drop_capabilities(TEST), program(TEST, "setpriv")) else { return };
    let service = start_service().await;
    // In a folder that is root's alone.
    let _workload = Workload::start(service.folder());
    let cache = tempfile::tempdir().expect("temporary folder");
    chown(cache.path(), Some(NOBODY), Some(NOBODY)).expect("root may give folders away");
    let set = capabilities_of_the_unit();
    let nobody = NOBODY.to_string();
    let user = ["--reuid", &nobody, "--regid", &nobody, "--clear-groups", "--no-new-privs"];
    let sets = ["--bounding-set", &set, "--inh-caps", &set, "--ambient-caps", &set];
    let command = AgentProcess::command(&service.url(), cache.path());
    let mut agent = AgentProcess::start(&mut by(setpriv, &[&user[..], &sets].concat(), &command));
    agent.eventually("a whole stack", async |agent| total(&agent.metrics().await, WHOLE_STACKS) > 0).await;
    agent.eventually("it samples", async |agent| agent.log().contains(" sampling")).await;
    assert!(!agent.log().contains("without CAP_"), "{}", agent.log());
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pid_namespace_of_its_own_is_said_to_be_in_the_way() {
    const TEST: &str = "packaging::a_pid_namespace_of_its_own_is_said_to_be_in_the_way";
    let (true, Some(unshare)) = (may_use_bpf(TEST), program(TEST, "unshare")) else { return };
    let cache = tempfile::tempdir().expect("temporary folder");
    let command = AgentProcess::command("http://127.0.0.1:1", cache.path());
    let namespace = ["--pid", "--fork", "--kill-child", "--mount-proc"];
    let mut agent = AgentProcess::start(&mut by(unshare, &namespace, &command));
    let says = |log: &str| log.contains("--pid=host") && log.contains("hostPID");
    agent.eventually("the warning", async |agent| says(&agent.log())).await;
}
