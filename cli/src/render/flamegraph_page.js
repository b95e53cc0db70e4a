// Everything around the canvas: search, the table, the header, keys and the pointer.

// ---- search ------------------------------------------------------------------------------------

const literally = text => text.replace(/[.*+?^${}()|[\]\\]/g, '\\$&');

function search(query) {
  state.query = query;
  let pattern = null;
  const flags = query === query.toLowerCase() ? 'iu' : 'u'; // a capital letter makes case count
  try { pattern = query ? new RegExp(query, flags) : null; } catch { pattern = new RegExp(literally(query), flags); }
  $('search').setAttribute('aria-invalid', pattern !== null && pattern.source !== query && pattern.source === literally(query));
  matches = [];
  matching = pattern && Uint8Array.from(F.name, (_, f) => pattern.test(name(f)) || pattern.test(place(f, 0)) ? 1 : 0);
  if (matching) {
    const covered = new Uint8Array(tree.count);
    let samples = 0, frames = 0;
    for (let i = 0; i < tree.count; i++) { // parents first: a match below a match counts once
      const here = matching[tree.fn[i]];
      frames += here;
      covered[i] = here | (i ? covered[tree.parent[i]] : 0);
      if (here && !(i && covered[tree.parent[i]])) { samples += tree.total[i]; matches.push(i); }
    }
    matches.sort((a, b) => tree.start[a] - tree.start[b]);
    $('matched').replaceChildren(element('b', { textContent: percent(samples, tree.total[0]) }),
      ` matched, ${counted(samples, 'sample')} in ${counted(frames, 'frame')}`);
  } else {
    $('matched').textContent = '';
  }
  $('reset').disabled = state.zoom === 0 && !state.query;
  if (state.tab === 'table') showTable();
  draw();
}

function setSearch(query, step) {
  $('search').value = query;
  search(query);
  writeAddress(step);
}

function nextMatch(step) {
  if (!matches.length) return;
  const at = matches.indexOf(state.selected);
  select(matches[at < 0 ? (step > 0 ? 0 : matches.length - 1) : (at + step + matches.length) % matches.length]);
}

function toggleInvert() {
  state.inverted = !state.inverted;
  Object.assign(state, { zoom: 0, selected: -1 });
  hovered = -1;
  tree = state.inverted ? (bottomUp ||= invert(topDown)) : topDown;
  scroll.scrollTop = 0;
  search(state.query);
  showZoom(false);
  writeAddress(true);
}

function reset() {
  setSearch('', false);
  zoom(0);
  state.selected = -1;
  showDetail();
  scroll.scrollTop = 0;
  writeAddress(false);
}

// ---- table, header, legend ---------------------------------------------------------------------

function showTab() {
  for (const tab of ['flame', 'table']) {
    $(tab).hidden = state.tab !== tab;
    $('tab-' + tab).setAttribute('aria-selected', state.tab === tab);
  }
  if (state.tab === 'table') showTable(); else resize();
}

function openTab(tab) {
  state.tab = tab;
  showTab();
  writeAddress(true);
}

function showTable() {
  const keys = { own: f => F.own[f], total: f => F.total[f], name, place: f => place(f, F.line[f]) };
  const key = keys[state.sort], sign = state.ascending ? 1 : -1;
  const compare = (a, b) => a < b ? -1 : a > b ? 1 : 0;
  const found = [];
  for (let f = 0; f < F.name.length; f++) {
    if (isCode(f) && F.total[f] > 0 && (!matching || matching[f])) found.push(f);
  }
  found.sort((a, b) => sign * compare(key(a), key(b)) || F.own[b] - F.own[a] || F.total[b] - F.total[a]);
  const all = profile.samples;
  const number = samples => {
    const cell = element('td', { className: 'number' }, grouped(samples), ' ', element('span', { textContent: percent(samples, all) }));
    cell.style.setProperty('--size', share(samples, all) + '%');
    return cell;
  };
  $('rows').replaceChildren(...found.slice(0, MAX_TABLE_ROWS).map(f => {
    const swatch = element('i', {});
    swatch.style.background = `var(--${COLOURS[F.kind[f]]})`;
    return element('tr', { tabIndex: 0, onclick: () => locate(f), onkeydown: event => { if (event.key === 'Enter') locate(f); } },
      number(F.own[f]), number(F.total[f]),
      element('td', { className: 'function' }, swatch, middle(name(f), 300)),
      element('td', { className: 'place', textContent: middle(place(f, F.line[f]), 200) }));
  }));
  $('more').textContent = found.length > MAX_TABLE_ROWS
    ? `${counted(found.length - MAX_TABLE_ROWS, 'more function')}; search to narrow the table` : counted(found.length, 'function');
  for (const button of document.querySelectorAll('[data-sort]')) {
    button.dataset.order = button.dataset.sort === state.sort ? (state.ascending ? 'up' : 'down') : '';
  }
}

function locate(f) {
  state.tab = 'flame';
  setSearch('^' + literally(name(f)) + '$', true);
  showTab();
  canvas.focus();
}

