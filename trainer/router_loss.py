"""The load-balancing loss of a mixture of experts, for rows that several sequences share.

Shapes: N tokens (rows of a packed forest), E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def router_loss(router_logits: Sequence[Tensor], top_k: int, weights: Tensor) -> Tensor:
    """Each layer's (N, E) router logits and (N,) weights -> () loss: E * sum_e f_e P_e.

    f_e: routings to expert e per token; P_e: its mean probability; both over the tokens of all
    layers together. Switch Transformers (arXiv:2101.03961, eq. 4 to 6), generalised to `top_k`
    experts and pooled over the layers as `transformers` does it for Mixtral and Qwen3-MoE; its
    value is `top_k` when perfectly balanced. A weight says how many sequences share the token, so
    that a packed forest has the loss of its sequences laid out one by one; 0 leaves a token out,
    and without any weight the loss is 0. Computed in float32, or in float64 where given it.
    """
    routed, probability = [], []
    for logits in router_logits:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        probabilities = wide.softmax(-1)
        experts = probabilities.topk(top_k, dim=-1).indices
        # One-hot sums, not scatter_add, which on CUDA adds up in any order.
        chosen = torch.zeros_like(probabilities).scatter(1, experts, 1.0)
        routed.append((chosen * weights[:, None]).sum(0))
        probability.append((probabilities * weights[:, None]).sum(0))
    total = len(router_logits) * weights.sum()
    total = torch.where(total > 0, total, 1)
    frequencies, means = torch.stack(routed).sum(0) / total, torch.stack(probability).sum(0) / total
    return len(frequencies) * (frequencies * means).sum()
