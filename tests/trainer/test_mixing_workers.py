"""A data set of which a training uses a half: each epoch its own, at any start."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from engines import OnWorkers, settings, trainer

from trainer.data.split import epoch_use
from trainer.network import zero


def trained_on(model: str, steps: range) -> list[list[int]]:
    """The comparisons that this rank computes in each of these steps."""
    made = trainer(settings(model), weight=0.5)
    run, seen = made._run_micro_batch, []
    made._run_micro_batch = lambda mine, *rest: (seen[-1].extend(mine), run(mine, *rest))  # type: ignore
    for step in steps:
        seen.append([])
        assert made.step(step)["epoch"] == step // 2
    zero.release(made.engine)
    return seen


def test_a_training_takes_each_epochs_own_half_at_any_start(
    on_workers: OnWorkers, base_model: Path
):
    """32 comparisons by half, in batches of 8: two steps an epoch."""
    ranks = on_workers(2, trained_on, str(base_model), range(4))
    steps = [sorted(one + other) for one, other in zip(*ranks, strict=True)]
    halves = [set(steps[0] + steps[1]), set(steps[2] + steps[3])]
    sources = np.zeros(32, dtype=np.int32)
    assert halves == [set(epoch_use(sources, [0.5], 0, epoch).tolist()) for epoch in (0, 1)]
    assert halves[0] != halves[1]
    later = on_workers(2, trained_on, str(base_model), range(3, 4))
    assert sorted(later[0][0] + later[1][0]) == steps[3]
