// The list of exports: follows the running ones, starts new ones, hands out their files.

import { Refused, authorization, call, parsed, read, refusal } from "./api.js";
import { $, clean, cut } from "./dom.js";
import { fillReport } from "./report.js";
import { Timeline } from "./timeline.js";
import { BADGES, bytes, seconds, when } from "./words.js";

const PAGE = 20;
// Browsers open six connections to one HTTP/1.1 server; the event streams must leave some for everything else.
const MAX_STREAMS = 3;
const MAX_LOOKS = 5; // older exports in work that are asked for one by one, each time
const TERMINAL = new Set(["job_completed", "job_failed", "job_canceled", "job_expired"]);
const EMPTY = "Nothing here yet. Drop a graph above to make your first capsule.";

const jobs = new Map(); // jobId -> {job, row, since, reading, timeline}
const given = new Map(); // jobId -> the name of the file that was dropped here, or of a capsule that is no more
let cursor = null; // of the next older page
let fresh = true; // the list is to be built from its beginning
let asked = 0; // counts the lists that were asked for, so that a late answer to an older one is dropped
let sending = Promise.resolve(); // one file after the other
let refusals = []; // of the files that were brought together
let app; // {show, notice, isOpen} of the page

const path = (jobId, rest = "") => `/v1/exports/${encodeURIComponent(jobId)}${rest}`;
const active = ({ job }) => job.status === "queued" || job.status === "running";

export function start(page) {
  app = page;
  $("more").addEventListener("click", older);
  $("status").addEventListener("change", () => {
    forget();
    refresh().catch(app.show);
  });
  $("file").addEventListener("change", () => {
    const files = [...$("file").files];
    $("file").value = "";
    receive(files);
  });
  for (const name of ["dragenter", "dragover"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      $("drop").classList.toggle("over", app.isOpen());
    });
  }
  for (const name of ["dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      if (name === "drop" || !event.relatedTarget) $("drop").classList.remove("over");
    });
  }
  document.addEventListener("drop", (event) => receive([...(event.dataTransfer?.files ?? [])]));
}

// `#export=ID` opens the timeline of one export, wherever in the list it is.
export async function enter(wanted) {
  document.title = "Exports · memvid-export";
  const jobId = wanted.get("export");
  if (!jobId) return;
  if (!jobs.has(jobId)) update(await read(path(jobId)));
  arrange();
  const entry = jobs.get(jobId);
  if (part(entry.row, "timeline").hidden) await press(entry, "timeline");
  entry.row.scrollIntoView({ block: "nearest" });
}

export function leave() {}

export function forget() {
  for (const { row } of jobs.values()) row.remove();
  jobs.clear();
  cursor = null;
  fresh = true;
}

// --- the list -----------------------------------------------------------------------------------

function list(from) {
  const query = new URLSearchParams({ limit: PAGE });
  if (from) query.set("cursor", from);
  if ($("status").value) query.set("status", $("status").value);
  return read(`/v1/exports?${query}`);
}

export async function refresh() {
  const turn = (asked += 1);
  const page = await list(null);
  if (turn !== asked || !app.isOpen()) return;
  // More new ones than a page holds came meanwhile: what was shown no longer joins on.
  if (!fresh && page.nextCursor && page.jobs.length && !page.jobs.some(({ jobId }) => jobs.has(jobId))) forget();
  for (const job of page.jobs) update(job);
  if (fresh) cursor = page.nextCursor;
  fresh = false;
  arrange();
  const shown = new Set(page.jobs.map(({ jobId }) => jobId));
  const unseen = [...jobs.values()].filter((entry) => active(entry) && !entry.reading && !shown.has(entry.job.jobId));
  await Promise.all(unseen.slice(0, MAX_LOOKS).map(look));
}

async function older() {
  $("more").disabled = true;
  try {
    const turn = asked;
    const page = await list(cursor);
    if (turn !== asked && fresh) return; // another list was begun
    cursor = page.nextCursor;
    for (const job of page.jobs) update(job);
    arrange();
  } catch (error) {
    app.show(error);
  } finally {
    $("more").disabled = false;
  }
}

