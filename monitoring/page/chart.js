// Charts as inline SVG: lines, stacked shares and heatmaps over time.

const COLORS = ["var(--accent)", "#efb118", "#ff725c", "#3ca951", "#a463f2", "#6cc5b0", "#ff8ab7", "#9c6b4e", "#97bbf5", "#9498a0"];
const RIGHT = 6, TOP = 8, BOTTOM = 20, HEIGHT = 168, LETTER = 6.2;

const color = index => COLORS[index % COLORS.length];
const shown = new Map();
const tip = document.getElementById("tip");

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function shape(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

/**
 * Draws `series`, a list of {legend, points: [[time, value], ...]}, into `card`.
 * `span` is {start, end, step} in seconds; times and values are numbers.
 */
export function drawChart(card, panel, series, span) {
  const plot = card.querySelector(".plot"), legend = card.querySelector(".legend");
  if (!series.some(one => one.points.length)) {
    shown.delete(card);
    plot.replaceChildren(element("div", { class: "nothing" }, "no data in this time"));
    legend.replaceChildren();
    return;
  }
  const width = plot.clientWidth;
  const svg = shape("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": `${panel.title}. ${panel.help}` });
  const kind = { stack: stacked, heatmap }[panel.look] ?? lines;
  const drawn = kind(series, panel, span);
  const left = 14 + LETTER * Math.max(...drawn.marks.map(([, label]) => label.length));
  const x = time => left + (width - left - RIGHT) * (time - span.start) / (span.end - span.start);
  const y = value => HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - drawn.low) / (drawn.high - drawn.low);
  for (const [value, label] of drawn.marks) {
    svg.append(shape("line", { class: "grid", x1: left, x2: width - RIGHT, y1: y(value), y2: y(value) }));
    svg.append(shape("text", { x: left - 7, y: y(value) + 4, "text-anchor": "end" }, label));
  }
  for (const [time, label] of timeTicks(span.start, span.end, Math.max(2, Math.floor(width / 75)))) {
    svg.append(shape("text", { x: x(time), y: HEIGHT - 5, "text-anchor": "middle" }, label));
  }
  svg.append(shape("line", { class: "axis", x1: left, x2: width - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM }));
  svg.append(...drawn.shapes(x, y));
  const cross = shape("line", { class: "cross", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  svg.append(cross);
  plot.replaceChildren(svg);
  legend.replaceChildren(...drawn.keys.map(([key, name, value]) => entry("span", key, name, value)));
  shown.set(card, { cross, x });
  svg.addEventListener("pointermove", event => {
    const share = (event.offsetX - left) / (width - left - RIGHT);
    const time = span.start + Math.round(Math.min(1, Math.max(0, share)) * (span.end - span.start) / span.step) * span.step;
    point(time);
    showTip(event, [element("div", {}, moment(time, span)), ...drawn.at(time).map(([key, name, value]) => entry("div", key, name, value))]);
  });
  svg.addEventListener("pointerleave", () => point(null));
}

const moment = (time, { start, end }) => (end - start >= DAY ? `${clock(time, true)}, ${clock(time)}` : clock(time));

/** A cross line at one time in every chart. */
function point(time) {
  tip.hidden = time === null;
  for (const { cross, x } of shown.values()) {
    cross.setAttribute("visibility", time === null ? "hidden" : "visible");
    if (time !== null) { cross.setAttribute("x1", x(time)); cross.setAttribute("x2", x(time)); }
  }
}

function showTip(event, rows) {
  tip.replaceChildren(...rows);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = event.clientX + 16 + width > innerWidth ? event.clientX - 16 - width : event.clientX + 16;
  tip.style.left = `${Math.max(0, left)}px`;
  tip.style.top = `${Math.max(0, Math.min(event.clientY + 12, innerHeight - height))}px`;
}

function entry(kind, key, name, value) {
  const label = element("span", {});
  if (key) label.append(element("span", { class: "key", style: `background:${key}` }));
  label.append(name);
  return element(kind, {}, label, value ? " " : "", element("b", {}, value));
}

const last = points => points.at(-1)[1];
const at = (points, time, step) => points.find(([t]) => Math.abs(t - time) < step / 2)?.[1];

function lines(series, panel, span) {
  const values = series.flatMap(one => one.points.map(([, value]) => value));
  let low = Math.min(...values), high = Math.max(...values);
  if (low >= 0 && (panel.unit !== "none" || low < high / 2)) low = 0;
  if (high === low) { high += Math.abs(high) / 10 || 1; low -= low === 0 ? 0 : Math.abs(low) / 10; }
  const room = (high - low) * 0.06;
  high += room;
  low -= low === 0 ? 0 : room;
  const written = value => format(value, panel.unit, span.end);
  return {
    low, high,
    marks: ticks(low, high, panel.unit, 4).map(value => [value, written(value)]),
    keys: series.map((one, index) => [color(index), one.legend, one.points.length ? written(last(one.points)) : "no data"]),
    shapes: (x, y) => series.map((one, index) => shape("path", { class: "curve", stroke: color(index), d: path(one.points, x, y, span.step) })),
    at: time => series
      .map((one, index) => [color(index), one.legend, at(one.points, time, span.step)])
      .filter(row => row[2] !== undefined)
      .sort((a, b) => b[2] - a[2])
      .map(([key, name, value]) => [key, name, written(value)]),
  };
}

/** A line that is broken where values are missing. */
function path(points, x, y, step) {
  let before = -Infinity;
  return points.map(([time, value]) => {
    const letter = time - before > 1.5 * step ? "M" : "L";
    before = time;
    return `${letter}${x(time).toFixed(1)} ${y(value).toFixed(1)}${points.length === 1 ? "h2" : ""}`;
  }).join("");
}

function stacked(series, panel, span) {
  const bottoms = new Map(), full = [...series].sort((a, b) => last(b.points) - last(a.points));
  const layers = full.map(one => one.points.map(([time, value]) => {
    const low = bottoms.get(time) ?? 0;
    bottoms.set(time, low + value);
    return [time, low, low + value];
  }));
  const written = value => format(value, panel.unit, span.end);
  return {
    low: 0, high: Math.max(1, ...bottoms.values()),
    marks: ticks(0, 1, panel.unit, 4).map(value => [value, written(value)]),
    keys: full.map((one, index) => [color(index), one.legend, written(last(one.points))]),
    shapes: (x, y) => layers.map((layer, index) => {
      const over = layer.map(([time, , high]) => `${x(time).toFixed(1)} ${y(high).toFixed(1)}`);
      const under = layer.map(([time, low]) => `${x(time).toFixed(1)} ${y(low).toFixed(1)}`).reverse();
      return shape("path", { fill: color(index), "fill-opacity": 0.8, d: `M${[...over, ...under].join("L")}Z` });
    }),
    at: time => full
      .map((one, index) => [color(index), one.legend, at(one.points, time, span.step)])
      .filter(row => row[2] !== undefined)
      .map(([key, name, value]) => [key, name, written(value)])
      .reverse(),
  };
}

/** Cumulative buckets, named by their upper bounds, as cells. */
function heatmap(series, panel, span) {
  const buckets = series.map(one => ({ bound: Number(one.legend.replace("+Inf", "Infinity")), points: one.points }));
  buckets.sort((a, b) => a.bound - b.bound);
  const counts = new Map();
  buckets.forEach(({ points }, row) => points.forEach(([time, value]) => {
    if (!counts.has(time)) counts.set(time, new Array(buckets.length).fill(0));
    counts.get(time)[row] = value;
  }));
  for (const column of counts.values()) for (let row = column.length - 1; row > 0; row -= 1) column[row] = Math.max(0, column[row] - column[row - 1]);
  const filled = buckets.map((_, row) => [...counts.values()].some(column => column[row] > 0));
  const first = Math.max(0, filled.indexOf(true)), end = Math.max(first + 1, filled.lastIndexOf(true) + 1);
  const most = Math.max(...[...counts.values()].flat());
  const bound = row => (buckets[row].bound === Infinity ? "more" : `≤ ${format(buckets[row].bound, panel.unit, span.end)}`);
  const rows = buckets.map((_, row) => row).slice(first, end);
  return {
    low: first, high: end,
    marks: rows.map(row => [row + 0.5, bound(row)]),
    keys: [["", "steps per second, at most", format(most, "per second", span.end)]],
    shapes: (x, y) => {
      const width = Math.max(1, x(span.start + span.step) - x(span.start) + 0.3);
      return [...counts].flatMap(([time, column]) => rows.filter(row => column[row] > 0).map(row => shape("path", {
        fill: "var(--accent)", "fill-opacity": (0.08 + 0.92 * Math.sqrt(column[row] / most)).toFixed(2),
        d: `M${(x(time) - width).toFixed(1)} ${(y(row + 1) + 0.5).toFixed(1)}h${width.toFixed(1)}V${(y(row) - 0.5).toFixed(1)}h${-width.toFixed(1)}Z`,
      })));
    },
    at: time => {
      const column = counts.get(time) ?? [];
      return rows.filter(row => column[row] > 0).reverse().map(row => ["", bound(row), format(column[row], "per second", span.end)]);
    },
  };
}
