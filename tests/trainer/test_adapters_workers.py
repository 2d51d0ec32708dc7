"""Low-rank adapters: the same under every sharding, resumed, merged into an export of equal reward;
on quantised weights too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import OnWorkers, settings, trainer
from exports import CORPUS
from transformers import AutoModelForSequenceClassification

from reward_actor.model.reward_model import RewardModel
from trainer.network import adapters, zero
from trainer.step import Stepper

LORA = {"adapter__rank": 4, "adapter__alpha": 16}


def run(model: Path, changes: dict[str, Any], num_steps: int) -> dict[str, Any]:
    """Steps: the first weights, the last ones, the losses, the rewards after the last."""
    built = trainer(settings(model, **changes))
    network = built.engine.module.model.network
    first = zero.whole_weights(built.engine)
    losses = [built.step(i)["loss"] for i in range(num_steps)]
    rewards = built.score(built.data.heldout)
    last = zero.whole_weights(built.engine)
    trained = sorted(name for name, p in network.named_parameters() if p.requires_grad)
    zero.release(built.engine)
    return {"first": _arrays(first), "last": _arrays(last), "losses": losses, "rewards": rewards,
            "trained": trained}  # fmt: skip


def _arrays(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: weight.float().numpy() for name, weight in weights.items()}


def test_only_the_adapters_and_the_head_are_trained(
    on_workers: OnWorkers, base_model: Path
) -> None:
    result = on_workers(1, run, base_model, LORA, 2)[0]
    assert all(".lora_" in name or name == "score.weight" for name in result["trained"])
    # q, k, v, o, gate, up and down of two layers, two matrices each; and the head.
    assert len(result["trained"]) == 7 * 2 * 2 + 1
    first, last = result["first"], result["last"]
    changed = sorted(name for name in first if not np.array_equal(first[name], last[name]))
    assert changed == result["trained"]


def test_targets_name_layers(on_workers: OnWorkers, base_model: Path) -> None:
    changes = {**LORA, "adapter__targets": '["q_proj", "layers.1.mlp.up_proj"]'}
    result = on_workers(1, run, base_model, changes, 1)[0]
    layers = {name.partition(".lora_")[0] for name in result["trained"]} - {"score.weight"}
    assert layers == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    }


def test_a_target_that_names_nothing_is_refused(on_workers: OnWorkers, base_model: Path) -> None:
    changes = {**LORA, "adapter__targets": '["query"]'}
    with pytest.raises(RuntimeError, match=r"ValueError: adapter\.targets: 'query' is no linear"):
        on_workers(1, run, base_model, changes, 1)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("float32", 1e-5), pytest.param("bfloat16", 0.02, marks=pytest.mark.long)],
)
def test_adapters_learn_the_same_under_every_sharding(
    on_workers: OnWorkers, base_model: Path, dtype: str, tolerance: float
) -> None:
    changes = {**LORA, "model__dtype": dtype, "model__gradient_checkpointing": True}
    changes["training__packing"] = "padded"
    alone = on_workers(1, run, base_model, {**changes, "distributed__zero_stage": 0}, 3)[0]
    changes["training__packing"] = "forest"
    for stage in (0, 1, 2, 3):
        shared = on_workers(2, run, base_model, {**changes, "distributed__zero_stage": stage}, 3)[0]
        for name, weight in alone["first"].items():
            np.testing.assert_array_equal(weight, shared["first"][name], name)
        assert shared["losses"] == pytest.approx(alone["losses"], abs=tolerance), stage


def resume(model: Path, folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Two steps, a checkpoint, two more; and the last two again from the checkpoint."""

    def last_two(built: Stepper) -> tuple[list[float], dict[str, Any]]:
        losses = [built.step(i)["loss"] for i in (2, 3)]
        weights = zero.whole_weights(built.engine)
        zero.release(built.engine)
        return losses, _arrays(weights)

    built = trainer(settings(model, **changes))
    for i in range(2):
        built.step(i)
    zero.save(built.engine, folder, "state")
    through = last_two(built)
    built = trainer(settings(model, **changes))
    zero.load(built.engine, folder, "state")
    return {"through": through, "resumed": last_two(built)}


