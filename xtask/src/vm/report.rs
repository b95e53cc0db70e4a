//! What the guest wrote on its console: figures of its kernel, and whether the workload's stacks are those it has.
//! Whether inlined functions are named right is another test's question (`tests/e2e/live.rs`), and a machine's whose
//! processor is not emulated.
//!
//! Lines that begin with `@` are of the guest's first process; others are of firmware and kernel.
//!
//! | line | meaning |
//! |---|---|
//! | `@ kernel RELEASE` | it runs |
//! | `@ maps COUNT BYTES` | BPF maps at their most |
//! | `@ program COUNT BYTES INSTRUCTIONS` | BPF programs, their size, how many instructions the verifier went through |
//! | `@ log TEXT` | what `windlass quickstart` wrote on its standard error |
//! | `@ json TEXT` | its summary, a line of many |
//! | `@ stack STACK COUNT` | a collapsed stack, outermost frame first |
//! | `@ status N` | the exit status of `windlass`; the end |

use std::collections::BTreeMap;
use std::fmt::Write as _;

use windlass_workload::{EXECUTABLE_NAME, EXPECTED, ExpectedStack};

/// What a thread's name is cut to (TASK_COMM_LEN in include/linux/sched.h, less the zero at its end).
const NAME_BYTES: usize = 15;
/// Fewest complete samples of each expected stack: a twentieth of those of ten seconds on one processor is 48.
const MIN_SAMPLES_EACH: u64 = 5;
/// Smallest share of complete walks of the workload, in percent of those that did not come before its tables.
const MIN_COMPLETE_PERCENT: u64 = 99;
/// How a walk ends for which there is no table yet: for seconds at first, as compiling takes long here.
const EARLY: [&str; 2] = ["table_pending", "process_unknown"];
/// The first kernel that says what a map takes; before, its fdinfo has the most that it may take (`map_mem_usage` of
/// struct bpf_map_ops in 6.4; `bpf_map_memory_footprint` in 6.3's kernel/bpf/syscall.c).
const MAP_MEMORY_IS_MEASURED: (u64, u64) = (6, 4);
/// Functions without a caller: a program's first, and a thread's (glibc's names).
const OUTERMOST: [&str; 5] = ["_start", "clone3", "__clone3", "clone", "__clone"];
/// Start of a frame in a C library without a symbol for it, as `clone3` is in one that is stripped.
const UNNAMED_IN_LIBC: &str = "libc.so.6+";

/// What came of one kernel.
#[derive(Debug, Default)]
pub(super) struct Report {
    kernel: Option<String>,
    map_bytes: u64,
    verified_instructions: u64,
    load_ms: Option<u64>,
    /// The helper that makes the turns of walks.
    turns: Option<String>,
    log: Vec<String>,
    summary: serde_json::Value,
    /// The workload's stacks.
    stacks: Vec<Stack>,
    status: Option<i32>,
}

/// A stack of the workload.
#[derive(Debug)]
struct Stack {
    /// Functions, innermost first.
    frames: Vec<String>,
    /// Why the walk was cut; `None` if it is complete.
    cut: Option<String>,
    samples: u64,
}

impl Report {
    /// The head of the table whose rows [`Report::row`] gives.
    pub(super) const HEADING: &str = "| series | kernel | turns by | verified instructions | load, ms (emulated) | maps, KiB \
         | workload's walks with tables | complete | stacks found |\n|---|---|---|---:|---:|---:|---:|---:|---:|";

    /// Reads a console, up to where it ends.
    pub(super) fn read(console: &str) -> Self {
        let mut report = Self::default();
        let mut summary = String::new();
        for line in console.lines().filter_map(|line| line.trim_end().strip_prefix("@ ")) {
            let (key, rest) = line.split_once(' ').unwrap_or((line, ""));
            let number =
                |at: usize| rest.split(' ').nth(at).and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
            match key {
                "kernel" => report.kernel = Some(rest.to_owned()),
                "maps" => report.map_bytes = number(1),
                "program" => report.verified_instructions = number(2),
                "log" => report.log.push(rest.to_owned()),
                "json" => summary += rest,
                "stack" => report.stacks.extend(Stack::read(rest)),
                "status" => report.status = rest.parse().ok(),
                _ => report.log.push(line.to_owned()),
            }
        }
        report.summary = serde_json::from_str(&summary).unwrap_or_default();
        let field = |name| {
            let line = report.log.iter().find_map(|line| Some(line.split_once(name)?.1))?;
            line.split(' ').next()
        };
        let load_ms = field("load_ms=").and_then(|digits| digits.parse().ok());
        let turns = field("turns=").map(|helper| helper.trim_matches('"').to_owned());
        (report.load_ms, report.turns) = (load_ms, turns);
        report
    }

