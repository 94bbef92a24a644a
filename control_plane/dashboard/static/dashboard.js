// The page: asks for the key once, shows the view that the address names, and keeps it up to date.
//
// Addresses: #exports, #export=ID, #search=WORDS&in=ID…, #search=…&of=ID&node=ID, #collections, #collections=NAME&after=…,
// #collections=NAME&find=WORDS, #collections=NAME&document=ID&colour=…, #activity=HOURS, #sync

import { key, onRefusedKey } from "./api.js";
import * as activity from "./charts.js";
import * as collections from "./collections.js";
import { $, clean, cut } from "./dom.js";
import * as exports from "./exports.js";
import * as search from "./search.js";
import * as sync from "./sync.js";

const REFRESH_MS = 4000;
const VIEWS = { exports, search, collections, activity, sync };

let open = false; // false while the page asks for a key
let loading = false; // true while the list is on its way
let away = false; // true while the last refresh failed
let current = null; // the name of the view that is shown
let depth = -1; // how many steps lie behind the one that is shown

const app = { show, notice, isOpen: () => open };

function show(error) {
  if (error.name !== "AbortError" && error.status !== 401) notice(error.message);
}

function notice(message) {
  const text = cut(clean(message), 600);
  if ($("notice").textContent !== text) $("notice").textContent = text; // it is read out at each change
  $("notice").hidden = !text;
}

// --- the key ------------------------------------------------------------------------------------

function askForKey(text) {
  open = false;
  key.forget();
  for (const id of ["workspace", "forget", "nav"]) $(id).hidden = true;
  $("key-panel").hidden = false;
  notice(text);
  document.title = "memvid-export";
  $("key").value = "";
  $("key").focus();
}

onRefusedKey(() => askForKey(key.get() ? "That key was not accepted." : ""));

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("key").value.trim();
  if (!/^[\x20-\x7e]+$/.test(text)) return notice("That is no key: it has only plain letters, digits and signs.");
  key.set(text);
  notice("");
  load();
});

$("forget").addEventListener("click", () => {
  key.forget();
  location.reload(); // nothing that was read with it stays in the page
});

// --- views --------------------------------------------------------------------------------------

function leave() {
  if (current) VIEWS[current].leave();
  current = null;
}

async function route() {
  if (!open) return;
  // Each step knows how many lie behind it, so that a Back button never leaves the page.
  if (history.state?.depth === undefined) history.replaceState({ depth: depth + 1 }, "");
  ({ depth } = history.state);
  const wanted = new URLSearchParams(location.hash.slice(1));
  const name = ["search", "collections", "activity", "sync"].find((view) => wanted.has(view)) ?? "exports";
  if (name !== current) leave();
  current = name;
  for (const view of Object.keys(VIEWS)) $(`view-${view}`).hidden = view !== name;
  for (const link of $("nav").querySelectorAll("a")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (!away) notice("");
  try {
    await VIEWS[name].enter(wanted);
  } catch (error) {
    show(error);
  }
}

window.addEventListener("hashchange", route);

$("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address says which view is shown
  $("main").focus();
});

// --- from the top -------------------------------------------------------------------------------

async function load() {
  loading = true;
  try {
    open = true;
    await exports.refresh();
    if (!open) return; // the key was forgotten meanwhile
    if (away) notice("");
    away = false;
    const first = $("workspace").hidden;
    const asked = $("key-panel").contains(document.activeElement);
    $("key-panel").hidden = true;
    $("key").value = "";
    for (const id of ["workspace", "nav"]) $(id).hidden = false;
    $("forget").hidden = !key.get();
    if (first) await route();
    else VIEWS[current]?.tick?.();
    // The field that had the focus is gone; a view may have taken it.
    if (asked && [document.body, $("key")].includes(document.activeElement)) $("main").focus();
  } catch (error) {
    away = error.status !== 401;
    show(error);
  } finally {
    loading = false;
  }
}

setInterval(() => {
  if (open && !loading && !document.hidden) load();
}, REFRESH_MS);

for (const view of Object.values(VIEWS)) view.start(app);
load();
