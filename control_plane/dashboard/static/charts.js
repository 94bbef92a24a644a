// Queue depth, throughput and failures over the last hours or days.

import { read } from "./api.js";
import { $, clean, draw, foreign, make, picture, problem, table } from "./dom.js";
import { ticks } from "./timeline.js";
import { FAILURES, count, many, seconds } from "./words.js";

const TURNS = 3; // of the page's refreshes for one of these figures
const RANGES = { 24: "24 hours", 168: "7 days" };
const KINDS = [["completed", "ready"], ["failed", "failed"], ["canceled", "canceled"]];

let hours = 24;
let turn = 0;
let running = null;

export function start() {
  for (const radio of document.querySelectorAll('input[name="hours"]')) {
    radio.addEventListener("change", () => { location.hash = `#activity=${radio.value}`; });
  }
}

export async function enter(wanted) {
  document.title = "Activity · memvid-export";
  hours = Object.hasOwn(RANGES, wanted.get("activity")) ? Number(wanted.get("activity")) : 24;
  for (const radio of document.querySelectorAll('input[name="hours"]')) radio.checked = Number(radio.value) === hours;
  $("activity-status").textContent = "Reading…";
  await show();
}

export function leave() {
  running?.abort();
}

export function tick() {
  turn += 1;
  if (turn % TURNS === 0) show();
}

async function show() {
  running?.abort();
  running = new AbortController();
  try {
    const stats = await read(`/v1/stats?hours=${hours}`, { signal: running.signal });
    $("activity-error").hidden = true;
    $("activity-body").hidden = false;
    present(stats);
    $("activity-status").textContent = "";
  } catch (error) {
    if (error.name === "AbortError") return;
    $("activity-status").textContent = "";
    $("activity-body").hidden = true;
    problem($("activity-error"), error, show);
  }
}

function present({ queue, bucketSeconds, buckets, failures }) {
  const sum = (name) => buckets.reduce((total, bucket) => total + bucket[name], 0);
  const ended = sum("completed") + sum("failed");
  tiles([
    ["Waiting", count(queue.queued), `of ${count(queue.capacity)} places`],
    ["Running", count(queue.running), "now"],
    ["Longest wait", queue.queued ? seconds(queue.oldestSeconds ?? 0) : "none", "now"],
    ["Made ready", count(sum("completed")), `in ${RANGES[hours]}`],
    ["Failed", ended ? `${((100 * sum("failed")) / ended).toFixed(sum("failed") && sum("failed") < ended / 10 ? 1 : 0)}%` : "none", ended ? `${count(sum("failed"))} of ${count(ended)}` : "nothing ended yet"],
  ]);
  const deep = depths(queue, buckets);
  const each = bucketSeconds % 3600 === 0 ? many(bucketSeconds / 3600, "hour") : many(Math.round(bucketSeconds / 60), "minute");
  const of = each.replace(/^1 /, "");
  chart("depth", "Queue depth", `Exports waiting or running at the end of each ${of}`, buckets, deep.map((value) => [["depth", value]]));
  chart("throughput", "Throughput", `Exports that ended in each ${of}`, buckets, buckets.map((bucket) => KINDS.map(([name]) => [name, bucket[name]])), KINDS);
  chart("frames", "Frames written", `Frames in the capsules made ready in each ${of}`, buckets, buckets.map((bucket) => [["completed", bucket.frames]]));
  reasons(failures, sum("failed"));
  $("numbers-body").replaceChildren(table(
    `Exports in the last ${RANGES[hours]}`, ["From", "Came in", "Ready", "Failed", "Canceled", "Frames", "In work at the end"],
    buckets.map((bucket, at) => [
      moment(bucket.start), count(bucket.submitted), count(bucket.completed), count(bucket.failed), count(bucket.canceled), count(bucket.frames), count(deep[at]),
    ])));
}

function chart(id, name, about, buckets, stacks, legend = []) {
  const box = make("div", { class: "picture" });
  $(id).replaceChildren(
    make("figcaption", {}, make("h3", {}, name), make("span", { class: "faint" }, about)), box,
    legend.length ? make("p", { class: "legend faint" }, ...legend.map(([kind, word]) => make("span", { class: `key ${kind}` }, word))) : "");
  picture(box, (width) => [columns(`${name}. ${about}`, buckets, stacks, width, { group: 1, moment, axis: hour })]);
}

