//! The call tree as text, from the root down.
//!
//! Native stacks are deep and mostly do not branch: a chain in which nothing worth a line leaves the way
//! is one line, `main › run › step`, and when it is too long its middle is counted instead of shown. The
//! end of a chain, where the samples part, is always there.

use std::fmt::Write as _;

use super::call_tree::CallTree;
use super::cell::{fit, fit_end, printable};
use super::profile::StackProfile;
use crate::terminal::percent;

/// Joins the frames of a chain.
const ARROW: &str = " › ";
/// A name gets at least these columns, however deep it is indented.
const MIN_NAME_COLUMNS: usize = 24;
/// Names of chains are cut to this many columns when the chain does not fit as it is.
const CHAIN_NAME_COLUMNS: usize = 40;

/// Nodes with at least `min_percent` of the samples, at most `max_depth` branchings deep, in lines of at
/// most `width` characters where the indentation leaves room for a name.
pub(crate) fn tree(profile: &StackProfile, min_percent: f64, max_depth: usize, width: usize) -> String {
    let tree = CallTree::new(profile);
    let children = tree.children();
    let samples = tree.nodes[0].total;
    let share = |node: usize| percent(tree.nodes[node].total, samples);
    let visible = |node: usize| -> Vec<usize> {
        children[node].iter().copied().filter(|child| share(*child) >= min_percent).collect()
    };
    let mut text = format!("{:>6}{:>8}\n", "total%", "self%");
    // Nodes to print, the next one last: (node, what precedes its branch, its branch, depth).
    let mut pending: Vec<(usize, String, &str, usize)> = vec![(0, String::new(), "", 0)];
    while let Some((first, prefix, branch, depth)) = pending.pop() {
        let mut chain = vec![first];
        let mut last = first;
        let mut below = visible(last);
        while let [only] = below[..]
            && (last != 0 && share(last) - share(only) < min_percent.max(f64::EPSILON))
        {
            chain.push(only);
            last = only;
            below = visible(last);
        }
        let indent = format!("{prefix}{branch}");
        let room = width.saturating_sub(16 + indent.chars().count()).max(MIN_NAME_COLUMNS);
        let cut = depth >= max_depth && !below.is_empty();
        let own: u64 = chain.iter().map(|node| tree.nodes[*node].own).fold(0, u64::saturating_add);
        let own = if own == 0 { String::new() } else { format!("{:.1}%", percent(own, samples)) };
        let names: Vec<String> = chain.iter().map(|node| label(&tree, *node)).collect();
        let names = chain_text(&names, room - if cut { 2 } else { 0 });
        let more = if cut { " …" } else { "" };
        writeln!(text, "{:>5.1}%{own:>8}  {indent}{names}{more}", share(first))
            .expect("writing to a string does not fail");
        if cut {
            continue;
        }
        let prefix = match branch {
            "" => prefix,
            "└─ " => prefix + "   ",
            _ => prefix + "│  ",
        };
        for (index, child) in below.iter().enumerate().rev() {
            let branch = if index + 1 == below.len() { "└─ " } else { "├─ " };
            pending.push((*child, prefix.clone(), branch, depth + 1));
        }
    }
    text
}

fn label(tree: &CallTree, node: usize) -> String {
    let inlined = if tree.nodes[node].inlined { " [inlined]" } else { "" };
    printable(tree.name(node)) + inlined
}

/// A chain in `room` characters: whole, or the first names that fit, a count, and the last one.
fn chain_text(names: &[String], room: usize) -> String {
    let whole = names.join(ARROW);
    let Some((last, rest)) = names.split_last() else { return String::new() };
    if rest.is_empty() || whole.chars().count() <= room {
        return fit(&whole, room);
    }
    let columns = CHAIN_NAME_COLUMNS.min(room);
    let last = fit(last, columns);
    let mut text = String::new();
    for (shown, name) in rest.iter().enumerate() {
        let next = fit(name, columns) + ARROW;
        let left_out = rest.len() - shown - 1;
        let tail = if left_out == 0 { last.clone() } else { skipped(left_out) + &last };
        if (text.chars().count() + next.chars().count() + tail.chars().count()) > room {
            let tail = skipped(rest.len() - shown) + &last;
            return fit_end(&(text + &tail), room);
        }
        text += &next;
    }
    text + &last
}

/// Stands for frames that are not shown.
fn skipped(frames: usize) -> String {
    format!("… {frames} more{ARROW}")
}
