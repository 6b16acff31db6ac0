// Thresholds in, accuracy and cost out: the model of exit_explorer.ipynb once more, for pages without a kernel.

class ExitModel {
  constructor(data) {
    this.scores = unpack(data.scores);       // (E - 1, N): the last exit takes everybody
    this.valid = unpack(data.valid);         // (E - 1, V): thresholds for a budget are set on these
    this.costs = data.costs;
    this.samples = data.samples;
    this.validation = data.validation;
    this.right = unpack(data.right);         // (E, ceil(N / 8)): one bit a sample
    this.each = this.right.map((_, e) => sum(Array.from({length: this.samples}, (_, i) => this.isRight(e, i))) / this.samples);
  }

  isRight(exit, i) { return this.right[exit][i >> 3] >> (7 - (i & 7)) & 1; }

  at(T) {                                    // a sample leaves at the first exit whose threshold its score reaches
    const E = this.costs.length, N = this.samples, exit = new Uint8Array(N);
    const shares = new Array(E).fill(0), hits = new Array(E).fill(0);
    for (let i = 0; i < N; i++) {
      let e = 0;
      while (e < E - 1 && this.scores[e][i] < T[e]) e++;
      exit[i] = e;
      shares[e] += 1;
      hits[e] += this.isRight(e, i);
    }
    for (let e = 0; e < E; e++) [shares[e], hits[e]] = [shares[e] / N, hits[e] / N];
    const cost = sum(shares.map((s, e) => s * this.costs[e]));
    return {thresholds: T, exit, shares, hits, accuracy: sum(hits), cost, mixture: this.mixture(cost)};
  }

  mixture(cost) {                            // exits chosen by chance in the best neighbouring pair
    const c = this.costs, e = Math.max(1, c.findIndex(v => v >= cost)), last = c.length - 1;
    if (cost >= c[last]) return this.each[last];
    if (cost <= c[0]) return this.each[0];
    return this.each[e - 1] + (this.each[e] - this.each[e - 1]) * (cost - c[e - 1]) / (c[e] - c[e - 1]);
  }

  thresholds(shares) {                       // MSDNet's rule: about V q_k validation samples leave at exit k
    const here = new Uint8Array(this.validation).fill(1), T = [];
    this.valid.forEach((scores, e) => {
      const left = scores.filter((_, i) => here[i]).sort(), n = Math.floor(this.validation * shares[e] + 1e-9);
      const t = n > 0 && n <= left.length ? left[left.length - n] : Infinity;
      T.push(t);
      scores.forEach((s, i) => { if (s >= t) here[i] = 0; });
    });
    return [...T, -Infinity];
  }

  budgetShares(budget) {                     // q_k ~ r^k whose mean cost is the budget
    const E = this.costs.length;
    let low = -60, high = 60, q;
    while (high - low > 1e-13) {
      const r = (low + high) / 2;
      q = this.costs.map((_, k) => Math.exp(r * (k - (r > 0 ? E - 1 : 0))));
      if (sum(q.map((v, k) => v * this.costs[k])) < budget * sum(q)) low = r;
      else high = r;
    }
    const all = sum(q);
    return q.map(v => v / all);
  }

  forBudget(budget) { return this.thresholds(this.budgetShares(budget)); }
}

class ExitView {
  constructor(data) {
    this.model = new ExitModel(data);
    this.data = data;
    if (data.sprite && typeof Image !== "undefined") (this.sprite = new Image()).src = data.sprite.source;
    this.put(data.state);
  }

  put({budget, thresholds}) { [this.budget, this.T] = [budget, thresholds.map(endless)]; }

  get state() { return {budget: this.budget, thresholds: this.T.map(worded)}; }

  set(name, value) {
    const {costs} = this.model, {scale, high} = this.data;
    if (name === "budget") {
      this.budget = Math.min(Math.max(value * scale, costs[0]), costs.at(-1));
      this.T = this.model.forBudget(this.budget);
    } else {
      this.budget = null;
      this.T = this.T.with(name - 1, value >= high ? Infinity : value);
    }
  }

  look() {
    const r = this.model.at(this.T), {low, high, scale} = this.data, values = {};
    if (this.budget !== null) values.budget = this.budget / scale;
    r.thresholds.slice(0, -1).forEach((t, e) => values[e + 1] = Math.abs(t) === Infinity ? (t > 0 ? high : low) : t);
    return {numbers: r, values, says: this.says(r), table: this.table(r), changes: this.changes(r)};
  }

  says(r) {
    const {scale, unit} = this.data, gain = 100 * (r.accuracy - r.mixture), part = 100 * r.cost / this.model.costs.at(-1);
    const how = this.budget === null ? "thresholds set by hand" : `thresholds for a budget of ${general(this.budget / scale, 4)} ${unit}`;
    return `Accuracy ${fixed(100 * r.accuracy, 1)} % at a mean cost of ${general(r.cost / scale, 4)} ${unit} `
      + `(${fixed(part, 0)} % of the last exit), `
      + `${fixed(Math.abs(gain), 1)} points ${gain >= 0 ? "above" : "below"} the static mixture; ${how}`;
  }

  table(r) {
    const {scale, unit, step, score} = this.data, pct = v => fixed(100 * v, 1), cost = v => general(v / scale, 4);
    const small = t => general(Number(fixed(t, 3 - Math.floor(Math.log10(step)))) + 0);
    const short = t => t === Infinity ? "nobody leaves" : Math.abs(t) >= step ? general(t, 4) : small(t);
    const T = [...r.thresholds.slice(0, -1).map(short), "none"];
    const rows = this.model.costs.map((c, e) => [`exit ${e + 1}`, cost(c), T[e],
      pct(r.shares[e]), r.shares[e] ? pct(r.hits[e] / r.shares[e]) : "-", pct(this.model.each[e])]);
    const columns = ["exit", `cost (${unit})`, `threshold (${score})`, "leave here (%)", "right of these (%)", "this exit on all (%)"];
    return {columns, rows: [...rows, ["all", cost(r.cost), "", "100.0", pct(r.accuracy), ""]]};
  }

  changes(r) {
    const share = (s, e) => s ? `${fixed(100 * s, 1)} %, ${fixed(100 * r.hits[e] / s, 0)} % right` : "nobody";
    const out = {
      2: {x: [r.cost / this.data.scale], y: [100 * r.accuracy]},
      3: {x: r.hits.map(h => 100 * h)},
      4: {x: r.shares.map((s, e) => 100 * (s - r.hits[e]))},
      5: {text: r.shares.map(share)},
    };
    return this.sprite && this.sprite.complete ? {...out, ...this.strip(r.exit)} : out;
  }

  strip(exit) {                              // the first images that leave at each exit, one row per exit
    const rows = this.model.costs.map(() => []), {images, m} = this.data.sprite;
    for (let i = 0; i < images; i++) if (rows[exit[i]].length < m) rows[exit[i]].push(i);
    const {source, cross} = mosaic(this.sprite, this.data.sprite, rows, (i, e) => !this.model.isRight(e, i));
    return {6: {source}, 7: cross};
  }
}
