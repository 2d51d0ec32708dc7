"""What Ray Train's workers and its evaluation tasks run. Light: the trainer loads when they run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions
import ray.train

from reward_actor.terminal import keep_worker_output_for_ours, say
from trainer.checkpoints.manifest import SavedState
from trainer.config.train import TrainConfig
from trainer.data.split import TrainingData
from trainer.job import EVALUATION, REASON, Job

if TYPE_CHECKING:
    from ray.train import Checkpoint


def run_training_loop(job: Job) -> dict[str, Any]:
    """`trainer.loop.training_loop`, on a worker."""
    keep_worker_output_for_ours()
    if ray.train.get_context().get_world_rank() == 0:
        say("importing torch and DeepSpeed")
    from trainer import loop

    return loop.training_loop(job)


@dataclass(frozen=True)
class Validator:
    """What Ray Train's task for an evaluation beside the training runs: a checkpoint to metrics.

    They are computed in a task of its own, with these `resources`: Ray ends the training if its own
    task dies, of a lack of memory for example.
    """

    config: TrainConfig
    data: ray.ObjectRef[TrainingData]
    resources: Mapping[str, Any]

    def __call__(self, checkpoint: Checkpoint, **saved: Any) -> dict[str, Any]:
        """`checkpoint` is but the name of ours; `saved` are the other fields of a `SavedState`."""
        state = SavedState(PurePosixPath(checkpoint.path).name, **saved)
        task = ray.remote(_evaluate).options(**self.resources, max_retries=1)
        try:
            return {EVALUATION: ray.get(task.remote(self.config, state, self.data))}
        except ray.exceptions.RayError as error:
            return {EVALUATION: None, REASON: str(error).strip().splitlines()[-1]}


def _evaluate(config: TrainConfig, state: SavedState, data: TrainingData) -> dict[str, Any]:
    from trainer.evaluation.background import evaluate_checkpoint

    return evaluate_checkpoint(config, state, data)
