"""The rows of a decoder's layer as a CPU computes them fastest; on another device, and wherever
gradients are kept, as torch does.

Matrix products are oneDNN's, which torch brings but does not always take. In float32 torch
multiplies by Intel's MKL, which on other makers' processors uses half of AVX-512; oneDNN uses all
of it on any. It multiplies faster still with weights in a layout of its own, and does what follows
a product in the same pass. These are the operations that `torch.compile` makes of linear layers on
a CPU; they have no gradients. Norms and rotations are vLLM's where its kernels are installed.

Legend: n rows, I input and O output features.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from reward_actor import vllm_kernels
from reward_actor.engine.memory import free_host_memory
from reward_actor.torch_internals import linear_pointwise, reorder_linear_weight

_ROWS = 1024
"""Rows of the products that a packed layout is for; others are right, too."""

_SHARE_OF_FREE_MEMORY = 0.25

_DTYPES = (torch.float32, torch.bfloat16)
"""Float16 needs more than AVX-512 has everywhere."""

# The copies go with their modules.
_PACKED: WeakKeyDictionary[nn.Linear, Tensor] = WeakKeyDictionary()


def pack(projections: Iterable[nn.Linear]) -> None:
    """Keep a copy of each weight in oneDNN's layout, where it can be used and all of them take a
    small part of the free memory."""
    usable = [
        p
        for p in projections
        if p.weight.device.type == "cpu" and p.weight.dtype in _DTYPES and _is_here()
    ]
    size = sum(p.weight.numel() * p.weight.element_size() for p in usable)
    if size <= free_host_memory() * _SHARE_OF_FREE_MEMORY:
        for projection in usable:
            _PACKED[projection] = reorder_linear_weight(projection.weight.detach(), _ROWS)


def linear(rows: Tensor, projection: nn.Linear) -> Tensor:
    """(n, I) -> (n, O): projection(rows)"""
    if is_better(rows, projection):
        product = linear_pointwise(rows, _weight(projection), projection.bias, "none", [], "")
    else:
        product = projection(rows)
    return cast("Tensor", product)


def add_linear(hidden: Tensor, rows: Tensor, projection: nn.Linear) -> None:
    """hidden (n, O) += projection(rows)"""
    if is_better(rows, projection):
        # oneDNN adds in the same pass, but not in place: to copy its result takes longer.
        hidden += linear(rows, projection)
        return
    hidden.addmm_(rows, projection.weight.t())
    if projection.bias is not None:
        hidden += projection.bias


class Workspace:
    """The two wide activations of a gated feed-forward, for all blocks of rows and all layers.
    Fresh memory for each would cost a CPU a tenth of its time: the system clears every page that it
    hands out."""

    def __init__(self) -> None:
        self._wide: Tensor | None = None

    def wide(self, rows: Tensor, width: int) -> Tensor:
        """(2, n, width). The first block is the longest one."""
        if self._wide is None:
            self._wide = rows.new_empty(2, len(rows), width)
        return self._wide[:, : len(rows)]


def gated(rows: Tensor, mlp: Any, workspace: Workspace) -> Tensor:
    """(n, I) -> (n, O): silu(gate(rows)) * up(rows), both without biases; good until the next."""
    gate, up = mlp.gate_proj, mlp.up_proj
    if is_better(rows, gate):
        factor = linear_pointwise(rows, _weight(gate), None, "swish", [], "")
        return cast("Tensor", linear_pointwise.binary(rows, factor, _weight(up), None, "mul"))
    product, factor = workspace.wide(rows, gate.out_features)
    torch.mm(rows, gate.weight.t(), out=product)
    torch.mm(rows, up.weight.t(), out=factor)
    return nn.functional.silu(product, inplace=True).mul_(factor)


def normed(norm: Any, rows: Tensor) -> Tensor:
    """norm(rows), (..., H). On a CPU vLLM's kernel is three to seven times as fast as the module,
    and in half precision torch's own a little faster: the module makes three copies in float32."""
    is_on_cpu = rows.device.type == "cpu" and not torch.is_grad_enabled()
    if is_on_cpu and _is_rms_norm(norm.__class__):
        weight, epsilon = norm.weight, norm.variance_epsilon
        if weight.dtype == rows.dtype and vllm_kernels.take(rows, len(weight)):
            return vllm_kernels.rms_norm(rows, weight, epsilon)
        if rows.dtype != torch.float32:
            return nn.functional.rms_norm(rows, weight.shape, weight, epsilon)
    return cast("Tensor", norm(rows))


def apply_rotary(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(n, heads, D) turned by position (Su et al., RoFormer, arXiv:2104.09864, in the half-split
    layout that these networks share), over the memory of `heads` where no gradients are kept.

    cos, sin: (n, 1, D), both halves alike.
    """
    half = heads.shape[-1] // 2
    is_whole = cos.shape[-1] == heads.shape[-1] and cos.dtype == heads.dtype
    if is_whole and vllm_kernels.take(heads, half):
        return vllm_kernels.rotate(heads, cos[:, 0, :half], sin[:, 0, :half])
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1) * sin
    return turned + heads * cos


@lru_cache
def _is_rms_norm(norm_type: Any) -> bool:
    """Whether modules of this type are torch's RMSNorm (Zhang and Sennrich, arXiv:1910.07467)."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 8, generator=generator)
    try:
        norm = norm_type(8, 1e-3)
        with torch.no_grad():
            norm.weight.copy_(torch.randn(8, generator=generator))
            expected = nn.functional.rms_norm(rows, (8,), norm.weight, norm.variance_epsilon)
            return bool(torch.allclose(norm(rows), expected))
    except (AttributeError, TypeError):
        return False


def is_better(rows: Tensor, projection: nn.Linear) -> bool:
    """Whether these products are faster this way: with packed weights, and in float32."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    if projection in _PACKED:
        return True
    return rows.dtype == torch.float32 and rows.device.type == "cpu" and _is_here()


def _weight(projection: nn.Linear) -> Tensor:
    return _PACKED.get(projection, projection.weight)


@lru_cache
def _is_here() -> bool:
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has_avx512 and linear_pointwise is not None and reorder_linear_weight is not None
