// Devices that answer together, one request at a time: the model of distree_explorer.ipynb once more.

class DistreeModel {
  constructor(data) {
    Object.assign(this, data, data.sizes);                       // students N, exits E, samples S, classes K; y, costs, bias, mean, link
    this.partial = unpack(data.partial);                         // (N E S, K)
    this.scores = unpack(data.scores);                           // (N E, S)
    this.u = unpack(data.u);                                     // (N S, E): decides which packets are lost
    const together = e => new Array(this.students).fill(e), right = e => s => this.answer(s, together(e)) === this.y[s];
    this.joint = this.range(this.exits).map(e => this.range(this.samples).filter(right(e)).length / this.samples);
  }

  range(n) { return [...Array(n).keys()]; }

  answer(s, used) {                          // the class that devices say together; used: exit of each, -1 where nothing came
    const z = [...this.bias];
    used.forEach((e, n) => {
      const part = e < 0 ? this.mean[n] : this.partial[(n * this.exits + e) * this.samples + s];
      for (let c = 0; c < z.length; c++) z[c] += part[c];
    });
    return z.indexOf(Math.max(...z));
  }

  fate(u, loss, retries) {                   // tries of a packet, and seconds lost on the way (Infinity: it never arrives)
    const {bytes, bandwidth, latency, timeout} = this.link;
    const lost = u > loss ? 0 : loss === 1 ? retries + 1 : Math.trunc(Math.log(u) / Math.log(loss));
    const tries = Math.min(lost, retries) + 1;
    return [tries, lost > retries ? Infinity : tries * bytes / bandwidth + lost * timeout + latency];
  }

  request(s, {T, speeds, loss, deadline, retries, send}) {       // all that happens to one request
    const {students: N, exits: E} = this, limit = deadline / 1000, r = {depth: [], used: [], finals: [], macs: 0, bytes: 0, up: []};
    for (let n = 0; n < N; n++) {
      const at = e => this.costs[n][e] / (1e6 * speeds[n]);
      let e = 0, radio = 0, used = -1, final = Infinity;
      while (e < E - 1 && this.scores[n * E + e][s] < T[e]) e++;
      r.depth.push(e);
      r.macs += Math.min(this.costs[n][e], 1e6 * speeds[n] * limit);
      for (let i = send === "every" ? 0 : e; i <= e && at(i) <= limit; i++) {
        const u = this.u[n * this.samples + s][send === "every" ? i : 0], start = Math.max(at(i), radio);
        const [tries, seconds] = this.fate(u, loss, retries);
        const arrives = start + seconds, {bytes, bandwidth, latency} = this.link, ok = arrives < Infinity;
        radio = start + tries * bytes / bandwidth;
        r.bytes += tries * bytes;
        r.up.push([n, i, start, ok ? arrives : start + bytes / bandwidth + latency, ok]);
        if (arrives <= limit) used = i;
        if (i === e) final = arrives;
      }
      r.used.push(used);
      r.finals.push(final);
    }
    const last = Math.max(...r.finals);
    return {...r, complete: last <= limit, latency: Math.min(last, limit)};
  }

  at(state) {
    const {students: N, exits: E, samples: S} = this, all = this.range(S).map(s => this.request(s, state));
    const share = this.range(N).map(() => new Array(E + 1).fill(0));
    for (const r of all) r.used.forEach((e, n) => share[n][e + 1] += 1);
    const latency = all.map(r => r.latency), sorted = [...latency].sort((a, b) => a - b), {bytes, bandwidth, latency: delay} = this.link;
    const quantile = q => sorted[Math.max(Math.ceil(q * S / 100), 1) - 1], whole = sum(this.costs.map(c => c.at(-1)));
    const together = e => Math.max(...this.costs.map((c, n) => c[e] / (1e6 * state.speeds[n]))) + bytes / bandwidth + delay;
    return {
      accuracy: all.filter((r, s) => this.answer(s, r.used) === this.y[s]).length / S, complete: all.filter(r => r.complete).length / S,
      latency, p50: quantile(50), p95: quantile(95), share: share.map(row => row.map(v => v / S)),
      macs: sum(all.map(r => r.macs)) / S / whole, bytes: sum(all.map(r => r.bytes)) / S,
      together: this.range(E).map(together), joint: this.joint,
    };
  }
}

