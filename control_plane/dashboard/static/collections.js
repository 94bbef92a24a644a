// Collections, their documents, and search in them. What is shown stands in the address, so that it can be kept, shared
// and gone back to: #collections, #collections=NAME, and with it after=CURSOR, find=WORDS or document=ID.

import { read } from "./api.js";
import * as page from "./document.js";
import { $, foreign, make, problem, swap } from "./dom.js";
import { hues } from "./hues.js";
import { count, many, when } from "./words.js";

const PAGE = 20;
const LOOKS = 5; // collections whose figures are asked for, each time
const TURNS = 3; // of the page's refreshes for one of documents that are all in the graph
const STEPS = [20, 50, 100]; // hits
const WAYS = { vector: "by meaning", lexical: "by words", graph: "through the graph" };
const WARNINGS = {
  SEMANTIC_MODEL_MISSING: "This server makes no vectors like those of this collection, so it was searched by words only.",
  SEMANTIC_UNAVAILABLE: "The question's vector could not be made in time, so the search was by words only.",
};

let address = null; // that is shown
let running = null; // AbortController of what is being read
let arriving = null; // the same, until what the address names is shown
let looking = false; // true while a refresh is on its way
let turn = 0;
let shown = null; // the collection that is shown, with its figures
let figures = new Map(); // name -> collection with its figures, those that were asked for longest ago first
let limit = STEPS[0]; // of hits

const path = (name, rest = "") => `/v1/collections/${encodeURIComponent(name)}${rest}`;

export function start() {
  page.start();
  $("find-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const words = $("find").value.trim();
    const next = words ? to({ collections: shown.name, find: words }) : to({ collections: shown.name });
    if (location.hash === next) enter(address);
    else location.hash = next;
  });
  $("finds-more").addEventListener("click", () => {
    limit = STEPS.find((step) => step > limit) ?? limit;
    enter(address, { more: true });
  });
}

const to = (names) => `#${new URLSearchParams(names)}`;

export function leave() {
  running?.abort();
  page.close();
  address = null;
}

export async function enter(wanted, { more = false } = {}) {
  running?.abort();
  const mine = (running = arriving = new AbortController());
  const { signal } = mine;
  address = wanted;
  const [name, id, words] = ["collections", "document", "find"].map((key) => wanted.get(key));
  const view = id ? "document" : name ? "collection" : "shelf";
  const from = view === "document" ? "" : page.close();
  document.title = `${name || "Collections"} · memvid-export`;
  for (const section of ["shelf", "collection", "document"]) $(section).hidden = section !== view;
  $("collections-error").hidden = true;
  try {
    $("collections-status").textContent = view === "document" ? "" : words ? "Searching…" : "Reading…";
    if (view === "document") {
      await page.open(wanted, signal);
    } else {
      if (view === "shelf") await shelf(signal);
      else {
        if (!more) limit = STEPS[0];
        await collection(name, words, signal);
      }
      $("collections-status").textContent = "";
    }
    const link = from && [...$(view).querySelectorAll("a")].find(({ hash }) => hash === from);
    if (link) link.focus();
  } catch (error) {
    failed(error);
  } finally {
    if (arriving === mine) arriving = null;
  }
}

function failed(error) {
  if (error.name === "AbortError") return;
  $("collections-status").textContent = "";
  for (const section of ["shelf", "collection", "document"]) $(section).hidden = true;
  const again = address;
  problem($("collections-error"), error, () => enter(again));
}

export async function tick() {
  turn += 1;
  if (looking || arriving || !address || !$("collections-error").hidden) return;
  looking = true;
  const { signal } = running;
  const often = turn % TURNS === 0;
  try {
    if (!$("document").hidden) await page.refresh(signal, often);
    else if (!$("shelf").hidden) await shelf(signal);
    else if (shown) {
      const before = JSON.stringify(shown);
      await look(shown.name, signal);
      if (!address.get("find") && (often || JSON.stringify(shown) !== before)) await listing(signal);
    }
  } catch (error) {
    // What was read last stands, unless it is no more there; that a server is away the list of exports says.
    if (error.status === 403 || error.status === 404) failed(error);
  } finally {
    looking = false;
  }
}

// --- all collections ----------------------------------------------------------------------------

async function shelf(signal) {
  const query = new URLSearchParams({ limit: PAGE });
  if (address.get("after")) query.set("cursor", address.get("after"));
  const { collections, nextCursor } = await read(`/v1/collections?${query}`, { signal });
  figures = new Map([...figures].filter(([name]) => collections.some((line) => line.name === name)));
  present(collections, nextCursor);
  // A page's figures are asked for when it is come to; then those that change, and the others in their turn.
  const rest = collections.filter(({ name }) => !figures.has(name));
  const waiting = [...figures.values()].sort((a, b) => Boolean(b.sync.pending) - Boolean(a.sync.pending));
  const next = rest.length ? rest : waiting.slice(0, LOOKS);
  const found = await Promise.all(next.map(({ name }) => read(path(name), { signal }).catch((error) => {
    if (error.status !== 404) throw error; // deleted since
  })));
  for (const one of found.filter(Boolean)) {
    figures.delete(one.name);
    figures.set(one.name, one);
  }
  present(collections, nextCursor);
}

function present(collections, nextCursor) {
  $("shelf-empty").hidden = collections.length > 0 || Boolean(address.get("after"));
  swap($("shelf-list"), [collections, [...collections].map(({ name }) => figures.get(name))], () => collections.map((line) => {
    const known = figures.get(line.name);
    return make("li", { class: "hit" },
      make("div", { class: "row spread" },
        make("a", { href: to({ collections: line.name }) }, foreign("strong", {}, line.name, 128)),
        known ? state(known) : make("span", { class: "faint" }, "…")),
      foreign("span", { class: "why faint" }, about(line, known), 300));
  }));
  turner("shelf-pages", {}, nextCursor, collections.length);
}

