"""What a CPU computes otherwise is what the layer's own modules compute."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from families import make_network
from missing import skip_without_vllm_kernels
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from reward_actor import vllm_kernels
from reward_actor.engine import cpu
from reward_actor.model.reward_model import RewardModel

FAMILIES = ("llama", "qwen3", "mistral", "gemma3")


def layer_of(family: str) -> Any:
    return RewardModel(make_network(family)).backbone.layers[0]


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
        close(cpu.linear(rows, projection), expected)
        hidden = other.clone()
        cpu.add_linear(hidden, rows, projection)
        close(hidden, expected + other)


@pytest.mark.parametrize("way", ["torch", "oneDNN", "packed"])
def test_a_gated_feed_forward_is_the_modules(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_is_here", lambda: way != "torch")
    mlp = layer_of("llama").mlp
    if way == "packed":
        cpu.pack([mlp.gate_proj, mlp.up_proj])
    workspace = cpu.Workspace()
    with torch.inference_mode():
        for num_rows in (9, 9, 4):
            rows = torch.randn(num_rows, mlp.gate_proj.in_features)
            inner = cpu.gated(rows, mlp, workspace)
            torch.testing.assert_close(mlp.down_proj(inner), mlp(rows))


def test_packing_changes_no_bit_in_float32() -> None:
    torch.manual_seed(0)
    projection, rows = nn.Linear(256, 512, bias=False), torch.randn(300, 256)
    with torch.inference_mode():
        plain = cpu.linear(rows, projection)
        cpu.pack([projection])
        assert torch.equal(cpu.linear(rows, projection), plain)


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


@pytest.fixture(params=["vLLM's", "torch's"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "vLLM's":
        skip_without_vllm_kernels()
    else:
        monkeypatch.setattr(vllm_kernels, "take", lambda *_: False)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_norm_is_the_modules(family: str, dtype: torch.dtype) -> None:
    norm = layer_of(family).input_layernorm.to(dtype)
    rows = torch.randn(5, norm.weight.shape[0]).to(dtype)
    with torch.inference_mode():
        norm.weight.copy_(torch.randn(norm.weight.shape))
        torch.testing.assert_close(cpu.normed(norm, rows), norm(rows))


def test_only_norms_that_are_the_same_are_replaced() -> None:
    norms = {
        family: cpu._is_rms_norm(type(layer_of(family).input_layernorm)) for family in FAMILIES
    }
    assert norms == {"llama": True, "qwen3": True, "mistral": True, "gemma3": False}
    assert not cpu._is_rms_norm(torch.nn.LayerNorm)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_are_turned_as_transformers_turns_them(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    heads, angles = torch.randn(7, 3, 64).to(dtype), torch.randn(7, 32).repeat(1, 2)
    cos, sin = angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]
    precise = [values.double() for values in (heads, cos[:, 0], sin[:, 0])]
    expected, _ = apply_rotary_pos_emb(precise[0], *precise)
    apart = 1e-6 if dtype == torch.float32 else 2**-5  # of sums below 8, after roundings
    with torch.inference_mode():
        turned = cpu.apply_rotary(heads.clone(), cos, sin).double()
    torch.testing.assert_close(turned, expected, atol=apart, rtol=0)
    kept = heads.clone().requires_grad_()
    assert cpu.apply_rotary(kept, cos, sin).requires_grad
