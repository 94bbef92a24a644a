// The report of an export in words and figures.

import { foreign, make, picture } from "./dom.js";
import { bars } from "./timeline.js";
import { TIMINGS, WARNINGS, bytes, count, many, seconds } from "./words.js";

export function fillReport(box, report) {
  const { input, capsule, sidecar, timings, embedding, versions } = report;
  const facts = [
    ["Graph", `${many(input.nodes, "node")}, ${many(input.relationships, "relationship")}, ${many(input.files, "file text")}, ${bytes(input.bytes)}`],
    ["Capsule", `${many(capsule.frames, "frame")}, ${bytes(capsule.sizeBytes)}${capsule.parts > 1 ? `, ${capsule.parts} parts` : ""}`],
    ["Index", bytes(sidecar.sizeBytes)],
    ["Vectors", capsule.vectors ? `${count(capsule.vectors)} of ${capsule.dimension} numbers, ${capsule.model ?? ""}` : "none; the capsule can be searched by words"],
  ];
  if (embedding.texts) {
    facts.push(["Embedding", `${many(embedding.texts, "text")}, ${many(embedding.tokens, "token")}, ${count(embedding.cacheHits)} from the cache${embedding.costEstimate ? `, about $${embedding.costEstimate.toFixed(4)}` : ""}`]);
  }
  const { nodes, relationships } = report.leftOut;
  if (nodes || relationships) {
    facts.push(["Left out", `${many(nodes, "node")} and ${many(relationships, "relationship")}, the least connected first`]);
  }
  facts.push(
    ["Written by", `${report.writer} writer on ${report.backend}, ${report.attempts === 1 ? "first attempt" : `${report.attempts} attempts`}`],
    ["Versions", `memvid-export ${versions.memvidExport}, memvid-core ${versions.memvidCore}`],
    ["SHA-256", capsule.sha256]);
  const measured = Object.entries(TIMINGS).filter(([key]) => timings[key] > 0).map(([key, name]) => [name, timings[key]]);
  const times = make("div", { class: "picture" });
  box.replaceChildren(
    make("dl", { class: "facts-list" }, ...facts.flatMap(([name, value]) => [make("dt", {}, name), foreign("dd", {}, value, 600)])),
    make("section", {},
      make("h4", {}, "Where the time went"), times,
      make("p", { class: "faint" }, `${seconds(timings.total)} in all. Steps run side by side, so they may add up to more.`)),
    warnings(report.warnings));
  picture(times, (width) => [bars(measured, width)]);
}

function warnings(found) {
  if (!found.length) return make("p", { class: "faint" }, "Nothing had to be repaired on the way.");
  const items = found.map(({ code, count: times, example }) =>
    make("li", {},
      make("p", {}, foreign("span", {}, WARNINGS[code] ?? code), make("span", { class: "faint" }, ` ${count(times)} ×`)),
      make("details", {}, make("summary", {}, "The first one"), foreign("code", {}, example, 2000), foreign("p", { class: "faint" }, code))));
  return make("section", {}, make("h4", {}, "Repaired on the way"), make("ul", { class: "warnings" }, ...items));
}
