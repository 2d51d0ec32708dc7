"""Optimizers in real engines: exact in what they do, safe from gradients that are not finite."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import OnWorkers, settings, trainer

from trainer.errors import TrainingError
from trainer.network import zero
from trainer.step import Stepper

MUON = {"optimizer__name": "muon", "optimizer__max_grad_norm": 0}


def losses(model: Path, changes: dict[str, Any], num_steps: int) -> list[float]:
    built = trainer(settings(model, **changes))
    found = [built.step(i)["loss"] for i in range(num_steps)]
    zero.release(built.engine)
    return found


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (1, {"offload_optimizer": True}),
        (2, {"offload_optimizer": True}),
        (3, {"offload_optimizer": True}),
        (3, {"offload_optimizer": True, "offload_parameters": True}),
        (3, {"zeropp_partition_size": 2, "num_workers": 2}),
    ],
)
def test_where_state_and_weights_are_kept_changes_no_loss(
    on_workers: OnWorkers, base_model: Path, stage: int, changes: dict[str, Any]
) -> None:
    switches = {f"distributed__{key}": value for key, value in changes.items()}
    switches["distributed__zero_stage"] = stage
    plain = on_workers(2, losses, base_model, {"distributed__zero_stage": stage}, 4)[0]
    assert on_workers(2, losses, base_model, switches, 4)[0] == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_eight_bit_adamw_stays_near_adamw(
    on_workers: OnWorkers, base_model: Path, stage: int
) -> None:
    changes: dict[str, Any] = {"distributed__zero_stage": stage}
    full = on_workers(1, losses, base_model, changes, 6)[0]
    changes["optimizer__name"] = "adamw_8bit"
    small = on_workers(1, losses, base_model, changes, 6)[0]
    assert small == pytest.approx(full, abs=0.02)


def muon_update(model: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Gradient and change of one wide and one high matrix in the first step."""
    names = ["model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"]
    built = trainer(settings(model, **MUON, **changes))
    before = zero.whole_weights(built.engine)
    gradients = {}
    if not built.engine.zero_optimization():
        network, update = built.engine.module.model.network, built.engine.step

        def step() -> None:
            gradients.update({n: network.get_parameter(n).grad.clone() for n in names})
            update()

        built.engine.step = step
    built.step(0)
    after = zero.whole_weights(built.engine)
    zero.release(built.engine)
    changes_of = {n: (after[n] - before[n]).numpy() for n in names} if after else {}
    return {"gradients": {n: g.numpy() for n, g in gradients.items()}, "changes": changes_of}


def newton_schulz(gradient: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Five steps of the quintic of https://kellerjordan.github.io/posts/muon/ in float64."""
    x = gradient.astype(np.float64) / np.linalg.norm(gradient)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def test_a_muon_update_is_the_orthogonal_part_of_the_gradient_in_every_stage(
    on_workers: OnWorkers,
    base_model: Path,
) -> None:
    first = on_workers(1, muon_update, base_model, {"distributed__zero_stage": 0})[0]
    for name, change in first["changes"].items():
        gradient = first["gradients"][name]
        rows, columns = change.shape
        # Of AdamW's size (0.2 a number), with the learning rate of 0.003.
        expected = -0.003 * 0.2 * math.sqrt(max(rows, columns)) * newton_schulz(gradient)
        error = np.linalg.norm(change - expected) / np.linalg.norm(expected)
        assert error < 0.02, name
        assert np.sqrt(np.mean(change**2)) == pytest.approx(0.2 * 0.003, rel=0.35)
    for stage in (1, 2, 3):
        other = on_workers(2, muon_update, base_model, {"distributed__zero_stage": stage})[0]
        for name, change in first["changes"].items():
            np.testing.assert_allclose(other["changes"][name], change, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
def test_muon_learns_the_same_in_every_stage(
    on_workers: OnWorkers, base_model: Path, dtype: str
) -> None:
    changes = {**MUON, "model__dtype": dtype, "optimizer__learning_rate": 0.002}
    curves = {
        stage: on_workers(2, losses, base_model, {**changes, "distributed__zero_stage": stage}, 16)
        for stage in (0, 1, 2, 3)
    }
    for curve, _ in curves.values():
        assert np.mean(curve[-4:]) < np.mean(curve[:4]) / 2
        assert curve[:4] == pytest.approx(curves[0][0][:4], abs=1e-4 if dtype == "float32" else 0.1)


def overflow(model: Path, changes: dict[str, Any], parameter: str) -> dict[str, Any]:
    """A good step, and one in which one weight's gradient overflows on the last rank alone."""
    built = trainer(settings(model, **changes))
    built.step(0)
    before = _state(built)
    weight = built.engine.module.model.network.get_parameter(parameter)
    last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    weight.register_hook(lambda gradient: gradient * (math.inf if last else 1))
    try:
        built.step(1)
        problem = ""
    except TrainingError as error:
        problem = str(error)
    same = [name for name, value in _state(built).items() if value != before[name]]
    zero.release(built.engine)
    return {"problem": problem, "different": same}


def _state(built: Stepper) -> dict[str, Any]:
    """Of this rank: its weights, the optimizer's state and the learning rate."""
    engine = built.engine
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    state = {
        f"state {number} {key}": value.tolist() if torch.is_tensor(value) else value
        for number, values in enumerate(inner.state.values())
        for key, value in values.items()
    }
    weights = {name: weight.tolist() for name, weight in zero.whole_weights(engine).items()}
    shards = {
        f"shard {name}": getattr(p, "ds_tensor", p).detach().tolist()
        for name, p in engine.module.named_parameters()
    }
    return {**state, **weights, **shards, "learning rate": engine.get_lr()}


HIGH, HEAD = "model.layers.1.mlp.up_proj.weight", "score.weight"


ADAPTER = "model.layers.1.mlp.up_proj.lora_B.reward.weight"


@pytest.mark.parametrize(
    "stage",
    [0, pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long), 3],
)
@pytest.mark.parametrize(
    ("parameter", "changes"),
    [
        (HEAD, {}),
        (HIGH, {"model__dtype": "bfloat16"}),
        (HIGH, {"model__freeze": '["embed_tokens"]', "optimizer__max_grad_norm": 0}),
        (ADAPTER, {"adapter__rank": 4}),
        (HIGH, MUON),
    ],
)
def test_a_weights_gradient_that_is_not_finite_stops_before_the_update(
    on_workers: OnWorkers, base_model: Path, stage: int, parameter: str, changes: dict[str, Any]
) -> None:
    changes = {**changes, "distributed__zero_stage": stage}
    for result in on_workers(2, overflow, base_model, changes, parameter):
        assert "step 2" in result["problem"]
        assert "gradient" in result["problem"]
        assert result["different"] == []
