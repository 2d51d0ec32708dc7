// One completion: what is scored and, below it, what came of it.

import { advice, call, ServiceError } from "./api.js";
import { copyOf, count, element, signed } from "./dom.js";
import { fill } from "./heatmap.js";

/** A new card. `onRemove` is called with it. */
export function makeCard(text, onRemove) {
  const root = copyOf("card-template");
  const find = (selector) => root.querySelector(selector);
  const card = { root, field: find("textarea") };
  card.field.value = text;
  card.field.addEventListener("input", () => markStale([card]));
  find(".remove").addEventListener("click", () => onRemove(card));
  return card;
}

/** Give a card its number among `total`. */
export function number(card, index, canRemove) {
  const name = `Completion ${index + 1}`;
  card.root.querySelector("h3").textContent = name;
  card.field.setAttribute("aria-label", name);
  card.root.querySelector(".tokens").setAttribute("aria-label", `Tokens of completion ${index + 1}`);
  card.root.querySelector(".why pre").setAttribute("aria-label", `How the reward of completion ${index + 1} comes about`);
  const remove = card.root.querySelector(".remove");
  remove.setAttribute("aria-label", `Remove completion ${index + 1}`);
  remove.disabled = !canRemove;
}

/** What is shown no longer belongs to what is written. */
export function markStale(cards) {
  for (const { root } of cards) root.classList.toggle("stale", root.classList.contains("scored"));
}

/** Show one result (a GroupReply of /v1/score) on its cards.
 *
 *  group: what was scored; scale: of the token rewards. */
export function showResult(cards, group, result, scale) {
  const ranks = ranksOf(result.rewards);
  cards.forEach((card, i) => {
    const find = (selector) => card.root.querySelector(selector);
    const reward = result.rewards[i];
    const error = result.errors[i];
    card.root.classList.remove("stale");
    card.root.classList.add("scored");
    card.root.classList.toggle("best", ranks[i] === 1 && cards.length > 1);
    card.root.classList.toggle("failed", error !== null);
    const shown = find(".reward");
    shown.textContent = reward === null ? "–" : signed(reward);
    shown.dataset.value = reward ?? "";
    shown.toggleAttribute("data-empty", reward === null);
    find(".rank").textContent = ranks[i] === null ? "not scored" : `rank ${ranks[i]}`;
    const failure = find(".sample-error");
    failure.hidden = error === null;
    failure.textContent = error === null ? "" : `${error.type}: ${error.message}`;
    find(".meter").replaceChildren(...meter(result.rewards, i));
    find(".numbers").replaceChildren(...numbers(result, i));
    showTokens(card, result, i, scale);
    offerExplanation(card, { ...group, completions: [group.completions[i]] });
  });
}

function showTokens(card, result, i, scale) {
  const list = card.root.querySelector(".tokens");
  const readout = card.root.querySelector(".readout");
  const rewards = result.token_rewards?.[i];
  const tokens = result.tokens?.[i];
  const placeholder = card.root.querySelector(".placeholder");
  placeholder.hidden = Boolean(rewards && tokens);
  if (rewards && tokens) {
    fill(list, readout, { tokens, rewards, numPrompt: result.num_prompt_tokens?.[i] ?? 0, scale });
    return;
  }
  list.replaceChildren();
  list.hidden = true;
  readout.replaceChildren();
  placeholder.textContent = result.errors[i] ? "No tokens were scored." : "No token rewards came.";
}

/** Ask for it when it is opened for the first time. */
function offerExplanation({ root }, group) {
  const details = root.querySelector(".why");
  const shown = details.querySelector("pre");
  let asked = false;
  const show = async () => {
    if (!details.open || asked) return;
    asked = true;
    let text = "";
    try {
      const reply = await call("v1/explain", group);
      text = [...reply.lines, "", ...reply.model_lines].join("\n");
    } catch (error) {
      if (!(error instanceof ServiceError)) throw error;
      text = advice(error);
      asked = false;
    }
    if (details.ontoggle === show) shown.textContent = text; // else it was scored again meanwhile
  };
  Object.assign(details, { hidden: false, open: false, ontoggle: show });
  shown.textContent = "…";
}

/** 1 for the highest; equal rewards share a rank; null where there is none. */
export function ranksOf(rewards) {
  return rewards.map((own) =>
    own === null ? null : 1 + rewards.filter((other) => other !== null && other > own).length,
  );
}

/** This reward on a line from the lowest to the highest of all, the others as ticks. */
function meter(rewards, i) {
  if (rewards[i] === null) return [];
  const known = rewards.filter((reward) => reward !== null);
  const low = Math.min(...known);
  const span = Math.max(...known) - low;
  const share = (reward) => (span === 0 ? 1 : 0.04 + (0.96 * (reward - low)) / span);
  const bar = element("span", { className: "fill" });
  bar.style.setProperty("--length", share(rewards[i]).toFixed(4));
  const ticks = known.map((reward) => {
    const tick = element("span", { className: "tick" });
    tick.style.setProperty("--length", share(reward).toFixed(4));
    return tick;
  });
  return [bar, ...ticks];
}

function numbers(result, i) {
  if (result.rewards[i] === null) return [];
  const items = [`raw score ${signed(result.raw_scores[i])}`, count(result.num_tokens[i], "token")];
  if (result.truncated[i]) items.push("truncated");
  const spread = result.spread?.[i];
  if (spread !== null && spread !== undefined) items.push(`spread ${spread.toFixed(3)}`);
  const parts = items.map((item) => element("span", { textContent: item }));
  const named = Object.entries(result.named_rewards ?? {});
  if (named.length) {
    const rows = named.map(([name, rewards]) =>
      element("span", { className: "member" }, `${name} `,
        element("b", { textContent: rewards[i] === null ? "–" : signed(rewards[i]) })),
    );
    parts.push(element("span", { className: "members" }, ...rows));
  }
  return parts;
}
