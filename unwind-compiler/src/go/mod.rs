//! Unwind rows of Go code, from the table that the Go runtime itself unwinds by: `.gopclntab`.
//!
//! # Why this shape
//! Go executables have no `.eh_frame` for Go code, and stripped ones no `.debug_frame`; what no one can strip
//! is the table of functions that the runtime's garbage collector needs. Profilers fall back on frame
//! pointers there, or read the table but take every function for an ordinary one: the caller of a leaf in
//! assembly is lost, and a stack ends, or goes astray, where Go switches to the system stack to call C, the
//! kernel's vDSO or its own scheduler. Here the table gives the stack depth at each
//! address, code says where rbp is saved, and functions that write the stack pointer are followed instruction
//! by instruction: what that does not prove is unsupported. One pass, no state between functions.
//!
//! - `table`: functions and their stack depths; `module_data`: where their code begins
//! - `frame`: rows of a function that moves its stack pointer by constants only
//! - `stack_switch`: rows of one that does not, by `instruction`, which decodes
//! - `aarch64`: rows of a function of aarch64
//!
//! # Rules of x86-64
//! With `d` the depth that the table gives, `cfa = rsp + d + 8` and `ra = *(cfa - 8)`. The caller's rbp is at
//! `cfa - 16` wherever a prologue of the Go assembler (cmd/internal/obj/x86/obj6.go, `preprocess`) has saved it:
//!
//! ```text
//! from Go 1.21           before                          depth behind it
//! push rbp               sub rsp, N                      8         N
//! mov  rbp, rsp          mov [rsp + N - 8], rbp          8         N
//! sub  rsp, N            lea rbp, [rsp + N - 8]          8 + N     N
//! ```

mod aarch64;
mod frame;
mod module_data;
mod stack_switch;
mod table;

use std::collections::BTreeMap;
use std::ops::Range;

use windlass_schema::{Architecture, FramePointerRule, Rule, UnsupportedReason};

use frame::Style;
pub(crate) use module_data::text_start;
use table::{Function, Span, Table};
pub(crate) use table::{GoTableError, find_table};

/// What is read of an image.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GoImage<'a> {
    /// The instruction set of its code.
    pub(crate) architecture: Architecture,
    /// The table, from its magic on. May reach past its end.
    pub(crate) table: &'a [u8],
    /// The address of `runtime.text`, if known. Otherwise the table's own, which linkers leave at 0 in
    /// position-independent executables and from Go 1.26 on; see [`text_start`].
    pub(crate) text: Option<u64>,
    /// Executable segments, as far as the file has their bytes.
    pub(crate) code: &'a [GoCode<'a>],
}

/// Bytes of an executable segment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GoCode<'a> {
    /// Image address of the first.
    pub(crate) address: u64,
    /// The bytes.
    pub(crate) bytes: &'a [u8],
}

/// What holds at an address of Go code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GoRule {
    /// This rule.
    Rule(Rule),
    /// This rule, and the caller's address is that of an instruction that a signal interrupted, not a return
    /// address: the runtime pushed it (`sigpanic`, `asyncPreempt`).
    Interrupted(Rule),
    /// On the system stack, called for a goroutine that may have another one:
    /// `cfa = *(*(rsp + g) + 8) - *(rsp + depth) + cfa`, where `*(g + 8)` is the upper end of the goroutine's
    /// stack (`g.stack.hi`, runtime/runtime2.go). `ra = *(cfa - 8)`. The CFA may be below rsp.
    SavedDepth {
        /// Where the `g` is saved, from rsp.
        g: i16,
        /// Where the depth of its stack is saved, from rsp.
        depth: i16,
        /// From the saved stack pointer to the CFA.
        cfa: i16,
        /// Where the caller's rbp is.
        frame_pointer: FramePointerRule,
    },
    /// `cfa = rbp + 16`, `ra = *(cfa - 8)`, `rbp = *(cfa - 16)`, and rbp may be of another stack than rsp, so that
    /// the CFA may be below rsp.
    OtherStack,
}

/// Why a function gave no rows, or not all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum GoSkip {
    /// Its description is not inside the table.
    Truncated,
    /// It begins before the end of the one before it.
    Order,
    /// It has no stack depths: code of C in Go's text.
    NoDepths,
    /// Its stack depths are malformed: addresses behind the fault are unsupported.
    Depths,
    /// Stack depths of all functions before it were longer than the table.
    Budget,
}

/// What became of the functions of a table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct GoFunctions {
    /// Functions that gave rows.
    pub(crate) functions: u64,
    /// Functions that did not, or not all, by reason.
    pub(crate) skipped: BTreeMap<GoSkip, u64>,
}

