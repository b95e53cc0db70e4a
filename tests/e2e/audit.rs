//! Audits of the real program's walks: they agree, and they would not if a table were wrong.

use std::num::NonZeroU32;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use object::{Object as _, ObjectSymbol as _};
use windlass_agent::alarm::Alarm;
use windlass_agent::audit::{AuditReport, AuditedImage, Outcome};
use windlass_agent::backend::{Backend, Event, PlaceError, PlacedMapping};
use windlass_agent::kernel::{Kernel, Options};
use windlass_agent::{Agent, Config};
use windlass_schema::http::ArtefactKind;
use windlass_schema::maps::Location;
use windlass_schema::record::{MAX_RUN_BYTES, kind};
use windlass_schema::table::{HEADER_BYTES, checksum};
use windlass_schema::table_writer::TableEntry;
use windlass_schema::{BuildId, ImageAddress, Record, Table, TableFile};
use windlass_tests::program::program;
use windlass_tests::service::TestService;
use windlass_tests::skip::may_use_bpf;
use windlass_tests::workload::Workload;
use windlass_unwind_compiler::build_id_of;
use windlass_workload::{ELF, write_executable};

use crate::rule_walks;

/// Samples a second: high, so that the test is short.
const FREQUENCY_HZ: u32 = 199;
/// Every sample is audited.
const EVERY: NonZeroU32 = NonZeroU32::MIN;
/// Longest that a test waits for what it waits for. Tables take some seconds at first, and the programs share the
/// processors.
const PATIENCE: Duration = Duration::from_secs(240);
/// When programs end by themselves, should a test be killed before it ends them.
const SECONDS: u32 = 300;
/// How programs are started: one that works, and one with some forty threads that only run in a circle.
const BUSY: &str = "nice -n 10";
const SPINNING: &str = "nice -n 19";
/// Steps from frames of one image that are to agree before a test ends.
const MIN_STEPS: u64 = 200;
/// Smallest share of the steps that are compared, of those of walks that go on: in images of all programs but one, and in that
/// one, which has threads on three stacks at once. Two are captured.
const MIN_COMPARED: f64 = 0.99;
const MIN_COMPARED_OF_RULES: f64 = 0.9;
/// The part of a path that is that program's.
const RULES: &str = "/rules";
/// A function of the workload that calls others all the time.
const CALLER: &str = "run_frame_round";

/// A shell whose children run; dropping it ends them.
struct Running(Child);

