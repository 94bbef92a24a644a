// Figures and codes in words.

export const count = (number) => number.toLocaleString("en");

export const many = (number, one, more = `${one}s`) => `${count(number)} ${number === 1 ? one : more}`;

export function bytes(size) {
  const units = ["bytes", "KB", "MB", "GB"];
  let place = 0;
  let value = size;
  while (value >= 1000 && place < units.length - 1) {
    value /= 1000;
    place += 1;
  }
  return `${value.toFixed(place && value < 100 ? 1 : 0)} ${units[place]}`;
}

export function seconds(value) {
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 90) return `${value.toFixed(1)} s`;
  if (value < 5400) return `${Math.floor(value / 60)} min ${Math.floor(value % 60)} s`;
  return `${Math.floor(value / 3600)} h ${Math.floor((value % 3600) / 60)} min`;
}

export const when = (time) => new Date(time).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });

export const relation = (type) => type.toLowerCase().replaceAll("_", " ");

export const place = ({ filePath, startLine, endLine }) => {
  if (!filePath) return "";
  if (startLine === null || startLine === undefined) return filePath;
  return endLine > startLine ? `${filePath}:${startLine}–${endLine}` : `${filePath}:${startLine}`;
};

export const BADGES = {
  queued: "waiting", running: "running", completed: "ready", failed: "failed", canceled: "canceled", expired: "expired",
};

// Stages in their order, as people call them; the last four end an export.
export const STAGES = {
  queued: "Waiting",
  transform: "Reading the graph",
  frame_prep: "Preparing frames",
  write_capsule: "Writing the capsule",
  build_sidecar: "Building the index",
  finalize: "Checking it",
  download_ready: "Ready",
  failed: "Failed",
  canceled: "Canceled",
  expired: "Expired",
};

export const TIMINGS = {
  queue: "Waiting", coldStart: "Starting", read: "Reading", transform: "Sorting", embed: "Vectors", write: "Writing",
  sidecar: "Index", verify: "Checking", upload: "Storing",
};

export const WARNINGS = {
  BASE_NAME_CLEANED: "The name had characters that no file name may have; they were replaced.",
  CACHE_UNAVAILABLE: "The store of earlier vectors could not be used, so all vectors were made anew.",
  CAPACITY_UNDERESTIMATED: "The capsule grew larger than planned and was divided anew.",
  COMMUNITY_ID_QUOTED: "Ids of communities came with quotation marks around them; these were taken off.",
  CONFIDENCE_MISSING: "Relationships came without a confidence; they count as certain.",
  CONFIDENCE_OUT_OF_RANGE: "Confidences lay outside 0 to 1; the nearest end was taken.",
  CONTROL_CHARACTER: "Invisible control characters were replaced.",
  DANGLING_RELATION: "Relationships pointed at nodes that are not in the graph; they were left out.",
  DUPLICATE_NODE: "The same node came more than once; one of each was kept.",
  DUPLICATE_RELATION: "The same relationship came more than once; one of each was kept, with how often it came.",
  FILE_WITHOUT_TEXT: "Files came without their text; they are in the capsule by name only.",
  INVALID_UTF8: "Some bytes were no valid text; they were replaced by �.",
  LONE_SURROGATE: "Halves of characters were replaced by �.",
  NODE_ID_REUSED: "Different nodes had the same id; all but the first got a new one.",
  NODE_WITHOUT_NAME: "Nodes came without a name; their id stands in for it.",
  NODE_WITHOUT_PROPERTIES: "Nodes came without properties.",
  PROPERTY_CUT: "Very long properties were cut.",
  RELATION_ID_REUSED: "Different relationships had the same id; all but the first got a new one.",
  RELATION_WITHOUT_ID: "Relationships came without an id; one was made from their ends and type.",
  SNIPPET_NOT_FOUND: "The source of some symbols is not at their line numbers; they go without it rather than with another's.",
  UNKNOWN_RECORD: "Records of an unknown kind were passed over.",
  WRITER_FALLBACK: "The fast writer could not be used; another one wrote the capsule, much more slowly.",
  // of a search
  SEMANTIC_MODEL_MISSING: "The model of this capsule's vectors is not here, so it was searched by words only.",
  SEMANTIC_UNAVAILABLE: "The question's vector could not be made in time, so the search was by words only.",
};

export const FAILURES = {
  CAPACITY_EXCEEDED: "The graph does not fit into a capsule.",
  CAPSULE_UNREADABLE: "The capsule could not be read back.",
  DEADLINE_EXCEEDED: "It took longer than an export may.",
  DEVICE_FAILED: "The graphics card failed.",
  EMBEDDING_FAILED: "The vectors could not be made.",
  EMBEDDING_REFUSED: "The vectors would pass a limit on cost or size.",
  GATE_FAILED: "The finished capsule did not pass its check.",
  INTERNAL: "Something went wrong on our side.",
  INVALID_EXPORT_REQUEST: "The graph cannot be exported as it is.",
  OBJECT_MISSING: "A stored file was gone.",
  ACCESS_DENIED: "The storage did not let us in.",
  OUT_OF_MEMORY: "The worker ran out of memory.",
  PAYLOAD_MISMATCH: "The stored graph was not the one that came in.",
  PAYLOAD_TOO_LARGE: "The graph passes a limit on its size.",
  PROVIDER_REJECTED: "The provider of vectors refused the request.",
  STORAGE_FAILED: "The storage did not answer.",
  WORKER_LOST: "The worker went away in the middle.",
  WRITER_FAILED: "The capsule could not be written.",
  WRITER_UNAVAILABLE: "The chosen writer is not installed.",
};
