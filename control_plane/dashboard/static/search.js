// Search over one or several capsules. What is asked stands in the address, so that it can be kept, shared and gone
// back to.

import { ask, patiently, read } from "./api.js";
import { $, clean, foreign, make, problem } from "./dom.js";
import * as walk from "./walk.js";
import { WARNINGS, bytes, many, place, relation, when } from "./words.js";

const MAX_CAPSULES = 8;
const PICKS = 60; // kinds or types that are offered
const STEPS = [20, 50, 100, 200]; // hits

let app;
let capsules = null; // completed exports, newest first; null until they are asked for
let asked = ""; // the question that the hits answer
let offered = ""; // the capsule whose kinds and types are offered
let kinds = { labels: [], types: [] }; // what that capsule has
let limit = STEPS[0];
let running = null; // AbortController of the search under way
let turn = 0; // counts the addresses that were gone to
let ready = Promise.resolve(); // until the form shows what the last one asks

export function start(page) {
  app = page;
  walk.start(page);
  $("search-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    await ready.catch(() => {}); // who is fast is not ahead of the list of capsules
    const next = `#${question()}`;
    asked = ""; // the same question is asked again
    if (location.hash === next) enter(question()).catch(app.show);
    else location.hash = next;
  });
  $("where-list").addEventListener("change", () => {
    describe();
    offer();
  });
  $("filters").addEventListener("change", describe);
  $("more-hits").addEventListener("click", () => {
    limit = STEPS.find((step) => step > limit) ?? limit;
    run(question());
  });
}

export function leave() {
  running?.abort();
  walk.close();
  capsules = null;
}

export async function enter(wanted) {
  document.title = "Search · memvid-export";
  const mine = (turn += 1);
  const node = wanted.get("node") || null;
  $("walk").hidden = node === null;
  $("search").hidden = node !== null;
  if (node !== null) return walk.open(wanted);
  const from = walk.close();
  await (ready = prepare(wanted));
  if (mine !== turn) return;
  if (!wanted.get("search")) {
    running?.abort();
    asked = "";
    $("hits").replaceChildren();
    settle();
  } else if (question(wanted.get("search")).toString() !== asked) {
    limit = STEPS[0];
    await run(question(wanted.get("search")));
  }
  const hit = from && [...$("hits").querySelectorAll("a")].find((link) => link.hash === from);
  if (hit) hit.focus();
  // On a telephone the keyboard would cover half of the page.
  else if (!asked && matchMedia("(pointer: fine)").matches) $("query").focus();
}

// --- what is asked ------------------------------------------------------------------------------

async function prepare(wanted) {
  $("query").value = wanted.get("search") ?? "";
  $("mode").value = ["lexical", "semantic"].find((mode) => mode === wanted.get("mode")) ?? "hybrid";
  $("file-prefix").value = wanted.get("file") ?? "";
  const community = wanted.get("community");
  $("community").replaceChildren(...(community ? [pick("community", community, community, true)] : []));
  $("community-box").hidden = !community;
  choose({ labels: wanted.getAll("label"), types: wanted.getAll("type") });
  capsules ??= (await read("/v1/exports?status=completed&limit=200")).jobs;
  const chosen = wanted.getAll("in").slice(0, MAX_CAPSULES);
  const known = new Set(capsules.map(({ jobId }) => jobId));
  const picked = new Set(chosen.length ? chosen : capsules.slice(0, 1).map(({ jobId }) => jobId));
  const unknown = [...picked].filter((jobId) => !known.has(jobId)); // older than the list, or no more there
  $("where-list").replaceChildren(
    ...capsules.map((job) => pick("in", job.jobId, job.artifact?.fileName ?? job.jobId, picked.has(job.jobId),
      `${when(job.createdAt)} · ${bytes(job.artifact?.sizeBytes ?? 0)}`)),
    ...unknown.map((jobId) => pick("in", jobId, `Export ${jobId}`, true)));
  describe();
  offer();
}

function pick(name, value, text, checked, more = "") {
  const box = make("input", { type: "checkbox", name, value });
  box.checked = checked;
  return make("label", { class: "pick" }, box, foreign("span", {}, text, 120), more ? make("span", { class: "faint" }, ` ${more}`) : null);
}

const checked = (id) => [...$(id).querySelectorAll("input:checked")].map(({ value }) => value);

// Offers the kinds and types of the capsule; one that the address names and it does not have can be taken off.
function choose(chosen) {
  const words = { labels: String, types: relation };
  for (const id of ["labels", "types"]) {
    const values = new Set([...kinds[id].slice(0, PICKS), ...chosen[id]]);
    $(id).replaceChildren(...[...values].map((value) => pick(id, value, words[id](value), chosen[id].includes(value))));
  }
}

