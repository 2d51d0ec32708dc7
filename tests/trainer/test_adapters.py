"""Low-rank adapters: what becomes of them and of several heads in an export."""

from __future__ import annotations

from typing import Any

import torch
from engines import settings
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.train import TrainConfig
from trainer.network import adapters


def some_config(**changes: Any) -> TrainConfig:
    return settings("unread", adapter__rank=4, adapter__alpha=16, **changes)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31))
def test_a_merge_adds_the_scaled_product_and_rounds_once(
    rows: int, columns: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, columns, generator=draw).bfloat16()
    down = torch.randn(4, columns, generator=draw).bfloat16()
    up = torch.randn(rows, 4, generator=draw).bfloat16()
    weights = {
        "model.q.base_layer.weight": base,
        "model.q.base_layer.bias": base[:, 0],
        "model.q.lora_A.reward.weight": down,
        "model.q.lora_B.reward.weight": up,
        "score.weight": base[:1],
    }
    merged = adapters.exported(weights, some_config(model__dtype="bfloat16"))
    assert merged.keys() == {"model.q.weight", "model.q.bias", "score.weight"}
    exact = base.double() + 4 * (up.double() @ down.double())
    torch.testing.assert_close(
        merged["model.q.weight"].double(), exact, rtol=2**-8, atol=1e-5
    )  # half a step of bfloat16
    assert torch.equal(merged["model.q.bias"], base[:, 0])


def test_an_export_folds_several_heads_by_their_weights() -> None:
    config = settings("unread", loss__attributes="{help: 1.0, harm: -0.5}")
    heads = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    assert adapters.exported({"score.weight": heads}, config)["score.weight"].tolist() == [[-1, -2]]
