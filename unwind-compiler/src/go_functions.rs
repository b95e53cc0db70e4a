//! The functions of a Go image, as rows beside those of its CFI.
//!
//! Go's `.debug_frame` says where the CFA is and nothing of rbp, so that C code below a Go frame cannot be walked by
//! it, and takes functions that switch stacks for others; and it is gone from stripped images. The function table is in each of them and says more.

use windlass_schema::{CfaRule, FramePointerRule, Record, ReturnAddressRule, Rule, UnsupportedReason};

use crate::elf::Image;
use crate::go::{GoRule, GoSkip, for_each_row};
use crate::stretch::Stretch;

/// What a Go image's function table says.
#[derive(Default)]
pub(crate) struct GoFunctions {
    /// In the order of their addresses.
    pub(crate) stretches: Vec<Stretch>,
    /// Functions whose description is malformed, in whole or from some address on.
    pub(crate) skipped: u64,
    /// Whether none of it could be read: it is of a version or an instruction set that is not known.
    pub(crate) is_unread: bool,
}

/// The functions of `image`; `None` if it is no Go image.
pub(crate) fn functions(image: &Image<'_>) -> Option<GoFunctions> {
    let table = image.go_table()?;
    let mut stretches = Vec::new();
    let visit = |range: std::ops::Range<u64>, rule: GoRule| {
        if image.reaches(&range) {
            Stretch::append(&mut stretches, range, record(rule));
        }
    };
    let unread = GoFunctions { is_unread: true, ..GoFunctions::default() };
    let Ok(read) = for_each_row(&table.image(), visit) else { return Some(unread) };
    // C code that was linked in among Go's has no depths, and no fault.
    let faults = read.skipped.iter().filter(|(reason, _)| **reason != GoSkip::NoDepths);
    let skipped = faults.map(|(_, functions)| functions).sum();
    Some(GoFunctions { stretches, skipped, is_unread: false })
}

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
