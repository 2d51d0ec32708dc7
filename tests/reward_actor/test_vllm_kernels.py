"""vLLM's kernels, called by private names, are where they were and do what they did."""

from __future__ import annotations

import pytest
import torch
from missing import skip_without_vllm_kernels

from reward_actor import vllm_kernels

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def kernels() -> None:
    skip_without_vllm_kernels()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 48), (5, 3, 64), (1, 768)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    before = rows.clone()
    expected = torch.nn.functional.rms_norm(rows.double(), shape[-1:], weight.double(), 1e-3)
    with torch.inference_mode():
        assert vllm_kernels.take(rows, shape[-1])
        torch.testing.assert_close(vllm_kernels.rms_norm(rows, weight, 1e-3), expected.to(dtype))
        every_other = rows.repeat_interleave(2, 0)[::2]
        again = vllm_kernels.rms_norm(every_other, weight, 1e-3)
        torch.testing.assert_close(again, expected.to(dtype))
    assert torch.equal(rows, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 64, 96, 128, 256])
def test_rotation(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    heads, angles = torch.randn(7, 3, width).to(dtype), torch.randn(7, width // 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    first, second = heads.double().chunk(2, dim=-1)
    turn = cos[:, None].double(), sin[:, None].double()
    expected = [first * turn[0] - second * turn[1], second * turn[0] + first * turn[1]]
    with torch.inference_mode():
        assert vllm_kernels.take(heads, width // 2)
        turned = vllm_kernels.rotate(heads, cos, sin)
    torch.testing.assert_close(turned, torch.cat(expected, dim=-1).to(dtype))
    assert turned is heads


def test_what_they_do_not_take() -> None:
    rows = torch.randn(2, 64)
    assert not vllm_kernels.take(rows, 64), "they keep no gradients"
    with torch.inference_mode():
        assert vllm_kernels.take(rows, 64)
        assert not vllm_kernels.take(rows, 40), "a part of a vector would be left over"
        assert not vllm_kernels.take(rows.half(), 64)
        assert not vllm_kernels.take(rows.to("meta"), 64)


def test_another_version_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(vllm_kernels, "version", lambda _: "0.33.0")
        vllm_kernels.is_here.cache_clear()
        found = vllm_kernels.is_here()
    vllm_kernels.is_here.cache_clear()
    assert not found
    assert vllm_kernels.is_here()