function showHeader() {
  const { samples, complete, stops } = profile;
  const number = text => element('b', { textContent: text });
  $('facts').replaceChildren(number(grouped(samples)), ' samples, ', number(percent(complete, samples)), ' walked to the end of the stack');
  $('stops').replaceChildren(...stops.map(({ reason, count, complete: whole }) => {
    const bar = element('i', {});
    bar.style.width = share(count, samples) + '%';
    return element('li', {}, element('button', {
      className: whole ? 'whole' : 'cut', disabled: whole,
      title: `${reason}: ${counted(count, 'sample')}` + (whole ? '' : '; click to find them'),
      onclick: () => { setSearch('^\\[' + literally(reason) + '\\]$', true); openTab('flame'); },
    }, element('span', { className: 'name', textContent: reason }), element('span', { className: 'bar' }, bar),
    element('span', { className: 'share', textContent: percent(count, samples) })));
  }));
  const self = new Float64Array(COLOURS.length);
  for (let i = 0; i < topDown.count; i++) {
    const kind = F.kind[topDown.fn[i]];
    self[topDown.inlined[i] && kind === NATIVE ? INLINED : kind] += topDown.own[i];
  }
  $('legend').replaceChildren(...[NATIVE, INLINED, KERNEL, UNRESOLVED, STOP].map(kind => {
    const swatch = element('i', {});
    swatch.style.background = `var(--${COLOURS[kind]})`;
    return element('li', {}, swatch, MEANINGS[kind] + (kind === STOP ? '' : ' ' + percent(self[kind], samples)));
  }));
}

// ---- events ------------------------------------------------------------------------------------

const KEYS = {
  '/': () => { $('search').focus(); $('search').select(); },
  '?': () => $('keys').showModal(),
  '0': reset,
  Escape: () => state.query ? setSearch('', true) : zoomOut(),
  Enter: () => { if (state.selected >= 0) zoom(state.selected); },
  ArrowUp: () => select(state.selected < 0 ? state.zoom : tree.parent[state.selected]),
  ArrowDown: () => select(state.selected < 0 ? state.zoom : tree.heaviest[state.selected]),
  ArrowLeft: () => select(state.selected < 0 ? state.zoom : neighbour(-1)),
  ArrowRight: () => select(state.selected < 0 ? state.zoom : neighbour(1)),
  f: () => { if (state.selected >= 0) setSearch('^' + literally(name(tree.fn[state.selected])) + '$', true); },
  i: toggleInvert,
  t: () => openTab(state.tab === 'flame' ? 'table' : 'flame'),
};

document.addEventListener('keydown', event => {
  if (event.ctrlKey || event.metaKey || event.altKey || $('keys').open) return;
  if (event.target === $('search')) {
    if (event.key === 'Enter') nextMatch(event.shiftKey ? -1 : 1);
    else if (event.key === 'Escape') { setSearch('', true); canvas.focus(); } else return;
  } else {
    const inFlame = event.target === canvas || event.target === document.body;
    const act = KEYS[event.key];
    if (!act || (!inFlame && /^(Enter|Arrow)/.test(event.key)) || (state.tab === 'table' && /^(Enter|Arrow|f$|i$)/.test(event.key))) return;
    act();
  }
  event.preventDefault();
});

canvas.addEventListener('click', event => {
  const node = nodeAt(event);
  if (node >= 0) zoom(node);
});
canvas.addEventListener('pointermove', event => {
  const node = nodeAt(event);
  const tip = $('tooltip');
  if (node !== hovered) {
    hovered = node;
    canvas.style.cursor = node < 0 ? 'default' : 'pointer';
    tip.hidden = node < 0;
    if (node >= 0) tip.replaceChildren(...describe(node));
    draw();
  }
  if (node < 0) return;
  const box = tip.getBoundingClientRect();
  const flip = event.clientY + 20 + box.height > innerHeight;
  tip.style.left = Math.max(8, Math.min(event.clientX + 14, innerWidth - box.width - 8)) + 'px';
  tip.style.top = Math.max(8, flip ? event.clientY - box.height - 14 : event.clientY + 18) + 'px';
});
for (const left of ['pointerleave', 'pointercancel']) canvas.addEventListener(left, hideTooltip);
scroll.addEventListener('scroll', () => { hideTooltip(); draw(); });
function hideTooltip() {
  hovered = -1;
  $('tooltip').hidden = true;
  draw();
}

$('search').addEventListener('input', () => { search($('search').value); writeAddress(false); });
$('invert').onclick = toggleInvert;
$('reset').onclick = reset;
$('help').onclick = KEYS['?'];
$('tab-flame').onclick = () => openTab('flame');
$('tab-table').onclick = () => openTab('table');
for (const button of document.querySelectorAll('[data-sort]')) {
  button.onclick = () => {
    const text = button.dataset.sort === 'name' || button.dataset.sort === 'place';
    state.ascending = state.sort === button.dataset.sort ? !state.ascending : text;
    state.sort = button.dataset.sort;
    showTable();
  };
}
addEventListener('popstate', readAddress);
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => { readTheme(); draw(); });
new ResizeObserver(() => requestAnimationFrame(() => { if (state.tab === 'flame') resize(); })).observe(scroll);

$('empty').hidden = profile.samples > 0;
scroll.hidden = $('crumbs').hidden = profile.samples === 0;
readTheme();
showHeader();
readAddress();
