// The drawing of a document in the middle of those that resemble it, best ones first; on a narrow screen it stands above
// them. Which of them resemble each other is drawn by thin lines; where they are told apart by colour there is a legend.

import { cut, draw, fit, picture } from "./dom.js";
import { choose, keys } from "./graph.js";

const ROW = 52;
const BOX = 44;
const NARROW = 560;
const LEAST = 0.75; // the score at which documents are related

export function drawNeighbourhood(box, centre, nodes, pairs) {
  picture(box, (width) => {
    // Drawn anew, the link that had the focus keeps it.
    const focus = box.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
    const places = (width < NARROW ? tall : wide)(nodes.length, width);
    const svg = draw("svg", {
      class: "graph related", width, height: places.height, viewBox: `0 0 ${width} ${places.height}`,
      role: "group", "aria-label": `What resembles ${cut(centre.name, 80)}`,
    });
    const lines = [
      ...pairs.map(({ ends, score }) => line(places.between(...ends), score, ends, `${cut(nodes[ends[0]].name, 200)}\n${cut(nodes[ends[1]].name, 200)}`)),
      ...nodes.map(({ score, name }, place) => line(places.spoke(place), score, [place], cut(name, 200))),
    ];
    svg.append(...lines.map(({ path }) => path));
    for (const side of places.sides) {
      svg.append(draw("g", { class: "side" }, ...side.map((place) => neighbour(nodes[place], places.boxes[place]))));
    }
    svg.append(middle(centre, places.centre), ...lines.map(({ text }) => text));
    keys(svg);
    light(svg, lines, places.sides.flat());
    return [svg, () => {
      for (const text of svg.querySelectorAll("text[data-fit]")) fit(text, Number(text.dataset.fit));
      for (const { path, text } of lines) {
        const { x, y } = path.getPointAtLength(path.getTotalLength() * 0.5);
        text.setAttribute("x", x);
        text.setAttribute("y", y + 4);
      }
      const link = focus && [...svg.querySelectorAll("a")].find((one) => one.getAttribute("href") === focus);
      if (link) choose(svg, link);
    }];
  });
}

// --- where everything stands: `dot` is where the lines of a box end ------------------------------

function wide(number, width) {
  const column = Math.min(270, width * 0.31);
  const core = Math.min(220, width - 2 * column - 110);
  const left = Math.ceil(number / 2);
  const height = Math.max(left * ROW, 3 * ROW) + 8;
  const [x, y] = [width / 2, height / 2];
  const bend = Math.max(0, Math.min(70, (width - 2 * column - core) / 2 - 40));
  const boxes = Array.from({ length: number }, (_, place) => {
    const right = place >= left;
    const [row, rows] = right ? [place - left, number - left] : [place, left];
    const at = y + (row - (rows - 1) / 2) * ROW;
    // The columns bend around the middle, as far as there are rows above and below it.
    const lean = rows > 2 ? bend * ((2 * row) / (rows - 1) - 1) ** 2 : 0;
    const from = right ? width - column - lean - 1 : lean + 1;
    return { x: from, y: at - BOX / 2, width: column, dot: [right ? from : from + column, at] };
  });
  const edge = (place) => x + (place < left ? -core : core) / 2;
  const half = (place) => (edge(place) - boxes[place].dot[0]) / 2;
  return {
    height, boxes,
    sides: [boxes.map((_, place) => place).slice(0, left), boxes.map((_, place) => place).slice(left)].filter((side) => side.length),
    centre: { x: x - core / 2, y: y - 26, width: core },
    spoke: (place) => {
      const [fromX, fromY] = boxes[place].dot;
      return `M${fromX} ${fromY}C${fromX + half(place)} ${fromY} ${edge(place) - half(place)} ${y} ${edge(place)} ${y}`;
    },
    between: (a, b) => {
      const [[ax, ay], [bx, by]] = [boxes[a].dot, boxes[b].dot];
      const same = a < left === b < left;
      const way = a < left ? 1 : -1;
      const bulge = same ? Math.min(Math.abs(half(a)) * 1.5, 18 + Math.abs(by - ay) * 0.4) : Math.abs(bx - ax) * 0.4;
      return `M${ax} ${ay}C${ax + way * bulge} ${ay} ${bx + (same ? way : -way) * bulge} ${by} ${bx} ${by}`;
    },
  };
}

