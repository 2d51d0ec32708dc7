"""Optimizers and schedules: their rates, and what is refused before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer.config.train import OptimizerConfig
from trainer.network.optimizers import check_optimizer, make_schedule

SCHEDULES = {
    "linear": {},
    "cosine": {"num_cycles": 0.5},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {"timescale": 10},
    "cosine_with_min_lr": {},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 20},
}


def rates(name: str, arguments: dict[str, Any], num_steps: int = 100) -> list[float]:
    config = OptimizerConfig.model_validate(
        {"schedule": name, "schedule_args": arguments, "warmup_fraction": 0.1, "learning_rate": 1}
    )
    check_optimizer(config, num_steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], config.learning_rate)
    schedule = make_schedule(config, optimizer, num_steps)
    found = []
    for _ in range(num_steps):
        found.append(float(schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(("name", "arguments"), SCHEDULES.items())
def test_every_schedule_warms_up_to_the_peak_and_never_rises_over_it(
    name: str, arguments: dict[str, Any]
) -> None:
    found = rates(name, arguments)
    assert max(found) == pytest.approx(1)
    assert found[0] > 0
    if name != "constant":
        assert found[1] < 0.25  # the one with a least rate starts a step ahead
        assert found[10] == pytest.approx(1, rel=0.01)


def test_a_cosine_falls_to_a_tenth_unless_told_otherwise() -> None:
    assert rates("cosine_with_min_lr", {})[-1] == pytest.approx(0.1, abs=0.001)
    assert rates("cosine_with_min_lr", {"min_lr_rate": 0.5})[-1] == pytest.approx(0.5, abs=0.001)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"schedule": "cosin"}, "no such schedule; there are linear, cosine,"),
        ({"schedule": "reduce_lr_on_plateau"}, "follows a metric"),
        ({"schedule": "greedy"}, "follows a metric"),
        ({"schedule_args": {"cycles": 1}}, "unexpected keyword argument 'cycles'"),
        ({"schedule": "constant", "schedule_args": {"x": 1}}, "takes no arguments"),
        ({"schedule_args": {"num_cycles": "two"}}, "cosine fails with"),
        ({"schedule": "polynomial", "schedule_args": {"lr_end": 2}}, "must be smaller"),
        ({"schedule": "polynomial", "schedule_args": {"lr_end": -9, "power": 1}}, "times its peak"),
        ({"schedule": "warmup_stable_decay"}, "num_decay_steps"),
        ({"name": "muon"}, "max_grad_norm is 1.0, but muon"),
    ],
)
def test_a_wrong_optimizer_is_refused_before_training(
    changes: dict[str, Any], complaint: str
) -> None:
    config = OptimizerConfig.model_validate({"learning_rate": 1, **changes})
    with pytest.raises(ValueError, match=complaint):
        check_optimizer(config, 100)