impl Running {
    fn start(script: &str) -> Self {
        let mut command = Command::new("sh");
        command.args(["-c", script]).process_group(0);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self(command.spawn().expect("a shell starts"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // SAFETY: takes numbers. The group is this test's own as long as its leader has not been waited for.
        unsafe { libc::kill(-(self.0.id() as i32), libc::SIGKILL) };
        let _ = self.0.wait();
    }
}

/// Audits the process `pid` and its children until `done`, with the kernel behind `wrap`. What is found, and
/// what `/metrics` shows of it.
async fn audit(
    service: &TestService,
    pid: u32,
    wrap: impl FnOnce(Kernel) -> Box<dyn Backend>,
    done: impl Fn(&AuditReport) -> bool,
) -> (AuditReport, String) {
    let mut config = Config::new(service.url(), service.folder().join("agent"));
    config.frequency_hz = FREQUENCY_HZ;
    config.only_pid = Some(pid);
    config.audit = Some(EVERY);
    config.listen = Some(([127, 0, 0, 1], 0).into());
    let options = Options { frequency_hz: FREQUENCY_HZ, audit_every: config.audit, ..Options::default() };
    let backend = wrap(Kernel::load(&options).expect("the program loads"));
    let start = move || Agent::start_with_backend(config, backend);
    let agent = tokio::task::spawn_blocking(start).await.expect("no panic").expect("the agent starts");
    let report = agent.audit().expect("audits are on").clone();
    let deadline = Instant::now() + PATIENCE;
    while !done(&report.get()) && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let url = format!("http://{}/metrics", agent.status_address().expect("it listens"));
    let metrics = service.client.get(url).send().await.expect("it answers").text().await.expect("text");
    let stopped = tokio::task::spawn_blocking(move || agent.stop()).await.expect("no panic");
    (stopped.expect("the agent ends").audit.expect("audits are on"), metrics)
}

/// Steps from frames in images whose path has this in it.
fn steps_in(report: &AuditReport, path: &str, outcome: Outcome) -> u64 {
    let is_it = |image: &AuditedImage| image.path.contains(path);
    let found = report.images.iter().filter(|(image, _)| is_it(image));
    found.filter_map(|(_, outcomes)| outcomes.get(&outcome)).sum()
}

/// The share of steps compared, in images that are meant.
fn share_compared(report: &AuditReport, is_meant: impl Fn(&AuditedImage) -> bool) -> f64 {
    let (mut compared, mut steps) = (0, 0);
    for (_, outcomes) in report.images.iter().filter(|(image, _)| is_meant(image)) {
        for (outcome, count) in outcomes.iter().filter(|(outcome, _)| **outcome != Outcome::Stopped) {
            compared += if outcome.is_compared() { *count } else { 0 };
            steps += count;
        }
    }
    compared as f64 / steps as f64
}

/// Programs for a shell to run side by side, behind whoever makes tables and compares walks, and a part of the path of an image that each spends its time in.
fn programs(test: &str, folder: &Path) -> Vec<(String, &'static str)> {
    let mut programs = Vec::new();
    let workload = write_executable(folder).expect("write the workload");
    programs.push((format!("{BUSY} {} {SECONDS}", workload.display()), "windlass-workload"));
    if let Some((path, functions)) = rule_walks::build_for_every_rule(test, folder) {
        programs.push((
            format!("{SPINNING} timeout --foreground {SECONDS} {} {}", path.display(), functions.join(" ")),
            RULES,
        ));
    }
    if let Some(path) = program(test, "python3") {
        let code = format!(
            "import signal; signal.alarm({SECONDS}); f = lambda n: n if n < 2 else f(n - 1) + f(n - 2)\n\
             while 1: sorted(range(25), key=f)"
        );
        programs.push((format!("{BUSY} {} -c '{code}'", path.display()), "python3"));
    }
    if let Some(path) = program(test, "perl") {
        let code = format!(
            "alarm {SECONDS}; sub f {{ my $n = shift; $n < 2 ? $n : f($n - 1) + f($n - 2) }} f(20) while 1"
        );
        programs.push((format!("{BUSY} {} -e '{code}'", path.display()), "perl"));
    }
    if let Some(path) = program(test, "openssl") {
        programs.push((format!("{BUSY} {} speed -seconds {SECONDS} rsa2048", path.display()), "libcrypto"));
    }
    programs
}

#[tokio::test(flavor = "multi_thread")]
async fn walks_agree_with_the_cfi_of_their_images() {
    let test = "audit::walks_agree_with_the_cfi_of_their_images";
    if !may_use_bpf(test) {
        return;
    }
    let service = TestService::start().await;
    let programs = programs(test, service.folder());
    let commands: Vec<_> = programs.iter().map(|(command, _)| format!("{command} &")).collect();
    let running = Running::start(&format!("{}\nwait", commands.join("\n")));
    let lacking = |report: &AuditReport| {
        let agreed = |path| steps_in(report, path, Outcome::Agrees);
        let lacks = |(_, path): &&(String, &'static str)| agreed(path) < MIN_STEPS;
        programs.iter().filter(lacks).map(|(_, path)| *path).collect::<Vec<_>>()
    };
    let done = |report: &AuditReport| lacking(report).is_empty();
    let (report, _) = audit(&service, running.0.id(), |kernel| Box::new(kernel), done).await;
    assert_eq!(lacking(&report), [""; 0], "{report:#?}");
    assert_eq!((report.steps(Outcome::Disagrees), report.disagreeing), (0, 0), "{report:#?}");
    let is_of_rules = |image: &AuditedImage| image.path.contains(RULES);
    assert!(share_compared(&report, |image| !is_of_rules(image)) >= MIN_COMPARED, "{report:#?}");
    // Not a number where that program was not built.
    let of_rules = share_compared(&report, is_of_rules);
    assert!(of_rules.is_nan() || of_rules >= MIN_COMPARED_OF_RULES, "{report:#?}");
    assert!(report.complete_compared > 0 && report.complete_compared <= report.complete_steps, "{report:#?}");
    service.stop().await;
}

/// The kernel, but one image's table is changed on its way there.
struct WithWrongTable {
    kernel: Kernel,
    wrong: TableFile,
}

impl Backend for WithWrongTable {
    fn place_table(&mut self, table: &Table<'_>) -> Result<Location, PlaceError> {
        let wrong = self.wrong.table();
        self.kernel.place_table(if table.build_id() == wrong.build_id() { &wrong } else { table })
    }

    fn to_remove(&self, table: &Table<'_>, candidates: &[Location]) -> Option<usize> {
        self.kernel.to_remove(table, candidates)
    }

    fn remove_tables(&mut self, tables: &[Location]) -> Result<(), PlaceError> {
        self.kernel.remove_tables(tables)
    }

    fn set_process(&mut self, tgid: u32, mappings: &[PlacedMapping]) -> anyhow::Result<u32> {
        self.kernel.set_process(tgid, mappings)
    }

    fn remove_process(&mut self, tgid: u32) {
        self.kernel.remove_process(tgid);
    }

    fn poll(&mut self, timeout: Duration, sink: &mut dyn FnMut(Event)) -> anyhow::Result<()> {
        self.kernel.poll(timeout, sink)
    }

    fn heed(&mut self, alarm: &Alarm) {
        self.kernel.heed(alarm);
    }

    fn lost_samples(&self) -> u64 {
        self.kernel.lost_samples()
    }

    fn lost_audits(&self) -> u64 {
        self.kernel.lost_audits()
    }
}

/// The same with a CFA that is eight bytes off.
fn off_by_a_word(record: Record) -> Record {
    let wrong = match record.kind() {
        // The offset is in the upper half.
        kind::SP => Record(record.0 + (8 << 32)),
        // The base is byte 1, in words.
        kind::PUSH_RUN => Record(record.0 + (1 << 8)),
        kind => panic!("the body of {CALLER} has a record of kind {kind}"),
    };
    // Whatever the state of the run that holds in the body.
    assert_eq!(wrong.at(MAX_RUN_BYTES).offset(), record.at(MAX_RUN_BYTES).offset() + 8);
    wrong
}

/// The workload's table with one record changed: that of the body of [`CALLER`].
fn wrong_table(id: BuildId) -> TableFile {
    let mut file = windlass_unwind_compiler::compile(ELF, id).expect("a program").table;
    let table = Table::parse(&file).expect("a compiled table");
    let elf = object::File::parse(ELF).expect("ELF");
    let symbol = elf.symbols().find(|symbol| symbol.name() == Ok(CALLER)).expect("a function");
    let middle = ImageAddress::new(symbol.address() + symbol.size() / 2);
    let before = |entry: &TableEntry| table.base().get() + u64::from(entry.offset) <= middle.get();
    let entry = table.entries().take_while(before).last().expect("a function has rows");
    let right = table.records().nth(entry.record.into()).expect("one of the dictionary");
    let at = HEADER_BYTES + 8 * usize::from(entry.record);
    file[at..at + 8].copy_from_slice(&off_by_a_word(right).0.to_le_bytes());
    let sum = checksum(&file);
    file[8..16].copy_from_slice(&sum.to_le_bytes());
    TableFile::parse(file).expect("a table, though a wrong one")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_record_of_a_table_is_noticed() {
    if !may_use_bpf("audit::a_wrong_record_of_a_table_is_noticed") {
        return;
    }
    let service = TestService::start().await;
    let id = build_id_of(ELF).expect("the workload has a build-ID");
    service.put(id, ArtefactKind::Executable, ELF.to_vec()).await;
    let workload = Workload::start(service.folder());
    let wrap = |kernel| -> Box<dyn Backend> { Box::new(WithWrongTable { kernel, wrong: wrong_table(id) }) };
    let done = |report: &AuditReport| report.disagreeing > 0;
    let (report, metrics) = audit(&service, workload.pid(), wrap, done).await;
    assert!(done(&report), "{report:#?}");
    // Only the image of that table is blamed, though walks go astray in others.
    let own = report.images.iter().filter(|(image, _)| image.id == Some(id));
    let own: u64 = own.filter_map(|(_, outcomes)| outcomes.get(&Outcome::Disagrees)).sum();
    assert_eq!(report.steps(Outcome::Disagrees), own, "{report:#?}");
    let shown = format!("build_id=\"{id}\",outcome=\"disagrees\"}}");
    assert!(metrics.contains(&shown), "{metrics}");
    service.stop().await;
}
