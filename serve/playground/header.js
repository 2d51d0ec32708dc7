// What is served: the strip of facts under the title.

import { call } from "./api.js";
import { byId, milliseconds, shortVersion } from "./dom.js";

const RETRY_MS = 2000;
const STATES = {
  ready: "ready",
  asleep: "asleep",
  waiting: "not ready",
  gone: "unreachable",
  locked: "locked",
};

let asking = false;

/** Ask /info now, and again until the service is ready and awake. `onInfo` gets what it says. */
export async function refresh(onInfo, { ask = true } = {}) {
  if (asking) return;
  asking = true;
  try {
    const info = await call("info", undefined, { ask });
    show(info);
    onInfo(info);
    if (info.asleep) setTimeout(() => refresh(onInfo, { ask: false }), RETRY_MS);
  } catch (error) {
    const locked = error.status === 401 || error.status === 403;
    const known = { network: "gone", asleep: "asleep" };
    setState(locked ? "locked" : (known[error.kind] ?? "waiting"));
    if (!locked) setTimeout(() => refresh(onInfo, { ask: false }), RETRY_MS);
  } finally {
    asking = false;
  }
}

/** The times of the last request: what the service measured, and the whole way in the browser. */
export function showLatency(timings, roundTripMs) {
  const parts = ["queue", "score"].filter((name) => name in timings);
  const shown = parts.map((name) => `${name} ${milliseconds(timings[name])}`);
  const fact = byId("fact-latency");
  const total = document.createElement("strong");
  total.textContent = milliseconds(timings.total ?? roundTripMs);
  fact.replaceChildren(total, ...(shown.length ? [` ${shown.join(" · ")}`] : []));
  fact.title = `${milliseconds(roundTripMs)} from click to reply`;
}

export function setState(name) {
  const state = byId("state");
  state.dataset.state = name;
  state.textContent = STATES[name];
}

function show(info) {
  setState(info.asleep ? "asleep" : "ready");
  byId("fact-model").textContent = info.model;
  byId("fact-model").title = info.model;
  byId("fact-dtype").textContent = info.dtype;
  byId("fact-path").textContent = info.path;
  byId("fact-path").title = info.fallback_reason ?? "";
  byId("fact-replicas").textContent = String(info.num_replicas);
  const version = byId("fact-version");
  version.disabled = false;
  version.textContent = shortVersion(info.model_version);
  version.title = `Copy ${info.model_version}`;
  version.setAttribute("aria-label", `Copy model_version ${info.model_version}`);
  version.onclick = () => copy(version, info.model_version);
}

async function copy(button, text) {
  let copied = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    copied = false;
  }
  // Without HTTPS or localhost there is no clipboard: show what there is to copy.
  button.textContent = copied ? "copied" : text;
  setTimeout(() => (button.textContent = shortVersion(text)), copied ? 1200 : 8000);
}
