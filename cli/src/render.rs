//! What shows a symbolized profile to a person: a table, a tree, collapsed stacks, a flame graph.
//!
//! pprof's and speedscope's pages are pleasant because they answer the first question (where does the
//! time go?) before the reader has configured anything; their readers complain that a page needs a
//! server or the network, and that a stack which the profiler cut is drawn as if `main` had called its
//! last frame. So every view here is made from one [`StackProfile`], whole and offline, and a stack
//! whose walk did not reach the end hangs under a root that names the reason, in each of the views.
//!
//! - [`profile`]: stacks out of pprof messages; [`symbol`]: their functions and frames
//! - [`ranking`]: functions by own samples, and the summary
//! - [`call_tree`]: stacks merged into a tree, which [`mod@tree`] prints and [`mod@html`] embeds
//! - [`mod@table`], [`mod@folded`]: the ranking and the stacks as text; [`cell`]: text that fits a column

mod call_tree;
mod cell;
mod folded;
mod html;
mod profile;
mod ranking;
mod symbol;
mod table;
mod tree;

#[cfg(test)]
mod synthetic;
#[cfg(test)]
mod tests;

pub(crate) use folded::folded;
pub(crate) use html::html;
pub(crate) use profile::StackProfile;
pub(crate) use table::table;
pub(crate) use tree::tree;
