//! What was seen of each program, held against its row.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use windlass_schema::StopReason;
use windlass_tests::stacks::{Frame, Stack, total};

use super::calls::Images;
use super::chain::{Chain, Fit, base_name};
use super::launch::Running;
use super::row::{Stop, Why};

/// Fewest samples of a program.
const MIN_SAMPLES: i64 = 40;
/// Smallest share of complete walks but for what is counted apart; and that over all rows of the table with those of
/// processes that have just begun.
const MIN_COMPLETE: f64 = 0.999;
const MIN_COMPLETE_WITH_NEW: f64 = 0.99;
/// Fewest whole samples of each stack in which a program spends its time.
const MIN_WHOLE: i64 = 5;
/// Most stacks, and most frames of each, that a failure's message shows of a program.
const PRINTED_STACKS: usize = 6;
const PRINTED_FRAMES: usize = 40;
/// The table's file, in the folder that cargo gives tests.
const FILE: &str = "walks.md";

/// What was seen so far.
#[derive(Default)]
pub(crate) struct Report {
    lines: Vec<String>,
    faults: Vec<String>,
    samples: i64,
    complete: i64,
    /// Not complete, by why that may be, the reason and the program.
    apart: BTreeMap<(Why, StopReason), BTreeMap<&'static str, i64>>,
}

/// How many samples are whole, for each chain of a program.
fn whole(program: &Running, stacks: &[Stack]) -> Vec<i64> {
    let is_right = |stop: &Stop| matches!(stop.why, Why::Right | Why::Unrecognised);
    let ends_right = |stack: &Stack| {
        let stops = program.row.stops;
        stack.is_complete() || stops.iter().any(|stop| is_right(stop) && Some(stop.reason) == stack.stop)
    };
    let is_whole =
        |chain: &Chain, stack: &Stack| ends_right(stack) && fit(program, chain, stack) == Fit::Whole;
    let count = |chain: &Chain| total(stacks.iter().filter(|stack| is_whole(chain, stack)));
    program.row.chains.iter().map(count).collect()
}

/// Whether a program was seen so often that its row can be judged.
pub(crate) fn is_enough(program: &Running, stacks: &[Stack]) -> bool {
    let seen = program.row.chains.iter().zip(whole(program, stacks));
    let is_beyond = program.row.stops.iter().any(|stop| stop.most == 1.0);
    total(stacks) >= MIN_SAMPLES
        && (is_beyond || seen.filter(|(chain, _)| chain.often).all(|(_, count)| count >= MIN_WHOLE))
}

/// The stacks that a program cannot have.
pub(crate) fn wrong(program: &Running, stacks: &[Stack]) -> Vec<Stack> {
    let mut images = Images::of(program);
    let is_wrong = |stack: &&Stack| {
        let fits = program.row.chains.iter().map(|chain| fit(program, chain, stack));
        fits.max() == Some(Fit::None) || !images.returns_behind_calls(stack)
    };
    stacks.iter().filter(is_wrong).cloned().collect()
}

impl Report {
    /// Adds what was seen of a program.
    pub(crate) fn add(&mut self, program: &Running, stacks: &[Stack]) {
        let row = program.row;
        let samples = total(stacks);
        let complete = total(stacks.iter().filter(|stack| stack.is_complete()));
        let mut stops: BTreeMap<StopReason, Vec<Stack>> = BTreeMap::new();
        let wrong = wrong(program, stacks);
        for stack in stacks {
            match stack.stop {
                Some(stop) if !stop.is_complete() => stops.entry(stop).or_default().push(stack.clone()),
                Some(_) => {}
                None => self.fault(program, "walks without a reason to end", std::slice::from_ref(stack)),
            }
        }
        if !wrong.is_empty() {
            self.fault(
                program,
                &format!("{} samples with stacks that it cannot have", total(&wrong)),
                &wrong,
            );
        }
        if !is_enough(program, stacks) {
            let what = format!("{samples} samples, and of its stacks {:?}", whole(program, stacks));
            self.fault(program, &what, stacks);
        }
        for (stop, cut) in &stops {
            let (count, allowed) = (total(cut), row.stops.iter().find(|allowed| allowed.reason == *stop));
            if allowed.is_none_or(|allowed| count as f64 > (allowed.most * samples as f64).max(1.0)) {
                self.fault(program, &format!("{count} of {samples} end with {}", stop.as_str()), cut);
            }
            if let Some(allowed) = allowed {
                *self.apart.entry((allowed.why, *stop)).or_default().entry(row.name).or_default() += count;
            }
            if allowed.is_some_and(|allowed| allowed.why != Why::Right) {
                println!("{}: {count} end with {}\n{}", row.name, stop.as_str(), print(cut));
            }
        }
        self.samples += samples;
        self.complete += complete;
        let deepest = stacks.iter().map(|stack| stack.frames.len()).max().unwrap_or_default();
        let stops: Vec<_> =
            stops.iter().map(|(stop, cut)| format!("{} {}", stop.as_str(), total(cut))).collect();
        let share = 100.0 * complete as f64 / samples.max(1) as f64;
        self.lines.push(format!(
            "| {} | {} | {samples} | {share:.1} | {deepest} | {} |",
            row.name,
            row.exercises,
            stops.join(", ")
        ));
    }