    /// What is wrong; empty if all is well.
    pub(super) fn findings(&self) -> Vec<String> {
        if self.kernel.is_none() {
            return vec!["the kernel did not start the first process".to_owned()];
        }
        let Some(status) = self.status else { return vec!["the guest did not come to its end".to_owned()] };
        let mut findings = Vec::new();
        if status != 0 {
            findings.push(format!(
                "windlass ended with {status}: {}",
                self.log.last().map_or("", String::as_str)
            ));
        }
        if self.summary["mode"] != "bpf" {
            let reason =
                self.log.iter().find_map(|line| line.split_once("cannot sample the whole machine: "));
            findings.push(reason.map_or("the program was not used", |(_, reason)| reason).to_owned());
            return findings;
        }
        let (samples, complete) = self.samples();
        if samples == 0 || complete * 100 < samples * MIN_COMPLETE_PERCENT {
            findings.push(format!("{complete} of {samples} walks are complete; cut: {}", self.cut()));
        }
        for (name, samples) in self.expected() {
            if samples < MIN_SAMPLES_EACH {
                findings.push(format!("{samples} complete samples of {name}"));
            }
        }
        let is_end = |frame: &String| OUTERMOST.contains(&&frame[..]) || frame.starts_with(UNNAMED_IN_LIBC);
        for stack in self.stacks.iter().filter(|stack| stack.cut.is_none()) {
            if !stack.frames.last().is_some_and(is_end) {
                findings.push(format!("complete, and yet it ends elsewhere: {}", stack.frames.join(" < ")));
            }
        }
        findings
    }

    /// The figures, as a row of Markdown.
    pub(super) fn row(&self, series: &str) -> String {
        let kernel = self.kernel.as_deref().unwrap_or("unknown");
        if self.summary["mode"] != "bpf" {
            return format!("| {series} | {kernel} | not loaded | | | | | | |");
        }
        let (samples, complete) = self.samples();
        let turns = self.turns.as_deref().unwrap_or("unknown");
        let mut row = format!("| {series} | {kernel} | `{turns}` | {} | ", self.verified_instructions);
        let load = self.load_ms.map_or("unknown".to_owned(), |load_ms| load_ms.to_string());
        let bound = if self.map_memory_is_measured() { "" } else { "at most " };
        let percent = if samples == 0 { 0.0 } else { 100.0 * complete as f64 / samples as f64 };
        let found = self.expected().iter().filter(|(_, samples)| *samples >= MIN_SAMPLES_EACH).count();
        write!(
            row,
            "{load} | {bound}{} | {samples} | {percent:.1}% | {found} of {} |",
            self.map_bytes / 1024,
            EXPECTED.len()
        )
        .expect("writing to a string does not fail");
        row
    }

    /// Samples of the workload since its tables are there, and how many of them are complete.
    fn samples(&self) -> (u64, u64) {
        let sum = |counts: &dyn Fn(&Stack) -> bool| {
            self.stacks.iter().filter(|stack| counts(stack)).map(|stack| stack.samples).sum()
        };
        let is_early = |stack: &Stack| stack.cut.as_ref().is_some_and(|reason| EARLY.contains(&&reason[..]));
        (sum(&|stack| !is_early(stack)), sum(&|stack| stack.cut.is_none()))
    }

    /// The workload's walks that were cut, by reason.
    fn cut(&self) -> String {
        let mut cut = BTreeMap::<&str, u64>::new();
        for stack in &self.stacks {
            if let Some(reason) = &stack.cut {
                *cut.entry(reason).or_default() += stack.samples;
            }
        }
        cut.iter().map(|(reason, samples)| format!("{reason} {samples}")).collect::<Vec<_>>().join(", ")
    }

    /// Complete samples of each stack that the workload has, as far as it can be seen here.
    fn expected(&self) -> Vec<(&'static str, u64)> {
        let samples = |expected: &ExpectedStack| {
            let visible = visible(expected);
            let complete = self.stacks.iter().filter(|stack| stack.cut.is_none());
            let seen = complete.filter(|stack| visible.matches(stack.frames.iter().map(String::as_str)));
            seen.map(|stack| stack.samples).sum()
        };
        EXPECTED.iter().map(|expected| (expected.name, samples(expected))).collect()
    }

