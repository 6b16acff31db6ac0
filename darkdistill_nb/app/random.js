// The random numbers of numpy.random.default_rng, so that a page draws the very split that a run gets.
// SeedSequence and PCG64 (O'Neill 2014), ziggurats (Marsaglia and Tsang 2000), gamma (Marsaglia and Tsang 2000 a),
// beta (Johnk 1964), binomial by inversion and by BTPE (Kachitvichyanukul and Schmeiser 1988).

function seedWords(entropy, n) {      // numpy's SeedSequence: whole numbers in, n words of 32 bits out
  const source = entropy.flatMap(v => v < 2 ** 32 ? [v] : [v % 2 ** 32, Math.floor(v / 2 ** 32)]);
  let a = 0x43b0d7e5, b = 0x8b51f9dd;
  const hash = v => {
    v ^= a;
    a = Math.imul(a, 0x931e8875);
    v = Math.imul(v, a);
    return v ^ v >>> 16;
  };
  const mix = (x, y) => {
    const v = Math.imul(0xca01f9dd, x) - Math.imul(0x4973f715, y) | 0;
    return v ^ v >>> 16;
  };
  const pool = [0, 1, 2, 3].map(i => hash(source[i] || 0));
  for (let i = 0; i < 4; i++)
    for (let j = 0; j < 4; j++) if (i !== j) pool[j] = mix(pool[j], hash(pool[i]));
  for (const v of source.slice(4))
    for (let j = 0; j < 4; j++) pool[j] = mix(pool[j], hash(v));
  return Array.from({length: n}, (_, i) => {
    let v = pool[i % 4] ^ b;
    b = Math.imul(b, 0x58f38ded);
    v = Math.imul(v, b);
    return (v ^ v >>> 16) >>> 0;
  });
}

function ziggurat(levels, edge, area, height, inverse, bits) {   // widths, heights and sure hits of each strip
  const x = new Array(levels + 1);
  [x[levels - 1], x[0]] = [edge, area / height(edge)];
  for (let i = levels - 2; i > 0; i--) x[i] = inverse(area / x[i + 1] + height(x[i + 1]));
  const inner = i => i === 0 ? edge / x[0] : i === 1 ? 0 : x[i - 1] / x[i];
  const strips = [...Array(levels).keys()];
  return {
    edge,
    width: strips.map(i => x[i] / 2 ** bits),
    height: strips.map(i => i ? height(x[i]) : 1),
    sure: strips.map(i => Math.floor(inner(i) * 2 ** bits)),
  };
}
const NORMAL = ziggurat(256, 3.6541528853610088, 0.004928673233974655, x => Math.exp(-x * x / 2), h => Math.sqrt(-2 * Math.log(h)), 52);
const EXPONENTIAL = ziggurat(256, 7.69711747013105, 0.003949659822581557, x => Math.exp(-x), h => -Math.log(h), 53);

class Random {
  static STEP = 0x2360ed051fc65da44385df649fccf645n;
  static ALL = (1n << 128n) - 1n;

  constructor(...entropy) {
    const w = seedWords(entropy, 8).map(BigInt);
    const long = i => (w[i + 1] << 32n | w[i]) << 64n | w[i + 3] << 32n | w[i + 2];
    this.add = (long(4) << 1n | 1n) & Random.ALL;
    this.state = (this.add + long(0)) & Random.ALL;
    this.half = null;
    this.step();
  }

  copy() { return Object.assign(Object.create(Random.prototype), this); }

  step() { this.state = (this.state * Random.STEP + this.add) & Random.ALL; }

  word64() {
    this.step();
    const v = (this.state >> 64n ^ this.state) & 0xffffffffffffffffn, turn = this.state >> 122n;
    return (v >> turn | v << 64n - turn) & 0xffffffffffffffffn;
  }

  word32() {
    if (this.half !== null) {
      const v = this.half;
      this.half = null;
      return v;
    }
    const v = this.word64();
    this.half = Number(v >> 32n);
    return Number(v & 0xffffffffn);
  }

