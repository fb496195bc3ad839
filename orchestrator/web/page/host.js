// Draws the host. Everything that the manager sends is text, and is only ever set as text.

const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
const MARKS = { housekeeping: "·", unusable: "×" };

export const find = (id) => document.getElementById(id);

export function element(name, text = "", kind = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

export function row(...cells) {
  const made = document.createElement("tr");
  made.append(...cells.map((cell) => (cell instanceof Node ? cell : element("td", cell))));
  return made;
}

export function formatAge(seconds) {
  for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"]]) {
    if (seconds >= size) return `${Math.floor(seconds / size)} ${unit}`;
  }
  return `${Math.floor(seconds)} s`;
}

function formatSize(bytes) {
  for (const [shift, unit] of [[40, "T"], [30, "G"], [20, "M"], [10, "K"]]) {
    if (bytes && bytes % 2 ** shift === 0) return `${bytes / 2 ** shift}${unit}`;
  }
  return String(bytes);
}

function listCpus(list) {
  return list.split(",").filter(Boolean).flatMap((part) => {
    const [first, last = first] = part.split("-").map(Number);
    return Array.from({ length: last - first + 1 }, (_, index) => first + index);
  });
}

// By CPU, without those for housekeeping: the names of virtual machines that the manager did not create.
function findUnmanaged(host) {
  const housekeeping = new Set(listCpus(host.survey.housekeeping));
  const found = new Map();
  for (const { name, cpus } of host.unmanaged ?? []) {
    for (const cpu of listCpus(cpus).filter((one) => !housekeeping.has(one))) found.set(cpu, [...(found.get(cpu) ?? []), name]);
  }
  return found;
}

const KINDS = { pass: "pass", fail: "fail", "not measured": "open" };

// The verdicts of the last audits in a few words, as the manager says them; tenants are told of none.
export function describeProofs(host, subject) {
  const light = host.lights.find((one) => one.subject === subject);
  return light ? [light.text, KINDS[light.verdict]] : ["-", "open"];
}

// Per guest: the busiest vCPU, the longest wait, and exits by reason, per second; null for what was not measured.
export function measureRates(before, after) {
  const seconds = before ? after.clock - before.clock : 0;
  const old = new Map((before?.activity ?? []).map((one) => [one.guest, one]));
  const versions = new Map((before?.guests ?? []).map((guest) => [guest.name, guest.version]));
  const now = new Map(after.guests.map((guest) => [guest.name, guest.version]));
  const found = new Map();
  for (const { guest, vcpus } of after.activity) {
    const earlier = old.get(guest)?.vcpus ?? [];
    if (seconds <= 0 || earlier.length !== vcpus.length || versions.get(guest) !== now.get(guest)) continue;
    const rate = (name) => {
      const values = vcpus.map((vcpu, index) => (vcpu[name] === null || earlier[index][name] === null ? null : (vcpu[name] - earlier[index][name]) / seconds));
      return values.some((value) => value === null || value < 0) ? null : Math.max(...values);
    };
    let exits = new Map();
    vcpus.forEach((vcpu, index) => {
      if (vcpu.exits === null || earlier[index].exits === null) exits = null;
      for (const [reason, count] of Object.entries(exits && vcpu.exits)) {
        exits.set(reason, (exits.get(reason) ?? 0) + (count - (earlier[index].exits[reason] ?? 0)) / seconds);
      }
    });
    if (exits && [...exits.values()].some((value) => value < 0)) exits = null;
    found.set(guest, { ran: rate("ran"), waited: rate("waited"), exits });
  }
  return found;
}

export function drawSummary(host) {
  const running = host.guests.filter((guest) => guest.state === "running").length;
  const free = host.cores.filter((core) => core.use === "free").length;
  const [text, kind] = describeProofs(host, "host");
  find("summary").replaceChildren(
    `${host.time.slice(11, 19)} UTC, ${host.guests.length} guests, ${running} running, ${free} of ${host.cores.length} cores free, proofs of the host: `,
    element("span", text, kind),
  );
}

export function drawAttention(host) {
  const items = host.attention.map(({ since, text, command }) => {
    const item = element("li", `${since ? `${since.slice(0, 16).replace("T", " ")} UTC: ` : ""}${text} `);
    item.append(element("code", command));
    return item;
  });
  find("attention").replaceChildren(...(items.length ? items : [element("li", "nothing", "pass")]));
}

