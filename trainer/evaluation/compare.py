"""Two reward models on the same comparisons: is one of them better, and where do they differ?"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from reward_actor.client.sync import RewardClient
from reward_actor.conversation import as_messages
from trainer.config.data import Columns
from trainer.data.comparisons import Comparisons
from trainer.data.load import check_columns, read_rows
from trainer.data.rows import Row, Side
from trainer.data.split import few_prompts
from trainer.evaluation.evaluate import (
    ScoredRow,
    as_comparisons,
    check_no_loading,
    columns_of,
    is_url,
    row_warnings,
    score_rows,
    scoring,
    tally_of,
)
from trainer.evaluation.intervals import Estimate
from trainer.evaluation.metrics import accuracy, difference, pair_indices, rank_correlation

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_SHOWN = 10


@dataclass(frozen=True)
class ModelResult:
    """One of the two, on the comparisons that both could score."""

    model: str
    model_version: str
    num_dropped: int
    """Rows that it could not score, or whose completions are equal."""
    errors: dict[str, int]
    """Completions that it could not score, by reason."""
    accuracy: float
    accuracy_low: float
    accuracy_high: float


@dataclass(frozen=True)
class DifferingPair:
    """A pair, and by how much chosen is ahead for each model, in standard deviations of the
    rewards that this model gave. Without texts in rows of token ids."""

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
    """The accuracy of B less that of A: paired, and resampled by prompt."""
    agreement: float
    """The share of pairs that both decide alike."""
    rank_correlation: float | None
    """Spearman's, see `metrics.rank_correlation`."""
    most_different: tuple[DifferingPair, ...]
    """The pairs whose margins are furthest apart, the furthest first."""
    data: str
    warnings: tuple[str, ...]
    seconds: float

    @property
    def better(self) -> str | None:
        """ "A" or "B" where the interval of the difference says which, otherwise None."""
        return {1: "B", -1: "A"}.get(self.difference.sign)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with `better`."""
        return {"better": self.better, **asdict(self)}


def compare_models(
    a: str,
    b: str,
    data: str,
    *,
    columns: Columns | None = None,
    num_shown: int = NUM_SHOWN,
    **loading: Any,
) -> ModelComparison:
    """Compare two models, each an exported directory or the http(s) URL of a service.

    Both are asked about the same rows, each as its own contract renders them, and compared on those
    that both could score. `loading` goes to `RewardScorer.from_pretrained` of the directories, one
    of which is in memory at a time. Raises ValueError for data, a model or a service that cannot be
    used, and if there is no pair that both could score.
    """
    began = time.perf_counter()
    if is_url(a) and is_url(b):
        check_no_loading(a, loading)
    source = columns_of(columns)
    check_columns([data], source.named)
    rows = read_rows(data, source)
    for url in filter(is_url, (a, b)):  # before the other one is scored
        with RewardClient(url) as client:
            client.check_reachable()
    of_a, of_b = (_scored(model_or_url, rows, data, loading) for model_or_url in (a, b))
    both = [row for row in rows if row.number in of_a.rows and row.number in of_b.rows]
    comparisons = as_comparisons([of_a.rows[row.number] for row in both], data)
    if not comparisons.is_decided.any():
        raise ValueError(f"no pair of {data} that both can score: {of_a}, {of_b}")
    rewards_a, rewards_b = (of.rewards(both) for of in (of_a, of_b))
    accuracy_a, accuracy_b = (accuracy(comparisons, of) for of in (rewards_a, rewards_b))
    chosen, rejected, _ = pair_indices(comparisons)
    ahead_a, ahead_b = (np.sign(of[chosen] - of[rejected]) for of in (rewards_a, rewards_b))
    warnings = row_warnings(data, tally_of(rows)) + few_prompts(comparisons)
    if any(row.ids for row in both) and of_a.model_version != of_b.model_version:
        warnings.append(f"{data} holds token ids: both models must have one tokenizer")
    return ModelComparison(
        a=of_a.result(accuracy_a),
        b=of_b.result(accuracy_b),
        num_pairs=len(chosen),
        num_prompts=accuracy_a.num_prompts,
        difference=difference(comparisons, rewards_b, rewards_a),
        agreement=float((ahead_a == ahead_b).mean()),
        rank_correlation=rank_correlation(comparisons, rewards_a, rewards_b),
        most_different=_most_different(comparisons, both, (rewards_a, rewards_b), num_shown),
        data=data,
        warnings=tuple(warnings),
        seconds=round(time.perf_counter() - began, 3),
    )


@dataclass(frozen=True)
class _Scored:
    model: str
    model_version: str
    rows: dict[int, ScoredRow]
    """By their number."""
    num_dropped: int
    errors: dict[str, int]

    def __str__(self) -> str:
        reasons = ", ".join(f"{num} {name}" for name, num in self.errors.items())
        return f"{self.model} drops {self.num_dropped} rows ({reasons or 'equal completions'})"

    def rewards(self, rows: Sequence[Row]) -> NDArray[np.float64]:
        """(S,) of the completions of these rows."""
        return np.array([reward for row in rows for reward in self.rows[row.number].rewards])

    def result(self, of: Estimate) -> ModelResult:
        return ModelResult(
            self.model, self.model_version, self.num_dropped, self.errors, of.mean, of.low, of.high
        )


def _scored(
    model_or_url: str, rows: Sequence[Row], data: str, loading: Mapping[str, Any]
) -> _Scored:
    with scoring(model_or_url, **({} if is_url(model_or_url) else loading)) as model:
        found, version, errors = score_rows(model, rows, data)
    by_number = {one.row.number: one for one in found}
    return _Scored(model_or_url, version, by_number, len(rows) - len(found), dict(errors))


def _most_different(
    comparisons: Comparisons, rows: Sequence[Row], rewards: Sequence[NDArray[np.float64]], num: int
) -> tuple[DifferingPair, ...]:
    """`rows` are those of the C comparisons, `rewards` (S,) of each model."""
    chosen, rejected, comparison = pair_indices(comparisons)
    margin_a, margin_b = ((of[chosen] - of[rejected]) / (of.std() or 1.0) for of in rewards)
    apart = np.abs(margin_a - margin_b)
    first = comparisons.starts[comparison]
    return tuple(
        _differing(
            rows[comparison[i]],
            (int(chosen[i] - first[i]), int(rejected[i] - first[i])),
            (float(margin_a[i]), float(margin_b[i])),
        )
        for i in np.argsort(-apart, kind="stable")[:num]
        if apart[i] > 0
    )


def _differing(row: Row, sides: tuple[int, int], margins: tuple[float, float]) -> DifferingPair:
    if not row.sides:
        return DifferingPair(row.number, *margins, None, None, None)
    chosen, rejected = (row.sides[side] for side in sides)
    return DifferingPair(row.number, *margins, _asked(chosen), chosen.text, rejected.text)


def _asked(side: Side) -> str:
    if isinstance(side.prompt, str):
        return side.prompt
    return "\n".join(f"{m['role']}: {m['content']}" for m in as_messages(side.prompt))
