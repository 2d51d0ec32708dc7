"""Fifty steps of a real engine, packed and padded, against a plain PyTorch loop and a stored curve.

The plain loop shares nothing with the trainer but the order of the data: `transformers`' own
forward pass of padded rows, the loss by its formula, PyTorch's AdamW.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import OnWorkers, comparisons, settings, trainer
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification

from trainer.data.micro_batches import global_batch
from trainer.network import zero

NUM_STEPS, BATCH = 50, 8
CHANGES = {
    "optimizer__schedule": "constant",
    "optimizer__learning_rate": 0.0002,
    "optimizer__max_grad_norm": 1.0,
}
GOLDEN = {0: 1.1278, 9: 0.9405, 19: 0.2962, 29: 0.1888, 39: 0.0698, 49: 0.0312}


def losses(model: Path, changes: dict[str, Any]) -> list[float]:
    built = trainer(settings(model, **CHANGES, **changes), NUM_STEPS)
    found = [built.step(i)["loss"] for i in range(NUM_STEPS)]
    zero.release(built.engine)
    return found


def first_weights(model: Path) -> dict[str, torch.Tensor]:
    """With the head that the trainer draws."""
    built = trainer(settings(model, **CHANGES), NUM_STEPS)
    weights = zero.whole_weights(built.engine)
    zero.release(built.engine)
    return weights


@pytest.fixture(scope="module")
def plain(on_workers: OnWorkers, base_model: Path) -> list[float]:
    network = AutoModelForSequenceClassification.from_pretrained(
        base_model, num_labels=1, dtype=torch.float32
    )
    network.load_state_dict(on_workers(1, first_weights, base_model)[0])
    network.config.pad_token_id = 0
    config = settings(base_model, **CHANGES)
    optimizer = torch.optim.AdamW(
        network.parameters(),
        config.optimizer.learning_rate,
        (config.optimizer.beta1, config.optimizer.beta2),
        config.optimizer.epsilon,
        config.optimizer.weight_decay,
    )
    data = comparisons()
    found = []
    for step in range(NUM_STEPS):
        batch = global_batch(len(data), BATCH, config.training.seed, step)
        rows = [data.sequence(i) for at in batch for i in (data.starts[at], data.starts[at] + 1)]
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        rewards = network(input_ids=ids, attention_mask=mask).logits.view(-1, 2)
        loss = -logsigmoid(rewards[:, 0] - rewards[:, 1]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        found.append(loss.item())
    return found


def test_a_plain_loop_has_the_stored_curve(plain: list[float]) -> None:
    assert plain[0] - plain[-1] > 0.3, "it learns"
    assert {step: plain[step] for step in GOLDEN} == pytest.approx(GOLDEN, abs=1e-3)


@pytest.mark.parametrize("packing", ["forest", "padded"])
def test_the_curve_is_that_of_the_plain_loop(
    on_workers: OnWorkers, base_model: Path, plain: list[float], packing: str
) -> None:
    ours = on_workers(1, losses, base_model, {"training__packing": packing})[0]
    assert ours == pytest.approx(plain, abs=1e-4)


def first_losses(model: Path, changes: dict[str, Any]) -> list[float]:
    built = trainer(settings(model, **CHANGES, **changes), NUM_STEPS)
    found = [built.step(i)["loss"] for i in range(5)]
    zero.release(built.engine)
    return found


def test_replaced_tokens_are_the_same_packed_padded_and_on_two_workers(
    on_workers: OnWorkers, base_model: Path
) -> None:
    noise = {"training__token_noise": 0.5}
    packed, padded, two = (
        on_workers(num_workers, first_losses, base_model, {"training__packing": packing, **noise})[
            0
        ]
        for num_workers, packing in ((1, "forest"), (1, "padded"), (2, "forest"))
    )
    assert padded == pytest.approx(packed, abs=1e-4)
    assert two == pytest.approx(packed, abs=1e-4)
    whole = on_workers(1, first_losses, base_model, {})[0]
    assert max(abs(a - b) for a, b in zip(whole, packed, strict=True)) > 0.01
