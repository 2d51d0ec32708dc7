"""Every private name of torch that is used here, as of 2.13.

tests/reward_actor/test_torch_internals.py fails when a new version has moved one. The operations
that vLLM registers with torch are in `reward_actor.vllm_kernels`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

linear_pointwise: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
"""A linear layer and what follows it by oneDNN; None in a torch without it. What `torch.compile`
makes of linear layers on a CPU; no public function chooses oneDNN over MKL."""

reorder_linear_weight: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
"""A weight in the layout of `linear_pointwise` for a number of rows."""


def flash_for_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool,
    mask: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """(1, H, n, D) each -> (1, H, n, D) and the log-sum-exps (1, H, n). The public
    `scaled_dot_product_attention` takes another way, of other rounding, for some masks and head
    counts, and it does not give the log-sum-exp."""
    output: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    return output


def flash_for_cpu_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    *,
    log_sum: Tensor,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value. By the log-sum-exps of a forward pass that has seen
    more keys than these: the public function knows only those of its own."""
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    gradients: tuple[Tensor, Tensor, Tensor] = backward(
        gradient, query, key, value, output, log_sum, 0.0, is_causal, scale=scale
    )
    return gradients


def recompile_limit(limit: int) -> AbstractContextManager[None]:
    """Compile a function for so many shapes while this lasts; `torch.compile` takes no limit."""
    patched: AbstractContextManager[None] = torch._dynamo.config.patch(recompile_limit=limit)
    return patched


def has_avx512_bf16() -> bool:
    """Whether the processor multiplies bfloat16 with AVX-512; public is only "AVX512"."""
    return bool(torch.cpu._is_avx512_bf16_supported())


@lru_cache
def takes_amx_tiles() -> bool:
    """Whether there are AMX's tiles; asks the system to let this process use them."""
    return bool(torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx())
