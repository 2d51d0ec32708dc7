"""The private names of torch that are used are where they were, and do what they did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from missing import skip_without
from torch import Tensor

from reward_actor import torch_internals as internals

close = torch.testing.assert_close
SCALE = 0.4


def heads(*lengths: int) -> list[Tensor]:
    """(1, 2, n, 8) for each n."""
    torch.manual_seed(0)
    return [torch.randn(1, 2, length, 8) for length in lengths]


def logits(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    products = SCALE * query @ key.transpose(-1, -2)
    return products if mask is None else products + mask


@pytest.mark.parametrize("kind", ["all", "causal", "mask"])
def test_attention_gives_its_log_sums(kind: str) -> None:
    query, key, value = heads(5, 5, 5)
    causal = torch.full((5, 5), -torch.inf).triu(1)
    output, log_sums = internals.flash_for_cpu(
        query,
        key,
        value,
        is_causal=kind == "causal",
        mask=causal if kind == "mask" else None,
        scale=SCALE,
    )
    expected = logits(query, key, None if kind == "all" else causal)
    close(output, expected.softmax(-1) @ value)
    close(log_sums, expected.logsumexp(-1))


def test_gradients_go_by_the_log_sums_that_are_given() -> None:
    query, key, value = (t.requires_grad_() for t in heads(3, 7, 7))
    weights = logits(query, key, None).softmax(-1)
    output = weights @ value
    [gradient] = heads(3)
    expected = torch.autograd.grad(output, (query, key, value), gradient)
    found = [torch.zeros_like(t) for t in (query, key, value)]
    log_sum = logits(query, key, None).logsumexp(-1).detach()
    for part in (slice(0, 4), slice(4, 7)):  # of the keys, as a shared prefix and the rest
        gradients = internals.flash_for_cpu_backward(
            *(t.detach() for t in (gradient, query, key[:, :, part], value[:, :, part], output)),
            log_sum=log_sum,
            is_causal=False,
            scale=SCALE,
        )
        for whole, rows, some in zip(found, (slice(None), part, part), gradients, strict=True):
            whole[:, :, rows] += some
    close(tuple(found), expected)


def test_the_limit_of_compilations_holds_for_a_while() -> None:
    before = torch._dynamo.config.recompile_limit
    with internals.recompile_limit(before + 5):
        assert torch._dynamo.config.recompile_limit == before + 5
    assert torch._dynamo.config.recompile_limit == before


def test_what_the_processor_can_do() -> None:
    file = Path("/proc/cpuinfo")
    flags = set(file.read_text().split()) if file.exists() else set()
    assert internals.has_avx512_bf16() == ("avx512_bf16" in flags)
    assert "amx_tile" in flags or not internals.takes_amx_tiles()


@pytest.mark.parametrize("packed", [False, True])
def test_products_by_onednn(packed: bool) -> None:
    if not torch.backends.mkldnn.is_available():
        skip_without("oneDNN")
    torch.manual_seed(0)
    rows, weight, bias, other = (torch.randn(s) for s in ((7, 48), (80, 48), (80,), (7, 80)))
    expected = torch.nn.functional.linear(rows, weight, bias)
    product = internals.linear_pointwise
    with torch.inference_mode():
        given = internals.reorder_linear_weight(weight, 1024) if packed else weight
        close(product(rows, given, bias, "none", [], ""), expected)
        close(product(rows, given, bias, "swish", [], ""), torch.nn.functional.silu(expected))
        close(product.binary(rows, other, given, bias, "mul"), expected * other)
        close(product.binary(rows, other, given, bias, "add"), expected + other)
