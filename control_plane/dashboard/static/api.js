// Requests. All go to this origin and carry the key that was entered in this tab.

const KEY = "memvid-export.key";
const BUILDING_MS = 1500; // between two questions to a capsule whose index is being built
const BUILDING_TRIES = 40;
const GARBLED = "The answer was cut off, or something between this page and the server gave it. Try again.";

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (text) => sessionStorage.setItem(KEY, text),
  forget: () => sessionStorage.removeItem(KEY),
};

export class Refused extends Error {
  constructor(status, message, code = "") {
    super(message);
    this.status = status;
    this.code = code;
  }
}

let refused = () => {};

// What to do when the server does not accept the key.
export function onRefusedKey(action) {
  refused = action;
}

export function authorization() {
  return key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
}

export async function call(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: { ...authorization(), ...options.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server does not answer. Is it running?");
  }
  if (!answer.ok) throw refusal(answer.status, await body(answer, "text"));
  return answer;
}

// What an answer holds, as JSON or as a "blob".
export const read = async (path, options, as = "json") => body(await call(path, options), as);

async function body(answer, as) {
  try {
    return await answer[as]();
  } catch (error) {
    throw error.name === "AbortError" ? error : new Refused(0, GARBLED);
  }
}

export function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    throw new Refused(0, GARBLED);
  }
}

export function refusal(status, text) {
  if (status === 401) refused();
  let message = `The server answered ${status}.`;
  let code = "";
  try {
    ({ message = message, code = code } = JSON.parse(text).error);
  } catch {
    // not one of our error bodies (a proxy's, say): the status is all there is to show
  }
  return new Refused(status, message, code);
}

// The answer of a read tool: its envelope.
export async function ask(tool, args, signal) {
  const { result, error } = await read("/mcp", {
    method: "POST",
    signal,
    headers: { "Content-Type": "application/json", Accept: "application/json, text/event-stream" },
    body: JSON.stringify({ jsonrpc: "2.0", id: 1, method: "tools/call", params: { name: tool, arguments: args } }),
  });
  if (error) throw new Refused(200, error.message);
  if (result.isError) throw new Refused(200, result.structuredContent.message, result.structuredContent.code);
  return result.structuredContent;
}

// Asks again while the index of a capsule is being built; `waiting` is told of it.
export async function patiently(attempt, signal, waiting) {
  for (let tries = 1; ; tries += 1) {
    try {
      return await attempt();
    } catch (error) {
      if (error.code !== "INDEX_BUILD_IN_PROGRESS" || tries === BUILDING_TRIES) throw error;
      waiting();
    }
    await new Promise((resolve) => setTimeout(resolve, BUILDING_MS));
    signal.throwIfAborted();
  }
}
