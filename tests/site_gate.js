// What is wrong with an open page, as a list of sentences. Called with {figures: bool, text: bool}.
({figures, text}) => {
  const wrong = [];

  // ---- colours: [red, green, blue, alpha] in 0..255 and 0..1
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const known = new Map();
  function colour(css) {
    if (!css || css === "none" || css === "transparent") return [0, 0, 0, 0];
    if (!known.has(css)) {
      canvas.clearRect(0, 0, 1, 1);
      canvas.fillStyle = "rgba(0,0,0,0)";
      canvas.fillStyle = css;
      canvas.fillRect(0, 0, 1, 1);
      const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
      known.set(css, [r, g, b, a / 255]);
    }
    return known.get(css);
  }
  const over = ([r, g, b, a], [R, G, B]) => [r * a + R * (1 - a), g * a + G * (1 - a), b * a + B * (1 - a), 1];
  const part = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * part(r) + .7152 * part(g) + .0722 * part(b);
  function contrast(a, b) {
    const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
    return (high + .05) / (low + .05);
  }

  // ---- the ink of a trace
  const WEAKEST = 1.2;
  function shown(mark, stop) {                       // opacity of a mark and of all that it lies in
    let opacity = 1;
    for (let e = mark; e && e !== stop; e = e.parentElement) {
      const s = getComputedStyle(e);
      if (s.display === "none" || s.visibility === "hidden") return 0;
      opacity *= Number(s.opacity);
    }
    return opacity;
  }
  function inks(mark) {                              // css colours that a mark is painted with, with their opacities
    const s = getComputedStyle(mark), found = [];
    if (s.fill.startsWith("url")) {
      const pattern = document.getElementById(s.fill.match(/#([^"')]+)/)[1]);
      for (const e of pattern ? pattern.querySelectorAll("*") : []) {
        const p = getComputedStyle(e);
        const lines = p.stroke !== "none" && parseFloat(p.strokeWidth) > 0;   // a line has no inside
        found.push(lines ? [p.stroke, Number(p.strokeOpacity)] : [p.fill, Number(p.fillOpacity)]);
      }
    } else if (s.fill !== "none") found.push([s.fill, Number(s.fillOpacity)]);
    if (s.stroke !== "none" && parseFloat(s.strokeWidth) > 0) found.push([s.stroke, Number(s.strokeOpacity)]);
    return found;
  }
  function visible(mark, div, ground) {
    const box = mark.getBoundingClientRect(), thin = Math.max(box.width, box.height);
    if (thin < 1) return false;
    const opacity = shown(mark, div);
    if (mark.tagName === "image") return opacity > .05 && !!mark.getAttribute("href") && box.width * box.height > 1;
    return inks(mark).some(([css, own]) => {
      const [r, g, b, a] = colour(css);
      return a * own * opacity > .05 && contrast(over([r, g, b, a * own * opacity], ground), ground) >= WEAKEST;
    });
  }
  const flat = v => v == null ? [] : Array.isArray(v) || ArrayBuffer.isView(v) ? [...v].flatMap(flat) : [v];
  function holdsData(t) {
    if (["image", "heatmap"].includes(t.type)) return true;
    if (t.type === "bar") return flat(t.orientation === "h" ? t.x : t.y).some(v => Number(v));
    return [t.x, t.y].every(v => v === undefined || flat(v).some(u => u !== null));
  }

  for (const div of figures ? document.querySelectorAll(".drawing, .plotly-graph-div") : []) {
    const name = `figure ${div.id} (${(div.getAttribute("aria-label") || "").slice(0, 60)})`;
    const svg = div.querySelector(".main-svg");
    if (!svg) { wrong.push(`${name} is blank: ${div.textContent.slice(0, 80)}`); continue; }
    const room = div.closest("figure, .output, body").getBoundingClientRect(), wide = svg.getBoundingClientRect();
    if (wide.width > room.width + 1 || wide.right > room.right + 1) wrong.push(`${name} is ${Math.round(wide.width)} px wide in a container of ${Math.round(room.width)} px`);
    const full = div._fullLayout, paper = over(colour(full.paper_bgcolor), [255, 255, 255]), ground = over(colour(full.plot_bgcolor), paper);
    const groups = new Map();
    for (const g of div.querySelectorAll(".cartesianlayer g")) {   // not those of the legend
      const d = g.__data__, t = Array.isArray(d) && d[0] && d[0].trace;
      if (t) groups.set(t.index, [...(groups.get(t.index) || []), ...g.querySelectorAll("path, text, image, rect, line, circle")]);
    }
    const traces = div._fullData.filter(t => t.visible === true && holdsData(t));
    for (const t of traces)
      if (!(groups.get(t.index) || []).some(m => visible(m, div, ground)))
        wrong.push(`${name}: trace ${t.index} (${t.type}, ${t.name}) has no visible ink`);
    const drawn = div.querySelectorAll(".shapelayer path, .annotation text, .infolayer .annotation").length;
    if (!traces.length && !drawn) wrong.push(`${name} is blank: no data, no shape, no word`);
    for (const e of div.querySelectorAll(".main-svg text")) {
      const box = e.getBoundingClientRect();
      if (box.width > 0 && shown(e, div) > .05 && !e.closest(".hoverlayer") && (box.right > wide.right + 3 || box.left < wide.left - 3))
        wrong.push(`${name}: the words "${e.textContent.slice(0, 40)}" are cut off`);
    }
  }

  // ---- the page itself
  const all = document.documentElement;
  if (all.scrollWidth > all.clientWidth) wrong.push(`the page is ${all.scrollWidth} px wide in a window of ${all.clientWidth} px`);
  for (const th of document.querySelectorAll("th")) if (!["col", "row", "colgroup", "rowgroup"].includes(th.scope)) wrong.push(`th without scope: ${th.textContent.slice(0, 40)}`);

  for (const e of document.querySelectorAll(".katex-error")) wrong.push(`an equation that KaTeX cannot read: ${e.textContent.slice(0, 60)}`);

  if (text) {
    const ground = new Map();
    function behind(e) {                             // the colour that an element's words stand on
      if (!e) return colour(getComputedStyle(document.documentElement).colorScheme.includes("dark") && matchMedia("(prefers-color-scheme: dark)").matches ? "#121212" : "white");
      if (!ground.has(e)) {
        const own = colour(getComputedStyle(e).backgroundColor);
        ground.set(e, own[3] >= 1 ? own : over(own, behind(e.parentElement)));
      }
      return ground.get(e);
    }
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), seen = new Set();
    while (walk.nextNode()) {
      const e = walk.currentNode.parentElement;
      if (!walk.currentNode.textContent.trim() || seen.has(e) || e.closest("script, style, noscript, .drawing, svg, math, .katex")) continue;
      seen.add(e);
      const s = getComputedStyle(e), box = e.getBoundingClientRect();
      if (s.visibility === "hidden" || s.display === "none" || box.width < 2 || box.height < 2 || !e.checkVisibility({opacityProperty: true})) continue;
      const under = behind(e), c = contrast(over(colour(s.color), under), under), least = e.closest("pre, code") ? 3 : 4.4;
      if (c < least) wrong.push(`contrast ${c.toFixed(1)} of "${e.textContent.trim().slice(0, 30)}" (${e.tagName} ${e.className}): ${s.color} on ${under.map(Math.round)}`);
    }
    if (matchMedia("(prefers-color-scheme: dark)").matches)
      for (const div of document.querySelectorAll(".drawing:not(.pictures)"))
        if (getComputedStyle(div).filter === "none") wrong.push(`figure ${div.id} stays light in dark mode`);
  }
  return wrong;
}
