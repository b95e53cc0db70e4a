//! What a row of the suite says.

use windlass_schema::StopReason;

use super::chain::Chain;

/// A program and the stacks that it can have.
#[derive(Debug)]
pub(crate) struct Row {
    /// Of its file and its processes: ten characters at most, so that a process's name has room for more.
    pub(crate) name: &'static str,
    /// What it is here for.
    pub(crate) exercises: &'static str,
    pub(crate) program: Program,
    pub(crate) arguments: &'static [&'static str],
    pub(crate) environment: &'static [(&'static str, &'static str)],
    /// Libraries that it is given, and the flags with which they are compiled.
    pub(crate) libraries: &'static [(&'static str, &'static [&'static str])],
    /// Files of the machine that the service is given, for code of theirs that no CFI covers: what agents send of
    /// an image is without its code.
    pub(crate) known: &'static [&'static str],
    pub(crate) start: Start,
    /// Without these it is skipped.
    pub(crate) needs: &'static [Need],
    /// All that it can have.
    pub(crate) chains: &'static [Chain],
    /// Why its walks may end early.
    pub(crate) stops: &'static [Stop],
}

/// Where a program is from.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Program {
    /// Built by a compiler from sources with flags.
    Built(&'static str, &'static [&'static str], &'static [&'static str]),
    /// One of the machine's.
    Installed(&'static str),
}

/// How a program is started.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Start {
    Plainly,
    /// Its file is deleted when it runs.
    Deleted,
    /// Another file gets its name when it runs.
    Replaced,
    /// From a file system that is mounted for it alone, as the first process of a PID namespace.
    InNamespaces,
    /// With another root.
    InRoot,
}

/// What not every machine has.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Need {
    File(&'static str),
    /// A flag of `/proc/cpuinfo`.
    Cpu(&'static str),
    Root,
}

/// Walks of a program that may end early.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stop {
    pub(crate) reason: StopReason,
    /// Largest share of the program's samples.
    pub(crate) most: f64,
    pub(crate) why: Why,
}

/// Why a walk may end early.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Why {
    /// There is nothing more to walk, or it is not known to anyone; or it is more than the limit.
    Right,
    /// The code has no CFI, and what it does to its frame is not recognised; or it has some of what walks do not keep. What
    /// is left to do.
    Unrecognised,
    /// The process, or what it has mapped, is younger than what the agent takes to learn of it.
    New,
}

impl Why {
    pub(crate) const ALL: [Self; 3] = [Self::Right, Self::Unrecognised, Self::New];

    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Right => "end where they have to",
            Self::Unrecognised => "in code of which nothing is known",
            Self::New => "of something new",
        }
    }
}

/// A row to start others from.
pub(crate) const PLAIN: Row = Row {
    name: "",
    exercises: "",
    program: Program::Installed(""),
    arguments: &[],
    environment: &[],
    libraries: &[],
    known: &[],
    start: Start::Plainly,
    needs: &[],
    chains: &[],
    stops: &[],
};
