// Refreshes the page, and does what its buttons say.

import { get, hasToken, openSession, request, setToken, stream } from "./api.js";
import { closeConsole, openConsole, typeConsole } from "./console.js";
import { describeProofs, drawAttention, drawCores, drawDevices, drawProofs, drawSummary, element, find, formatAge, formatSize, LETTERS, measureRates, row } from "./host.js";

const INTERVAL = 2000; // ms between two readings
const MOST_EVENTS = 200;
const FRESH = 10; // s: what is older is not shown in green
const ACTIONS = {
  running: ["stop", "force off", "console"],
  stopped: ["start"],
  ended: ["start", "force off"],
};
const WORDS = { stop: "stop", start: "start", "force off": "kill" };

let before = null;
let shownAt = null;
let isTenant = false;
let isShown = false; // the page refreshes itself
let isRefused = false; // the manager knows neither a token nor a certificate
const busy = new Set(); // guests of which a change is in progress

function report(error) {
  find("problem").textContent = error ? error.message : "";
  find("problem").hidden = !error;
}

async function act(guest, action) {
  if (action === "console") return openConsole(guest.name, report);
  if (action === "force off" && !confirm(`Force guest ${guest.name} off? What it has not written is lost.`)) return;
  busy.add(guest.name);
  try {
    report(null);
    await request("POST", `/v1/guests/${encodeURIComponent(guest.name)}/${WORDS[action]}`, {
      headers: { "If-Match": `"${guest.version}"` }, body: action === "stop" ? { timeout: 60 } : undefined,
    });
  } catch (error) {
    report(error);
  } finally {
    busy.delete(guest.name);
  }
  await refresh();
}

// Keeps buttons that have the focus: a row is made anew only when the guest has changed.
function drawGuests(host, rates) {
  const table = find("guests");
  const old = new Map([...table.rows].map((one) => [one.dataset.key, one]));
  const rows = host.guests.map((guest, index) => {
    const key = JSON.stringify([guest.name, guest.version, guest.state, busy.has(guest.name)]);
    const made = old.get(key) ?? row(...Array.from({ length: 9 }, () => element("td")), makeButtons(guest));
    made.dataset.key = key;
    fillRow(made, host, guest, index, rates.get(guest.name));
    return made;
  });
  if (rows.length !== table.rows.length || rows.some((one, index) => one !== table.rows[index])) table.replaceChildren(...rows);
}

function fillRow(made, host, guest, index, rate) {
  const number = (value, digits) => (value === null || value === undefined ? "-" : value.toFixed(digits));
  const exits = rate?.exits ? [...rate.exits].filter(([, value]) => value).sort((one, other) => other[1] - one[1]) : null;
  const [proofs, kind] = describeProofs(host, guest.name);
  const total = exits?.reduce((sum, [, value]) => sum + value, 0);
  const texts = [
    `${LETTERS[index] ?? "*"} ${guest.name}`, guest.state, guest.cores.join(", "), formatSize(guest.memory),
    rate && rate.ran !== null ? `${Math.round(rate.ran * 100)}%` : "-", rate && rate.waited !== null ? number(rate.waited * 1000, 1) : "-",
    number(total, 1), exits?.map(([reason, value]) => `${reason} ${value.toFixed(1)}`).join(", ") || "-", proofs,
  ];
  texts.forEach((text, column) => { if (made.cells[column].textContent !== text) made.cells[column].textContent = text; });
  made.cells[8].className = kind;
  for (const column of [4, 5, 6]) made.cells[column].className = "number";
}

function makeButtons(guest) {
  const cell = element("td");
  for (const action of ACTIONS[guest.state] ?? []) {
    const button = element("button", action);
    button.type = "button";
    button.disabled = busy.has(guest.name);
    button.setAttribute("aria-label", `${action}: guest ${guest.name}`);
    button.addEventListener("click", () => act(guest, action));
    cell.append(button, " ");
  }
  return cell;
}

async function refresh() {
  if (isTenant) {
    const guests = await get("/v1/guests");
    drawGuests({ guests, lights: [] }, new Map());
    find("summary").textContent = `${guests.length} guests of your tenant`;
    return drawAge(performance.now());
  }
  let host;
  try {
    host = await get("/v1/host");
  } catch (error) {
    if (error.status !== 403) throw error;
    isTenant = true; // the rest of the page is about the host
    for (const id of ["map", "audit"]) find(id).hidden = true;
    return refresh();
  }
  drawSummary(host);
  drawAttention(host);
  drawGuests(host, measureRates(before, host));
  drawCores(host);
  drawDevices(host);
  drawProofs(host);
  if (before?.clock !== host.clock) before = host;
  drawAge(performance.now());
}

