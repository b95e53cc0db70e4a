//! The boundary between the agent and what takes its samples.
//!
//! Two things take samples: the BPF program (`kernel`), which walks every process's stacks in the
//! kernel, and the copied-stack sampler (`copied`), which needs no privilege, covers one process, and
//! runs the same `search` and `step` in user space. The agent drives both through [`Backend`]: it
//! places tables, states each process's executable mappings, and drains events.

use std::time::Duration;

use windlass_schema::maps::{Location, Mapping};
use windlass_schema::{BuildId, StopReason, Table, UnsupportedReason};

use crate::alarm::Alarm;
use crate::audit::AuditedWalk;
use crate::proc_maps::Backing;

/// An executable mapping of a process, as a backend takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlacedMapping {
    /// First process address.
    pub start: u64,
    /// The rest; `generation` is the backend's to fill.
    pub mapping: Mapping,
}

/// One walked stack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// `CLOCK_MONOTONIC` in nanoseconds.
    pub time_ns: u64,
    /// Process.
    pub tgid: u32,
    /// Thread.
    pub tid: u32,
    /// CPU number.
    pub cpu: u32,
    /// What [`Backend::set_process`] returned for the mappings that the walk went by; 0 if it had none.
    pub generation: u32,
    /// Name of the thread.
    pub comm: String,
    /// Why the walk ended.
    pub stop: StopReason,
    /// If at a row that tables do not support: why not.
    pub unsupported: Option<UnsupportedReason>,
    /// User addresses, innermost first; see [`windlass_schema::maps::EXACT_ADDRESS`].
    pub user: Vec<u64>,
    /// Kernel addresses, innermost first: the first is exact, the others are return addresses.
    pub kernel: Vec<u64>,
}

/// The reason of code `code` for a walk that ended with `stop`.
pub(crate) fn unsupported_reason(stop: StopReason, code: u8) -> Option<UnsupportedReason> {
    if stop == StopReason::UnsupportedRule { UnsupportedReason::from_code(code) } else { None }
}

/// What the kernel says of what a process mapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MappedImage {
    /// GNU build-ID of the file; none for the vDSO.
    pub build_id: Option<BuildId>,
    /// Where in the file the mapping starts, in bytes.
    pub file_offset: u64,
    /// What is mapped.
    pub backing: Backing,
}

/// What a backend reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A stack.
    Sample(Sample),
    /// A walk to audit. Its sample comes on its own as well.
    Audit(Box<AuditedWalk>),
    /// A process started to run another executable: nothing known of its mappings holds.
    Exec {
        /// Process.
        tgid: u32,
        /// When: `CLOCK_MONOTONIC` in nanoseconds.
        time_ns: u64,
    },
    /// A process mapped executable memory, or made mapped memory executable.
    Mapped {
        /// Process.
        tgid: u32,
        /// First address of the mapping.
        start: u64,
        /// Its length in bytes.
        length: u64,
        /// Whether it is of a file.
        of_file: bool,
        /// The image, as far as the kernel says which it is.
        image: Option<Box<MappedImage>>,
        /// When: `CLOCK_MONOTONIC` in nanoseconds.
        time_ns: u64,
    },
    /// A process was forked and has the mappings that its parent had then.
    Forked {
        /// New process.
        tgid: u32,
        /// Its parent.
        parent: u32,
        /// When: `CLOCK_MONOTONIC` in nanoseconds.
        time_ns: u64,
    },
    /// The first thread of a process ended, and mostly the process with it; but other threads may go on.
    Exited {
        /// Process.
        tgid: u32,
    },
    /// Process events were lost that came after all before this one: what is known of processes may be wrong until
    /// `/proc` is read again.
    Lost {
        /// None that is newer was lost: `CLOCK_MONOTONIC` in nanoseconds.
        until_ns: u64,
    },
}

/// A table could not be placed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    /// The budget does not hold it beside those that are there.
    #[error(
        "unwind tables take {used_bytes} bytes of a budget of {budget_bytes}, {wanted_bytes} more do not fit"
    )]
    Budget {
        /// Taken so far.
        used_bytes: u64,
        /// The limit.
        budget_bytes: u64,
        /// What this table needs.
        wanted_bytes: u64,
    },
    /// The kernel refused a map operation.
    #[error("the kernel refused to store an unwind table: {0}")]
    Kernel(String),
}

/// What tables take of kernel memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableMemory {
    /// What the kernel charges for them.
    pub used_bytes: u64,
    /// The limit.
    pub budget_bytes: u64,
}

/// Takes samples. Methods are called from one thread.
pub trait Backend: Send {
    /// Makes a table available to walks; the location goes into [`Mapping::image`].
    fn place_table(&mut self, table: &Table<'_>) -> Result<Location, PlaceError>;

    /// How many of the placed tables `candidates` would have to go, from the first on, for `table` to fit; `None` if
    /// it would not even then.
    fn to_remove(&self, table: &Table<'_>, candidates: &[Location]) -> Option<usize>;

    /// Frees the places of tables that no process's mappings name any more. Returns when no walk reads them.
    fn remove_tables(&mut self, tables: &[Location]) -> Result<(), PlaceError>;

    /// Replaces all that is known of a process's executable mappings. `mappings` is sorted by start.
    /// Returns what samples that are walked by them carry as [`Sample::generation`]: one more than the
    /// last time, whatever the process, and never 0.
    fn set_process(&mut self, tgid: u32, mappings: &[PlacedMapping]) -> anyhow::Result<u32>;

    /// Forgets a process: walks of it stop with [`StopReason::ProcessUnknown`].
    fn remove_process(&mut self, tgid: u32);

    /// Hands all waiting events to `sink`; waits up to `timeout` for the first that cannot wait. Events come in the
    /// order of their times; a sample may come late, but after all process events that are older.
    fn poll(&mut self, timeout: Duration, sink: &mut dyn FnMut(Event)) -> anyhow::Result<()>;

    /// Has an alarm end waits in [`Backend::poll`], from now on. One that cannot be woken waits its time out.
    fn heed(&mut self, _alarm: &Alarm) {}

    /// Samples that were taken but lost on the way here (ring buffer full), since the start.
    fn lost_samples(&self) -> u64;

    /// Process events that were lost on the way here, since the start, as far as the kernel says how many.
    fn lost_process_events(&self) -> u64 {
        0
    }

    /// What tables take of kernel memory: nothing where they are not there.
    fn table_memory(&self) -> TableMemory {
        TableMemory::default()
    }

    /// Walks to audit that were lost on the way here, since the start.
    fn lost_audits(&self) -> u64 {
        0
    }
}
