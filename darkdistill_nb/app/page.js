// One explorer on a page without a kernel: named controls, a sentence, the figure, and its numbers as a table.

const VIEWS = {
  exits: ExitView, splits: SplitView, distillation: DistillationView, alignment: AlignmentView,
  distree: DistreeView, difficulty: DifficultyView, stored: StoredView,
};
const NARROW = 560;                   // pixels
const KEYS = {"data-lm-suppress-shortcuts": "true"};   // or JupyterLab takes the arrow keys for itself
let rows = 0;                         // controls made so far, for their ids

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function choice({label, options}, send) {   // a list to choose from
  const id = `explorer-control-${++rows}`;
  const list = make("select", {id, ...KEYS}, ...options.map(([text, value]) => make("option", {value}, text)));
  list.addEventListener("change", () => send(list.value));
  return {row: make("div", {class: "explorer-row"}, make("label", {for: id}, label), list), show: value => list.value = value};
}

function slider({label, low, high, step, log, whole}, send) {   // a number field and a range that hold one value
  const id = `explorer-control-${++rows}`;
  let digits = 0;
  const steps = v => log ? Math.log10(v / low) / step : (v - low) / step;
  const there = n => Math.min(high, log ? low * 10 ** (n * step) : low + n * step);
  const shown = v => whole ? Math.round(v) : log ? Number(v.toPrecision(5)) : Number(v.toFixed(digits)) + 0;
  const field = make("input", {id, type: "number", ...KEYS}), name = {"aria-label": `${label}, slider`};
  const range = make("input", {type: "range", min: 0, step: 1, ...name, ...KEYS});
  const bound = () => {
    digits = whole ? 0 : Math.max(0, 3 - Math.floor(Math.log10(step)));
    Object.assign(field, {min: shown(low), max: shown(high), step: log ? "any" : step});
    range.max = Math.ceil(steps(high) - 1e-6);
  };
  bound();
  const take = () => {
    const v = field.valueAsNumber;
    send(Number.isNaN(v) ? null : Math.min(high, Math.max(low, whole ? Math.round(v) : v)));
  };
  field.addEventListener("change", take);
  field.addEventListener("keydown", e => { if (e.key === "Enter") take(); });   // a notebook swallows the change
  range.addEventListener("input", () => send(Number(there(Number(range.value)).toPrecision(12))));
  const show = (value, limits) => {
    if (limits) [low, high, step] = [limits.low, limits.high, limits.step];
    if (limits) bound();
    if (document.activeElement !== field || field.valueAsNumber !== value) field.value = shown(value);
    range.value = Math.round(steps(value));
    range.setAttribute("aria-valuetext", shown(value));
  };
  return {row: make("div", {class: "explorer-row"}, make("label", {for: id}, label), field, range), show};
}

function cells(columns, body) {       // of a table whose headings are said when it is read aloud
  const line = (first, others) => make("tr", {}, first, ...others);
  const head = columns.map(c => make("th", {scope: "col"}, c));
  const rows = body.map(([first, ...rest]) => line(make("th", {scope: "row"}, first), rest.map(v => make("td", {}, v))));
  return [make("thead", {}, line(head[0], head.slice(1))), make("tbody", {}, ...rows)];
}

function layoutFor(spec, width, drawn) {    // below NARROW pixels panels stand one above the other
  const layout = structuredClone(spec.figure.layout);
  Object.assign(layout, {autosize: false, width});
  for (const [path, value] of Object.entries(width < NARROW ? spec.narrow : {})) {
    const keys = path.split("."), last = keys.pop();
    keys.reduce((node, key) => node[key] ??= {}, layout)[last] = value;
  }
  if (!drawn) return layout;                 // plotly measures letters once a width: doing so takes half of a drawing's time
  for (const [key, tickangle] of drawn.angles)
    layout[key] = {tickangle, ...layout[key], automargin: false, ticklabeloverflow: "allow"};
  layout.margin = {...layout.margin, ...drawn.margin};
  return layout;
}

function measured(figure) {           // what plotly has found by measuring: margins, and the angles of numbers at axes
  const all = figure._fullLayout, {l, r, t, b} = all._size, axes = Object.keys(all).filter(key => /^[xy]axis/.test(key));
  const angle = key => Object.values(all[key]._tickAngles ?? {})[0];
  return {margin: {l, r, t, b}, angles: axes.map(key => [key, angle(key) || 0])};
}

function followTheme(root) {          // a figure is drawn for light pages; where letters are light it is inverted
  const look = () => {
    const [r, g, b] = getComputedStyle(root.parentElement || root).color.match(/[\d.]+/g).map(Number);
    root.classList.toggle("explorer-dark", .299 * r + .587 * g + .114 * b > 140);
  };
  look();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", look);
  const names = ["class", "data-theme", "theme", "style", "data-jp-theme-light"];
  const again = new MutationObserver(look), filter = {attributes: true, attributeFilter: names};
  for (const element of [document.documentElement, document.body]) again.observe(element, filter);
}

async function start(root, tell = () => {}) {   // tell(state): what the reader has done
  root.dataset.ready = "no";
  const part = name => root.querySelector(`.explorer-${name}`), figure = part("figure");
  const spec = JSON.parse(root.querySelector("script").textContent), view = new VIEWS[spec.kind](spec.data);
  const traces = spec.figure.data, table = part("table");
  let width = Math.max(280, root.clientWidth), drawn = null, waiting = false, pending = null;
  const numbers = () => {
    if (!part("fold").open || !pending) return;
    table.replaceChildren(make("caption", {}, pending.says), ...cells(pending.table.columns, pending.table.rows));
    pending = null;
  };
  const draw = async () => {
    waiting = false;
    const r = pending = view.look();
    for (const [name, control] of controls) if (name in r.values) control.show(r.values[name], r.limits?.[name]);
    part("says").textContent = r.says;
    numbers();
    for (const [i, change] of Object.entries(r.changes)) Object.assign(traces[i], change);
    const seen = traces.filter(t => t.visible !== false);   // plotly takes its time for hidden ones too
    await Plotly.react(figure, seen, layoutFor(spec, width, drawn), spec.config);
    drawn ??= measured(figure);
  };
  const send = name => value => {
    try {
      if (value !== null) view.set(name, value);
      if (!waiting) queueMicrotask(draw);     // browsers send the moves of a slider once a frame already
      waiting = true;
      tell(view.state);
    } catch (e) {
      draw();
      part("says").textContent = e.message;
    }
  };
  const controls = spec.controls.map(c => [c.name, (c.options ? choice : slider)(c, send(c.name))]);
  part("controls").replaceChildren(...controls.map(([, c]) => c.row));
  const put = state => {
    if (JSON.stringify(state) === JSON.stringify(view.state)) return;
    view.put(state);
    draw();
  };
  part("reset").addEventListener("click", () => {
    put(spec.data.defaults);
    tell(view.state);
  });
  part("fold").addEventListener("toggle", numbers);
  followTheme(root);
  figure.textContent = "";
  figure.classList.add("plotly-graph-div");
  await draw();
  if (view.sprite) await view.sprite.decode().then(draw);
  new ResizeObserver(() => {
    if (!root.clientWidth || root.clientWidth === width) return;
    [width, drawn] = [Math.max(280, root.clientWidth), null];
    draw();
  }).observe(root);
  root.dataset.ready = "yes";
  return put;
}

function startAll() {
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", startAll);
  else for (const root of document.querySelectorAll(".explorer:not([data-ready])"))
    start(root).catch(e => root.querySelector(".explorer-says").textContent = `This explorer could not be drawn: ${e.message}`);
}
