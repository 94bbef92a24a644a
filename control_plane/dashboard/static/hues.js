// Colours that tell names apart; the style sheet says what they are.

const HUES = 7; // and 0, for what has none of its own
const GENERAL = 0;
const USUAL = { general: GENERAL, legal: 3, financial: 4, hr: 5, engineering: 1 };

// A number for each name: mostly the same wherever the name comes up, and another one for each of the first seven.
export function hues(names) {
  const found = new Map();
  const free = new Set(Array.from({ length: HUES }, (_, place) => place + 1));
  const all = [...new Set(names)].filter(Boolean).sort();
  for (const name of all.filter((one) => Object.hasOwn(USUAL, one))) {
    found.set(name, USUAL[name]);
    free.delete(USUAL[name]);
  }
  for (const name of all.filter((one) => !found.has(one))) {
    const wanted = hash(name) % HUES;
    const hue = Array.from({ length: HUES }, (_, step) => ((wanted + step) % HUES) + 1).find((one) => free.has(one)) ?? GENERAL;
    found.set(name, hue);
    free.delete(hue);
  }
  found.set("", GENERAL);
  return found;
}

function hash(text) {
  let sum = 0;
  for (const char of text) sum = (Math.imul(sum, 31) + char.codePointAt(0)) >>> 0;
  return sum;
}