    fn map_memory_is_measured(&self) -> bool {
        let mut numbers =
            self.kernel.iter().flat_map(|kernel| kernel.split('.').map_while(|part| part.parse().ok()));
        (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= MAP_MEMORY_IS_MEASURED
    }
}

/// The stack without the functions that are inlined at its inner end. QEMU interrupts between blocks of translated code,
/// which end with a branch; so samples are of the first instructions behind branches and of their targets,
/// and code that is straight, as those functions are, is never sampled.
fn visible(expected: &ExpectedStack) -> ExpectedStack {
    let inlined =
        expected.functions.iter().take_while(|function| expected.inlined.contains(function)).count();
    ExpectedStack { functions: &expected.functions[inlined..], ..*expected }
}

impl Stack {
    /// A collapsed stack; `None` if it is not the workload's.
    fn read(line: &str) -> Option<Self> {
        let (stack, samples) = line.rsplit_once(' ')?;
        let (process, frames) = stack.split_once(';')?;
        if process != &EXECUTABLE_NAME[..NAME_BYTES] {
            return None;
        }
        let (cut, frames) = match frames.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((reason, frames)) => (Some(reason.to_owned()), frames),
            None => (None, frames),
        };
        let frames = frames.rsplit(';').map(str::to_owned).collect();
        Some(Self { frames, cut, samples: samples.parse().ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A console on which all is well.
    fn console() -> String {
        let mut console = "SeaBIOS\r\n\r\n@ kernel 6.12.1-amd64\r\n@ maps 13 2048\r\n@ program 1 16384 75634\r\n\
                           @ log x INFO y: the kernel verified the BPF program load_ms=7 verified_instructions=1 \
                           turns=\"bpf_loop\"\r\n\
                           @ json {\"mode\":\r\n@ json \"bpf\"}\r\n"
            .to_owned();
        for expected in EXPECTED {
            let mut frames = visible(expected).functions.to_vec();
            frames.push("_start");
            frames.reverse();
            console += &format!("@ stack windlass-worklo;{} 5\r\n", frames.join(";"));
        }
        console + "@ stack windlass-worklo;[table_pending];f 9\r\n@ stack init;g 3\r\n@ status 0\r\n"
    }

    #[track_caller]
    fn check(console: &str, expect: &[&str]) {
        let findings = Report::read(console).findings();
        assert_eq!(findings.len(), expect.len(), "{findings:?}");
        for (finding, part) in findings.iter().zip(expect) {
            assert!(finding.contains(part), "{finding} lacks {part}");
        }
    }

    #[test]
    fn a_guest_that_did_all_has_no_findings() {
        check(&console(), &[]);
        let expect = "| 6.12 | 6.12.1-amd64 | `bpf_loop` | 75634 | 7 | 2 | 35 | 100.0% | 7 of 7 |";
        assert_eq!(Report::read(&console()).row("6.12"), expect);
        let before = console().replace("6.12.1-amd64", "6.1.0-56-amd64");
        assert!(Report::read(&before).row("6.1").contains("| at most 2 |"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        check("SeaBIOS\n", &["did not start"]);
        check(console().split("@ status").next().expect("a first part"), &["did not come to its end"]);
        check(&console().replace("@ status 0", "@ status 2"), &["ended with 2"]);
        let cut = console().replace("[table_pending]", "[stack_read]");
        check(&cut, &["35 of 44 walks are complete; cut: stack_read 9"]);
        let refused = "\"user\"}\r\n@ log windlass: cannot sample the whole machine: unknown func\r\n";
        let refused = console().replace("\"bpf\"}\r\n", refused);
        check(&refused, &["unknown func"]);
        assert!(Report::read(&refused).row("5.10").contains("not loaded"));
    }

    #[test]
    fn a_stack_that_is_missing_or_wrong_is_named() {
        check(&console().replace("fill_large_frame", "other"), &["a frame of 16 KiB"]);
        check(
            &console().replace("_start;windlass_workload::main", "windlass_workload::main"),
            &["ends elsewhere"; 3],
        );
        let deep = "windlass-worklo;_start;windlass_workload::run_deep";
        let early = "windlass-worklo;[table_pending];_start;windlass_workload::run_deep";
        let cut = console().replace(deep, early);
        check(&cut, &["twalk", "100 frames"]);
    }
}
