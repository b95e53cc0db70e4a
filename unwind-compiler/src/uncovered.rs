//! What is known of an image's code that neither CFI nor Go's table covers, as rows beside those that do.
//!
//! # Why this shape
//! Nearly all that is left over aligns the next function, and most of it is known for that by its place: a stretch of
//! less than 16 bytes up to a multiple of 16 is taken for padding without a look at its bytes. A function without CFI
//! that fits in there is missed, and its bytes are not counted.

use std::ops::Range;

use windlass_schema::coroutines::{LIBC, MAKECONTEXT};
use windlass_schema::{Architecture, Record, Rule, UnsupportedReason};

use crate::code_bytes::CodeBytes;
use crate::elf::Image;
use crate::frame_pointers::exceptions;
use crate::framed_code::framed_code;
use crate::projection::SIGCONTEXT_OFFSET;
use crate::recognise::{Known, Recognised, Starts, is_padding, known, recognise};
use crate::report::RecognisedKind;
use crate::stretch::Stretch;
use crate::{aarch64, x86_64};

/// For how many bytes of code an image may have one under CFI and still count as one without: what linkers and
/// start files bring has some.
const CODE_BYTES_PER_COVERED: u64 = 10;

/// What is known of code without CFI.
#[derive(Default)]
pub(crate) struct Uncovered {
    /// Bytes of code without CFI, but for padding.
    pub(crate) bytes: u64,
    /// What is recognised, in the order of addresses.
    pub(crate) recognised: Vec<Recognised>,
    /// The rest, if it keeps frame pointers and is most of the image.
    pub(crate) frame_pointers_only: Vec<Range<u64>>,
}

impl Uncovered {
    /// Of `image`, whose code `covered`, sorted by start, covers; what signal handlers return to ends at `trampolines`, sorted
    /// too. Where there is only padding left, nothing else is looked at.
    pub(crate) fn of(
        image: &Image<'_>,
        covered: impl IntoIterator<Item = Range<u64>>,
        trampolines: &[u64],
    ) -> Self {
        let code = image.code_bytes();
        let coroutine_end = coroutine_end(image, &code);
        let (mut gaps, mut in_padding) = (Vec::new(), Vec::new());
        let mut all_bytes = 0;
        code.gaps(covered, |gap| {
            all_bytes += gap.end - gap.start;
            if Some(gap.end) == coroutine_end
                && code.get(&gap).is_some()
                && is_padding(image.architecture, &code, &gap)
            {
                let kind = RecognisedKind::CoroutineEnd;
                in_padding.push(Recognised { range: gap.end - 1..gap.end, rule: Rule::End, kind });
            } else if aligns(&gap) && trampolines.binary_search(&gap.start).is_ok() {
                in_padding.push(behind_trampoline(gap.start));
            } else if !aligns(&gap) && !is_padding(image.architecture, &code, &gap) {
                gaps.push(gap);
            }
        });
        if gaps.is_empty() {
            let bytes = in_padding.len() as u64;
            return Self { bytes, recognised: in_padding, ..Self::default() };
        }
        let mut starts = image.starts(&gaps);
        // Of wide code as well: a process may start there, and signal handlers return there.
        let known = known(image.architecture, &code, &gaps, &starts);
        starts.called.extend(&known.called);
        let mut framed = Framed::default();
        gaps.retain(|gap| !framed.take(image.architecture, &code, gap, &starts, &known));
        let mut recognised = recognise(image.architecture, &code, &gaps, &starts, &known);
        let mut frame_pointers_only = framed.rest;
        let covered_bytes = code.len() - all_bytes;
        if covered_bytes.saturating_mul(CODE_BYTES_PER_COVERED) <= code.len()
            && let Some(exceptions) = exceptions(image.architecture, &code, &gaps, &starts)
        {
            frame_pointers_only.extend(without(&rest(&gaps, &recognised), exceptions.into_iter()));
        }
        let bytes = bytes_of(&gaps) + framed.bytes + in_padding.len() as u64;
        recognised.extend(framed.recognised);
        recognised.extend(in_padding);
        recognised.sort_unstable_by_key(|one| one.range.start);
        frame_pointers_only.sort_unstable_by_key(|range| range.start);
        Self { bytes, recognised, frame_pointers_only }
    }

    /// Rows for a table.
    pub(crate) fn stretches(&self) -> Vec<Stretch> {
        let by_frame_pointers = Record::unsupported(UnsupportedReason::FramePointersOnly);
        let recognised = self.recognised.iter().map(|one| (one.range.clone(), one.rule.to_record()));
        let rest = self.frame_pointers_only.iter().map(|range| (range.clone(), by_frame_pointers));
        let mut rows: Vec<_> = recognised.chain(rest).collect();
        rows.sort_by_key(|(range, _)| range.start);
        let mut stretches = Vec::new();
        rows.into_iter().for_each(|(range, record)| Stretch::append(&mut stretches, range, record));
        stretches
    }