class DistreeView extends View {
  constructor(data) { super(data, new DistreeModel(data)); }

  values() {
    const {T, speeds, ...rest} = this.state, named = (head, values) => Object.fromEntries(values.map((v, i) => [`${head} ${i + 1}`, v]));
    return {...rest, ...named("T", T), ...named("speed", speeds)};
  }

  set(name, value) {
    const [head, i] = name.split(" "), list = {T: "T", speed: "speeds"}[head];
    super.set(...list ? [list, this.state[list].with(Number(i) - 1, value)] : [name, value]);
  }

  says(r) {
    const pct = (v, n = 0) => fixed(100 * v, n), ms = v => fixed(1000 * v, 1), {loss, deadline} = this.state;
    return `Accuracy ${pct(r.accuracy, 1)} %, simulated latency ${ms(r.p50)} ms (median) and ${ms(r.p95)} ms (95th percentile); `
      + `${pct(r.complete)} % of ${this.model.samples} requests have all answers within ${general(deadline, 4)} ms; `
      + `${pct(r.macs)} % of the work, ${fixed(r.bytes, 0)} bytes a request; loss ${general(loss)}`;
  }

  table(r) {
    const pct = v => fixed(100 * v, 1), {costs, exits} = this.model, {speeds} = this.state;
    const line = (row, n) => [`device ${n + 1}`, general(speeds[n], 4), fixed(costs[n].at(-1) / (1e3 * speeds[n]), 1), ...row.map(pct)];
    const used = this.model.range(exits).map(e => `exit ${e + 1} used (%)`);
    const columns = ["device", "speed (M MACs/s)", "time to the last exit (ms)", "nothing in time (%)", ...used];
    return {columns, rows: r.share.map(line)};
  }

  changes(r) {
    const {samples: S, exits: E} = this.model, ms = v => 1000 * v, sorted = [...r.latency].sort((a, b) => a - b);
    const stairs = [0, ...sorted.flatMap(v => [ms(v), ms(v)])], share = this.model.range(S).flatMap(i => [100 * i / S, 100 * (i + 1) / S]);
    const out = this.timeline(this.model.request(this.state.request, this.state));
    out[6] = {x: stairs, y: [0, ...share]};
    for (let e = 0; e <= E; e++) out[7 + e] = {y: r.share.map(row => 100 * row[e])};
    out[8 + E] = {x: r.together.map(ms), y: r.joint.map(v => 100 * v)};
    out[9 + E] = {x: [ms(r.p95)], y: [100 * r.accuracy]};
    return out;
  }

  timeline(r) {                              // stages, messages, answer and deadline of one request
    const {costs, students: N} = this.model, {speeds, deadline} = this.state, row = n => N - 1 - n;
    const lines = {used: [], idle: [], up: [], lost: []};
    const words = {x: [], y: [], text: []}, draw = (name, x0, x1, y0, y1) => lines[name].push([x0, y0], [x1, y1], [null, null]);
    for (let n = 0; n < N; n++) {
      let from = 0;
      for (let e = 0; e <= r.depth[n] && from < deadline; e++) {
        const done = costs[n][e] / (1e3 * speeds[n]), until = Math.min(done, deadline);
        draw(e <= r.used[n] && done <= deadline ? "used" : "idle", from, until, row(n), row(n));
        if (done <= deadline) [words.x, words.y, words.text].forEach((list, i) => list.push([done, row(n) + .3, String(e + 1)][i]));
        from = done;
      }
    }
    for (const [n, , t0, t1, ok] of r.up) {
      if (ok) draw("up", 1000 * t0, 1000 * t1, row(n), N);
      else draw("lost", 1000 * t0, 500 * (t0 + t1), row(n), (row(n) + N) / 2);
    }
    const xy = name => ({x: lines[name].map(p => p[0]), y: lines[name].map(p => p[1])}), at = 1000 * r.latency;
    return {0: xy("used"), 1: xy("idle"), 2: xy("up"), 3: xy("lost"), 4: words, 5: {x: [at, at], y: [-.5, N + .4]}};
  }
}
