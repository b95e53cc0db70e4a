// The canvas: what is shown, zoomed and selected, and the address bar that holds it.

// ---- state, and the address bar that holds it --------------------------------------------------

const state = { query: '', zoom: 0, selected: -1, inverted: false, tab: 'flame', sort: 'own', ascending: false };
const range = { from: 0, to: tree.total[0] };
let matching = null; // for each function, whether the search finds it
let matches = [];    // outermost matching nodes, left to right
let hovered = -1;

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const node = (key, fallback) => {
    const value = Number.parseInt(given.get(key), 10);
    return value >= 0 && value < tree.count ? value : fallback;
  };
  state.inverted = given.get('invert') === '1';
  tree = state.inverted ? (bottomUp ||= invert(topDown)) : topDown;
  state.tab = given.get('tab') === 'table' ? 'table' : 'flame';
  state.zoom = node('zoom', 0);
  state.selected = node('frame', -1);
  $('search').value = given.get('q') || '';
  search($('search').value);
  showTab();
  showZoom(false);
}

function writeAddress(step) {
  const kept = new URLSearchParams();
  if (state.query) kept.set('q', state.query);
  if (state.zoom) kept.set('zoom', state.zoom);
  if (state.selected > 0) kept.set('frame', state.selected);
  if (state.inverted) kept.set('invert', '1');
  if (state.tab !== 'flame') kept.set('tab', state.tab);
  const hash = '#' + kept;
  if (hash === (location.hash || '#')) return;
  history[step ? 'pushState' : 'replaceState'](null, '', hash);
}

// ---- drawing -----------------------------------------------------------------------------------

const canvas = $('canvas'), scroll = $('scroll');
const context = canvas.getContext('2d');
const theme = { shades: [], match: '', text: '', page: '', accent: '', hatch: null, character: 7 };
let width = 0, height = 0, waiting = false, animation = null;

function readTheme() {
  const style = getComputedStyle(document.documentElement);
  const colour = key => style.getPropertyValue('--' + key).trim();
  const shade = (hex, by) => {
    const parts = [1, 3, 5].map(at => Number.parseInt(hex.slice(at, at + 2), 16));
    return `rgb(${parts.map(part => Math.max(0, Math.min(255, Math.round(part * by)))).join()})`;
  };
  theme.shades = COLOURS.map(key => [0.93, 0.98, 1.02, 1.07].map(by => shade(colour(key), by)));
  Object.assign(theme, { match: colour('match'), text: colour('frame-text'), page: colour('page'), accent: colour('accent') });
  const tile = element('canvas', { width: 8, height: 8 });
  const lines = tile.getContext('2d');
  lines.strokeStyle = theme.text;
  lines.globalAlpha = 0.22;
  for (const x of [-8, 0, 8]) { lines.moveTo(x, 8); lines.lineTo(x + 8, 0); }
  lines.stroke();
  theme.hatch = context.createPattern(tile, 'repeat');
}

// Neighbours of one kind get different shades, the same function always the same.
const shadeOf = Uint8Array.from(F.name, index => {
  const text = strings[index];
  let hash = 0;
  for (let i = 0; i < text.length && i < 200; i++) hash = (hash * 31 + text.charCodeAt(i)) | 0;
  return (hash ^ hash >>> 8) & 3;
});
const colourOf = node => tree.inlined[node] && F.kind[tree.fn[node]] === NATIVE ? INLINED : F.kind[tree.fn[node]];
const isMatch = node => matching !== null && matching[tree.fn[node]] === 1;

function resize() {
  const density = window.devicePixelRatio || 1;
  width = scroll.clientWidth;
  height = scroll.clientHeight;
  canvas.width = Math.max(1, Math.round(width * density));
  canvas.height = Math.max(1, Math.round(height * density));
  canvas.style.height = height + 'px';
  context.setTransform(density, 0, 0, density, 0, 0);
  context.font = '12px ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace';
  context.textBaseline = 'middle';
  theme.character = context.measureText('m').width;
  fitHeight();
  draw();
}

// First node of a row that ends after `sample`.
function firstAfter(row, sample) {
  let low = 0, high = row.length;
  while (low < high) {
    const at = (low + high) >> 1;
    if (tree.start[row[at]] + tree.total[row[at]] > sample) high = at; else low = at + 1;
  }
  return low;
}

