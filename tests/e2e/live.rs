//! A live profile of the bundled workload, from its ELF file to named stacks, through either backend.

use std::time::{Duration, SystemTime};

use windlass_agent::{Agent, BackendChoice, Config};
use windlass_schema::StopReason;
use windlass_schema::http::ArtefactKind;
use windlass_tests::service::TestService;
use windlass_tests::stacks::{Stack, stacks, total};
use windlass_tests::workload::Workload;
use windlass_unwind_compiler::build_id_of;
use windlass_workload::{ELF, EXPECTED, LEAST_SHARE_PERCENT};

/// Samples a second: enough for the rarest expected stack to be seen many times.
const FREQUENCY_HZ: u32 = 199;
/// How long the agent samples. The first part goes to tables, which the service compiles meanwhile.
const WARM_UP: Duration = Duration::from_secs(4);
const SAMPLED: Duration = Duration::from_secs(6);
/// Fewest samples of the measured time for the shares below to mean something.
const MIN_SAMPLES: i64 = 200;
/// Smallest share of the workload's walks that reach the end of the stack, once tables are there.
const MIN_COMPLETE: f64 = 0.95;
/// Functions that have no caller: a program's first, and a thread's (glibc's names).
const OUTERMOST: &[&str] = &["_start", "clone3", "__clone3", "clone", "__clone"];

/// The workload's stacks, sampled while it runs and named by the service.
pub(crate) async fn profile_workload(backend: impl FnOnce(u32) -> BackendChoice) -> Vec<Stack> {
    let service = TestService::start().await;
    let build_id = build_id_of(ELF).expect("the workload has a build-ID");
    service.put(build_id, ArtefactKind::Executable, ELF.to_vec()).await;

    let mut workload = Workload::start(service.folder());
    let mut config = Config::new(service.url(), service.folder().join("tables"));
    config.frequency_hz = FREQUENCY_HZ;
    config.only_pid = Some(workload.pid());
    config.backend = backend(workload.pid());
    let agent = tokio::task::spawn_blocking(move || Agent::start(config))
        .await
        .expect("the agent's start does not panic")
        .expect("the agent starts");
    tokio::time::sleep(WARM_UP).await;
    let from = SystemTime::now();
    tokio::time::sleep(SAMPLED).await;
    let summary = tokio::task::spawn_blocking(move || agent.stop())
        .await
        .expect("the agent's end does not panic")
        .expect("the agent ends");
    assert!(workload.is_running(), "the workload ended by itself");

    let profile = service.profile_since(from).await;
    let pid = i64::from(workload.pid());
    let stacks: Vec<_> = stacks(&profile).into_iter().filter(|stack| stack.pid == pid).collect();
    assert!(total(&stacks) >= MIN_SAMPLES, "{} samples of the workload; {summary:?}", total(&stacks));
    service.stop().await;
    stacks
}

/// Every stack that the workload is known to have was seen as often as it must be, with its inlined
/// functions and its file.
pub(crate) fn assert_expected(stacks: &[Stack]) {
    let all = total(stacks);
    for expected in EXPECTED {
        let seen: Vec<_> =
            stacks.iter().filter_map(|stack| Some((stack, stack.frames_of(expected.functions)?))).collect();
        let percent = 100 * total(seen.iter().map(|(stack, _)| *stack)) / all;
        assert!(
            percent >= LEAST_SHARE_PERCENT as i64,
            "{}: {percent} % of samples have {:?}, among\n{}",
            expected.name,
            expected.functions,
            print(stacks)
        );
        for (_, frames) in seen {
            for (frame, name) in frames.iter().zip(expected.functions) {
                assert_eq!(frame.inlined, expected.inlined.contains(name), "{}: {frame:?}", expected.name);
                assert!(frame.line > 0, "{}: {frame:?}", expected.name);
            }
            let file = frames[0].file.rsplit('/').next();
            assert_eq!(file, Some(expected.file), "{}: {:?}", expected.name, frames[0]);
        }
    }
}

/// Nearly all walks reached the end of the stack, and none claims so that did not.
pub(crate) fn assert_complete(stacks: &[Stack]) {
    let complete: Vec<_> = stacks.iter().filter(|stack| stack.is_complete()).collect();
    let share = total(complete.iter().copied()) as f64 / total(stacks) as f64;
    assert!(share >= MIN_COMPLETE, "{:.1} % complete among\n{}", 100.0 * share, print(stacks));
    for stack in complete {
        let outermost = stack.frames.last().expect("a complete stack has frames");
        assert!(
            OUTERMOST.contains(&outermost.function.as_str()),
            "complete, and yet it ends in {:?}:\n{}",
            outermost.function,
            print(std::slice::from_ref(stack))
        );
    }
}

/// Stacks as text, for a failure's message.
fn print(stacks: &[Stack]) -> String {
    let reason = |stack: &Stack| stack.stop.map_or("no reason", StopReason::as_str);
    let names = |stack: &Stack| {
        let names: Vec<_> = stack.frames.iter().map(|frame| frame.function.as_str()).collect();
        names.join(" < ")
    };
    stacks.iter().map(|stack| format!("{:6} {} {}\n", stack.count, reason(stack), names(stack))).collect()
}
