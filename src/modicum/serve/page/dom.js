/* Elements are made here and nowhere else: what comes from the server is always text, never markup. */

const SVG = "http://www.w3.org/2000/svg";

function built(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

export const h = (tag, attributes = {}, ...children) => built(document.createElement(tag), attributes, children);
export const svg = (tag, attributes = {}, ...children) => built(document.createElementNS(SVG, tag), attributes, children);
export const $ = (id) => document.getElementById(id);

/* a table: columns are [title, kind], rows lists of texts or elements; the first cell of a row is its header */
export function table(caption, columns, rows, nothing) {
  if (rows.length === 0) return h("p", { class: "small" }, nothing);
  const cell = (value, index) => (index === 0 ? h("th", { scope: "row" }, value) : h("td", { class: columns[index][1] }, value));
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    h("table", {},
      h("caption", { class: "hidden" }, caption),
      h("thead", {}, h("tr", {}, columns.map(([title, kind]) => h("th", { scope: "col", class: kind }, title)))),
      h("tbody", {}, rows.map((row) => h("tr", {}, row.map(cell))))));
}

/* draws anew only what has changed, and gives the focus back to the element with the same data-key */
const drawn = new WeakMap();
export function show(place, data, build) {
  const text = JSON.stringify(data);
  if (drawn.get(place) === text) return;
  drawn.set(place, text);
  const key = place.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  const scrolled = [...place.querySelectorAll(".scroll")].map((part) => part.scrollLeft);
  place.replaceChildren(...[build(data)].flat());
  place.querySelectorAll(".scroll").forEach((part, index) => { part.scrollLeft = scrolled[index] ?? 0; });
  if (key !== undefined) place.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus();
}

export function wipe(place) {
  drawn.delete(place);
  place.replaceChildren();
}

export function say(text, wrong = false) {
  const place = $("status");
  if (place.textContent === text) return;
  place.textContent = text;
  place.classList.toggle("wrong", wrong);
}

/* whether somebody who was asked says yes; the focus goes back to where it was */
let settle = () => {};
export function ask(title, text, yes) {
  settle(false);
  $("ask-title").textContent = title;
  $("ask-text").textContent = text;
  $("ask-yes").textContent = yes;
  $("ask").returnValue = "no";
  $("ask").showModal();
  return new Promise((resolve) => { settle = resolve; });
}
/* may come after the dialog was opened again */
$("ask").addEventListener("close", () => { if (!$("ask").open) settle($("ask").returnValue === "yes"); });

/* numbers as people read them */
const LOCALE = "en";
export const count = (value) => (value === null || value === undefined ? "–" : Math.round(value).toLocaleString(LOCALE));
export function short(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  for (const [size, unit] of [[1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (Math.abs(value) >= size) return `${digits(value / (unit === "k" ? 1e3 : size))} ${unit}`;
  }
  return digits(value);
}
export const digits = (value) => Number(value.toPrecision(3)).toLocaleString(LOCALE, { maximumSignificantDigits: 3 });
export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  if (value < 1e-3) return `${digits(value * 1e6)} µs`;
  return value < 1 ? `${digits(value * 1e3)} ms` : `${digits(value)} s`;
}
export function bytes(value) {
  if (value === null || value === undefined) return "–";
  const power = Math.min(4, Math.floor(Math.log2(Math.max(1, value)) / 10));
  return `${digits(value / 1024 ** power)} ${["B", "KiB", "MiB", "GiB", "TiB"][power]}`;
}
export const percent = (share) => (share === null || share === undefined ? "–" : `${digits(share * 100)} %`);
export const moment = (at) => new Date(typeof at === "number" ? at * 1000 : at)
  .toLocaleString("sv-SE", { dateStyle: "short", timeStyle: "medium" });
