// A line chart of the last minutes: an SVG that stretches, with all its words beside it in HTML, where they do not.

import { element, setText } from "./table.js";

const WIDTH = 300;
const HEIGHT = 64;
const GAP_S = 5; // between two points: a gap, as when the dashboard was away

function svg(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// The next of 1, 2, 5, 10, 20 ...
function roundUp(value) {
  const unit = 10 ** Math.floor(Math.log10(value));
  return unit * [1, 2, 5, 10].find((step) => step * unit >= value);
}

export class Chart {
  // lines: [{field, label, className}]; limit: the name of the field that is the most there may be.
  // least: the smallest upper end of the axis; format(value): as text, also of null.
  // axis: whether the times stand below.
  constructor({ title, lines, limit, least, format, keptS, axis = false }) {
    Object.assign(this, { title, lines, limit, least, format, keptS });
    this.value = element("span", { class: "value" });
    this.top = element("span", { class: "top", "aria-hidden": "true" });
    this.svg = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
    this.limitLine = svg("line", { class: "limit", x1: 0, x2: WIDTH, visibility: "hidden" });
    this.area = svg("path", { class: `area ${lines[0].className}` });
    this.paths = lines.map((line) => svg("path", { class: `line ${line.className}` }));
    this.cursor = svg("line", { class: "cursor", y1: 0, y2: HEIGHT, visibility: "hidden" });
    this.svg.append(this.limitLine, this.area, ...this.paths, this.cursor);
    const words = element("span", { class: "words" }, element("span", { class: "name" }, title));
    if (lines.length > 1) {
      for (const line of lines) words.append(" ", element("span", { class: `key ${line.className}` }, line.label));
    }
    this.begin = element("span");
    const times = element("p", { class: "axis", "aria-hidden": "true" }, this.begin, element("span", {}, "now"));
    const plot = element("div", { class: "plot" }, this.top);
    plot.append(this.svg);
    this.element = element("figure", { class: "chart" },
      element("figcaption", {}, words, " ", this.value), plot, ...(axis ? [times] : []));
    this.points = [];
    this.pointed = null;
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.point(null));
  }

  update(points, nowS) {
    this.points = points;
    this.nowS = nowS;
    // As long as there is little to show, it gets more room.
    this.spanS = [60, 120].find((seconds) => seconds >= nowS - (points[0]?.time_s ?? nowS)) ?? this.keptS;
    setText(this.begin, `${Math.round(this.spanS / 60)} min ago`);
    const values = this.lines.flatMap((line) => points.map((point) => point[line.field] ?? 0));
    const most = Math.max(0, ...values);
    const limit = points.reduce((largest, point) => Math.max(largest, point[this.limit] ?? 0), 0);
    // With a limit the axis ends just above it; its line is the scale.
    const end = limit > 0 ? Math.max(limit, most) * 1.08 : roundUp(Math.max(most, this.least));
    this.scale = end;
    setText(this.top, limit > 0 ? "" : this.format(end));
    this.lines.forEach((line, index) => this.paths[index].setAttribute("d", this.path(line.field)));
    this.area.setAttribute("d", this.path(this.lines[0].field, true));
    const now = points.at(-1)?.[this.limit] ?? 0;
    this.limitLine.setAttribute("visibility", now > 0 ? "visible" : "hidden");
    this.limitLine.setAttribute("y1", this.y(now));
    this.limitLine.setAttribute("y2", this.y(now));
    this.tell(most);
  }

  x(point) {
    return WIDTH * (1 - (this.nowS - point.time_s) / this.spanS);
  }

  y(value) {
    return HEIGHT - 1 - (HEIGHT - 2) * Math.min(1, value / this.scale);
  }

  // null is a gap, too. `closed`: down to the axis, to be filled.
  path(field, closed = false) {
    const parts = [];
    let start = null;
    let last = null;
    const end = () => {
      if (closed && start !== null) parts.push(`L${last} ${HEIGHT} L${start} ${HEIGHT} Z`);
      start = null;
    };
    let before = -Infinity;
    for (const point of this.points) {
      const value = point[field];
      if (value === null || point.time_s - before > GAP_S) end();
      if (value === null) continue;
      before = point.time_s;
      last = this.x(point).toFixed(2);
      parts.push(`${start === null ? "M" : "L"}${last} ${this.y(value).toFixed(2)}`);
      // A point alone between two gaps would show nothing.
      if (start === null) {
        start = last;
        parts.push("h0.01");
      }
    }
    end();
    return parts.join(" ");
  }

  describe(point) {
    const of = (point[this.limit] ?? null) !== null ? ` of ${point[this.limit]}` : "";
    return this.lines.map((line) =>
      `${this.lines.length > 1 ? `${line.label} ` : ""}${this.format(point[line.field])}${of}`).join(", ");
  }

  tell(most) {
    const last = this.points.at(-1);
    if (!last) return;
    setText(this.value, this.pointed === null ? this.describe(last) : this.describePointed());
    const minutes = Math.round(this.spanS / 60);
    const period = minutes === 1 ? "minute" : `${minutes} minutes`;
    this.svg.setAttribute("aria-label",
      `${this.title}: now ${this.describe(last)}; at most ${this.format(most)} in the last ${period}.`);
  }

  describePointed() {
    const timeS = this.nowS - this.spanS * (1 - this.pointed);
    const distance = (point) => Math.abs(point.time_s - timeS);
    const nearest = this.points.reduce((best, point) => (distance(point) < distance(best) ? point : best));
    this.cursor.setAttribute("x1", this.x(nearest));
    this.cursor.setAttribute("x2", this.x(nearest));
    return `${Math.round(this.nowS - nearest.time_s)} s ago: ${this.describe(nearest)}`;
  }

  point(event) {
    this.pointed = null;
    if (event && this.points.length > 0) {
      const box = this.svg.getBoundingClientRect();
      this.pointed = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    }
    this.cursor.setAttribute("visibility", this.pointed === null ? "hidden" : "visible");
    const last = this.points.at(-1);
    if (last) setText(this.value, this.pointed === null ? this.describe(last) : this.describePointed());
  }
}
