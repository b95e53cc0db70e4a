//! Live walks of many programs at once: the table in [`table`].
//!
//! An unwinder that is tried on the programs at hand is right about the programs at hand. Each row here is a program
//! that does one thing which walks are known to fail at, with every stack that it can have. One agent samples all of
//! them while they run together; then no complete stack may be another than those, no walk may end without its reason,
//! what ends early must be what the row says ends early, and no step of a walk that is audited may disagree with CFI.

mod audited;
mod calls;
mod chain;
mod launch;
mod page;
mod report;
mod room;
mod row;
mod table;

use std::time::{Duration, Instant, SystemTime};

use tokio::sync::Mutex;
use windlass_agent::audit::AuditReport;
use windlass_agent::{Agent, Config};
use windlass_schema::StopReason;
use windlass_schema::http::ArtefactKind;
use windlass_tests::service::TestService;
use windlass_tests::skip::may_use_bpf;
use windlass_tests::stacks::{Stack, stacks};
use windlass_unwind_compiler::build_id_of;

use launch::Running;
use report::{Report, is_enough};

/// Samples a second: enough for programs that share two processors to be seen often.
const FREQUENCY_HZ: u32 = 499;
/// How often the agent sends what it has. A batch that reaches into the time asked for counts in full.
const SHIP_INTERVAL: Duration = Duration::from_secs(1);
/// Shortest recording. It goes on until every program has been seen often enough.
const RECORDED: Duration = Duration::from_secs(8);
/// Names some of the rows, separated by commas, to run those alone.
const ONLY_ROWS: &str = "WINDLASS_SUITE_ROWS";
/// Longest wait for tables, and for samples of a program that gets little time.
const PATIENCE: Duration = Duration::from_secs(60);
/// Each test keeps all processors busy.
static ALONE: Mutex<()> = Mutex::const_new(());

/// The samples of a program: of its process, or of one that has its name.
fn samples_of(running: &Running, stacks: &[Stack]) -> Vec<Stack> {
    let is_its = |stack: &&Stack| stack.pid == running.pid() || stack.thread == running.comm;
    stacks.iter().filter(is_its).cloned().map(without_kernel).collect()
}

/// A stack without the kernel's frames.
fn without_kernel(mut stack: Stack) -> Stack {
    stack.frames.retain(|frame| frame.image != "[kernel.kallsyms]");
    stack
}

/// Whether the agent knows the program: a walk did not end for want of what is on its way, and no table still is.
fn is_known(stacks: &[Stack]) -> bool {
    let is_pending = |stack: &Stack| stack.stop == Some(StopReason::TablePending);
    let knows = |stack: &Stack| !is_pending(stack) && stack.stop != Some(StopReason::ProcessUnknown);
    stacks.iter().any(knows) && !stacks.iter().any(is_pending)
}

/// How the programs are to be sampled.
fn config(service: &TestService) -> Config {
    let mut config = Config::new(service.url(), service.folder().join("tables"));
    config.frequency_hz = FREQUENCY_HZ;
    config.ship_interval = SHIP_INTERVAL;
    config.only_pid = Some(std::process::id());
    let test = std::env::current_exe().expect("a test has a path");
    config.choice.exclude = vec![format!("command={}", test.display()).parse().expect("a rule")];
    config
}

/// Samples the programs until each was seen often enough, and audits some of the walks.
async fn record(service: &TestService, programs: &[Running]) -> (Vec<Stack>, AuditReport) {
    let config = Config { audit: Some(audited::EVERY), ..config(service) };
    let agent = tokio::task::spawn_blocking(move || Agent::start(config))
        .await
        .expect("the agent's start does not panic")
        .expect("the agent starts");
    let start = Instant::now();
    loop {
        tokio::time::sleep(SHIP_INTERVAL).await;
        let seen = stacks(&service.profile_since(SystemTime::now() - 3 * SHIP_INTERVAL).await);
        let all_known = programs.iter().all(|program| is_known(&samples_of(program, &seen)));
        if all_known || start.elapsed() > PATIENCE {
            break;
        }
    }
    let (start, from) = (Instant::now(), SystemTime::now() + SHIP_INTERVAL);
    loop {
        tokio::time::sleep(2 * SHIP_INTERVAL).await;
        let seen = stacks(&service.profile_since(from).await);
        let enough = programs.iter().all(|program| is_enough(program, &samples_of(program, &seen)));
        if enough && start.elapsed() > RECORDED || start.elapsed() > PATIENCE {
            break;
        }
    }
    let summary = tokio::task::spawn_blocking(move || agent.stop())
        .await
        .expect("the agent's end does not panic")
        .expect("the agent ends");
    (stacks(&service.profile_since(from).await), summary.audit.expect("audits are on"))
}

/// Gives the service what was built.
async fn publish(service: &TestService, programs: &[Running]) {
    for image in programs.iter().flat_map(|program| &program.images) {
        let build_id = build_id_of(image).expect("programs are built with a build-ID");
        service.put(build_id, ArtefactKind::Executable, image.clone()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_row_of_the_table() {
    let _alone = ALONE.lock().await;
    let test = "suite::every_row_of_the_table";
    if !may_use_bpf(test) {
        return;
    }
    let service = TestService::start().await;
    let only = std::env::var(ONLY_ROWS).unwrap_or_default();
    let chosen = |row: &&row::Row| only.is_empty() || only.split(',').any(|name| name == row.name);
    let rows = table::rows().filter(chosen);
    let mut programs: Vec<Running> =
        rows.filter_map(|row| launch::start(test, row, service.folder())).collect();
    publish(&service, &programs).await;
    let (stacks, audit) = record(&service, &programs).await;
    let mut report = Report::default();
    for program in &mut programs {
        if !program.is_running() {
            report.ended_by_itself(program);
        }
        report.add(program, &samples_of(program, &stacks));
    }
    report.conclude(audited::conclude(&audit, only.is_empty()), only.is_empty());
    service.stop().await;
}