  uniform() { return Number(this.word64() >> 11n) / 2 ** 53; }

  below(most) {                       // a whole number of 0..most
    if (most === 0) return 0;
    const mask = 2 ** (32 - Math.clz32(most)) - 1;
    for (;;) {
      const v = (this.word32() & mask) >>> 0;
      if (v <= most) return v;
    }
  }

  shuffle(a) {
    for (let i = a.length - 1; i > 0; i--) {
      const j = this.below(i);
      [a[i], a[j]] = [a[j], a[i]];
    }
    return a;
  }

  skipShuffle(n) { for (let i = n - 1; i > 0; i--) this.below(i); }

  exponential() {
    for (;;) {
      const word = this.word64() >> 3n, i = Number(word & 255n), v = Number(word >> 8n);
      const x = v * EXPONENTIAL.width[i], h = EXPONENTIAL.height;
      if (v < EXPONENTIAL.sure[i]) return x;
      if (i === 0) return EXPONENTIAL.edge - Math.log1p(-this.uniform());
      if ((h[i - 1] - h[i]) * this.uniform() + h[i] < Math.exp(-x)) return x;
    }
  }

  normal() {
    for (;;) {
      const word = this.word64(), i = Number(word & 255n), v = Number(word >> 9n & 0xfffffffffffffn);
      const x = v * NORMAL.width[i] * (word >> 8n & 1n ? -1 : 1), h = NORMAL.height;
      if (v < NORMAL.sure[i]) return x;
      if (i === 0) return this.normalTail(Math.floor(v / 256) % 2 ? -1 : 1);
      if ((h[i - 1] - h[i]) * this.uniform() + h[i] < Math.exp(-x * x / 2)) return x;
    }
  }

  normalTail(sign) {
    for (;;) {
      const x = -Math.log1p(-this.uniform()) / NORMAL.edge, y = -Math.log1p(-this.uniform());
      if (2 * y > x * x) return sign * (NORMAL.edge + x);
    }
  }

  gamma(shape) {
    if (shape === 1) return this.exponential();
    if (shape < 1) return this.smallGamma(shape);
    const b = shape - 1 / 3, c = 1 / Math.sqrt(9 * b);
    for (;;) {
      let x, v;
      do {
        x = this.normal();
        v = 1 + c * x;
      } while (v <= 0);
      v = v * v * v;
      const u = this.uniform();
      if (u < 1 - 0.0331 * x * x * x * x) return b * v;
      if (Math.log(u) < 0.5 * x * x + b * (1 - v + Math.log(v))) return b * v;
    }
  }

  smallGamma(shape) {                 // shape < 1: by rejection from two pieces
    for (;;) {
      const u = this.uniform(), v = this.exponential();
      const y = u <= 1 - shape ? 0 : -Math.log((1 - u) / shape);
      const x = Math.pow(u <= 1 - shape ? u : 1 - shape + shape * y, 1 / shape);
      if (x <= v + y) return x;
    }
  }

  beta(a, b) {
    if (a > 1 || b > 1) {
      const x = this.gamma(a);
      return x / (x + this.gamma(b));
    }
    for (;;) {
      const u = this.uniform(), v = this.uniform(), x = Math.pow(u, 1 / a), y = Math.pow(v, 1 / b);
      if (x + y > 1 || u + v === 0) continue;
      if (x + y > 0) return x / (x + y);
      const [p, q] = [Math.log(u) / a, Math.log(v) / b], most = Math.max(p, q);   // both are below 1e-308
      return Math.exp(p - most - Math.log(Math.exp(p - most) + Math.exp(q - most)));
    }
  }

  dirichlet(n, gamma) {               // n shares that sum to 1
    if (gamma < 0.1) return this.sticks(n, gamma);
    const v = Array.from({length: n}, () => this.gamma(gamma)), sum = v.reduce((a, b) => a + b);
    return v.map(x => x * (1 / sum));
  }