// The scroll bar covers the rows that have something to draw in the zoomed range.
function fitHeight() {
  const from = tree.start[state.zoom], to = from + tree.total[state.zoom];
  const least = MIN_WIDTH * (to - from) / Math.max(1, width);
  let last = tree.depth[state.zoom];
  for (let depth = last + 1; depth < tree.rows.length; depth++) {
    const row = tree.rows[depth];
    let found = false;
    for (let at = firstAfter(row, from); at < row.length && tree.start[row[at]] < to && !found; at++) {
      found = tree.total[row[at]] >= least;
    }
    if (!found) break;
    last = depth;
  }
  $('space').style.height = Math.max(0, (last + 2) * ROW - height) + 'px';
}

function draw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(now => { waiting = false; paint(now); });
}

function paint(now) {
  if (animation) {
    animation.began ??= now;
    const part = Math.min(1, (now - animation.began) / ZOOM_MS), eased = 1 - (1 - part) ** 3;
    range.from = animation.from + (animation.toFrom - animation.from) * eased;
    range.to = animation.to + (animation.toTo - animation.to) * eased;
    if (part === 1) animation = null; else draw();
  }
  context.clearRect(0, 0, width, height);
  if (tree.total[0] === 0) return;
  const scale = width / Math.max(range.to - range.from, Number.MIN_VALUE);
  const top = scroll.scrollTop;
  const lastRow = Math.min(tree.rows.length - 1, Math.floor((top + height) / ROW));
  for (let depth = Math.floor(top / ROW); depth <= lastRow; depth++) {
    const row = tree.rows[depth], y = depth * ROW - top;
    for (let at = firstAfter(row, range.from); at < row.length && tree.start[row[at]] < range.to; at++) {
      const node = row[at];
      if (tree.total[node] * scale >= MIN_WIDTH) paintFrame(node, scale, y);
    }
  }
  context.globalAlpha = 1;
  outline(hovered, scale, top, theme.text, 1);
  outline(state.selected, scale, top, theme.accent, 2);
}

function extent(node, scale) {
  const left = Math.max(0, (tree.start[node] - range.from) * scale);
  return [left, Math.min(width, (tree.start[node] + tree.total[node] - range.from) * scale) - left];
}

function paintFrame(node, scale, y) {
  const f = tree.fn[node], kind = colourOf(node), found = isMatch(node);
  const [left, wide] = extent(node, scale);
  const shown = Math.max(MIN_WIDTH, wide - (wide > 3 ? 1 : 0));
  context.globalAlpha = matching && !found ? 0.38 : node !== state.zoom && tree.depth[node] < tree.depth[state.zoom] ? 0.6 : 1;
  context.fillStyle = found ? theme.match : theme.shades[kind][shadeOf[f]];
  context.fillRect(left, y, shown, ROW - 1);
  if (kind === STOP) {
    context.fillStyle = theme.hatch;
    context.fillRect(left, y, shown, ROW - 1);
  }
  const characters = Math.floor((shown - 8) / theme.character);
  const label = characters < 1 ? '' : labelOf(name(f), characters);
  if (characters < 5 && label.includes('…')) return;
  context.fillStyle = theme.text;
  context.fillText(label, left + 4, y + ROW / 2, shown - 6);
  const room = characters - label.length - 3;
  if (room < 6 || !F.file[f]) return;
  const where = place(f, tree.line[node]);
  const file = where.slice(where.lastIndexOf('/') + 1);
  if (file.length > room) return;
  context.globalAlpha *= 0.62;
  context.fillText(file, left + 4 + (label.length + 2) * theme.character, y + ROW / 2, shown);
}

function outline(node, scale, top, colour, thick) {
  if (node < 0) return;
  const [left, wide] = extent(node, scale);
  if (wide <= 0) return;
  context.strokeStyle = colour;
  context.lineWidth = thick;
  context.strokeRect(left + thick / 2, tree.depth[node] * ROW - top + thick / 2, Math.max(1, wide - 1 - thick), ROW - 1 - thick);
}

function nodeAt(event) {
  const box = canvas.getBoundingClientRect();
  const x = event.clientX - box.left, y = event.clientY - box.top + scroll.scrollTop;
  const row = tree.rows[Math.floor(y / ROW)];
  if (!row || width === 0) return -1;
  const scale = width / (range.to - range.from);
  const sample = range.from + x / scale;
  const node = row[firstAfter(row, sample)];
  return node !== undefined && tree.start[node] <= sample && tree.total[node] * scale >= MIN_WIDTH ? node : -1;
}

