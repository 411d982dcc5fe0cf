// A table whose rows stay the same elements while what they show changes: a selection, the focus and an opened stack
// survive the next answer. Everything goes in as text.

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// A column: {key, label, text(row)}, and where needed sort(row): a number or text to sort by, className, state(row), or
// for a cell that opens short(row) and stack(row). Numbers begin with the largest.
export class Table {
  constructor(parent, { label, columns, sortBy, empty, filter, identity }) {
    this.columns = columns;
    this.empty = empty;
    this.identity = identity;
    this.rows = [];
    this.more = 0;
    this.elements = new Map();
    this.sorted = columns.find((column) => column.key === sortBy);
    this.descending = true;
    this.filter = filter;
    this.headers = new Map();
    const head = element("tr", { role: "row" });
    for (const column of columns) {
      const button = element("button", { type: "button" }, column.label);
      button.addEventListener("click", () => this.sort(column));
      const header = element("th", { role: "columnheader", scope: "col", "data-key": column.key }, button);
      this.headers.set(column, header);
      head.append(header);
    }
    // The roles are repeated because a narrow page shows rows as blocks, which takes their meaning from them.
    this.body = element("tbody", { role: "rowgroup" });
    this.table = element("table", { role: "table", "aria-label": label },
      element("thead", { role: "rowgroup" }, head), this.body);
    this.note = element("p", { class: "quiet" });
    parent.append(this.table, this.note);
    filter?.addEventListener("input", () => this.show());
    this.markSorted();
  }

  sort(column) {
    this.descending = column === this.sorted ? !this.descending : this.isNumeric(column);
    this.sorted = column;
    this.markSorted();
    this.show();
  }

  isNumeric(column) {
    return this.rows.length > 0 && typeof this.value(column, this.rows[0]) === "number";
  }

  markSorted() {
    for (const [column, header] of this.headers) {
      if (column === this.sorted) header.setAttribute("aria-sort", this.descending ? "descending" : "ascending");
      else header.removeAttribute("aria-sort");
    }
  }

  value(column, row) {
    return column.sort ? column.sort(row) : column.text(row);
  }

  update(rows, more = 0) {
    this.rows = rows;
    this.more = more;
    this.show();
  }

  show() {
    const wanted = this.filter?.value.trim().toLowerCase() ?? "";
    const matching = wanted === "" ? this.rows : this.rows.filter((row) =>
      this.columns.some((column) => column.text(row).toLowerCase().includes(wanted)));
    const direction = this.descending ? -1 : 1;
    const ordered = [...matching].sort((a, b) => {
      const [x, y] = [this.value(this.sorted, a), this.value(this.sorted, b)];
      return direction * (typeof x === "number" ? x - y : x.localeCompare(y));
    });
    const used = new Map();
    let before = null;
    for (const row of ordered) {
      const id = JSON.stringify(this.identity(row));
      const count = (used.get(id) ?? 0) + 1;
      used.set(id, count);
      const key = `${id} ${count}`; // two that look the same are told apart by their order
      const shown = this.elements.get(key) ?? this.add(key);
      shown.fill(row);
      shown.fresh = true;
      const next = before ? before.nextSibling : this.body.firstChild;
      if (next !== shown.row) this.body.insertBefore(shown.row, next);
      before = shown.row;
    }
    for (const [key, shown] of this.elements) {
      if (shown.fresh) shown.fresh = false;
      else {
        shown.row.remove();
        this.elements.delete(key);
      }
    }
    this.table.hidden = this.rows.length === 0;
    this.tell(matching.length, wanted);
  }

  tell(matching, wanted) {
    let text = "";
    if (this.rows.length === 0) text = this.empty;
    else if (wanted !== "") text = `${matching} of ${this.rows.length} match the filter.`;
    if (this.more > 0) text += ` ${this.more} more are not shown.`;
    setText(this.note, text.trim());
    this.note.hidden = text === "";
  }

  add(key) {
    const row = element("tr", { role: "row" });
    const fillers = this.columns.map((column) => {
      const cell = element("td", { role: "cell", "data-label": column.label, class: column.className ?? "" });
      row.append(cell);
      return column.stack ? stackFiller(cell, column) : (values) => {
        setText(cell, column.text(values));
        if (column.state) cell.dataset.state = column.state(values);
      };
    });
    const shown = { row, fill: (values) => fillers.forEach((fill) => fill(values)), fresh: true };
    this.elements.set(key, shown);
    return shown;
  }
}

// The innermost call site in short, which opens to show all of them in full.
function stackFiller(cell, column) {
  const summary = element("summary");
  const frames = element("ol");
  cell.append(element("details", {}, summary, frames));
  return (row) => {
    const sites = column.stack(row);
    setText(summary, column.short(row));
    while (frames.children.length > sites.length) frames.lastChild.remove();
    sites.forEach((text, index) => {
      if (!frames.children[index]) frames.append(element("li"));
      setText(frames.children[index], text);
    });
  };
}
