// What the views of models share: a state, the model's answer to it, and what a page shows of the answer.

class View {                          // a subclass has says, table, changes; values and limits if controls need them
  constructor(data, model) {
    [this.data, this.model] = [data, model];
    this.put(data.state);
  }

  put(state) {                        // raises, and changes nothing, when the model cannot answer
    this.now = this.model.at(state);
    this.state = state;
  }

  set(name, value) { this.put({...this.state, [name]: value}); }

  look() {
    const r = this.now, values = this.values(), limits = this.limits();
    return {numbers: r, values, limits, says: this.says(r), table: this.table(r), changes: this.changes(r)};
  }

  values() { return this.state; }     // of the controls, by their names

  limits() { return {}; }             // low, high and step of controls, where they depend on the state
}

// Rows of images out of a sheet, and where a cross marks those for which wrong(image, row).
function mosaic(sheet, {height: h, width: w, columns, m}, rows, wrong) {
  const canvas = document.createElement("canvas"), pen = canvas.getContext("2d"), cross = {x: [], y: []};
  [canvas.width, canvas.height] = [m * (w + 1), rows.length * (h + 1)];
  pen.fillStyle = "white";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  rows.forEach((row, r) => row.forEach((i, c) => {
    pen.drawImage(sheet, i % columns * w, Math.floor(i / columns) * h, w, h, c * (w + 1), r * (h + 1), w, h);
    if (!wrong(i, r)) return;
    cross.x.push(c * (w + 1) + .82 * w - .5);
    cross.y.push(r * (h + 1) + .82 * h - .5);
  }));
  return {source: canvas.toDataURL(), cross};
}
