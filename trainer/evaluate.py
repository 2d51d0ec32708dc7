"""Pairwise evaluation: how often the chosen side gets the higher reward. Legend: P pairs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reward_actor.groups import Group
from trainer.config import DataConfig
from trainer.data import Row, check_source, read_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trainer.pairs import PairSet

Score = Callable[[list[list[int]]], "NDArray[np.float32]"]
"""n token sequences -> (n,) rewards."""


@dataclass(frozen=True)
class EvalResult:
    """`accuracy` counts a tie as half; `reward_margin` is the mean of chosen - rejected."""

    num_pairs: int
    accuracy: float
    reward_margin: float
    min_reward: float
    mean_reward: float
    max_reward: float


def summarise(chosen: NDArray[np.float32], rejected: NDArray[np.float32]) -> EvalResult:
    """(P,) and (P,) rewards -> their summary. Raises ValueError without pairs."""
    if not len(chosen):
        raise ValueError("there is no pair to evaluate")
    wins, ties = (chosen > rejected).sum(), (chosen == rejected).sum()
    both = np.concatenate([chosen, rejected]).astype(np.float64)
    return EvalResult(
        num_pairs=len(chosen),
        accuracy=float((wins + ties / 2) / len(chosen)),
        reward_margin=float(np.mean(chosen.astype(np.float64) - rejected)),
        min_reward=float(both.min()),
        mean_reward=float(both.mean()),
        max_reward=float(both.max()),
    )


def evaluate_pairs(score: Score, pairs: PairSet) -> EvalResult:
    """Score both sides of every pair. Raises ValueError without pairs."""
    chosen = score([pairs.chosen(i) for i in range(len(pairs))])
    rejected = score([pairs.rejected(i) for i in range(len(pairs))])
    return summarise(chosen, rejected)


def evaluate_model(
    model_or_url: str,
    data: str,
    *,
    columns: DataConfig | None = None,
    max_pairs: int | None = None,
    **loading: Any,
) -> dict[str, Any]:
    """Evaluate an exported directory, or the service at an http(s) URL, on a preference file.

    `loading` goes to `RewardScorer.from_pretrained` (device, dtype, attention, ...).

    Pairs that cannot be scored (over-long, say) and pairs with equal sides are dropped and counted.
    Raises ValueError for data, a model or a service that cannot be used.
    """
    began = time.perf_counter()
    columns = columns or DataConfig.model_validate({"train": data})
    check_source(data, "DATA")
    rows = read_rows(data, columns, max_pairs)
    if model_or_url.startswith(("http://", "https://")):
        result, version = _evaluate_service(model_or_url, rows)
    else:
        result, version = _evaluate_directory(Path(model_or_url), rows, data, loading)
    return {
        **asdict(result),
        "num_dropped": len(rows) - result.num_pairs,
        "model": model_or_url,
        "model_version": version,
        "data": data,
        "seconds": round(time.perf_counter() - began, 3),
    }


def _evaluate_directory(
    directory: Path,
    rows: Sequence[Row],
    source: str,
    loading: Mapping[str, Any],
) -> tuple[EvalResult, str]:
    from reward_actor.scorer import RewardScorer
    from trainer.pairs import PairSet, render_rows

    scorer = RewardScorer.from_pretrained(directory, **loading)
    rendered, _ = render_rows(rows, scorer.renderer, source)
    return evaluate_pairs(scorer.score_ids, PairSet.of(rendered)), scorer.model_version


def _evaluate_service(url: str, rows: Sequence[Row]) -> tuple[EvalResult, str]:
    from reward_actor.client import RewardClient

    rows = [row for row in rows if row.chosen != row.rejected]
    groups = [
        Group(prompt=side.prompt, completions=[side.completion])
        for row in rows
        for side in (row.chosen, row.rejected)
    ]
    with RewardClient(url) as client:
        if client.info().format == "chat" and any(row.is_dialogue for row in rows):
            raise ValueError(f"{url} scores chats; whole dialogues as text cannot be framed")
        scores = client.score_groups(groups)
    versions = sorted({score.model_version for score in scores})
    if len(versions) != 1:
        raise ValueError(f"{url} answered with {len(versions)} model versions: {versions}")
    values = [score.rewards[0] for score in scores]
    scored = [
        (chosen, rejected)
        for chosen, rejected in zip(values[::2], values[1::2], strict=True)
        if chosen is not None and rejected is not None
    ]
    both = np.array(scored, dtype=np.float32).reshape(-1, 2)
    return summarise(both[:, 0], both[:, 1]), versions[0]
