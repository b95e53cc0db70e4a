//! What became of an image's call frame information: how much is exact, what is not, and why.
//!
//! Peers report success or failure for a file, and count rows; a rule in a hundred thousand that is missing
//! can still be where a program spends its time. So the report weighs rows and bytes of code, and
//! names each FDE that was skipped, up to a limit, with its place.

use std::collections::BTreeMap;

use windlass_schema::record::kind;
use windlass_schema::{ImageAddress, Record, UnsupportedReason};

use crate::go_functions::GoFunctions;
use crate::placement::Placement;
use crate::uncovered::Uncovered;

/// Most skipped FDEs that a report names; all are counted.
pub const MAX_SKIPPED_LISTED: usize = 100;

/// Why an FDE, or a section of them, gave no rows, or not all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SkipReason {
    /// The entry, or the section, reaches past the end of the data.
    Truncated,
    /// Its CIE is missing, malformed, or of unreasonable size.
    Cie,
    /// A relocation of it cannot be applied, or the one that gives its address is missing: in a file that is not
    /// linked.
    Relocation,
    /// Its own header is malformed.
    Header,
    /// Its instructions are malformed: rows before the fault stand, addresses behind it are unsupported.
    Instructions,
    /// It covers no byte.
    Empty,
    /// Its end wraps around the address space.
    AddressOverflow,
    /// It covers address 0 of an image without code there: what a linker leaves of a discarded function.
    Tombstone,
    /// It covers addresses that the image does not load, or that a table does not reach.
    OutsideImage,
    /// Headers say that there is a section, but its bytes cannot be found or decompressed.
    Unreadable,
    /// The section shares bytes of the file with another one, which is read.
    SectionOverlap,
    /// The image has more sections, or they hold more bytes, than are read for a file of its size.
    SectionLimit,
    /// Go's function table is of a version or an instruction set that is not known. Counts once.
    GoTable,
    /// The description of a Go function is malformed: rows before the fault stand.
    GoFunction,
}

impl SkipReason {
    /// The name used in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Truncated => "truncated",
            Self::Cie => "cie",
            Self::Relocation => "relocation",
            Self::Header => "header",
            Self::Instructions => "instructions",
            Self::Empty => "empty",
            Self::AddressOverflow => "address_overflow",
            Self::Tombstone => "tombstone",
            Self::OutsideImage => "outside_image",
            Self::Unreadable => "unreadable",
            Self::SectionOverlap => "section_overlap",
            Self::SectionLimit => "section_limit",
            Self::GoTable => "go_table",
            Self::GoFunction => "go_function",
        }
    }
}

/// An FDE that gave no rows, or not all of them; or a section of which no FDE was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SkippedFde {
    /// Offset of the entry in its `.eh_frame` section; 0 for a section.
    pub offset: u64,
    /// First address that it covers, where known; for a section its own.
    pub address: Option<ImageAddress>,
    /// Why.
    pub reason: SkipReason,
}

/// What code is that has rows without CFI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RecognisedKind {
    /// Where the process starts, up to its call.
    ProcessEntry,
    /// A procedure linkage table.
    LinkageTable,
    /// What a signal handler returns to.
    SignalTrampoline,
    /// What a coroutine's function returns to, where no caller is.
    CoroutineEnd,
    /// A function all of whose instructions were followed.
    Function,
}

impl RecognisedKind {
    /// The name used in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ProcessEntry => "process_entry",
            Self::LinkageTable => "linkage_table",
            Self::SignalTrampoline => "signal_trampoline",
            Self::CoroutineEnd => "coroutine_end",
            Self::Function => "function",
        }
    }
}

/// What became of an image's call frame information.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// FDEs that gave rows.
    pub fdes: u64,
    /// Stretches of Go functions that gave rows.
    pub go_functions: u64,
    /// Rows of these FDEs, one for each address at which any register's rule may change.
    pub cfi_rows: u64,
    /// Rows of the table: changes of (CFA, return address, frame pointer), ends of coverage included.
    pub rows: u64,
    /// Size of `.eh_frame` in bytes, as far as it was read.
    pub eh_frame_bytes: u64,
    /// Bytes of code that FDEs cover.
    pub code_bytes: u64,
    /// Bytes of code that nothing covers, but for stretches of nothing but padding. One of less than 16 bytes that
    /// ends at a multiple of 16 is taken for padding unseen: the few functions in such are neither recognised nor
    /// counted.
    pub uncovered_code_bytes: u64,
    /// How many of them have exact rows by what the code does.
    pub recognised_bytes: BTreeMap<RecognisedKind, u64>,
    /// How many of them can be walked by frame pointers only.
    pub frame_pointer_code_bytes: u64,
    /// Rows that are exact, ends of coverage included: all but the unsupported ones.
    pub exact_rows: u64,
    /// Bytes of code that FDEs cover under exact rows.
    pub exact_code_bytes: u64,
    /// Rows without an exact rule, by reason.
    pub unsupported: BTreeMap<UnsupportedReason, u64>,
    /// FDEs skipped, by reason. A section that is not read counts once.
    pub skipped_fdes: BTreeMap<SkipReason, u64>,
    /// The first [`MAX_SKIPPED_LISTED`] of them.
    pub skipped: Vec<SkippedFde>,
}