/// Calls `visit` with each row of Go code, in order of addresses. Ranges are not empty and do not overlap;
/// neighbours may state the same rule. Takes time in proportion to the table and the code of its functions.
pub(crate) fn for_each_row(
    image: &GoImage<'_>,
    mut visit: impl FnMut(Range<u64>, GoRule),
) -> Result<GoFunctions, GoTableError> {
    let table = Table::parse(image.table, image.text, image.architecture)?;
    let style = if image.code.is_empty() { frame::style(&table) } else { Style::Unknown };
    let mut report = GoFunctions::default();
    let mut budget = table.depth_budget();
    let mut spans = Vec::new();
    let mut rows = Vec::new();
    let mut end = 0;
    for index in 0..table.function_count() {
        let function = match table.function(index) {
            Ok(function) if function.range.start < end => Err(GoSkip::Order),
            other => other,
        };
        let mut skip = |reason| *report.skipped.entry(reason).or_default() += 1;
        let function = match function {
            Ok(function) => function,
            Err(reason) => {
                skip(reason);
                continue;
            }
        };
        spans.clear();
        if let Err(reason) = table.depths(&function, &mut budget, &mut spans) {
            skip(reason);
        }
        let Some(last) = spans.last() else { continue };
        let covered = function.range.start + u64::from(last.end);
        let code = code_at(image.code, function.range.start..covered);
        rows.clear();
        match image.architecture {
            Architecture::X86_64 => rules(&table, &function, &spans, code, style, &mut rows),
            Architecture::Aarch64 => aarch64::rules(&table, &function, &spans, code, &mut rows),
        }
        // Return addresses are looked up one byte earlier, and that of a signal handler is the first byte of
        // the trampoline, which no instruction precedes.
        let is_trampoline = matches!(rows.first(), Some((_, GoRule::Rule(Rule::Signal(_)))));
        let before = u64::from(is_trampoline && end < function.range.start);
        for (place, (range, rule)) in rows.iter().enumerate() {
            let before = if place == 0 { before } else { 0 };
            let base = function.range.start;
            visit(base + u64::from(range.start) - before..base + u64::from(range.end), *rule);
        }
        report.functions += 1;
        end = covered;
    }
    Ok(report)
}

/// A row: its bytes, from the start of the function, and what holds there.
type FunctionRow = (Range<u32>, GoRule);

/// The rows of one function of x86-64. `code` has a byte for each that `spans` covers.
fn rules(
    table: &Table<'_>,
    function: &Function<'_>,
    spans: &[Span],
    code: Option<&[u8]>,
    style: Style,
    rows: &mut Vec<FunctionRow>,
) {
    let whole = spans.first().map_or(0, |span| span.start)..spans.last().map_or(0, |span| span.end);
    let unsupported = GoRule::Rule(Rule::Unsupported(UnsupportedReason::StackPointer));
    if code.is_some_and(frame::is_signal_trampoline) {
        return rows.push((whole, GoRule::Rule(Rule::Signal(frame::SIGCONTEXT_OFFSET))));
    }
    if function.is_named("runtime.sigreturn") || function.is_named("runtime.sigreturn__sigaction") {
        return rows.push((whole, GoRule::Rule(Rule::Unsupported(UnsupportedReason::SignalFrame))));
    }
    // The kernel calls sigtramp for code that a signal interrupted, although Go's own tracebacks end there.
    let is_first = if table.has_flags() { function.is_top_frame() } else { begins_stack(function) };
    if is_first && !function.is_named("runtime.sigtramp") || is_process_entry(function) {
        let named = !function.name.is_empty();
        return rows.push((whole, if named { GoRule::Rule(Rule::End) } else { unsupported }));
    }
    let writes_stack_pointer = match table.has_flags() {
        true => function.writes_stack_pointer(),
        false => code.is_none_or(stack_switch::may_write_stack_pointer),
    };
    if !writes_stack_pointer {
        frame::rules(table, function, spans, code, style, rows);
    } else if let Some(code) = code {
        stack_switch::rules(function, spans, code, rows);
    } else {
        rows.push((whole, unsupported));
    }
    if is_entered_by_interruption(function) {
        for (_, rule) in rows {
            if let GoRule::Rule(rule_of_call @ Rule::Frame { .. }) = *rule {
                *rule = GoRule::Interrupted(rule_of_call);
            }
        }
    }
}

/// Functions at which stacks begin, of a table that does not mark them: Go 1.16.
fn begins_stack(function: &Function<'_>) -> bool {
    ["runtime.goexit", "runtime.mstart", "runtime.rt0_go"].iter().any(|name| function.is_named(name))
}

/// Where the kernel starts the process: the word at rsp is the count of arguments (psABI, 3.4.1).
fn is_process_entry(function: &Function<'_>) -> bool {
    function.is_named("_rt0_amd64_linux") || function.is_named("_rt0_amd64")
}

/// What signal handlers of the runtime make the interrupted code appear to have called
/// (`preparePanic`, runtime/signal_amd64.go; `pushCall`, same; runtime/preempt.go).
fn is_entered_by_interruption(function: &Function<'_>) -> bool {
    [
        "runtime.sigpanic",
        "runtime.sigpanic0",
        "runtime.asyncPreempt",
        "runtime.debugCallV1",
        "runtime.debugCallV2",
    ]
    .iter()
    .any(|name| function.is_named(name))
}

/// The bytes at `range`, if the file has all of them.
fn code_at<'a>(code: &[GoCode<'a>], range: Range<u64>) -> Option<&'a [u8]> {
    code.iter().find_map(|segment| {
        let from = usize::try_from(range.start.checked_sub(segment.address)?).ok()?;
        let to = usize::try_from(range.end.checked_sub(segment.address)?).ok()?;
        segment.bytes.get(from..to)
    })
}

#[cfg(test)]
mod tests;
