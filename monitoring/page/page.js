// The page: asks Prometheus, fills the cards of one board, and again every few seconds.

const BOARDS = JSON.parse(document.getElementById("boards-data").textContent);
const RANGES = { "15m": 900, "1h": 3600, "6h": 21600, "1d": 86400, "7d": 604800 };
const POINTS = 240, REFRESH = 15, GONE = 120, MOST_ALERTS = 12, TILE = 190;
const NO_RUN = `No run is scraped yet.
Start one with "mixmae launch", and let Prometheus read the target files RUN_DIR/monitoring/targets/*.json (file_sd_configs).`;

const $ = id => document.getElementById(id);
const address = new URL(location.href);
const chosen = (key, otherwise) => address.searchParams.get(key) ?? otherwise;
const board = BOARDS.find(({ name }) => name === chosen("board")) ?? BOARDS[0];
const LISTS = ["alerts", "table"];
const panels = board.rows.flatMap(row => row.panels).filter(({ look }) => look !== "text");
const ABOUT = BOARDS.flatMap(({ rows }) => rows).flatMap(row => row.panels).find(({ look }) => look === "text");
const rangeName = chosen("range", "1h") in RANGES ? chosen("range", "1h") : "1h";
const range = RANGES[rangeName];
const node = chosen("node", "");

async function ask(path, parameters) {
  const answer = await fetch(`../api/v1/${path}?${new URLSearchParams(parameters)}`);
  const { status, data, error } = await answer.json();
  if (status !== "success") throw new Error(error);
  return data;
}

const query = async (expr, time) => (await ask("query", { query: expr, time })).result;
const quoted = text => JSON.stringify(text).slice(1, -1);
const asPattern = text => quoted(text.replace(/[.*+?^$()[\]{}|\\]/g, "\\$&"));

/** An expression with Grafana's variables filled in. */
function fill(expr, run, span) {
  const values = {
    $run: quoted(run),
    $node: node ? asPattern(node) : ".*",
    $__range: `${range}s`,
    $__rate_interval: `${Math.max(120, span.step + 60)}s`,
  };
  return expr.replace(/\$\w+/g, name => values[name]);
}

const named = (legend, labels) => legend.replace(/\$(\w+)/g, (_, name) => labels[name] ?? "");
const mean = points => points.reduce((sum, [, value]) => sum + value, 0) / points.length;
const finite = points => points.map(([time, value]) => [time, Number(value)]).filter(([, value]) => Number.isFinite(value));

/** Runs seen in the time range, those that go on first and then by their start: [{name, start, seen}]. */
async function findRuns(now) {
  const started = "mixmae_start_timestamp_seconds", window = `[${range}s:${Math.ceil(range / POINTS)}s]`;
  const [starts, times] = await Promise.all([
    query(`max by (run) (last_over_time(${started}[${range}s]))`, now),
    query(`max by (run) (max_over_time(timestamp(${started})${window}))`, now),
  ]);
  const seen = new Map(times.map(({ metric, value }) => [metric.run, Number(value[1])]));
  const runs = starts.map(({ metric, value }) => ({ name: metric.run, start: Number(value[1]), seen: seen.get(metric.run) ?? 0 }));
  const goesOn = run => now - run.seen < GONE;
  return runs.sort((a, b) => goesOn(b) - goesOn(a) || b.start - a.start);
}

function showRuns(runs, name, now) {
  const options = runs.map(run => {
    const label = now - run.seen < GONE ? run.name : `${run.name} (seen ${format(run.seen, "time", now)})`;
    return element("option", { value: run.name }, label);
  });
  if (name && !runs.some(run => run.name === name)) options.push(element("option", { value: name }, `${name} (no data)`));
  $("run").replaceChildren(...options);
  $("run").value = name;
}

async function showNodes(run, now) {
  const found = (await query(`group by (node) (mixmae_step{run="${quoted(run)}"})`, now)).map(({ metric }) => metric.node).sort();
  const names = node && !found.includes(node) ? [...found, node] : found;
  $("node").replaceChildren(element("option", { value: "" }, `all (${found.length})`), ...names.map(name => element("option", { value: name }, name)));
  $("node").value = node;
}

