// The second tab: GET /v1/monitor every two seconds, while somebody looks.

import { advice, askForToken, call, ServiceError } from "./api.js";
import { byId, copyOf, count, element, shortVersion, signed } from "./dom.js";
import { histogram, table } from "./histogram.js";

const PERIOD_MS = 2000;

// What each warning is called, and what to do about it.
const WARNINGS = {
  drift: [
    "The rewards have moved",
    "If the prompts are of another kind than the model was trained on, evaluate it on labelled pairs of them " +
      "(rayward eval) before you trust it there. If they are not, the policy has changed: read its completions " +
      "of the highest rewards, and hold it closer to where it started (a higher KL coefficient).",
  ],
  length: [
    "The reward goes with length",
    "Compare completions of like length. Where the reward follows the length alone, add pairs whose better " +
      "side is the other one to the training data, or penalise length in the policy’s training.",
  ],
  extremes: [
    "Many rewards are extreme",
    "Read the completions of the highest rewards: this is where a policy that exploits the model shows first. " +
      "Stop or slow its training until you have; the pairs that they make are what the model should be trained on next.",
  ],
};

const shown = new Map(); // model_version -> {root, last}
let visible = false;
let timer = null;
let running = false;

export function start() {
  document.addEventListener("visibilitychange", poll);
  byId("monitor-empty").querySelector("button").addEventListener("click", async () => {
    if (await askForToken()) poll();
  });
}

export function setVisible(value) {
  visible = value;
  poll();
}

async function poll() {
  clearTimeout(timer);
  if (!visible || document.hidden || running) return;
  running = true;
  try {
    show((await call("v1/monitor", undefined, { ask: false })).models);
  } catch (error) {
    if (!(error instanceof ServiceError)) throw error;
    fail(error);
  } finally {
    running = false;
  }
  if (visible && !document.hidden) timer = setTimeout(poll, PERIOD_MS);
}

function fail(error) {
  if (error.status === 404) {
    empty("No monitoring here", "This service does not report what it has seen (it has no /v1/monitor).");
  } else if (error.kind === "unauthenticated") {
    empty("This service asks for a token", "What it has seen is for those who have one.", true);
  } else if (shown.size) {
    say(`${advice(error)} What you see is what it said last.`, true);
  } else {
    empty("Nothing to show", advice(error));
  }
}

function empty(title, text, asksForToken = false) {
  clear();
  say("");
  const place = byId("monitor-empty");
  place.querySelector("h3").textContent = title;
  place.querySelector("p").textContent = text;
  place.querySelector("button").hidden = !asksForToken;
  place.hidden = false;
}

function clear() {
  shown.clear();
  byId("monitored").replaceChildren();
}

function say(text, isError = false) {
  const status = byId("monitor-status");
  status.classList.toggle("error", isError);
  if (status.textContent !== text) status.textContent = text;
}

function show(models) {
  if (models.every((model) => model.num_rewards === 0)) {
    empty("No rewards yet", "Score something on the first tab, or let a trainer do it: its rewards appear here.");
    return;
  }
  byId("monitor-empty").hidden = true;
  say("");
  const versions = new Set(models.map((model) => model.model_version));
  for (const [version, { root }] of shown) {
    if (versions.has(version)) continue;
    root.remove();
    shown.delete(version);
  }
  models.forEach((model, index) => {
    const state = JSON.stringify([model, index === 0]);
    const known = shown.get(model.model_version) ?? { root: copyOf("monitored-template"), last: "" };
    shown.set(model.model_version, known);
    if (known.last !== state) draw(known.root, model, index === 0);
    known.last = state;
    // Moving an element that is in its place already would take the focus from what it holds.
    const there = byId("monitored").children[index];
    if (there !== known.root) byId("monitored").insertBefore(known.root, there ?? null);
  });
}

function draw(root, model, isCurrent) {
  const find = (selector) => root.querySelector(selector);
  find("h3").textContent = shortVersion(model.model_version);
  find("h3").title = model.model_version;
  find(".badge").textContent = isCurrent ? "served now" : "served before";
  find(".badge").classList.toggle("current", isCurrent);
  find(".count").textContent = count(model.num_rewards, "reward");
  find(".warnings").replaceChildren(...model.warnings.map(warning));
  const { live, held_out: heldOut } = model;
  const picture = histogram(live, heldOut);
  find(".chart").replaceChildren(...(picture.length ? picture : ["No distribution is known yet."]));
  find("details").hidden = picture.length === 0;
  find(".key.live").hidden = !live;
  find(".key.held-out").hidden = !heldOut;
  if (picture.length) find(".table").replaceChildren(table(live, heldOut));
  const warned = new Set(model.warnings.map((each) => each.type));
  find(".figures").replaceChildren(
    figure("Mean", model.mean, signed, "of the live rewards"),
    figure("Standard deviation", model.std, (value) => value.toFixed(3), "of the live rewards"),
    figure("Drift", model.drift, (value) => value.toFixed(3), drifted(model.drift), warned.has("drift")),
    figure("Length correlation", model.length_correlation, signed, "reward with number of tokens", warned.has("length")),
    figure("At the extremes", model.share_at_extremes, (value) => `${(100 * value).toFixed(1)} %`, "2 % expected", warned.has("extremes")),
  );
}

function drifted(drift) {
  if (drift === null) return "population stability index";
  const size = drift < 0.1 ? "as good as none" : drift < 0.25 ? "some" : "much";
  return `${size} (population stability index)`;
}

function figure(name, value, format, hint, isWarned = false) {
  const known = value !== null && value !== undefined;
  return element("div", { className: isWarned ? "warned" : "" },
    element("dt", { textContent: name }),
    element("dd", {}, element("strong", { textContent: known ? format(value) : "not known" }),
      element("span", { className: "hint", textContent: known || name !== "Drift" ? hint : "no held-out data" })));
}

function warning(found) {
  const [title, advised] = WARNINGS[found.type] ?? [found.type, ""];
  return element("li", {},
    element("h4", { textContent: title }),
    element("p", { textContent: found.message }),
    element("p", { className: "advised", textContent: advised }));
}
