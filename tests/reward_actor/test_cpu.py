"""oneDNN's products are the projections' own, packed or not."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from reward_actor.engine import cpu


@pytest.fixture(autouse=True)
def with_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_is_here", lambda: True)  # slower elsewhere, but right


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_products_are_those_of_the_projection(bias: bool, packed: bool) -> None:
    torch.manual_seed(0)
    projection = nn.Linear(48, 80, bias=bias)
    rows, other = torch.randn(7, 48), torch.randn(7, 80)
    if packed:
        cpu.pack([projection])
    with torch.inference_mode():
        assert cpu.is_better(rows, projection)
        expected = projection(rows)
        close = torch.testing.assert_close
        close(cpu.product(rows, projection), expected)
        close(cpu.product(rows, projection, then="swish"), nn.functional.silu(expected))
        close(cpu.product_times(rows, projection, other), expected * other)
        close(cpu.product_plus(rows, projection, other), expected + other)


def test_packing_changes_no_bit_in_float32() -> None:
    torch.manual_seed(0)
    projection, rows = nn.Linear(256, 512, bias=False), torch.randn(300, 256)
    with torch.inference_mode():
        plain = cpu.product(rows, projection)
        cpu.pack([projection])
        assert torch.equal(cpu.product(rows, projection), plain)


def test_it_is_left_alone_where_it_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    projection, rows = nn.Linear(16, 16), torch.randn(2, 16)
    assert not cpu.is_better(rows, projection), "it has no gradients"
    with torch.inference_mode():
        half = projection.bfloat16()
        assert not cpu.is_better(rows.bfloat16(), half), "not packed"
        monkeypatch.setattr(cpu, "free_host_memory", lambda: 1000)
        cpu.pack([projection])
        assert projection not in cpu._PACKED, "no room"


def test_float16_is_not_packed() -> None:
    """Not every processor with AVX-512 can."""
    projection = nn.Linear(16, 16).half()
    cpu.pack([projection])
    with torch.inference_mode():
        assert not cpu.is_better(torch.randn(2, 16).half(), projection)


def test_copies_go_with_their_modules() -> None:
    before = len(cpu._PACKED)
    projection = nn.Linear(16, 16)
    cpu.pack([projection])
    assert len(cpu._PACKED) == before + 1
    del projection
    gc.collect()
    assert len(cpu._PACKED) == before
