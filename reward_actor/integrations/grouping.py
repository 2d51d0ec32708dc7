"""From the samples that trainers hand over to groups, and from scores back to their rewards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from reward_actor import conversation
from reward_actor.errors import RewardServiceError
from reward_actor.groups import Group, GroupScores, Message, Prompt

Completion = str | Sequence[Message]
Reward = TypeVar("Reward", bound=float | None)


def to_groups(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    tools: Sequence[Any] | None = None,
    template_args: Sequence[Any] | None = None,
) -> tuple[list[Group], list[list[int]]]:
    """The completions grouped by equal prompts, and the places where those of each group stood.

    Of a completion that is a conversation, everything but its last message belongs to the prompt.
    tools, template_args: of each sample what its chat template is told besides; None: nothing.
    Raises ValueError for messages that hold more than text and calls.
    """
    groups: dict[str, tuple[Group, list[str], list[int]]] = {}
    nothing = [None] * len(prompts)
    told = (nothing if column is None else column for column in (tools, template_args))
    samples = zip(prompts, completions, *told, strict=True)
    for place, (prompt, completion, its_tools, its_args) in enumerate(samples):
        shown, text = _shown(prompt, completion)
        group = Group(
            shown,
            template_args=conversation.template_args(its_args, "chat_template_kwargs"),
            tools=conversation.tools(its_tools, "tools"),
        )
        key = json.dumps([group.prompt, group.tools, group.template_args], default=str)
        _, texts, places = groups.setdefault(key, (group, [], []))
        texts.append(text)
        places.append(place)
    found = groups.values()
    whole = [replace(group, completions=texts) for group, texts, _ in found]
    return whole, [places for *_, places in found]


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
    said = conversation.messages(completion, "completion") if len(completion) else [_NOTHING]
    *earlier, last = said
    if last.get("tool_calls"):
        raise ValueError("the last message of a completion calls a tool; only text has a reward")
    return [*_messages(prompt), *earlier], last["content"]


_NOTHING: Message = {"role": "assistant", "content": ""}


def _messages(prompt: Prompt) -> list[Message]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return conversation.messages(prompt, "prompt")