function buildBoard() {
  for (const row of board.rows) {
    const tiles = row.panels.filter(({ look }) => look === "tile"), charts = row.panels.filter(({ look }) => look !== "tile" && look !== "text");
    $("board").append(element("h2", {}, row.title));
    if (tiles.length) $("board").append(element("div", { class: "row tiles" }, ...tiles.map(emptyCard)));
    if (charts.length) $("board").append(element("div", { class: LISTS.includes(charts[0].look) ? "row" : "row charts" }, ...charts.map(emptyCard)));
  }
}

/** As many tiles in each line as in the others. */
function arrangeTiles() {
  for (const row of document.querySelectorAll(".tiles")) {
    const lines = Math.ceil(row.childElementCount / Math.max(1, Math.floor(row.clientWidth / TILE)));
    row.style.gridTemplateColumns = `repeat(${Math.ceil(row.childElementCount / lines)}, minmax(0, 1fr))`;
  }
}

function emptyCard(panel) {
  const card = element("section", { class: "card", title: panel.help }, element("h3", {}, panel.title));
  if (panel.look === "tile") {
    card.classList.add("tile");
    card.append(element("div", { class: "value unknown" }, "–"));
  } else if (LISTS.includes(panel.look)) {
    card.querySelector("h3").remove();
    card.append(element("ul", { class: "list" }));
  } else {
    card.append(element("div", { class: "plot" }), element("div", { class: "legend" }));
  }
  cards.set(panel, card);
  return card;
}

const cards = new Map();
const show = {
  async tile(panel, run, span) {
    const found = await query(fill(panel.queries[0].expr, run, span), span.now);
    const value = found.length ? Number(found[0].value[1]) : NaN, card = cards.get(panel), known = Number.isFinite(value);
    const text = card.querySelector(".value");
    text.textContent = known ? format(value, panel.unit, span.now) : "–";
    text.classList.toggle("unknown", !known);
    card.classList.toggle("alarm", known && panel.alarm !== null && value >= panel.alarm);
    card.querySelector(".share")?.remove();
    if (known && panel.unit === "ratio") card.append(element("div", { class: "share", style: `width:${100 * Math.min(1, Math.max(0, value))}%` }));
  },
  async text(panel, run, span) {
    const [{ expr, legend }] = panel.queries, found = await query(fill(expr, run, span), span.now);
    $("about").textContent = found.length ? named(legend, found[0].metric) : "";
  },
  async alerts(panel, run) {
    const firing = (await ask("alerts", {})).alerts.filter(({ labels, state }) => state === "firing" && labels.run === run);
    cards.get(panel).querySelector("ul").replaceChildren(...alertRows(firing));
  },
  async table(panel, run, span) {
    const [{ expr, legend }] = panel.queries, found = await query(fill(expr, run, span), span.now);
    const rows = found.map(({ metric, value }) => ({ text: named(legend, metric), value: Number(value[1]) }));
    rows.sort((a, b) => b.value - a.value);
    cards.get(panel).querySelector("ul").replaceChildren(...rows.map(({ text, value }) =>
      element("li", {}, element("span", {}, text), element("b", { class: "last" }, format(value, panel.unit, span.now)))));
  },
  async chart(panel, run, span) {
    const answers = await Promise.all(panel.queries.map(({ expr }) =>
      ask("query_range", { query: fill(expr, run, span), start: span.start, end: span.end, step: span.step })));
    const series = answers.flatMap(({ result }, index) => result.map(({ metric, values }) => ({ legend: named(panel.queries[index].legend, metric), points: finite(values) })));
    const drawn = series.filter(({ points }) => points.length);
    if (drawn.length > panel.queries.length) drawn.sort((a, b) => mean(b.points) - mean(a.points));
    drawChart(cards.get(panel), panel, drawn, span);
  },
};