// ---- zoom and selection ------------------------------------------------------------------------

function showZoom(animated) {
  const from = tree.start[state.zoom], to = from + tree.total[state.zoom];
  const still = !animated || matchMedia('(prefers-reduced-motion: reduce)').matches;
  animation = still ? null : { began: null, from: range.from, to: range.to, toFrom: from, toTo: to };
  if (still) Object.assign(range, { from, to });
  const path = [];
  for (let node = state.zoom; ; node = tree.parent[node]) {
    path.unshift(node);
    if (node === 0) break;
  }
  $('crumbs').replaceChildren(...path.map(node => element('li', {}, element('button', {
    textContent: labelOf(name(tree.fn[node]), 32),
    title: `${middle(name(tree.fn[node]), 300)}: ${percent(tree.total[node], tree.total[0])} of all samples`,
    onclick: () => zoom(node),
  }))));
  $('crumbs').scrollLeft = 1e6;
  $('reset').disabled = state.zoom === 0 && !state.query;
  $('invert').setAttribute('aria-pressed', state.inverted);
  fitHeight();
  reveal(state.zoom);
  showDetail();
  draw();
}

function zoom(node) {
  state.zoom = node;
  state.selected = node;
  hideTooltip();
  showZoom(true);
  writeAddress(true);
}

function zoomOut() { // to the nearest caller that is wider
  let node = state.zoom;
  while (node !== 0 && tree.total[node] === tree.total[state.zoom]) node = tree.parent[node];
  zoom(node);
}

function reveal(node) {
  const y = tree.depth[node] * ROW;
  if (y < scroll.scrollTop) scroll.scrollTop = Math.max(0, y - ROW);
  else if (y + ROW > scroll.scrollTop + height) scroll.scrollTop = y + 2 * ROW - height;
}

function select(node) {
  if (node === undefined || node < 0) return;
  state.selected = node;
  const end = tree.start[node] + tree.total[node];
  if (tree.start[node] < range.from || end > range.to) { // outside: widen to what holds it
    while (tree.start[state.zoom] > tree.start[node] || tree.start[state.zoom] + tree.total[state.zoom] < end) {
      state.zoom = tree.parent[state.zoom];
    }
    showZoom(true);
  }
  reveal(node);
  showDetail();
  draw();
  writeAddress(false);
}

function neighbour(step) {
  const row = tree.rows[tree.depth[state.selected]];
  const scale = width / (range.to - range.from);
  for (let at = row.indexOf(state.selected) + step; at >= 0 && at < row.length; at += step) {
    if (tree.total[row[at]] * scale >= MIN_WIDTH) return row[at];
  }
  return -1;
}

function describe(node) {
  const f = tree.fn[node], all = tree.total[0];
  const parts = [element('b', { textContent: middle(name(f), 600) })];
  const where = place(f, tree.line[node]);
  const kind = MEANINGS[colourOf(node)];
  const also = tree.inlined[node] && kind !== 'inlined' ? 'inlined' : '';
  const quiet = [middle(where, 300), kind, also].filter(Boolean);
  parts.push(element('div', { className: 'quiet', textContent: quiet.join(' · ') }));
  const rows = [['total here', tree.total[node]]];
  if (!state.inverted) rows.push(['self here', tree.own[node]]);
  if (isCode(f)) rows.push(['function, everywhere', F.total[f]], ['function, self', F.own[f]]);
  parts.push(element('table', {}, ...rows.map(([title, samples]) => element('tr', {},
    ...[title, grouped(samples), percent(samples, all)].map(text => element('td', { textContent: text }))))));
  return parts;
}

function showDetail() {
  const node = state.selected;
  if (node < 0) { $('detail').textContent = ''; return; }
  const f = tree.fn[node], caller = tree.parent[node];
  const shares = [percent(tree.total[node], tree.total[0]) + ' of all'];
  if (node) shares.push(percent(tree.total[node], tree.total[caller]) + (state.inverted ? ' of what it called' : ' of its caller'));
  if (!state.inverted) shares.push(percent(tree.own[node], tree.total[0]) + ' self');
  $('detail').replaceChildren(element('b', { textContent: middle(name(f), 400) }), ' ',
    element('span', { className: 'quiet', textContent: [place(f, tree.line[node]), ...shares].filter(Boolean).join(' · ') }));
}