// What is in work now, less what came and plus what ended since.
function depths(queue, buckets) {
  let depth = queue.queued + queue.running;
  return [...buckets].reverse().map((bucket) => {
    const here = Math.max(0, depth);
    depth -= bucket.submitted - bucket.completed - bucket.failed - bucket.canceled;
    return here;
  }).reverse();
}

function tiles(facts) {
  $("tiles").replaceChildren(...facts.map(([name, value, more]) =>
    make("div", { class: "card tile" }, make("dt", {}, name), make("dd", {}, make("strong", {}, value), make("span", { class: "faint" }, ` ${more}`)))));
}

// A column for each bucket, of stacks [[kind, value]…]; null stands for one of which nothing is known. `times` says how
// the start of a bucket is called, and on the axis, where a multiple of `group` buckets lies between two times.
export function columns(name, buckets, stacks, width, { group, moment, axis }) {
  const [left, top, plot] = [44, 8, 130];
  const height = top + plot + 24;
  const totals = stacks.map((stack) => (stack ?? []).reduce((sum, [, value]) => sum + value, 0));
  const most = Math.max(1, ...totals);
  const svg = draw("svg", { class: "columns", width, height, viewBox: `0 0 ${width} ${height}`, role: "img" });
  const marks = ticks(most, 3).filter(Number.isInteger);
  if (marks.at(-1) < most) marks.push(marks.at(-1) + Math.max(1, marks[1] ?? 1));
  const high = marks.at(-1);
  const y = (value) => top + plot - (value / high) * plot;
  for (const mark of marks) {
    svg.append(
      draw("line", { class: "grid", x1: left, x2: width, y1: y(mark), y2: y(mark) }),
      draw("text", { class: "axis", x: left - 6, y: y(mark) + 4, "text-anchor": "end" }, short(mark)));
  }
  const step = (width - left) / stacks.length;
  const every = group * Math.ceil(70 / (step * group)); // buckets between two times on the axis
  let peak = [0, 0];
  stacks.forEach((stack, at) => {
    let base = 0;
    if (totals[at] > peak[0]) peak = [totals[at], at];
    if (!stack) svg.append(draw("rect", { class: "unseen", x: left + at * step, width: step + 0.5, y: top, height: plot }));
    for (const [kind, value] of stack ?? []) {
      if (!value) continue;
      svg.append(draw("rect", {
        class: `column ${kind}`, x: left + at * step + 1, width: Math.max(1, step - 2), rx: 2,
        y: y(base + value), height: Math.max(1, y(base) - y(base + value)),
      }, draw("title", {}, `${moment(buckets[at].start)}: ${count(value)}${stack.length > 1 ? ` ${kind}` : ""}`)));
      base += value;
    }
    if (at % every === 0 && left + at * step + 34 < width) {
      svg.append(draw("text", { class: "axis", x: left + at * step, y: height - 6 }, axis(buckets[at].start)));
    }
  });
  const sum = totals.reduce((all, total) => all + total, 0);
  svg.setAttribute("aria-label", sum ? `${name}. At most ${count(peak[0])}, ${moment(buckets[peak[1]].start)}.` : `${name}. None.`);
  if (!sum) svg.append(draw("text", { class: "axis", x: left + (width - left) / 2, y: top + plot / 2, "text-anchor": "middle" }, "none in this time"));
  return svg;
}

const short = (value) => (value >= 1e6 ? `${value / 1e6}M` : value >= 1000 ? `${value / 1000}k` : String(value));
const moment = (time) => new Date(time).toLocaleString([], { weekday: "short", hour: "2-digit", minute: "2-digit" });
const hour = (time) => (hours > 24
  ? new Date(time).toLocaleDateString([], { weekday: "short", day: "numeric" })
  : new Date(time).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" }));

function reasons(failures, total) {
  if (!failures.length) return $("failures").replaceChildren(make("p", { class: "faint" }, `No export failed in ${RANGES[hours]}.`));
  const most = Math.max(...failures.map((failure) => failure.count));
  $("failures").replaceChildren(make("ul", { class: "plain reasons" }, ...failures.map(({ code, count: times }) => {
    const bar = draw("svg", { class: "reason", viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" },
      draw("rect", { class: "column failed", width: (100 * times) / most, height: 8 }));
    return make("li", {},
      make("p", {}, foreign("span", {}, FAILURES[code] ?? code, 200), make("span", { class: "faint" }, ` ${many(times, "export")} · ${clean(code)}`)), bar);
  })));
}
