// The dashboard: lists exports, follows the running ones, starts new ones. Text from the server is only ever set as
// textContent. Every request goes to this origin and carries the key that was entered in this tab.

const KEY = "memvid-export.key";
const PAGE = 20;
const REFRESH_MS = 4000;
// Browsers open six connections to one HTTP/1.1 server; the event streams must leave some for everything else.
const MAX_STREAMS = 3;
const BADGES = {
  queued: "waiting", running: "running", completed: "ready", failed: "failed", canceled: "canceled", expired: "expired",
};
const TERMINAL = new Set(["job_completed", "job_failed", "job_canceled", "job_expired"]);

const $ = (id) => document.getElementById(id);
const jobs = new Map(); // jobId -> {job, row, since, reading}
const given = new Map(); // jobId -> the name of the file that was dropped here
let cursor = null; // of the next older page
let open = false; // false while the page asks for a key
let away = false; // true while the last refresh failed

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// --- requests ---------------------------------------------------------------------------------

function authorization() {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function call(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: { ...authorization(), ...options.headers } });
  } catch {
    throw new Refused(0, "The server does not answer. Is it running?");
  }
  if (!answer.ok) throw await refusal(answer.status, await answer.text());
  return answer;
}

function refusal(status, body) {
  let message = `The server answered ${status}.`;
  try {
    message = JSON.parse(body).error.message;
  } catch {
    // not one of our error bodies (a proxy's, say): the status is all there is to show
  }
  return new Refused(status, message);
}

function show(error) {
  if (error.status === 401) return askForKey(sessionStorage.getItem(KEY) ? "That key was not accepted." : "");
  notice(error.message);
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

// --- the key ------------------------------------------------------------------------------------

function askForKey(text) {
  open = false;
  sessionStorage.removeItem(KEY);
  $("workspace").hidden = true;
  $("forget").hidden = true;
  $("key-panel").hidden = false;
  notice(text);
  $("key").value = "";
  $("key").focus();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.trim());
  notice("");
  load();
});

$("forget").addEventListener("click", () => {
  for (const { row } of jobs.values()) row.remove();
  jobs.clear();
  askForKey("");
});

// --- the list -----------------------------------------------------------------------------------

async function list(from) {
  const query = new URLSearchParams({ limit: PAGE });
  if (from) query.set("cursor", from);
  return (await call(`/v1/exports?${query}`)).json();
}

async function refresh() {
  const page = await list(null);
  const first = jobs.size === 0;
  for (const job of page.jobs) update(job);
  if (first) cursor = page.nextCursor;
  arrange();
}

function arrange() {
  const ordered = [...jobs.values()].sort((a, b) => b.job.createdAt.localeCompare(a.job.createdAt));
  ordered.forEach(({ row }, place) => {
    if ($("exports").children[place] !== row) $("exports").insertBefore(row, $("exports").children[place] ?? null);
  });
  $("empty").hidden = ordered.length > 0;
  $("more").hidden = !cursor;
  const active = ordered.filter(({ job }) => job.status === "queued" || job.status === "running");
  $("live").textContent = active.length ? `${active.length} in work` : "";
  for (const entry of active) {
    if ([...jobs.values()].filter((other) => other.reading).length >= MAX_STREAMS) break;
    if (!entry.reading) follow(entry);
  }
}

function update(job) {
  let entry = jobs.get(job.jobId);
  if (!entry) {
    const row = $("export").content.firstElementChild.cloneNode(true);
    entry = { job, row, since: 0, reading: false };
    jobs.set(job.jobId, entry);
    row.addEventListener("click", (event) => act(event, entry));
  } else if (job.lastEventSeq < entry.job.lastEventSeq) {
    return; // an answer that was under way while the stream went on
  }
  entry.job = job;
  entry.since = Math.max(entry.since, job.lastEventSeq);
  draw(entry);
}

function draw({ job, row }) {
  row.dataset.status = job.status;
  row.dataset.job = job.jobId;
  part(row, "title").textContent = job.artifact?.fileName ?? given.get(job.jobId) ?? `Export ${job.jobId}`;
  part(row, "badge").textContent = BADGES[job.status] ?? job.status;
  const text = job.error ? job.error.message : job.message;
  if (part(row, "message").textContent !== text) part(row, "message").textContent = text;
  const active = job.status === "queued" || job.status === "running";
  const bar = part(row, "bar");
  bar.hidden = !active;
  bar.value = job.progress;
  bar.setAttribute("aria-label", `Progress: ${job.progress}%`);
  const facts = [`started ${when(job.createdAt)}`];
  if (active) facts.push(`${job.progress}%`);
  else facts.push(`took ${seconds(job.elapsedMs / 1000)}`);
  if (job.artifact) facts.push(bytes(job.artifact.sizeBytes), `kept until ${when(job.artifact.expiresAt)}`);
  part(row, "facts").textContent = facts.join(" · ");
  const ready = job.status === "completed";
  for (const [name, visible] of Object.entries({
    download: ready, sidecar: ready, manifest: ready, report: ready, cancel: active,
  })) {
    row.querySelector(`[data-do="${name}"]`).hidden = !visible;
  }
}