export function drawCores(host) {
  const numbers = new Map(host.guests.map((guest, index) => [guest.name, index]));
  const unmanaged = findUnmanaged(host);
  const nodes = new Map();
  for (const core of host.cores) nodes.set(core.node, [...(nodes.get(core.node) ?? []), core]);
  const place = find("cores");
  if (place.querySelectorAll(".cell").length !== host.cores.length) {
    place.replaceChildren(...[...nodes].map(([node, cores]) => {
      const made = element("div", "", "node");
      made.append(element("strong", `node ${node}`), ...cores.map(() => element("div", "", "cell")));
      return made;
    }));
    place.querySelectorAll(".cell").forEach((cell, index) => { cell.tabIndex = index ? -1 : 0; cell.setAttribute("role", "img"); });
  }
  const cells = place.querySelectorAll(".cell");
  [...nodes.values()].flat().forEach((core, index) => {
    const number = numbers.get(core.guest);
    const mark = number === undefined ? MARKS[core.use] ?? "" : LETTERS[number] ?? "*";
    const stopped = host.guests[number]?.state === "stopped" ? " stopped" : "";
    const others = listCpus(core.cpus).map((cpu) => unmanaged.get(cpu) ?? []);
    const names = [...new Set(others.flat())].join(", ");
    const kind = `cell ${core.use === "claimed" ? `g${number % 10}` : core.use}${stopped}${names && " unmanaged"}`;
    const label = `core with CPUs ${core.cpus}, node ${core.node}, socket ${core.socket}: ${core.use}${core.guest ? ` by ${core.guest}` : ""}${stopped}${names && `; unmanaged guest ${names}`}`;
    const cell = cells[index];
    if (cell.title === label && cell.className === kind) return;
    cell.className = kind;
    cell.title = label;
    cell.setAttribute("aria-label", label);
    cell.textContent = others.map((other) => (other.length ? (core.guest ? "!" : "@") : mark)).join("");
  });
}

export function drawDevices(host) {
  const owners = new Map(host.guests.flatMap((guest) => [...guest.nics, ...guest.disks].filter((one) => one.address).map((one) => [one.address, guest.name])));
  const settings = new Map(host.vfs.map((vf) => [vf.address, vf]));
  const rows = [];
  for (const pool of host.survey.pools.filter((one) => one.total)) {
    const uses = host.pages.filter((one) => one.node === pool.node && one.page_size === pool.page_size && one.count);
    const words = uses.map((one) => `${one.use} ${formatSize(one.count * one.page_size)}`);
    rows.push(row(`memory of node ${pool.node}`, `pages of ${formatSize(pool.page_size)}`, words.join(", ")));
  }
  for (const uplink of host.uplinks) {
    const pf = host.survey.pfs.find((one) => one.interface === uplink.name);
    const vfs = (pf?.vfs ?? []).map((vf) => {
      const { differences, why } = settings.get(vf.address);
      const odd = why ? ` (not measured: ${why})` : differences.length ? ` (${differences.join("; ")})` : "";
      return element("div", `${vf.address} ${owners.get(vf.address) ?? (vf.use || "free")}${odd}`, why ? "open" : odd ? "fail" : "");
    });
    const words = [uplink.up ? "up" : "down", uplink.edge ?? uplink.why, pf ? `PF ${pf.address}, node ${pf.node ?? "unknown"}` : ""];
    const cell = element("td");
    cell.append(...vfs);
    rows.push(row(`uplink ${uplink.name}`, words.filter(Boolean).join(", "), cell));
  }
  for (const disk of host.survey.controllers) {
    rows.push(row("disk", disk.serial ?? disk.address, owners.get(disk.address) ?? ([...disk.uses, ...disk.signatures, disk.fault].filter(Boolean).join("; ") || "free")));
  }
  find("devices").replaceChildren(...rows);
}

export function drawProofs(host) {
  find("age").textContent = host.audit ? `measured ${formatAge(host.audit.age)} ago` : "not measured since the manager started";
  const order = { fail: 0, "not measured": 1, pass: 2 };
  const proofs = [...(host.audit?.proofs ?? [])].sort((one, other) => order[one.verdict] - order[other.verdict]);
  find("proofs").replaceChildren(...proofs.map((proof) => {
    const kind = proof.verdict === "fail" ? "fail" : proof.verdict === "pass" && !proof.outdated ? "pass" : "open";
    return row(proof.name, proof.subject, element("td", proof.outdated ? `${proof.verdict}, outdated` : proof.verdict, kind), proof.finding);
  }));
}

export { LETTERS, formatSize };
