// Who holds what after a Dirichlet split: core/splits.ipynb and split_explorer.ipynb once more, with the same random numbers.

class SplitModel {
  constructor(data) {
    this.stock = data.stock;                 // samples of each class
    this.classes = data.classes;
    this.samples = sum(this.stock);
  }

  at({gamma, clients, family, seed}) {
    const dealt = family === "client" ? this.byClient(gamma, clients, seed) : this.byClass(gamma, clients, seed);
    const K = this.classes.length, order = new Random(3, seed).shuffle([...Array(clients).keys()]);
    const counts = order.map(k => Array.from({length: K}, (_, c) => dealt[k][c] || 0)), sizes = counts.map(sum);
    const squares = counts.map(n => sum(n.map(v => v * v))), mean = sum(squares.map((v, k) => v / sizes[k] ** 2)) / clients;
    const theory = (K * gamma + 1) / (gamma + 1);
    return {counts, sizes, effective: squares.map((v, k) => sizes[k] ** 2 / v), mean_square: mean, measured: 1 / mean, theory, gamma};
  }

  shuffled(seed) {                           // the stream after each class has been shuffled; kept, as it needs only the seed
    if (this.kept !== seed) {
      this.stream = new Random(1, seed);
      for (const n of this.stock) this.stream.skipShuffle(n);
      this.kept = seed;
    }
    return this.stream.copy();
  }

  byClient(gamma, clients, seed) {           // equal sizes; each client draws classes by its mix while there are any
    const K = this.stock.length, mixes = new Random(0, seed), p = Array.from({length: clients}, () => mixes.dirichlet(K, gamma));
    const stream = this.shuffled(seed), left = [...this.stock];
    return p.map((mix, k) => {
      const mine = new Array(K).fill(0);
      let size = Math.floor(this.samples / clients) + (k < this.samples % clients);
      while (size > 0) {
        let q = mix.map((v, c) => left[c] > 0 ? v : 0);
        if (sum(q) === 0) q = [...left];     // none of its classes is left: take what there is
        const all = sum(q), take = stream.multinomial(size, q.map(v => v / all)).map((n, c) => Math.min(n, left[c]));
        take.forEach((n, c) => [mine[c], left[c]] = [mine[c] + n, left[c] - n]);
        size -= sum(take);
      }
      return mine;
    });
  }

  byClass(gamma, clients, seed, tries = 20) {   // each class is cut into shares; sizes vary
    const least = Math.max(1, Math.min(10, Math.floor(this.samples / (2 * clients))));
    let best = 0;
    for (let attempt = 0; attempt < tries; attempt++) {
      const dealt = this.cut(gamma, clients, new Random(2, attempt, seed)), smallest = Math.min(...dealt.map(sum));
      if (smallest >= least) return dealt;
      best = Math.max(best, smallest);
    }
    throw new Error(`no split in ${tries} tries gave each of ${clients} clients ${least} samples (best: ${best}); `
      + "raise gamma, or lower clients or min_size");
  }

  cut(gamma, clients, stream) {
    const dealt = Array.from({length: clients}, () => []), size = new Array(clients).fill(0), full = this.samples / clients;
    this.stock.forEach((n, c) => {
      if (n === 0) return;
      stream.skipShuffle(n);
      let share = stream.dirichlet(clients, gamma).map((v, k) => size[k] < full ? v : 0);
      if (sum(share) === 0) share = size.map(v => v < full ? 1 : 0);
      const all = sum(share);
      let reached = 0, before = 0;
      for (let k = 0; k < clients; k++) {
        reached += share[k] / all;
        const until = k < clients - 1 ? Math.floor(reached * n + 1e-9) : n;
        dealt[k][c] = until - before;
        size[k] += until - before;
        before = until;
      }
    });
    return dealt.map(row => Array.from({length: this.stock.length}, (_, c) => row[c] || 0));
  }
}

class SplitView extends View {
  constructor(data) { super(data, new SplitModel(data)); }

  set(name, value) {
    try {
      super.set(name, value);
    } catch (e) {
      throw new Error(`No such split: ${e.message}`);
    }
  }

  says(r) {
    const {clients, family, seed} = this.state, sizes = [Math.min(...r.sizes), Math.max(...r.sizes)].map(thousands);
    return `${fixed(r.measured, 2)} effective classes of ${this.model.classes.length} per client, theory ${fixed(r.theory, 2)}; `
      + `${sizes[0]} to ${sizes[1]} samples; gamma ${general(r.gamma)}, ${clients} clients, ${family}-wise, seed ${seed}`;
  }

  table(r) {
    const largest = (n, k) => {
      const most = Math.max(...n);
      return `${this.model.classes[n.indexOf(most)]} (${fixed(100 * most / r.sizes[k], 0)} %)`;
    };
    const held = n => String(n.filter(v => v > 0).length);
    const line = (n, k) => [`client ${k}`, thousands(r.sizes[k]), held(n), fixed(r.effective[k], 2), largest(n, k)];
    return {columns: ["client", "samples", "classes held", "effective classes", "largest class"], rows: r.counts.map(line)};
  }

  changes(r) {
    const K = this.model.classes.length, n = r.counts.length, x = [...Array(n).keys()], few = n <= 30, bars = {}, areas = {};
    const byClass = this.model.classes.map((_, c) => r.counts.map(row => row[c]));
    byClass.forEach((y, c) => {              // a thousand bars take a browser long
      bars[c] = {x, y, visible: few};
      areas[K + 4 + c] = {x, y, visible: !few};
    });
    return {
      ...bars,
      [K]: {x, z: byClass, xgap: Number(few), ygap: Number(few), texttemplate: n <= 12 && K <= 20 ? "%{z}" : ""},
      [K + 2]: {x: new Array(n).fill(r.gamma), y: r.effective},
      [K + 3]: {x: [r.gamma], y: [r.measured]},
      ...areas,
    };
  }
}
