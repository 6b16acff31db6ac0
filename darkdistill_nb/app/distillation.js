// Soft labels, the two directions of the divergence, and their gradients: the model of distillation_explorer.ipynb once more.

class DistillationModel {
  constructor(data) {
    this.teacher = unpack(data.teacher);     // (N, K) logits
    this.student = unpack(data.student);     // (N, K) logits
    this.y = data.y;
    this.classes = data.classes;
  }

  static logSoftmax(logits, T) {
    const z = Array.from(logits, v => v / T), most = Math.max(...z);
    const all = most + Math.log(sum(z.map(v => Math.exp(v - most))));
    return z.map(v => v - all);
  }

  at({sample, T, alpha, direction}) {
    const p = DistillationModel.logSoftmax(this.teacher[sample], T), q = DistillationModel.logSoftmax(this.student[sample], T);
    const one = DistillationModel.logSoftmax(this.student[sample], 1), y = this.y[sample];
    const [soft_labels, answer] = [p.map(Math.exp), q.map(Math.exp)];
    const forward = sum(p.map((v, c) => soft_labels[c] * (v - q[c]))), reverse = sum(q.map((v, c) => answer[c] * (v - p[c])));
    const divergence = direction === "forward" ? forward : reverse;
    const pull = direction === "forward"
      ? answer.map((v, c) => T * (v - soft_labels[c]))
      : answer.map((v, c) => T * v * (q[c] - p[c] - reverse));
    const from_teacher = pull.map(v => alpha * v), from_label = one.map((v, c) => (1 - alpha) * (Math.exp(v) - (c === y)));
    const entropy = -sum(p.map((v, c) => soft_labels[c] * v)), cross_entropy = -one[y];
    const loss = alpha * T * T * divergence + (1 - alpha) * cross_entropy;
    const gradient = from_teacher.map((v, c) => v + from_label[c]);
    return {soft_labels, answer, forward, reverse, entropy, cross_entropy, loss, from_teacher, from_label, gradient};
  }
}

class DistillationView extends View {
  constructor(data) { super(data, new DistillationModel(data)); }

  says(r) {
    const {sample, T, alpha, direction} = this.state, short = v => general(v, 4), name = this.model.classes[this.model.y[sample]];
    return `Sample ${sample}, class ${name}: at T = ${short(T)} the teacher spreads over `
      + `${fixed(Math.exp(r.entropy), 2)} classes; ${direction} KL ${short(r[direction])}, `
      + `cross-entropy ${short(r.cross_entropy)}, loss ${short(r.loss)} with alpha ${short(alpha)}`;
  }

  table(r) {
    const pct = v => fixed(100 * v, 2), line = (name, c) => [name, pct(r.soft_labels[c]), pct(r.answer[c]),
      ...[r.from_teacher, r.from_label, r.gradient].map(g => plus(g[c], 4))];
    const columns = ["class", "soft label (%)", "student (%)", "gradient from the teacher", "from the label", "gradient"];
    return {columns, rows: this.model.classes.map(line)};
  }

  changes(r) {
    const pct = v => v.map(u => 100 * u);
    return {0: {y: pct(r.soft_labels)}, 1: {y: pct(r.answer)}, 2: {y: r.from_teacher}, 3: {y: r.from_label}, 4: {y: r.gradient}};
  }
}
