// One document: what it says, what it names, and what resembles it, drawn.

import { read } from "./api.js";
import { $, clean, cut, foreign, make, swap } from "./dom.js";
import { hues } from "./hues.js";
import { drawNeighbourhood } from "./neighbourhood.js";
import { many, when } from "./words.js";

const RELATED = 20; // the most that a document has
const DRAWN = 12; // of them
const JOINED = 3; // of them that each is joined with: more lines than that nobody can follow
const CHARS = 20_000; // of a text that are shown at once
const ENTITIES = 32;
const SYNC = { synced: "in the graph", pending: "waiting", failed: "given up" };
const COLOURS = { domain: "Domain", collection: "Collection" };

let wanted = null; // the address that is shown
let origin = ""; // the address that the walk began at
let seen = ""; // what `joined` is of
let joined = null; // which of those that resemble it resemble each other
let painted = ""; // by what the drawing is coloured
let chars = CHARS;
let found = null; // the document

const path = (collection, rest) => `/v1/collections/${encodeURIComponent(collection)}/${rest}`;
const keyOf = ({ collection, id }) => `${collection}/${id}`;
const titleOf = ({ title, id }) => clean(title || id);

export const badge = ({ status }) => make("span", { class: "badge", "data-sync": status }, SYNC[status] ?? status);

export function start() {
  $("text-more").addEventListener("click", () => {
    chars += CHARS * 5;
    showText();
  });
  for (const radio of document.querySelectorAll('input[name="colour"]')) {
    radio.addEventListener("change", () => { location.hash = `#${address({ colour: radio.value })}`; });
  }
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || $("document").hidden || $("view-collections").hidden) return;
    event.preventDefault();
    $("document-collection").click();
  });
}

// Ends the walk; the address that it began at, or "" where there was none.
export function close() {
  const from = wanted ? origin : "";
  wanted = null;
  return from;
}

function address(changes) {
  const next = new URLSearchParams(wanted);
  if (changes.collections && changes.collections !== wanted.get("collections")) {
    for (const name of ["find", "after"]) next.delete(name); // they are of the collection that is left
  }
  for (const [name, value] of Object.entries(changes)) next.set(name, value);
  return next;
}

export async function open(asked, signal) {
  const same = wanted && ["collections", "document"].every((name) => wanted.get(name) === asked.get(name));
  const walking = $("neighbourhood").contains(document.activeElement);
  if (!wanted) origin = `#${asked}`;
  wanted = asked;
  const colour = Object.hasOwn(COLOURS, asked.get("colour")) ? asked.get("colour") : "domain";
  for (const radio of document.querySelectorAll('input[name="colour"]')) radio.checked = radio.value === colour;
  const collection = asked.get("collections");
  const list = new URLSearchParams(asked);
  for (const name of ["document", "colour"]) list.delete(name);
  $("document-collection").href = `#${list}`;
  $("document-collection").replaceChildren(foreign("span", {}, collection, 128));
  if (!same) {
    [seen, painted, chars, found] = ["", "", CHARS, null];
    $("document-body").setAttribute("aria-busy", "true");
  }
  $("document-status").textContent = same ? "" : "Reading…";
  try {
    await refresh(signal, true, () => {
      $("document-body").removeAttribute("aria-busy");
      const next = walking && $("neighbourhood").querySelector("a"); // who walks by keys goes on from the drawing
      $("document-status").textContent = next ? `Now at ${cut(titleOf(found), 80)}` : "";
      (next || $("document-title")).focus();
    });
  } finally {
    if (!signal.aborted) $("document-body").removeAttribute("aria-busy");
  }
}

// Reads it again; while it waits for the graph each time, else where `often` says so. A document that is new here is shown
// before it is known which of the others resemble each other, and `arrived` hears of it.
export async function refresh(signal, often, arrived) {
  if (!often && found?.sync.status !== "pending") return;
  const [collection, id] = [wanted.get("collections"), wanted.get("document")];
  const [one, context] = await Promise.all([
    read(path(collection, `documents/${encodeURIComponent(id)}`), { signal }),
    read(path(collection, `context?${new URLSearchParams({ id, limit: RELATED })}`), { signal }),
  ]);
  const first = !found && arrived;
  found = one;
  $("document-body").hidden = false;
  describe(collection, context);
  const related = context.related.map((line) => ({ ...line, key: keyOf(line) }));
  const centre = { collection, id, title: one.title, domain: one.domain };
  const colour = document.querySelector('input[name="colour"]:checked').value;
  const what = JSON.stringify([centre, related]);
  if (what === seen && colour === painted) return;
  if (first) {
    present(centre, related, { pairs: [], missing: 0 }, colour);
    arrived();
  }
  if (what !== seen) {
    joined = await among(related.slice(0, DRAWN), signal);
    seen = joined.missing ? "" : what;
  }
  painted = colour;
  present(centre, related, joined, colour);
}

// Which of the documents resemble each other, from the lists that each of them has.
async function among(related, signal) {
  const places = new Map(related.map(({ key }, place) => [key, place]));
  const pairs = new Map();
  let missing = 0;
  await Promise.all(related.map(async ({ collection, id }, place) => {
    try {
      const around = await read(path(collection, `context?${new URLSearchParams({ id, limit: RELATED })}`), { signal });
      for (const line of around.related) {
        const other = places.get(keyOf(line));
        if (other === undefined) continue;
        const ends = [Math.min(place, other), Math.max(place, other)];
        pairs.set(ends.join(), { ends, score: line.score });
      }
    } catch (error) {
      if (error.name === "AbortError") throw error;
      if (error.status !== 404) missing += 1; // else it was deleted since
    }
  }));
  const order = (a, b) => a.ends[0] - b.ends[0] || a.ends[1] - b.ends[1];
  return { pairs: [...pairs.values()].sort(order), missing };
}

