// One node of a capsule with its neighbours, drawn; each of them leads on.

import { ask, patiently } from "./api.js";
import { $, clean, cut, foreign, make, problem } from "./dom.js";
import { drawGraph } from "./graph.js";
import { count, many, place, relation } from "./words.js";

const SIDE = 12; // neighbours that are drawn on each side
const SNIPPET_CHARS = 4000;
const PROPERTIES = 60;
const WAYS = { in: "here", out: "on" };
const lead = (number, way) => `${number === 1 ? "leads" : "lead"} ${WAYS[way]}`;

let app;
let running = null; // AbortController of what is being read
let wanted = null; // the address that is shown
let origin = ""; // the address that the walk began at
let sides = {}; // by direction: {items, cursors, place, next, error}
let node = null;
let snippet = null; // {text, next}

export function start(page) {
  app = page;
  $("walk-back").addEventListener("click", () => (history.state?.depth ? history.back() : $("walk-close").click()));
  $("snippet-more").addEventListener("click", more);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || $("walk").hidden || $("view-search").hidden) return;
    event.preventDefault();
    $("walk-close").click();
  });
}

// Ends the walk; the address that it began at, or "" where there was none.
export function close() {
  running?.abort();
  const from = wanted ? origin : "";
  wanted = null;
  return from;
}

const question = (tool, args, signal) => patiently(
  () => ask(tool, { locator: { jobId: wanted.get("of") }, ...args }, signal),
  signal, () => { $("walk-status").textContent = "The index of this capsule is being built; this takes a moment…"; });

export async function open(address) {
  running?.abort();
  const { signal } = (running = new AbortController());
  if (!wanted) origin = `#${address}`;
  wanted = address;
  const inGraph = $("graph").contains(document.activeElement);
  const nodeId = address.get("node");
  const hits = new URLSearchParams(address);
  hits.delete("of");
  hits.delete("node");
  $("walk-close").href = `#${hits}`;
  $("walk-status").textContent = "Reading…";
  $("walk-error").hidden = true;
  $("walk-body").setAttribute("aria-busy", "true");
  try {
    const [about, incoming, outgoing, source] = await Promise.all([
      question("node_get", { nodeId }, signal),
      neighbours(nodeId, "in", null, signal),
      neighbours(nodeId, "out", null, signal),
      // A node without source is still a node.
      question("file_snippet", { nodeId, maxChars: SNIPPET_CHARS }, signal).catch((error) => {
        if (error.name === "AbortError") throw error;
        return { failed: error };
      }),
    ]);
    ({ node } = about.result);
    sides = { in: { pages: [incoming], place: 0 }, out: { pages: [outgoing], place: 0 } };
    $("walk-body").hidden = false;
    describe(about.result);
    showSource(source);
    present();
    const next = inGraph && $("graph").querySelector("a"); // who walks by keys goes on from the drawing
    $("walk-status").textContent = next ? `Now at ${cut(clean(node.name || node.id), 80)}` : "";
    (next || $("walk-title")).focus();
  } catch (error) {
    if (error.name === "AbortError") return;
    $("walk-status").textContent = "";
    $("walk-body").hidden = true;
    problem($("walk-error"), error, () => open(address));
  } finally {
    if (!signal.aborted) $("walk-body").removeAttribute("aria-busy");
  }
}

async function neighbours(nodeId, direction, cursor, signal) {
  const { result, pagination } = await question("neighbors_get", { nodeId, direction, limit: SIDE, ...(cursor ? { cursor } : {}) }, signal);
  return { items: result.items, next: pagination.nextCursor };
}

function describe({ degree, metadata }) {
  const name = clean(node.name || node.id);
  document.title = `${cut(name, 60)} · memvid-export`;
  $("walk-title").replaceChildren(foreign("span", { class: "kind" }, node.label, 40), " ", foreign("span", {}, name, 160));
  $("walk-place").replaceChildren(foreign("span", {}, place(node) || node.id, 300));
  const calls = degree.callsIn || degree.callsOut ? ` Called by ${count(degree.callsIn)}, calls ${count(degree.callsOut)}.` : "";
  $("walk-degree").textContent = `${many(degree.in, "relationship")} ${lead(degree.in, "in")}, ${count(degree.out)} ${lead(degree.out, "out")}.${calls}`;
  $("walk-inside").hidden = node.kind !== "community";
  $("walk-inside").firstElementChild.href = `#${new URLSearchParams({ search: "", in: wanted.get("of"), community: node.id })}`;
  sides.in.total = degree.in;
  sides.out.total = degree.out;
  const rows = [["id", node.id], ...Object.entries(metadata)].slice(0, PROPERTIES);
  $("properties-list").replaceChildren(...rows.flatMap(([key, value]) => [
    foreign("dt", {}, key, 60), foreign("dd", {}, typeof value === "string" ? value : JSON.stringify(value), 4000),
  ]));
}

