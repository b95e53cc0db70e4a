//! Stacks in Brendan Gregg's collapsed format, which most flame graph tools read.
//!
//! One line for each distinct stack, outermost first: `process;frame;frame COUNT`. A stack whose walk
//! was cut is `process;[stop_reason];frame COUNT`. The format has no escape, so a `;` in a name becomes
//! `:`, as in `stackcollapse-perf.pl`, and a control character becomes a space.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::profile::StackProfile;

/// The stacks of a profile, sorted.
pub(crate) fn folded(profile: &StackProfile) -> String {
    let names: Vec<String> =
        profile.symbols.functions().map(|function| folded_name(&function.name)).collect();
    let mut stacks: BTreeMap<String, u64> = BTreeMap::new();
    for stack in &profile.stacks {
        let mut line = names[stack.process.function.index()].clone();
        for frame in stack.path() {
            line.push(';');
            line.push_str(&names[frame.function.index()]);
        }
        let count = stacks.entry(line).or_default();
        *count = count.saturating_add(stack.count);
    }
    let mut text = String::new();
    for (stack, count) in stacks {
        writeln!(text, "{stack} {count}").expect("writing to a string does not fail");
    }
    text
}

fn folded_name(name: &str) -> String {
    name.chars()
        .map(|character| match character {
            ';' => ':',
            control if control.is_control() => ' ',
            other => other,
        })
        .collect()
}
