"""What the driver hands to the workers: small to import, because the driver and Ray Train's
controller, which only pass it on, would otherwise load the whole trainer first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reward_actor.contract import ScoringContract
from trainer.config.train import TrainConfig
from trainer.data.split import TrainingData

if TYPE_CHECKING:
    import ray

EVALUATION, REASON = "evaluation", "reason"


@dataclass(frozen=True)
class Job:
    """A training, as every worker gets it."""

    config: TrainConfig
    contract: ScoringContract
    data: ray.ObjectRef[TrainingData]
    num_steps: int
    facts: dict[str, Any]