    /// A program ended by itself.
    pub(crate) fn ended_by_itself(&mut self, program: &Running) {
        self.fault(program, "ended by itself", &[]);
    }

    fn fault(&mut self, program: &Running, what: &str, stacks: &[Stack]) {
        self.faults.push(format!("{}: {what}\n{}", program.row.name, print(stacks)));
    }

    /// Samples that are not complete, and may be so for this reason.
    fn apart(&self, why: Why) -> i64 {
        let of_why = self.apart.iter().filter(|((its, _), _)| *its == why);
        of_why.flat_map(|(_, rows)| rows.values()).sum()
    }

    /// The share of complete samples over all, and what is not complete, by why, reason and program.
    fn shares(&self) -> String {
        let share = |of: i64| 100.0 * self.complete as f64 / of.max(1) as f64;
        let mut text = format!("{} samples, {:.2} % complete.\n", self.samples, share(self.samples));
        for why in Why::ALL {
            let _ = writeln!(text, "- {}: {}", why.as_str(), self.apart(why));
            for ((_, stop), rows) in self.apart.iter().filter(|((its, _), _)| *its == why) {
                let rows: Vec<_> = rows.iter().map(|(name, count)| format!("{name} {count}")).collect();
                let _ = writeln!(text, "  - {}: {}", stop.as_str(), rows.join(", "));
            }
        }
        let (known, with_new) = self.judged();
        let _ = writeln!(
            text,
            "\nComplete: {:.2} % but for these, {:.2} % with what is new.",
            share(known),
            share(with_new)
        );
        text
    }

    /// Samples of which nearly all must be complete; and with those of something new.
    fn judged(&self) -> (i64, i64) {
        let with_new = self.samples - self.apart(Why::Right) - self.apart(Why::Unrecognised);
        (with_new - self.apart(Why::New), with_new)
    }

    /// Prints the table, writes it where cargo keeps what tests write, and fails if anything is not as it must be, in it
    /// or in what audits found. With `is_whole`, it has all rows.
    pub(crate) fn conclude(mut self, (audited, faults): (String, Vec<String>), is_whole: bool) {
        let mut text = "| program | exercises | samples | complete % | deepest | stops |\n".to_owned();
        text.push_str("|---|---|---|---|---|---|\n");
        self.lines.iter().for_each(|line| text.extend([line, "\n"]));
        text.extend(["\n", &self.shares(), "\n", &audited]);
        println!("{text}");
        std::fs::write(Path::new(env!("CARGO_TARGET_TMPDIR")).join(FILE), &text).expect("write the table");
        self.faults.extend(faults);
        assert!(self.faults.is_empty(), "{}", self.faults.join("\n"));
        let (known, with_new) = self.judged();
        let share = |of: i64| self.complete as f64 / of.max(1) as f64;
        assert!(share(known) >= MIN_COMPLETE, "{text}");
        assert!(!is_whole || share(with_new) >= MIN_COMPLETE_WITH_NEW, "{text}");
    }
}

/// How a stack compares with a chain. Linkage tables may be the innermost frame anywhere, and have no names.
fn fit(program: &Running, chain: &Chain, stack: &Stack) -> Fit {
    let frames = &stack.frames[..];
    // Of a process that is not known yet, frames have no images.
    if !stack.is_complete() && frames.iter().all(|frame| frame.image.is_empty()) {
        return Fit::Part;
    }
    let is_linkage =
        |frame: &Frame| frame.function.contains("+0x") && base_name(&frame.image).starts_with(&program.comm);
    let fit = chain.fit(frames, !stack.is_complete());
    match frames {
        [first, rest @ ..] if fit == Fit::None && is_linkage(first) => {
            chain.fit(rest, !stack.is_complete()).min(Fit::Part)
        }
        _ => fit,
    }
}

/// Stacks as text, the most frequent first.
pub(crate) fn print(stacks: &[Stack]) -> String {
    let mut counts: BTreeMap<String, i64> = BTreeMap::new();
    for stack in stacks {
        let name = |frame: &Frame| match frame.function.is_empty() {
            true => format!("{}+{:#x}", base_name(&frame.image), frame.address),
            false => frame.function.clone(),
        };
        let mut names: Vec<_> = stack.frames.iter().map(name).collect();
        if names.len() > PRINTED_FRAMES {
            names.splice(PRINTED_FRAMES / 2..names.len() - PRINTED_FRAMES / 2, ["...".to_owned()]);
        }
        let reason = stack.stop.map_or("no reason", StopReason::as_str);
        *counts.entry(format!("{reason} [{}]: {}", stack.thread, names.join(" < "))).or_default() +=
            stack.count;
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    counts.iter().take(PRINTED_STACKS).map(|(line, count)| format!("{count:6} {line}\n")).collect()
}