@pytest.mark.parametrize(
    "stage",
    [0, pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long), 3],
)
def test_a_resumed_training_goes_on_bit_for_bit(
    on_workers: OnWorkers, base_model: Path, tmp_path: Path, stage: int
) -> None:
    changes = {**LORA, "distributed__zero_stage": stage}
    result = on_workers(2, resume, base_model, tmp_path, changes)[0]
    _assert_equal_runs(result)
    size = sum(file.stat().st_size for file in tmp_path.rglob("*.pt"))
    full = sum(weight.nbytes for weight in result["resumed"][1].values())
    assert size < 1.5 * full  # the frozen weights are not in it; for each trained one there are 5


def _assert_equal_runs(result: dict[str, Any]) -> None:
    assert result["through"][0] == result["resumed"][0]
    for name, weight in result["through"][1].items():
        np.testing.assert_array_equal(weight, result["resumed"][1][name], name)


def exported_rewards(model: Path, folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Rewards of the trained network, and of its export read by plain transformers."""
    config = settings(model, **changes)
    built = trainer(config)
    for i in range(2):
        built.step(i)
    rewards = built.score(built.data.heldout)
    plain = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=1, dtype=getattr(torch, config.model.dtype)
    )
    names = sorted(plain.state_dict())
    weights = adapters.exported(zero.whole_weights(built.engine), config)
    zero.release(built.engine)
    plain.save_pretrained(folder, state_dict=weights)
    again, report = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    scorer = RewardModel(again.eval())
    sequences = built.data.heldout
    with torch.no_grad():
        after = [
            scorer(
                torch.tensor([sequences.sequence(n)]), torch.tensor([len(sequences.sequence(n))])
            )
            for n in range(sequences.num_sequences)
        ]
    return {
        "names": names == sorted(weights),
        "missing": report["missing_keys"],
        "before": rewards,
        "after": torch.cat(after).numpy(),
        "dtypes": {str(weight.dtype) for weight in weights.values()},
    }


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whose layers have whole blocks of 64 inputs, as those of all real models."""
    from trainer.init_model import init_model

    return init_model(
        tmp_path_factory.mktemp("wide") / "base",
        CORPUS,
        vocab_size=400,
        hidden_size=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        intermediate_size=128,
        max_position_embeddings=256,
    )


@pytest.mark.parametrize("quantize", [None, "4bit"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.1)])
def test_an_exports_rewards_are_those_of_training(
    on_workers: OnWorkers,
    wide_model: Path,
    tmp_path: Path,
    quantize: str | None,
    dtype: str,
    tolerance: float,
) -> None:
    changes = {**LORA, "model__dtype": dtype}
    if quantize:
        changes["adapter__quantize"] = quantize
    result = on_workers(1, exported_rewards, wide_model, tmp_path, changes)[0]
    assert result["names"]
    assert not result["missing"]
    assert result["dtypes"] == {f"torch.{dtype}"}
    assert np.ptp(result["before"]) > 0.1
    np.testing.assert_allclose(result["after"], result["before"], atol=tolerance)


@pytest.mark.parametrize("stage", [0, 2])
def test_adapters_on_quantised_weights_learn_and_resume(
    on_workers: OnWorkers, wide_model: Path, tmp_path: Path, stage: int
) -> None:
    changes = {**LORA, "adapter__quantize": "4bit", "distributed__zero_stage": stage}
    changes["model__gradient_checkpointing"] = True
    result = on_workers(2, resume, wide_model, tmp_path, changes)[0]
    _assert_equal_runs(result)
    learned = on_workers(2, run, wide_model, changes, 20)[0]
    assert np.mean(learned["losses"][-4:]) < np.mean(learned["losses"][:4]) / 2
    weights = learned["first"]
    rounded = weights["model.layers.0.mlp.up_proj.base_layer.weight"]
    plain = on_workers(1, run, wide_model, LORA, 0)[0]["first"]
    exact = plain["model.layers.0.mlp.up_proj.base_layer.weight"]
    error = np.abs(rounded - exact).max() / np.abs(exact).max()
    assert 1e-3 < error < 0.2
    np.testing.assert_array_equal(weights["score.weight"], plain["score.weight"])
