//! Code that no CFI covers, recognised from its bytes: exactly, or not at all.
//!
//! # Why this shape
//! Every image has some: what starts the process and ends it, linkage tables, trampolines of signals, functions of
//! the C runtime's start files, and whole C libraries. A stack that ends there is cut short, and unwinders guess: they
//! take the frame pointer, or the last function's rule. Here a rule is stated where the instructions leave no
//! other, and only in gaps, so that what CFI says stays. What is recognised:
//!
//! 1. the process entry: up to its call, there is no caller; what it calls, and what it hands over, are functions; of a
//!    dynamic linker, up to its jump to the program's
//! 2. linkage tables: [`Code::linkage`]
//! 3. trampolines of signals: [`Code::trampoline`]
//! 4. what a coroutine's function returns to: [`Code::coroutine_end`]; it is behind padding, of which no call is a part
//! 5. functions all of whose ways can be followed; see [`function_set`](crate::function_set)
//!
//! Where an image has no bytes of its code, there is nothing to recognise. A skeleton has those that no CFI covers.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::marker::PhantomData;
use std::ops::Range;

use windlass_schema::{Architecture, Rule};

use crate::code_bytes::CodeBytes;
use crate::function_set::Functions;
use crate::function_walk::Frames;
use crate::report::RecognisedKind;
use crate::{aarch64, x86_64};

/// Code that is known by its bytes.
pub(crate) trait Code: Frames {
    const ARCHITECTURE: Architecture;

    /// What addresses of instructions are multiples of.
    const ALIGNMENT: u64;

    /// Bytes of a direct call.
    const CALL_BYTES: usize;

    /// Bytes of the instruction of padding that `code` begins with, if it does.
    fn padding(code: &[u8]) -> Option<usize>;

    /// Bytes of a process entry up to its call, if `code` begins with one.
    fn process_entry(code: &[u8]) -> Option<usize>;

    /// Bytes of the entry of a dynamic linker, if `code` begins with one: it has no caller, and leaves for that of the
    /// program.
    fn linker_entry(_code: &[u8]) -> Option<usize> {
        None
    }

    /// The function whose address a process entry, `entry` up to behind its call, at `address`, hands to what it
    /// calls, if it does so: a program's `main`.
    fn handed_over(_entry: &[u8], _address: u64) -> Option<u64> {
        None
    }

    /// The trampoline that stands at `at` in `code`, which is `address`. The image's code begins at `first_code`.
    fn trampoline(code: &[u8], at: usize, first_code: u64, address: u64) -> Option<Trampoline>;

    /// Bytes of what a coroutine's function returns to, if `code` begins with that: there is no caller.
    fn coroutine_end(_code: &[u8]) -> Option<usize> {
        None
    }

    /// How the function starts that `code` begins with.
    fn prologue(code: &[u8]) -> Prologue;

    /// The run of entries of a linkage table that `code` begins with, at `address`. With `is_section`, `code` is a
    /// whole section.
    fn linkage(code: &[u8], address: u64, is_section: bool) -> Option<Linkage>;

    /// Whether code behind `before` is behind padding that only stands between functions.
    fn is_padded(before: &[u8]) -> bool;

    /// Where a direct call leads that `code` begins with, at `address`.
    fn call(code: &[u8], address: u64) -> Option<u64>;
}

/// The trampoline of a signal handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Trampoline {
    /// Bytes in front of its instructions that are a part of it.
    pub(crate) before: usize,
    /// Bytes of its instructions.
    pub(crate) bytes: usize,
    pub(crate) rule: Rule,
}

/// Entries of a linkage table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Linkage {
    pub(crate) bytes: usize,
    /// By their offsets.
    pub(crate) rows: Vec<(usize, Rule)>,
}

/// How a function starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Prologue {
    /// It establishes the frame pointer.
    FramePointer,
    /// It builds a frame without.
    Other,
    /// There is no telling.
    Unknown,
}

