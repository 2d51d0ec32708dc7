// The service's routes, as anyone calls them. The token lives in this module's memory alone: no
// storage of the browser holds it, so that no other page of this origin can read it.

import { byId } from "./dom.js";

let token = null;
let asking = null;

export class ServiceError extends Error {
  /** kind: an error type of the service, or "network". */
  constructor(kind, message, status = 0) {
    super(message);
    this.kind = kind;
    this.status = status;
  }
}

/** The JSON of a reply; `body` makes it a POST. Asks for a token on 401 unless `ask` is false.
 *  Throws ServiceError. */
export async function call(path, body = undefined, { ask = true } = {}) {
  for (;;) {
    const sent = token;
    const reply = await send(path, body, sent);
    if (reply.status !== 401) return read(reply);
    if (token !== sent) continue; // another call has asked meanwhile
    if (!ask || !(await askForToken(sent !== null))) {
      throw new ServiceError("unauthenticated", "This service asks for a token.", 401);
    }
  }
}

async function send(path, body, sent) {
  const headers = { Accept: "application/json" };
  if (sent !== null) headers.Authorization = `Bearer ${sent}`;
  const init = { headers, cache: "no-store", credentials: "omit" };
  if (body !== undefined) {
    headers["Content-Type"] = "application/json";
    Object.assign(init, { method: "POST", body: JSON.stringify(body) });
  }
  try {
    return await fetch(path, init);
  } catch {
    throw new ServiceError("network", "The service cannot be reached. Is it still running?");
  }
}

async function read(reply) {
  let content = null;
  try {
    content = await reply.json();
  } catch {
    // A proxy's page, or a connection that broke.
  }
  if (reply.ok && content !== null) return content;
  const error = content?.error;
  throw new ServiceError(
    error?.type ?? "internal",
    error?.message ?? `The service replied with status ${reply.status}.`,
    reply.status,
  );
}

/** What to tell the reader about an error, and what they can do. */
export function advice(error) {
  const retry = {
    network: "The service cannot be reached. See whether it is running, then score again.",
    unavailable: "The service is not ready: no replica has its model loaded yet. Try again soon.",
    asleep: "The service sleeps: its memory is in use by others. Wake it (POST /v1/admin/wake).",
    overloaded: "The service has more work than it takes. Try again in a moment.",
    deadline_exceeded: "The service did not score this in time. Try again, or score less at once.",
    unauthenticated: "This service asks for a token. Score again to enter one.",
    forbidden: "This token does not allow it: ",
    invalid_request: "The service refused this: ",
    body_too_large: "This is too large: ",
    too_many_tokens: "This is too much at once: ",
  }[error.kind];
  if (retry === undefined) return error.message;
  return retry.endsWith(": ") ? retry + error.message : retry;
}

/** Resolves to whether a token was given. Calls that come meanwhile wait for the same answer. */
export function askForToken(wasRefused = false) {
  asking ??= new Promise((resolve) => {
    const dialog = byId("token-dialog");
    const field = byId("token");
    let given = false;
    byId("token-note").textContent = wasRefused ? "The service did not accept that token." : "";
    field.value = "";
    byId("token-form").onsubmit = (event) => {
      event.preventDefault();
      token = field.value.trim();
      given = true;
      dialog.close();
    };
    byId("token-cancel").onclick = () => dialog.close();
    dialog.onclose = () => {
      field.value = "";
      asking = null;
      resolve(given);
    };
    dialog.showModal();
    field.focus();
  });
  return asking;
}
