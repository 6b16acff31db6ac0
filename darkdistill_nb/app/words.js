// Numbers as Python writes them, and arrays as numpy packs them.

function decimal(v, n) {              // n significant digits of v > 0 and the exponent; exact halves go to the even digit
  const [mantissa, exponent] = v.toExponential(60).split("e"), all = mantissa.replace(".", "");
  let head = n > 0 ? BigInt(all.slice(0, n)) : 0n;
  const tail = n < 0 ? "0" : all.slice(n), half = tail[0] === "5" && !/[1-9]/.test(tail.slice(1));
  if (tail[0] > "5" || tail[0] === "5" && (!half || head % 2n)) head += 1n;
  const grown = n > 0 && head === 10n ** BigInt(n);
  return [grown ? String(head / 10n) : String(head), Number(exponent) + grown];
}

function fixed(v, n) {                // f"{v:.{n}f}"
  if (!Number.isFinite(v)) return v > 0 ? "inf" : v < 0 ? "-inf" : "nan";
  const sign = v < 0 || Object.is(v, -0) ? "-" : "";
  if (v === 0) return sign + (0).toFixed(n);
  const places = Math.floor(Number(Math.abs(v).toExponential(60).split("e")[1])) + 1 + n;
  const [digits, exponent] = decimal(Math.abs(v), places);
  const zeros = Math.max(0, exponent + 1 + n - digits.length), text = (digits + "0".repeat(places > 0 ? zeros : 0)).padStart(n + 1, "0");
  return sign + (n ? text.slice(0, -n) + "." + text.slice(-n) : text);
}

function general(v, n = 6) {          // f"{v:.{n}g}"
  if (!Number.isFinite(v)) return fixed(v, 0);
  if (v === 0) return Object.is(v, -0) ? "-0" : "0";
  const sign = v < 0 ? "-" : "", [digits, e] = decimal(Math.abs(v), n), bare = digits.replace(/0+$/, "");
  const exponent = (e < 0 ? "e-" : "e+") + String(Math.abs(e)).padStart(2, "0");
  if (e < -4 || e >= n) return sign + bare[0] + (bare.length > 1 ? "." + bare.slice(1) : "") + exponent;
  if (e < 0) return sign + "0." + "0".repeat(-e - 1) + bare;
  const whole = digits.slice(0, e + 1), part = digits.slice(e + 1).replace(/0+$/, "");
  return sign + whole + (part ? "." + part : "");
}

const thousands = n => String(n).replace(/\B(?=(\d{3})+$)/g, ",");   // f"{n:,}"
const plus = (v, n) => (v < 0 || Object.is(v, -0) ? "" : "+") + fixed(v, n);   // f"{v:+.{n}f}"
const sum = values => values.reduce((a, b) => a + b, 0);
const endless = v => v === "inf" ? Infinity : v === "-inf" ? -Infinity : v;   // JSON has no infinity
const worded = v => v === Infinity ? "inf" : v === -Infinity ? "-inf" : v;

const KINDS = {f4: Float32Array, f8: Float64Array, u1: Uint8Array};

function unpack({kind, shape, base64}) {   // rows of numbers
  const bytes = Uint8Array.from(atob(base64), c => c.charCodeAt(0)), flat = new KINDS[kind](bytes.buffer);
  if (shape.length === 1) return flat;
  const width = shape[1];
  return Array.from({length: shape[0]}, (_, i) => flat.subarray(i * width, (i + 1) * width));
}
