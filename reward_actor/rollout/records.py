"""What a rollout is made of: how to sample, with which engine, and what was sampled."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reward_actor.groups import Group, GroupScores, Message, Prompt

Question = Prompt | Group
"""What a policy is asked: a prompt, or a group without completions, which may have tools and
template arguments."""

Environment = Callable[[list[Message]], Sequence[Message] | Awaitable[Sequence[Message]]]
"""What answers a policy: it is given a conversation that ends with the assistant's turn and returns
the messages that follow, a tool's result for one; none end the conversation. It is pickled, and
runs in the actor: what takes long should be awaited."""

# Fields of vllm.SamplingParams that `Sampling` has, or that an engine sets.
_OWN = frozenset((
    "n", "temperature", "top_p", "max_tokens", "seed", "stop", "logprobs", "output_kind",
    "detokenize",
))  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """How a policy is sampled.

    max_tokens  of a completion.
    seed        of the run; each completion has its own, by `seed_of_prompt`.
    stop        texts that end a completion; they are not part of it.
    adapter     name of a LoRA adapter; see `RolloutPool.update_weights`.
    max_turns   of the assistant, where an environment answers it.
    other       further fields of `vllm.SamplingParams` by name: top_k, min_p, ...

    Raises ValueError for values that cannot be.
    """

    num_completions: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int = 0
    stop: Sequence[str] = ()
    adapter: str | None = None
    max_turns: int = 8
    other: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_completions", "max_tokens", "max_turns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be at least 0")
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.temperature == 0 and self.num_completions > 1:
            raise ValueError(
                f"temperature 0 always gives one completion, not {self.num_completions}"
            )
        if isinstance(self.stop, str):
            raise ValueError("stop is one text; give a list of them")
        if own := _OWN & set(self.other):
            raise ValueError(f"other has {', '.join(sorted(own))}, which Sampling sets by itself")

    def seed_of_prompt(self, index: int, turn: int = 0) -> int:
        """Of the prompt's first completion in this turn; completion c has that plus c.

        Runs, prompts and turns with seeds next to each other must not share random numbers, so they
        are hashed. Of a seed PyTorch takes the low 32 bits alone on a CPU.
        """
        digest = hashlib.blake2b(f"{self.seed} {index} {turn}".encode(), digest_size=7)
        return int.from_bytes(digest.digest(), "little")


@dataclass(frozen=True)
class VllmSettings:
    """A vLLM engine: one per actor. `num_gpus` is its tensor parallelism; 0 runs on the CPU.

    sleeps            on a GPU: whether `RolloutPool.sleep` can free its memory.
    max_adapters      LoRA adapters at a time.
    max_adapter_rank  of such an adapter, one of those that vLLM takes.
    """

    model: str
    num_gpus: int = 0
    max_model_len: int | None = None
    dtype: str = "auto"
    gpu_memory_utilization: float = 0.9
    cpu_threads: int = 0
    cpu_kv_cache_gib: int = 1
    sleeps: bool = False
    max_adapters: int = 0
    max_adapter_rank: int = 16


@dataclass(frozen=True)
class Turn:
    """One turn of the assistant: what the policy saw, and what was sampled. See `RolloutGroup`."""

    prompt_ids: list[int]
    completion: str
    completion_ids: list[int]
    log_probs: list[float]
    policy_versions: list[int]
    finish_reason: str
    ended_with_eos: bool


@dataclass
class RolloutGroup:
    """The n rollouts of one prompt; index i of every list belongs to completion i.

    completion_ids   end with the policy's stop token where it sampled one.
    log_probs        of each of those tokens, under the distribution that was sampled from (after
                     temperature and top-p).
    finish_reasons   "stop" or "length".
    scores           None where no scorer was asked; with `turn_rewards` of conversations.
    error            why the prompt could not be sampled; the lists are empty then.
    index            of the prompt among those that were asked.
    policy_versions  of the weights that sampled each of the tokens; see
                     `RolloutPool.update_weights`.
    ended_with_eos   whether the policy ended it by itself: neither its length nor a stop text did.
    travels_as       what the scorer was sent: "token ids" or "text".
    turns            where an environment answers: the assistant's turns of each completion. What
                     is above is of its last one.
    conversations    likewise: the prompt and all that followed.
    """

    prompt: Prompt
    prompt_ids: list[int] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)
    completion_ids: list[list[int]] = field(default_factory=list)
    log_probs: list[list[float]] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    scores: GroupScores | None = None
    error: str | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    template_args: Mapping[str, Any] = field(default_factory=dict)
    index: int = 0
    policy_versions: list[list[int]] = field(default_factory=list)
    ended_with_eos: list[bool] = field(default_factory=list)
    travels_as: str | None = None
    turns: list[list[Turn]] = field(default_factory=list)
    conversations: list[list[Message]] = field(default_factory=list)

    def end_with(self, turns: Sequence[Turn]) -> None:
        """Take the last turn of each completion."""
        self.completions = [turn.completion for turn in turns]
        self.completion_ids = [turn.completion_ids for turn in turns]
        self.log_probs = [turn.log_probs for turn in turns]
        self.policy_versions = [turn.policy_versions for turn in turns]
        self.finish_reasons = [turn.finish_reason for turn in turns]
        self.ended_with_eos = [turn.ended_with_eos for turn in turns]

    @property
    def rewards(self) -> list[float | None]:
        """Of each completion, or None for one that has none."""
        return [None] * len(self.completions) if self.scores is None else self.scores.rewards

    def as_text(self) -> Group:
        """What was asked, with the completions."""
        return Group(
            self.prompt, self.completions, template_args=self.template_args, tools=self.tools
        )


def asked(question: Question) -> Group:
    return question if isinstance(question, Group) else Group(question)
