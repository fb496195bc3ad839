// The serial console of one guest. Its output is hostile: it becomes text, without any control sequence.

import { request, stream } from "./api.js";
import { find } from "./host.js";

const LONGEST = 200_000; // characters on the screen
// CSI, strings (OSC, DCS, PM, APC, SOS), other escapes, control characters, and those that change the direction of text.
const SEQUENCES = /\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-~]?|[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;
// The beginning of a sequence at the end of a part.
const PARTIAL = /\x1b(?:\[[0-?]{0,32}[ -/]{0,4}|[\]PX^_][^\x07\x1b]{0,4096}\x1b?)?$/;

let ending = null; // of the stream that is shown
let shown = { guest: "", uuid: "" };

export async function openConsole(guest, report) {
  closeConsole();
  const abort = (ending = new AbortController());
  shown = { guest, uuid: "" };
  const screen = find("screen");
  screen.textContent = "";
  find("console-title").textContent = `Console of ${guest}`;
  find("console").hidden = false;
  find("line").focus();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for await (const part of stream(`/v1/guests/${encodeURIComponent(guest)}/console?lines=200`, {}, abort.signal)) {
      shown.uuid = part.uuid;
      const text = rest + decoder.decode(Uint8Array.from(atob(part.output), (char) => char.charCodeAt(0)), { stream: true });
      const cut = text.match(PARTIAL)?.index ?? text.length;
      rest = text.slice(cut);
      append(screen, text.slice(0, cut).replace(SEQUENCES, ""));
      if (part.last) append(screen, `\n[${part.problem?.detail ?? "end"}]\n`);
    }
  } catch (error) {
    if (abort.signal.aborted) return;
    append(screen, "\n[the connection was lost]\n");
    report(error);
  }
}

export function closeConsole() {
  ending?.abort();
  ending = null;
  find("console").hidden = true;
}

export async function typeConsole(text) {
  if (!shown.uuid) return;
  const data = btoa(String.fromCharCode(...new TextEncoder().encode(text).slice(0, 4096)));
  await request("POST", `/v1/guests/${encodeURIComponent(shown.guest)}/console`, { body: { uuid: shown.uuid, data } });
}

function append(screen, text) {
  const atEnd = screen.scrollHeight - screen.scrollTop - screen.clientHeight < 40;
  screen.textContent = (screen.textContent + text).slice(-LONGEST);
  if (atEnd) screen.scrollTop = screen.scrollHeight;
}
