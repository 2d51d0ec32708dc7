"""Rewards without a service, which those of a service must equal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reward_actor import RewardScorer


def templated(offline: RewardScorer, prompt: str, completion: str) -> str:
    """A conversation as a client templates it by itself, with what follows the last turn's end."""
    messages = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": completion},
    ]
    text = offline.renderer.tokenizer.apply_chat_template(messages, tokenize=False)
    assert isinstance(text, str)
    return text


def reward(offline: RewardScorer, prompt: Any, completion: str) -> float:
    """The reward of one completion, without a service."""
    from reward_actor import Group

    [found] = offline.score([Group(prompt, [completion])])[0].rewards
    assert found is not None
    return found
