//! What audits found, counted.

use std::collections::BTreeMap;
use std::sync::Arc;

use windlass_schema::BuildId;

use super::cfi_step::Missing;

/// Most images counted apart; what is beyond goes together. Several times what a host runs in a day, and
/// few enough for `/metrics`.
const MAX_IMAGES: usize = 1000;

macro_rules! outcomes {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {
        /// What came of comparing one step of a walk, from a frame to its caller or to the end.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Outcome {
            $($(#[$doc])* $name,)*
        }

        impl Outcome {
            /// Every outcome.
            pub const ALL: &[Outcome] = &[$(Outcome::$name,)*];

            /// The name used in logs and metrics.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Outcome::$name => $text,)*
                }
            }
        }
    };
}

outcomes! {
    /// By its CFI the step leads where the kernel's did: the same address, stack pointer and frame pointer.
    Agrees = "agrees";
    /// It leads elsewhere, or to no frame where the kernel found one, or the other way round.
    Disagrees = "disagrees";
    /// Not comparable: what had to be read is not in the copy of the stack.
    NotCaptured = "not_captured";
    /// Not comparable: no image, or one that cannot be told; code of a JIT compiler, walked by its frame pointer.
    NoImage = "no_image";
    /// Not comparable: no FDE covers the address. A frame pointer was proved, instructions were recognised, or the code is
    /// Go's.
    NoCfi = "no_cfi";
    /// Not comparable: the image's file cannot be read, or its CFI is too large.
    Unreadable = "unreadable";
    /// Not comparable: CFI takes a register that is not known, behind a frame without CFI.
    RegisterUnknown = "register_unknown";
    /// Not comparable: CFI has a rule that cannot be followed.
    Rule = "rule";
    /// Not comparable: the walk ended here short of the end of the stack, for a reason of its own.
    Stopped = "stopped";
}

impl Outcome {
    /// Whether the step was compared.
    pub const fn is_compared(self) -> bool {
        matches!(self, Self::Agrees | Self::Disagrees)
    }
}

impl From<Missing> for Outcome {
    fn from(missing: Missing) -> Self {
        match missing {
            Missing::Memory => Self::NotCaptured,
            Missing::Register => Self::RegisterUnknown,
            Missing::Rule => Self::Rule,
        }
    }
}

/// An image, as counted.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AuditedImage {
    /// The path under which it was mapped.
    pub path: Arc<str>,
    /// Its build-ID, if it is an image.
    pub id: Option<BuildId>,
}

/// What audits found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuditReport {
    /// Walks compared.
    pub walks: u64,
    /// Those of them in which something disagreed.
    pub disagreeing: u64,
    /// Walks not compared, because their mappings had changed by the time they were read.
    pub outdated: u64,
    /// Walks that were sent and not compared: there were too many.
    pub lost: u64,
    /// Steps of walks that reached the end of the stack.
    pub complete_steps: u64,
    /// Those of them that were compared.
    pub complete_compared: u64,
    /// Steps by the image of the frame that they started from, and by what came of comparing them.
    pub images: BTreeMap<AuditedImage, BTreeMap<Outcome, u64>>,
}

impl AuditReport {
    /// Steps with this outcome, of all images.
    pub fn steps(&self, outcome: Outcome) -> u64 {
        self.images.values().filter_map(|outcomes| outcomes.get(&outcome)).sum()
    }

    /// Counts a walk with its steps.
    pub(super) fn count(&mut self, steps: Vec<(AuditedImage, Outcome)>, is_complete: bool) {
        let outcomes = || steps.iter().map(|(_, outcome)| *outcome);
        self.walks += 1;
        self.disagreeing += u64::from(outcomes().any(|outcome| outcome == Outcome::Disagrees));
        if is_complete {
            self.complete_steps += steps.len() as u64;
            self.complete_compared += outcomes().filter(|outcome| outcome.is_compared()).count() as u64;
        }
        for (image, outcome) in steps {
            let image = match self.images.len() < MAX_IMAGES || self.images.contains_key(&image) {
                true => image,
                false => AuditedImage { path: "(others)".into(), id: None },
            };
            *self.images.entry(image).or_default().entry(outcome).or_default() += 1;
        }
    }

    /// Writes the totals to the log, and the images in which something disagreed.
    pub fn log(&self) {
        let Self { walks, disagreeing, outdated, lost, complete_steps, complete_compared, .. } = self;
        tracing::info!(walks, disagreeing, outdated, lost, complete_steps, complete_compared, "audit");
        for outcome in Outcome::ALL {
            let steps = self.steps(*outcome);
            if steps > 0 {
                tracing::info!(steps, "audit: {}", outcome.as_str());
            }
        }
        for (image, outcomes) in &self.images {
            if let Some(steps) = outcomes.get(&Outcome::Disagrees) {
                tracing::warn!(path = %image.path, id = image.shown_id(), steps, "audit: disagrees");
            }
        }
    }

    /// Writes the counters of each image to the log.
    pub fn log_images(&self) {
        for (image, outcomes) in &self.images {
            let counts: Vec<_> =
                outcomes.iter().map(|(outcome, steps)| format!("{} {steps}", outcome.as_str())).collect();
            tracing::info!(path = %image.path, id = image.shown_id(), "audit: {}", counts.join(", "));
        }
    }
}

impl AuditedImage {
    /// Its build-ID as text; empty if it has none.
    pub fn shown_id(&self) -> String {
        self.id.map(|id| id.to_string()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn walks_are_counted_and_images_are_bounded() {
        let image = |number: usize| AuditedImage { path: format!("/{number}").into(), id: None };
        let mut report = AuditReport::default();
        let steps = [Outcome::Agrees, Outcome::NoCfi, Outcome::Disagrees, Outcome::Agrees];
        report.count(steps.map(|outcome| (image(0), outcome)).to_vec(), true);
        assert_eq!((report.walks, report.disagreeing), (1, 1));
        assert_eq!((report.complete_steps, report.complete_compared), (4, 3));
        for number in 1..2 * MAX_IMAGES {
            report.count(vec![(image(number), Outcome::Agrees)], false);
        }
        assert_eq!((report.complete_steps, report.disagreeing), (4, 1));
        assert_eq!(report.images.len(), MAX_IMAGES + 1);
        assert_eq!(report.steps(Outcome::Agrees), 2 * MAX_IMAGES as u64 + 1, "none is lost");
    }
}
