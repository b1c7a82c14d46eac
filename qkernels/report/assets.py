"""The style sheet and the script of the reports, kept as text so that a report needs nothing beside itself."""

STYLE = """
:root {
  --bg: #faf9f7; --card: #ffffff; --ink: #1c1f24; --soft: #5d6470; --line: #e4e1db; --zero: #a9a59c;
  --pos: #6fb1f2; --neg: #f6993f; --chosen: #1a6dc2; --rejected: #c8650a; --neutral: #3b424d; --focus: #7a3fd8;
  --good: #1d6b45; --bad: #a3361f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #14161a; --card: #1c1f24; --ink: #eceae6; --soft: #a0a7b2; --line: #30343b; --zero: #69707c;
    --pos: #2467ae; --neg: #b25c07; --chosen: #6fb3ff; --rejected: #ffab5c; --neutral: #d5d8dd; --focus: #b794ff;
    --good: #7fd0a5; --bad: #ff9f8a;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; overflow-wrap: break-word; -webkit-text-size-adjust: 100%; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 28px 96px; }
h1 { font-size: 2rem; line-height: 1.15; letter-spacing: -.02em; margin: 0 0 .3em; }
h2 { font-size: 1.3rem; letter-spacing: -.01em; margin: 0 0 .35em; }
p { margin: 0 0 .6em; }
.top p { color: var(--soft); font-size: 1.06rem; max-width: 46em; }
.part { margin-top: 52px; }
.intro, .prose p { color: var(--soft); max-width: 46em; }
.prose { max-width: 46em; }
.formula { font: 1.06rem/1.7 ui-serif, Georgia, Cambria, "Times New Roman", serif; color: var(--ink) !important;
  padding: .5em 1em; border-left: 3px solid var(--chosen); background: var(--card); border-radius: 0 8px 8px 0; }

.tiles { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); margin-top: 26px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 16px 18px; display: flex;
  flex-direction: column; }
.tile .label { font-size: .95rem; line-height: 1.35; font-weight: 600; }
.tile .value { font-size: 2.1rem; line-height: 1.2; font-weight: 650; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.tile .remark { color: var(--soft); font-size: .86rem; line-height: 1.35; margin-top: 3px; }

.heat-legend, .legend { display: flex; flex-wrap: wrap; gap: 6px 20px; align-items: center; color: var(--soft);
  font-size: .88rem; }
.heat-legend { margin: 14px 0 18px; }
.key { display: inline-flex; align-items: center; gap: 7px; }
.ramp { display: inline-flex; align-items: center; gap: 9px; font-variant-numeric: tabular-nums; }
.ramp .bar { width: 150px; height: 14px; border-radius: 4px; border: 1px solid var(--line);
  background: linear-gradient(90deg, var(--neg), var(--card) 50%, var(--pos)); }
.swatch { width: 14px; height: 14px; border-radius: 4px; }
.swatch.neg { background: var(--neg); }
.swatch.pos { background: var(--pos); }

.pair { background: var(--card); border: 1px solid var(--line); border-radius: 12px; margin: 0 0 16px;
  overflow: hidden; }
.pair > header { display: flex; flex-wrap: wrap; gap: 4px 24px; justify-content: space-between; align-items: baseline;
  padding: 12px 18px 10px; border-bottom: 1px solid var(--line); }
.prompt { flex: 1 1 320px; min-width: 0; }
.turn { margin: 0 0 .25em; white-space: pre-wrap; }
.turn .role { color: var(--soft); font-size: .8rem; margin-right: .35em; }
summary { cursor: pointer; }
.more { color: var(--chosen); font-size: .85rem; white-space: nowrap; }
details[open] .more { visibility: hidden; }
details .turn { margin-top: .5em; }
.note { color: var(--soft); font-size: .86rem; margin: 8px 18px 0; }
.verdict { white-space: nowrap; color: var(--soft); font-variant-numeric: tabular-nums; }
.verdict b { color: var(--ink); }
.badge { margin-left: 8px; font-size: .86rem; font-weight: 600; }
.badge.right { color: var(--good); }
.badge.wrong { color: var(--bad); }
.badge.tie { color: var(--soft); }
.answer { display: grid; grid-template-columns: 92px minmax(0, 1fr); padding: 8px 18px; }
.answer + .answer { border-top: 1px dashed var(--line); }
.side { padding-top: 4px; font-variant-numeric: tabular-nums; line-height: 1.3; }
.side .name { display: block; font-size: .8rem; color: var(--soft); }
.tokens { line-height: 2; }
.t { padding: .17em .02em; border-radius: .28em; cursor: default; -webkit-box-decoration-break: clone;
  box-decoration-break: clone; unicode-bidi: isolate; }
.t.p { background: color-mix(in srgb, var(--pos) var(--a), transparent); }
.t.n { background: color-mix(in srgb, var(--neg) var(--a), transparent); }
.t.nan { text-decoration: wavy underline var(--bad); }
.t.ws, .t.special { color: var(--soft); font-size: .84em; }
.t.special { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .74em;
  margin-left: .35em; }
.t.planted { outline: 2px solid var(--ink); margin: 0 2px; }
.t.twin, .t.on { box-shadow: 0 0 0 2px var(--focus); }
.t:focus { outline: none; box-shadow: 0 0 0 3px var(--focus); }
.t.planted:focus { outline: 2px solid var(--ink); }

#tip { position: absolute; z-index: 9; max-width: 300px; background: var(--ink); color: var(--bg); border-radius: 9px;
  padding: 9px 13px; font-size: .88rem; line-height: 1.45; pointer-events: none;
  box-shadow: 0 6px 24px rgb(0 0 0 / .25); }
#tip[hidden] { display: none; }
#tip strong { display: block; overflow-wrap: anywhere; }
#tip dl { display: grid; grid-template-columns: auto auto; gap: 0 14px; margin: 3px 0 0;
  font-variant-numeric: tabular-nums; }
#tip dt { opacity: .8; }
#tip dd { margin: 0; text-align: right; }
#tip em { display: block; font-style: normal; font-weight: 600; margin-top: 3px; }

.charts { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
.chart { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 16px 18px 10px; }
.chart figcaption .unit { color: var(--soft); font-size: .88rem; margin-left: .4em; }
.chart figcaption p { color: var(--soft); font-size: .88rem; margin: 2px 0 0; }
.legend { margin: 8px 0 4px; gap: 2px 20px; }
.chart .at { float: right; color: var(--soft); font-size: .88rem; font-variant-numeric: tabular-nums; }
.legend output { color: var(--ink); font-variant-numeric: tabular-nums; font-weight: 600; }
.mark { width: 22px; height: 8px; }
.plot { display: block; width: 100%; height: auto; overflow: visible; touch-action: pan-y; }
.plot .grid { stroke: var(--line); }
.plot .zero, .plot .axis { stroke: var(--zero); }
.plot text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.line { fill: none; stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round; }
.line.faint { stroke-width: 1.5; stroke-dasharray: 2 4; }
.c-chosen { stroke: var(--chosen); }
.c-rejected { stroke: var(--rejected); }
.c-neutral { stroke: var(--neutral); }
.cursor { stroke: var(--soft); stroke-dasharray: 3 3; visibility: hidden; }
.reading .cursor { visibility: visible; }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .95rem; }
th, td { padding: 7px 22px 7px 0; border-bottom: 1px solid var(--line); text-align: right; font-weight: 400; }
th:first-child { text-align: left; }
td:last-child, th:last-child { padding-right: 4px; }
thead th { color: var(--soft); font-size: .86rem; }
tr.strong th, tr.strong td { font-weight: 650; }
.spans td, .spans th { text-align: left; vertical-align: top; }
.spans .num { white-space: nowrap; color: var(--rejected); }
.spans .where { overflow-wrap: anywhere; }
.spans mark { background: color-mix(in srgb, var(--neg) 60%, transparent); color: inherit; border-radius: .28em;
  padding: .1em .15em; }
.facts td { text-align: left; overflow-wrap: anywhere; }
.facts th { color: var(--soft); vertical-align: top; white-space: nowrap; }

@media (max-width: 640px) {
  main { padding: 24px 14px 130px; }
  h1 { font-size: 1.6rem; }
  .part { margin-top: 38px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 10px; }
  .tile { padding: 12px 13px; }
  .tile .value { font-size: 1.55rem; }
  .pair > header, .answer { padding-left: 13px; padding-right: 13px; }
  .answer { display: block; }
  .side { display: flex; gap: 10px; align-items: baseline; }
  .chart { padding: 13px 11px 8px; }
  .plot text { font-size: 14px; }
  .facts th { white-space: normal; }
  #tip { position: fixed; left: 10px !important; right: 10px; top: auto !important; bottom: 10px; max-width: none; }
}
.framed main { padding: 6px 4px 24px; }
@media print { .pair, .chart { break-inside: avoid; } }
"""

