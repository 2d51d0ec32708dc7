"""Held-out evaluations beside the training, in a Ray task for each: `evaluation.asynchronous`.

Ray Train starts the task when a checkpoint is reported to it, one at a time and in their order. The
first worker of the training asks for the results and is the only one that writes them down, so a
result counts from the step at which it is known: `evaluation.patience` stops the training at the
next step after that, and `evaluation.keep_best` keeps the checkpoint until then.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import ray.train
import torch
from ray.train import CheckpointConsistencyMode, CheckpointUploadMode, ValidationTaskConfig
from ray.train.v2.api.reported_checkpoint import ReportedCheckpointStatus
from torch import Tensor
from torch import distributed as dist

from reward_actor.engine import Engine
from trainer import zero
from trainer.metrics import evaluate
from trainer.network import build_model
from trainer.resume import Checkpoints
from trainer.saved import TAG, SavedState, fetched, stored_files
from trainer.storage import checkpoint_storage

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trainer.config import TrainConfig
    from trainer.prepare import TrainingData

_RESULT = "evaluation"


@dataclass(frozen=True)
class Validator:
    """What the Ray task runs: a checkpoint to the metrics of the held-out comparisons."""

    config: TrainConfig
    data: ray.ObjectRef[TrainingData]

    def __call__(self, checkpoint: ray.train.Checkpoint, **saved: Any) -> dict[str, Any]:
        """`checkpoint` is but the name of ours; `saved` are the other fields of a `SavedState`.

        Raises RuntimeError for a checkpoint that is damaged or gone.
        """
        torch.set_num_threads(max(1, int(self.config.distributed.cpus_per_worker)))
        state = SavedState(PurePosixPath(checkpoint.path).name, **saved)
        heldout = ray.get(self.data).heldout
        rewards = checkpoint_rewards(
            self.config, state, [heldout.sequence(i) for i in range(heldout.num_sequences)]
        )
        return {_RESULT: evaluate(heldout, rewards).as_dict()}


def checkpoint_rewards(
    config: TrainConfig, state: SavedState, sequences: list[list[int]]
) -> NDArray[np.float32]:
    """(S,) raw scores by a stored checkpoint, with the weights that the training computes with.

    Raises RuntimeError for a checkpoint that is damaged or gone.
    """
    storage = checkpoint_storage(config)
    files = stored_files(storage, state, range(state.num_workers))
    # The network as it is trained, but whole in this process.
    trained = build_model(config, {"zero_optimization": {"stage": 0}})
    with fetched(storage, state, files) as (place, problem):
        if problem is not None:
            raise RuntimeError(f"the checkpoint of step {state.step} is damaged: {problem}")
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints how it reads
            weights = whole_state(place, config.distributed.zero_stage)
        zero.load_trained(weights, trained)
    trained.to("cuda" if ray.get_gpu_ids() else "cpu").eval()
    scores = Engine(trained.model, max_batch_tokens=config.training.micro_batch_tokens).raw_scores(
        sequences
    )
    heads = np.array(list(config.loss.attributes.values()) or [1.0], dtype=np.float32)
    rewards: NDArray[np.float32] = (scores * heads).sum(axis=1)
    return rewards


def whole_state(place: Path, zero_stage: int) -> dict[str, Tensor]:
    """The weights of a DeepSpeed checkpoint whose digests were checked: it is read by pickle."""
    if zero_stage == 3:  # each worker has stored a part of the float32 weights
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        return dict(
            get_fp32_state_dict_from_zero_checkpoint(
                str(place), TAG, exclude_frozen_parameters=True
            )
        )
    path = place / TAG / "mp_rank_00_model_states.pt"
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=False)["module"]
    return state


class Validations:
    """The evaluations that are under way. Every method is called by all workers at once."""

    def __init__(self, checkpoints: Checkpoints, config: TrainConfig, known: Iterable[int]) -> None:
        """known: the steps of the evaluations that are done; others that a killed run has left
        without a result are asked for again."""
        self._checkpoints = checkpoints
        self._wanted: set[int] = set()
        self._pending: dict[str, int] = {}
        done, every = set(known), config.evaluation.every_steps
        checkpoints.on_stored = self._submit
        left = [
            state
            for state in reversed(checkpoints.stored())
            if every and state.step % every == 0 and state.step not in done
        ]
        asked = _from_first(
            [PurePosixPath(one.checkpoint.path).name for one in _reported(wait=False)]
            if left and dist.get_rank() == 0
            else []
        )
        for state in left:
            if state.folder in asked:  # by the workers before a restart
                self._pending[state.folder] = state.step
            else:
                self._wanted.add(state.step)
                self._submit(state)

    def want(self, step: int) -> None:
        """Evaluate the checkpoint of this step as soon as it is stored."""
        self._wanted.add(step)

    @property
    def steps(self) -> set[int]:
        """Those whose checkpoints are still needed."""
        return self._wanted | set(self._pending.values())

    def results(self, wait: bool = False) -> list[tuple[int, dict[str, Any]]]:
        """(step, metrics) of the evaluations that have ended, in order; with `wait` of all."""
        if not self._pending:
            return []
        found = _from_first(self._ended(wait) if dist.get_rank() == 0 else None)
        for folder, _ in found:
            self._pending.pop(folder)
        return [(step, result) for _, (step, result) in found if result is not None]

    def _ended(self, wait: bool) -> list[tuple[str, tuple[int, dict[str, Any] | None]]]:
        by_name = {PurePosixPath(one.checkpoint.path).name: one for one in _reported(wait)}
        ended = []
        for folder, step in self._pending.items():
            one = by_name.get(folder)
            if one is None or one.status in _UNDECIDED:
                break
            result = one.metrics.get(_RESULT)
            if result is None:
                print(
                    f"warning: the evaluation of step {step} has failed; the reason is in Ray's "
                    "log of its task",
                    file=sys.stderr,
                    flush=True,
                )
            ended.append((folder, (step, result)))
        return ended

    def _submit(self, state: SavedState) -> None:
        if state.step not in self._wanted:
            return
        self._wanted.discard(state.step)
        self._pending[state.folder] = state.step
        storage = ray.train.get_context().get_storage()
        # Ray wants a checkpoint in its own storage; this one only has the name of ours.
        pointer = ray.train.Checkpoint(
            os.path.join(storage.experiment_fs_path, state.folder), storage.storage_filesystem
        )
        ray.train.report(
            {"step": state.step},
            checkpoint=pointer,
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
            validation=ValidationTaskConfig(
                fn_kwargs={key: value for key, value in asdict(state).items() if key != "folder"}
            ),
        )


_UNDECIDED = (ReportedCheckpointStatus.PENDING_VALIDATION, ReportedCheckpointStatus.COMMITTED)


def _reported(wait: bool) -> list[Any]:
    mode = CheckpointConsistencyMode.VALIDATED if wait else CheckpointConsistencyMode.COMMITTED
    return list(ray.train.get_all_reported_checkpoints(mode, None if wait else 0.001))


def _from_first(value: Any) -> Any:
    shared = [value]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]
