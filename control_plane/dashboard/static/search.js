// Search over one or several capsules. What is asked stands in the address, so that it can be kept, shared and gone
// back to.

import { ask, call, patiently } from "./api.js";
import { $, clean, foreign, make, problem } from "./dom.js";
import * as walk from "./walk.js";
import { WARNINGS, bytes, many, place, relation, when } from "./words.js";

const MAX_CAPSULES = 8;
const PICKS = 60; // kinds or types that are offered
const STEPS = [20, 50, 100, 200]; // hits

let app;
let capsules = []; // completed exports, newest first
let asked = ""; // the question that the hits answer
let offered = ""; // the capsule whose kinds and types are offered
let limit = STEPS[0];
let running = null; // AbortController of the search under way

export function start(page) {
  app = page;
  walk.start(page);
  $("search-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const next = `#${question()}`;
    asked = "";
    if (location.hash === next) enter(question()).catch(app.show);
    else location.hash = next;
  });
  $("where-list").addEventListener("change", () => {
    describe();
    offer().catch(app.show);
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
}

export function forget() {
  leave();
  [capsules, asked, offered] = [[], "", ""];
  for (const id of ["hits", "where-list", "labels", "types"]) $(id).replaceChildren();
  $("query").value = "";
}

export async function enter(wanted) {
  document.title = "Search · memvid-export";
  const node = wanted.get("node");
  $("walk").hidden = node === null;
  $("search").hidden = node !== null;
  if (node === null) {
    const from = walk.close();
    await prepare(wanted);
    const plain = question().toString();
    if ($("query").value.trim() && plain !== asked) {
      limit = STEPS[0];
      await run(question());
    } else if (!$("query").value.trim()) {
      settle();
    }
    const hit = from && [...$("hits").querySelectorAll("a")].find((link) => link.hash === from);
    if (hit) hit.focus();
    else if (!asked) $("query").focus();
  } else {
    await walk.open(wanted);
  }
}

// --- what is asked ------------------------------------------------------------------------------

async function prepare(wanted) {
  const { jobs } = await (await call("/v1/exports?status=completed&limit=200")).json();
  capsules = jobs;
  const chosen = wanted.getAll("in").slice(0, MAX_CAPSULES);
  const known = new Set(capsules.map(({ jobId }) => jobId));
  const picked = new Set(chosen.length ? chosen : capsules.slice(0, 1).map(({ jobId }) => jobId));
  const gone = [...picked].filter((jobId) => !known.has(jobId)); // older than the list, or no more there
  $("where-list").replaceChildren(
    ...capsules.map((job) => pick("in", job.jobId, job.artifact?.fileName ?? job.jobId, picked.has(job.jobId),
      `${when(job.createdAt)} · ${bytes(job.artifact?.sizeBytes ?? 0)}`)),
    ...gone.map((jobId) => pick("in", jobId, `Export ${jobId}`, true)));
  if (wanted.get("search") || !$("query").value) $("query").value = wanted.get("search");
  $("mode").value = ["lexical", "semantic"].find((mode) => mode === wanted.get("mode")) ?? "hybrid";
  $("file-prefix").value = wanted.get("file") ?? "";
  await offer(new Set(wanted.getAll("label")), new Set(wanted.getAll("type")));
  describe();
}

function pick(name, value, text, checked, more = "") {
  const box = make("input", { type: "checkbox", name, value });
  box.checked = checked;
  return make("label", { class: "pick" }, box, foreign("span", {}, text, 120), more ? make("span", { class: "faint" }, ` ${more}`) : null);
}

const checked = (id) => [...$(id).querySelectorAll("input:checked")].map(({ value }) => value);

// Kinds and relationship types of the first capsule that is chosen.
async function offer(labels = new Set(checked("labels")), types = new Set(checked("types"))) {
  const [first] = checked("where-list");
  if (first && first !== offered) {
    const { result } = await ask("manifest_get", { locator: { jobId: first } });
    offered = first;
    const names = (value) => (Array.isArray(value) ? value : Object.keys(value ?? {})).slice(0, PICKS);
    $("labels").replaceChildren(...names(result.manifest.nodeLabels).map((label) => pick("label", label, label, labels.has(label))));
    $("types").replaceChildren(...names(result.manifest.relationshipTypes).map((type) => pick("type", type, relation(type), types.has(type))));
  }
  for (const [id, name, values] of [["labels", "label", labels], ["types", "type", types]]) {
    const boxes = [...$(id).querySelectorAll("input")];
    for (const box of boxes) box.checked = values.has(box.value);
    // One that the address names and this capsule does not have stays to be seen and taken off.
    for (const value of values) if (!boxes.some((box) => box.value === value)) $(id).append(pick(name, value, value, true));
  }
}

function describe() {
  const chosen = $("where-list").querySelectorAll("input:checked");
  for (const box of $("where-list").querySelectorAll("input")) box.disabled = !box.checked && chosen.length >= MAX_CAPSULES;
  $("where-text").textContent = !capsules.length ? "no capsule yet: make one first"
    : chosen.length === 0 ? "nothing: choose a capsule"
    : chosen.length === 1 ? chosen[0].parentElement.querySelector("bdi").textContent
    : `${chosen.length} capsules`;
  const filters = checked("labels").length + checked("types").length;
  $("filters-text").textContent = `Kinds and relationships${filters ? ` · ${filters} chosen` : ""}`;
}

function question() {
  const query = new URLSearchParams({ search: $("query").value.trim() });
  for (const jobId of checked("where-list")) query.append("in", jobId);
  if ($("mode").value !== "hybrid") query.set("mode", $("mode").value);
  if ($("file-prefix").value) query.set("file", $("file-prefix").value);
  for (const label of checked("labels")) query.append("label", label);
  for (const type of checked("types")) query.append("type", type);
  return query;
}

// --- what is found ------------------------------------------------------------------------------

function settle(text = "") {
  $("search-status").textContent = text || (capsules.length ? "" : "Make a capsule first; then it can be searched here.");
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
  if (!first) return settle("Choose a capsule to search.");
  settle("Searching…");
  $("hits").setAttribute("aria-busy", "true");
  const params = new URLSearchParams({ q: query.get("search"), mode: query.get("mode") ?? "hybrid", limit });
  for (const jobId of others) params.append("also", jobId);
  for (const name of ["label", "type", "file"]) for (const value of query.getAll(name)) params.append(name, value);
  try {
    const answer = await patiently(
      async () => (await call(`/v1/exports/${encodeURIComponent(first)}/search?${params}`, { signal })).json(),
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
    const from = several ? capsules.find(({ jobId }) => jobId === hit.jobId)?.artifact?.fileName ?? hit.jobId : "";
    return make("li", { class: "hit" },
      make("a", { href: `#${address}` }, foreign("span", { class: "kind" }, hit.label, 40), " ", foreign("strong", {}, hit.name || clean(hit.id), 120)),
      hit.filePath ? foreign("span", { class: "place" }, place(hit), 200) : null,
      foreign("span", { class: "why faint" }, hit.why, 240),
      from ? foreign("span", { class: "why faint" }, `in ${from}`, 160) : null);
  }));
}