// The manager may not respond: then what is shown says how old it is.
function drawAge(now) {
  shownAt = now ?? shownAt;
  const age = shownAt === null ? 0 : (performance.now() - shownAt) / 1000;
  document.body.classList.toggle("stale", age > FRESH);
  find("stale").hidden = age <= FRESH;
  find("stale").textContent = `read ${formatAge(age)} ago: the manager has not responded since`;
}

async function refreshForever() {
  let failed = false;
  for (;;) {
    if (!document.hidden && !isRefused) {
      try {
        await refresh();
        if (failed) report(null);
        failed = false;
      } catch (error) {
        failed = true;
        report(error);
        if (error.status === 401) askToken();
      }
    }
    await new Promise((done) => setTimeout(done, INTERVAL));
  }
}

// A token that is refused is forgotten: there may be a client certificate. Without both, or a session, nothing is requested.
function askToken() {
  isRefused = location.protocol !== "https:" || !hasToken();
  if (location.protocol !== "https:") return;
  setToken(null);
  find("login").hidden = false;
}

function drawEvent(event) {
  const table = find("events");
  table.prepend(row(event.time.slice(0, 19).replace("T", " "), event.subject, event.kind, event.detail));
  while (table.rows.length > MOST_EVENTS) table.deleteRow(-1);
}

async function followEvents() {
  let last = null;
  for (;;) {
    if (!isRefused) try {
      for (const event of last === null ? await get("/v1/events?limit=50") : []) {
        last = event.id;
        drawEvent(event);
      }
      last ??= 0;
      for await (const event of stream("/v1/events/stream", { "Last-Event-ID": String(last) })) {
        last = event.id;
        drawEvent(event);
      }
    } catch (error) {
      if (error.status === 401) askToken();
    }
    await new Promise((done) => setTimeout(done, INTERVAL));
  }
}

function listen() {
  find("measure").addEventListener("click", async ({ target }) => {
    target.disabled = true;
    try {
      report(null);
      await get("/v1/audit", 600);
      await refresh();
    } catch (error) {
      report(error);
    } finally {
      target.disabled = false;
    }
  });
  find("login").addEventListener("submit", (event) => {
    event.preventDefault();
    setToken(find("token").value.trim());
    find("token").value = "";
    isTenant = false;
    for (const id of ["map", "audit"]) find(id).hidden = false;
    show().catch(report);
  });
  find("typing").addEventListener("submit", (event) => {
    event.preventDefault();
    typeConsole(`${find("line").value}\r`).catch(report);
    find("line").value = "";
  });
  find("interrupt").addEventListener("click", () => typeConsole("\x03").catch(report));
  find("close").addEventListener("click", closeConsole);
  find("cores").addEventListener("keydown", moveInMap);
  for (const name of ["focusin", "mouseover"]) {
    find("cores").addEventListener(name, ({ target }) => { if (target.title) find("core").textContent = target.title; });
  }
}

// One core is in the order of the tab key; the arrow keys move to the others.
function moveInMap(event) {
  const cells = [...find("cores").querySelectorAll(".cell")];
  const now = cells.indexOf(document.activeElement);
  const top = (cell) => cell.offsetTop;
  const perLine = Math.max(1, cells.filter((cell) => top(cell) === top(cells[now])).length);
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: perLine, ArrowUp: -perLine, Home: -now, End: cells.length - 1 - now }[event.key];
  if (now < 0 || step === undefined) return;
  event.preventDefault();
  const next = cells[Math.min(cells.length - 1, Math.max(0, now + step))];
  cells[now].tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

async function show() {
  report(null);
  try {
    await get("/v1/version");
  } catch (error) {
    if (error.status === 401) askToken();
    throw error;
  }
  isRefused = false;
  // With a client certificate alone the page can be read, but changes need a token.
  find("login").hidden = location.protocol !== "https:" || hasToken();
  if (isShown) return;
  isShown = true;
  followEvents().catch(report);
  await refreshForever();
}

listen();
setInterval(drawAge, 1000, null);
try {
  if ((await openSession()) || location.protocol === "https:") {
    await show();
  } else {
    report(new Error("this tab has no session: run `nohype web` and open the address that it prints"));
  }
} catch (error) {
  report(error);
}