impl Report {
    /// Counts a skipped FDE.
    pub(crate) fn skip(&mut self, skipped: SkippedFde) {
        *self.skipped_fdes.entry(skipped.reason).or_default() += 1;
        if self.skipped.len() < MAX_SKIPPED_LISTED {
            self.skipped.push(skipped);
        }
    }

    /// Whether all call frame information there is was read: what is skipped otherwise has nothing to say of code.
    pub(crate) fn is_whole(&self) -> bool {
        self.skipped_fdes.keys().all(|reason| match reason {
            SkipReason::Instructions
            | SkipReason::Empty
            | SkipReason::AddressOverflow
            | SkipReason::Tombstone
            | SkipReason::OutsideImage => true,
            SkipReason::Truncated
            | SkipReason::Cie
            | SkipReason::Relocation
            | SkipReason::Header
            | SkipReason::Unreadable
            | SkipReason::SectionOverlap
            | SkipReason::SectionLimit
            | SkipReason::GoTable
            | SkipReason::GoFunction => false,
        })
    }

    /// Counts what is known of code without CFI.
    pub(crate) fn count_uncovered(&mut self, uncovered: &Uncovered) {
        self.uncovered_code_bytes = uncovered.bytes;
        self.frame_pointer_code_bytes = uncovered.frame_pointer_bytes();
        for (kind, bytes) in uncovered.recognised_bytes() {
            *self.recognised_bytes.entry(kind).or_default() += bytes;
        }
    }

    /// Counts what a Go image's function table gave.
    pub(crate) fn count_go(&mut self, go: &GoFunctions) {
        self.go_functions = go.stretches.len() as u64;
        if go.is_unread {
            self.skip(SkippedFde { offset: 0, address: None, reason: SkipReason::GoTable });
        }
        if go.skipped > 0 {
            *self.skipped_fdes.entry(SkipReason::GoFunction).or_default() += go.skipped;
        }
    }

    /// Counts the rows of the table, `code_bytes` being known.
    pub(crate) fn count_rows(&mut self, placement: &Placement) {
        self.rows = placement.rows;
        let reasons: Vec<bool> = (0..placement.chains.len())
            .map(|chain| {
                placement.chains.steps(chain as u32).iter().any(|step| reason(step.record).is_some())
            })
            .collect();
        let mut unsupported_bytes = 0;
        let mut state = Record::NO_CFI;
        for (index, placed) in placement.placed.iter().enumerate() {
            let steps = placement.chains.steps(placed.chain);
            if reasons[placed.chain as usize] {
                let next = placement.placed.get(index + 1).map_or(placed.offset, |next| next.offset);
                let ends = steps.iter().skip(1).map(|step| placed.offset + step.at).chain([next]);
                for (step, end) in steps.iter().zip(ends) {
                    if let Some(reason) = reason(step.record) {
                        // Those are in code that no FDE covers.
                        if reason != UnsupportedReason::FramePointersOnly {
                            unsupported_bytes += u64::from(end - (placed.offset + step.at));
                        }
                        *self.unsupported.entry(reason).or_default() += u64::from(step.record != state);
                    }
                    state = step.record;
                }
            }
            state = steps[steps.len() - 1].record;
        }
        self.exact_rows = self.rows - self.unsupported.values().sum::<u64>();
        self.exact_code_bytes = self.code_bytes.saturating_sub(unsupported_bytes);
    }
}

/// Why a record is not exact.
fn reason(record: Record) -> Option<UnsupportedReason> {
    let code = record.aux();
    (record.kind() == kind::UNSUPPORTED)
        .then(|| UnsupportedReason::ALL.iter().copied().find(|reason| *reason as u8 == code))
        .flatten()
}
