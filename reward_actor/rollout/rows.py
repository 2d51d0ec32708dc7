"""Rollouts as rows of a file, and what is made of them: the best, pairs, advantages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from reward_actor.files import Row, question_of, score_columns
from reward_actor.groups import Group
from reward_actor.rollout.records import RolloutGroup
from reward_actor.shaping import group_advantages

INDEX = "prompt_index"
_SAMPLED = (
    "prompt_ids", "completions", "completion_ids", "log_probs", "finish_reasons", "ended_with_eos",
)  # fmt: skip
_SCORED = (
    "rewards", "raw_scores", "num_tokens", "truncated", "errors", "model_version",
    "named_rewards", "spread",
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
    """The row with two numbers for each completion, of `shaping.group_advantages`: without and with
    the standard deviation. None for a completion without a reward."""
    rewards: list[float | None] = row.get("rewards") or []
    found = {
        name: [None if math.isnan(value) else float(value) for value in advantages]
        for name, advantages in (
            ("advantages", group_advantages(rewards, over_std=False)),
            ("normalized_advantages", group_advantages(rewards, over_std=True)),
        )
    }
    return [{**row, **found}]


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
