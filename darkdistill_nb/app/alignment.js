// Who is seen at each exit, and how the exits are weighed: the model of alignment_explorer.ipynb once more.

class AlignmentModel {
  constructor(data) {
    this.split = new SplitModel(data);
    Object.assign(this, {clients: data.clients, exits: data.exits, bands: data.bands, results: data.results});
  }

  tiers(mix) {                               // of clients: rounded shares, largest remainders first
    const all = mix.reduce((a, b) => a + b, 0), shares = mix.map(w => this.clients * (w / all));
    if (!(all > 0)) throw new Error("no tier has a weight above 0");
    const n = shares.map(s => Math.floor(s + 1e-9)), order = shares.map((_, m) => m);
    order.sort((a, b) => n[a] - shares[a] - (n[b] - shares[b]));
    for (const m of order.slice(0, this.clients - sum(n))) n[m] += 1;
    return n.flatMap((many, m) => new Array(many).fill(m));
  }

  at({gamma, mix, seed, tau, votes}) {
    const {counts} = this.split.at({gamma, clients: this.clients, family: "client", seed}), K = counts[0].length;
    const tier = this.tiers(mix), E = this.exits, add = rows => counts[0].map((_, c) => sum(rows.map(n => n[c])));
    const smooth = n => n.map(v => (v + 1) / (sum(n) + K)), everybody = smooth(add(counts));
    const distance = (p, q) => sum(p.map((v, c) => Math.abs(v - q[c]))) / 2;
    const off = strength => counts.map(n => {  // of a client's mix, once its loss is shifted
      const mixed = smooth(n).map((p, c) => p ** (1 - strength) * everybody[c] ** strength), all = sum(mixed);
      return distance(mixed.map(v => v / all), everybody);
    });
    const [plain, shifted] = [off(0), off(tau)], sizes = counts.map(sum), samples = sum(sizes), r = {counts: [], clients: []};
    for (const name of ["coverage", "distance", "effective", "skew", "calibrated", "bands"]) r[name] = [];
    for (let e = 0; e < E; e++) {
      const here = counts.map((_, k) => k).filter(k => tier[k] >= e), seen = add(here.map(k => counts[k])), all = sum(seen);
      const mean = values => all ? sum(here.map(k => sizes[k] * values[k])) / all : 0;
      r.counts.push(seen);
      r.clients.push(here.length);
      r.coverage.push(all / samples);
      r.distance.push(all ? distance(seen.map(v => v / all), add(counts).map(v => v / samples)) : 0);
      r.effective.push(all ? all ** 2 / sum(seen.map(v => v * v)) : 0);
      r.skew.push(mean(plain));
      r.calibrated.push(mean(shifted));
      r.bands.push(this.difficulties(e, tier, sizes));
    }
    return {...r, weights: this.weights(r.coverage, votes)};
  }

  difficulties(e, tier, sizes) {             // shares of the bands among the images that exit e is trained on
    const images = m => m < e ? 0 : sum(sizes.filter((_, k) => tier[k] === m));
    const rows = this.bands.map((shares, m) => shares.map(s => images(m) * s));
    const all = rows[0]?.map((_, b) => sum(rows.map(row => row[b]))) ?? [], total = sum(all);
    return all.map(v => total > 0 ? v / total : 0);
  }

  weights(coverage, votes) {                 // row e weighs exits 1..e
    const w = coverage.map((c, e) => votes === "equal" ? 1 : votes === "depth" ? c * 2 ** e : c);
    return w.map((_, e) => w.map((v, i) => i > e ? 0 : v / sum(w.slice(0, e + 1))));
  }
}

class AlignmentView extends View {
  constructor(data) { super(data, new AlignmentModel(data)); }

  values() {
    const {mix, ...rest} = this.state;
    return {...rest, ...Object.fromEntries(mix.map((w, m) => [`tier ${m + 1}`, w]))};
  }

  set(name, value) {
    const m = name.startsWith("tier ") ? Number(name.slice(5)) - 1 : -1;
    super.set(...m < 0 ? [name, value] : ["mix", this.state.mix.with(m, value)]);
  }

  says(r) {
    const E = this.model.exits, last = E - 1, pct = v => fixed(100 * v, 0), {gamma, tau, votes, seed} = this.state;
    return `Exit ${E} is trained on ${pct(r.coverage[last])} % of the images, a class mix ${pct(r.distance[last])} % off everybody's; `
      + `its clients' own mixes are ${pct(r.skew[last])} % off, ${pct(r.calibrated[last])} % with calibration ${general(tau)}; `
      + `it has ${pct(r.weights[last][last])} % of its own vote (${votes}); gamma ${general(gamma)}, seed ${seed}`;
  }

  table(r) {
    const pct = v => fixed(100 * v, 1), {stored} = this.state, results = this.model.results[stored] ?? {}, names = Object.keys(results);
    const told = (of, e) => e < of.mean.length ? fixed(of.mean[e], 2) : "-", last = r.weights.at(-1);
    const line = (_, e) => [`exit ${e + 1}`, String(r.clients[e]), pct(r.coverage[e]), fixed(r.effective[e], 2), pct(r.distance[e]),
      pct(r.skew[e]), pct(r.calibrated[e]), pct(last[e]), ...names.map(n => told(results[n], e))];
    const columns = ["exit", "clients", "images (%)", "effective classes", "mix off (%)", "clients' mixes off (%)",
      "calibrated (%)", "weight at the last exit (%)", ...names.map(n => `${n}: ${stored}`)];
    return {columns, rows: r.clients.map(line)};
  }

  changes(r) {
    const K = r.counts[0].length, B = this.model.bands[0]?.length ?? 0, pct = v => 100 * v, out = {};
    const hard = this.state.shown === "difficulties";
    const x = r.clients.map((n, e) => `exit ${e + 1}`), all = r.counts.map(sum);
    for (let c = 0; c < K; c++) out[c] = {y: r.counts.map((n, e) => all[e] ? 100 * n[c] / all[e] : 0), visible: !hard};
    for (let b = 0; b < B; b++) out[K + b] = {y: r.bands.map(row => pct(row[b])), visible: hard};
    out[K + B] = {y: r.skew.map(pct)};
    out[K + B + 1] = {y: r.calibrated.map(pct)};
    out[K + B + 2] = {y: r.distance.map(pct)};
    out[K + B + 3] = {z: r.weights.map(row => row.map(pct))};
    Object.values(this.model.results[this.state.stored] ?? {}).forEach(({mean, half}, i) => {
      out[K + B + 4 + i] = {x: x.slice(0, mean.length), y: mean, error_y: {type: "data", array: half, visible: true, thickness: 1}};
    });
    return out;
  }
}