const part = (row, name) => row.querySelector(`.${name}`);

$("more").addEventListener("click", async () => {
  try {
    const page = await list(cursor);
    cursor = page.nextCursor;
    for (const job of page.jobs) update(job);
    arrange();
  } catch (error) {
    show(error);
  }
});

// --- following one export -----------------------------------------------------------------------

// A fetch, not an EventSource: only a fetch can send the key as a header.
async function follow(entry) {
  entry.reading = true;
  try {
    const path = `/v1/exports/${encodeURIComponent(entry.job.jobId)}/events/stream?sinceSeq=${entry.since}`;
    const answer = await call(path, { headers: { Accept: "text/event-stream" } });
    let rest = "";
    for await (const chunk of pieces(answer.body)) {
      if (!open) return;
      const blocks = (rest + chunk).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("\n");
        if (data) apply(entry, JSON.parse(data));
      }
    }
  } catch (error) {
    if (error.status === 401) show(error); // anything else: the list, asked for every few seconds, goes on
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
  if (job.status === "queued") job.status = "running";
  if (TERMINAL.has(event.type)) finish(entry);
  else draw(entry);
}

async function finish(entry) {
  try {
    const answer = await call(`/v1/exports/${encodeURIComponent(entry.job.jobId)}`);
    update(await answer.json());
    arrange();
  } catch (error) {
    show(error);
  }
}

// --- what the buttons do ------------------------------------------------------------------------

async function act(event, entry) {
  const button = event.target.closest("button[data-do]");
  if (!button) return;
  button.disabled = true;
  notice("");
  try {
    await ACTIONS[button.dataset.do](entry, button);
  } catch (error) {
    show(error);
  } finally {
    button.disabled = false;
  }
}

const ACTIONS = {
  download: async (entry) => {
    if (entry.job.artifact.parts === 1) return save(entry, "download", entry.job.artifact.fileName);
    const manifest = await (await call(`/v1/exports/${encodeURIComponent(entry.job.jobId)}/manifest`)).json();
    for (const [place, { fileName }] of manifest.parts.entries()) {
      await save(entry, `download?part=${place + 1}`, fileName);
    }
  },
  sidecar: (entry) => save(entry, "sidecar", `${entry.job.artifact.fileName}.index.v1.sqlite`),
  manifest: (entry) => save(entry, "manifest", `${entry.job.artifact.fileName}.manifest.json`),
  report: toggleReport,
  cancel: async (entry) => {
    const answer = await call(`/v1/exports/${encodeURIComponent(entry.job.jobId)}`, { method: "DELETE" });
    update(await answer.json());
    arrange();
  },
};

