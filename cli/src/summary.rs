//! What a recording shows: the printed summary, its JSON, and the profile as files.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::Serialize;
use windlass_schema::StopReason;

use crate::recording::{Mode, Recorded};
use crate::render::{self, StackProfile};
use crate::terminal;

/// Functions in the printed table; the files hold all.
const TABLE_ROWS: usize = 15;
/// Branches of the printed tree with a smaller share are left to the files.
const TREE_MIN_PERCENT: f64 = 3.0;
/// Levels of the printed tree.
const TREE_MAX_DEPTH: usize = 24;

/// A form to write a profile in, by the ending of its file's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// `.pb.gz`: what `go tool pprof` and most viewers read.
    Pprof,
    /// `.html`: a flame graph in one file.
    Html,
    /// `.folded`: collapsed stacks, for flamegraph.pl and diffs.
    Folded,
}

/// A file to write a profile to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ProfileFile {
    path: PathBuf,
    form: Form,
}

impl std::str::FromStr for ProfileFile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = match text {
            _ if text.ends_with(".pb.gz") => Form::Pprof,
            _ if text.ends_with(".html") => Form::Html,
            _ if text.ends_with(".folded") => Form::Folded,
            _ => return Err("expected a name that ends in .pb.gz, .html or .folded".to_owned()),
        };
        Ok(Self { path: text.into(), form })
    }
}

/// A recording ready to be shown.
pub(crate) struct Summary<'a> {
    recorded: &'a Recorded,
    mode: Mode,
    whole: StackProfile,
    /// The process that was asked for, or that quickstart ran.
    workload: Option<(u32, StackProfile)>,
    outputs: Outputs,
}

#[derive(Debug, Default, Serialize)]
struct Outputs {
    pprof: Option<PathBuf>,
    html: Option<PathBuf>,
    folded: Option<PathBuf>,
}

#[derive(Serialize)]
struct SummaryJson<'a> {
    mode: Mode,
    samples: u64,
    complete: u64,
    stop_reasons: BTreeMap<String, u64>,
    functions: Vec<FunctionJson>,
    workload: Option<CountsJson>,
    outputs: &'a Outputs,
}

#[derive(Serialize)]
struct FunctionJson {
    function: String,
    file: Option<String>,
    line: Option<u32>,
    #[serde(rename = "self")]
    own: u64,
    total: u64,
}

#[derive(Serialize)]
struct CountsJson {
    samples: u64,
    complete: u64,
}

impl<'a> Summary<'a> {
    pub(crate) fn new(recorded: &'a Recorded, mode: Mode, workload: Option<u32>) -> Self {
        let whole = StackProfile::from_pprof(&recorded.profile);
        let workload = workload.map(|pid| (pid, whole.only_pid(pid)));
        Self { recorded, mode, whole, workload, outputs: Outputs::default() }
    }

    /// Whether there is anything to show.
    pub(crate) fn is_empty(&self) -> bool {
        self.whole.summary().samples == 0
    }

    /// Writes the profile to `file` and keeps its name for the summary.
    pub(crate) fn write(&mut self, file: &ProfileFile, title: &str) -> anyhow::Result<()> {
        let ProfileFile { path, form } = file;
        let (slot, result) = match form {
            Form::Pprof => (&mut self.outputs.pprof, fs::write(path, &self.recorded.gzipped)),
            Form::Html => (&mut self.outputs.html, fs::write(path, render::html(&self.whole, title))),
            Form::Folded => (&mut self.outputs.folded, fs::write(path, render::folded(&self.whole))),
        };
        result.with_context(|| format!("failed to write {}", path.display()))?;
        *slot = Some(path.clone());
        Ok(())
    }

    /// Writes all three forms into `dir`.
    pub(crate) fn write_all(&mut self, dir: &Path, title: &str) -> anyhow::Result<()> {
        let forms =
            [(Form::Pprof, "profile.pb.gz"), (Form::Folded, "profile.folded"), (Form::Html, "profile.html")];
        forms
            .into_iter()
            .try_for_each(|(form, name)| self.write(&ProfileFile { path: dir.join(name), form }, title))
    }

    /// The machine-readable summary.
    pub(crate) fn json(&self) -> anyhow::Result<String> {
        let summary = self.whole.summary();
        let functions = self.whole.functions().into_iter();
        let functions = functions.map(|row| FunctionJson {
            function: row.function,
            file: row.file,
            line: row.line,
            own: row.own,
            total: row.total,
        });
        let counts = |profile: &StackProfile| {
            let summary = profile.summary();
            CountsJson { samples: summary.samples, complete: summary.complete }
        };
        Ok(serde_json::to_string_pretty(&SummaryJson {
            mode: self.mode,
            samples: summary.samples,
            complete: summary.complete,
            stop_reasons: summary.stop_reasons,
            functions: functions.collect(),
            workload: self.workload.as_ref().map(|(_, profile)| counts(profile)),
            outputs: &self.outputs,
        })?)
    }

    /// The summary for a reader.
    pub(crate) fn text(&self) -> String {
        let width = terminal::width();
        let mut text =
            format!("Hottest functions\n{}\n", block(&render::table(&self.whole, TABLE_ROWS, width)));
        let (name, shown) = match &self.workload {
            Some((pid, profile)) => (format!("process {pid}"), profile),
            None => ("all processes".to_owned(), &self.whole),
        };
        let tree = render::tree(shown, TREE_MIN_PERCENT, TREE_MAX_DEPTH, width);
        text += &format!("Stacks of {name}\n{}\nSamples\n", block(&tree));
        text += &completeness("everything sampled", &self.whole);
        if let Some((pid, profile)) = &self.workload
            && profile.summary().samples < self.whole.summary().samples
        {
            text += &completeness(&format!("process {pid}"), profile);
        }
        text += "\nFiles\n";
        let outputs = [
            (&self.outputs.html, "flame graph: open it in a browser"),
            (&self.outputs.pprof, "for `go tool pprof` and other viewers"),
            (&self.outputs.folded, "collapsed stacks as text"),
        ];
        for (path, use_of_it) in outputs {
            if let Some(path) = path {
                text += &format!("  {}  ({use_of_it})\n", path.display());
            }
        }
        text
    }
}

/// `text` with exactly one newline at its end.
fn block(text: &str) -> String {
    format!("{}\n", text.trim_end_matches('\n'))
}

/// How many stacks are whole, and why the others are not.
fn completeness(of: &str, profile: &StackProfile) -> String {
    let summary = profile.summary();
    let percent = terminal::percent(summary.complete, summary.samples);
    let mut text = format!(
        "  {of}: {} samples, {} ({percent:.1}%) with the whole stack\n",
        summary.samples, summary.complete
    );
    let mut cut: Vec<_> = summary.stop_reasons.iter().filter(|(reason, _)| !is_complete(reason)).collect();
    cut.sort_by_key(|&(reason, &samples)| (std::cmp::Reverse(samples), reason));
    for (reason, samples) in cut {
        text += &format!("    {samples:>8} cut: {reason}\n");
    }
    text
}

fn is_complete(reason: &str) -> bool {
    StopReason::from_name(reason).is_some_and(StopReason::is_complete)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(name: &str, expect: Option<Form>) {
        assert_eq!(name.parse::<ProfileFile>().ok().map(|file| file.form), expect, "{name}");
    }

    #[test]
    fn the_ending_names_the_form() {
        check("a/b.pb.gz", Some(Form::Pprof));
        check("x.html", Some(Form::Html));
        check("x.folded", Some(Form::Folded));
        check("x.svg", None);
        check("x.gz", None);
        check("", None);
    }
}
