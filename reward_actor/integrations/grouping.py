"""From the samples that trainers hand over to groups, and from scores back to their rewards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from reward_actor.errors import RewardServiceError
from reward_actor.groups import Group, GroupScores, Message, Prompt

Completion = str | Sequence[Message]
Reward = TypeVar("Reward", bound=float | None)


def to_groups(
    prompts: Sequence[Prompt], completions: Sequence[Completion]
) -> tuple[list[Group], list[list[int]]]:
    """The completions grouped by equal prompts, and the places where those of each group stood.

    Of a completion that is a conversation, everything but its last message belongs to the prompt.
    Raises ValueError for messages that hold more than text.
    """
    groups: dict[str, tuple[Prompt, list[str], list[int]]] = {}
    for place, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        shown, text = _shown(prompt, completion)
        _, texts, places = groups.setdefault(json.dumps(shown), (shown, [], []))
        texts.append(text)
        places.append(place)
    found = groups.values()
    return [Group(prompt, texts) for prompt, texts, _ in found], [places for *_, places in found]


def in_order(rewards: Sequence[Sequence[Reward]], places: Sequence[Sequence[int]]) -> list[Reward]:
    """The rewards of `to_groups`' groups, back where their completions stood."""
    pairs = [
        pair
        for of_group, where in zip(rewards, places, strict=True)
        for pair in zip(where, of_group, strict=True)
    ]
    return [reward for _, reward in sorted(pairs, key=lambda pair: pair[0])]


def rewards_of(scores: Sequence[GroupScores], error_reward: float | None) -> list[list[float]]:
    """The rewards of each group; for a sample without one `error_reward`, if the user chose any.

    Raises RewardServiceError otherwise: what has no reward must not seem to have one.
    """
    return [
        [
            _reward(reward, error, error_reward)
            for reward, error in zip(group.rewards, group.errors, strict=True)
        ]
        for group in scores
    ]


def _reward(reward: float | None, error: Any, error_reward: float | None) -> float:
    if reward is not None:
        return reward
    if error_reward is None:
        raise RewardServiceError(error.type, error.message)
    return error_reward


def _shown(prompt: Prompt, completion: Completion) -> tuple[Prompt, str]:
    """What the completion's last message answers, and that message."""
    if isinstance(completion, str):
        return prompt if isinstance(prompt, str) else _messages(prompt), completion
    *earlier, last = _messages(completion) or [{"role": "assistant", "content": ""}]
    return [*_messages(prompt), *earlier], last["content"]


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    """Role and content: what else a message carries (its tool calls, say) is no reward model's."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [{"role": m["role"], "content": _text(m.get("content"))} for m in prompt]


def _text(content: Any) -> str:
    if content is None:  # of a message that only calls a tool
        return ""
    if isinstance(content, str):
        return content
    parts: list[Any]
    parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("a message holds more than text; this service scores text only")
    return "".join(parts)
