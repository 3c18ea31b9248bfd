"use strict";

const SHOWN = 40; // rows
const AXIS = 2; // seconds that a row shows at least
const SILENT = 5; // seconds after which a process is taken for gone
const PATIENCE = 700; // milliseconds after which the client that goes away does so
const LANE = 18;

const byId = (id) => document.getElementById(id);
const now = () => Date.now() / 1000 - ahead;

let ahead = Infinity; // seconds by which this clock is before the servers'
const rows = new Map(); // by id: {data, item}
const processes = new Map(); // by name: {gauges, heard}

// Send a request

const labels = new Map();
for (const button of document.querySelectorAll("[data-send]")) {
  labels.set(button.dataset.send, button.querySelector("b").textContent);
  button.addEventListener("click", () => send(button.dataset.send));
}
byId("stock").addEventListener("change", ({ target }) => {
  document.body.classList.toggle("stock", target.checked);
  for (const button of document.querySelectorAll("[data-alone]")) button.disabled = target.checked;
});
byId("reset").addEventListener("click", () => post("/reset"));

const post = (path, options) => {
  const token = document.querySelector("[name=csrfmiddlewaretoken]").value;
  return fetch(path, { method: "POST", headers: { "X-CSRFToken": token }, ...options });
};

async function send(ending) {
  const side = byId("stock").checked ? "stock" : "scoped";
  const leaving = ending === "leave" ? AbortSignal.timeout(PATIENCE) : undefined;
  let answer;
  try {
    const response = await post(`/${side}/${ending}`, { signal: leaving });
    const isText = response.ok && ["fine", "sync", "children", "stream", "background"].includes(ending);
    const text = await response.text();
    answer = isText ? `${response.status}, “${text.trim()}”` : `${response.status}`;
  } catch (error) {
    answer = leaving?.aborted ? "left before the answer came" : "the answer broke off";
  }
  byId("answer").textContent = `${labels.get(ending)}${side === "stock" ? ", stock Django" : ""}: ${answer}`;
}

// Listen

const events = new EventSource(`${document.body.dataset.events}?after=${document.body.dataset.after}`);
events.onmessage = ({ data }) => showMessage(JSON.parse(data));
events.addEventListener("timeline", ({ data }) => hear(JSON.parse(data)));

function hear(report) {
  if (report.process) {
    ahead = Math.min(ahead, Date.now() / 1000 - report.now);
    if (report.gauges) processes.set(report.process, { gauges: report.gauges, heard: now() });
    else processes.delete(report.process);
    showGauges();
  }
  report.rows.forEach(keep);
}

// The timeline

function keep(data) {
  const row = rows.get(data.id) ?? { item: byId("row").content.cloneNode(true).firstElementChild };
  row.data = data;
  row.heard = now();
  if (!rows.has(data.id)) {
    rows.set(data.id, row);
    const later = [...rows.values()].filter((other) => other.data.began > data.began);
    const next = later.sort((one, other) => one.data.began - other.data.began)[0];
    if (next) next.item.after(row.item);
    else byId("rows").prepend(row.item);
    document.querySelector("#rows .none")?.remove();
    const [path, kind] = [data.title.split("/").pop(), data.kind];
    const [what, when] = row.item.querySelectorAll(".what > *");
    what.textContent = labels.get(path) ?? data.title.replace("the background task ", "");
    const time = new Date(data.began * 1000).toTimeString().slice(0, 8);
    when.textContent = kind === "scoped" ? time : `${time} · ${kind}`;
    row.item.dataset.title = data.title;
    row.item.dataset.id = data.id;
    forget();
  }
  draw(row);
}

function forget() {
  const oldest = [...rows.values()].sort((one, other) => one.data.began - other.data.began);
  for (const { data, item } of oldest.slice(0, Math.max(0, rows.size - SHOWN))) {
    item.remove();
    rows.delete(data.id);
  }
}