/// Where code starts for certain.
#[derive(Clone, Debug, Default)]
pub(crate) struct Starts {
    /// Of the process.
    pub(crate) process: u64,
    /// Functions, and where they end, if known: what calls them is not seen, only that they are to be called.
    pub(crate) called: BTreeSet<u64>,
    /// Symbols of functions, and where they end, if known. Parts of functions have some as well.
    pub(crate) symbols: BTreeMap<u64, u64>,
    /// Those of `symbols` that other files may call.
    pub(crate) global: BTreeSet<u64>,
}

/// Code that is recognised, and the rule that holds there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Recognised {
    pub(crate) range: Range<u64>,
    pub(crate) rule: Rule,
    pub(crate) kind: RecognisedKind,
}

/// Whether there is nothing but padding in `gap`, which nothing runs.
pub(crate) fn is_padding(architecture: Architecture, code: &CodeBytes<'_>, gap: &Range<u64>) -> bool {
    let padding = match architecture {
        Architecture::X86_64 => x86_64::code::Machine::padding,
        Architecture::Aarch64 => aarch64::code::Machine::padding,
    };
    let mut rest = code.get(gap).unwrap_or_default();
    while let Some(bytes) = padding(rest) {
        rest = &rest[bytes..];
    }
    rest.is_empty()
}

/// What is known by its bytes alone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Known {
    /// In the order of addresses, disjoint, within the gaps.
    pub(crate) found: Vec<Recognised>,
    /// What the process entry calls and hands over.
    pub(crate) called: Vec<u64>,
}

/// What is known by its bytes in `gaps`, which are sorted and disjoint, each within a piece of `code`.
pub(crate) fn known(
    architecture: Architecture,
    code: &CodeBytes<'_>,
    gaps: &[Range<u64>],
    starts: &Starts,
) -> Known {
    match architecture {
        Architecture::X86_64 => by_bytes::<x86_64::code::Machine>(code, gaps, starts),
        Architecture::Aarch64 => by_bytes::<aarch64::code::Machine>(code, gaps, starts),
    }
}

/// What is recognised in `gaps`, some of those that `known` is of: in the order of addresses, disjoint, within the gaps.
pub(crate) fn recognise(
    architecture: Architecture,
    code: &CodeBytes<'_>,
    gaps: &[Range<u64>],
    starts: &Starts,
    known: &Known,
) -> Vec<Recognised> {
    let mut found = match architecture {
        Architecture::X86_64 => recognised::<x86_64::code::Machine>(code, gaps, starts, known),
        Architecture::Aarch64 => recognised::<aarch64::code::Machine>(code, gaps, starts, known),
    };
    found.retain(|one| is_stated(architecture, one.rule));
    found.sort_unstable_by_key(|one| one.range.start);
    found
}

/// Whether a record says that rule, and exactly.
fn is_stated(architecture: Architecture, rule: Rule) -> bool {
    Rule::of_record(rule.to_record(), architecture) == Ok(rule) && rule.is_exact()
}

fn by_bytes<C: Code>(code: &CodeBytes<'_>, gaps: &[Range<u64>], starts: &Starts) -> Known {
    let mut scan =
        Scan::<C> { code, starts, found: Vec::new(), called: Vec::new(), architecture: PhantomData };
    for gap in gaps {
        if let Some(bytes) = code.get(gap) {
            scan.gap(gap, bytes);
        }
    }
    let Scan { mut found, mut called, .. } = scan;
    // CFI may cover it, and not what it hands over: Rust's `main` with panic=abort.
    if let Some(entry) = code.from(starts.process)
        && let Some(length) = C::process_entry(entry)
    {
        called.extend(C::handed_over(&entry[..length], starts.process));
    }
    found.retain(|one| is_stated(C::ARCHITECTURE, one.rule));
    Known { found, called }
}

