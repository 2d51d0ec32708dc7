"""What the driver hands to the workers: small to import, because the driver and Ray Train's
controller, which only pass it on, would otherwise load the whole trainer first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reward_actor.contract import ScoringContract
from trainer.config.train import TrainConfig
from trainer.data.split import Prepared, TrainingData

if TYPE_CHECKING:
    import numpy as np
    import ray
    from numpy.typing import NDArray

EVALUATION, REASON = "evaluation", "reason"


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run besides its metrics: in `result.json` by these names."""

    num_pairs: int
    num_shared_prompts: int | None
    """Prompts of data.eval that are in data.train as well, if that is known."""
    num_steps: int
    """Optimizer steps: those that are planned, in the end those of the exported weights."""
    num_dropped: int
    dropped: str
    num_failed_checkpoints: int
    counts: dict[str, int]
    """Of the training comparisons, by kind: `Comparisons.counts`."""
    row_format: str
    """How the rows are read, and why: `Prepared.row_format`."""

    @classmethod
    def of(cls, data: Prepared, num_steps: int) -> RunFacts:
        """What is known before the first step."""
        return cls(
            num_pairs=len(data.train),
            num_shared_prompts=data.facts.num_shared_prompts,
            num_steps=num_steps,
            num_dropped=data.dropped.count,
            dropped=str(data.dropped),
            num_failed_checkpoints=0,
            counts=data.train.counts(),
            row_format=data.row_format,
        )


@dataclass(frozen=True)
class Job:
    """A training, as every worker gets it."""

    config: TrainConfig
    contract: ScoringContract
    data: ray.ObjectRef[TrainingData]
    facts: RunFacts
    baselines: Mapping[str, NDArray[np.float32]]
    """(S,) rewards of the held-out sequences by what the model has to beat."""
