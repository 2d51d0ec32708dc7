"""Two reward models on the same comparisons: is one of them better, and where do they differ?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from reward_actor.conversation import as_messages
from trainer.config.data import Columns
from trainer.data.comparisons import Comparisons
from trainer.data.load import check_columns, read_rows
from trainer.data.rows import Row, Side
from trainer.data.split import few_prompts, unscored
from trainer.evaluation.evaluate import (
    ScoredRow,
    as_comparisons,
    columns_of,
    is_url,
    score_rows,
    scoring,
    tally_of,
)
from trainer.evaluation.intervals import Estimate
from trainer.evaluation.metrics import (
    EvalResult,
    difference,
    evaluate,
    pair_indices,
    rank_correlation,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_PAIRS_SHOWN = 10


@dataclass(frozen=True)
class ModelResult:
    """One of the two, on the comparisons that both could score."""

    model: str
    model_version: str
    num_dropped: int
    """Rows that it could not score, or whose completions are equal."""
    accuracy: float
    accuracy_low: float
    accuracy_high: float


@dataclass(frozen=True)
class PairOfBoth:
    """A pair, and by how much chosen is ahead for each model, in standard deviations of the raw
    scores that this model gave. Without texts in rows of token ids."""

    row: int
    margin_a: float
    margin_b: float
    prompt: str | None
    chosen: str | None
    rejected: str | None


@dataclass(frozen=True)
class ModelComparison:
    a: ModelResult
    b: ModelResult
    num_pairs: int
    num_prompts: int
    difference: Estimate
    """The accuracy of B less that of A: paired, of other prompts."""
    agreement: float
    """The share of pairs that both decide alike."""
    rank_correlation: float | None
    """Spearman's, of the raw scores of all completions; None where a model's are all equal."""
    differ_most: tuple[PairOfBoth, ...]
    """The pairs whose margins are furthest apart, the furthest first."""
    data: str
    warnings: tuple[str, ...]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_models(
    a: str,
    b: str,
    data: str,
    *,
    columns: Columns | None = None,
    num_shown: int = NUM_PAIRS_SHOWN,
    **loading: Any,
) -> ModelComparison:
    """Compare two models, each an exported directory or the http(s) URL of a service.

    Both are asked about the same completions, rendered as each one's contract says, and compared on
    the rows of `data` that both could score. `loading` goes to `RewardScorer.from_pretrained` of
    the directories. Raises ValueError for data, a model or a service that cannot be used.
    """
    began = time.perf_counter()
    if loading and is_url(a) and is_url(b):
        raise ValueError(
            f"{', '.join(loading)}: these are for loading a model, and both services have loaded "
            "theirs"
        )
    source = columns_of(columns)
    rows = read_rows(data, source)
    check_columns([data], source.named)
    scored: list[dict[int, ScoredRow]] = []
    versions = []
    for model_or_url in (a, b):
        with scoring(model_or_url, **({} if is_url(model_or_url) else loading)) as model:
            found, version = score_rows(model, rows, data)
        scored.append({one.row.number: one for one in found})
        versions.append(version)
    both = [row for row in rows if all(row.number in of for of in scored)]
    comparisons = as_comparisons([scored[0][row.number] for row in both], data)
    rewards = [
        np.array([score for row in both for score in of[row.number].raw_scores]) for of in scored
    ]
    result_a, result_b = (evaluate(comparisons, reward) for reward in rewards)
    chosen, rejected, _ = pair_indices(comparisons)
    ahead_a, ahead_b = (np.sign(reward[chosen] - reward[rejected]) for reward in rewards)
    return ModelComparison(
        a=_result(a, versions[0], len(rows) - len(scored[0]), result_a),
        b=_result(b, versions[1], len(rows) - len(scored[1]), result_b),
        num_pairs=result_a.num_pairs,
        num_prompts=result_a.num_prompts,
        difference=difference(comparisons, rewards[1], rewards[0]),
        agreement=float((ahead_a == ahead_b).mean()),
        rank_correlation=rank_correlation(*rewards),
        differ_most=_furthest(comparisons, both, rewards, num_shown),
        data=data,
        warnings=(*unscored(data, tally_of(rows)), *few_prompts(comparisons.prompts)),
        seconds=round(time.perf_counter() - began, 3),
    )


def _result(model: str, version: str, num_dropped: int, result: EvalResult) -> ModelResult:
    return ModelResult(
        model, version, num_dropped, result.accuracy, result.accuracy_low, result.accuracy_high
    )


def _furthest(
    comparisons: Comparisons, rows: Sequence[Row], rewards: Sequence[NDArray[Any]], num: int
) -> tuple[PairOfBoth, ...]:
    """`rows` are those of the C comparisons, `rewards` twice (S,)."""
    chosen, rejected, comparison = pair_indices(comparisons)
    margins = [(r[chosen] - r[rejected]) / (r.std() or 1.0) for r in rewards]
    order = np.argsort(-np.abs(margins[1] - margins[0]), kind="stable")[:num]
    first = comparisons.starts[comparison]
    return tuple(
        _pair(
            rows[comparison[i]],
            (int(chosen[i] - first[i]), int(rejected[i] - first[i])),
            (float(margins[0][i]), float(margins[1][i])),
        )
        for i in order
    )


def _pair(row: Row, sides: tuple[int, int], margins: tuple[float, float]) -> PairOfBoth:
    if not row.sides:
        return PairOfBoth(row.number, *margins, None, None, None)
    chosen, rejected = (row.sides[side] for side in sides)
    return PairOfBoth(row.number, *margins, _asked(chosen), chosen.text, rejected.text)


def _asked(side: Side) -> str:
    if isinstance(side.prompt, str):
        return side.prompt
    return "\n".join(f"{m['role']}: {m['content']}" for m in as_messages(side.prompt))