function arrange() {
  const ordered = [...jobs.values()].sort((a, b) => b.job.createdAt.localeCompare(a.job.createdAt));
  ordered.forEach(({ row }, place) => {
    if ($("exports").children[place] !== row) $("exports").insertBefore(row, $("exports").children[place] ?? null);
  });
  $("empty").hidden = ordered.length > 0;
  $("empty").textContent = $("status").value ? "No export is in this state." : EMPTY;
  $("more").hidden = !cursor;
  const running = ordered.filter(active);
  const text = running.length ? `${running.length} in work` : "";
  if ($("live").textContent !== text) $("live").textContent = text;
  let streams = ordered.filter(({ reading }) => reading).length;
  for (const entry of running) {
    if (streams >= MAX_STREAMS) break;
    if (entry.reading) continue;
    streams += 1;
    follow(entry);
  }
}

function update(job) {
  let entry = jobs.get(job.jobId);
  if (!entry) {
    const row = $("export").content.firstElementChild.cloneNode(true);
    entry = { job, row, since: 0, reading: false, timeline: null };
    jobs.set(job.jobId, entry);
    row.addEventListener("click", (event) => act(event, entry));
    row.addEventListener("keydown", (event) => event.key === "Escape" && close(entry, event));
  } else if (job.lastEventSeq < entry.job.lastEventSeq) {
    return; // an answer that was under way while the stream went on
  }
  const moved = job.lastEventSeq > entry.since;
  entry.job = job;
  entry.since = Math.max(entry.since, job.lastEventSeq);
  if (moved) entry.timeline?.catchUp().catch(() => {}); // the next answer asks again
  paint(entry);
}

const part = (row, name) => row.querySelector(`.${name}`);

function paint(entry) {
  const { job, row } = entry;
  row.dataset.status = job.status;
  row.dataset.job = job.jobId;
  if (job.artifact) given.set(job.jobId, job.artifact.fileName);
  const title = clean(given.get(job.jobId) ?? job.metadata.projectName ?? `Export ${job.jobId}`);
  const link = part(row, "title").firstElementChild;
  say(link, cut(title, 160));
  link.title = title;
  link.href = `#${new URLSearchParams({ export: job.jobId })}`;
  say(part(row, "badge"), BADGES[job.status] ?? job.status);
  say(part(row, "message"), cut(clean(job.error ? failure(job.error) : job.message), 600));
  const bar = part(row, "bar");
  bar.hidden = !active(entry);
  bar.value = job.progress;
  bar.setAttribute("aria-label", `Progress: ${job.progress}%`);
  const facts = [`started ${when(job.createdAt)}`];
  if (active(entry)) facts.push(`${job.progress}%`);
  else facts.push(`took ${seconds(job.elapsedMs / 1000)}`);
  if (job.artifact) facts.push(bytes(job.artifact.sizeBytes), `kept until ${when(job.artifact.expiresAt)}`);
  const { retryUntil, retriedBy, retryOf } = job.metadata;
  if (retryUntil) facts.push(`can be tried again until ${when(retryUntil)}`);
  if (retriedBy) facts.push("was started again as a new export");
  if (retryOf) facts.push("does a failed one again");
  say(part(row, "facts"), facts.join(" · "));
  const ready = Boolean(job.artifact); // an export whose files are damaged is completed, and has none
  for (const [name, visible] of Object.entries({
    download: ready, sidecar: ready, manifest: ready, report: job.status === "completed", timeline: true, cancel: active(entry),
    retry: Boolean(retryUntil),
  })) {
    row.querySelector(`[data-do="${name}"]`).hidden = !visible;
  }
  const search = row.querySelector('[data-link="search"]');
  search.hidden = !ready;
  search.href = `#${new URLSearchParams({ search: "", in: job.jobId })}`;
}

// Only what changed is written: what stands in a live region is read out at each change.
function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function failure({ message, retryable }) {
  const text = message.charAt(0).toUpperCase() + message.slice(1);
  return `${text}${/[.!?]$/.test(text) ? "" : "."} ${retryable ? "Trying again may help." : "Trying again the same way will not help."}`;
}

