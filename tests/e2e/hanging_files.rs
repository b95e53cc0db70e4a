//! File systems that do not answer, and the agent's other work beside what waits for them.

use std::collections::HashSet;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use windlass_tests::held_memory::HeldMemory;
use windlass_tests::service::TestService;
use windlass_tests::silent_files::SilentFiles;
use windlass_tests::skip::{may_use_bpf, skip};
use windlass_tests::stacks::{Stack, stacks};
use windlass_tests::workload::Workload;

use super::agent_process::{AgentProcess, PATIENCE, total};

/// Processes that run the program of the file system: more than the agent has threads to read files.
const VICTIMS: usize = 16;
/// Processes whose memory is held: more than the agent has threads to read mappings, and more than it has to read environments.
const HELD: usize = 16;

/// A process that is killed when it is dropped.
struct Victim(Child);

impl Victim {
    fn start(files: &SilentFiles) -> Self {
        let mut command = Command::new(files.program());
        Self(command.arg("600").stdout(Stdio::null()).spawn().expect("the program runs"))
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A file system with one program; if none can be mounted, `test` is skipped.
fn mount(test: &str, service: &TestService, program: &str) -> Option<SilentFiles> {
    let mount = service.folder().join("mount");
    std::fs::create_dir(&mount).expect("a folder");
    match SilentFiles::mount(&mount, program.as_ref()) {
        Ok(files) => Some(files),
        Err(error) => {
            skip(test, &format!("no file system can be mounted: {error}"));
            None
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_system_that_hangs_holds_up_nothing_else() {
    const TEST: &str = "hanging_files::a_file_system_that_hangs_holds_up_nothing_else";
    if !may_use_bpf(TEST) {
        return;
    }
    let service = TestService::start().await;
    let Some(files) = mount(TEST, &service, "/bin/sleep") else { return };
    let mut agent =
        AgentProcess::start(&mut AgentProcess::command(&service.url(), &service.folder().join("cache")));
    files.leave_unanswered(agent.pid());
    let victims: Vec<Victim> = (0..VICTIMS).map(|_| Victim::start(&files)).collect();
    agent
        .eventually("a reading hangs", async |agent| {
            let metrics = agent.metrics().await;
            total(&metrics, "windlass_agent_waiting_process_readings") > 0
                && total(&metrics, "windlass_agent_late_process_readings_total") > 0
        })
        .await;
    assert!(files.silences() > 0, "the agent asked");

    // One that starts now is read, gets its tables and is walked whole.
    let began = SystemTime::now();
    let workload = Workload::start(service.folder());
    let is_whole = |stack: &Stack| stack.pid == i64::from(workload.pid()) && stack.is_complete();
    agent
        .eventually("complete stacks", async |_| {
            let profile = service.try_profile_since(began).await;
            profile.is_some_and(|profile| stacks(&profile).iter().any(is_whole))
        })
        .await;
    let hanging = total(&agent.metrics().await, "windlass_agent_waiting_process_readings");
    assert!(hanging > 0, "while the others hang");

    agent.eventually("it says which", async |agent| agent.log().contains("mount/program")).await;

    end(agent).await;
    drop(victims);
    service.stop().await;
}

/// Has an agent end.
async fn end(mut agent: AgentProcess) {
    agent.terminate();
    let start = Instant::now();
    while agent.is_running() {
        assert!(start.elapsed() < PATIENCE, "it does not end:\n{}", agent.log());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// What is read out of a process's memory, its environment among it, is not to be had while others hold that.
#[tokio::test(flavor = "multi_thread")]
async fn a_process_whose_memory_is_held_holds_up_no_other() {
    const TEST: &str = "hanging_files::a_process_whose_memory_is_held_holds_up_no_other";
    if !may_use_bpf(TEST) {
        return;
    }
    let service = TestService::start().await;
    let Some(files) = mount(TEST, &service, "/bin/sleep") else { return };
    let held = HeldMemory::start(&files).expect("a child, and its memory");
    let environment = format!("/proc/{}/environ", held.pid());
    let reader = std::thread::spawn(move || std::fs::read(environment));
    let began = SystemTime::now();
    let mut agent =
        AgentProcess::start(&mut AgentProcess::command(&service.url(), &service.folder().join("cache")));
    // Its samples come, though nobody can tell what it was told.
    agent
        .eventually("samples of it", async |_| {
            let profile = service.try_profile_since(began).await;
            let is_its = |stack: &Stack| stack.pid == i64::from(held.pid());
            profile.is_some_and(|profile| stacks(&profile).iter().any(is_its))
        })
        .await;

    // From one that starts now all comes, what it was told too.
    let told = "service.instance.id=till-3";
    let workload = Workload::start_by(service.folder(), |command| {
        command.env("OTEL_RESOURCE_ATTRIBUTES", told);
    });
    let is_whole = |stack: &Stack| stack.pid == i64::from(workload.pid()) && stack.is_complete();
    agent
        .eventually("complete stacks", async |_| {
            let profile = service.try_profile_of("till-3", began).await;
            profile.is_some_and(|profile| stacks(&profile).iter().any(is_whole))
        })
        .await;
    assert!(!reader.is_finished(), "while its memory is held");
    end(agent).await;
    drop((held, files));
    let _ = reader.join();
    service.stop().await;
}

/// Nor do many of them, each of which would keep a thread that reads what is mapped, and one that reads environments.
#[tokio::test(flavor = "multi_thread")]
async fn more_processes_whose_memory_is_held_than_threads_hold_up_no_other() {
    const TEST: &str = "hanging_files::more_processes_whose_memory_is_held_than_threads_hold_up_no_other";
    if !may_use_bpf(TEST) {
        return;
    }
    let service = TestService::start().await;
    // One that has as many pages.
    let Some(files) = mount(TEST, &service, "/bin/sh") else { return };
    let held: Vec<HeldMemory> =
        (0..HELD).map(|_| HeldMemory::start(&files).expect("a child, and its memory")).collect();
    let environments: Vec<_> = held
        .iter()
        .map(|held| format!("/proc/{}/environ", held.pid()))
        .map(|environment| std::thread::spawn(move || std::fs::read(environment)))
        .collect();
    let began = SystemTime::now();
    let mut agent =
        AgentProcess::start(&mut AgentProcess::command(&service.url(), &service.folder().join("cache")));
    // A process is asked for its environment when a sample of it comes.
    let mut asked = HashSet::new();
    agent
        .eventually("samples of all of them", async |_| {
            let profile = service.try_profile_since(began).await;
            asked.extend(profile.iter().flat_map(stacks).map(|stack| stack.pid));
            held.iter().all(|held| asked.contains(&i64::from(held.pid())))
        })
        .await;
    let metrics = agent.metrics().await;
    assert!(total(&metrics, "windlass_agent_waiting_process_readings") > 0, "some wait for their memory");
    assert!(total(&metrics, "windlass_agent_put_off_process_readings_total") > 0, "the others do not");

    // From one that starts now all comes, what it was told too.
    let began = SystemTime::now();
    let workload = Workload::start_by(service.folder(), |command| {
        command.env("OTEL_RESOURCE_ATTRIBUTES", "service.instance.id=till-4");
    });
    let is_whole = |stack: &Stack| stack.pid == i64::from(workload.pid()) && stack.is_complete();
    agent
        .eventually("complete stacks", async |_| {
            let profile = service.try_profile_of("till-4", began).await;
            profile.is_some_and(|profile| stacks(&profile).iter().any(is_whole))
        })
        .await;
    assert!(environments.iter().all(|reader| !reader.is_finished()), "while their memory is held");
    end(agent).await;
    drop((held, files));
    environments.into_iter().for_each(|reader| drop(reader.join()));
    service.stop().await;
}
