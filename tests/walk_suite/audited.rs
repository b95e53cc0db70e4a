//! Do the walks of the table agree with the CFI of the images that they went through?
//!
//! The agent of the suite audits a part of the samples: what each walk found in its frames is held, step by step, against gimli's
//! reading of the mapped files, over registers and stack as they were in that sample. Names have no part in that, so that a
//! frame that is wrong and yet looks right is found here.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::num::NonZeroU32;

use windlass_agent::audit::{AuditReport, Outcome};

use super::chain::base_name;

/// One sample in so many is audited.
pub(crate) const EVERY: NonZeroU32 = NonZeroU32::new(4).expect("it is not zero");
/// Fewest steps that agree over the whole table. Some seconds of its programs give a hundred times as many.
const MIN_AGREEING: u64 = 500;
/// Smallest share of steps that could be compared, but for those where the walk itself ended early. Some programs of the
/// table are without CFI altogether.
const MIN_COMPARED: f64 = 0.75;

/// The counters of each image as a table; images of one name together, as programs that are built twice are.
fn table(report: &AuditReport) -> String {
    let mut images: BTreeMap<&str, BTreeMap<Outcome, u64>> = BTreeMap::new();
    for (image, outcomes) in &report.images {
        let counters = images.entry(base_name(&image.path)).or_default();
        outcomes.iter().for_each(|(outcome, steps)| *counters.entry(*outcome).or_default() += steps);
    }
    let mut images: Vec<_> = images.into_iter().collect();
    images.sort_by_key(|(_, outcomes)| std::cmp::Reverse(outcomes.values().sum::<u64>()));
    let mut text = "| audited image | agrees | disagrees | not compared |\n|---|---|---|---|\n".to_owned();
    for (name, outcomes) in images {
        let steps = |outcome: Outcome| outcomes.get(&outcome).copied().unwrap_or_default();
        let others = outcomes.iter().filter(|(outcome, _)| !outcome.is_compared());
        let others: Vec<_> = others.map(|(outcome, steps)| format!("{} {steps}", outcome.as_str())).collect();
        let (agrees, disagrees) = (steps(Outcome::Agrees), steps(Outcome::Disagrees));
        let _ = writeln!(text, "| {name} | {agrees} | {disagrees} | {} |", others.join(", "));
    }
    text
}

/// What audits found, as text, and what is wrong with that. With `is_whole`, all rows of the table were audited.
pub(crate) fn conclude(report: &AuditReport, is_whole: bool) -> (String, Vec<String>) {
    let (agrees, disagrees) = (report.steps(Outcome::Agrees), report.steps(Outcome::Disagrees));
    let steps: u64 = Outcome::ALL.iter().map(|outcome| report.steps(*outcome)).sum();
    let compared = (agrees + disagrees) as f64 / (steps - report.steps(Outcome::Stopped)).max(1) as f64;
    let mut text = table(report);
    let _ = writeln!(
        text,
        "\n{} walks audited, {} of them lost or outdated before they were compared: {agrees} steps agree with the CFI of \
         their images, {disagrees} disagree, {:.1} % of all could be compared.",
        report.walks,
        report.lost + report.outdated,
        100.0 * compared
    );
    let mut faults = Vec::new();
    if disagrees > 0 {
        faults.push(format!("{disagrees} steps of {} walks disagree with CFI", report.disagreeing));
    }
    if is_whole && (agrees < MIN_AGREEING || compared < MIN_COMPARED) {
        faults.push(format!("{agrees} steps agree with CFI, {:.1} % could be compared", 100.0 * compared));
    }
    (text, faults)
}
