//! Where does a walk part from the CFI?
//!
//! # Why this shape
//! Steps are compared, not stacks: each goes by the row of the image that its frame lies in, and it is that image that a
//! counter must name. So each starts from what the kernel's walk itself found in the frame, and where that differs from
//! the CFI, the next starts from there again. A wrong frame pointer counts where it was taken, not where it
//! leads astray five frames later; and frames without CFI cost no more than themselves. Registers that the
//! kernel's walk does not keep are carried along from step to step as long as the two agree.

use gimli::Register;
use windlass_schema::maps::EXACT_ADDRESS;
use windlass_schema::record::{DWARF_RA, DWARF_RBP};

use super::cfi_step::{CfiFrame, Missing, caller};
use super::image_cfi::{ImageCfis, Row};
use super::report::Outcome;
use super::walk::{AuditedFrame, AuditedWalk, StackCopy};
use crate::process::{Content, ExecutableMapping, find, lookup_address};

/// What came of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Judged {
    pub(super) outcome: Outcome,
    /// Of one that disagrees.
    pub(super) difference: Option<Difference>,
}

/// What CFI says, as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Difference {
    /// The row.
    pub(super) row: String,
    /// Where it leads.
    pub(super) caller: String,
}

impl From<Outcome> for Judged {
    fn from(outcome: Outcome) -> Self {
        Self { outcome, difference: None }
    }
}

/// Compares each step of a walk.
pub(super) fn judge(
    walk: &AuditedWalk,
    mappings: &[ExecutableMapping],
    images: &mut ImageCfis,
) -> Vec<Judged> {
    let mut carried = None;
    let mut judged = Vec::with_capacity(walk.frames.len());
    for (number, found) in walk.frames.iter().enumerate() {
        let frame = match number {
            0 => innermost(walk, found),
            _ => carried.take().unwrap_or_else(|| of_walk(found)),
        };
        let next = walk.frames.get(number + 1);
        if next.is_none() && !walk.sample.stop.is_complete() {
            judged.push(Outcome::Stopped.into());
            break;
        }
        let at = lookup_address(found.address);
        let Some(Content::Image { image, bias, source }) = find(mappings, at).map(|mapping| &mapping.content)
        else {
            judged.push(Outcome::NoImage.into());
            continue;
        };
        let Some(cfi) = images.get(image.id.build_id(), source) else {
            judged.push(Outcome::Unreadable.into());
            continue;
        };
        let Some(row) = cfi.row(at.to_image(*bias)) else {
            judged.push(Outcome::NoCfi.into());
            continue;
        };
        let (step, caller) = judge_step(&frame, &row, &walk.stack, next);
        carried = caller.filter(|_| step.outcome == Outcome::Agrees);
        judged.push(step);
    }
    judged
}

fn innermost(walk: &AuditedWalk, found: &AuditedFrame) -> CfiFrame {
    CfiFrame { general: walk.general.map(Ok), ..of_walk(found) }
}

fn of_walk(found: &AuditedFrame) -> CfiFrame {
    let is_exact = found.address & EXACT_ADDRESS != 0;
    CfiFrame::of(found.address & !EXACT_ADDRESS, is_exact, found.rsp, found.rbp)
}

/// Compares where CFI leads with the frame that the walk went to, `None` if it ended.
fn judge_step(
    frame: &CfiFrame,
    row: &Row<'_>,
    stack: &StackCopy,
    next: Option<&AuditedFrame>,
) -> (Judged, Option<CfiFrame>) {
    let caller = match caller(frame, row, stack) {
        Ok(caller) => caller,
        Err(missing) => return (Outcome::from(missing).into(), None),
    };
    let outcome = match (&caller, next) {
        (None, None) => Outcome::Agrees,
        (Some(caller), Some(next)) => compare(caller, next),
        (Some(_), None) | (None, Some(_)) => Outcome::Disagrees,
    };
    let difference = (outcome == Outcome::Disagrees).then(|| Difference {
        row: show_row(row),
        caller: caller.as_ref().map_or_else(|| "no caller".to_owned(), show_frame),
    });
    (Judged { outcome, difference }, caller)
}

fn compare(by_cfi: &CfiFrame, found: &AuditedFrame) -> Outcome {
    // The top bit of a sample's address says how it is meant.
    let rip = by_cfi.rip & !EXACT_ADDRESS == found.address & !EXACT_ADDRESS;
    let is_exact = by_cfi.is_exact == (found.address & EXACT_ADDRESS != 0);
    let rsp = match by_cfi.rsp() {
        Ok(rsp) => rsp == found.rsp,
        Err(missing) => return missing.into(),
    };
    if !(rip && is_exact && rsp) {
        return Outcome::Disagrees;
    }
    match (found.rbp, by_cfi.rbp()) {
        // The walk does not say.
        (None, _) => Outcome::Agrees,
        (Some(found), Ok(rbp)) if found == rbp => Outcome::Agrees,
        // Or it says what cannot be known.
        (Some(_), Ok(_) | Err(Missing::Register)) => Outcome::Disagrees,
        (Some(_), Err(missing)) => missing.into(),
    }
}

fn show_row(row: &Row<'_>) -> String {
    let rule = |number: u8| row.row.register(Register(number.into()));
    let signal = if row.is_signal { ", signal frame" } else { "" };
    let (rip, rbp) = (rule(DWARF_RA), rule(DWARF_RBP));
    format!("cfa {:?}, rip {rip:?}, rbp {rbp:?}{signal}", row.row.cfa())
}

fn show_frame(frame: &CfiFrame) -> String {
    let value = |known| match known {
        Ok(value) => format!("{value:#x}"),
        Err(missing) => format!("{missing:?}").to_lowercase(),
    };
    let exact = if frame.is_exact { ", exact" } else { "" };
    format!("rip {:#x}, rsp {}, rbp {}{exact}", frame.rip, value(frame.rsp()), value(frame.rbp()))
}

