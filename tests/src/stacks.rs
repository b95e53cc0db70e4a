//! A profile as stacks of named frames, and the questions that tests ask of them.

use std::collections::HashMap;

use windlass_schema::StopReason;
use windlass_schema::pprof::{Location, Profile, label};

/// A frame, inlined ones on their own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    /// Demangled name, empty if there is none.
    pub function: String,
    /// Source file, empty if unknown.
    pub file: String,
    /// Source line, 0 if unknown.
    pub line: i64,
    /// Whether the function was inlined into the next frame.
    pub inlined: bool,
    /// Path of the image, empty if there is none.
    pub image: String,
    /// Where in it: inside the instruction or the call.
    pub address: u64,
}

/// A stack and how often it was seen.
#[derive(Clone, Debug)]
pub struct Stack {
    /// Innermost first.
    pub frames: Vec<Frame>,
    /// Samples.
    pub count: i64,
    /// Why the walk ended; `None` if the label is missing or unknown.
    pub stop: Option<StopReason>,
    /// The process.
    pub pid: i64,
    /// The thread's name.
    pub thread: String,
}

impl Stack {
    /// The frames of these functions, if all are there in this order, others perhaps between them.
    pub fn frames_of(&self, functions: &[&str]) -> Option<Vec<&Frame>> {
        let mut frames = self.frames.iter();
        functions
            .iter()
            .map(|name| frames.find(|frame| windlass_workload::names(&frame.function, name)))
            .collect()
    }

    /// Whether its label says that it reached the end of the stack.
    pub fn is_complete(&self) -> bool {
        self.stop.is_some_and(StopReason::is_complete)
    }
}

/// The stacks of a profile.
///
/// # Panics
/// When a sample names a location, or a line a function, that the profile does not have.
pub fn stacks(profile: &Profile) -> Vec<Stack> {
    let locations: HashMap<u64, &Location> =
        profile.location.iter().map(|location| (location.id, location)).collect();
    let functions: HashMap<_, _> = profile.function.iter().map(|function| (function.id, function)).collect();
    let mappings: HashMap<_, _> = profile.mapping.iter().map(|mapping| (mapping.id, mapping)).collect();
    let frames_of = |location: &Location| -> Vec<Frame> {
        let image = mappings.get(&location.mapping_id).map_or("", |mapping| profile.string(mapping.filename));
        let unnamed = Frame { image: image.to_owned(), address: location.address, ..Frame::default() };
        if location.line.is_empty() {
            return vec![unnamed];
        }
        let frame = |(index, line): (usize, &windlass_schema::pprof::Line)| {
            let function = functions.get(&line.function_id).expect("the profile has the line's function");
            Frame {
                function: profile.string(function.name).to_owned(),
                file: profile.string(function.filename).to_owned(),
                line: line.line,
                inlined: index + 1 < location.line.len(),
                ..unnamed.clone()
            }
        };
        location.line.iter().enumerate().map(frame).collect()
    };
    let stack = |sample: &windlass_schema::pprof::Sample| {
        let labels: HashMap<_, _> =
            sample.label.iter().map(|label| (profile.string(label.key), label)).collect();
        let stop = labels.get(label::STOP_REASON).map(|label| profile.string(label.str));
        Stack {
            frames: sample.location_id.iter().flat_map(|id| frames_of(locations[id])).collect(),
            count: sample.value.first().copied().unwrap_or_default(),
            stop: stop.and_then(StopReason::from_name),
            pid: labels.get(label::PID).map_or(0, |label| label.num),
            thread: labels.get(label::THREAD).map_or("", |label| profile.string(label.str)).to_owned(),
        }
    };
    profile.sample.iter().map(stack).collect()
}

/// Samples of all these stacks together.
pub fn total<'a>(stacks: impl IntoIterator<Item = &'a Stack>) -> i64 {
    stacks.into_iter().map(|stack| stack.count).sum()
}
