// Requests to the manager. The secret of the session is kept in the storage of this origin (scheme, host and port) and this tab.

const KEY = "nohype-token";

export class Problem extends Error {
  constructor(status, title, hint) {
    super(hint ? `${title}: ${hint}` : title);
    this.status = status;
  }
}

// Exchanges the word in the address for the secret, and removes it from the address.
export async function openSession() {
  const word = location.hash.slice(1);
  if (!word || location.protocol === "https:") return sessionStorage.getItem(KEY) !== null;
  history.replaceState(null, "", location.pathname);
  const response = await fetch("/session", { method: "POST", body: word });
  if (!response.ok) throw await readProblem(response);
  sessionStorage.setItem(KEY, (await response.json()).token);
  return true;
}

// On the manager's TLS port the user enters a token; null forgets it.
export function setToken(token) {
  if (token === null) sessionStorage.removeItem(KEY);
  else sessionStorage.setItem(KEY, token);
}

export function hasToken() {
  return sessionStorage.getItem(KEY) !== null;
}

export async function request(method, path, { body, headers = {}, signal } = {}) {
  const token = sessionStorage.getItem(KEY);
  const fields = token === null ? { ...headers } : { ...headers, Authorization: `Bearer ${token}` };
  if (body !== undefined) fields["Content-Type"] = "application/json";
  const response = await fetch(path, { method, headers: fields, body: body === undefined ? undefined : JSON.stringify(body), signal });
  if (!response.ok) throw await readProblem(response);
  return response;
}

export async function get(path, seconds = 15) {
  return (await request("GET", path, { signal: AbortSignal.timeout(seconds * 1000) })).json();
}

async function readProblem(response) {
  try {
    const problem = await response.json();
    return new Problem(response.status, String(problem.detail ?? problem.title), String(problem.hint ?? ""));
  } catch {
    return new Problem(response.status, `the manager responded with status ${response.status}`, "");
  }
}

// Yields the events of a text/event-stream. EventSource cannot send the secret.
export async function* stream(path, headers, signal) {
  const response = await request("GET", path, { headers, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data) yield JSON.parse(data);
    }
  }
}
