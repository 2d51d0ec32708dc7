"""The router's loss against `transformers`' own, and its gradient against the derivative."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen3_moe import modeling_qwen3_moe

from reward_actor.model.reward_model import RewardModel
from trainer.loss import router_loss
from trainer.network.packed import TrainedModel

LAYERS, EXPERTS = 3, 5
WEIGHTS = st.lists(st.integers(0, 4), min_size=1, max_size=12).filter(any)


def logits(num_tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    return [
        (2 * torch.randn(num_tokens, EXPERTS, generator=generator)).to(dtype).requires_grad_(True)
        for _ in range(LAYERS)
    ]


@pytest.mark.parametrize("family", [modeling_mixtral, modeling_qwen3_moe])
@given(WEIGHTS, st.integers(1, 3))
def test_shared_tokens_weigh_as_the_tokens_of_all_their_sequences(family, weights, top_k):
    layers, repeats = logits(len(weights)), torch.tensor(weights)
    loss = router_loss(layers, top_k, repeats)
    gradients = torch.autograd.grad(loss, layers)
    unpacked = tuple(layer.repeat_interleave(repeats, 0) for layer in layers)
    theirs = family.load_balancing_loss_func(unpacked, EXPERTS, top_k)
    assert loss.shape == ()
    torch.testing.assert_close(loss, theirs, rtol=1e-6, atol=0)
    for ours, expected in zip(gradients, torch.autograd.grad(theirs, layers), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", [modeling_mixtral, modeling_qwen3_moe])
def test_a_weight_of_zero_leaves_out_what_an_attention_mask_leaves_out(family):
    layers, mask = logits(8), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    theirs = family.load_balancing_loss_func(tuple(layers), EXPERTS, 2, mask)
    torch.testing.assert_close(router_loss(layers, 2, mask.flatten()), theirs, rtol=1e-6, atol=0)


@given(WEIGHTS, st.integers(1, 3))
def test_loss_and_gradient_are_those_of_the_formula(weights, top_k):
    layers, shares = logits(len(weights), torch.float64), torch.tensor(weights).double()
    loss = router_loss(layers, top_k, shares)
    gradients = torch.autograd.grad(loss, layers)
    total = LAYERS * sum(weights)
    routed, mean = [0.0] * EXPERTS, [0.0] * EXPERTS
    rows = [[row.softmax(0).tolist() for row in layer.detach()] for layer in layers]
    for layer in rows:
        for row, weight in zip(layer, weights, strict=True):
            for expert in sorted(range(EXPERTS), key=lambda e: -row[e])[:top_k]:
                routed[expert] += weight / total
            for expert in range(EXPERTS):
                mean[expert] += weight * row[expert] / total
    expected = EXPERTS * sum(f * p for f, p in zip(routed, mean, strict=True))
    assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    for layer, gradient in zip(rows, gradients, strict=True):
        for row, weight, slopes in zip(layer, weights, gradient.tolist(), strict=True):
            average = sum(f * p for f, p in zip(routed, row, strict=True))
            by_hand = [
                EXPERTS * weight / total * p * (f - average)
                for f, p in zip(routed, row, strict=True)
            ]
            assert slopes == pytest.approx(by_hand, rel=1e-12, abs=1e-12)


def test_balanced_routing_costs_the_number_of_experts_that_a_token_takes():
    eye = 20 * torch.eye(EXPERTS, dtype=torch.float64)
    both = (eye + eye.roll(1, 1)).requires_grad_(True)
    assert router_loss([eye], 1, torch.ones(EXPERTS)).item() == pytest.approx(1)
    assert router_loss([both], 2, torch.ones(EXPERTS)).item() == pytest.approx(2)


def test_without_a_counted_token_the_loss_is_zero_and_moves_nothing():
    layers = logits(1)
    loss = router_loss(layers, 2, torch.zeros(1))
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(loss, layers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_give_a_finite_float32_loss(dtype):
    layer = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype, requires_grad=True)
    loss = router_loss([layer], 1, torch.ones(1))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(3)
    assert layer.grad.isfinite().all()


SIZES = {
    "jamba": {
        "num_experts": 4,
        "mamba_d_state": 4,
        **dict.fromkeys(("attn_layer_period", "expert_layer_period"), 2),
        **dict.fromkeys(("attn_layer_offset", "expert_layer_offset"), 1),
    },
    "jetmoe": {"num_local_experts": 4, "kv_channels": 16},
    "mixtral": {"num_local_experts": 4},
}


@pytest.mark.parametrize("kind", SIZES)
def test_a_networks_routers_are_those_that_transformers_records(kind: str) -> None:
    """They are marked by the name of a layer, in a list, and by a class alone."""
    config = AutoConfig.for_model(
        kind,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts_per_tok=2,
        vocab_size=100,
        pad_token_id=0,
        **SIZES[kind],
    )
    config.num_labels = 1
    network = AutoModelForSequenceClassification.from_config(config)
    routers = TrainedModel(RewardModel(network)).routers
    ids = torch.tensor([[5, 6, 7]])
    theirs = network.model(input_ids=ids, output_router_logits=True).router_logits
    ours = list(routers.logits)
    assert routers.found
    assert len(ours) == len(theirs) > 0
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected)
