// Asks the server for what is new, and shows it.

import { Chart } from "./chart.js";
import { Table, element, setText } from "./table.js";

const RETRY_MS = 1000;
const OLD_S = 5;
const COUNTS = [
  ["idle", "idle"], ["connects", "connects"], ["checkouts", "checkouts"], ["invalidated", "invalidated"],
  ["kills", "statements killed"], ["teardown_failures", "failed teardowns"], ["retries", "retries"],
];

const get = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

function count(value) {
  return value === null ? "–" : number.format(value);
}

function duration(seconds) {
  if (seconds === null) return "–";
  if (seconds < 0.0995) return `${number.format(seconds * 1000)} ms`;
  if (seconds < 9.95) return `${seconds.toFixed(2)} s`;
  if (seconds < 99.5) return `${seconds.toFixed(1)} s`;
  const minutes = Math.floor(seconds / 60);
  return minutes < 60 ? `${minutes} min ${Math.floor(seconds % 60)} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// The histograms' first bucket ends at a millisecond: what is below, nobody knows.
function wait(seconds) {
  return seconds !== null && seconds <= 0.001 ? "≤ 1 ms" : duration(seconds);
}

// -- databases --------------------------------------------------------------------------------------------------

class Card {
  constructor(name, keptS) {
    this.points = [];
    this.keptS = keptS;
    this.use = element("span", { class: "use" });
    this.backend = element("span", { class: "quiet" });
    this.fill = element("div", { class: "fill" });
    this.meter = element("div", { class: "meter", role: "meter", "aria-label": `${name}: in use`, "aria-valuemin": 0 }, this.fill);
    this.facts = new Map();
    const list = element("dl", { class: "facts" });
    for (const key of ["waiting", "checkouts/s", "wait p50", "wait p99", "timeouts"]) list.append(this.fact(key, key));
    const counts = element("dl", { class: "facts" });
    for (const [key, label] of COUNTS) counts.append(this.fact(key, label));
    this.charts = [
      new Chart({ title: "In use", lines: [{ field: "in_use", className: "a" }], limit: "limit", least: 1, format: count, keptS }),
      new Chart({ title: "Waiting", lines: [{ field: "waiting", className: "w" }], least: 1, format: count, keptS }),
      new Chart({
        title: "Wait", least: 0.01, format: wait, keptS, axis: true,
        lines: [{ field: "wait_p50_s", label: "p50", className: "a" }, { field: "wait_p99_s", label: "p99", className: "b" }],
      }),
    ];
    this.element = element("article", { class: "card" },
      element("div", { class: "bar" }, element("h2", {}, name), this.backend, this.use),
      this.meter, list, ...this.charts.map((chart) => chart.element),
      element("details", {}, element("summary", {}, "Since the workers began"), counts));
  }

  fact(key, label) {
    const value = element("dd", {}, "–");
    this.facts.set(key, value);
    return element("div", {}, element("dt", {}, label), value);
  }

  update({ backend, counts, timed_out_s: timedOutS, points }, fields, nowS) {
    for (const values of points) this.points.push(Object.fromEntries(fields.map((field, index) => [field, values[index]])));
    this.points = this.points.filter((point) => nowS - point.time_s <= this.keptS);
    for (const chart of this.charts) chart.update(this.points, nowS);
    this.element.classList.toggle("gone", counts === null);
    const now = this.points.at(-1);
    if (counts === null || !now) {
      setText(this.use, "no worker has it");
      return;
    }
    const { in_use: inUse, limit } = now;
    setText(this.backend, backend);
    setText(this.use, limit === null ? `${inUse} in use, no limit` : `${inUse} of ${limit} in use`);
    const part = limit ? Math.min(1, inUse / limit) : 0;
    this.fill.style.width = `${100 * part}%`;
    this.meter.hidden = limit === null;
    this.meter.setAttribute("aria-valuemax", limit ?? 0);
    this.meter.setAttribute("aria-valuenow", inUse);
    this.element.dataset.level = now.waiting > 0 ? "waiting" : part >= 0.8 ? "high" : "fine";
    const facts = {
      waiting: count(now.waiting),
      "checkouts/s": count(now.checkouts_per_s),
      "wait p50": wait(now.wait_p50_s),
      "wait p99": wait(now.wait_p99_s),
      timeouts: count(counts.timeouts),
      ...Object.fromEntries(COUNTS.map(([key]) => [key, count(counts[key])])),
    };
    for (const [key, value] of Object.entries(facts)) setText(this.facts.get(key), value);
    this.facts.get("waiting").classList.toggle("bad", now.waiting > 0);
    this.facts.get("timeouts").classList.toggle("bad", timedOutS !== null && nowS - timedOutS <= this.keptS);
  }
}

const cards = new Map();

function showDatabases({ databases, point: fields, kept_s: keptS, time_s: timeS }) {
  for (const [name, card] of cards) {
    if (!databases.some((database) => database.name === name)) {
      card.element.remove();
      cards.delete(name);
    }
  }
  for (const database of databases) {
    if (!cards.has(database.name)) {
      const card = new Card(database.name, keptS);
      cards.set(database.name, card);
      const after = databases.slice(databases.indexOf(database) + 1).find((other) => cards.has(other.name));
      get("databases").insertBefore(card.element, after ? cards.get(after.name).element : null);
    }
    cards.get(database.name).update(database, fields, timeS);
  }
}

// -- tables -----------------------------------------------------------------------------------------------------

// The folders in front say little and need the room.
function shortCallSite(row) {
  return row.place.replace(/^.*\/(?=[^/]+\/[^/]+:\d+ in )/, "…/");
}

function stackOf(row) {
  const now = row.stack.length > 0 ? row.stack : [row.place];
  return [...now, ...row.taken_at.map((each, index) => (index === 0 ? `checked out at ${each}` : each))];
}

function pid(row) {
  return row.late_s > 0 ? `${row.pid}, ${Math.round(row.late_s)} s old` : String(row.pid);
}

const holders = new Table(get("holders"), {
  label: "Who holds a connection",
  sortBy: "held_s",
  empty: "Nobody holds a connection.",
  filter: get("holders-filter"),
  identity: (row) => [row.pid, row.database, row.greenlet, row.scope],
  columns: [
    { key: "held_s", label: "held", text: (row) => duration(row.held_s), sort: (row) => row.held_s, className: "number" },
    { key: "state", label: "state", text: (row) => row.state, state: (row) => row.state },
    { key: "state_s", label: "for", text: (row) => duration(row.state_s), sort: (row) => row.state_s, className: "number" },
    { key: "scope", label: "scope", text: (row) => row.scope, className: "strong" },
    { key: "place", label: "now at", text: (row) => stackOf(row).join("\n"), short: shortCallSite, stack: stackOf, className: "code" },
    { key: "statement", label: "last statement", text: (row) => row.statement ?? "–", className: "code" },
    { key: "database", label: "database", text: (row) => row.database },
    { key: "pid", label: "pid", text: pid, sort: (row) => row.pid, className: "number" },
  ],
});

function sessions(row) {
  return row.sessions.map((each) => (each.in_transaction ? `${each.database} (in transaction)` : each.database)).join(", ");
}

const scopes = new Table(get("scopes"), {
  label: "Units of work with sessions",
  sortBy: "age_s",
  empty: "No unit of work has a session.",
  filter: get("scopes-filter"),
  identity: (row) => [row.pid, row.kind, row.label],
  columns: [
    { key: "age_s", label: "age", text: (row) => duration(row.age_s), sort: (row) => row.age_s, className: "number" },
    { key: "label", label: "scope", text: (row) => row.label, className: "strong" },
    { key: "kind", label: "kind", text: (row) => row.kind },
    { key: "sessions", label: "sessions", text: sessions },
    { key: "pid", label: "pid", text: pid, sort: (row) => row.pid, className: "number" },
  ],
});

// -- the state line ---------------------------------------------------------------------------------------------

let received = null; // the age of the last answer's data, of which workers it is older, and when it came
let lost = false;
let paused = false;

function showState({ workers, summary, level }) {
  setText(get("state"), summary);
  get("light").dataset.level = level;
  const folder = get("notice").dataset.folder;
  notice(workers > 0 ? "" : `No worker answers in ${folder}. Is the application running, with DBSESSION_INSPECT set to that folder? ` +
    "This page goes on by itself when one does.");
}

function notice(text) {
  setText(get("notice"), text);
  get("notice").hidden = text === "";
}

function showAge() {
  if (received === null) return;
  const ageS = received.ageS + (performance.now() - received.at) / 1000;
  const old = ageS >= OLD_S;
  const age = paused ? `paused, as of ${duration(ageS)} ago` : old ? `as of ${duration(ageS)} ago` : "live";
  const late = received.late.map(([pid, lateS]) => `, pid ${pid} is late: ${Math.round(lateS)} s old`);
  setText(get("age"), age + late.join(""));
  document.body.classList.toggle("old", lost || (old && !paused));
}

function showLost() {
  if (!lost) {
    lost = true;
    setText(get("state"), "The dashboard does not answer");
    get("light").dataset.level = "bad";
    notice("The dashboard's own process does not answer: it has ended, or the network is down. This page tries again each second.");
  }
}

// -- asking -----------------------------------------------------------------------------------------------------

let cursor = "";
let timer = null;
let turn = 0; // counts what was scheduled: an answer to an earlier turn's question comes too late

async function ask() {
  const response = await fetch(`state?since=${encodeURIComponent(cursor)}`, { signal: AbortSignal.timeout(5000) });
  if (!response.ok) throw new Error(`status ${response.status}`);
  return response.json();
}

function show(answer) {
  cursor = answer.cursor;
  lost = false;
  received = { ageS: answer.age_s, late: answer.late, at: performance.now() };
  showState(answer);
  showDatabases(answer);
  holders.update(answer.holders, answer.more_holders);
  scopes.update(answer.scopes, answer.more_scopes);
}

async function poll() {
  const mine = turn;
  let pauseMs = RETRY_MS;
  try {
    const answer = await ask();
    if (mine !== turn) return;
    show(answer);
    pauseMs = answer.interval_s * 1000;
  } catch (error) {
    if (mine !== turn) return;
    console.debug(error);
    showLost();
  }
  showAge();
  schedule(pauseMs);
}

function schedule(pauseMs) {
  clearTimeout(timer);
  turn += 1;
  // A page that nobody sees does not ask.
  if (!paused && !document.hidden) timer = setTimeout(poll, pauseMs);
}

get("pause").addEventListener("click", () => {
  paused = !paused;
  get("pause").setAttribute("aria-pressed", String(paused));
  showAge();
  schedule(0);
});
document.addEventListener("visibilitychange", () => schedule(0));
setInterval(showAge, 1000);
poll();
