"""Which evaluation was the best one, and whether to go on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from trainer.evaluation.metrics import RMSE, better, is_defined

if TYPE_CHECKING:
    from trainer.config.train import EvaluationConfig
    from trainer.data.comparisons import Comparisons


def check_selection(
    config: EvaluationConfig, attributes: Iterable[str], heldout: Comparisons
) -> None:
    """Raise ValueError if checkpoints are to be compared by what no held-out row can tell."""
    if is_defined(config.metric, heldout, attributes):
        return
    for name in ("patience", "keep_best"):
        if getattr(config, name):
            raise ValueError(
                f"evaluation.{name} compares checkpoints by the {config.metric} of what is "
                f"held out, but {_absent(config.metric, heldout)}: raise data.eval_fraction, "
                f"name other rows in data.eval, or leave evaluation.{name} away"
            )


def _absent(metric: str, heldout: Comparisons) -> str:
    if not len(heldout):
        return "nothing is held out"
    if metric.startswith(RMSE):
        return f"none of the {len(heldout)} held-out rows has that attribute"
    which = {"accuracy_shorter": "a shorter", "accuracy_longer": "a longer"}.get(metric, "one")
    return f"none of the {len(heldout)} held-out rows prefers {which} completion to another"


class Selection:
    """The evaluations of a run so far: pure, and the same on every worker that adds the same.

    best_step  the step of the best one, None without any; of equal ones the first.
    """

    def __init__(self, config: EvaluationConfig, before: Iterable[Mapping[str, Any]] = ()) -> None:
        """before: the evaluations that a resumed run has behind it, in order."""
        self._config = config
        self._best: float | None = None
        self._values: dict[int, float] = {}
        self._num_worse = 0
        self.best_step: int | None = None
        for line in before:
            self.add(int(line["step"]), line)

    def add(self, step: int, result: Mapping[str, Any]) -> bool:
        """Whether the evaluation after `step` is the best so far."""
        value = result.get(self._config.metric)
        if value is None:  # not defined: neither better nor worse than what was
            return False
        self._values[step] = value
        if not better(self._config.metric, value, self._best):
            self._num_worse += 1
            return False
        self._best, self.best_step, self._num_worse = value, step, 0
        return True

    def best_of(self, steps: Iterable[int]) -> int | None:
        """The best of those of these steps that were evaluated."""
        best: int | None = None
        for step in sorted(self._values.keys() & set(steps)):
            before = None if best is None else self._values[best]
            if better(self._config.metric, self._values[step], before):
                best = step
        return best

    @property
    def is_exhausted(self) -> bool:
        """Whether `evaluation.patience` evaluations in a row were no better."""
        return self._config.patience is not None and self._num_worse >= self._config.patience
