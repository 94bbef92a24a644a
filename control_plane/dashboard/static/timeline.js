// One export's stages as a picture: when each began and how long it took, from its events.

import { read } from "./api.js";
import { draw, make, picture, table } from "./dom.js";
import { STAGES, seconds } from "./words.js";

const PAGE = 2000; // events in one answer
const TICK_MS = 500;
const ENDS = new Set(["download_ready", "failed", "canceled", "expired"]);
const ROW = 30;

export class Timeline {
  constructor(jobId, box) {
    this.jobId = jobId;
    this.box = make("div", { class: "picture" });
    this.words = make("p", { class: "faint" });
    this.numbers = make("div", { class: "scroll" });
    box.replaceChildren(
      make("h4", {}, "Stages"), this.box, this.words,
      make("details", {}, make("summary", {}, "The same as a table"), this.numbers));
    this.since = 0; // number of the last event that was taken in
    this.spans = []; // {stage, from, to}: milliseconds since the epoch, `to` null while it lasts
    this.clock = () => Date.now(); // the server's, once it has answered
    this.reading = null;
    this.frame = null;
  }

  // Takes in everything up to now; a second call while one is under way waits for that one.
  catchUp() {
    this.reading ??= this.read().finally(() => { this.reading = null; });
    return this.reading;
  }

  async read() {
    for (;;) {
      const path = `/v1/exports/${encodeURIComponent(this.jobId)}/events?sinceSeq=${this.since}&limit=${PAGE}`;
      const { events, statusSnapshot: job } = await read(path);
      // The server's clock from its own figures, so that a wrong clock here bends nothing.
      const [server, here] = [Date.parse(job.createdAt) + job.elapsedMs, performance.now()];
      this.clock = () => server + performance.now() - here;
      for (const event of events) this.take(event);
      if (events.length < PAGE) break;
    }
    this.paint();
  }

  // An event from the stream; where some before it are missing they are fetched.
  async add(event) {
    if (event.seq > this.since + 1) return this.catchUp();
    this.take(event);
    this.frame ??= requestAnimationFrame(() => { // many events come at once
      this.frame = null;
      this.paint();
    });
  }

  take(event) {
    if (event.seq <= this.since) return;
    this.since = event.seq;
    const last = this.spans.at(-1);
    const at = Date.parse(event.ts);
    if (last?.stage === event.stage) return;
    if (last) last.to = at;
    this.spans.push({ stage: event.stage, from: at, to: ENDS.has(event.stage) ? at : null });
  }

  get live() {
    return this.spans.length > 0 && this.spans.at(-1).to === null;
  }

  paint() {
    clearTimeout(this.timer);
    if (!this.spans.length || !this.box.isConnected) return;
    const { rows, total, end } = this.rows();
    const longest = rows.reduce((a, b) => (b.took > a.took ? b : a));
    this.words.textContent = this.live
      ? `${STAGES[this.spans.at(-1).stage]}, ${seconds(total / 1000)} since it came in.`
      : `${seconds(total / 1000)} from start to end. Longest: ${longest.name.toLowerCase()}, ${seconds(longest.took / 1000)}.`;
    picture(this.box, (width) => [chart(rows, total, end, width, this.words.textContent)]);
    this.numbers.replaceChildren(table("Stages", ["Stage", "Began after", "Took"], rows.map((row) => [
      row.name, row.parts.map((part) => seconds(part.from / 1000)).join(", "), row.open ? `${seconds(row.took / 1000)} so far` : seconds(row.took / 1000),
    ])));
    if (this.live) this.timer = setTimeout(() => this.paint(), TICK_MS);
  }

  rows() {
    const start = this.spans[0].from;
    const now = Math.max(this.clock(), this.spans.at(-1).from);
    const rows = new Map();
    let end = null;
    for (const { stage, from, to } of this.spans) {
      if (ENDS.has(stage)) {
        end = stage;
        continue;
      }
      const row = rows.get(stage) ?? { stage, name: STAGES[stage] ?? stage, parts: [], took: 0, open: false };
      rows.set(stage, row);
      row.parts.push({ from: from - start, to: (to ?? now) - start }); // a second attempt goes through a stage again
      row.took += (to ?? now) - from;
      row.open = to === null;
    }
    const order = Object.keys(STAGES);
    const sorted = [...rows.values()].sort((a, b) => order.indexOf(a.stage) - order.indexOf(b.stage));
    return { rows: sorted, total: Math.max(1, (this.spans.at(-1).to ?? now) - start), end };
  }
}

function chart(rows, total, end, width, words) {
  const narrow = width < 520;
  const [left, right] = narrow ? [0, 8] : [160, 76];
  const step = narrow ? ROW + 16 : ROW;
  const scale = (at) => left + (at / total) * (width - left - right);
  const height = rows.length * step + 34;
  const svg = draw("svg", { class: "timeline-chart", width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Timeline. ${words}` });
  const floor = rows.length * step + 6;
  for (const tick of ticks(total, narrow ? 3 : 6)) {
    const x = scale(tick);
    svg.append(
      draw("line", { class: "grid", x1: x, x2: x, y1: 0, y2: floor }),
      draw("text", { class: "axis", x, y: floor + 16, "text-anchor": tick === 0 ? "start" : x > width - 30 ? "end" : "middle" }, tick === 0 ? "0" : seconds(tick / 1000)));
  }
  rows.forEach((row, place) => {
    const y = place * step;
    const took = seconds(row.took / 1000);
    svg.append(draw("text", { x: 0, y: y + (narrow ? 14 : 19) }, narrow ? `${row.name} · ${took}` : row.name));
    for (const part of row.parts) {
      svg.append(draw("rect", {
        class: row.open && part === row.parts.at(-1) ? "span open" : row.stage === "queued" ? "span waiting" : "span",
        x: scale(part.from), y: y + (narrow ? 20 : 6), height: 16, rx: 4, width: Math.max(3, scale(part.to) - scale(part.from)),
      }, draw("title", {}, `${row.name}: from ${seconds(part.from / 1000)} on, ${seconds((part.to - part.from) / 1000)}`)));
    }
    if (!narrow) svg.append(draw("text", { class: "took", x: width, y: y + 19, "text-anchor": "end" }, took));
  });
  if (end) {
    const x = scale(total);
    svg.append(draw("line", { class: `end ${end}`, x1: x, x2: x, y1: 0, y2: floor }));
  }
  return svg;
}

// Round figures from 0 to `total`, about `wanted` of them.
export function ticks(total, wanted) {
  const rough = total / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  return Array.from({ length: Math.floor(total / step) + 1 }, (_, place) => place * step);
}

// What the worker measured; stages run side by side, so these have a length but no beginning.
export function bars(pairs, width) {
  const [left, right, step] = [100, 76, 26];
  const longest = Math.max(...pairs.map(([, value]) => value), 0.001);
  const height = pairs.length * step;
  const words = pairs.map(([name, value]) => `${name} ${seconds(value)}`).join(", ");
  return draw("svg", { class: "bars-chart", width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": words },
    ...pairs.flatMap(([name, value], place) => [
      draw("text", { x: 0, y: place * step + 17 }, name),
      draw("rect", { class: "track", x: left, y: place * step + 6, height: 12, rx: 4, width: width - left - right }),
      draw("rect", { class: "span", x: left, y: place * step + 6, height: 12, rx: 4, width: Math.max(3, (value / longest) * (width - left - right)) }),
      draw("text", { class: "took", x: width, y: place * step + 17, "text-anchor": "end" }, seconds(value)),
    ]));
}
