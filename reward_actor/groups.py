"""What goes into a scorer and what comes out: plain values, no dependency.

Shapes: a group holds one prompt and n completions; every list of its scores has length n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reward_actor.contract import ScoringContract

Message = Mapping[str, Any]
"""One chat turn, {"role": str, "content": str}."""

Prompt = str | Sequence[Message]


@dataclass(frozen=True)
class SampleError:
    """Why one sample has no reward. `type` is a word of `reward_actor.schema.ErrorType`."""

    type: str
    message: str


@dataclass(frozen=True)
class Group:
    """A prompt and its n completions, as text or as token ids (never a mixture).

    With ids, the sequence that is scored is `prompt_ids + completion_ids[i]`, as given.
    """

    prompt: Prompt | None = None
    completions: Sequence[str] = ()
    prompt_ids: Sequence[int] | None = None
    completion_ids: Sequence[Sequence[int]] = ()

    def __post_init__(self) -> None:
        if isinstance(self.completions, str):
            raise ValueError("completions is one string; give a list of strings")
        if (self.prompt is None) == (self.prompt_ids is None):
            raise ValueError("a group needs exactly one of prompt and prompt_ids")
        if self.prompt_ids is not None and self.completions:
            raise ValueError("prompt_ids goes with completion_ids, not with completions")
        if self.prompt is not None and self.completion_ids:
            raise ValueError("prompt goes with completions, not with completion_ids")

    def __len__(self) -> int:
        return len(self.completions) if self.prompt_ids is None else len(self.completion_ids)


@dataclass(frozen=True)
class GroupScores:
    """The scores of one group; index i belongs to completion i.

    `rewards` are normalised by the contract, `raw_scores` are the head's output, `num_tokens`
    counts prompt + completion. Where `errors[i]` is set, `rewards[i]` and `raw_scores[i]` are None.
    """

    rewards: list[float | None]
    raw_scores: list[float | None]
    num_tokens: list[int]
    truncated: list[bool]
    errors: list[SampleError | None]
    model_version: str
    token_rewards: list[list[float] | None] | None = None
    tokens: list[list[str] | None] | None = None


Rendered = list[int] | SampleError
"""The token ids of one sample, or why it has none."""


def scorable(rendered: Sequence[Sequence[Rendered]]) -> list[list[int]]:
    """The token ids of every sample that can be scored, in order, over all groups."""
    return [ids for group in rendered for ids in group if not isinstance(ids, SampleError)]


def assemble(
    rendered: Sequence[Sequence[Rendered]],
    raw_scores: Sequence[float],
    contract: ScoringContract,
    model_version: str,
    token_scores: Sequence[Sequence[float]] | None = None,
) -> list[GroupScores]:
    """Lay the raw scores of `scorable(rendered)` back into the groups and normalise them.

    A raw score that is not finite becomes an error of its sample. `token_scores` are the raw scores
    of every token, one list for each scorable sample.
    """
    assert len(raw_scores) == len(scorable(rendered)), "one raw score for each scorable sample"
    following = iter(range(len(raw_scores)))
    results = []
    for group in rendered:
        scores = GroupScores([], [], [], [], [], model_version)
        per_token: list[list[float] | None] = []
        for sample in group:
            error = sample if isinstance(sample, SampleError) else None
            raw: float | None = None
            tokens: list[float] | None = None
            if not isinstance(sample, SampleError):
                index = next(following)
                raw = float(raw_scores[index])
                row = [raw] if token_scores is None else token_scores[index]
                if not all(math.isfinite(score) for score in row):
                    raw = None
                    error = SampleError("non_finite_reward", "the model's reward is not finite")
                elif token_scores is not None:
                    tokens = [contract.normalise(float(score)) for score in row]
            scores.raw_scores.append(raw)
            scores.rewards.append(None if raw is None else contract.normalise(raw))
            scores.num_tokens.append(0 if isinstance(sample, SampleError) else len(sample))
            scores.truncated.append(False)
            scores.errors.append(error)
            per_token.append(tokens)
        results.append(scores if token_scores is None else replace(scores, token_rewards=per_token))
    return results
