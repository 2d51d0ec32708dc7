// The playground: wires the form, the results, the tabs and the colours together.

import { advice, call, ServiceError } from "./api.js";
import { showResult } from "./cards.js";
import * as compose from "./compose.js";
import { byId, moveWithArrows } from "./dom.js";
import { refresh, setState, showLatency } from "./header.js";
import { scaleOf, showScale } from "./heatmap.js";
import * as monitor from "./monitor.js";

let busy = false;

function onInfo(info) {
  compose.setFormat(info.format);
}

async function score() {
  if (busy) return;
  setBusy(true);
  say("");
  const cards = compose.allCards();
  const started = performance.now();
  try {
    const request = compose.request();
    const reply = await call("v1/score", request);
    showLatency(reply.timings_ms, performance.now() - started);
    const [result] = reply.results;
    const scale = scaleOf((result.token_rewards ?? []).flatMap((row) => row ?? []));
    showScale(scale);
    showResult(cards, request.groups[0], result, scale);
    say(summary(result.rewards));
    refresh(onInfo, { ask: false });
  } catch (error) {
    if (!(error instanceof ServiceError)) throw error;
    say(advice(error), true);
    if (error.kind === "network") setState("gone");
    if (["network", "unavailable", "asleep"].includes(error.kind)) refresh(onInfo, { ask: false });
  } finally {
    setBusy(false);
  }
}

function summary(rewards) {
  const known = rewards.filter((reward) => reward !== null);
  const failed = rewards.length - known.length;
  const best = known.length ? rewards.indexOf(Math.max(...known)) + 1 : null;
  const scored = known.length ? `Completion ${best} ranks first.` : "";
  return failed ? `${scored} ${failed} of ${rewards.length} could not be scored.`.trim() : scored;
}

function say(text, isError = false) {
  const status = byId("status");
  status.classList.toggle("error", isError);
  status.textContent = text;
}

function setBusy(value) {
  busy = value;
  byId("cards").setAttribute("aria-busy", String(value));
  byId("score").setAttribute("aria-disabled", String(value));
  byId("form").classList.toggle("busy", value);
}

function select(tab) {
  for (const each of document.querySelectorAll("[role=tab]")) {
    const chosen = each === tab;
    each.setAttribute("aria-selected", String(chosen));
    each.tabIndex = chosen ? 0 : -1;
    byId(each.getAttribute("aria-controls")).hidden = !chosen;
  }
  monitor.setVisible(tab.id === "tab-monitor");
}

function startTabs() {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  for (const tab of tabs) tab.addEventListener("click", () => select(tab));
  moveWithArrows(document.querySelector("[role=tablist]"), () => tabs, (tab) => {
    select(tab);
    tab.focus();
  });
}

/** Colours follow the system until the button is pressed. */
function startTheme() {
  const button = byId("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
  const show = () => button.setAttribute("aria-pressed", String(isDark()));
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    show();
  });
  dark.addEventListener("change", show);
  show();
}

compose.start();
startTabs();
startTheme();
monitor.start();
byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  score();
});
byId("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    score();
  }
});
byId("show-prompt").addEventListener("change", (event) => {
  byId("cards").classList.toggle("without-prompt", !event.target.checked);
});
// All at once, so that nothing on the page moves.
byId("main").hidden = false;
refresh(onInfo);