SCRIPT = """
'use strict';
(() => {
  const tip = document.getElementById('tip');
  const names = ['reward', 'log-prob, policy', 'log-prob, reference', 'entropy of the policy'];
  let current = null;
  const format = (x, digits, sign) => (sign && x > 0 ? '+' : '') + x.toFixed(digits).replace('-', '\\u2212');

  function element(kind, text, parent) {
    const made = document.createElement(kind);
    made.textContent = text;
    parent.append(made);
    return made;
  }

  function hide() {
    tip.hidden = true;
    document.querySelectorAll('.t.twin, .t.on').forEach(t => t.classList.remove('twin', 'on'));
    current = null;
  }

  function show(token) {
    if (token === current) return;
    hide();
    current = token;
    token.classList.add('on');
    if (token.dataset.k !== undefined) {
      token.closest('.pair').querySelectorAll(`.t[data-k="${token.dataset.k}"]`).forEach(t => {
        if (t !== token) t.classList.add('twin');
      });
    }
    tip.textContent = '';
    element('strong', token.dataset.t, tip);
    const list = element('dl', '', tip);
    token.dataset.v.split(' ').forEach((value, i) => {
      if (value === '') return;
      element('dt', names[i], list);
      element('dd', format(Number(value), 3, i === 0) + (i ? ' nat' : ''), list);
    });
    if (token.classList.contains('planted')) element('em', 'planted error', tip);
    tip.hidden = false;
    const box = token.getClientRects()[0];
    const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 12);
    const above = box.top - tip.offsetHeight - 10;
    tip.style.left = Math.max(8, left) + window.scrollX + 'px';
    tip.style.top = (above > 4 ? above : box.bottom + 10) + window.scrollY + 'px';
  }

  const tokenOf = event => event.target.closest ? event.target.closest('.tokens .t') : null;
  document.addEventListener('pointerover', event => {
    const token = tokenOf(event);
    if (token) show(token); else if (event.pointerType === 'mouse') hide();
  });
  document.addEventListener('click', event => { const token = tokenOf(event); if (token) show(token); else hide(); });
  document.addEventListener('focusin', event => { const token = tokenOf(event); if (token) show(token); else hide(); });
  document.addEventListener('keydown', event => {
    if (event.key === 'Escape') return hide();
    const token = tokenOf(event);
    const all = token ? [...token.parentElement.querySelectorAll('.t')] : [];
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -all.length, End: all.length }[event.key];
    if (!token || !step) return;
    const next = all[Math.max(0, Math.min(all.length - 1, all.indexOf(token) + step))];
    token.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
    event.preventDefault();
  });

  // In a frame of a notebook: as tall as the content.
  const fit = () => { window.frameElement.style.height = document.documentElement.offsetHeight + 2 + 'px'; };
  try {
    if (window.frameElement) {
      document.documentElement.classList.add('framed');
      fit();
      window.addEventListener('resize', fit);
      document.addEventListener('toggle', fit, true);
    }
  } catch (refused) { /* a page of another origin around this one */ }

  document.querySelectorAll('svg.plot').forEach(plot => {
    const lines = JSON.parse(plot.dataset.lines);
    const percent = plot.dataset.percent === '1';
    const outputs = plot.parentElement.querySelectorAll('.legend output');
    const at = plot.parentElement.querySelector('.at');
    const cursor = plot.querySelector('.cursor');
    const atRest = [at, ...outputs].map(shown => [shown, shown.textContent]);
    const longest = lines.reduce((a, b) => (b.length > a.length ? b : a), []);
    const nearest = (points, x) =>
      points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a), points[0]);
    plot.addEventListener('pointermove', event => {
      if (!longest.length) return;
      const box = plot.getBoundingClientRect();
      const point = nearest(longest, (event.clientX - box.left) * plot.viewBox.baseVal.width / box.width);
      cursor.setAttribute('x1', point[0]);
      cursor.setAttribute('x2', point[0]);
      plot.classList.add('reading');
      at.textContent = plot.dataset.x + ' ' + point[1];
      lines.forEach((points, i) => {
        if (!points.length) return;
        const y = nearest(points, point[0])[2];
        outputs[i].textContent = percent ? format(100 * y, 1, false) + '\\u00a0%' : format(y, 3, false);
      });
    });
    plot.addEventListener('pointerleave', () => {
      plot.classList.remove('reading');
      atRest.forEach(([shown, text]) => { shown.textContent = text; });
    });
  });
})();
"""
