//! A live profile of the bundled workload, from its ELF file to named stacks, through either backend.

use std::time::{Duration, Instant, SystemTime};

use gimli::{BaseAddresses, EhFrame, LittleEndian, RegisterRule, UnwindContext, UnwindSection as _, X86_64};
use object::{Object as _, ObjectSection as _};
use windlass_agent::kernel::Turns;
use windlass_agent::{Agent, BackendChoice, Config};
use windlass_schema::StopReason;
use windlass_schema::http::ArtefactKind;
use windlass_tests::service::TestService;
use windlass_tests::stacks::{Frame, Stack, stacks, total};
use windlass_tests::workload::Workload;
use windlass_unwind_compiler::build_id_of;
use windlass_workload::{ELF, EXPECTED};

use crate::agent_process::total as sum;

/// Samples a second: enough for the rarest expected stack to be seen many times.
const FREQUENCY_HZ: u32 = 199;
/// How often the agent sends what it has. A batch that reaches into the time asked for counts in full.
const SHIP_INTERVAL: Duration = Duration::from_secs(1);
/// How long the agent samples, at least. The first part goes to tables, which the service compiles meanwhile.
const WARM_UP: Duration = Duration::from_secs(4);
const SAMPLED: Duration = Duration::from_secs(6);
/// Longest wait for tables, and for samples, on a machine with much else to do: a third of the workload's time.
const PATIENCE: Duration = Duration::from_secs(40);
/// Fewest samples of the measured time for the shares below to mean something.
const MIN_SAMPLES: i64 = 200;
/// Samples after which the measured time may end: some of those counted are of the time before.
const ENOUGH_SAMPLES: u64 = 2 * MIN_SAMPLES as u64;
/// Fewest samples that show that no table is missing any more.
const SETTLED_SAMPLES: u64 = 20;
/// How walks end while the agent learns of a process.
const LEARNING: [StopReason; 3] =
    [StopReason::TablePending, StopReason::ProcessUnknown, StopReason::MappingsChanged];
/// Fewest samples of each expected stack. Each gets a twentieth of the time at least when all threads get
/// the same, which other tests at the same time may prevent.
const MIN_SAMPLES_EACH: i64 = 5;
/// Smallest share of the workload's walks that reach the end of the stack, once tables are there.
const MIN_COMPLETE: f64 = 0.95;
/// Functions that have no caller: a program's first, and a thread's (glibc's names).
const OUTERMOST: &[&str] = &["_start", "clone3", "__clone3", "clone", "__clone"];
/// Most stacks, and most frames of each, that a failure's message shows.
const PRINTED_STACKS: usize = 12;
const PRINTED_FRAMES: usize = 12;

/// The workload's stacks, sampled while it runs and named by the service.
pub(crate) async fn profile_workload(backend: impl FnOnce(u32) -> BackendChoice) -> Vec<Stack> {
    profile_workload_by(Turns::default(), backend).await
}

/// The same, by walks that make their turns in a certain way.
pub(crate) async fn profile_workload_by(
    turns: Turns,
    backend: impl FnOnce(u32) -> BackendChoice,
) -> Vec<Stack> {
    let service = TestService::start().await;
    let build_id = build_id_of(ELF).expect("the workload has a build-ID");
    service.put(build_id, ArtefactKind::Executable, ELF.to_vec()).await;

    let mut workload = Workload::start(service.folder());
    let stacks = profile_process_by(turns, &service, workload.pid(), backend(workload.pid())).await;
    assert!(workload.is_running(), "the workload ended by itself");
    service.stop().await;
    stacks
}

/// The stacks of a process, sampled while it runs and named by the service.
pub(crate) async fn profile_process(service: &TestService, pid: u32, backend: BackendChoice) -> Vec<Stack> {
    profile_process_by(Turns::default(), service, pid, backend).await
}

async fn profile_process_by(
    turns: Turns,
    service: &TestService,
    pid: u32,
    backend: BackendChoice,
) -> Vec<Stack> {
    let mut config = Config::new(service.url(), service.folder().join("tables"));
    config.frequency_hz = FREQUENCY_HZ;
    config.ship_interval = SHIP_INTERVAL;
    config.only_pid = Some(pid);
    config.backend = backend;
    config.turns = turns;
    config.listen = Some(([127, 0, 0, 1], 0).into());
    let agent = tokio::task::spawn_blocking(move || Agent::start(config))
        .await
        .expect("the agent's start does not panic")
        .expect("the agent starts");
    let numbers = Numbers::of(service, &agent);
    tokio::time::sleep(WARM_UP).await;
    numbers.settle().await;
    let from = SystemTime::now() + SHIP_INTERVAL;
    let (start, before) = (Instant::now(), numbers.samples().await);
    tokio::time::sleep(SHIP_INTERVAL + SAMPLED).await;
    while numbers.samples().await - before < ENOUGH_SAMPLES && start.elapsed() < PATIENCE {
        tokio::time::sleep(SHIP_INTERVAL).await;
    }
    let summary = tokio::task::spawn_blocking(move || agent.stop())
        .await
        .expect("the agent's end does not panic")
        .expect("the agent ends");
    let profile = service.profile_since(from).await;
    let stacks: Vec<_> = stacks(&profile).into_iter().filter(|stack| stack.pid == i64::from(pid)).collect();
    assert!(total(&stacks) >= MIN_SAMPLES, "{} samples of the process; {summary:?}", total(&stacks));
    stacks
}

