//! The functions of a Go image, as rows beside those of its CFI.
//!
//! Go's `.debug_frame` says where the CFA is and nothing of rbp, so that C code below a Go frame cannot be walked by
//! it; and it is gone from stripped images. The function table is in each of them and says more.

use windlass_schema::{CfaRule, FramePointerRule, Record, ReturnAddressRule, Rule, UnsupportedReason};

use crate::elf::Image;
use crate::go::{GoRule, for_each_row};
use crate::stretch::Stretch;

/// The functions of `image`, in the order of their addresses: none if it is no Go image, or if its table
/// is of a version that is not known.
pub(crate) fn functions(image: &Image<'_>) -> Vec<Stretch> {
    let Some(table) = image.go_table() else { return Vec::new() };
    let mut functions = Vec::new();
    let visit = |range: std::ops::Range<u64>, rule: GoRule| {
        if !image.reaches(&range) {
            return;
        }
        Stretch::append(&mut functions, range, record(rule));
    };
    match for_each_row(&table.image(), visit) {
        Ok(_) => functions,
        Err(_) => Vec::new(),
    }
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