async function save(entry, what, name) {
  const answer = await call(`/v1/exports/${encodeURIComponent(entry.job.jobId)}/${what}`);
  const address = URL.createObjectURL(await answer.blob());
  const link = document.createElement("a");
  link.href = address;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

async function toggleReport(entry, button) {
  const box = part(entry.row, "report");
  const opening = box.hidden;
  if (opening) {
    const answer = await call(`/v1/exports/${encodeURIComponent(entry.job.jobId)}/report`);
    box.replaceChildren(...reportParts(await answer.json()));
  }
  box.hidden = !opening;
  button.setAttribute("aria-expanded", String(opening));
}

const STAGES = {
  queue: "waiting", coldStart: "starting", read: "reading", transform: "sorting", embed: "vectors", write: "writing",
  sidecar: "index", verify: "checking", upload: "storing", total: "in all",
};

function reportParts(report) {
  const { input, capsule, sidecar, timings, embedding } = report;
  const facts = [
    ["Graph", `${count(input.nodes)} nodes, ${count(input.relationships)} relationships, ${count(input.files)} files`],
    ["Capsule", `${count(capsule.frames)} frames, ${bytes(capsule.sizeBytes)}${capsule.parts > 1 ? `, ${capsule.parts} parts` : ""}`],
    ["Index", bytes(sidecar.sizeBytes)],
    ["Vectors", capsule.vectors ? `${count(capsule.vectors)} of ${capsule.dimension} numbers, ${embedding.model ?? ""}` : "none"],
    ["Written by", `${report.writer}, ${report.backend}, ${report.attempts === 1 ? "first attempt" : `${report.attempts} attempts`}`],
    ["SHA-256", capsule.sha256],
  ];
  const { nodes, relationships } = report.leftOut;
  if (nodes || relationships) {
    facts.push(["Left out", `${count(nodes)} nodes and ${count(relationships)} relationships, the least connected first`]);
  }
  const list = element("dl", ...facts.flatMap(([name, value]) => [element("dt", name), element("dd", value)]));

  const longest = Math.max(...Object.values(timings), 0.001);
  const times = element("ul", ...Object.entries(STAGES).filter(([key]) => timings[key] > 0).map(([key, name]) => {
    const meter = element("meter");
    Object.assign(meter, { min: 0, max: longest, value: timings[key] });
    meter.setAttribute("aria-label", name);
    return element("li", element("span", name), meter, element("span", seconds(timings[key])));
  }));
  times.className = "times";
  const parts = [list, element("section", element("h4", "Where the time went"), times)];
  if (report.warnings.length) {
    const warnings = report.warnings.map((w) => element("li", `${w.code} × ${count(w.count)}: ${w.example}`));
    parts.push(element("section", element("h4", "Repaired on the way"), element("ul", ...warnings)));
  }
  return parts;
}

function element(name, ...children) {
  const made = document.createElement(name);
  made.append(...children); // strings become text nodes
  return made;
}

// --- a new export -------------------------------------------------------------------------------

$("file").addEventListener("change", () => {
  const [file] = $("file").files;
  $("file").value = "";
  if (file) upload(file);
});

for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", open);
  });
}
for (const name of ["dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    if (name === "drop" || !event.relatedTarget) $("drop").classList.remove("over");
  });
}
document.addEventListener("drop", (event) => {
  const [file] = event.dataTransfer?.files ?? [];
  if (open && file) upload(file);
});

async function upload(file) {
  notice("");
  $("uploading").hidden = false;
  try {
    const created = await send(file, await encodingOf(file), (share) => {
      $("upload-bar").value = share * 100;
      $("upload-text").textContent = share < 1 ? `Sending ${file.name}: ${Math.floor(share * 100)}%` : `Sent ${file.name}`;
    });
    given.set(created.jobId, file.name);
    await refresh();
    jobs.get(created.jobId)?.row.scrollIntoView({ block: "nearest" });
  } catch (error) {
    show(error);
  } finally {
    $("uploading").hidden = true;
  }
}

async function encodingOf(file) {
  const head = new Uint8Array(await file.slice(0, 4).arrayBuffer());
  if (head[0] === 0x1f && head[1] === 0x8b) return "gzip";
  if (head[0] === 0x28 && head[1] === 0xb5 && head[2] === 0x2f && head[3] === 0xfd) return "zstd";
  return null;
}

// XMLHttpRequest, not fetch: only it tells how much of a body has been sent.
function send(file, encoding, progress) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", "/v1/exports");
    request.setRequestHeader("Content-Type", /\.(ndjson|jsonl)/.test(file.name) ? "application/x-ndjson" : "application/json");
    request.setRequestHeader("Idempotency-Key", crypto.randomUUID?.() ?? String(Math.random()).slice(2));
    if (encoding) request.setRequestHeader("Content-Encoding", encoding);
    for (const [name, value] of Object.entries(authorization())) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => event.lengthComputable && progress(event.loaded / event.total);
    request.onload = () => {
      if (request.status < 300) resolve(JSON.parse(request.responseText));
      else reject(refusal(request.status, request.responseText));
    };
    request.onerror = () => reject(new Refused(0, `${file.name} could not be sent.`));
    progress(0);
    request.send(file);
  });
}

// --- words and figures --------------------------------------------------------------------------

const count = (number) => number.toLocaleString("en");

function bytes(size) {
  const units = ["bytes", "KB", "MB", "GB"];
  let place = 0;
  let value = size;
  while (value >= 1000 && place < units.length - 1) {
    value /= 1000;
    place += 1;
  }
  return `${value.toFixed(place && value < 100 ? 1 : 0)} ${units[place]}`;
}

function seconds(value) {
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 90) return `${value.toFixed(1)} s`;
  return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

const when = (time) => new Date(time).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });

// --- from the top -------------------------------------------------------------------------------

async function load() {
  try {
    open = true;
    await refresh();
    if (!open) return; // the key was forgotten meanwhile
    if (away) notice("");
    away = false;
    $("key-panel").hidden = true;
    $("workspace").hidden = false;
    $("forget").hidden = !sessionStorage.getItem(KEY);
  } catch (error) {
    away = error.status !== 401;
    show(error);
  }
}

setInterval(() => {
  if (open && !document.hidden) load();
}, REFRESH_MS);

load();