// --- what it says -------------------------------------------------------------------------------

function describe(collection, { entities, domain }) {
  const { id, title, docType, sync, permissions, version, updatedAt, payload } = found;
  document.title = `${cut(titleOf(found), 60)} · memvid-export`;
  swap($("document-title"), title || id, () => [foreign("span", {}, title || id, 300)]);
  const facts = [
    ["Id", foreign("span", {}, id, 256)],
    ["Domain", domain ? make("span", { class: `key hue-${hues([domain]).get(domain)}` }, foreign("span", {}, domain, 64)) : "not found yet"],
    ["Kind", docType ? foreign("span", { class: "kind" }, docType, 64) : "none"],
    ["Sync", make("span", { class: "row" }, badge(sync), sync.syncedAt ? make("span", { class: "faint" }, `last ${when(sync.syncedAt)}`) : null)],
    ["Changed", `${when(updatedAt)}, version ${version}`],
    ["Seen by", permissions.length ? foreign("span", {}, permissions.join(", "), 600) : "all keys of its client"],
  ];
  if (sync.error) facts.push(["Trouble", foreign("span", { class: "bad" }, `${sync.error} (${many(sync.attempts, "attempt")})`, 600)]);
  swap($("document-facts"), [collection, found.id, domain, docType, sync, permissions, version], () => facts.flatMap(([word, value]) => [
    make("dt", {}, word), make("dd", {}, value),
  ]));
  showText();
  const entries = Object.keys(payload).length;
  $("payload-box").hidden = !entries;
  $("payload-text").textContent = `Payload, ${many(entries, "field")}`;
  say($("payload"), clean(JSON.stringify(payload, null, 2), true));
  $("entities-box").hidden = !entities.length;
  swap($("entities"), [collection, entities], () => entities.slice(0, ENTITIES).map(({ kind, name, documents }) => make("li", {},
    make("a", { class: "pick", href: `#${new URLSearchParams({ collections: collection, find: name })}`, title: `${kind}, named by ${many(documents, "document")}` },
      make("span", { class: "faint" }, kind), foreign("span", {}, name, 80), documents > 1 ? make("span", { class: "faint" }, `in ${documents}`) : null))));
}

function showText() {
  const { text } = found;
  const short = cut(text, chars);
  $("text").hidden = !text;
  $("text-none").hidden = Boolean(text);
  say($("text"), clean(short, true));
  $("text-more").hidden = short === text;
}

function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// --- what resembles it --------------------------------------------------------------------------

function present(centre, related, { pairs, missing }, colour) {
  const colours = hues([centre, ...related].map((one) => one[colour]));
  const at = (one) => ({ ...one, name: titleOf(one), hue: colours.get(one[colour]) ?? 0, with: [] });
  const nodes = related.slice(0, DRAWN).map((one) => ({
    ...at(one), href: `#${address({ collections: one.collection, document: one.id })}`,
  }));
  for (const { ends: [a, b], score } of pairs) {
    nodes[a].with.push({ node: nodes[b], score });
    nodes[b].with.push({ node: nodes[a], score });
  }
  $("related-count").textContent = !related.length ? ""
    : related.length > nodes.length ? `the ${nodes.length} most alike of ${related.length}` : many(related.length, "document");
  $("related-none").hidden = related.length > 0;
  $("related-none").textContent = found.sync.status === "pending"
    ? "It is not compared with the others yet." : "No document is alike enough, which begins at a score of 0.75.";
  for (const id of ["neighbourhood", "legend", "related-help", "related-list", "colour-box"]) $(id).hidden = !related.length;
  $("related-missing").hidden = !missing;
  if (!related.length) return;
  for (const node of nodes) node.with.sort((a, b) => b.score - a.score);
  const drawn = pairs.filter(({ ends: [a, b] }) => [[a, b], [b, a]].some(([one, other]) =>
    nodes[one].with.slice(0, JOINED).some(({ node }) => node === nodes[other])));
  drawNeighbourhood($("neighbourhood"), at(centre), nodes, drawn);
  const shades = new Map([centre, ...nodes].map((one) => [one[colour] || "none yet", colours.get(one[colour]) ?? 0]));
  $("legend").replaceChildren(...[...shades].sort().map(([name, hue]) => make("li", { class: `key hue-${hue}` }, foreign("span", {}, name, 64))));
  $("related-body").replaceChildren(...[...nodes, ...related.slice(DRAWN).map((one) => ({
    ...at(one), href: `#${address({ collections: one.collection, document: one.id })}`,
  }))].map((node) => make("li", {},
    make("a", { href: node.href }, foreign("span", {}, node.name, 160)),
    make("span", { class: "faint" }, ` ${node.score.toFixed(3)} · `, foreign("span", {}, node.domain || "no domain yet", 64), " · ", foreign("span", {}, node.collection, 128)),
    node.with.length ? make("span", { class: "faint" }, "; alike with ", ...node.with.flatMap((pair, place) => [
      place ? ", " : "", foreign("span", {}, pair.node.name, 60), ` ${pair.score.toFixed(3)}`])) : null)));
}