/** One line for each kind of alert: a cause may fire on hundreds of ranks. */
function alertRows(alerts) {
  if (!alerts.length) return [element("li", { class: "quiet" }, "No alert fires.")];
  const kinds = new Map();
  for (const alert of alerts) {
    const kind = JSON.stringify([alert.labels.alertname, alert.labels.severity]);
    kinds.set(kind, [...(kinds.get(kind) ?? []), alert]);
  }
  const bad = ["critical", "warning"], order = ([{ labels }]) => (bad.indexOf(labels.severity) + bad.length + 1) % (bad.length + 1);
  const groups = [...kinds.values()].sort((a, b) => order(a) - order(b)), now = Date.now() / 1000;
  const rows = groups.slice(0, MOST_ALERTS).map(group => {
    const [{ labels, annotations }] = group, severity = labels.severity ?? "info";
    const since = Math.min(...group.map(({ activeAt }) => Date.parse(activeAt))) / 1000;
    const text = annotations.summary ?? annotations.description ?? "";
    return element("li", {}, element("span", { class: `severity ${severity}` }, severity),
      element("b", {}, labels.alertname + (group.length > 1 ? ` × ${group.length}` : "")), element("span", {}, text),
      element("span", { class: "last" }, format(since, "time", now)));
  });
  return groups.length > MOST_ALERTS ? [...rows, element("li", {}, `and ${groups.length - MOST_ALERTS} more`)] : rows;
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

async function refresh() {
  const now = Date.now() / 1000, runs = await findRuns(now);
  const name = chosen("run", runs[0]?.name ?? ""), run = runs.find(one => one.name === name);
  showRuns(runs, name, now);
  $("board").hidden = !run;
  arrangeTiles();
  if (!run) {
    notice(name ? `Run ${name} was not seen in the last ${rangeName}. Choose a longer time or another run.` : NO_RUN);
    return;
  }
  const ended = now - run.seen >= GONE;
  notice(ended ? `${name} was last seen ${format(run.seen, "time", now)}: what is shown is its end.` : "");
  document.title = `${name} · MixMAE`;
  const step = Math.ceil(range / POINTS), end = Math.floor((ended ? run.seen : now) / step) * step;
  const span = { now: ended ? run.seen : now, start: end - range, end, step };
  if (board.nodes) await showNodes(name, span.now);
  await Promise.all([ABOUT, ...panels].map(panel => (show[panel.look] ?? show.chart)(panel, name, span)));
  $("status").textContent = `${clock(now)} · every ${REFRESH} s anew · quantiles and rates over ${format(Math.max(120, step + 60), "seconds")}`;
}

async function refreshNow() {
  if (!document.hidden) await refresh().catch(problem => notice(`Prometheus does not answer as expected: ${problem.message}`));
}

async function refreshAlways() {
  await refreshNow();
  setTimeout(refreshAlways, REFRESH * 1000);
}

function linkTo(key, value) {
  const link = new URL(address);
  if (value) link.searchParams.set(key, value); else link.searchParams.delete(key);
  return link.href;
}

function links(id, key, names, current) {
  $(id).replaceChildren(...Object.entries(names).map(([value, text]) =>
    element("a", { href: linkTo(key, value), ...(value === current ? { "aria-current": "page" } : {}) }, text)));
}

links("boards", "board", Object.fromEntries(BOARDS.map(({ name, title }) => [name, title])), board.name);
links("ranges", "range", Object.fromEntries(Object.keys(RANGES).map(name => [name, name])), rangeName);
$("run").addEventListener("change", event => { location.href = linkTo("run", event.target.value); });
$("node").addEventListener("change", event => { location.href = linkTo("node", event.target.value); });
$("node-choice").hidden = !board.nodes;
document.addEventListener("visibilitychange", refreshNow);
let resized = 0;
window.addEventListener("resize", () => {
  clearTimeout(resized);
  resized = setTimeout(refreshNow, 200);
});
buildBoard();
refreshAlways();
