// Elements and numbers. Text goes in as text nodes only; nothing here parses HTML.

export const byId = (id) => document.getElementById(id);

/** A new element: `props` are its properties, or attributes where the name holds a dash. */
export function element(tag, props = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.includes("-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

/** A new SVG element with these attributes. */
export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** The first element of a <template>, copied. */
export const copyOf = (id) => byId(id).content.firstElementChild.cloneNode(true);

/** A number with its sign, three decimals where they say something: +0.421, −1.916, +120.4. */
export function signed(value) {
  const size = Math.abs(value);
  const digits = size >= 1e5 ? size.toPrecision(5) : size.toFixed(size >= 100 ? 1 : 3);
  const sign = Number(digits) === 0 ? "" : value < 0 ? "−" : "+";
  return sign + digits;
}

export const milliseconds = (value) =>
  value >= 1000 ? `${(value / 1000).toFixed(2)} s` : `${value.toFixed(value >= 100 ? 0 : 1)} ms`;

export const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

/** "sha256:0123..." as what one can say aloud. */
export const shortVersion = (version) => version.replace(/^sha256:/, "").slice(0, 8);

/** Arrow keys, Home and End over `items` of one row; only one of them is in the order of Tab. */
export function moveWithArrows(container, items, onMove) {
  container.addEventListener("keydown", (event) => {
    const all = items();
    const at = all.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
    if (to === undefined || at < 0) return;
    event.preventDefault();
    onMove(all[(to + all.length) % all.length]);
  });
}
