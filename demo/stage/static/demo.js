"use strict";

const SHOWN = 24; // pairs
const AXES = [1, 2, 4, 8, 15, 30, 60]; // seconds that the time axis may be long
const SILENT = 5; // seconds after which a process is taken for gone
const PATIENCE = 400; // milliseconds after which the client that leaves does so
const STRIP = 16;
const SVG = "http://www.w3.org/2000/svg";
const SIDES = ["scoped", "background", "stock"];

const byId = (id) => document.getElementById(id);
const all = (selector) => document.querySelectorAll(selector);
const now = () => Date.now() / 1000 - (ahead === Infinity ? 0 : ahead);
const number = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

let ahead = Infinity; // seconds by which this clock is before the servers'
let axis = AXES[0];
let likes = null;
let lastNews = Date.now();
const django = `stock Django ${document.body.dataset.django}`;
const pairs = new Map(); // by what the rows of a click have in common: {item, sides}
const processes = new Map(); // by name: {gauges, heard}

function set(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function seconds(time) {
  if (time < 60) return time < 10 ? `${time.toFixed(2)} s` : `${Math.floor(time)} s`;
  const minutes = Math.floor(time / 60);
  return minutes < 60 ? `${minutes} min ${Math.floor(time % 60)} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// 1 · Run it

const labels = new Map();
for (const button of all("[data-send]")) {
  labels.set(button.dataset.send, button.textContent);
  button.addEventListener("click", () => send(button));
}
for (const button of all("[data-run]")) button.addEventListener("click", () => run(button));
byId("reset").addEventListener("click", async () => {
  const answer = await post("/reset");
  if (!answer) say("Not given back: the server is away.");
});

// The answer, or null where there was none.
async function post(path, headers = {}, signal = undefined) {
  try {
    const answer = await fetch(path, { method: "POST", headers, signal });
    await answer.text();
    return answer;
  } catch {
    return null;
  }
}

// By the name that this page is called by, whatever proxies there are.
for (const line of all("[data-path]")) set(line, `curl -X POST ${location.origin}${line.dataset.path}`);

const nothingToSay = byId("answer").textContent;

function say(text) {
  set(byId("answer"), text || nothingToSay);
  byId("answer").classList.toggle("told", Boolean(text));
}

async function run(button) {
  say("");
  const answer = await post(`/run/${button.dataset.run}`);
  if (!answer) say("Not sent: the server is away.");
  else if (answer.status === 409) say("A run is going on already: wait for its end.");
  else if (!answer.ok) say(`The server refused it: ${answer.status}.`);
}

async function send(button) {
  const name = button.dataset.send;
  showCode(name);
  say("");
  const pair = `click-${Math.random().toString(36).slice(2, 12)}`;
  const sides = "pair" in button.dataset ? ["scoped", "stock"] : ["scoped"];
  const leaving = "leaves" in button.dataset ? AbortSignal.timeout(PATIENCE) : undefined;
  const answers = await Promise.all(sides.map((side) => post(`/${side}/${name}`, { "X-Pair": pair }, leaving)));
  // What breaks off has no answer either. Of what has arrived the page hears in a moment.
  if (answers.some((answer) => answer)) return;
  setTimeout(() => {
    if (!pairs.has(pair)) say(`“${labels.get(name)}” was not sent: the server is away.`);
  }, 1500);
}

function showCode(name) {
  for (const button of all("[data-send]")) button.setAttribute("aria-pressed", String(button.dataset.send === name));
  for (const code of all("[data-code]")) code.hidden = code.dataset.code !== name;
  set(byId("code-of"), labels.get(name));
}

// Listen

let after = document.body.dataset.after; // the latest message

function listen() {
  const events = new EventSource(`${document.body.dataset.events}?after=${after}`);
  events.onmessage = ({ data }) => showMessage(JSON.parse(data));
  events.addEventListener("timeline", ({ data }) => hear(JSON.parse(data)));
  events.onerror = () => {
    showState(false);
    // It tries again by itself, but not where a proxy has answered that there is no server.
    if (events.readyState === EventSource.CLOSED) setTimeout(listen, 1000);
  };
}
listen();

function showState(isHere) {
  document.body.classList.toggle("away", !isHere);
  set(byId("state"), isHere ? "live" : "the server is away: this page waits for it");
}

function hear(report) {
  if (report.process) {
    lastNews = Date.now();
    showState(true);
    ahead = Math.min(ahead, Date.now() / 1000 - report.now);
    if (report.gauges) {
      const before = processes.get(report.process)?.gauges ?? {};
      processes.set(report.process, { gauges: { ...before, ...report.gauges }, heard: now() });
      if ((report.gauges.likes ?? likes) !== likes) {
        likes = report.gauges.likes;
        for (const pair of pairs.values()) pair.sides.forEach(tell);
      }
      if (report.gauges.activity !== undefined) showActivity(report.gauges);
    } else processes.delete(report.process);
    showGauges();
  }
  if (report.score) showScore(report.score);
  report.rows.forEach(keep);
  stretch();
}

// 3 · What became of the connections

function keep(data) {
  const [, side, name] = data.title.match(/^POST \/(scoped|stock)\/([\w-]+)$/) ?? [];
  const isTask = data.kind === "background" && data.pair;
  if (!(side && labels.has(name)) && !isTask) return; // pages and files are not what this is about
  const key = data.pair || data.id;
  const pair = pairs.get(key) ?? begin(key, data);
  if (name) {
    set(pair.item.querySelector(".what b"), labels.get(name));
    pair.item.dataset.name = name;
  }
  const kind = data.kind;
  if (!pair.sides.has(kind)) {
    const item = byId("side").content.cloneNode(true).firstElementChild;
    item.dataset.kind = kind;
    pair.sides.set(kind, { item });
    const order = [...pair.sides.keys()].sort((one, other) => SIDES.indexOf(one) - SIDES.indexOf(other));
    pair.item.querySelector(".sides").replaceChildren(...order.map((one) => pair.sides.get(one).item));
  }
  const lane = pair.sides.get(kind);
  lane.data = data;
  lane.heard = now();
  lane.item.dataset.id = data.id;
  draw(lane);
  judge(pair);
}

function begin(key, data) {
  const item = byId("pair").content.cloneNode(true).firstElementChild;
  const pair = { item, began: data.began, sides: new Map() };
  item.dataset.key = key;
  set(item.querySelector(".when"), new Date(data.began * 1000).toTimeString().slice(0, 8));
  document.querySelector("#rows .none")?.remove();
  const next = [...pairs.values()].filter((other) => other.began > data.began).sort((one, other) => one.began - other.began)[0];
  if (next) next.item.after(item);
  else byId("rows").prepend(item);
  pairs.set(key, pair);
  const oldest = [...pairs.entries()].sort(([, one], [, other]) => one.began - other.began);
  for (const [old, { item: gone }] of oldest.slice(0, Math.max(0, pairs.size - SHOWN))) {
    gone.remove();
    pairs.delete(old);
  }
  return pair;
}

const isOpen = (bar) => bar.ended === null && bar.taken === null;
const lostOf = (data) => (data.ended === null ? [] : data.bars.filter((bar) => bar.ready !== null && bar.ended === null));
const isLive = ({ data }) => data.ended === null || data.bars.some(isOpen);

// For as long as it lived; what is lost runs on, past any axis.
function lived({ data, heard }) {
  const last = data.ended ?? (now() - heard > SILENT ? heard : now());
  return Math.max(last, ...data.bars.map((bar) => bar.ended ?? 0)) - data.began;
}

function stretch() {
  const lanes = [...pairs.values()].flatMap((pair) => [...pair.sides.values()]);
  const longest = Math.max(0, ...lanes.map(lived));
  const needed = AXES.find((one) => one >= longest * 1.02) ?? AXES.at(-1);
  if (needed === axis && byId("axis").children.length) return;
  axis = needed;
  const step = axis <= 1 ? 0.25 : axis <= 2 ? 0.5 : axis <= 4 ? 1 : axis <= 8 ? 2 : axis <= 15 ? 5 : axis / 6;
  byId("axis").replaceChildren();
  for (let time = 0; time <= axis; time += step) {
    const text = byId("axis").appendChild(document.createElementNS(SVG, "text"));
    text.setAttribute("x", `${(time / axis) * 100}%`);
    text.setAttribute("y", "12");
    text.textContent = `${time} s`;
  }
  lanes.forEach(draw);
}

// One strip for each name: ten connections of one request are ten bars in one strip.
function strips(bars) {
  const names = [...new Set(bars.map((bar) => bar.name))];
  return names.map((name) => bars.filter((bar) => bar.name === name));
}

function draw(lane) {
  const { data, item } = lane;
  const end = data.ended ?? data.began + lived(lane);
  const percent = (time) => Math.min(Math.max((time - data.began) / axis, 0), 1) * 100;
  const shapes = [];
  const bar = (kind, from, to, strip, height) => {
    const width = Math.max(percent(to) - percent(from), 0.2);
    const y = strip * STRIP + (STRIP - height) / 2;
    shapes.push(["rect", { class: kind, x: `${percent(from)}%`, y, width: `${width}%`, height, rx: 2 }]);
  };
  const rows = strips(data.bars);
  const height = STRIP * (rows.length + 1);
  for (let tick = 0; tick <= 4; tick += 1) {
    shapes.push(["line", { class: "grid", x1: `${tick * 25}%`, x2: `${tick * 25}%`, y1: 0, y2: height }]);
  }
  bar("request", data.began, end, 0, 3);
  if (data.first_byte !== null) bar("bytes", data.first_byte, data.last_byte ?? end, 0, 7);
  rows.forEach((strip, index) => {
    for (const one of [...strip].sort((a, b) => (a.ready ?? 0) - (b.ready ?? 0))) {
      const isLost = lostOf(data).includes(one);
      const to = one.ended ?? (isLost ? (one.taken ?? data.began + axis) : end);
      if (one.ready === null) {
        bar(one.error ? "failed" : "wait", one.began, to, index + 1, 10);
        continue;
      }
      bar("edge", one.began, isLost ? end : to, index + 1, 10);
      bar("held", one.ready, isLost ? end : (one.closing ?? to), index + 1, 10);
      if (isLost) bar("lost", data.ended, to, index + 1, 10);
      if (one.error && one.closing !== null) bar("failed", one.closing, to, index + 1, 10);
    }
  });
  paint(item.querySelector(".lane"), shapes, height);
  const names = rows.map((strip) => (strip.length > 1 ? `${strip[0].name} × ${strip.length}` : strip[0].name));
  const who = item.querySelector(".who");
  const said = [data.kind === "background" ? "its task" : data.kind, ...names];
  while (who.children.length > said.length) who.lastChild.remove();
  said.forEach((text, index) => set(who.children[index] ?? who.appendChild(document.createElement(index ? "span" : "b")), text));
  tell(lane);
  const spoken = data.bars.map((one) => `${one.name} ${fate(data, one)}`);
  const label = [`${said[0]}: request ${seconds(end - data.began)}`, ...spoken].join(", ");
  item.querySelector(".lane").setAttribute("aria-label", label);
  item.dataset.ending = data.ending ?? "open";
  item.dataset.lost = String(lostOf(data).filter(isOpen).length);
}

function fate(data, bar) {
  if (bar.error && bar.ready === null) return "not set up";
  if (bar.ready === null) return "waits";
  if (bar.ended !== null) return `held for ${seconds(bar.ended - bar.ready)}`;
  if (bar.taken !== null) return "lost, and taken back";
  return data.ended === null ? "held" : "lost";
}

function paint(svg, shapes, height) {
  svg.style.height = `${height}px`;
  while (svg.children.length > shapes.length) svg.lastChild.remove();
  shapes.forEach(([name, attributes], index) => {
    let shape = svg.children[index];
    if (shape?.tagName !== name) {
      const made = document.createElementNS(SVG, name);
      if (shape) shape.replaceWith(made);
      else svg.append(made);
      shape = made;
    }
    for (const [key, value] of Object.entries(attributes)) {
      if (shape.getAttribute(key) !== String(value)) shape.setAttribute(key, value);
    }
  });
}

// What became of it, in words: only the words move of what is lost.
function tell({ data, item, heard }) {
  const [what, how] = item.querySelector(".words").children;
  const lost = lostOf(data);
  const open = lost.filter(isOpen);
  const isSilent = data.ended === null && now() - heard > SILENT;
  let state = "";
  let words = "held nothing";
  if (open.length) {
    state = "lost";
    words = `${open.length > 1 ? `${open.length} connections lost` : "lost"} for ${seconds(now() - data.ended)}`;
  } else if (lost.length) {
    state = "lost";
    words = `${number(lost.length, "connection")} was lost for ${seconds(Math.max(...lost.map((bar) => bar.taken)) - data.ended)}`;
    if (lost.length > 1) words = words.replace(" was ", " were ");
    words += ", then taken back";
  } else if (data.ended === null) {
    state = "open";
    const waits = data.bars.find((bar) => bar.ready === null && isOpen(bar));
    const lasts = seconds(now() - (waits?.began ?? data.began));
    words = isSilent ? "its process is gone" : waits ? `waits for ${waits.name}, ${lasts}` : `goes on, ${lasts}`;
  } else {
    const given = data.bars.filter((bar) => bar.ready !== null);
    if (given.length) words = `given back after ${seconds(Math.max(...given.map((bar) => bar.ended)) - data.began)}`;
    else if (data.bars.length) [state, words] = ["failed", "got nothing"];
  }
  item.querySelector(".words").className = `words ${state}`;
  set(what, words);
  const parts = [answerOf(data)];
  const errors = [data.error, ...data.bars.map((bar) => bar.error && `${bar.name}: ${bar.error}`)];
  const said = [...new Set(errors.filter((error) => error && !parts.join().includes(error)))];
  // What failed at its teardown may be what the request failed with, too.
  parts.push(...said.filter((error) => !said.some((other) => other !== error && other.includes(error))));
  if (item.parentElement?.parentElement?.dataset.name === "commit" && data.ended !== null && likes !== null) {
    parts.push(likes === 0 ? "and there is no row" : `and there are ${likes} rows`);
  }
  set(how, parts.filter(Boolean).join(" · "));
}

function answerOf({ kind, status, ending }) {
  if (kind === "background") return { fine: "done", failed: "failed" }[ending] ?? "";
  const told = { "broke off": "broke off", "client gone": "the client left", "shut down": "shut down" }[ending];
  return [status, told].filter(Boolean).join(", ");
}

function judge({ item, sides }) {
  const lanes = [...sides.values()];
  const verdict = item.querySelector(".verdict");
  if (!sides.has("scoped") || !sides.has("stock") || lanes.some(({ data }) => data.ended === null)) return set(verdict, "");
  const counts = lanes.map(({ data }) => lostOf(data).length + data.bars.filter((bar) => bar.ready === null).length);
  set(verdict, counts.every((count) => count === 0) ? "no difference" : "");
}

// The gauges

function showGauges() {
  const heard = [...processes.values()].map(({ gauges }) => gauges);
  const sum = (of) => heard.reduce((total, gauges) => total + of(gauges), 0);
  for (const side of ["scoped", "stock"]) {
    const [most, used, idle, waiting, lost] = ["max", "in_use", "idle", "waiting", "lost"].map((part) => sum((gauges) => gauges[side][part]));
    set(byId(`${side}-max`), String(most));
    set(byId(`${side}-in-use`), String(used));
    set(byId(`${side}-idle`), String(idle));
    set(byId(`${side}-waiting`), String(waiting));
    set(byId(`${side}-lost`), `${lost} lost`);
    byId(`${side}-lost`).classList.toggle("some", lost > 0);
    showCells(byId(`${side}-cells`), most, Math.max(used - lost, 0), lost, idle);
  }
  set(byId("scopes"), String(sum((gauges) => gauges.scopes)));
  set(byId("pages"), String(sum((gauges) => gauges.pages)));
  set(byId("processes"), `${processes.size} web process${processes.size === 1 ? "" : "es"}`);
  showSince();
}

function showSince() {
  const since = [...processes.values()].map(({ gauges }) => gauges.stock.since).filter((time) => time !== null);
  set(byId("stock-since"), since.length ? ` · oldest lost for ${seconds(Math.max(0, now() - Math.min(...since)))}` : "");
}

function showCells(svg, most, used, lost, idle) {
  svg.setAttribute("aria-label", `${number(most, "connection")}: ${used} in use, ${lost} lost, ${idle} idle`);
  const kinds = [...Array(lost).fill("gone"), ...Array(used).fill("used"), ...Array(idle).fill("idle")];
  const shapes = Array.from({ length: most }, (_, cell) => {
    const x = `${(100 / most) * cell + 0.2}%`;
    return ["rect", { class: kinds[cell] ?? "", x, y: 1, width: `${100 / most - 0.8}%`, height: 18, rx: 3 }];
  });
  paint(svg, shapes, 20);
}

function showScore(score) {
  for (const side of ["scoped", "stock"]) {
    const { sent, found_none: none, p50, p99 } = score[side];
    const parts = [`of ${sent}`, none && `${none} found no connection left`, p50 !== null && `p50 ${p50} ms`, p99 !== null && `p99 ${p99} ms`];
    set(byId(`${side}-score`), parts.filter(Boolean).join(" · "));
  }
  const { scoped, stock } = score;
  const kept = scoped.lost ? `lost ${scoped.lost}` : "lost no connection";
  const sentence = score.over
    ? `Of ${scoped.fine} plain requests, scoped answered ${scoped.answered} and ${kept}; ${django} answered ${stock.answered} and lost ${stock.lost}.`
    : `Running: scoped has answered ${scoped.sent} of ${score.of} requests, ${django} ${stock.sent}.`;
  set(byId("sentence"), sentence);
  byId("sentence").dataset.over = String(score.over);
}

// 4 · What PostgreSQL says

function showActivity({ activity, away }) {
  if (activity === null) return showRows([{ cells: [`PostgreSQL is away: ${away}`] }]);
  const lost = Object.assign({}, ...[...processes.values()].map(({ gauges }) => gauges.lost));
  showRows(
    activity.map(({ pid, application_name: side, state, seconds: since, query }) => {
      const isLost = pid in lost;
      const name = isLost ? `${side}: lost by “${labels.get(lost[pid]) ?? lost[pid]}”` : side;
      const isBack = !isLost && query.startsWith("SELECT pg_advisory_unlock_all()"); // as asyncpg cleans it
      return { isLost, cells: [pid, name, state ?? "", `${Math.floor(since)} s`, isBack ? `given back: ${query}` : query] };
    }),
  );
}

function showRows(rows) {
  const body = byId("activity");
  while (body.children.length > rows.length) body.lastChild.remove();
  rows.forEach(({ cells, isLost }, index) => {
    const row = body.children[index] ?? body.appendChild(document.createElement("tr"));
    row.classList.toggle("lost", Boolean(isLost));
    while (row.children.length > cells.length) row.lastChild.remove();
    cells.forEach((text, column) => {
      const cell = row.children[column] ?? row.appendChild(document.createElement("td"));
      cell.removeAttribute("colspan");
      set(cell, String(text));
    });
    if (cells.length === 1) row.firstChild.colSpan = 5;
  });
}

// 5 · The wall

byId("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = event.target;
  set(byId("posted"), "");
  try {
    // What is accepted is answered with a redirection, and comes back as an event.
    const response = await fetch(form.action, { method: "POST", body: new FormData(form), redirect: "manual" });
    if (response.type === "opaqueredirect") form.elements.text.value = "";
    else form.submit(); // to be shown what is wrong with it
  } catch {
    set(byId("posted"), "Not posted: the server is away. What you have written is still here.");
  }
});

function showMessage(message) {
  const id = `message-${message.id}`;
  after = message.id;
  if (byId(id)) return; // may come twice
  const item = byId("blank").content.cloneNode(true).firstChild;
  const time = item.querySelector("time");
  item.id = id;
  item.querySelector("p").textContent = message.text;
  time.dateTime = message.posted_at;
  time.textContent = `${message.posted_at.slice(0, 16).replace("T", " ")} UTC`;
  byId("wall").prepend(item);
  while (byId("wall").children.length > 10) byId("wall").lastElementChild.remove();
}

// What is open grows

setInterval(() => {
  if (document.hidden) return;
  for (const pair of pairs.values()) {
    for (const lane of pair.sides.values()) {
      if (lane.data.ended === null) draw(lane);
      else if (isLive(lane)) tell(lane);
    }
  }
  if (Date.now() - lastNews > SILENT * 1000) showState(false);
  for (const [name, { heard }] of processes) {
    if (now() - heard > SILENT) {
      processes.delete(name);
      showGauges();
    }
  }
  showSince();
  stretch();
}, 100);
