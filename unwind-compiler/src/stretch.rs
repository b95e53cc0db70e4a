//! Rows that come from elsewhere than CFI, beside its FDEs.

use std::ops::Range;

use windlass_schema::Record;

use crate::chains::Step;

/// Most bytes of code that are taken together: a stretch that overlaps CFI is looked at row by row.
const MAX_STRETCH_BYTES: u64 = 1 << 16;

/// Rows that follow each other without a gap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stretch {
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// Bytes from the start on.
    pub(crate) steps: Vec<Step>,
}

impl Stretch {
    /// Appends a row to `stretches`, which end before it.
    pub(crate) fn append(stretches: &mut Vec<Self>, range: Range<u64>, record: Record) {
        match stretches.last_mut() {
            Some(last) if last.end == range.start && range.end - last.start < MAX_STRETCH_BYTES => {
                if last.steps.last().is_some_and(|step| step.record != record) {
                    last.steps.push(Step { at: (range.start - last.start) as u32, record });
                }
                last.end = range.end;
            }
            _ => stretches.push(Self {
                start: range.start,
                end: range.end,
                steps: vec![Step { at: 0, record }],
            }),
        }
    }
}
