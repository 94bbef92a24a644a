// How the sync with the graph stands, and what an operator does about it.

import { read } from "./api.js";
import { columns } from "./charts.js";
import { $, clean, cut, foreign, make, picture, problem, swap, table } from "./dom.js";
import { bytes, count, many, seconds, when } from "./words.js";

const FAILURES = 50; // that are told
const ROWS = 50; // collections in the table
const BUCKET_MS = 5000;
const BUCKETS = 60;
const STALE_MS = 15_000; // for which what was seen last still holds
const TURNS = 4; // of the page's refreshes for one of the failures, where their number stays
const KINDS = { verify: "comparison", rebuild: "rebuild" };
const WORK = { verify: "Comparing the graph with the documents", rebuild: "Making the graph anew" };
const DONE = {
  enable: () => "The graph is kept in step again.",
  disable: () => "The graph is left as it is; documents wait.",
  trigger: ({ retried }) => `${many(retried, "document")} will be tried again.`,
  verify: () => "The graph will be compared in a moment.",
  rebuild: () => "The graph will be made anew in a moment.",
};

let app;
let running = null; // AbortController of what is being read
let looking = false; // true while a refresh is on its way
let turn = 0;
let told = null; // how many failures there were when they were last asked for
let said = 0; // the turn in which something was last said of a button that was pressed
let samples = []; // [time, documents that waited]

export function start(page) {
  app = page;
  for (const button of $("sync-actions").querySelectorAll("button")) {
    button.addEventListener("click", () => (button.dataset.ask === "rebuild" ? $("rebuild").showModal() : ask(button)));
  }
  $("rebuild-yes").addEventListener("click", () => {
    $("rebuild").close();
    ask($("sync-actions").querySelector('[data-ask="rebuild"]'));
  });
  $("rebuild-no").addEventListener("click", () => $("rebuild").close());
}

export async function enter() {
  running?.abort();
  running = new AbortController();
  told = null;
  document.title = "Sync · memvid-export";
  $("sync-status").textContent = "Reading…";
  await show();
}

export function leave() {
  running?.abort();
  if ($("rebuild").open) $("rebuild").close();
}

export async function tick() {
  turn += 1;
  if (!looking && $("sync-error").hidden) await show(true);
}

// With `again` what was read last stands where this cannot be read.
async function show(again = false) {
  const { signal } = running;
  looking = true;
  try {
    const overview = await read("/v1/nexus", { signal });
    const failures = !overview.failed ? [] : overview.failed === told && turn % TURNS ? null
      : (await read(`/v1/nexus/failures?limit=${FAILURES}`, { signal })).failures;
    $("sync-error").hidden = true;
    $("sync-body").hidden = false;
    present(overview);
    if (failures) refused(failures, overview.failed);
    told = overview.failed;
    if (turn > said + 2 || $("sync-status").textContent === "Reading…") $("sync-status").textContent = "";
  } catch (error) {
    if (error.name === "AbortError") return;
    $("sync-status").textContent = "";
    if (again && error.status !== 403) return;
    $("sync-body").hidden = true;
    problem($("sync-error"), error, () => enter());
  } finally {
    looking = false;
  }
}

async function ask(button) {
  const what = button.dataset.ask;
  button.setAttribute("aria-busy", "true");
  button.disabled = true;
  app.notice("");
  try {
    said = turn;
    $("sync-status").textContent = DONE[what](await read(`/v1/nexus/${what}`, { method: "POST" }));
    await show(true);
  } catch (error) {
    app.show(error);
  } finally {
    button.disabled = false;
    button.removeAttribute("aria-busy");
    if (document.activeElement === document.body) { // a button that was pressed and is gone loses the focus
      (button.hidden ? $("sync-actions").querySelector("button:not([hidden])") ?? $("sync-title") : button).focus();
    }
  }
}

// --- figures --------------------------------------------------------------------------------------

function present(overview) {
  const { enabled, leads, owner, graph, trouble, documents, pending, failed, oldestPendingSeconds: oldest, progress, last, spaces, outbound } = overview;
  const leader = leads ? "by this server" : owner ? "by another server" : "by nobody";
  swap($("sync-tiles"), [enabled, leader, documents, pending, failed, oldest, spaces, outbound], () => [
    ["Sync", enabled ? "on" : "off", enabled ? leader : "the graph is left as it is"],
    ["Waiting", count(pending), `of ${many(documents, "document")}`],
    ["Lag", oldest === null ? "none" : seconds(oldest), oldest === null ? "nothing waits" : "the oldest that waits"],
    ["Given up", count(failed), failed ? "tried no more" : "none"],
    ["Memory", bytes(spaces.bytes), `for ${many(spaces.count, "space")}`],
    ["Events out", count(outbound.waiting), `waiting, ${count(outbound.dead)} given up`],
  ].map(([name, value, more]) => make("div", { class: "card tile" },
    make("dt", {}, name), make("dd", {}, make("strong", {}, value), make("span", { class: "faint" }, more)))));
  $("sync-trouble").hidden = !trouble;
  say($("sync-trouble"), trouble ? cut(clean(trouble.charAt(0).toUpperCase() + trouble.slice(1)), 600) : "");
  swap($("sync-graph"), [graph, leads], () => graph ? ["Graph: ", foreign("span", {}, graph, 200)]
    : [leads ? "No graph has answered yet." : "Which graph answers is known to the server that keeps it in step."]);
  buttons(enabled, failed, progress);
  working(progress);
  report(last);
  queue(pending);
  behind(overview.collections);
}

