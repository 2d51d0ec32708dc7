"""Matrix products on a CPU by oneDNN, which torch brings but does not always take.

In float32 torch multiplies by Intel's MKL, which on other makers' processors uses half of AVX-512;
oneDNN uses all of it on any. It multiplies faster still with weights in a layout of its own, and
does what follows a product in the same pass. These are the operations that `torch.compile` makes
of linear layers on a CPU; they have no gradients.

Legend: n rows, I input and O output features.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Literal, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

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


def is_better(rows: Tensor, projection: nn.Linear) -> bool:
    """Whether these products are faster this way: with packed weights, and in float32."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    if projection in _PACKED:
        return True
    return rows.dtype == torch.float32 and rows.device.type == "cpu" and _is_here()


def product(rows: Tensor, projection: nn.Linear, then: Literal["none", "swish"] = "none") -> Tensor:
    """(n, I) -> (n, O): then(projection(rows))"""
    weight, bias = _weight(projection), projection.bias
    return cast("Tensor", linear_pointwise(rows, weight, bias, then, [], ""))


def product_times(rows: Tensor, projection: nn.Linear, factor: Tensor) -> Tensor:
    """(n, I), (n, O) -> (n, O): projection(rows) * factor"""
    weight, bias = _weight(projection), projection.bias
    return cast("Tensor", linear_pointwise.binary(rows, factor, weight, bias, "mul"))


def product_plus(rows: Tensor, projection: nn.Linear, term: Tensor) -> Tensor:
    """(n, I), (n, O) -> (n, O): projection(rows) + term"""
    weight, bias = _weight(projection), projection.bias
    return cast("Tensor", linear_pointwise.binary(rows, term, weight, bias, "add"))


def _weight(projection: nn.Linear) -> Tensor:
    return _PACKED.get(projection, projection.weight)


@lru_cache
def _is_here() -> bool:
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has_avx512 and linear_pointwise is not None and reorder_linear_weight is not None