/// The agent's own numbers.
struct Numbers {
    client: reqwest::Client,
    url: String,
}

impl Numbers {
    fn of(service: &TestService, agent: &Agent) -> Self {
        let address = agent.status_address().expect("it listens");
        Self { client: service.client.clone(), url: format!("http://{address}/metrics") }
    }

    async fn text(&self) -> String {
        self.client.get(&self.url).send().await.expect("it answers").text().await.expect("text")
    }

    async fn samples(&self) -> u64 {
        sum(&self.text().await, "windlass_agent_samples_total{")
    }

    /// Waits until walks end for no reason that passes.
    async fn settle(&self) {
        let start = Instant::now();
        let counts = |text: &str| {
            let of = |reason: StopReason| {
                format!("windlass_agent_samples_total{{reason=\"{}\"}}", reason.as_str())
            };
            let learning = LEARNING.into_iter().map(|reason| sum(text, &of(reason)));
            (sum(text, "windlass_agent_samples_total{"), learning.sum::<u64>())
        };
        let mut before = counts(&self.text().await);
        while start.elapsed() < PATIENCE {
            tokio::time::sleep(SHIP_INTERVAL).await;
            let now = counts(&self.text().await);
            if now.0 - before.0 >= SETTLED_SAMPLES && now.1 == before.1 {
                break;
            }
            before = now;
        }
    }
}

/// Every stack that the workload is known to have was seen as often as it must be, with its inlined
/// functions and its file.
pub(crate) fn assert_expected(stacks: &[Stack]) {
    for expected in EXPECTED {
        let seen: Vec<_> =
            stacks.iter().filter_map(|stack| Some((stack, stack.frames_of(expected.functions)?))).collect();
        let samples = total(seen.iter().map(|(stack, _)| *stack));
        assert!(
            samples >= MIN_SAMPLES_EACH,
            "{}: {samples} samples have {:?}, among\n{}",
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
    assert_complete_but_for(1.0 - MIN_COMPLETE, stacks);
}

/// The same, where at most this share of the walks may end early.
pub(crate) fn assert_complete_but_for(share: f64, stacks: &[Stack]) {
    let (complete, cut): (Vec<Stack>, _) = stacks.iter().cloned().partition(Stack::is_complete);
    let complete = total(&complete) as f64 / total(stacks) as f64;
    assert!(complete >= 1.0 - share, "{:.1} % complete; not complete:\n{}", 100.0 * complete, print(&cut));
    assert_rightly_complete(stacks);
}

/// No walk claims to have reached the end of the stack that did not.
pub(crate) fn assert_rightly_complete(stacks: &[Stack]) {
    let complete = stacks.iter().filter(|stack| stack.is_complete());
    let wrong: Vec<_> = complete.filter(|stack| !ends_where_stacks_end(stack)).cloned().collect();
    assert!(wrong.is_empty(), "complete, and yet they end elsewhere:\n{}", print(&wrong));
}

/// Whether the outermost frame has no caller: by its name, or, in a libc whose names are not
/// known here, because gimli finds its return address undefined.
fn ends_where_stacks_end(stack: &Stack) -> bool {
    let outermost = stack.frames.last().expect("a complete stack has frames");
    OUTERMOST.contains(&outermost.function.as_str()) || return_address_is_undefined(outermost)
}

fn return_address_is_undefined(frame: &Frame) -> bool {
    let Ok(elf) = std::fs::read(&frame.image) else { return false };
    let Ok(elf) = object::File::parse(&elf[..]) else { return false };
    let Some(section) = elf.section_by_name(".eh_frame") else { return false };
    let eh_frame = EhFrame::new(section.data().expect("section data"), LittleEndian);
    let text = elf.section_by_name(".text").map_or(0, |text| text.address());
    let bases = BaseAddresses::default().set_eh_frame(section.address()).set_text(text);
    let mut context = UnwindContext::new();
    let row = eh_frame.unwind_info_for_address(&bases, &mut context, frame.address, EhFrame::cie_from_offset);
    row.is_ok_and(|row| row.register(X86_64::RA) == Some(RegisterRule::Undefined))
}

/// Stacks as text, the most frequent first, for a failure's message.
fn print(stacks: &[Stack]) -> String {
    let mut stacks: Vec<_> = stacks.iter().collect();
    stacks.sort_by_key(|stack| std::cmp::Reverse(stack.count));
    let line = |stack: &&Stack| {
        let mut names: Vec<_> = stack.frames.iter().map(|frame| frame.function.as_str()).collect();
        if names.len() > PRINTED_FRAMES {
            names.splice(PRINTED_FRAMES / 2..names.len() - PRINTED_FRAMES / 2, ["..."]);
        }
        let reason = stack.stop.map_or("no reason", StopReason::as_str);
        format!("{:6} {reason}: {}\n", stack.count, names.join(" < "))
    };
    stacks.iter().take(PRINTED_STACKS).map(line).collect()
}
