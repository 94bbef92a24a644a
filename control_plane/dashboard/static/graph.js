// The drawing of a node and its neighbours: what leads here on the left, what it leads to on the right, grouped by
// type; on a narrow screen the one above and the other below.

import { clean, cut, draw, fit, picture } from "./dom.js";
import { place, relation } from "./words.js";

const ROW = 34;
const BOX = 28;
const HEAD = 26;
const NARROW = 560;
const UNSURE = 0.7; // relationships below this confidence are dashed

export function drawGraph(box, node, sides) {
  let drawn = false;
  picture(box, (width) => {
    // Drawn anew for another width, the link that had the focus keeps it.
    const focus = drawn ? [...box.querySelectorAll("a")].indexOf(document.activeElement) : -1;
    drawn = true;
    const svg = draw("svg", { class: "graph", width, role: "group", "aria-label": `Neighbours of ${cut(clean(node.name || node.id), 80)}` });
    svg.append(draw("defs", {}, draw("marker", {
      id: "arrow", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto-start-reverse",
    }, draw("path", { class: "head", d: "M0 0 8 4 0 8z" }))));
    const height = (width < NARROW ? tall : wide)(svg, node, sides, width);
    svg.setAttribute("height", height);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    keys(svg);
    return [svg, () => {
      for (const text of svg.querySelectorAll("text[data-fit]")) fit(text, Number(text.dataset.fit));
      svg.querySelectorAll("a")[focus]?.focus();
    }];
  });
}

function groups(items) {
  const found = new Map();
  for (const item of items) found.set(item.type, [...(found.get(item.type) ?? []), item]);
  return [...found];
}

const heightOf = (items) => items.length * ROW + groups(items).length * HEAD;

function wide(svg, node, sides, width) {
  const column = Math.min(260, width * 0.32);
  const core = Math.min(200, width - 2 * column - 110);
  const height = Math.max(heightOf(sides.in), heightOf(sides.out), 120) + 8;
  const [middle, left] = [height / 2, (width - core) / 2];
  const at = { in: [0, column, left], out: [width - column, width - column, left + core] };
  const boxes = [];
  for (const way of ["in", "out"]) {
    const [x, edge, meet] = at[way];
    let y = (height - heightOf(sides[way])) / 2;
    const side = draw("g", { class: "side" });
    for (const [type, items] of groups(sides[way])) {
      side.append(heading(type, x, y + 18, column));
      y += HEAD;
      for (const item of items) {
        const from = y + ROW / 2;
        const bend = (meet - edge) / 2;
        const curve = `M${edge} ${from}C${edge + bend} ${from} ${meet - bend} ${middle} ${meet} ${middle}`;
        svg.append(link(curve, item, way));
        boxes.push(neighbour(item, way, x, y, column));
        side.append(boxes.at(-1));
        y += ROW;
      }
    }
    svg.append(side);
  }
  svg.append(centre(node, left, middle, core));
  return height;
}

function tall(svg, node, sides, width) {
  const indent = 28;
  let y = 4;
  const spine = 10;
  const incoming = heightOf(sides.in);
  const middle = incoming + 34;
  for (const way of ["in", "out"]) {
    const side = draw("g", { class: "side" });
    if (way === "out") y = middle + 34;
    for (const [type, items] of groups(sides[way])) {
      side.append(heading(type, indent, y + 18, width - indent));
      y += HEAD;
      for (const item of items) {
        const from = y + ROW / 2;
        svg.append(link(`M${indent} ${from}H${spine + 6}Q${spine} ${from} ${spine} ${from + (way === "in" ? 6 : -6)}V${way === "in" ? middle - 20 : middle + 20}`, item, way));
        side.append(neighbour(item, way, indent, y, width - indent));
        y += ROW;
      }
    }
    svg.append(side);
  }
  svg.append(centre(node, 0, middle, width));
  return Math.max(y, middle + 24) + 4;
}

function heading(type, x, y, width) {
  return draw("text", { class: "type", x, y, "data-fit": width }, cut(clean(relation(type)), 60));
}

function link(d, { confidence }, way) {
  return draw("path", { class: confidence < UNSURE ? "link unsure" : "link", d, "stroke-width": 1.3, [way === "in" ? "marker-end" : "marker-start"]: "url(#arrow)" });
}

function neighbour({ href, type, confidence, reason, node }, way, x, y, width) {
  const name = clean(node.name || node.id);
  const label = cut(clean(node.label), 14);
  const about = `${cut(clean(node.label), 40)} ${cut(name, 300)}`;
  const where = clean(place(node));
  const says = way === "in" ? `${about}, ${relation(type)} this` : `${relation(type)} ${about}`;
  const room = Math.min(80, label.length * 7);
  return draw("a", { href, class: "neighbour", tabindex: -1, "aria-label": clean(says) },
    draw("title", {}, cut([name, where, `confidence ${confidence.toFixed(2)}`, reason ? clean(reason) : ""].filter(Boolean).join("\n"), 4000)),
    draw("rect", { x: x + 1, y: y + (ROW - BOX) / 2, width: width - 2, height: BOX, rx: 8 }),
    draw("text", { class: "name", x: x + 10, y: y + ROW / 2 + 5, "data-fit": width - room - 28 }, cut(name, 200)),
    draw("text", { class: "label", x: x + width - 10, y: y + ROW / 2 + 4, "text-anchor": "end", "data-fit": room }, label));
}

function centre(node, x, middle, width) {
  const name = clean(node.name || node.id);
  return draw("g", { class: "centre" },
    draw("title", {}, cut(name, 4000)),
    draw("rect", { x: x + 1, y: middle - 22, width: width - 2, height: 44, rx: 10 }),
    draw("text", { class: "name", x: x + width / 2, y: middle - 2, "text-anchor": "middle", "data-fit": width - 20 }, cut(name, 200)),
    draw("text", { class: "label", x: x + width / 2, y: middle + 14, "text-anchor": "middle", "data-fit": width - 20 }, cut(clean(node.label), 40)));
}

// One stop for the tab key; the arrow keys move from there, up and down a side, left and right to the other one.
export function keys(svg) {
  const links = [...svg.querySelectorAll("a")];
  links[0]?.setAttribute("tabindex", 0);
  svg.addEventListener("keydown", (event) => {
    const here = event.target.closest("a");
    if (!here) return;
    const side = [...here.parentElement.querySelectorAll("a")];
    const spot = side.indexOf(here);
    const other = [...svg.querySelectorAll(".side")].find((group) => group !== here.parentElement)?.querySelectorAll("a") ?? [];
    const across = other[Math.min(spot, other.length - 1)];
    const next = {
      ArrowUp: side[spot - 1] ?? links[links.indexOf(here) - 1], ArrowDown: side[spot + 1] ?? links[links.indexOf(here) + 1],
      ArrowLeft: across, ArrowRight: across, Home: links[0], End: links.at(-1),
    }[event.key];
    if (!next) return;
    event.preventDefault();
    choose(svg, next);
  });
}

export function choose(svg, link) {
  svg.querySelector('a[tabindex="0"]').setAttribute("tabindex", -1);
  link.setAttribute("tabindex", 0);
  link.focus();
}