const about = (line, known) => [
  known ? many(known.documents, "document") : null, `${line.dimension} numbers of ${line.model}`, `since ${when(line.createdAt)}`,
].filter(Boolean).join(" · ");

function state({ documents, sync }) {
  const parts = [];
  if (sync.pending) parts.push(["pending", `${count(sync.pending)} waiting`]);
  if (sync.failed) parts.push(["failed", `${count(sync.failed)} given up`]);
  if (!parts.length) parts.push(["synced", documents ? "all in the graph" : "empty"]);
  return make("span", { class: "row" }, ...parts.map(([status, text]) => make("span", { class: "badge", "data-sync": status }, text)));
}

// Links to the pages before and after.
function turner(id, here, next, items) {
  const links = [];
  if (address.get("after")) links.push(make("a", { class: "button", href: to({ collections: "", ...here }) }, "From the beginning"));
  if (next) links.push(make("a", { class: "button", href: to({ collections: "", ...here, after: next }) }, "Next ones"));
  if (!items && address.get("after")) links.unshift(make("span", { class: "faint" }, "Nothing more."));
  swap($(id), [here, next, items, address.get("after")], () => links);
}

// --- one collection -----------------------------------------------------------------------------

async function collection(name, words, signal) {
  if (shown?.name !== name) {
    shown = null;
    $("collection").hidden = true;
  }
  $("find").value = words ?? "";
  await look(name, signal);
  $("collection").hidden = false;
  $("documents").hidden = Boolean(words);
  $("found").hidden = !words;
  await (words ? search(words, signal) : listing(signal));
}

async function look(name, signal) {
  shown = await read(path(name), { signal });
  const { documents, sync } = shown;
  $("collection-title").replaceChildren(foreign("span", {}, name, 128));
  swap($("collection-state"), [documents, sync], () => [state(shown)]);
  $("collection-facts").textContent = about(shown, shown);
  $("collection-bar").hidden = !sync.pending;
  $("collection-bar").max = Math.max(documents, 1);
  $("collection-bar").value = sync.synced;
  $("collection-bar").setAttribute("aria-label", `${count(sync.synced)} of ${many(documents, "document")} in the graph`);
}

async function listing(signal) {
  const query = new URLSearchParams({ limit: PAGE });
  const after = address.get("after");
  if (after) query.set("cursor", after);
  const { documents, nextCursor } = await read(path(shown.name, `/documents?${query}`), { signal });
  $("documents-empty").hidden = documents.length > 0 || Boolean(after);
  const rows = documents.map(({ id, title, domain, docType, sync }) => ({ id, title, domain, docType, sync }));
  const colours = hues(rows.map(({ domain }) => domain));
  swap($("documents-list"), [shown.name, after, rows], () => rows.map((row) => make("li", { class: "hit" },
    make("div", { class: "row spread" },
      titled(row, { collections: shown.name, ...(after ? { after } : {}), document: row.id }),
      make("span", { class: "row" }, ...kinds(row, colours), page.badge(row.sync))),
    row.title ? foreign("span", { class: "place" }, row.id, 200) : null,
    row.sync.status === "failed" && row.sync.error ? foreign("span", { class: "why bad" }, row.sync.error, 300) : null)));
  turner("documents-pages", { collections: shown.name }, nextCursor, documents.length);
}

const titled = ({ id, title }, where) => make("a", { href: to(where) }, foreign("strong", {}, title || id, 160));

const kinds = ({ domain, docType }, colours) => [
  domain ? make("span", { class: `key hue-${colours.get(domain)}` }, foreign("span", {}, domain, 64)) : null,
  docType ? foreign("span", { class: "kind" }, docType, 64) : null,
];

// --- search -------------------------------------------------------------------------------------

async function search(words, signal) {
  $("finds").setAttribute("aria-busy", "true");
  $("find-warnings").hidden = true;
  try {
    const { hits, warnings } = await read(path(shown.name, "/search"), {
      method: "POST", signal, headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ query: words.slice(0, 2000), limit, mode: "hybrid" }),
    });
    $("find-status").textContent = hits.length
      ? `${many(hits.length, "hit")}${hits.length === limit ? " or more" : ""}`
      : "Nothing fits. Try other or fewer words.";
    $("find-warnings").replaceChildren(...warnings.map((code) => foreign("li", {}, WARNINGS[code] ?? code, 300)));
    $("find-warnings").hidden = !warnings.length;
    $("finds-more").hidden = hits.length < limit || limit === STEPS.at(-1);
    const colours = hues(hits.map(({ domain }) => domain));
    $("finds").replaceChildren(...hits.map((hit) => make("li", { class: "hit" },
      make("div", { class: "row spread" },
        titled(hit, { collections: hit.collection, find: words, document: hit.id }),
        make("span", { class: "row" }, ...kinds(hit, colours))),
      hit.title ? foreign("span", { class: "place" }, hit.id, 200) : null,
      make("span", { class: "why faint" }, why(hit.why)))));
  } finally {
    $("finds").removeAttribute("aria-busy");
  }
}

function why({ vectorScore, ranks }) {
  return Object.entries(ranks).sort(([, a], [, b]) => a - b).map(([way, rank]) => {
    const cosine = way === "vector" && vectorScore !== null ? `, cosine ${vectorScore.toFixed(2)}` : "";
    return `number ${count(rank)} ${WAYS[way] ?? way}${cosine}`;
  }).join(" · ");
}
