//! Stacks out of the messages of a pprof profile.
//!
//! Tolerant on purpose: profiles come from other tools too, and one bad index must not hide the rest.
//! What cannot be looked up is called `[unknown]`; a sample that does not say why its walk ended
//! counts as incomplete.

use std::collections::HashMap;

use windlass_schema::{StopReason, pprof};

use super::symbol::{Frame, Kind, Locations, Symbols, UNKNOWN, image_name};

/// Most frames kept of one stack, inlined ones counted. Walks end at a few hundred; the limit bounds what
/// a profile can make of a long location that it repeats. A stack beyond it keeps its innermost
/// frames and counts as cut, with [`StopReason::FrameLimit`].
const MAX_STACK_FRAMES: usize = 8192;

/// The stop reason of samples that carry none.
const NOT_RECORDED: &str = "not_recorded";

/// A profile as named stacks.
#[derive(Clone, Debug, Default)]
pub(crate) struct StackProfile {
    pub(super) symbols: Symbols,
    pub(super) stacks: Vec<Stack>,
}

/// One sampled stack.
#[derive(Clone, Debug)]
pub(super) struct Stack {
    /// Outermost first.
    pub(super) frames: Vec<Frame>,
    /// The process's name, as a root.
    pub(super) process: Frame,
    /// `[reason]`, as a root.
    pub(super) stop: Frame,
    /// Whether the walk reached a real end of stack.
    pub(super) complete: bool,
    pub(super) pid: Option<u32>,
    /// Samples.
    pub(super) count: u64,
}

impl Stack {
    /// From the root to the leaf as it is shown: under its stop reason when it was cut.
    pub(super) fn path(&self) -> impl Iterator<Item = Frame> + '_ {
        (!self.complete).then_some(self.stop).into_iter().chain(self.frames.iter().copied())
    }
}

impl StackProfile {
    /// Reads a symbolized profile; see the module's doc for what it forgives.
    pub(crate) fn from_pprof(profile: &pprof::Profile) -> Self {
        let value_index = samples_value_index(profile);
        let processes = process_names(profile, value_index);
        let mut locations = Locations::new(profile);
        let mut symbols = Symbols::default();
        let mut stacks = Vec::with_capacity(profile.sample.len());
        for sample in &profile.sample {
            let count = sample_count(sample, value_index);
            if count == 0 {
                continue;
            }
            let labels = Labels::of(profile, sample);
            let mut frames = Vec::new();
            for location in &sample.location_id {
                frames.extend_from_slice(locations.frames(*location, &mut symbols));
                if frames.len() > MAX_STACK_FRAMES {
                    break;
                }
            }
            let mut stop = if labels.stop.is_empty() { NOT_RECORDED } else { labels.stop };
            if frames.len() > MAX_STACK_FRAMES {
                frames.truncate(MAX_STACK_FRAMES);
                stop = StopReason::FrameLimit.as_str();
            }
            frames.reverse();
            let process = processes.get(&labels.process()).map_or(UNKNOWN, String::as_str);
            stacks.push(Stack {
                frames,
                process: symbols.named(process, Kind::Group),
                stop: symbols.named(&format!("[{stop}]"), Kind::Stop),
                complete: StopReason::from_name(stop).is_some_and(StopReason::is_complete),
                pid: labels.pid,
                count,
            });
        }
        Self { symbols, stacks }
    }

    /// The stacks of one process.
    pub(crate) fn only_pid(&self, pid: u32) -> Self {
        let stacks = self.stacks.iter().filter(|stack| stack.pid == Some(pid)).cloned().collect();
        Self { symbols: self.symbols.clone(), stacks }
    }

    pub(super) fn samples(&self) -> u64 {
        self.stacks.iter().fold(0, |sum, stack| sum.saturating_add(stack.count))
    }
}

/// What a sample says of itself.
#[derive(Default)]
struct Labels<'p> {
    host: &'p str,
    pid: Option<u32>,
    tid: Option<u32>,
    thread: &'p str,
    stop: &'p str,
}

impl<'p> Labels<'p> {
    fn of(profile: &'p pprof::Profile, sample: &pprof::Sample) -> Self {
        let mut labels = Self::default();
        for label in &sample.label {
            match profile.string(label.key) {
                pprof::label::HOST => labels.host = profile.string(label.str),
                pprof::label::PID => labels.pid = u32::try_from(label.num).ok(),
                pprof::label::TID => labels.tid = u32::try_from(label.num).ok(),
                pprof::label::THREAD => labels.thread = profile.string(label.str),
                pprof::label::STOP_REASON => labels.stop = profile.string(label.str),
                _ => {}
            }
        }
        labels
    }

    /// Which process: a PID names another one on each host.
    fn process(&self) -> Process<'p> {
        (self.host, self.pid)
    }
}

/// Host, empty if it is not said, and PID.
type Process<'p> = (&'p str, Option<u32>);

/// Which value of a sample counts samples: the one of type `samples`, else the first.
fn samples_value_index(profile: &pprof::Profile) -> usize {
    profile.sample_type.iter().position(|kind| profile.string(kind.r#type) == "samples").unwrap_or(0)
}

/// A sample without the value stands for itself; one that takes samples away (a difference of two
/// profiles) cannot be drawn.
fn sample_count(sample: &pprof::Sample, value_index: usize) -> u64 {
    sample.value.get(value_index).map_or(1, |value| u64::try_from(*value).unwrap_or(0))
}

/// A name for each process: its main thread's where that was sampled, else that of its busiest thread; with
/// its host, if there is more than one. Samples without a process take the profile's first mapping, which
/// is the main program by pprof's convention.
fn process_names(profile: &pprof::Profile, value_index: usize) -> HashMap<Process<'_>, String> {
    let mut threads: HashMap<(Process<'_>, &str), (bool, u64)> = HashMap::new();
    for sample in &profile.sample {
        let labels = Labels::of(profile, sample);
        let (main, count) = threads.entry((labels.process(), labels.thread)).or_default();
        *main |= labels.pid.is_some() && labels.pid == labels.tid;
        *count = count.saturating_add(sample_count(sample, value_index));
    }
    let mut best: HashMap<Process<'_>, ((bool, u64), &str)> = HashMap::new();
    for ((process, thread), rank) in threads {
        let named = (rank, thread);
        let entry = best.entry(process).or_insert(named);
        // The name decides between equals, so that two runs over one profile agree.
        *entry = (*entry).max(named);
    }
    let mut hosts = best.keys().map(|(host, _)| *host);
    let first = hosts.next();
    let many = hosts.any(|host| Some(host) != first);
    let program = profile.mapping.first().and_then(|mapping| image_name(profile.string(mapping.filename)));
    best.into_iter()
        .map(|(process, (_, thread))| {
            let name = match (thread, process) {
                ("", (_, None)) => program.unwrap_or(UNKNOWN),
                ("", (_, Some(_))) => UNKNOWN,
                (thread, _) => thread,
            };
            let name = match process {
                (host, _) if many && !host.is_empty() => format!("{name} on {host}"),
                _ => name.to_owned(),
            };
            (process, name)
        })
        .collect()
}