const isLive = ({ data }) => data.ended === null || data.bars.some((bar) => bar.ended === null);

// The bars as a tree, each below what asked for it.
function tree(bars, asker = null, depth = 0) {
  const names = new Set(bars.map((bar) => bar.name));
  return bars
    .filter((bar) => (names.has(bar.asked_by) ? bar.asked_by : null) === asker)
    .sort((one, other) => one.began - other.began)
    .flatMap((bar) => [{ ...bar, depth }, ...(depth < 3 ? tree(bars, bar.name, depth + 1) : [])]);
}

function draw({ data, item, heard }) {
  const isSilent = data.ended === null && now() - heard > SILENT;
  const end = data.ended ?? (isSilent ? heard : now());
  const lives = Math.max(end - data.began, 0);
  const axis = Math.max(AXIS, lives * 1.02);
  const percent = (time) => `${Math.min(Math.max((time - data.began) / axis, 0), 1) * 100}%`;
  const shapes = [];
  const add = (name, attributes) => shapes.push([name, attributes]);
  const bar = (kind, from, to, lane, height) => {
    const width = `${Math.max(parseFloat(percent(to)) - parseFloat(percent(from)), 0.15)}%`;
    add("rect", { class: kind, x: percent(from), y: lane * LANE + (LANE - height) / 2, width, height, rx: 2 });
  };
  const step = [1, 5, 15, 60, 300, 3600].find((seconds) => axis / seconds <= 8) ?? 86400;
  const bars = tree(data.bars);
  const height = LANE * Math.max(2, bars.length + 1);
  for (let second = 0; second <= axis; second += step) {
    const x = percent(data.began + second);
    add("line", { class: "grid", x1: x, x2: x, y1: 0, y2: height });
  }
  bar("request", data.began, end, 0, 4);
  if (data.first_byte !== null) bar("bytes", data.first_byte, data.last_byte ?? end, 0, 8);
  for (const time of [data.first_byte, data.last_byte]) {
    if (time !== null) add("line", { class: "tick", x1: percent(time), x2: percent(time), y1: 1, y2: LANE - 1 });
  }
  const lost = bars.filter((one) => one.ended === null && data.ended !== null);
  bars.forEach((one, index) => {
    const to = one.ended ?? (lost.includes(one) ? data.began + axis : end);
    bar("edge", one.began, to, index + 1, 12);
    const held = one.failed && one.closing === null ? "failed" : "held";
    bar(held, one.ready, Math.min(one.closing ?? to, lost.includes(one) ? end : to), index + 1, 12);
    if (lost.includes(one)) bar("lost", data.ended, to, index + 1, 12);
    if (one.failed && one.closing !== null) bar("failed", one.closing, to, index + 1, 12);
  });

  const svg = item.querySelector(".lanes");
  svg.setAttribute("height", height);
  svg.style.height = `${height}px`;
  while (svg.children.length > shapes.length) svg.lastChild.remove();
  shapes.forEach(([name, attributes], index) => {
    let shape = svg.children[index];
    if (shape?.tagName !== name) {
      const made = document.createElementNS("http://www.w3.org/2000/svg", name);
      if (shape) shape.replaceWith(made);
      else svg.append(made);
      shape = made;
    }
    for (const [key, value] of Object.entries(attributes)) shape.setAttribute(key, value);
  });

  const names = ["request", ...bars.map((one) => one.name)];
  const held = (one) => (one.ended === null ? (lost.includes(one) ? "lost" : "open") : `${(one.ended - one.began).toFixed(2)} s`);
  svg.setAttribute("aria-label", [`request ${lives.toFixed(2)} s`, ...bars.map((one) => `${one.name} ${held(one)}`)].join(", "));
  const labelled = item.querySelector(".names");
  while (labelled.children.length > names.length) labelled.lastChild.remove();
  names.forEach((name, index) => {
    const span = labelled.children[index] ?? labelled.appendChild(document.createElement("span"));
    span.textContent = name;
    span.className = `depth-${index ? bars[index - 1].depth : 0}`;
  });

  const [how, detail] = item.querySelectorAll(".how > *");
  const ending = data.remark || (isSilent ? "process gone" : data.ending) || "open";
  how.textContent = data.status !== null && !["client gone", "no connection left"].includes(ending) ? `${data.status} ${ending}` : ending;
  how.parentElement.className = `how ${{ fine: "fine", refused: "refused", open: "", "client gone": "gone", "process gone": "gone", "shut down": "gone" }[ending] ?? "bad"}`;
  detail.textContent = lost.length ? `${lost.length} lost` : lives < 60 ? `${lives.toFixed(2)} s` : `${(lives / 60).toFixed(1)} min`;
  detail.className = lost.length ? "lost-note" : "";
  item.dataset.ending = ending;
  item.dataset.lost = lost.length;
}

