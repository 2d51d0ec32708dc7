// One cell for each token, coloured by its reward on one diverging scale for all completions.

import { byId, element, signed } from "./dom.js";

/** The scale of these rewards: zero in the middle where they lie on both sides of it. */
export function scaleOf(values) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (low > high) low = high = 0;
  const centre = low <= 0 && high >= 0 ? 0 : (low + high) / 2;
  const half = Math.max(high - centre, centre - low) || 1;
  return { centre, half, low: centre - half, high: centre + half };
}

export function showScale(scale) {
  byId("scale-low").textContent = signed(scale.low);
  byId("scale-centre").textContent = signed(scale.centre);
  byId("scale-high").textContent = signed(scale.high);
  const words = `Colours from ${signed(scale.low)}, orange, over ${signed(scale.centre)} to ${signed(scale.high)}, blue`;
  byId("scale").setAttribute("aria-label", words);
}

/** Fill `list` (role listbox) with cells; `readout` shows the one that is pointed at or focused.
 *
 *  tokens: what each reads as; rewards: one a token; numPrompt: how many are the prompt's. */
export function fill(list, readout, { tokens, rewards, numPrompt, scale }) {
  const rest = `${tokens.length} tokens, ${numPrompt} of them the prompt’s`;
  const describe = (index) => {
    const part = index < numPrompt ? "prompt" : "completion";
    const pooled = index === tokens.length - 1 ? ", pooled" : "";
    return `token ${index + 1} of ${tokens.length}, ${part}${pooled}`;
  };
  const cells = tokens.map((token, index) => {
    const shown = visible(token);
    const share = (rewards[index] - scale.centre) / scale.half;
    const cell = element("span", {
      className: "token",
      role: "option",
      tabIndex: -1,
      textContent: shown.text,
      "aria-selected": "false",
      "aria-label": `${shown.spoken}, ${signed(rewards[index])}, ${describe(index)}`,
    });
    cell.dataset.reward = rewards[index];
    cell.dataset.part = index < numPrompt ? "prompt" : "completion";
    cell.classList.toggle("special", shown.isSpecial);
    cell.classList.toggle("pooled", index === tokens.length - 1);
    cell.classList.toggle("high", share > 0);
    cell.style.setProperty("--share", Math.min(1, Math.abs(share)).toFixed(3));
    return cell;
  });
  const read = (cell) => {
    const index = cells.indexOf(cell);
    if (index < 0) {
      readout.replaceChildren(rest);
      return;
    }
    const step = index > 0 ? `${signed(rewards[index] - rewards[index - 1])} to the token before` : "";
    readout.replaceChildren(
      element("code", { textContent: visible(tokens[index]).text }),
      element("strong", { textContent: signed(rewards[index]) }),
      element("span", { textContent: step }),
      element("span", { textContent: describe(index) }),
    );
  };
  // A line break of the text breaks the line here as well, after the cell that shows it.
  const pieces = cells.flatMap((cell, i) => (tokens[i].includes("\n") ? [cell, element("br")] : [cell]));
  list.replaceChildren(...pieces);
  list.hidden = false;
  const first = cells[numPrompt] ?? cells[0];
  if (first) first.tabIndex = 0;
  listen(list, cells, read);
  read(null);
  if (first && list.scrollHeight > list.clientHeight) list.scrollTop = first.offsetTop - list.offsetTop;
}

function listen(list, cells, read) {
  const focused = () => cells.find((cell) => cell === document.activeElement) ?? null;
  list.onpointerover = (event) => read(event.target.closest(".token") ?? focused());
  list.onpointerleave = () => read(focused());
  const enter = ({ target: cell }) => {
    for (const other of cells) if (other.tabIndex === 0) other.tabIndex = -1;
    cell.tabIndex = 0;
    cell.setAttribute("aria-selected", "true");
    read(cell);
  };
  const leave = ({ target: cell }) => {
    cell.setAttribute("aria-selected", "false");
    read(null);
  };
  for (const cell of cells) Object.assign(cell, { onfocus: enter, onblur: leave });
  list.onkeydown = (event) => {
    const at = cells.indexOf(document.activeElement);
    const to = at < 0 ? null : cellAt(event.key, cells, at);
    if (!to) return;
    event.preventDefault();
    to.focus();
  };
}

/** The cell that a key leads to from the one at `at`; up and down go by what lies there. */
function cellAt(key, cells, at) {
  const shown = cells.filter((cell) => cell.offsetParent !== null);
  const index = shown.indexOf(cells[at]);
  if (key === "ArrowRight") return shown[index + 1];
  if (key === "ArrowLeft") return shown[index - 1];
  if (key === "Home") return shown[0];
  if (key === "End") return shown[shown.length - 1];
  if (key !== "ArrowUp" && key !== "ArrowDown") return null;
  const here = cells[at].getBoundingClientRect();
  const middle = here.left + here.width / 2;
  const down = key === "ArrowDown";
  const boxes = shown.map((cell) => [cell, cell.getBoundingClientRect()]);
  const beyond = boxes.filter(([, box]) => (down ? box.top > here.top + 2 : box.top < here.top - 2));
  if (!beyond.length) return null;
  const tops = beyond.map(([, box]) => box.top);
  const row = down ? Math.min(...tops) : Math.max(...tops);
  const distance = (box) => Math.abs(box.left + box.width / 2 - middle);
  const inRow = beyond.filter(([, box]) => Math.abs(box.top - row) <= 2);
  return inRow.reduce((best, next) => (distance(next[1]) < distance(best[1]) ? next : best))[0];
}

const SPECIAL = /^(<\|.*\|>|<\/?[A-Za-z_]+>|\[[A-Z]+\])$/s;
const WHITESPACE = { " ": "·", "\n": "⏎", "\r": "␍", "\t": "⇥", "\u00a0": "⍽" };
const SPOKEN = { " ": "space", "\n": "new line", "\r": "carriage return", "\t": "tab" };

/** What stands for a token: its whitespace made visible, in words where it has nothing else. */
function visible(token) {
  const isSpecial = SPECIAL.test(token);
  if (token === "") return { text: "∅", spoken: "empty", isSpecial };
  if (token === "�") return { text: "�", spoken: "part of a character", isSpecial };
  const text = token.replace(/[ \n\r\t\u00a0]/g, (character) => WHITESPACE[character]);
  const spoken = token.trim() === "" ? [...token].map((c) => SPOKEN[c] ?? "blank").join(", ") : token.trim();
  return { text, spoken: isSpecial ? `special token ${spoken}` : spoken, isSpecial };
}