  sticks(n, gamma) {                  // break a stick, again and again: gammas this small would all be 0
    const shares = [];
    let left = 1, rest = 0;
    const rests = Array.from({length: n}, () => rest += gamma).reverse();
    for (let i = 0; i < n - 1; i++) {
      const v = this.beta(gamma, rests[i + 1]);
      shares.push(left * v);
      left *= 1 - v;
    }
    return [...shares, left];
  }

  binomial(p, n) {
    if (n === 0 || p === 0) return 0;
    const q = p <= 0.5 ? p : 1 - p, k = q * n <= 30 ? this.countUp(q, n) : this.btpe(q, n);
    return p <= 0.5 ? k : n - k;
  }

  countUp(p, n) {                     // few successes: add probabilities until they pass a uniform number
    const q = 1 - p, none = Math.exp(n * Math.log(q)), most = Math.floor(Math.min(n, n * p + 10 * Math.sqrt(n * p * q + 1)));
    let k = 0, here = none, u = this.uniform();
    while (u > here) {
      k += 1;
      if (k > most) [k, here, u] = [0, none, this.uniform()];
      else {
        u -= here;
        here = (n - k + 1) * p * here / (k * q);
      }
    }
    return k;
  }

  btpe(p, n) {                        // many: a triangle, two parallelograms and two tails over the bell, p <= 1/2
    const q = 1 - p, npq = n * p * q, peak = n * p + p, m = Math.floor(peak);
    const half = Math.floor(2.195 * Math.sqrt(npq) - 4.6 * q) + 0.5, mid = m + 0.5, low = mid - half, high = mid + half;
    const c = 0.134 + 20.5 / (15.3 + m), rate = a => a * (1 + a / 2);
    const left = rate((peak - low) / (peak - low * p)), right = rate((high - peak) / (high * q));
    const two = half * (1 + 2 * c), three = two + c / left, four = three + c / right;
    for (;;) {
      const u = this.uniform() * four;
      let v = this.uniform(), y;
      if (u <= half) return Math.floor(mid - half * v + u);
      if (u <= two) {
        const x = low + (u - half) / c;
        v = v * c + 1 - Math.abs(m - x + 0.5) / half;
        if (v > 1) continue;
        y = Math.floor(x);
      } else if (u <= three) {
        y = Math.floor(low + Math.log(v) / left);
        if (y < 0 || v === 0) continue;
        v *= (u - two) * left;
      } else {
        y = Math.floor(high - Math.log(v) / right);
        if (y > n || v === 0) continue;
        v *= (u - three) * right;
      }
      if (Random.underBell(y, v, n, p, q, m)) return y;
    }
  }

  static underBell(y, v, n, p, q, m) {   // is v below P(y) / P(m)?
    const npq = n * p * q, k = Math.abs(y - m);
    if (k <= 20 || k >= npq / 2 - 1) {
      const s = p / q, a = s * (n + 1);
      let f = 1;
      for (let i = m + 1; i <= y; i++) f *= a / i - s;
      for (let i = y + 1; i <= m; i++) f /= a / i - s;
      return v <= f;
    }
    const rho = k / npq * ((k * (k / 3 + 0.625) + 1 / 6) / npq + 0.5), t = -k * k / (2 * npq), height = Math.log(v);
    if (height < t - rho) return true;
    if (height > t + rho) return false;
    const stirling = x => (13680 - (462 - (132 - (99 - 140 / (x * x)) / (x * x)) / (x * x)) / (x * x)) / x / 166320;
    const [x, f, z, w] = [y + 1, m + 1, n + 1 - m, n - y + 1];
    const bell = (m + 0.5) * Math.log(f / x) + (n - m + 0.5) * Math.log(z / w) + (y - m) * Math.log(w * p / (x * q));
    return height <= bell + stirling(f) + stirling(z) + stirling(x) + stirling(w);
  }

  multinomial(n, p) {
    const counts = new Array(p.length).fill(0);
    let rest = 1;
    for (let i = 0; i < p.length - 1 && n > 0; i++) {
      counts[i] = this.binomial(p[i] / rest, n);
      n -= counts[i];
      rest -= p[i];
    }
    if (n > 0) counts[p.length - 1] = n;
    return counts;
  }
}
