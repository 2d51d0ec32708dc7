"""Which evaluation was the best one, and whether to go on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from trainer.metrics import better

if TYPE_CHECKING:
    from trainer.config import EvaluationConfig


class Selection:
    """The evaluations of a run so far: pure, and the same on every worker that adds the same.

    best_step  the step of the best one, None without any; of equal ones the first.
    """

    def __init__(self, config: EvaluationConfig, before: Iterable[Mapping[str, Any]] = ()) -> None:
        """before: the evaluations that a resumed run has behind it, in order."""
        self._config = config
        self._best: float | None = None
        self._values: dict[int, float | None] = {}
        self._num_worse = 0
        self.best_step: int | None = None
        for line in before:
            self.add(int(line["step"]), line)

    def add(self, step: int, result: Mapping[str, Any]) -> bool:
        """Whether the evaluation after `step` is the best so far."""
        value = self._values[step] = result.get(self._config.metric)
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
