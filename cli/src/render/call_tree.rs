//! Stacks merged from the root into a tree.
//!
//! A node is a function below its parent; inlined and called occurrences of one function are two
//! nodes, because they are different code. Parents precede their children, so a pass over the nodes
//! backwards sums up and a pass forwards hands down, without recursion on a depth that the input
//! decides.

use std::cmp::Reverse;
use std::collections::HashMap;

use super::profile::StackProfile;
use super::ranking::LineTally;
use super::symbol::{Frame, FunctionId, Kind, Symbols};

/// Name of the root when there are several processes.
const ALL: &str = "all";

/// A function below its callers.
#[derive(Clone, Debug)]
pub(super) struct Node {
    /// Index of the caller; the root is its own.
    pub(super) parent: usize,
    pub(super) function: FunctionId,
    pub(super) inlined: bool,
    /// The hottest line, see [`super::ranking::FunctionRow::line`].
    pub(super) line: Option<u32>,
    pub(super) own: u64,
    pub(super) total: u64,
}

/// The merged stacks of a profile. Node 0 is the root.
#[derive(Clone, Debug)]
pub(super) struct CallTree {
    pub(super) symbols: Symbols,
    pub(super) nodes: Vec<Node>,
}

impl CallTree {
    /// Merges the stacks. Several processes become the first level; a single one is the root.
    pub(super) fn new(profile: &StackProfile) -> Self {
        let mut symbols = profile.symbols.clone();
        let first = profile.stacks.first().map(|stack| stack.process);
        let single = first.filter(|first| profile.stacks.iter().all(|stack| stack.process == *first));
        let root = single.unwrap_or_else(|| symbols.named(ALL, Kind::Group));
        let mut builder = Builder::new(root);
        for stack in &profile.stacks {
            let process = single.is_none().then_some(stack.process);
            builder.add(process.into_iter().chain(stack.path()), stack.count);
        }
        Self { symbols, nodes: builder.finish() }
    }

    /// The name of a node.
    pub(super) fn name(&self, node: usize) -> &str {
        &self.symbols.function(self.nodes[node].function).name
    }

    /// The children of each node, most samples first.
    pub(super) fn children(&self) -> Vec<Vec<usize>> {
        let mut children = vec![Vec::new(); self.nodes.len()];
        for (index, node) in self.nodes.iter().enumerate().skip(1) {
            children[node.parent].push(index);
        }
        for siblings in &mut children {
            siblings.sort_by_key(|node| (Reverse(self.nodes[*node].total), self.name(*node)));
        }
        children
    }

    /// The tree with its `limit` largest nodes; what each lost is one child named `rest`.
    pub(super) fn limited(mut self, limit: usize, rest: &str) -> Self {
        if self.nodes.len() <= limit {
            return self;
        }
        // A parent has at least its child's total and comes before it: every kept node's parent is kept.
        let mut by_total: Vec<usize> = (0..self.nodes.len()).collect();
        by_total.sort_by_key(|node| (Reverse(self.nodes[*node].total), *node));
        let mut kept = by_total[..limit.max(1)].to_vec();
        kept.sort_unstable();
        let rest = self.symbols.named(rest, Kind::Group).function;
        let mut place = vec![None; self.nodes.len()];
        for (new, old) in kept.iter().enumerate() {
            place[*old] = Some(new);
        }
        let mut nodes: Vec<Node> = kept
            .iter()
            .map(|old| {
                let node = self.nodes[*old].clone();
                Node { parent: place[node.parent].expect("its total is not below the child's"), ..node }
            })
            .collect();
        let mut lost: HashMap<usize, u64> = HashMap::new();
        for (old, node) in self.nodes.iter().enumerate() {
            if let (None, Some(parent)) = (place[old], place[node.parent]) {
                let sum = lost.entry(parent).or_default();
                *sum = sum.saturating_add(node.total);
            }
        }
        let mut lost: Vec<_> = lost.into_iter().collect();
        lost.sort_unstable();
        nodes.extend(lost.into_iter().map(|(parent, total)| Node {
            parent,
            function: rest,
            inlined: false,
            line: None,
            own: total,
            total,
        }));
        Self { nodes, ..self }
    }
}

struct Builder {
    nodes: Vec<Node>,
    index: HashMap<(usize, FunctionId, bool), usize>,
    lines: LineTally,
}

impl Builder {
    fn new(root: Frame) -> Self {
        let root = Node { parent: 0, function: root.function, inlined: false, line: None, own: 0, total: 0 };
        Self { nodes: vec![root], index: HashMap::new(), lines: LineTally::default() }
    }

    fn add(&mut self, path: impl Iterator<Item = Frame>, count: u64) {
        let mut path = path.peekable();
        let mut current = 0;
        self.nodes[0].total = self.nodes[0].total.saturating_add(count);
        while let Some(Frame { function, line, inlined }) = path.next() {
            let next = self.nodes.len();
            let node = *self.index.entry((current, function, inlined)).or_insert(next);
            if node == next {
                self.nodes.push(Node { parent: current, function, inlined, line: None, own: 0, total: 0 });
            }
            let own = if path.peek().is_none() { count } else { 0 };
            self.nodes[node].total = self.nodes[node].total.saturating_add(count);
            self.lines.add(node, line, own, count);
            current = node;
        }
        self.nodes[current].own = self.nodes[current].own.saturating_add(count);
    }

    fn finish(self) -> Vec<Node> {
        let mut nodes = self.nodes;
        let lines = self.lines.hottest(nodes.len());
        for (node, line) in nodes.iter_mut().zip(lines) {
            node.line = line;
        }
        nodes
    }
}