// The gauges

function showGauges() {
  const heard = [...processes.values()].map(({ gauges }) => gauges);
  const sum = (of) => heard.reduce((total, gauges) => total + of(gauges), 0);
  const show = (id, value, isAlarming = false) => {
    byId(id).textContent = value;
    byId(id).classList.toggle("alarm", isAlarming);
  };
  for (const [side, key] of [["ours", "pool"], ["theirs", "stock"]]) {
    const [most, used, idle, waiting] = ["max", "in_use", "idle", "waiting"].map((part) => sum((gauges) => gauges[key][part]));
    show(`${side}-in-use`, used, side === "theirs" && used > 0);
    show(`${side}-idle`, idle);
    show(`${side}-waiting`, waiting, waiting > 0);
    showCells(byId(`${side}-cells`), most, used, idle);
  }
  show("ours-scopes", sum((gauges) => gauges.scopes));
  show("ours-pages", sum((gauges) => gauges.pages));
  show("theirs-lost", sum((gauges) => gauges.stock.lost), sum((gauges) => gauges.stock.lost) > 0);
  byId("processes").textContent = `${processes.size} web process${processes.size === 1 ? "" : "es"}`;
}

function showCells(svg, most, used, idle) {
  svg.setAttribute("aria-label", `connections: ${used} of ${most} in use, ${idle} idle`);
  while (svg.children.length > most) svg.lastChild.remove();
  for (let cell = 0; cell < most; cell += 1) {
    const rect = svg.children[cell] ?? svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "rect"));
    const attributes = { x: `${(100 / most) * cell + 0.2}%`, y: 1, width: `${100 / most - 0.8}%`, height: 18, rx: 3 };
    for (const [key, value] of Object.entries(attributes)) rect.setAttribute(key, value);
    rect.setAttribute("class", cell < used ? "used" : cell < used + idle ? "idle" : "");
  }
}

// The wall

byId("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = event.target;
  // What is accepted is answered with a redirection, and comes back as an event.
  const response = await fetch(form.action, { method: "POST", body: new FormData(form), redirect: "manual" });
  if (response.type === "opaqueredirect") form.elements.text.value = "";
  else form.submit(); // to be shown what is wrong with it
});

function showMessage(message) {
  const id = `message-${message.id}`;
  if (byId(id)) return; // may come twice
  const item = byId("blank").content.cloneNode(true).firstChild;
  const time = item.querySelector("time");
  item.id = id;
  item.querySelector("p").textContent = message.text;
  time.dateTime = message.posted_at;
  time.textContent = `${message.posted_at.slice(0, 16).replace("T", " ")} UTC`;
  byId("wall").prepend(item);
}

// What is open grows

setInterval(() => {
  if (document.hidden) return;
  for (const row of rows.values()) if (isLive(row)) draw(row);
  for (const [name, { heard }] of processes) {
    if (now() - heard > SILENT) {
      processes.delete(name);
      showGauges();
    }
  }
}, 50);