fn recognised<C: Code>(
    code: &CodeBytes<'_>,
    gaps: &[Range<u64>],
    starts: &Starts,
    known: &Known,
) -> Vec<Recognised> {
    let mut found = Vec::new();
    let mut open = Vec::new();
    for gap in gaps.iter().filter(|gap| code.get(gap).is_some()) {
        let first = known.found.partition_point(|one| one.range.start < gap.start);
        let within = known.found[first..].iter().take_while(|one| one.range.start < gap.end);
        let mut at = gap.start;
        for taken in within {
            open.extend((at < taken.range.start).then_some(at..taken.range.start));
            at = taken.range.end;
            found.push(taken.clone());
        }
        open.extend((at < gap.end).then_some(at..gap.end));
    }
    let is_linkage = |one: &&Recognised| one.kind == RecognisedKind::LinkageTable;
    let linkage = known.found.iter().filter(is_linkage).map(|one| one.range.clone()).collect();
    let followed = Functions::<C>::new(code, &open, starts, linkage).follow(known.called.clone());
    let kind = RecognisedKind::Function;
    found.reserve_exact(followed.size_hint().1.unwrap_or(0));
    found.extend(followed.map(|(range, rule)| Recognised { range, rule, kind }));
    found
}

/// A look for what is known by its bytes.
struct Scan<'s, 'a, C> {
    code: &'s CodeBytes<'a>,
    starts: &'s Starts,
    found: Vec<Recognised>,
    /// What the process entry calls.
    called: Vec<u64>,
    architecture: PhantomData<C>,
}

impl<C: Code> Scan<'_, '_, C> {
    /// Looks at each instruction of a gap.
    fn gap(&mut self, gap: &Range<u64>, bytes: &[u8]) {
        let is_section = self.code.is_section(gap);
        let first_code = self.code.start().unwrap_or(0);
        // How far there is nothing but padding, while there is.
        let mut padded_to = Some(0);
        let mut taken_to = 0;
        let mut at = (gap.start.wrapping_neg() % C::ALIGNMENT) as usize;
        while let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) {
            let address = gap.start + at as u64;
            while let Some(to) = padded_to.filter(|to| *to < at) {
                padded_to = C::padding(&bytes[to..]).map(|padding| to + padding);
            }
            let taken = if address == self.starts.process
                && let Some(length) = C::process_entry(rest)
            {
                self.add(address..address + length as u64, Rule::End, RecognisedKind::ProcessEntry);
                let call = length.saturating_sub(C::CALL_BYTES);
                self.called.extend(C::call(&rest[call..length], address + call as u64));
                Some(length)
            } else if address == self.starts.process
                && let Some(length) = C::linker_entry(rest)
            {
                self.add(address..address + length as u64, Rule::End, RecognisedKind::ProcessEntry);
                Some(length)
            } else if let Some(Linkage { bytes: length, rows }) =
                C::linkage(rest, address, is_section && at == 0)
            {
                let ends = rows.iter().skip(1).map(|(offset, _)| *offset).chain([length]);
                for ((offset, rule), end) in rows.iter().zip(ends) {
                    let range = address + *offset as u64..address + end as u64;
                    self.add(range, *rule, RecognisedKind::LinkageTable);
                }
                Some(length)
            } else if let Some(trampoline) = C::trampoline(bytes, at, first_code, address) {
                let before = trampoline.before.min(at - taken_to) as u64;
                let range = address - before..address + trampoline.bytes as u64;
                self.add(range, trampoline.rule, RecognisedKind::SignalTrampoline);
                Some(trampoline.bytes)
            } else if at > 0
                && padded_to == Some(at)
                && let Some(length) = C::coroutine_end(rest)
            {
                // It is returned to without a call, and looked up one byte before.
                self.add(address - 1..address + length as u64, Rule::End, RecognisedKind::CoroutineEnd);
                Some(length)
            } else {
                None
            };
            at += taken.unwrap_or(C::ALIGNMENT as usize);
            taken_to = if taken.is_some() { at } else { taken_to };
        }
    }

    fn add(&mut self, range: Range<u64>, rule: Rule, kind: RecognisedKind) {
        self.found.push(Recognised { range, rule, kind });
    }
}