function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function buttons(enabled, failed, progress) {
  const visible = { enable: !enabled, disable: enabled, trigger: failed > 0, verify: !progress, rebuild: !progress };
  for (const button of $("sync-actions").querySelectorAll("button")) button.hidden = !visible[button.dataset.ask];
}

function working(progress) {
  $("sync-progress").hidden = !progress;
  if (!progress) return;
  const { kind, done, total } = progress;
  say($("sync-progress-text"), total ? `${WORK[kind]}: ${count(done)} of ${many(total, "document")}` : `${WORK[kind]}: it begins in a moment`);
  $("sync-progress-bar").max = Math.max(total, 1);
  $("sync-progress-bar").value = done;
}

function report(last) {
  swap($("sync-report"), last, () => {
    if (!last) return [make("p", { class: "faint" }, "The graph was not compared yet.")];
    const different = Object.entries(last.different);
    const sum = different.reduce((total, [, times]) => total + times, 0);
    const facts = [
      ["What", `${KINDS[last.kind] ?? last.kind}, ${when(last.startedAt)}, ${seconds(last.seconds)}`],
      ["Compared", `${many(last.documents, "document")}, ${many(last.pairs, "pair")}, ${many(last.mentions, "mention")}`],
      ["Left out", last.pending ? `${many(last.pending, "document")} that waited` : "none"],
      ["Differences", sum ? `${count(sum)}: ${different.map(([what, times]) => `${count(times)} ${clean(what)}`).join(", ")}` : "none"],
      ["Repaired", many(last.repaired, "document")],
    ];
    return [
      last.error ? make("p", { class: "bad" }, foreign("span", {}, `It ended early: ${last.error}`, 600)) : "",
      make("dl", { class: "facts-list" }, ...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)])),
      last.examples.length ? make("details", {},
        make("summary", {}, `The first ${many(last.examples.length, "difference")}`),
        make("ul", { class: "warnings" }, ...last.examples.map((text) => foreign("li", {}, text, 300)))) : "",
    ];
  });
}

// --- the queue, as far back as this page looked ----------------------------------------------------

function queue(pending) {
  const now = Date.now();
  samples = [...samples.filter(([time]) => time > now - BUCKETS * BUCKET_MS), [now, pending]];
  const first = Math.floor(now / BUCKET_MS) - BUCKETS + 1;
  let known = null; // what was seen last, and when
  const buckets = Array.from({ length: BUCKETS }, (_, at) => ({ start: (first + at) * BUCKET_MS }));
  const stacks = buckets.map(({ start }) => {
    const here = samples.filter(([time]) => time >= start && time < start + BUCKET_MS);
    if (here.length) known = here.at(-1);
    else if (known && start - known[0] > STALE_MS) known = null;
    return known && [["depth", here.length ? Math.max(...here.map(([, waiting]) => waiting)) : known[1]]];
  });
  const times = {
    group: 60_000 / BUCKET_MS,
    moment: (time) => new Date(time).toLocaleTimeString(),
    axis: (time) => `${Math.round((now - time) / 60_000)} min ago`,
  };
  picture($("sync-queue"), (width) => [columns("Documents that wait for the graph", buckets, stacks, width, times)]);
}

function behind(collections) {
  const rows = collections.slice(0, ROWS);
  $("sync-collections").hidden = !rows.length;
  $("sync-more").textContent = `By collection${collections.length > ROWS ? `, the ${ROWS} furthest behind` : ""}`;
  swap($("sync-table"), rows, () => [table("Furthest behind first", ["Collection", "Client", "Documents", "Waiting", "Given up", "Lag"],
    rows.map((one) => [
      foreign("span", {}, one.name, 60), foreign("span", {}, one.client, 40), count(one.documents), count(one.pending), count(one.failed),
      one.oldestPendingSeconds === null ? "none" : seconds(one.oldestPendingSeconds),
    ]))]);
}

function refused(failures, failed) {
  $("sync-failures-box").hidden = !failures.length;
  $("sync-failures-count").textContent = failed > failures.length ? `the first ${count(failures.length)} of ${count(failed)}` : count(failures.length);
  swap($("sync-failures"), failures, () => failures.map((one) => make("li", { class: "hit" },
    make("div", {}, foreign("strong", {}, one.id, 160), " ",
      make("span", { class: "faint" }, "in ", foreign("span", {}, one.collection, 128), " of ", foreign("span", {}, one.client, 64), `, ${many(one.attempts, "attempt")}`)),
    foreign("span", { class: "why bad" }, one.error, 600))));
}
