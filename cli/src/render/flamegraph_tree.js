'use strict';
// The profile is columns of numbers (html.rs writes them). A view is one tree of them with a layout
// computed once: each node has a start and a width in samples and a row. Drawing visits, of the rows on
// screen, the nodes in the zoomed range, so its cost follows the window and not the profile.

const profile = JSON.parse(document.getElementById('profile').textContent);
const { functions: F } = profile;
// Names come from files that anyone may have written: what controls or reorders text is shown, not obeyed.
const strings = profile.strings.map(text => text.replace(/[\p{Cc}\u200e\u200f\u2028-\u202e\u2066-\u2069]/gu, '\ufffd'));
const NATIVE = 0, KERNEL = 1, UNRESOLVED = 2, STOP = 3, GROUP = 4, INLINED = 5;
const COLOURS = ['native', 'kernel', 'unresolved', 'stop', 'group', 'inlined'];
const MEANINGS = ['native', 'kernel', 'no name', 'cut stack: why the walk ended', '', 'inlined'];
const ROW = 20;             // pixels
const MIN_WIDTH = 0.5;      // pixels; narrower frames are not drawn
const ZOOM_MS = 160;
const MAX_TABLE_ROWS = 500; // more are found by searching
const MAX_INVERTED = 1e6;   // nodes; the smallest paths beyond it end early

const $ = id => document.getElementById(id);
const element = (tag, properties, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};
const grouped = count => count.toLocaleString('en-US');
const counted = (count, noun) => `${grouped(count)} ${noun}${count === 1 ? '' : 's'}`;
const share = (part, whole) => whole ? part * 100 / whole : 0;
const percent = (part, whole) => {
  const value = share(part, whole);
  return value >= 0.1 || value === 0 ? value.toFixed(1) + '%' : value >= 0.01 ? value.toFixed(2) + '%' : '<0.01%';
};
const middle = (text, length) => {
  if (text.length <= length) return text;
  const end = Math.ceil((length - 1) / 2);
  return text.slice(0, length - 1 - end) + '…' + text.slice(text.length - end);
};
// A name in a frame: without template arguments and leading modules as far as it must, then without its
// middle.
const labelOf = (text, length) => {
  if (text.length <= length) return text;
  const bare = withoutArguments(text.slice(0, 2000));
  let open = 0, last = 0;
  for (let i = 0; bare.length - last > length && i < bare.length; i++) {
    if (bare[i] === '<' || bare[i] === '(') open++;
    else if (bare[i] === '>' && bare[i - 1] !== '-' || bare[i] === ')') open--;
    else if (open === 0 && bare.startsWith('::', i)) last = i + 2;
  }
  return middle(bare.slice(last), length);
};
function withoutArguments(text) { // `collect::<Vec<u8>>` is `collect`
  let kept = '', open = 0;
  for (let i = 0; i < text.length; i++) {
    if (open > 0) open += text[i] === '<' ? 1 : text[i] === '>' && text[i - 1] !== '-' ? -1 : 0;
    else if (i > 0 && text.startsWith('::<', i)) { open = 1; i += 2; }
    else kept += text[i];
  }
  return kept;
}
const name = f => strings[F.name[f]];
const place = (f, line) => F.file[f] ? strings[F.file[f]] + (line ? ':' + line : '') : strings[F.image[f]];
const isCode = f => F.kind[f] !== STOP && F.kind[f] !== GROUP;

function layOut({ parent, fn, inlined, line, own }) {
  const count = parent.length;
  const total = Float64Array.from(own);
  for (let i = count - 1; i > 0; i--) total[parent[i]] += total[i];
  const order = new Uint32Array(Math.max(0, count - 1)).map((_, i) => i + 1);
  order.sort((a, b) => parent[a] - parent[b] || total[b] - total[a] || a - b);
  const start = new Float64Array(count), depth = new Uint32Array(count);
  const next = new Float64Array(count), heaviest = new Int32Array(count).fill(-1);
  const rows = [[0]];
  for (const i of order) { // a parent's children come after the parent has its place
    const p = parent[i];
    start[i] = next[p];
    next[p] += total[i];
    next[i] = start[i];
    depth[i] = depth[p] + 1;
    if (heaviest[p] < 0) heaviest[p] = i;
    (rows[depth[i]] ||= []).push(i);
  }
  for (const row of rows) row.sort((a, b) => start[a] - start[b]);
  return { count, parent, fn, inlined, line, own, total, start, depth, heaviest, rows };
}

function invert(tree) {
  const parent = [0], fn = [tree.fn[0]], inlined = [0], line = [0], own = [tree.own[0]];
  const children = new Map();
  const leaves = [];
  for (let i = 1; i < tree.count; i++) if (tree.own[i] > 0) leaves.push(i);
  leaves.sort((a, b) => tree.own[b] - tree.own[a]);
  for (const leaf of leaves) {
    let at = 0;
    for (let i = leaf; i !== 0; i = tree.parent[i]) {
      const key = (at * F.name.length + tree.fn[i]) * 2 + tree.inlined[i];
      let child = children.get(key);
      if (child === undefined) {
        if (parent.length >= MAX_INVERTED) break;
        child = parent.length;
        parent.push(at);
        fn.push(tree.fn[i]);
        inlined.push(tree.inlined[i]);
        line.push(tree.line[i]);
        own.push(0);
        children.set(key, child);
      }
      at = child;
    }
    own[at] += tree.own[leaf];
  }
  return layOut({ parent, fn, inlined, line, own });
}

const { parent, function: fn, inlined, line, own } = profile.nodes;
const topDown = layOut({ parent, fn, inlined, line, own });
let bottomUp = null;
let tree = topDown;