// Asks the first capsule that is chosen for its kinds and relationship types.
async function offer() {
  const [first] = checked("where-list");
  if (!first || first === offered) return;
  offered = first;
  try {
    const { result } = await patiently(
      () => ask("manifest_get", { locator: { jobId: first } }), new AbortController().signal, () => {});
    if (offered !== first) return;
    const names = (value) => (Array.isArray(value) ? value : Object.keys(value ?? {}));
    kinds = { labels: names(result.manifest.nodeLabels), types: names(result.manifest.relationshipTypes) };
    choose({ labels: checked("labels"), types: checked("types") });
  } catch (error) {
    offered = "";
    app.show(error);
  }
}

function describe() {
  const chosen = $("where-list").querySelectorAll("input:checked");
  for (const box of $("where-list").querySelectorAll("input")) box.disabled = !box.checked && chosen.length >= MAX_CAPSULES;
  $("where-text").textContent = !$("where-list").children.length ? "no capsule yet: make one first"
    : chosen.length === 0 ? "nothing: choose a capsule"
    : chosen.length === 1 ? chosen[0].parentElement.querySelector("bdi").textContent
    : `${chosen.length} capsules`;
  const filters = checked("filters").length;
  $("filters-text").textContent = `Kinds and relationships${filters ? ` · ${filters} chosen` : ""}`;
}

function question(words = $("query").value.trim()) {
  const query = new URLSearchParams({ search: words });
  for (const jobId of checked("where-list")) query.append("in", jobId);
  if ($("mode").value !== "hybrid") query.set("mode", $("mode").value);
  if ($("file-prefix").value) query.set("file", $("file-prefix").value);
  for (const id of checked("community")) query.append("community", id);
  for (const label of checked("labels")) query.append("label", label);
  for (const type of checked("types")) query.append("type", type);
  return query;
}

// --- what is found ------------------------------------------------------------------------------

function settle(text = "") {
  $("search-status").textContent = text || (capsules?.length ? "" : "Make a capsule first; then it can be searched here.");
  $("search-error").hidden = true;
  $("search-warnings").hidden = true;
  $("more-hits").hidden = true;
  $("hits").removeAttribute("aria-busy");
}

async function run(query) {
  running?.abort();
  const { signal } = (running = new AbortController());
  const [first, ...others] = query.getAll("in");
  asked = query.toString();
  if (!first) return settle(capsules.length ? "Choose a capsule to search." : "");
  settle("Searching…");
  $("hits").setAttribute("aria-busy", "true");
  const params = new URLSearchParams({ q: query.get("search"), mode: query.get("mode") ?? "hybrid", limit });
  for (const jobId of others) params.append("also", jobId);
  for (const name of ["label", "type", "file", "community"]) for (const value of query.getAll(name)) params.append(name, value);
  try {
    const answer = await patiently(
      () => read(`/v1/exports/${encodeURIComponent(first)}/search?${params}`, { signal }),
      signal, () => { $("search-status").textContent = "The index of this capsule is being built; this takes a moment…"; });
    settle();
    present(answer, query);
  } catch (error) {
    if (error.name === "AbortError") return;
    settle(" ");
    $("hits").replaceChildren();
    problem($("search-error"), error, () => run(query));
  }
}

function present({ hits, warnings, semanticUsed }, query) {
  const several = query.getAll("in").length > 1;
  const how = semanticUsed ? "" : query.get("mode") === "lexical" ? "" : ", by words only";
  $("search-status").textContent = hits.length
    ? `${many(hits.length, "hit")}${hits.length === limit ? " or more" : ""}${how}`
    : "Nothing fits. Try other or fewer words, or take filters off.";
  $("search-warnings").replaceChildren(...warnings.map((code) => foreign("li", {}, WARNINGS[code] ?? code, 400)));
  $("search-warnings").hidden = !warnings.length;
  $("more-hits").hidden = hits.length < limit || limit === STEPS.at(-1);
  $("hits").replaceChildren(...hits.map((hit) => {
    const address = new URLSearchParams(query);
    address.set("of", hit.jobId);
    address.set("node", hit.id);
    const from = several ? capsules?.find(({ jobId }) => jobId === hit.jobId)?.artifact?.fileName ?? hit.jobId : "";
    return make("li", { class: "hit" },
      make("a", { href: `#${address}` }, foreign("span", { class: "kind" }, hit.label, 40), " ", foreign("strong", {}, hit.name || clean(hit.id), 120)),
      hit.filePath ? foreign("span", { class: "place" }, place(hit), 200) : null,
      foreign("span", { class: "why faint" }, hit.why, 240),
      from ? foreign("span", { class: "why faint" }, `in ${from}`, 160) : null);
  }));
}
