//! The flame graph: one file that needs nothing but a browser.
//!
//! The page, its style and its script are committed as they are served (`flamegraph.*`), so that
//! changing them needs no build step. A content security policy in the page forbids it the
//! network. The profile is embedded as JSON: each distinct string once, functions and nodes as parallel
//! arrays of numbers. Nodes hold own samples only; the script sums totals up. In JSON, `<` is written
//! as `\u003c`, so no name can end the element that the profile is in.

use std::cmp::Reverse;
use std::collections::HashMap;

use serde::Serialize;
use windlass_schema::StopReason;

use super::call_tree::CallTree;
use super::profile::StackProfile;
use super::ranking::Tally;
use super::symbol::FunctionId;

pub(super) const PAGE: &str = include_str!("flamegraph.html");
const STYLE: &str = include_str!("flamegraph.css");
/// The profile and its layout; the canvas; what is around it. One script in this order.
const TREE: &str = include_str!("flamegraph_tree.js");
const GRAPH: &str = include_str!("flamegraph.js");
const AROUND: &str = include_str!("flamegraph_page.js");

/// Most nodes in one page: 300,000 are about 8 MB, and a browser lays them out in under a second. The
/// smallest ones beyond it are summed up, each in its parent, under [`REST`].
const MAX_NODES: usize = 300_000;
/// Name of what the limit left out.
const REST: &str = "[smaller calls]";

/// What `flamegraph.js` reads. Index 0 of `strings` is empty and means none.
#[derive(Serialize)]
struct Graph<'p> {
    title: &'p str,
    samples: u64,
    complete: u64,
    stops: Vec<Stop>,
    strings: Vec<&'p str>,
    functions: Functions,
    nodes: Nodes,
}

#[derive(Serialize)]
struct Stop {
    reason: String,
    count: u64,
    complete: bool,
}

/// Parallel arrays, one entry for each function: indices into `strings`, a
/// [`Kind`](super::symbol::Kind), and its samples over all stacks.
#[derive(Default, Serialize)]
struct Functions {
    name: Vec<usize>,
    file: Vec<usize>,
    image: Vec<usize>,
    kind: Vec<u8>,
    line: Vec<u32>,
    own: Vec<u64>,
    total: Vec<u64>,
}

/// Parallel arrays, one entry for each node, parents first. `line` is 0 where it is not known.
#[derive(Default, Serialize)]
struct Nodes {
    parent: Vec<usize>,
    function: Vec<usize>,
    inlined: Vec<u8>,
    line: Vec<u32>,
    own: Vec<u64>,
}

/// The flame graph of a profile as a page of its own.
pub(crate) fn html(profile: &StackProfile, title: &str) -> String {
    page(profile, title, MAX_NODES)
}

pub(super) fn page(profile: &StackProfile, title: &str, max_nodes: usize) -> String {
    let graph = graph_json(profile, title, max_nodes);
    let title = title.replace('&', "&amp;").replace('<', "&lt;");
    fill(PAGE, |name| match name {
        "title" => &title,
        "style" => STYLE,
        "tree" => TREE,
        "graph" => GRAPH,
        "page" => AROUND,
        "profile" => &graph,
        _ => "",
    })
}

fn graph_json(profile: &StackProfile, title: &str, max_nodes: usize) -> String {
    let tree = CallTree::new(profile).limited(max_nodes, REST);
    let summary = profile.summary();
    let mut stops: Vec<Stop> = summary
        .stop_reasons
        .into_iter()
        .map(|(reason, count)| {
            let complete = StopReason::from_name(&reason).is_some_and(StopReason::is_complete);
            Stop { reason, count, complete }
        })
        .collect();
    stops.sort_by_key(|stop| Reverse(stop.count));
    let mut columns = Columns::new(&tree, profile.tallies());
    let mut nodes = Nodes::default();
    for node in &tree.nodes {
        nodes.parent.push(node.parent);
        nodes.function.push(columns.function(node.function));
        nodes.inlined.push(u8::from(node.inlined));
        nodes.line.push(node.line.unwrap_or(0));
        nodes.own.push(node.own);
    }
    // Functions of nodes beyond the limit are still in the table of functions.
    columns.rest();
    let Columns { strings, functions, .. } = columns;
    let graph = Graph {
        title,
        samples: summary.samples,
        complete: summary.complete,
        stops,
        strings,
        functions,
        nodes,
    };
    serde_json::to_string(&graph).expect("the graph is strings and numbers").replace('<', "\\u003c")
}

/// The functions and strings that the nodes use, numbered as they are met.
struct Columns<'t> {
    tree: &'t CallTree,
    tallies: Vec<Tally>,
    numbers: HashMap<FunctionId, usize>,
    string_numbers: HashMap<&'t str, usize>,
    strings: Vec<&'t str>,
    functions: Functions,
}

impl<'t> Columns<'t> {
    fn new(tree: &'t CallTree, tallies: Vec<Tally>) -> Self {
        Self {
            tree,
            tallies,
            numbers: HashMap::new(),
            string_numbers: HashMap::from([("", 0)]),
            strings: vec![""],
            functions: Functions::default(),
        }
    }

    fn function(&mut self, id: FunctionId) -> usize {
        if let Some(number) = self.numbers.get(&id) {
            return *number;
        }
        let number = self.numbers.len();
        self.numbers.insert(id, number);
        let function = self.tree.symbols.function(id);
        // What the tree adds to the profile's functions (its root) has no samples as a function.
        let tally = self.tallies.get(id.index()).copied().unwrap_or_default();
        let [name, file, image] = [Some(&function.name), function.file.as_ref(), function.image.as_ref()]
            .map(|text| self.string(text.map_or("", String::as_str)));
        self.functions.name.push(name);
        self.functions.file.push(file);
        self.functions.image.push(image);
        self.functions.kind.push(function.kind as u8);
        self.functions.line.push(tally.line.unwrap_or(0));
        self.functions.own.push(tally.own);
        self.functions.total.push(tally.total);
        number
    }

    fn rest(&mut self) {
        for id in self.tree.symbols.ids() {
            if self.tallies.get(id.index()).is_some_and(|tally| tally.total > 0) {
                self.function(id);
            }
        }
    }

    fn string(&mut self, text: &'t str) -> usize {
        *self.string_numbers.entry(text).or_insert_with(|| {
            self.strings.push(text);
            self.strings.len() - 1
        })
    }
}

/// `template` with each `{{name}}` replaced once; what is put in is not looked at again.
fn fill<'v>(template: &str, value: impl Fn(&str) -> &'v str) -> String {
    let mut parts = template.split("{{");
    let mut page = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (name, rest) = part.split_once("}}").unwrap_or((part, ""));
        page.push_str(value(name));
        page.push_str(rest);
    }
    page
}