function tall(number, width) {
  const gutter = 72;
  const top = 64; // of the first one
  const boxes = Array.from({ length: number }, (_, place) => ({
    x: gutter, y: top + place * ROW + (ROW - BOX) / 2, width: width - gutter - 1, dot: [gutter, top + (place + 0.5) * ROW],
  }));
  const arc = (from, to) => {
    const reach = 18 + ((gutter * 1.3 - 18) * Math.abs(to - from)) / (top + number * ROW);
    return `M${gutter} ${from}C${gutter - reach} ${from} ${gutter - reach} ${to} ${gutter} ${to}`;
  };
  return {
    height: top + number * ROW + 4, boxes,
    sides: [boxes.map((_, place) => place)],
    centre: { x: gutter, y: 4, width: width - gutter - 1 },
    spoke: (place) => arc(30, boxes[place].dot[1]),
    between: (a, b) => arc(boxes[a].dot[1], boxes[b].dot[1]),
  };
}

// --- what it is made of --------------------------------------------------------------------------

function line(d, score, ends, about) {
  const strength = Math.max(0, Math.min(1, (score - LEAST) / (1 - LEAST)));
  const kind = ends.length > 1 ? "link between" : "link spoke";
  const path = draw("path", { class: kind, d, "stroke-width": 1 + (ends.length > 1 ? 1 : 2) * strength },
    draw("title", {}, `${score.toFixed(3)}\n${about}`));
  return { ends, path, text: draw("text", { class: "score", "text-anchor": "middle", "aria-hidden": "true" }, score.toFixed(3)) };
}

function neighbour(node, { x, y, width, dot }) {
  const score = node.score.toFixed(3);
  const under = [node.domain || "no domain yet", node.collection].join(" · ");
  const says = `${cut(node.name, 300)}, score ${score}, domain ${node.domain || "not found yet"}, in ${node.collection}${node.with.length ? `, alike with ${node.with.length} of the others` : ""}`;
  return draw("a", { href: node.href, class: "neighbour", tabindex: -1, "aria-label": says },
    draw("title", {}, `${cut(node.name, 4000)}\n${node.id}\n${under}\nscore ${node.score.toFixed(6)}`),
    draw("rect", { x, y, width, height: BOX, rx: 8 }),
    draw("text", { class: "name", x: x + 14, y: y + 19, "data-fit": width - 72 }, cut(node.name, 200)),
    draw("text", { class: "label", x: x + 14, y: y + 35, "data-fit": width - 28 }, under),
    draw("text", { class: "label figure", x: x + width - 14, y: y + 19, "text-anchor": "end" }, score),
    draw("circle", { class: `hue-${node.hue}`, cx: dot[0], cy: dot[1], r: 6 }));
}

function middle(centre, { x, y, width }) {
  return draw("g", { class: "centre" },
    draw("title", {}, cut(centre.name, 4000)),
    draw("rect", { x, y, width, height: 52, rx: 10 }),
    draw("circle", { class: `hue-${centre.hue}`, cx: x + 18, cy: y + 26, r: 6 }),
    draw("text", { class: "name", x: x + 34, y: y + 23, "data-fit": width - 44 }, cut(centre.name, 200)),
    draw("text", { class: "label", x: x + 34, y: y + 39, "data-fit": width - 44 }, [centre.domain || "no domain yet", centre.collection].join(" · ")));
}

// The lines of the document that is pointed at, or has the focus, stand out with their scores.
function light(svg, lines, order) {
  const links = [...svg.querySelectorAll("a")];
  const show = (link) => {
    const place = link ? order[links.indexOf(link)] : -1;
    svg.classList.toggle("lit", place >= 0);
    for (const { ends, path, text } of lines) {
      for (const element of [path, text]) element.classList.toggle("on", ends.includes(place));
    }
  };
  const focused = () => links.find((link) => link === document.activeElement);
  svg.addEventListener("pointerover", (event) => show(event.target.closest("a") ?? focused()));
  svg.addEventListener("pointerleave", () => show(focused()));
  for (const link of links) { // not on the drawing: Chromium makes one that hears of the focus a stop of the tab key
    link.addEventListener("focus", () => show(link));
    link.addEventListener("blur", () => show(null));
  }
}
