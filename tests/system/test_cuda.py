"""What only a CUDA device can show; skipped without one."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCAB_SIZE, make_network
from missing import GPU

from reward_actor.engine.attention import flex_attention, path_attention, varlen_attention
from reward_actor.engine.attention_plan import AttentionPlan
from reward_actor.engine.engine import Engine
from reward_actor.engine.forest import plan_forests
from reward_actor.model.reward_model import RewardModel

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=f"missing: {GPU}"),
]


def some_groups(seed: int) -> list[list[int]]:
    generate = random.Random(seed)

    def some(count: int) -> list[int]:
        return [generate.randrange(VOCAB_SIZE) for _ in range(count)]

    prompts = [some(n) for n in (3, 60, 200)]
    return [p + some(generate.randint(1, 90)) for p in prompts for _ in range(4)] + prompts


@pytest.mark.parametrize("window", [None, 7, 100])
@pytest.mark.parametrize("pooled", [False, True])
def test_the_kernel_aligns_the_mask_to_the_end_of_the_keys(
    window: int | None, pooled: bool
) -> None:
    [forest] = plan_forests(some_groups(0), 10**6)
    device = torch.device("cuda")
    plan = AttentionPlan(forest, device, pooled=pooled)
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(len(plan.query_rows), 4, 64), *[(forest.num_rows, 2, 64)] * 2]
    heads = [
        torch.randn(s, generator=generator, device=device, dtype=torch.bfloat16) for s in shapes
    ]
    with torch.inference_mode():
        ours = varlen_attention(*heads, plan, window=window)
        right = path_attention(*(t.float() for t in heads), plan, window=window)
    torch.testing.assert_close(ours.float(), right, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 7, 100])
@pytest.mark.parametrize("pooled", [False, True])
def test_one_call_with_a_mask_is_the_reference_with_its_gradients(
    window: int | None, pooled: bool, dtype: torch.dtype
) -> None:
    """FlexAttention, compiled."""
    device = torch.device("cuda")
    for sequences in (some_groups(0), some_groups(1)[:1]):
        [forest] = plan_forests(sequences, 10**6)
        plan = AttentionPlan(forest, device, pooled=pooled, kernel="flex")
        generator = torch.Generator(device).manual_seed(0)
        shapes = [(len(plan.query_rows), 4, 64), *[(forest.num_rows, 2, 64)] * 2]
        heads = [torch.randn(s, generator=generator, device=device) for s in shapes]
        outcomes = []
        for way, given in ((flex_attention, dtype), (path_attention, torch.float32)):
            some = [tensor.to(given).requires_grad_() for tensor in heads]
            output = way(*some, plan, window=window)
            outcomes.append((output, *torch.autograd.grad(output.float().square().sum(), some)))
        limit = 5e-4 if dtype == torch.float32 else 5e-2
        for ours, right in zip(*outcomes, strict=True):
            torch.testing.assert_close(ours.float(), right, atol=limit, rtol=limit)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_on_the_device(family: str) -> None:
    """float32 to 1e-5 of the CPU's padded path; bfloat16 within its own distance from float32."""
    network = make_network(family)
    sequences = some_groups(1)
    expected = Engine(RewardModel(network).eval(), "padded").raw_scores(sequences)
    torch.backends.cuda.matmul.allow_tf32 = False
    found = Engine(RewardModel(network.cuda()).eval())
    assert found.path.endswith(", flex") or found.path == "padded", found.fallback_reason
    full = found.raw_scores(sequences)
    np.testing.assert_allclose(full, expected, atol=2e-5, rtol=0)
    half = RewardModel(network.bfloat16()).eval()
    noise = np.abs(Engine(half, "padded").raw_scores(sequences) - expected).max()
    together = Engine(half).raw_scores(sequences)
    assert np.abs(together - expected).max() <= 2 * noise
    alone = np.concatenate([Engine(half).raw_scores([s]) for s in sequences[:3]])
    assert np.abs(together[:3] - alone).max() <= noise
