// Numbers as people read them, and round steps for axes.

const MINUTE = 60, HOUR = 3600, DAY = 86400;
const LONG_STEPS = [10, 15, 30, 60, 120, 300, 600, 900, 1800, HOUR, 2 * HOUR, 3 * HOUR, 6 * HOUR, 12 * HOUR, DAY, 2 * DAY, 7 * DAY];

const round = (value, digits = 3) => String(Number(value.toPrecision(digits)));

function plain(value) {
  const size = Math.abs(value);
  if (size >= 1e5) return prefixed(value, 1000, ["", " k", " M", " G", " T", " P", " E"]);
  if (size > 0 && size < 1e-3) return Number(value.toPrecision(3)).toExponential();
  return Number.isInteger(value) ? String(value) : round(value, size >= 100 ? 5 : 4);
}

function prefixed(value, base, prefixes) {
  let power = 0;
  while (Math.abs(value) >= base * 0.9995 && power < prefixes.length - 1) { value /= base; power += 1; }
  return round(value, Math.abs(value) >= 1000 ? 4 : 3) + prefixes[power];
}

const counted = value => (Math.abs(value) < 1e4 ? round(value, 4) : prefixed(value, 1000, ["", " k", " M", " G", " T", " P", " E"]));
const bytes = value => prefixed(value, 1024, [" B", " KiB", " MiB", " GiB", " TiB", " PiB"]);

function duration(seconds) {
  const size = Math.abs(seconds);
  if (size === 0) return "0 s";
  if (size < 1e-3) return `${round(seconds * 1e6)} µs`;
  if (size < 1) return `${round(seconds * 1e3)} ms`;
  if (size < 10) return `${round(seconds)} s`;
  for (const [large, name, small, rest] of [[DAY, "d", HOUR, "h"], [HOUR, "h", MINUTE, "min"], [MINUTE, "min", 1, "s"]]) {
    if (size >= large) {
      const whole = Math.round(size / small), part = whole % (large / small);
      return `${seconds < 0 ? "−" : ""}${Math.floor(whole / (large / small))} ${name}${part ? ` ${part} ${rest}` : ""}`;
    }
  }
  return `${Math.round(seconds)} s`;
}

const distance = (time, now) => (time > now ? `in ${duration(time - now)}` : `${duration(now - time)} ago`);

/** A value in one of the units of mixmae.monitoring.boards.panels; `now` is what times are told from. */
export function format(value, unit, now) {
  switch (unit) {
    case "count": return counted(value);
    case "ratio": return `${round(100 * value)} %`;
    case "seconds": return duration(value);
    case "time": return distance(value, now);
    case "bytes": return bytes(value);
    case "bytes per second": return `${bytes(value)}/s`;
    case "per second": return `${counted(value)}/s`;
    case "operations per second": return `${prefixed(value, 1000, [" ", " k", " M", " G", " T", " P", " E"])}FLOP/s`;
    case "watts": return `${counted(value)} W`;
    case "celsius": return `${round(value)} °C`;
    default: return plain(value);
  }
}

function decimalStep(rough) {
  const power = 10 ** Math.floor(Math.log10(rough));
  return power * [1, 2, 2.5, 5, 10].find(factor => factor * power >= rough * 0.999);
}

/** Round values from `low` to `high` for an axis with about `count` of them. */
export function ticks(low, high, unit, count) {
  const rough = (high - low) / count;
  let step;
  if (unit.startsWith("bytes") && high >= 1) {
    const base = 1024 ** Math.floor(Math.log(high) / Math.log(1024));
    step = base * decimalStep(rough / base);
  } else if (unit === "seconds" && rough > 8) {
    step = LONG_STEPS.find(long => long >= rough) ?? DAY * decimalStep(rough / DAY);
  } else if (unit === "count") {
    step = Math.max(1, decimalStep(rough));
  } else {
    step = decimalStep(rough);
  }
  const values = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high * (1 + 1e-9); n += 1) values.push(n * step);
  return values;
}

/** Times of day from `start` to `end`, at most about `count`. */
export function timeTicks(start, end, count) {
  const step = [MINUTE, ...LONG_STEPS.filter(long => long > MINUTE)].find(long => (end - start) / long <= count);
  const offset = new Date(start * 1000).getTimezoneOffset() * MINUTE;
  const values = [];
  for (let t = Math.ceil((start - offset) / step) * step + offset; t <= end; t += step) values.push(t);
  return values.map(t => [t, clock(t, step >= 12 * HOUR)]);
}

export function clock(time, asDate = false) {
  const at = new Date(time * 1000);
  if (asDate) return at.toLocaleDateString([], { day: "numeric", month: "short" });
  return at.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
}