#[cfg(test)]
mod tests {
    use gimli::BaseAddresses;
    use windlass_schema::ImageAddress;
    use windlass_schema::maps::AUDIT_PIECE_BYTES;
    use windlass_schema::record::REGISTERS;

    use super::super::image_cfi::ImageCfi;
    use super::*;

    /// Where the stack lies.
    const STACK: u64 = 0x7000;
    const RSP: u64 = STACK + 16;
    const RBP: u64 = STACK + 0x100;

    /// A section with one FDE, for 0x1000 to 0x1100.
    fn cfi(instructions: &[u8]) -> ImageCfi {
        let mut section = Vec::new();
        let mut entry = |parts: &[&[u8]]| {
            let body = parts.concat();
            let padded = body.len().next_multiple_of(4);
            section.extend((padded as u32).to_le_bytes());
            section.extend(&body);
            section.resize(section.len() + padded - body.len(), 0);
        };
        // Version 1, no augmentation, code 1, data -8, return address in 16; cfa = rsp + 8, rip at cfa - 8.
        entry(&[&[0; 4], &[1, 0, 1, 0x78, 16], &[0x0c, 7, 8, 0x90, 1]]);
        let (start, length) = (0x1000u64.to_le_bytes(), 0x100u64.to_le_bytes());
        entry(&[&24u32.to_le_bytes(), &start, &length, instructions]);
        ImageCfi::new(section, BaseAddresses::default())
    }

    /// A page in which the word at `STACK + 8 * n` is `0x4000 + n`.
    fn stack() -> StackCopy {
        let words = (0..AUDIT_PIECE_BYTES as u64 / 8).flat_map(|number| (0x4000 + number).to_ne_bytes());
        let bytes: Vec<u8> = words.collect();
        StackCopy::of_pieces([(STACK, &bytes[..])].into_iter())
    }

    #[track_caller]
    fn check(instructions: &[u8], next: Option<AuditedFrame>, expect: Outcome) {
        let mut cfi = cfi(instructions);
        let row = cfi.row(ImageAddress::new(0x1080)).expect("covered");
        let mut frame = CfiFrame { general: [Ok(1); REGISTERS], ..CfiFrame::of(0x1080, true, RSP, None) };
        (frame.general[6], frame.general[7]) = (Ok(RBP), Ok(RSP));
        let (judged, _) = judge_step(&frame, &row, &stack(), next.as_ref());
        assert_eq!(judged.outcome, expect, "{judged:?}");
        assert_eq!(judged.difference.is_some(), expect == Outcome::Disagrees);
    }

    fn found(address: u64, rsp: u64, rbp: Option<u64>) -> Option<AuditedFrame> {
        Some(AuditedFrame { address, rsp, rbp })
    }

    #[test]
    fn every_value_of_a_frame_counts() {
        let (rip, rsp) = (0x4002, RSP + 8);
        check(&[], found(rip, rsp, Some(RBP)), Outcome::Agrees);
        check(&[], found(rip, rsp, None), Outcome::Agrees);
        check(&[], found(rip + 1, rsp, Some(RBP)), Outcome::Disagrees);
        check(&[], found(rip, rsp + 8, Some(RBP)), Outcome::Disagrees);
        check(&[], found(rip, rsp, Some(RBP + 8)), Outcome::Disagrees);
        check(&[], found(rip | EXACT_ADDRESS, rsp, Some(RBP)), Outcome::Disagrees);
        check(&[], None, Outcome::Disagrees);
    }

    #[test]
    fn what_cfi_says_of_the_frame_pointer() {
        // def_cfa_offset 16; offset rbp, cfa - 16.
        let saved = [0x0e, 16, 0x86, 2];
        check(&saved, found(0x4003, RSP + 16, Some(0x4002)), Outcome::Agrees);
        check(&saved, found(0x4003, RSP + 16, Some(RBP)), Outcome::Disagrees);
        // undefined rbp: a walk that claims to know it does not.
        check(&[0x07, 6], found(0x4002, RSP + 8, Some(RBP)), Outcome::Disagrees);
        check(&[0x07, 6], found(0x4002, RSP + 8, None), Outcome::Agrees);
    }

    #[test]
    fn the_end_of_a_stack_is_said_by_cfi_too() {
        // undefined rip
        check(&[0x07, 16], None, Outcome::Agrees);
        check(&[0x07, 16], found(0x4002, RSP + 8, Some(RBP)), Outcome::Disagrees);
    }

    #[test]
    fn what_cannot_be_had_is_not_compared() {
        // def_cfa_offset 8192: the next page.
        check(&[0x0e, 0x80, 0x40], found(0x4002, RSP + 8, Some(RBP)), Outcome::NotCaptured);
        // rbp saved there, rip not.
        let beyond = [0x11, 6, 0x80, 0x79];
        check(&beyond, found(0x4002, RSP + 8, Some(RBP)), Outcome::NotCaptured);
        check(&beyond, found(0x4002, RSP + 8, None), Outcome::Agrees);
        // cfa = r20 + 8, which there is not.
        check(&[0x0c, 20, 8], found(0x4002, RSP + 8, Some(RBP)), Outcome::Rule);
    }

    #[test]
    fn an_address_outside_of_every_fde_has_no_row() {
        let mut cfi = cfi(&[]);
        let mut has_row = |address| cfi.row(ImageAddress::new(address)).is_some();
        assert!(has_row(0x1000) && has_row(0x10ff));
        assert!(!has_row(0xfff) && !has_row(0x1100) && !has_row(0) && !has_row(u64::MAX));
    }
}
