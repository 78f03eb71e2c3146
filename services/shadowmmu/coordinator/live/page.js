"use strict";
// The live page: takes the samples so far and then one state after the other from /events, and draws them.
// Everything that comes from a run is text, and is shown as text (textContent), never as markup.

const SVG = "http://www.w3.org/2000/svg";
const SAMPLE_LIMIT = 480;
const PLOT_HEIGHT = 170;
const LEFT = 46, RIGHT = 8, TOP = 8, BOTTOM = 20;

const byId = (id) => document.getElementById(id);
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const fraction = new Intl.NumberFormat("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 });
const count = (value) => (value >= 1e7 ? short : whole).format(value);
const tick = (value) => (value < 10 ? Number(value.toPrecision(2)).toString() : short.format(value));
const sumOf = (values) => values.reduce((sum, value) => sum + value, 0);

function make(name, attributes, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function tag(name, className, ...children) {
  const element = document.createElement(name);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

// --- samples -----------------------------------------------------------------------------------------------------------

let samples = [];

function addSample(sample) {
  const last = samples.at(-1);
  if (last && sample.seconds <= last.seconds) {
    if (sample.seconds === last.seconds) samples[samples.length - 1] = sample;
    return;
  }
  samples.push(sample);
  if (samples.length > SAMPLE_LIMIT) {
    samples = samples.filter((_, index) => index % 2 === 0 || index === samples.length - 1);
  }
}

const now = (name) => (sample) => sample.counters[name] ?? 0;
// Per second, from the sample before; the first has none before it.
const rate = (name) => (sample, before) =>
  before ? Math.max(now(name)(sample) - now(name)(before), 0) / (sample.seconds - before.seconds) : 0;

function exitReasons() {
  const counters = samples.at(-1)?.counters ?? {};
  return Object.keys(counters).filter((name) => name.startsWith("exits.")).sort((a, b) => counters[b] - counters[a]);
}

function exitSeries() {
  const names = exitReasons();
  const shown = names.slice(0, 5).map((name) => ({ label: name.slice(6).replaceAll("_", " "), value: rate(name) }));
  const others = names.slice(5).map(rate);
  if (others.length) {
    shown.push({ label: "other", value: (sample, before) => sumOf(others.map((value) => value(sample, before))) });
  }
  return shown;
}

// --- plots -------------------------------------------------------------------------------------------------------------

const PLOTS = [
  { title: "Guest instructions", perSecond: true, series: () => [{ label: "instructions/s", value: rate("vcpu.instructions") }] },
  { title: "Exits by reason", perSecond: true, stacked: true, series: exitSeries },
  { title: "Remote TLB flushes and kicks", perSecond: true, series: () => [
    { label: "remote flushes/s", value: rate("kvm.remote_tlb_flush") },
    { label: "kicks/s", value: rate("kicks.sent") }] },
  { title: "Out of sync, now", series: () => [
    { label: "unsync pages", value: now("kvm.mmu_unsync.current") },
    { label: "tlbs_dirty", value: (sample) => now("tlbs_dirty.raised")(sample) - now("tlbs_dirty.cleared")(sample) }] },
  { title: "mmu_lock", perSecond: true, series: () => [
    { label: "taken/s", value: rate("lock.taken") }, { label: "waited for/s", value: rate("lock.waited") }] },
  { title: "Coverage: named points", series: () => [
    { label: "reached", value: now("points.reached") },
    { label: "another vCPU fell there", value: now("points.interrupted") }] },
];

function niceTicks(highest) {
  const step = [1, 2, 5, 10].map((factor) => factor * 10 ** Math.floor(Math.log10(highest / 3)))
    .find((one) => highest / one <= 4) ?? highest;
  const ticks = [];
  for (let value = 0; value < highest + step; value += step) ticks.push(value);
  return ticks;
}

class Plot {
  constructor(parent, { title, series, perSecond = false, stacked = false }) {
    Object.assign(this, { series, perSecond, stacked, cursor: null });
    const caption = perSecond ? `${title}, per second` : title;
    this.svg = make("svg", { role: "img", "aria-label": caption });
    this.legend = tag("ul", "legend");
    parent.append(tag("figure", "", tag("figcaption", "", caption), this.svg, this.legend));
    this.svg.addEventListener("pointermove", (event) => { this.cursor = event.offsetX; this.draw(); });
    this.svg.addEventListener("pointerleave", () => { this.cursor = null; this.draw(); });
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  draw() {
    const width = this.svg.clientWidth;
    if (!width || !samples.length) return;
    const series = this.series();
    const rows = samples.map((sample, index) => series.map(({ value }) => value(sample, samples[index - 1])));
    if (rows.length > 1 && this.perSecond) rows[0] = rows[1];
    const tops = this.stacked ? rows.map(stack) : rows;
    const ticks = niceTicks(Math.max(1, ...tops.flat()));
    const end = Math.max(samples.at(-1).seconds, 1);
    const x = (seconds) => LEFT + (seconds / end) * (width - LEFT - RIGHT);
    const y = (value) => PLOT_HEIGHT - BOTTOM - (value / ticks.at(-1)) * (PLOT_HEIGHT - TOP - BOTTOM);
    const parts = [];
    for (const value of ticks) {
      parts.push(make("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) }));
      parts.push(make("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, tick(value)));
    }
    const seconds = niceTicks(end).filter((value) => value <= end);
    for (const value of seconds) {
      parts.push(make("text", { x: x(value), y: PLOT_HEIGHT - 5, "text-anchor": "middle" },
        tick(value) + (value === seconds.at(-1) ? " s" : "")));
    }
    series.forEach((_, index) => {
      const line = (values) => values.map(([seconds, value]) => `${x(seconds).toFixed(1)},${y(value).toFixed(1)}`).join("L");
      const top = tops.map((row, at) => [samples[at].seconds, row[index]]);
      const bottom = tops.map((row, at) => [samples[at].seconds, index ? row[index - 1] : 0]).reverse();
      parts.push(this.stacked
        ? make("path", { class: `area c${index}`, d: `M${line(top)}L${line(bottom)}Z` })
        : make("path", { class: `line c${index}`, d: `M${line(top)}` }));
    });
    const at = this.cursor === null ? samples.length - 1 : this.nearest((this.cursor - LEFT) / (width - LEFT - RIGHT) * end);
    if (this.cursor !== null) {
      const place = x(samples[at].seconds);
      parts.push(make("line", { class: "cursor", x1: place, x2: place, y1: TOP, y2: PLOT_HEIGHT - BOTTOM }));
    }
    this.svg.setAttribute("viewBox", `0 0 ${width} ${PLOT_HEIGHT}`);
    this.svg.replaceChildren(...parts);
    this.legend.replaceChildren(...series.map(({ label }, index) =>
      tag("li", "", make("svg", { viewBox: "0 0 8 8" }, make("rect", { class: `c${index}`, width: 8, height: 8 })),
        `${label} ${count(rows[at][index])}`)),
      ...(this.cursor === null ? [] : [tag("li", "quiet", `at ${samples[at].seconds.toFixed(1)} s`)]));
  }

  nearest(seconds) {
    let best = 0;
    samples.forEach((sample, index) => {
      if (Math.abs(sample.seconds - seconds) < Math.abs(samples[best].seconds - seconds)) best = index;
    });
    return best;
  }
}

function stack(row) {
  let sum = 0;
  return row.map((value) => (sum += value));
}

const plots = PLOTS.map((plot) => new Plot(byId("plots"), plot));

// --- numbers and tables ------------------------------------------------------------------------------------------------

function rateNow(name) {
  const last = samples.at(-1);
  // Over about two seconds, so that one can read it.
  const before = samples.findLast((sample) => sample.seconds <= last.seconds - 2) ?? samples[0];
  return last && last.seconds > before.seconds ? rate(name)(last, before) : 0;
}

function tiles(state) {
  const of = (name) => state.sample.counters[name] ?? 0;
  const exits = exitReasons();
  const waited = of("lock.taken") ? (100 * of("lock.waited")) / of("lock.taken") : 0;
  return [
    ["instructions/s", count(rateNow("vcpu.instructions")), `${count(state.instructions)} in all`],
    ["exits/s", count(sumOf(exits.map(rateNow))), `${count(sumOf(exits.map(of)))} in all`],
    ["page faults handled", count(of("kvm.pf_fixed")), ""],
    ["remote TLB flushes", count(of("kvm.remote_tlb_flush")), ""],
    ["kicks sent", count(of("kicks.sent")), `${count(of("kicks.answered"))} answered`],
    ["tlbs_dirty", count(of("tlbs_dirty.raised") - of("tlbs_dirty.cleared")), `${count(of("tlbs_dirty.raised"))} put off`],
    ["unsync pages", count(of("kvm.mmu_unsync.current")), `${count(of("kvm.mmu_unsync.highest"))} at most`],
    ["mmu_lock waits", count(of("lock.waited")), `${fraction.format(waited)} %`],
    ["points reached", count(of("points.reached")), `of ${state.coverage.points.length}`],
    ["events", count(of("events")), state.config.check ? "checked as they come" : "checking is off"],
  ];
}

function showTiles(state) {
  byId("tiles").replaceChildren(...tiles(state).map(([name, value, more]) =>
    tag("div", "", tag("dt", "", name), tag("dd", "", value, " ", tag("small", "", more)))));
}

function fillTable(id, rows) {
  byId(id).tBodies[0].replaceChildren(...rows.map((cells) => tag("tr", "", ...cells.map((cell) =>
    typeof cell === "object" ? tag("td", cell.className, cell.text) : tag("td", "", cell)))));
}

const number = (value) => ({ className: "number", text: count(value) });

function showTables(state) {
  const members = [...state.members].sort((a, b) => a.role.localeCompare(b.role) || a.vcpu - b.vcpu || a.member - b.member);
  fillTable("members", members.map((member) => [
    [member.role, member.vcpu === null ? "" : ` ${member.vcpu}`, ` (${member.name})`].join(""),
    { className: member.state, text: member.text ? `${member.state}: ${member.text}` : member.state },
    member.role === "vcpu" ? number(member.instructions) : "",
    member.role === "vcpu" ? number(member.tlb_misses) : "",
  ]));
  fillTable("exits", exitReasons().map((name) => {
    const exits = state.sample.counters[name] ?? 0;
    const per = state.instructions ? (1000 * exits) / state.instructions : 0;
    return [name.slice(6), number(exits), { className: "number", text: fraction.format(per) }];
  }));
  const shown = [...state.coverage.points].sort((a, b) =>
    (a.reached > 0) - (b.reached > 0) || (a.operations + a.stores > 0) - (b.operations + b.stores > 0));
  const cell = (value, point) => (value || !point.reached ? number(value) : { className: "number never", text: "never" });
  fillTable("coverage", shown.map((point) => [
    point.name,
    point.kind,
    point.reached ? number(point.reached) : { className: "number never", text: "never" },
    point.operation === null ? { className: "number", text: "-" } : cell(point.operations, point),
    cell(point.stores, point),
  ]));
}

function showList(id, texts) {
  const section = byId(id);
  section.hidden = !texts.length;
  section.querySelector("ul").replaceChildren(...texts.map((text) => tag("li", "", text)));
}

function showHead(state) {
  const { config, sample } = state;
  byId("run").textContent = `run ${state.run}`;
  byId("phase").textContent = state.phase;
  const verdict = byId("verdict");
  verdict.hidden = state.verdict === null;
  verdict.textContent = state.verdict ?? "";
  verdict.className = `badge ${state.verdict ?? ""}`;
  byId("detail").textContent = state.text ||
    (state.instructions ? `${whole.format(state.instructions)} of ${whole.format(config.ops)} instructions, ` +
      `${sample.seconds.toFixed(1)} s, ${state.detail}` : state.detail);
  byId("progress").value = Math.min(state.instructions / config.ops, 1);
  byId("about").textContent = `workload ${config.workload} (${config.mode}), profile ${config.profile}, seed ${config.seed}; ` +
    `shadowmmu ${state.version}; began ${state.started}`;
  document.title = `${state.verdict ?? state.phase}: shadowmmu`;
  const violation = byId("violation");
  violation.hidden = state.violation === null;
  violation.querySelector("p").textContent = state.violation ?? "";
}

function show(state) {
  addSample(state.sample);
  showHead(state);
  showTiles(state);
  showTables(state);
  showList("problems", state.problems);
  showList("notes", state.notes);
  plots.forEach((plot) => plot.draw());
}

// --- the connection ----------------------------------------------------------------------------------------------------

const source = new EventSource("events");
const say = (text) => { byId("link").textContent = text; };
source.addEventListener("open", () => say("live"));
source.addEventListener("series", (event) => { samples = JSON.parse(event.data); });
source.addEventListener("state", (event) => show(JSON.parse(event.data)));
source.addEventListener("end", () => { source.close(); say("The run is over; this is its last state."); });
source.addEventListener("error", () => say("The coordinator does not answer; this is what it said last."));