// --- source -------------------------------------------------------------------------------------

function showSource({ failed, result, pagination }) {
  snippet = failed ? null : { text: result.snippet, next: pagination.nextCursor };
  $("snippet-box").hidden = !snippet?.text;
  $("snippet-none").hidden = Boolean(snippet?.text);
  $("snippet-none").textContent = failed ? `Its source could not be read: ${clean(failed.message)}` : "The capsule holds no source for it.";
  $("snippet").textContent = clean(snippet?.text ?? "", true);
  $("snippet").scrollTop = 0;
  $("snippet-more").hidden = !snippet?.next;
}

async function more() {
  const { signal } = running;
  try {
    const { result, pagination } = await question("file_snippet", { nodeId: node.id, maxChars: SNIPPET_CHARS, cursor: snippet.next }, signal);
    snippet = { text: snippet.text + result.snippet, next: pagination.nextCursor };
    $("snippet").textContent = clean(snippet.text, true);
    $("snippet-more").hidden = !snippet.next;
  } catch (error) {
    app.show(error);
  }
}

// --- neighbours ---------------------------------------------------------------------------------

function present() {
  const shown = Object.fromEntries(Object.entries(sides).map(([way, side]) => [way, side.pages[side.place].items]));
  const entries = (way) => shown[way].map((item) => ({ ...item, href: address(item.node.id) }));
  const both = { in: entries("in"), out: entries("out") };
  drawGraph($("graph"), node, both);
  $("list-body").replaceChildren(...["in", "out"].flatMap((way) => [
    make("h3", {}, way === "in" ? "These lead here" : "These it leads to"),
    both[way].length ? make("ul", { class: "plain" }, ...both[way].map((item) => make("li", {},
      make("span", { class: "faint" }, foreign("span", {}, relation(item.type), 60), item.confidence < 1 ? ` (confidence ${item.confidence.toFixed(2)})` : ""), " ",
      make("a", { href: item.href }, foreign("span", { class: "kind" }, item.node.label, 40), " ", foreign("span", {}, item.node.name || item.node.id, 120)),
      " ", foreign("span", { class: "place" }, place(item.node), 160)))) : make("p", { class: "faint" }, "None."),
  ]));
  for (const way of ["in", "out"]) pager(way);
}

function address(nodeId) {
  const next = new URLSearchParams(wanted);
  next.set("node", nodeId);
  return `#${next}`;
}

function pager(way) {
  const side = sides[way];
  const { items, next } = side.pages[side.place];
  const from = side.pages.slice(0, side.place).reduce((sum, page) => sum + page.items.length, 0);
  const range = items.length === side.total ? count(items.length) : `${count(from + 1)}–${count(from + items.length)} of ${count(side.total)}`;
  const buttons = side.place > 0 || next ? [
    step(way, -1, "Earlier ones", "‹", side.place === 0), step(way, 1, "Later ones", "›", !next),
  ] : [];
  $(`pager-${way}`).replaceChildren(make("span", {}, side.total ? `${range} ${lead(side.total, way)}` : `None ${lead(1, way)}`), ...buttons);
}

function step(way, by, name, sign, off) {
  const button = make("button", { type: "button", class: "small", "aria-label": `${name} that ${lead(2, way)}`, "data-step": by }, sign);
  button.disabled = off;
  button.addEventListener("click", () => turn(way, by));
  return button;
}

async function turn(way, by) {
  const side = sides[way];
  const { signal } = running;
  try {
    if (!side.pages[side.place + by]) side.pages.push(await neighbours(node.id, way, side.pages[side.place].next, signal));
    side.place += by;
    present();
    const again = $(`pager-${way}`).querySelector(`[data-step="${by}"]`);
    (again.disabled ? $(`pager-${way}`).querySelector("button:enabled") : again)?.focus();
  } catch (error) {
    app.show(error);
  }
}
