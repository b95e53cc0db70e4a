//! Functions by samples, and how many stacks are whole.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};

use super::profile::StackProfile;

/// A function with its samples.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FunctionRow {
    /// Its name, or `IMAGE+0xADDRESS`.
    pub(crate) function: String,
    /// Source file.
    pub(crate) file: Option<String>,
    /// The line with most own samples; with none, the one with most samples below it.
    pub(crate) line: Option<u32>,
    /// Base name of the image, where the file is not known.
    pub(crate) image: Option<String>,
    /// Samples in the function itself.
    pub(crate) own: u64,
    /// Samples in it or in what it called; a recursive stack counts once.
    pub(crate) total: u64,
}

/// How many samples there are and why their walks ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Summary {
    /// Samples.
    pub(crate) samples: u64,
    /// Samples whose walk reached a real end of stack.
    pub(crate) complete: u64,
    /// Samples by stop reason.
    pub(crate) stop_reasons: BTreeMap<String, u64>,
}

/// Own and total samples.
type OwnTotal = (u64, u64);

/// Samples at each line of each of many things (functions, nodes), to find the hottest.
#[derive(Default)]
pub(super) struct LineTally(HashMap<(usize, u32), OwnTotal>);

impl LineTally {
    /// Counts samples of `id` at `line`, of which `own` have nothing below them.
    pub(super) fn add(&mut self, id: usize, line: Option<u32>, own: u64, total: u64) {
        let Some(line) = line else { return };
        let entry = self.0.entry((id, line)).or_default();
        entry.0 = entry.0.saturating_add(own);
        entry.1 = entry.1.saturating_add(total);
    }

    /// For each id below `len` its line with most own, then most total samples; the first of equals.
    pub(super) fn hottest(self, len: usize) -> Vec<Option<u32>> {
        let mut best: Vec<Option<(OwnTotal, Reverse<u32>)>> = vec![None; len];
        for ((id, line), samples) in self.0 {
            let slot = &mut best[id];
            *slot = (*slot).max(Some((samples, Reverse(line))));
        }
        best.into_iter().map(|slot| slot.map(|(_, Reverse(line))| line)).collect()
    }
}

/// Samples of one function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) own: u64,
    pub(super) total: u64,
    pub(super) line: Option<u32>,
}

impl StackProfile {
    /// The samples of each function, by its id.
    pub(super) fn tallies(&self) -> Vec<Tally> {
        let mut tallies = vec![Tally::default(); self.symbols.functions().len()];
        // The last stack that counted a function: recursion counts once.
        let mut seen_in = vec![usize::MAX; tallies.len()];
        let mut lines = LineTally::default();
        for (stack_index, stack) in self.stacks.iter().enumerate() {
            for (depth, frame) in stack.frames.iter().enumerate() {
                let index = frame.function.index();
                let tally = &mut tallies[index];
                let leaf = if depth + 1 == stack.frames.len() { stack.count } else { 0 };
                tally.own = tally.own.saturating_add(leaf);
                if seen_in[index] != stack_index {
                    seen_in[index] = stack_index;
                    tally.total = tally.total.saturating_add(stack.count);
                }
                lines.add(index, frame.line, leaf, stack.count);
            }
        }
        let lines = lines.hottest(tallies.len());
        for (tally, line) in tallies.iter_mut().zip(lines) {
            tally.line = line;
        }
        tallies
    }

    /// Every function, most own samples first; equals by total, then by name.
    pub(crate) fn functions(&self) -> Vec<FunctionRow> {
        let tallies = self.tallies();
        let mut rows: Vec<FunctionRow> = self
            .symbols
            .functions()
            .zip(&tallies)
            // Processes and reasons to stop are on no stack: their total is 0.
            .filter(|(_, tally)| tally.total > 0)
            .map(|(function, tally)| FunctionRow {
                function: function.name.clone(),
                file: function.file.clone(),
                line: tally.line,
                image: function.image.clone(),
                own: tally.own,
                total: tally.total,
            })
            .collect();
        rows.sort_by(|a, b| {
            (b.own, b.total)
                .cmp(&(a.own, a.total))
                .then_with(|| (&a.function, &a.file, &a.image).cmp(&(&b.function, &b.file, &b.image)))
        });
        rows
    }

    /// Samples, whole stacks and stop reasons.
    pub(crate) fn summary(&self) -> Summary {
        let mut summary = Summary { samples: self.samples(), ..Summary::default() };
        for stack in &self.stacks {
            if stack.complete {
                summary.complete = summary.complete.saturating_add(stack.count);
            }
            let name = &self.symbols.function(stack.stop.function).name;
            let reason = name.strip_prefix('[').and_then(|name| name.strip_suffix(']'));
            let count = summary.stop_reasons.entry(reason.unwrap_or(name).to_owned()).or_default();
            *count = count.saturating_add(stack.count);
        }
        summary
    }
}
