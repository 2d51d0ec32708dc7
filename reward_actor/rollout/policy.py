"""The policy's side of a rollout: how its prompts become token ids, and how long they are."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from reward_actor.groups import Prompt
from reward_actor.model.inferred import contract_for
from reward_actor.model.tokenizer import load_tokenizer
from reward_actor.render import Renderer, RenderError
from reward_actor.rollout.records import Sampling


def longest_needed(policy: str, prompts: Sequence[Prompt], sampling: Sampling) -> int:
    """Tokens that the longest prompt and its completion can take, at most what the policy takes.

    An engine of that length spares the memory of a long-context model's full length. Raises
    ValueError for a policy that is not there.
    """
    renderer = policy_renderer(policy)
    longest = 0
    for prompt in prompts:
        with contextlib.suppress(RenderError):  # becomes this prompt's error when it is sampled
            longest = max(longest, len(renderer.prompt_ids(prompt)))
    return min(longest + sampling.max_tokens, renderer.contract.max_length)


def policy_renderer(policy: str) -> Renderer:
    from transformers import AutoConfig

    if not (Path(policy) / "config.json").exists():
        raise ValueError(f"{policy} holds no config.json, so no policy to sample from")
    tokenizer = load_tokenizer(Path(policy))
    config = AutoConfig.from_pretrained(policy)
    format_ = "chat" if tokenizer.chat_template else "text"
    return Renderer(tokenizer, contract_for(tokenizer, config, format=format_))
