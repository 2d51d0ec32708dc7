// Live rewards over held-out ones, drawn to the same edges.

import { element, svg } from "./dom.js";

// Units of the drawing, which is stretched to its place; the labels below it are not.
const WIDTH = 1000;
const HEIGHT = 240;
const FLOOR = HEIGHT - 5;
const TOP = 6;

const label = (value) => String(Number(value.toPrecision(3))).replace("-", "−");
const percent = (share) => `${(100 * share).toFixed(1)} %`;

/** A drawing of two RewardDistributions, either of which may be null, and the labels of its axis.
 *  Nothing where both are null.
 *
 *  Heights are shares over widths, so that an area is a share even where edges are uneven. */
export function histogram(live, heldOut) {
  const edges = (live ?? heldOut)?.edges;
  if (!edges || edges.length < 2) return [];
  const low = edges[0];
  const span = edges[edges.length - 1] - low || 1;
  const x = (value) => (WIDTH * (value - low)) / span;
  const heights = (of) => (of ? of.shares.map((share, i) => share / Math.max(edges[i + 1] - edges[i], span / WIDTH)) : []);
  const ours = heights(live);
  const theirs = heights(heldOut);
  const top = Math.max(...ours, ...theirs) || 1;
  const y = (height) => FLOOR - ((FLOOR - TOP) * height) / top;

  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", class: "histogram" });
  picture.setAttribute("preserveAspectRatio", "none");
  picture.setAttribute("aria-label", describe(live, heldOut));
  ours.forEach((height, i) => {
    const left = x(edges[i]);
    const width = Math.max(0.5, x(edges[i + 1]) - left - 1.5);
    const bar = svg("rect", { class: "live", x: left + 0.75, width, y: y(height), height: FLOOR - y(height) });
    const range = `${label(edges[i])} to ${label(edges[i + 1])}: ${percent(live.shares[i])}`;
    const title = svg("title");
    title.textContent = heldOut ? `${range} (held-out ${percent(heldOut.shares[i])})` : range;
    bar.append(title);
    picture.append(bar);
  });
  if (theirs.length) {
    const steps = theirs.map((height, i) => `V${y(height)}H${x(edges[i + 1])}`).join("");
    const outline = `M${x(low)},${FLOOR}${steps}V${FLOOR}`;
    picture.append(svg("path", { class: "held-out-area", d: `${outline}Z` }));
    picture.append(svg("path", { class: "held-out", d: outline }));
  }
  picture.append(svg("line", { class: "axis", x1: 0, x2: WIDTH, y1: FLOOR, y2: FLOOR }));
  const labels = element("div", { className: "tick-labels", "aria-hidden": "true" });
  for (const value of ticks(low, low + span)) {
    picture.append(svg("line", { class: "axis", x1: x(value), x2: x(value), y1: FLOOR, y2: HEIGHT }));
    const text = element("span", { textContent: label(value) });
    text.style.setProperty("--at", (x(value) / WIDTH).toFixed(4));
    labels.append(text);
  }
  return [picture, labels];
}

/** The same numbers as a table. */
export function table(live, heldOut) {
  const { edges } = live ?? heldOut;
  const cell = (tag, text, scope) => element(tag, scope ? { textContent: text, scope } : { textContent: text });
  const head = element("tr", {}, ...["Reward", "live", "held-out"].map((name) => cell("th", name, "col")));
  const rows = edges.slice(1).map((edge, i) =>
    element("tr", {},
      cell("th", `${label(edges[i])} to ${label(edge)}`, "row"),
      ...[live, heldOut].map((of) => cell("td", of ? percent(of.shares[i]) : "–"))),
  );
  return element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows));
}

function describe(live, heldOut) {
  const peak = (of) => {
    const at = of.shares.indexOf(Math.max(...of.shares));
    return `between ${label(of.edges[at])} and ${label(of.edges[at + 1])}`;
  };
  const parts = [];
  if (live) parts.push(`live rewards are most often ${peak(live)}`);
  if (heldOut) parts.push(`held-out ones ${peak(heldOut)}`);
  return `Histogram: ${parts.join(", ")}`;
}

/** Round values inside [low, high], about six of them. */
function ticks(low, high) {
  const rough = (high - low) / 6;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((size) => size >= rough);
  const found = [];
  // Whole multiples of the step: adding it up would print 0.30000000000000004.
  for (let n = Math.ceil(low / step); n * step <= high; n += 1) found.push(n * step);
  return found;
}
