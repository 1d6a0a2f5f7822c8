/* Plots over time, as wide as their place: lines of SVG, a legend with the values at the cursor, and a cursor that follows
   the pointer and the arrow keys. */

import { h, svg } from "./dom.js";

const SPANS = [60, 120, 300, 600, 1800, 3600];
const HEIGHT = 168, LEFT = 52, RIGHT = 10, TOP = 8, BOTTOM = 22;

/* the highest tick and the distance of ticks, so that up to four lie below; bytes have round numbers of their own */
function ticks(most, binary) {
  if (!(most > 0)) return [1, 1];
  const rough = most / 4, power = binary ? 2 ** Math.floor(Math.log2(rough)) : 10 ** Math.floor(Math.log10(rough));
  const step = (binary ? [1, 1.5, 2] : [1, 2, 2.5, 5, 10]).map((one) => one * power).find((one) => one >= rough * 0.999);
  return [Math.ceil(most / step - 1e-9) * step, step];
}

export class Plot {
  /* series: [{ name, field }]; written: number -> text; least: what the axis reaches at least */
  constructor(title, series, written, { least = 0, binary = false } = {}) {
    Object.assign(this, { title, series, written, least, binary, held: null, frames: { at: [] }, span: 600 });
    this.values = series.map(() => h("b", {}, "–"));
    this.time = h("span", { class: "small" });
    const legend = series.map((one, index) =>
      h("li", {}, svg("svg", { class: `key s${index}`, viewBox: "0 0 22 8", "aria-hidden": "true" },
        svg("path", { class: "line", d: "M1 4H21" })), h("span", {}, one.name), " ", this.values[index]));
    this.drawing = svg("svg", { class: "plot", tabindex: "0", role: "img", "aria-roledescription": "plot" });
    this.element = h("figure", {}, h("figcaption", {}, h("h3", {}, title), this.time), this.drawing, h("ul", { class: "legend" }, legend));
    this.drawing.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.drawing.addEventListener("pointerleave", () => this.put(null));
    this.drawing.addEventListener("blur", () => this.put(null));
    this.drawing.addEventListener("keydown", (event) => this.press(event));
    new ResizeObserver(() => this.draw()).observe(this.element);
  }

  /* the frame that is read: the one that is held, or the newest */
  get place() {
    const found = this.held === null ? -1 : this.frames.at.findIndex((at) => at >= this.held);
    return found < 0 ? this.frames.at.length - 1 : found;
  }

  update(frames, most, now) {
    /* a server that started lately fills the width sooner */
    const known = frames.at.length ? now - frames.at[0] : 0;
    const span = SPANS.find((one) => one >= known && one <= most) ?? most;
    Object.assign(this, { frames, span, now, gap: most > 600 ? 25 : 5 });
    this.draw();
  }

  x(at) { return LEFT + (this.width - LEFT - RIGHT) * (1 - (this.now - at) / this.span); }
  y(value) { return TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / this.top); }
  value(index, place) {
    const found = this.frames[this.series[index].field]?.[place];
    return found ?? null;
  }

  draw() {
    const width = Math.floor(this.drawing.getBoundingClientRect().width);
    if (width < LEFT + RIGHT + 20 || this.now === undefined) return;
    this.width = width;
    const all = this.series.flatMap((_, index) => this.frames.at.map((_, place) => this.value(index, place) ?? 0));
    let step;
    [this.top, step] = ticks(Math.max(this.least, ...all), this.binary);
    const levels = [];
    for (let level = 0; level <= this.top + step / 2; level += step) levels.push(level);
    this.drawing.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.mark = svg("path", { class: "cursor" });
    this.drawing.replaceChildren(
      ...levels.flatMap((level) => [
        svg("path", { class: "rule", d: `M${LEFT} ${this.y(level)}H${width - RIGHT}` }),
        svg("text", { x: LEFT - 6, y: this.y(level) + 4, "text-anchor": "end" }, this.written(level)),
      ]),
      ...this.times(),
      ...this.series.map((_, index) => svg("path", { class: `line s${index}`, d: this.path(index) })),
      this.mark);
    this.tell();
  }

  times() {
    const ago = (seconds) => (seconds === 0 ? "now" : seconds % 60 ? `−${seconds} s` : `−${seconds / 60} min`);
    return [[1, "start"], [0.5, "middle"], [0, "end"]].map(([share, anchor]) =>
      svg("text", { x: this.x(this.now - share * this.span), y: HEIGHT - 6, "text-anchor": anchor }, ago(share * this.span)));
  }

  /* a line where there are values; a dot where there is one alone */
  path(index) {
    let path = "", open = false, before = -Infinity;
    this.frames.at.forEach((at, place) => {
      const value = this.value(index, place), x = this.x(at);
      if (value === null || x < LEFT - 1) { open = false; return; }
      if (at - before > this.gap) open = false;
      path += `${open ? "L" : "M"}${x.toFixed(1)} ${this.y(value).toFixed(1)}`;
      if (!open) path += "h.01";
      [open, before] = [true, at];
    });
    return path;
  }

  point(x) {
    const at = this.now - this.span * (1 - (x - LEFT) / (this.width - LEFT - RIGHT));
    let best = null;
    this.frames.at.forEach((one, place) => {
      if (best === null || Math.abs(one - at) < Math.abs(this.frames.at[best] - at)) best = place;
    });
    this.put(best);
  }

  press(event) {
    const last = this.frames.at.length - 1;
    const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -30, PageDown: 30, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined || last < 0) return;
    event.preventDefault();
    this.put(Math.max(0, Math.min(last, this.place + step)));
  }

  put(place) {
    this.held = place === null ? null : this.frames.at[place];
    this.tell();
  }

  tell() {
    const place = this.place;
    const words = this.series.map((one, index) => {
      const value = place < 0 ? null : this.value(index, place);
      this.values[index].textContent = value === null ? "–" : this.written(value);
      return `${one.name} ${this.values[index].textContent}`;
    });
    const at = this.held === null || place < 0 ? "" : new Date(this.frames.at[place] * 1000).toLocaleTimeString("sv-SE");
    this.time.textContent = at;
    this.mark?.setAttribute("d", at === "" ? "" : `M${this.x(this.frames.at[place]).toFixed(1)} ${TOP}V${HEIGHT - BOTTOM}`);
    this.drawing.setAttribute("aria-label", `${this.title}${at && `, ${at}`}: ${words.join(", ")}`);
  }
}