    /// How many bytes are recognised, by what they are.
    pub(crate) fn recognised_bytes(&self) -> impl Iterator<Item = (RecognisedKind, u64)> + '_ {
        self.recognised.iter().map(|one| (one.kind, one.range.end - one.range.start))
    }

    /// How many bytes can be walked by frame pointers only.
    pub(crate) fn frame_pointer_bytes(&self) -> u64 {
        bytes_of(&self.frame_pointers_only)
    }
}

/// Wide code that keeps frame pointers, whatever else the image has.
#[derive(Default)]
struct Framed {
    bytes: u64,
    recognised: Vec<Recognised>,
    /// What of it can be walked by frame pointers only.
    rest: Vec<Range<u64>>,
}

impl Framed {
    /// Takes `gap`, if it is such code.
    fn take(
        &mut self,
        architecture: Architecture,
        code: &CodeBytes<'_>,
        gap: &Range<u64>,
        starts: &Starts,
        known: &Known,
    ) -> bool {
        let found = match architecture {
            Architecture::X86_64 => framed_code::<x86_64::code::Machine>(code, gap, starts),
            Architecture::Aarch64 => framed_code::<aarch64::code::Machine>(code, gap, starts),
        };
        let Some(found) = found else { return false };
        let first = known.found.partition_point(|one| one.range.start < gap.start);
        let len = known.found[first..].partition_point(|one| one.range.start < gap.end);
        let found = beside(&known.found[first..first + len], found);
        self.bytes += gap.end - gap.start;
        self.rest.extend(rest(std::slice::from_ref(gap), &found));
        self.recognised.extend(found);
        true
    }
}

/// `known`, and what of `found` is none of it. All are sorted and disjoint.
fn beside(known: &[Recognised], found: Vec<Recognised>) -> Vec<Recognised> {
    let mut all = known.to_vec();
    for one in found {
        let gap = std::slice::from_ref(&one.range);
        let first = known.partition_point(|known| known.range.end <= one.range.start);
        all.extend(rest(gap, &known[first..]).into_iter().map(|range| Recognised { range, ..one.clone() }));
    }
    all.sort_unstable_by_key(|one| one.range.start);
    all
}

/// Where the functions of libc's coroutines return to. CFI may cover it, but no call is in front of it, so that it is looked up in the
/// padding there.
fn coroutine_end(image: &Image<'_>, code: &CodeBytes<'_>) -> Option<u64> {
    match image.architecture {
        Architecture::X86_64 => x86_64::returned_to(code, &image.dynamic_function(LIBC, MAKECONTEXT)?),
        Architecture::Aarch64 => None,
    }
}

/// The padding behind what signal handlers return to: a thread is there while its system call, the last instruction, puts the
/// registers back, and nowhere else, for that call does not return. Up to then rsp is as in front of it (`rt_sigreturn`,
/// arch/x86/kernel/signal_64.c), but between two stores of `restore_sigcontext`, one of rsp and one of the address: less than a
/// nanosecond, of some hundreds that the call takes.
fn behind_trampoline(end: u64) -> Recognised {
    let (rule, kind) = (Rule::Signal(SIGCONTEXT_OFFSET), RecognisedKind::SignalTrampoline);
    Recognised { range: end..end + 1, rule, kind }
}

/// What compilers align functions to.
const FUNCTION_ALIGNMENT: u64 = 16;

/// Whether a gap is what is left to the next function's alignment. Most are, and are not even looked at: bytes of code
/// all over the image would have to come to the processor.
fn aligns(gap: &Range<u64>) -> bool {
    gap.end.is_multiple_of(FUNCTION_ALIGNMENT) && gap.start > gap.end - FUNCTION_ALIGNMENT
}

fn bytes_of(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

/// What of `gaps` is not recognised.
fn rest(gaps: &[Range<u64>], recognised: &[Recognised]) -> Vec<Range<u64>> {
    without(gaps, recognised.iter().map(|one| one.range.clone()))
}

/// What of `ranges` is none of `taken`. All are sorted and disjoint.
fn without(ranges: &[Range<u64>], taken: impl Iterator<Item = Range<u64>>) -> Vec<Range<u64>> {
    let mut taken = taken.peekable();
    let mut rest = Vec::new();
    for range in ranges {
        let mut at = range.start;
        while let Some(one) = taken.peek().filter(|one| one.start < range.end).cloned() {
            if at < one.start {
                rest.push(at..one.start);
            }
            at = at.max(one.end);
            // It may reach into the next one.
            if one.end > range.end {
                break;
            }
            taken.next();
        }
        if at < range.end {
            rest.push(at..range.end);
        }
    }
    rest
}
