"""What a rollout is made of: how to sample, with which engine, and what was sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reward_actor.groups import Group, GroupScores, Prompt

Question = Prompt | Group
"""What a policy is asked: a prompt, or a group without completions, which may have tools and
template arguments."""


@dataclass(frozen=True)
class Sampling:
    """How a policy is sampled; `max_tokens` bounds a completion."""

    num_completions: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int = 0


@dataclass(frozen=True)
class VllmSettings:
    """A vLLM engine: one per actor. `num_gpus` is its tensor parallelism; 0 runs on the CPU."""

    model: str
    num_gpus: int = 0
    max_model_len: int | None = None
    dtype: str = "auto"
    gpu_memory_utilization: float = 0.9
    cpu_threads: int = 0
    cpu_kv_cache_gib: int = 1


@dataclass
class RolloutGroup:
    """The n rollouts of one prompt; index i of every list belongs to completion i.

    `completion_ids[i]` end with the policy's stop token where it sampled one; `log_probs[i]` has
    one value for each of them, of the distribution that was sampled from (after temperature and
    top-p). `scores` is None where no scorer was asked. A prompt that could not be sampled has an
    `error` and empty lists.
    """

    prompt: Prompt
    prompt_ids: list[int]
    completions: list[str]
    completion_ids: list[list[int]]
    log_probs: list[list[float]]
    finish_reasons: list[str]
    scores: GroupScores | None = None
    error: str | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    template_args: Mapping[str, Any] = field(default_factory=dict)

    def as_text(self) -> Group:
        """What was asked, with the completions."""
        return Group(
            self.prompt, self.completions, template_args=self.template_args, tools=self.tools
        )


def asked(question: Question) -> Group:
    return question if isinstance(question, Group) else Group(question)
