// Making elements. Text only ever becomes a text node or an attribute, so none of it is ever read as HTML.

const SVG = "http://www.w3.org/2000/svg";

export const $ = (id) => document.getElementById(id);

export function make(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

export function draw(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// Text from a graph as an element of its own: what it holds cannot turn the text around it, and is never too long to
// look at; the whole of it is its title.
export function foreign(name, attributes, text, most = 160) {
  const whole = clean(text);
  const short = cut(whole, most);
  return make(name, { dir: "auto", title: short === whole ? null : cut(whole, 4000), ...attributes }, make("bdi", {}, short));
}

// Characters that show nothing or turn text around become ones that can be seen. Line ends and tabs stay in code.
export function clean(text, code = false) {
  return String(text).replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu, (char) => {
    const point = char.codePointAt(0);
    if (code && (point === 10 || point === 9)) return char;
    if (point === 0x200c || point === 0x200d) return char; // they join letters and emoji
    if (point < 32) return String.fromCodePoint(0x2400 + point);
    return point === 127 ? "␡" : `⟨U+${point.toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });
}

// At most so many characters, never half of one.
export function cut(text, most) {
  if (text.length <= most) return text;
  const short = text.slice(0, most - 1);
  return `${/[\ud800-\udbff]$/.test(short) ? short.slice(0, -1) : short}…`;
}

// Shortens what an SVG text element holds until it is not wider than `width`; it must be in the page.
export function fit(element, width) {
  let text = cut(element.textContent, 200);
  element.textContent = text;
  while (text.length > 1 && element.getComputedTextLength() > width) {
    const share = Math.max(0.3, width / element.getComputedTextLength());
    text = cut(text, Math.max(1, Math.min(text.length - 1, Math.floor(text.length * share))));
    element.textContent = text;
  }
}

const painted = new WeakMap(); // box -> {paint, width}
const sizes = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    if (painted.has(target) && target.clientWidth !== painted.get(target).width) repaint(target);
  }
});

// Fills a box with what `paint(width)` draws and fits into it, now and whenever its width changes. `paint` returns the
// drawing and, if there is something to do once it is in the page, a function.
export function picture(box, paint) {
  painted.set(box, { paint, width: 0 });
  sizes.observe(box);
  repaint(box);
}

function repaint(box) {
  const entry = painted.get(box);
  const width = box.clientWidth;
  if (!width) return; // not visible yet: the observer will tell
  entry.width = width;
  const [drawing, then] = entry.paint(width);
  box.replaceChildren(drawing);
  then?.();
}

const filled = new WeakMap(); // box -> the data that it shows, as JSON

// Fills a box with what `rows()` makes of data, where they changed: else nothing in it moves. The link that had the focus
// keeps it.
export function swap(box, data, rows) {
  const text = JSON.stringify(data);
  if (filled.get(box) === text) return;
  filled.set(box, text);
  const focus = box.contains(document.activeElement) ? document.activeElement.hash : undefined;
  box.replaceChildren(...rows());
  if (focus) [...box.querySelectorAll("a")].find(({ hash }) => hash === focus)?.focus();
}

export function table(caption, heads, rows) {
  return make("table", {},
    make("caption", {}, caption),
    make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))),
    make("tbody", {}, ...rows.map(([first, ...cells]) =>
      make("tr", {}, make("th", { scope: "row" }, first), ...cells.map((cell) => make("td", {}, cell))))));
}

export function problem(box, error, again) {
  const button = make("button", { type: "button" }, "Try again");
  button.addEventListener("click", again);
  // A key that may not do it now will not be allowed to a moment later.
  box.replaceChildren(make("p", {}, cut(clean(error.message), 600)), error.status === 403 ? "" : button);
  box.hidden = false;
}
