"""Held-out evaluations in the background, in a Ray task for each: `evaluation.asynchronous`.

Ray Train starts the task when a checkpoint is reported to it, one at a time and in their order. The
first worker of the training asks for the results and is the only one that writes them down, so a
result counts from the step at which it is known: `evaluation.patience` stops the training at the
next step after that, and `evaluation.keep_best` keeps the checkpoint until then. With more than
`MAX_PENDING` under way the training waits, so that checkpoints do not pile up.
"""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import torch
from ray.train import (
    CheckpointConsistencyMode,
    CheckpointUploadMode,
    ReportedCheckpointStatus,
    ValidationTaskConfig,
)

from reward_actor.engine.engine import Engine
from reward_actor.terminal import warn
from trainer.checkpoints.checkpoints import Checkpoints
from trainer.checkpoints.manifest import TAG, SavedState, fetched
from trainer.checkpoints.storage import checkpoint_storage
from trainer.deepspeed_internals import whole_state
from trainer.evaluation.metrics import measure
from trainer.job import EVALUATION, REASON
from trainer.network import zero
from trainer.network.build import build_model
from trainer.network.collectives import from_first, is_first

if TYPE_CHECKING:
    from trainer.config.train import TrainConfig
    from trainer.data.split import TrainingData

_PAUSE_S = 0.5
MAX_PENDING = 4


def evaluate_checkpoint(
    config: TrainConfig, state: SavedState, data: TrainingData
) -> dict[str, Any]:
    """The metrics of the held-out comparisons by a stored checkpoint, with the weights that the
    training computes with. Raises RuntimeError for a checkpoint that is damaged or gone."""
    torch.set_num_threads(max(1, int(config.distributed.cpus_per_worker)))
    # The network as it is trained, but whole in this process.
    trained = build_model(config, {"zero_optimization": {"stage": 0}})
    with fetched(checkpoint_storage(config), state) as (place, problem):
        if problem is not None:
            raise RuntimeError(f"the checkpoint of step {state.step}: {problem.text}")
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints how it reads
            weights = whole_state(place, TAG, config.distributed.zero_stage)
        zero.load_trained(weights, trained)
    trained.to("cuda" if ray.get_gpu_ids() else "cpu").eval()
    engine = Engine(trained.model, max_batch_tokens=config.training.micro_batch_tokens)
    heldout = data.heldout
    sequences = [heldout.sequence(i) for i in range(heldout.num_sequences)]
    return measure(heldout, engine.raw_scores(sequences), config.loss.attributes)


class BackgroundEvaluations:
    """The evaluations that are under way; `checkpoints` keeps what they still need. Every method is
    called by all workers at once.
    """

    def __init__(self, checkpoints: Checkpoints, missing: Sequence[SavedState]) -> None:
        """missing: those that a killed run has left without a result, in order; they are requested
        again where its workers had not done that."""
        self._checkpoints = checkpoints
        self._pending: dict[str, int] = {}
        checkpoints.on_settled = self._submit
        names = [_folder_of(one) for one in _reported()] if missing else []
        requested = from_first(names)  # by the workers before a restart
        for state in missing:
            self.want(state.step)
            if state.folder in requested:
                self._pending[state.folder] = state.step
            else:
                self._submit(state.step, state)

    def want(self, step: int) -> None:
        """Evaluate the checkpoint of this step as soon as it is stored."""
        self._checkpoints.also_keep.add(step)

    def wait(self, max_pending: int) -> list[tuple[int, dict[str, Any]]]:
        """(step, metrics) of the evaluations that have ended, in order, once no more than
        `max_pending` are under way."""
        found = self._results()
        while len(self._pending) > max_pending:  # never silent for long: collectives time out
            time.sleep(_PAUSE_S)
            found += self._results()
        return found

    def _results(self) -> list[tuple[int, dict[str, Any]]]:
        if not self._pending:
            return []
        found = []
        for folder, result in from_first(self._ended() if is_first() else []):
            step = self._pending.pop(folder)
            self._checkpoints.also_keep.discard(step)
            if result is not None:
                found.append((step, result))
        return found

    def _ended(self) -> list[tuple[str, dict[str, Any] | None]]:
        by_name = {_folder_of(one): one for one in _reported()}
        ended = []
        for folder, step in self._pending.items():
            one = by_name.get(folder)
            if one is None or one.status in _UNDECIDED:
                break
            result = one.metrics.get(EVALUATION)
            if result is None:
                reason = one.metrics.get(REASON, "the reason is in Ray's log of its task")
                warn(f"the evaluation of step {step} has failed: {reason}")
            ended.append((folder, result))
        return ended

    def _submit(self, step: int, state: SavedState | None) -> None:
        if step not in self._checkpoints.also_keep:
            return
        if state is None:  # it could not be stored, and that was told
            self._checkpoints.also_keep.discard(step)
            return
        self._pending[state.folder] = step
        storage = ray.train.get_context().get_storage()
        # Ray wants a checkpoint in its own storage; this one only has the name of ours.
        pointer = ray.train.Checkpoint(
            os.path.join(storage.experiment_fs_path, state.folder), storage.storage_filesystem
        )
        ray.train.report(
            {"step": step},
            checkpoint=pointer,
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
            validation=ValidationTaskConfig(
                fn_kwargs={key: value for key, value in asdict(state).items() if key != "folder"}
            ),
        )


_UNDECIDED = (ReportedCheckpointStatus.PENDING_VALIDATION, ReportedCheckpointStatus.COMMITTED)


def _reported() -> list[Any]:
    return list(ray.train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED, 0.001))


def _folder_of(reported: Any) -> str:
    return PurePosixPath(reported.checkpoint.path).name
