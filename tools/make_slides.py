#!/usr/bin/env python3
"""Make the figures for slides from the figures that stand in the instructor's labs.   make_slides.py [--check] [--png FOLDER]

Each plotly figure that an instructor's lab has stored becomes `assets/slides/LAB_NUMBER.svg`: 1280 x 720, with letters that are read
from the last row. So the slide shows what students see, and nothing is drawn twice. `assets/slides/slides.json` says from which lab
and cell each one comes, with a digest of the figure; the table of `tutorials/INSTRUCTOR.md` is written from it.

Needs Chromium and Playwright (extra `dev`). --check needs neither: it writes nothing and ends with 1 where a lab's figure has
changed since. --png also writes pictures, to look at them."""

import argparse, hashlib, json, re, shutil, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from make_labs import between

ROOT = Path(__file__).resolve().parent.parent
SLIDES = ROOT / "assets/slides"
INDEX = SLIDES / "slides.json"
GUIDE = ROOT / "tutorials/INSTRUCTOR.md"
FIGURE = "application/vnd.plotly.v1+json"
SIZE = dict(width=1280, height=720)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def stored_figures(path):
    "Index of the cell and figure, for each figure in a notebook's outputs."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [
        (i, out["data"][FIGURE])
        for i, cell in enumerate(cells)
        for out in cell.get("outputs", [])
        if FIGURE in out.get("data", {})
    ]


def digest(figure):
    "Sixteen hex digits of what is drawn."
    drawn = json.dumps([figure["data"], figure["layout"]], sort_keys=True)
    return hashlib.sha256(drawn.encode()).hexdigest()[:16]


def part_of(path, cell):
    "Heading above a cell, without its number."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"][: cell + 1]
    heads = re.findall(r"^## (.+)$", "\n".join("".join(c["source"]) for c in cells), re.M)
    return re.sub(r"^(Part )?\d+[.:]?\s*", "", heads[-1]) if heads else ""


def wanted():
    "[{file, lab, cell, part, title, digest}] of every figure, and the figures, in the labs' order."
    rows, figures = [], []
    for path in sorted((ROOT / "tutorials/instructor").glob("lab*.ipynb")):
        for number, (cell, figure) in enumerate(stored_figures(path), start=1):
            rows.append(
                dict(
                    file=f"{path.stem}_{number}.svg",
                    lab=path.stem,
                    cell=cell,
                    part=part_of(path, cell),
                    title=figure["layout"].get("title", {}).get("text", ""),
                    digest=digest(figure),
                )
            )
            figures.append(figure)
    return rows, figures


def table(rows):
    "Markdown table of the slides."
    head = ["| Lab | Part | Figure | File |", "|---|---|---|---|"]
    return "\n".join(
        head
        + [
            f"| {r['lab'][3:5]} | {r['part']} | {r['title']} | `{r['file']}` |"
            for r in rows
        ]
    )


RENDER = """
async ([figure, size]) => {
  const grow = {...figure.layout, ...size, autosize: false};
  grow.font = {...(grow.font || {}), size: 24};
  grow.title = {...(grow.title || {}), font: {size: 36, color: "#222"}, x: 0.5, xanchor: "center", y: 0.955, yanchor: "middle"};
  grow.margin = {l: 115, r: 40, t: 110, b: 105};
  for (const name of Object.keys(grow).filter((k) => /^[xy]axis/.test(k))) {
    const axis = grow[name];
    grow[name] = {...axis, automargin: true, tickfont: {size: 22}};
    if (axis.title) grow[name].title = {...axis.title, font: {size: 26}, standoff: 14};
  }
  if (grow.legend) grow.legend = {...grow.legend, font: {size: 22}};
  for (const note of grow.annotations || []) note.font = {...(note.font || {}), size: 22};
  const data = figure.data.map((t) => t.type === "scatter"
    ? {...t, line: {...(t.line || {}), width: 4}, marker: {...(t.marker || {}), size: big(t.marker)},
       textfont: {...(t.textfont || {}), size: 22}}
    : t);
  function big(marker) {
    const size = (marker || {}).size;
    return typeof size === "number" || size === undefined ? Math.max(size || 0, 11) : size;
  }
  const place = document.getElementById("figure");
  await Plotly.newPlot(place, data, grow, {staticPlot: true});
  const url = await Plotly.toImage(place, {format: "svg", ...size});
  return decodeURIComponent(url.slice(url.indexOf(",") + 1));
}"""


def same_figure(row, there):
    "Was this figure drawn in this file before, wherever its cell stood?"
    return any((r["file"], r["digest"]) == (row["file"], row["digest"]) for r in there)


def render(rows, figures, png=None):
    "Write the slides; no request leaves the machine."
    from plotly.offline import get_plotlyjs
    from playwright.sync_api import sync_playwright

    program = next((p for n in BROWSERS if (p := shutil.which(n))), None)
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE)
        page.set_content('<body style="margin:0"><div id="figure"></div></body>')
        page.add_script_tag(content=get_plotlyjs())
        for row, figure in zip(rows, figures):
            svg = page.evaluate(RENDER, [figure, SIZE])
            (SLIDES / row["file"]).write_text(svg + "\n", encoding="utf-8")
            if png:
                page.screenshot(path=str(png / row["file"].replace(".svg", ".png")))
        browser.close()


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--check", action="store_true", help="write nothing, fail if a slide is stale")
    p.add_argument("--png", metavar="FOLDER", help="write pictures there, too")
    a = p.parse_args(argv)
    rows, figures = wanted()
    there = json.loads(INDEX.read_text(encoding="utf-8")) if INDEX.exists() else []
    stale = [r for r in rows if r not in there or not (SLIDES / r["file"]).exists()]
    gone = [f for f in SLIDES.glob("*.svg") if f.name not in {r["file"] for r in rows}]
    guide = GUIDE.read_text(encoding="utf-8")
    told = between(guide, "slides", table(rows))
    if a.check:
        names = [r["file"] for r in stale] + [f.name for f in gone]
        names += [r["file"] for r in there if r not in rows] + [GUIDE.name] * (told != guide)
        if names:
            names = ", ".join(sorted(set(names)))
            sys.exit(f"not in step with the labs: {names}; run python tools/make_slides.py")
        return print("slides: in step")
    SLIDES.mkdir(parents=True, exist_ok=True)
    for f in gone:
        f.unlink()
    png = Path(a.png) if a.png else None
    if png:
        png.mkdir(parents=True, exist_ok=True)
    drawn = {r["file"]: (SLIDES / r["file"]).exists() and same_figure(r, there) for r in rows}
    todo = [(r, f) for r, f in zip(rows, figures) if png or not drawn[r["file"]]]
    if todo:
        render(*zip(*todo), png)
    INDEX.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    GUIDE.write_text(told, encoding="utf-8")
    print(f"slides: wrote {len(todo)} of {len(rows)}")


if __name__ == "__main__":
    main()
