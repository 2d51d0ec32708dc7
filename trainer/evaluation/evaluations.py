"""The held-out evaluations of a training, in its loop or in the background."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.checkpoints.checkpoints import Checkpoints
from trainer.evaluation.background import MAX_PENDING, BackgroundEvaluations
from trainer.evaluation.metrics import is_measurable, measure
from trainer.evaluation.selection import Selection
from trainer.log import EVALUATIONS_FILE, TrainingLog, read_log
from trainer.network.collectives import from_first, is_first
from trainer.step import Stepper


class Evaluations:
    """The evaluations of a run: made when they are due, written to `evaluations.jsonl`, compared.
    `checkpoints` keeps the best one under `keep_best`. Every method is called by all workers at
    once.
    """

    def __init__(
        self, stepper: Stepper, checkpoints: Checkpoints, num_steps: int, start: int
    ) -> None:
        """Of a run of `num_steps` that resumes after step `start`, or begins with 0."""
        self._stepper, self._checkpoints, self._num_steps = stepper, checkpoints, num_steps
        self._config = config = stepper.config.evaluation
        self._every_steps = config.every_steps if is_measurable(stepper.data.heldout) else None
        path = Path(stepper.config.output_dir) / EVALUATIONS_FILE
        self._log = TrainingLog(path, start) if is_first() else None
        before = from_first(list(read_log(path)) if is_first() else [])
        self._selection = Selection(config, before)
        self._background: BackgroundEvaluations | None = None
        if config.asynchronous and self._every_steps:
            done = {line["step"] for line in before}
            missing = [
                state
                for state in reversed(checkpoints.states)
                if self._is_due(state.step) and state.step not in done
            ]
            self._background = BackgroundEvaluations(checkpoints, missing)
        best = self._selection.best_of(state.step for state in checkpoints.states)
        if config.keep_best and best is not None:
            checkpoints.prefer(best)

    @property
    def best_step(self) -> int | None:
        """The step of the best evaluation, None without any."""
        return self._selection.best_step

    @property
    def is_exhausted(self) -> bool:
        """Whether `evaluation.patience` evaluations in a row were no better."""
        return self._selection.is_exhausted

    def after(self, step: int) -> bool:
        """Evaluate after a step, if that is due; whether it needs a checkpoint: to be kept as the
        best, or to be evaluated in the background. Results of that come with a later step."""
        is_due = self._is_due(step)
        if self._background is None:
            return is_due and self._add(step, self._measured())
        if is_due:
            self._background.want(step)
        self._collect(self._background, MAX_PENDING)
        return is_due

    def close(self) -> None:
        """Wait for the evaluations in the background, whose checkpoints are all stored."""
        if self._background is not None:
            self._collect(self._background, 0)
        if self._log is not None:
            self._log.close()

    def _is_due(self, step: int) -> bool:
        if self._every_steps is None:
            return False
        is_compared = step == self._num_steps and self._config.keep_best
        return step % self._every_steps == 0 or is_compared

    def _measured(self) -> dict[str, Any]:
        heldout = self._stepper.data.heldout
        scores = self._stepper.score(heldout)
        return measure(heldout, scores, self._stepper.config.loss.attributes)

    def _collect(self, background: BackgroundEvaluations, max_pending: int) -> None:
        for step, result in background.wait(max_pending):
            self._add(step, result)

    def _add(self, step: int, result: Mapping[str, Any]) -> bool:
        """Write a result down; whether its checkpoint is to be kept."""
        is_kept = self._selection.add(step, result) and self._config.keep_best
        if self._log is not None:
            self._log.write({"step": step, **result})
        if is_kept:
            self._checkpoints.prefer(step)
        return is_kept