// --- following one export -----------------------------------------------------------------------

// A fetch, not an EventSource: only a fetch can send the key as a header.
async function follow(entry) {
  entry.reading = true;
  try {
    const answer = await call(path(entry.job.jobId, `/events/stream?sinceSeq=${entry.since}`), { headers: { Accept: "text/event-stream" } });
    let rest = "";
    for await (const chunk of pieces(answer.body)) {
      if (!app.isOpen() || jobs.get(entry.job.jobId) !== entry) return;
      const blocks = (rest + chunk).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("\n");
        if (data) apply(entry, JSON.parse(data));
      }
    }
  } catch {
    // The list, asked for every few seconds, goes on and says what is wrong.
  } finally {
    entry.reading = false;
  }
}

async function* pieces(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function apply(entry, event) {
  if (event.seq <= entry.since) return;
  entry.since = event.seq;
  const { job } = entry;
  Object.assign(job, {
    lastEventSeq: event.seq, progress: event.progress, currentStage: event.stage, stageProgress: event.stageProgress,
    message: event.message,
  });
  entry.timeline?.add(event).catch(() => {}); // what is missing comes with the next event
  if (job.status === "queued") job.status = "running";
  if (TERMINAL.has(event.type)) look(entry);
  else paint(entry);
}

async function look({ job }) {
  try {
    update(await read(path(job.jobId)));
    arrange();
  } catch (error) {
    app.show(error);
  }
}

// --- what the buttons do ------------------------------------------------------------------------

async function act(event, entry) {
  const button = event.target.closest("button[data-do]");
  if (button) await press(entry, button.dataset.do);
}

async function press(entry, what) {
  const button = entry.row.querySelector(`[data-do="${what}"]`);
  const focused = document.activeElement === button;
  button.disabled = true;
  button.setAttribute("aria-busy", "true");
  app.notice("");
  try {
    await ACTIONS[what](entry, button);
  } catch (error) {
    app.show(error);
  } finally {
    button.disabled = false;
    button.removeAttribute("aria-busy");
    if (focused && document.activeElement === document.body) button.focus(); // a disabled button loses it
  }
}

const ACTIONS = {
  download: async (entry) => {
    if (entry.job.artifact.parts === 1) return save(entry, "download", entry.job.artifact.fileName);
    const manifest = await read(path(entry.job.jobId, "/manifest"));
    for (const [place, { fileName }] of manifest.parts.entries()) {
      await save(entry, `download?part=${place + 1}`, fileName);
    }
  },
  sidecar: (entry) => save(entry, "sidecar", `${entry.job.artifact.fileName}.index.v1.sqlite`),
  manifest: (entry) => save(entry, "manifest", `${entry.job.artifact.fileName}.manifest.json`),
  report: (entry, button) => toggle(entry, button, async (box) => {
    const report = await read(path(entry.job.jobId, "/report"));
    box.hidden = false; // pictures are drawn to the width that they get
    fillReport(box, report);
  }),
  timeline: (entry, button) => toggle(entry, button, async (box) => {
    entry.timeline ??= new Timeline(entry.job.jobId, box);
    box.hidden = false;
    await entry.timeline.catchUp();
  }),
  retry: async (entry) => {
    const created = await read(path(entry.job.jobId, "/retry"), { method: "POST" });
    if (given.has(entry.job.jobId)) given.set(created.jobId, given.get(entry.job.jobId));
    entry.job = await read(path(entry.job.jobId)); // nothing follows its last event, so its number tells nothing new
    paint(entry);
    await reveal(created);
    const begun = jobs.get(created.jobId);
    if (begun) part(begun.row, "title").firstElementChild.focus(); // the button that was pressed is gone
  },
  cancel: async (entry) => {
    update(await read(path(entry.job.jobId), { method: "DELETE" }));
    arrange();
  },
};

async function toggle(entry, button, fill) {
  const box = part(entry.row, button.dataset.do);
  const opening = box.hidden;
  if (opening) {
    try {
      await fill(box);
    } catch (error) {
      box.hidden = true;
      throw error;
    }
  }
  box.hidden = !opening;
  button.setAttribute("aria-expanded", String(opening));
}

// Escape closes the panels of the row and goes back to the button that opened them.
function close({ row }, event) {
  for (const button of row.querySelectorAll('[aria-expanded="true"]')) {
    part(row, button.dataset.do).hidden = true;
    button.setAttribute("aria-expanded", "false");
    button.focus();
    event.preventDefault();
  }
}

async function save(entry, what, name) {
  const address = URL.createObjectURL(await read(path(entry.job.jobId, `/${what}`), {}, "blob"));
  const link = document.createElement("a");
  link.href = address;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

// --- a new export -------------------------------------------------------------------------------

function receive(files) {
  if (!app.isOpen() || !files.length) return;
  if ($("view-exports").hidden) location.hash = "#exports";
  app.notice("");
  refusals = [];
  for (const file of files) sending = sending.then(() => upload(file));
}

async function upload(file) {
  if (!app.isOpen()) return;
  const name = cut(clean(file.name), 120);
  let created;
  $("uploading").hidden = false;
  try {
    created = await send(file, await encodingOf(file), (share) => {
      $("upload-bar").value = share * 100;
      $("upload-text").textContent = share < 1 ? `Sending ${name}: ${Math.floor(share * 100)}%` : `Sent ${name}`;
    });
  } catch (error) {
    refusals.push(`${name}: ${error.message}`);
    if (error.status !== 401) app.notice(refusals.join(" — "));
    return;
  } finally {
    $("uploading").hidden = true;
  }
  given.set(created.jobId, file.name);
  await reveal(created).catch(app.show);
}

// Shows an export that was just begun here.
async function reveal({ jobId }) {
  if ($("status").value) { // else a list of failed ones, say, would not show it
    $("status").value = "";
    forget();
  }
  await refresh();
  const entry = jobs.get(jobId);
  if (!entry) return; // others came in faster than a page holds
  entry.row.scrollIntoView({ block: "nearest" });
  // Not as if the button were pressed: that takes away what was said of the file before.
  if (part(entry.row, "timeline").hidden) await ACTIONS.timeline(entry, entry.row.querySelector('[data-do="timeline"]'));
}

async function encodingOf(file) {
  const head = new Uint8Array(await file.slice(0, 4).arrayBuffer());
  if (head[0] === 0x1f && head[1] === 0x8b) return "gzip";
  if (head[0] === 0x28 && head[1] === 0xb5 && head[2] === 0x2f && head[3] === 0xfd) return "zstd";
  return null;
}

// RFC 8187 allows fewer characters than encodeURIComponent leaves.
function inHeader(text) {
  return encodeURIComponent(text).replace(/['()*]/g, (sign) => `%${sign.charCodeAt(0).toString(16)}`);
}

// XMLHttpRequest, not fetch: only it tells how much of a body has been sent.
async function send(file, encoding, progress) {
  const request = new XMLHttpRequest();
  await new Promise((resolve, reject) => {
    request.open("POST", "/v1/exports");
    request.setRequestHeader("Content-Type", /\.(ndjson|jsonl)/.test(file.name) ? "application/x-ndjson" : "application/json");
    request.setRequestHeader("Idempotency-Key", crypto.randomUUID?.() ?? String(Math.random()).slice(2));
    request.setRequestHeader("Content-Disposition", `attachment; filename*=UTF-8''${inHeader(file.name)}`);
    if (encoding) request.setRequestHeader("Content-Encoding", encoding);
    for (const [name, value] of Object.entries(authorization())) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => event.lengthComputable && progress(event.loaded / event.total);
    request.onload = resolve;
    request.onerror = () => reject(new Refused(0, "It could not be sent."));
    progress(0);
    request.send(file);
  });
  if (request.status >= 300) throw refusal(request.status, request.responseText);
  return parsed(request.responseText);
}
