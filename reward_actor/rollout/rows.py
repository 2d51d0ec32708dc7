"""Rollouts as rows of a file, and what is made of them: the best, pairs, advantages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from reward_actor.files import Row, question_of, score_columns
from reward_actor.groups import Group
from reward_actor.rollout.records import RolloutGroup

_STD_FLOOR = 1e-4  # of TRL's GRPOTrainer, too
INDEX = "prompt_index"
_SAMPLED = (
    "prompt_ids", "completions", "completion_ids", "log_probs", "finish_reasons", "ended_with_eos",
)  # fmt: skip
_SCORED = (
    "rewards", "raw_scores", "num_tokens", "truncated", "errors", "model_version", "members",
    "spread",
)  # fmt: skip
_OURS = frozenset({*_SAMPLED, *_SCORED, "num_completion_tokens", "error"})


def columns_of(form: Form | None, prompt_column: str) -> frozenset[str]:
    """What rollouts are written as, which prompts must not have."""
    columns = _OURS | {INDEX, "prompt"} | frozenset(FORMS[form].columns if form else ())
    return columns - {prompt_column}


def question_in(row: Row, place: str, column: str, taken: frozenset[str]) -> Group:
    """What a row asks in this column. Raises ValueError, naming the place, for a row without it and
    for one with a column that is taken."""
    if column not in row:
        raise ValueError(f"{place}: has no {column!r}, only {', '.join(sorted(row))}")
    if both := sorted(taken & row.keys()):
        raise ValueError(
            f"{place}: has {', '.join(both)}, which rollouts are written as; rename or remove that"
        )
    return question_of({**row, "prompt": row[column]}, place)


def rollout_row(group: RolloutGroup, asking: Row) -> Row:
    """The row that asked, with what was sampled and its scores."""
    row: Row = {"prompt": group.prompt, **asking, INDEX: group.index}
    if group.error is not None:
        row["error"] = group.error
    row |= {name: getattr(group, name) for name in _SAMPLED}
    row["num_completion_tokens"] = [len(ids) for ids in group.completion_ids]
    return row if group.scores is None else {**row, **score_columns(group.scores)}


def problems_of(row: Row, num_completions: int) -> list[str | None]:
    """Why its completions have no reward; None for one that has, or where no scorer was asked."""
    if "error" in row:
        return [f"not sampled: {row['error']}"] * num_completions
    if "errors" not in row:
        return [None] * len(row["completions"])
    return [error and f"{error['type']}: {error['message']}" for error in row["errors"]]


def with_advantages(row: Row) -> list[Row]:
    """The row with two numbers for each completion: its reward's distance from the mean of its
    group's, as Dr. GRPO has it (Liu et al. 2025, arXiv 2503.20783), and that over their standard
    deviation (with n - 1), as GRPO has it (Shao et al. 2024, arXiv 2402.03300, 4.1.2; 1e-4 is added
    to it). None for a completion without a reward, which the mean leaves out."""
    rewards: list[float | None] = row.get("rewards") or []
    known = [reward for reward in rewards if reward is not None]
    mean = fmean(known) if known else math.nan
    scale = (stdev(known) if len(known) > 1 else 0.0) + _STD_FLOOR
    advantages = [None if reward is None else reward - mean for reward in rewards]
    normalized = [None if value is None else value / scale for value in advantages]
    return [{**row, "advantages": advantages, "normalized_advantages": normalized}]


def best_of(row: Row) -> list[Row]:
    """The prompt with its best completion; nothing where none has a reward."""
    ranked = _ranked(row)
    if not ranked:
        return []
    reward, best = ranked[-1]
    return [{**_asking(row), "completion": best, "reward": reward}]


def best_against_worst(row: Row) -> list[Row]:
    """The prompt with its best completion as chosen, its worst as rejected and the difference of
    their rewards as margin: a row of `rayward train`. Nothing where no two differ."""
    ranked = _ranked(row)
    if len(ranked) < 2 or ranked[0][0] == ranked[-1][0]:
        return []
    (low, worst), (high, best) = ranked[0], ranked[-1]
    return [{**_asking(row), "chosen": best, "rejected": worst, "margin": high - low}]


@dataclass(frozen=True)
class _Form:
    rows: Callable[[Row], list[Row]]
    columns: tuple[str, ...]


Form = Literal["advantages", "best-of", "pairs"]
FORMS: dict[Form, _Form] = {
    "advantages": _Form(with_advantages, ("advantages", "normalized_advantages")),
    "best-of": _Form(best_of, ("completion", "reward")),
    "pairs": _Form(best_against_worst, ("chosen", "rejected", "margin")),
}


def _ranked(row: Row) -> list[tuple[float, str]]:
    """The completions that have a reward, by it; of equal ones the first comes last."""
    rewards: Sequence[float | None] = row.get("rewards") or []
    known = [
        (reward, -place, text)
        for place, (reward, text) in enumerate(zip(rewards, row["completions"], strict=False))
        if reward is not None
    ]
    return [(reward, text) for reward, _, text in sorted(known)]


def _asking(row: Row) -> Row:
    """What a row was before it was sampled, and its index."""
    return {name: value for name, value in row.items() if name not in _OURS}
