"""A row of a data set in one form for all kinds: what is compared, and what is known about it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from reward_actor import conversation, dialogues
from reward_actor.groups import Completion, Prompt
from reward_actor.token_ids import common_prefix

_SHOWN = 3
# How whole dialogues are written as text (Anthropic's hh-rlhf).
_FIRST_TURN = re.compile(r"\s*Human:(.*?)(?:\n\nAssistant:|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Side:
    """A completion and what it answers; the reward is for the completion."""

    prompt: Prompt
    completion: Completion

    @property
    def text(self) -> str:
        """What the completion says, without its calls and reasoning."""
        said = self.completion
        return said if isinstance(said, str) else str(said["content"])


@dataclass(frozen=True)
class Row:
    """K completions, best first: K = 2 is a pair, K > 2 a ranking, K = 1 has only attributes.

    Either `sides` or, for a pre-tokenised row, `ids` holds the K; the other one is empty.
    """

    number: int
    """Its line (from 1) in the data set."""
    sides: tuple[Side, ...]
    """K prompts and completions, as text or messages; the prompts are nearly always equal."""
    scores: tuple[float, ...]
    """K, never rising: (1, 0) for a pair, equal ones for a tie, (0,) where nothing is compared."""
    key: str
    """What it is about: the split never parts rows of equal keys."""
    has_prompt: bool = True
    """Or nobody says what it is about, and `key` is what its completions begin with alike."""
    ids: tuple[Sequence[int], ...] = ()
    """K whole token sequences, scored as given."""
    margin: float = 0.0
    """By how much chosen is better, as the annotator said; 0 where nothing was said."""
    attributes: tuple[Mapping[str, float], ...] = ()
    """K mappings of name to number, or none at all."""
    subset: str = ""
    tools: Sequence[Mapping[str, Any]] = ()
    template_args: Mapping[str, Any] = field(default_factory=dict)
    is_dialogue: bool = False
    """The sides are whole dialogues in text, with the empty prompt."""
    has_scores: bool = True
    """Or it is a ranking whose completions are taken to be best first."""

    @property
    def is_tie(self) -> bool:
        """Nothing is preferred: all of several scores are equal."""
        return len(self.scores) > 1 and self.scores[0] == self.scores[-1]

    @property
    def prompts_differ(self) -> bool:
        """The completions answer different things, as far as that can be told."""
        first = _question(self.sides[0]) if self.sides else ""
        return any(_question(side) != first for side in self.sides)


def as_chat(row: Row) -> Row:
    """The row as a chat contract reads it: a dialogue in text is messages.

    Raises ValueError for a text that has no prompt and is no dialogue.
    """
    sides = tuple(map(_in_messages, row.sides))
    if sides == row.sides:
        return row
    key, has_prompt = prompt_key(sides)
    return replace(row, sides=sides, key=key, has_prompt=has_prompt, is_dialogue=False)


def _in_messages(side: Side) -> Side:
    if not isinstance(side.prompt, str):
        return side
    found = dialogues.from_dialogue(side.prompt, side.completion)
    if found is None and not side.prompt:
        raise ValueError(dialogues.NO_DIALOGUE)
    return side if found is None else Side(*found)


def prompt_key(sides: Sequence[Side]) -> tuple[str, bool]:
    """What must not stand on both sides of a held-out split, and whether the row says it.

    It is the first thing the human said: two pairs from one conversation, cut at different turns,
    share it. Of text that is not written as a dialogue and has no prompt it is what all sides begin
    with: two rows about one prompt may differ in it.
    """
    prompt = sides[0].prompt
    if not isinstance(prompt, str):
        human = [m["content"] for m in prompt if m["role"] == "user"]
        return str(human[0] if human else prompt), True
    text = prompt or sides[0].text
    turn = _FIRST_TURN.match(text)
    if turn:
        return turn[1].strip(), True
    if prompt:
        return prompt, True
    return text[: common_prefix(*(side.text for side in sides))] or text, False


def _question(side: Side) -> Any:
    if side.prompt == "":
        turn = _FIRST_TURN.match(side.text)
        return turn[1].strip() if turn else ""
    return conversation.as_messages(side.prompt)


class BadRows:
    """Collects what is wrong with which row, to be told at once: `count` of them, three shown."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.count = 0
        self._shown: list[str] = []

    def add(self, number: int, why: str) -> None:
        self.count += 1
        if self.count <= _SHOWN:
            self._shown.append(f"{self.source}:{number}: {why}")

    def check(self, num_rows: int) -> None:
        """Raise ValueError if there were any."""
        if self.count:
            more = f"\n  and {self.count - _SHOWN} more" if self.count > _SHOWN else ""
            raise ValueError(
                f"{self.count} of {num_rows} rows cannot be used:\n  "
                + "\n  ".join(self._shown)
                + more
            )
