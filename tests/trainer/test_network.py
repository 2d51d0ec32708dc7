"""The network at the start of a training: its head, what is frozen, recomputed activations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import OnWorkers, settings, trainer
from foreign import layered, value_head
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, Qwen3Config

from trainer.network import zero
from trainer.network.build import build_model, head_std


@given(st.integers(1, 10_000))
def test_a_new_heads_spread_is_what_its_name_says(hidden: int) -> None:
    config = Qwen3Config(initializer_range=0.013)
    assert math.isclose(head_std("inverse_sqrt", hidden, config) ** -2, hidden + 1)
    assert math.isclose(head_std("inverse", hidden, config) * (hidden + 1), 1)
    assert head_std("initializer_range", hidden, config) == 0.013
    assert head_std("zero", hidden, config) == 0


def first_head(model: Path, changes: dict[str, Any]) -> list[list[float]]:
    built = trainer(settings(model, **changes))
    weights = zero.whole_weights(built.engine)
    zero.release(built.engine)
    return weights["score.weight"].tolist() if weights else []


@pytest.mark.parametrize("kind", ["several layers", "a value head"])
def test_a_trained_head_is_not_lost_without_a_word(kind: str, tmp_path: Path) -> None:
    if kind == "several layers":
        layered(tmp_path / "rm", "Qwen2ForRewardModel")
    else:
        value_head(tmp_path / "rm", "inside")
    with pytest.raises(ValueError, match="has a trained head that a training cannot start from"):
        build_model(settings(tmp_path / "rm"), {"zero_optimization": {"stage": 0}})


@pytest.mark.parametrize("name", ["inverse_sqrt", "inverse", "initializer_range", "zero"])
def test_a_new_head_has_the_same_bits_under_any_sharding(
    on_workers: OnWorkers, base_model: Path, name: str
) -> None:
    changes = {"model__head_init": name, "loss__attributes": "{help: 1, harm: -1}"}
    alone = on_workers(1, first_head, base_model, {**changes, "distributed__zero_stage": 0})[0]
    sharded = on_workers(2, first_head, base_model, {**changes, "distributed__zero_stage": 3})[0]
    assert alone == sharded
    head = torch.tensor(alone)
    assert head.shape == (2, 32)
    expected = head_std(name, 32, AutoConfig.from_pretrained(base_model))
    assert head.std().item() == pytest.approx(expected, rel=0.35)
    other = on_workers(1, first_head, base_model, {**changes, "training__seed": 1})[0]
    assert (other == alone) == (name == "zero")


def trained(model: Path, changes: dict[str, Any], num_steps: int) -> dict[str, Any]:
    """Steps, with the weights before and after them, and the bytes that a micro-batch keeps."""
    built = trainer(settings(model, **changes))
    before = zero.whole_weights(built.engine)
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        lines = [built.step(i) for i in range(num_steps)]
    after = zero.whole_weights(built.engine)
    names = [n for n, p in built.engine.module.model.network.named_parameters() if p.requires_grad]
    zero.release(built.engine)
    return {
        "changed": sorted(name for name in before if not torch.equal(before[name], after[name])),
        "trained": sorted(names),
        "losses": [line["loss"] for line in lines],
        "grad_norms": [line["grad_norm"] for line in lines],
        "kept_bytes": kept,
    }


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_frozen_parameters_stay_as_they_are(
    on_workers: OnWorkers, base_model: Path, stage: int
) -> None:
    changes = {"model__freeze": '["embed_tokens", "layers\\\\.0\\\\."]'}
    changes["distributed__zero_stage"] = str(stage)
    result = on_workers(1, trained, base_model, changes, 2)[0]
    assert result["changed"] == result["trained"]
    assert "score.weight" in result["trained"]
    assert not [name for name in result["trained"] if "embed_tokens" in name or "layers.0." in name]


@pytest.mark.parametrize(
    ("pattern", "complaint"), [("nowhere", "matches no parameter"), (".", "nothing left to train")]
)
def test_a_freeze_pattern_must_leave_and_match_something(
    on_workers: OnWorkers, base_model: Path, pattern: str, complaint: str
) -> None:
    with pytest.raises(RuntimeError, match=f"ValueError: model.freeze: .*{complaint}"):
        on_workers(1, trained, base_model, {"model__freeze": f'["{pattern}"]'}, 1)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("packing", ["forest", "padded"])
def test_recomputed_activations_change_nothing_but_memory(
    on_workers: OnWorkers, base_model: Path, packing: str, stage: int
) -> None:
    changes = {"training__packing": packing, "distributed__zero_stage": stage}
    plain = on_workers(1, trained, base_model, changes, 3)[0]
    changes["model__gradient_checkpointing"] = True
    again = on_workers(1, trained, base_model, changes, 3)[0]
    assert again["losses"] == pytest.approx(plain["losses"], abs=1e-6)
    assert again["grad_norms"] == pytest.approx(plain["grad_norms"], rel=1e-5)
    assert again["kept_bytes"] < plain["kept_bytes"] / 2
