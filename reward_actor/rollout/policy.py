"""The policy's side of a rollout: how its prompts become token ids, and how long they are."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from reward_actor.groups import Group
from reward_actor.model.inferred import contract_for
from reward_actor.model.tokenizer import load_tokenizer
from reward_actor.render import Renderer, RenderError
from reward_actor.rollout.records import Question, RolloutGroup, Sampling, asked


def longest_needed(policy: str, prompts: Sequence[Question], sampling: Sampling) -> int:
    """Tokens that the longest prompt and its completion can take, at most what the policy takes.

    An engine of that length spares the memory of a long-context model's full length. Raises
    ValueError for a policy that is not there.
    """
    renderer = policy_renderer(policy)
    longest = 0
    for prompt in prompts:
        with contextlib.suppress(RenderError):  # becomes this prompt's error when it is sampled
            longest = max(longest, len(question_ids(renderer, asked(prompt))))
    return min(longest + sampling.max_tokens, renderer.contract.max_length)


def question_ids(renderer: Renderer, question: Group) -> list[int]:
    """What the policy continues. Raises RenderError."""
    assert question.prompt is not None
    return renderer.prompt_ids(
        question.prompt, tools=question.tools, template_args=question.template_args
    )


def policy_renderer(policy: str) -> Renderer:
    from transformers import AutoConfig

    if not (Path(policy) / "config.json").exists():
        raise ValueError(f"{policy} holds no config.json, so no policy to sample from")
    tokenizer = load_tokenizer(Path(policy))
    config = AutoConfig.from_pretrained(policy)
    format_ = "chat" if tokenizer.chat_template else "text"
    return Renderer(tokenizer, contract_for(tokenizer, config, format=format_))


def group_to_score(rollout: RolloutGroup, renderer: Renderer) -> Group:
    """What a scorer that renders as `renderer` does is sent of a rollout: its token ids where they
    are what the prompt and the completions render to, otherwise its text.

    They are not where a template changes a completion (Qwen3 writes a think block before it, Llama
    3 trims it) or a policy sampled tokens that the tokenizer would not choose for the same text. A
    completion that was cut by its length is scored as if its turn had ended there, either way.
    """
    completion_ids = []
    for text, sampled in zip(rollout.completions, rollout.completion_ids, strict=True):
        try:
            rendered = renderer.render(
                rollout.prompt, text, tools=rollout.tools, template_args=rollout.template_args
            )
        except RenderError:
            break
        given = [*rollout.prompt_ids, *sampled]
        if rendered[: len(given)] != given:
            break
        completion_ids.append(rendered[len(rollout.prompt_ids) :])
    else:
        return Group(prompt_ids=rollout.prompt_ids, completion_ids=completion_ids)
    return rollout.as_text()
