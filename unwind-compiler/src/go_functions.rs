//! The functions of a Go image, as rows beside those of its CFI.
//!
//! Go's `.debug_frame` says where the CFA is and nothing of rbp, so that C code below a Go frame cannot be walked by
//! it; and it is gone from stripped images. The function table is in each of them and says more.

use windlass_schema::{CfaRule, FramePointerRule, Record, ReturnAddressRule, Rule, UnsupportedReason};

use crate::chains::Step;
use crate::elf::Image;
use crate::go::{GoRule, for_each_row};

/// Rows that follow each other without a gap.
pub(crate) struct GoFunction {
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// Bytes from the start on.
    pub(crate) steps: Vec<Step>,
}

/// The functions of `image`, in the order of their addresses: none if it is no Go image, or if its table
/// is of a version that is not known.
pub(crate) fn functions(image: &Image<'_>) -> Vec<GoFunction> {
    let Some(table) = image.go_table() else { return Vec::new() };
    let mut functions: Vec<GoFunction> = Vec::new();
    let visit = |range: std::ops::Range<u64>, rule: GoRule| {
        if !image.reaches(&range) {
            return;
        }
        let record = record(rule);
        match functions.last_mut() {
            Some(last) if last.end == range.start && range.end - last.start < MAX_STRETCH => {
                if last.steps.last().is_some_and(|step| step.record != record) {
                    last.steps.push(Step { at: (range.start - last.start) as u32, record });
                }
                last.end = range.end;
            }
            _ => functions.push(GoFunction {
                start: range.start,
                end: range.end,
                steps: vec![Step { at: 0, record }],
            }),
        }
    };
    match for_each_row(&table.image(), visit) {
        Ok(_) => functions,
        Err(_) => Vec::new(),
    }
}

/// Most bytes of code that are taken together: a stretch that overlaps CFI is looked at row by row.
const MAX_STRETCH: u64 = 1 << 16;

fn record(rule: GoRule) -> Record {
    let saved = FramePointerRule::AtCfa(-16);
    let frame =
        |cfa, frame_pointer| Rule::Frame { cfa, return_address: ReturnAddressRule::AtCfa(-8), frame_pointer };
    match rule {
        GoRule::Rule(rule) => rule.to_record(),
        // The caller's address is exact, which no record says.
        GoRule::Interrupted(_) => Record::unsupported(UnsupportedReason::SignalFrame),
        GoRule::SavedDepth { g, depth, cfa, frame_pointer } => match i8::try_from(cfa / 8) {
            Ok(words) if cfa % 8 == 0 => {
                frame(CfaRule::GoStack { g, depth, words }, frame_pointer).to_record()
            }
            _ => Record::unsupported(UnsupportedReason::CfaOffset),
        },
        GoRule::OtherStack => frame(CfaRule::OtherStack(16), saved).to_record(),
    }
}
