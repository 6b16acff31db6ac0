// Bins of difficulty, and how right each exit is in each: the model of difficulty_explorer.ipynb once more.

class DifficultyModel {
  constructor(data) {
    const rows = unpack(data.scores);        // one row of N numbers for each score
    this.names = data.names;
    this.scores = Object.fromEntries(this.names.map((name, i) => [name, rows[i]]));
    this.right = unpack(data.right);         // (E, ceil(N / 8)): one bit a sample
    this.samples = rows[0].length;
  }

  isRight(exit, i) { return this.right[exit][i >> 3] >> (7 - (i & 7)) & 1; }

  at({score, width, threshold}) {
    const v = this.scores[score], N = this.samples, bins = Math.floor(v.reduce((a, b) => Math.max(a, b)) / width) + 1;
    const none = () => new Array(bins).fill(0);
    const r = {counts: none(), below: none(), hits: this.right.map(none), easy: this.right.map(() => 0), hard: this.right.map(() => 0)};
    for (let i = 0; i < N; i++) {
      const b = Math.min(Math.floor(v[i] / width), bins - 1), easy = v[i] < threshold;
      r.counts[b] += 1;
      r.below[b] += easy;
      for (let e = 0; e < this.right.length; e++) {
        const one = this.isRight(e, i);
        r.hits[e][b] += one;
        r[easy ? "easy" : "hard"][e] += one;
      }
    }
    const many = sum(r.below), part = (list, n) => list.map(k => n ? k / n : 0);
    return {...r, easy: part(r.easy, many), hard: part(r.hard, N - many), share: many / N};
  }

  rows({score, threshold}, images, m) {      // easiest, just below and just above the threshold, hardest
    const v = this.scores[score], order = [...Array(images).keys()].sort((a, b) => v[a] - v[b] || a - b);
    const k = order.filter(i => v[i] < threshold).length;
    return [order.slice(0, m), order.slice(Math.max(0, k - m), k), order.slice(k, k + m), order.slice(Math.max(0, images - m))];
  }
}

class DifficultyView extends View {
  constructor(data) {
    super(data, new DifficultyModel(data));
    if (data.sprite && typeof Image !== "undefined") (this.sprite = new Image()).src = data.sprite.source;
  }

  set(name, value) {                         // another score has another unit, so it starts with its own bins and threshold
    const {width, threshold} = this.data.starts[value] ?? {};
    this.put({...this.state, [name]: value, ...name === "score" ? {width, threshold} : {}});
  }

  limits() {
    const {top, step} = this.data.starts[this.state.score];
    return {width: {low: step, high: top, step}, threshold: {low: 0, high: top, step}};
  }

  says(r) {
    const {score, threshold} = this.state, E = r.easy.length, pct = v => fixed(100 * v, 0);
    const gain = list => plus(100 * (list[E - 1] - list[0]), 1);
    return `${pct(r.share)} % of ${thousands(this.model.samples)} images lie below ${general(threshold, 4)} (${score}); `
      + `exit 1 is right on ${pct(r.easy[0])} % of these and ${pct(r.hard[0])} % of the others; `
      + `exit ${E} adds ${gain(r.easy)} and ${gain(r.hard)} points`;
  }

  table(r) {
    const {width} = this.state, bin = b => `${general(b * width)} to ${general((b + 1) * width)}`;
    const line = (n, b) => [bin(b), thousands(n), thousands(r.below[b]), ...r.hits.map(h => n ? fixed(100 * h[b] / n, 1) : "-")];
    const columns = ["difficulty", "images", "below the threshold", ...r.hits.map((_, e) => `exit ${e + 1} right (%)`)];
    return {columns, rows: r.counts.map(line)};
  }

  changes(r) {
    const {width, threshold} = this.state, E = r.hits.length, x = r.counts.map((_, b) => (b + .5) * width), bar = {x, width: .96 * width};
    const out = {0: {y: r.below, ...bar}, 1: {y: r.counts.map((n, b) => n - r.below[b]), ...bar}};
    out[2] = {x: [threshold, threshold], y: [0, Math.max(...r.counts)]};
    r.hits.forEach((hits, e) => out[3 + e] = {x, y: hits.map((h, b) => r.counts[b] ? 100 * h / r.counts[b] : null)});
    out[3 + E] = {y: r.easy.map(v => 100 * v)};
    out[4 + E] = {y: r.hard.map(v => 100 * v)};
    if (!this.sprite || !this.sprite.complete) return out;
    const {images, m} = this.data.sprite, rows = this.model.rows(this.state, images, m);
    const {source, cross} = mosaic(this.sprite, this.data.sprite, rows, i => !this.model.isRight(E - 1, i));
    return {...out, [5 + E]: {source}, [6 + E]: cross};
  }
}
