// The form: turns of the prompt, two to eight completions, and the request that they make.

import { ServiceError } from "./api.js";
import { makeCard, markStale, number } from "./cards.js";
import { byId, copyOf } from "./dom.js";

const MIN_COMPLETIONS = 2;
const MAX_COMPLETIONS = 8;
const EXAMPLE = {
  prompt: "Name two fruits that grow on trees.",
  completions: [
    "Apples and pears both grow on trees.",
    "A hammer and a saw.",
    "You could look that up yourself.",
  ],
};

const turns = [];
const cards = [];
let isText = false;

export function start() {
  addTurn(EXAMPLE.prompt);
  for (const text of EXAMPLE.completions) addCard(text);
  byId("add-turn").addEventListener("click", () => {
    const last = turns[turns.length - 1].querySelector("select").value;
    addTurn("", last === "user" ? "assistant" : "user").querySelector("textarea").focus();
  });
  byId("add-completion").addEventListener("click", () => addCard("").field.focus());
  for (const id of ["turns", "as-json"]) byId(id).addEventListener("input", () => markStale(cards));
}

/** Under a text contract the prompt is one text without roles. */
export function setFormat(format) {
  isText = format === "text";
  byId("turns").classList.toggle("plain", isText);
  byId("add-turn").hidden = isText;
}

export const allCards = () => [...cards];

/** What /v1/score gets. Throws ServiceError for JSON that is none. */
export function request() {
  const completions = cards.map((card) => card.field.value);
  return { groups: [{ ...(fromJson() ?? fromTurns()), completions }], token_rewards: true };
}

function fromJson() {
  const text = byId("as-json").value.trim();
  if (!text) return null;
  let given = null;
  try {
    given = JSON.parse(text);
  } catch (error) {
    throw new ServiceError("invalid_request", `The conversation is no JSON: ${error.message}`);
  }
  if (given === null || typeof given !== "object" || Array.isArray(given)) {
    throw new ServiceError("invalid_request", "The conversation must be a JSON object with a prompt.");
  }
  return given;
}

/** A single user's turn as a string, which every model takes. */
function fromTurns() {
  const messages = turns.map((turn) => ({
    role: turn.querySelector("select").value,
    content: turn.querySelector("textarea").value,
  }));
  const isString = isText || (messages.length === 1 && messages[0].role === "user");
  return { prompt: isString ? messages.map((message) => message.content).join("\n") : messages };
}

function addTurn(text, role = "user") {
  const turn = copyOf("turn-template");
  turn.querySelector("textarea").value = text;
  turn.querySelector("select").value = role;
  turn.querySelector(".remove").addEventListener("click", () => {
    turns.splice(turns.indexOf(turn), 1);
    turn.remove();
    numberTurns();
    markStale(cards);
    turns[turns.length - 1].querySelector("textarea").focus();
  });
  turns.push(turn);
  byId("turns").append(turn);
  numberTurns();
  markStale(cards);
  return turn;
}

function numberTurns() {
  turns.forEach((turn, i) => {
    turn.querySelector("textarea").setAttribute("aria-label", `Text of turn ${i + 1}`);
    turn.querySelector("select").setAttribute("aria-label", `Role of turn ${i + 1}`);
    const remove = turn.querySelector(".remove");
    remove.setAttribute("aria-label", `Remove turn ${i + 1}`);
    remove.disabled = turns.length === 1;
  });
}

function addCard(text) {
  const card = makeCard(text, removeCard);
  cards.push(card);
  byId("cards").append(card.root);
  numberCards();
  return card;
}

function removeCard(card) {
  const at = cards.indexOf(card);
  cards.splice(at, 1);
  card.root.remove();
  numberCards();
  markStale(cards);
  cards[Math.min(at, cards.length - 1)].field.focus();
}

function numberCards() {
  cards.forEach((card, i) => number(card, i, cards.length > MIN_COMPLETIONS));
  byId("add-completion").disabled = cards.length >= MAX_COMPLETIONS;
}
