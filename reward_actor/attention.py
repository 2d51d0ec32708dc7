"""Attention over a packed forest: every row sees its own path and nothing else.

Legend: N rows; M query rows; Hq query heads and Hkv key heads (Hq a multiple of Hkv); D head width.
Queries are (M, Hq, D), keys and values (N, Hkv, D), outputs (M, Hq, D). Positions along a path are
contiguous, so causal order is the order of the path and a sliding window is an ordinary band.

Three ways to the same result:
- `path_attention`: one masked call for each run of queries. Differentiable, on any device. The
  reference, and what trains on a CPU.
- `varlen_attention`: one variable-length call for all runs, on CUDA in half precision.
- `cascade_attention`: on a CPU, without gradients. A segment's keys meet all queries below it in
  one product, and the parts are joined by their log-sum-exp (Juravsky et al., Hydragen,
  arXiv:2402.05099, section 3.1); no key is copied for each path.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from reward_actor.forest import Forest

NAME = "rayward_forest"
"""The name under which `transformers` knows the attention of a packed forest."""

# A run of shared keys shorter than this is read again by each segment below it: joining two parts
# of a softmax costs more than so few keys.
_LEAST_SHARED_KEYS = 16

# What some families pass to their attention and no function here computes.
_UNSUPPORTED = ("softcap", "s_aux", "sinks", "position_bias", "alibi", "head_mask")


class UnsupportedAttention(ValueError):
    """This network's attention cannot run over a packed forest."""


@dataclass(frozen=True)
class Runs:
    """Consecutive queries that see the same path: run r is queries [cu_queries[r], cu_queries[r+1])
    and keys key_rows[cu_keys[r]:cu_keys[r+1]]; the last query sees the last key."""

    key_rows: Tensor
    cu_queries: Tensor
    cu_keys: Tensor
    max_queries: int
    max_keys: int


@dataclass(frozen=True)
class _Part:
    """One product of the cascade. `keys` are rows, `queries` are places among the queries.

    A causal part has the rows `keys` as its queries, too, of which the last ones are `queries`.
    """

    queries: slice
    keys: slice | Tensor
    is_causal: bool


class AttentionPlan:
    """What every layer's attention needs to know of a forest; built once for each of its forms.

    With `pooled`, the queries are the rows at the end of the segments that end a sequence
    (`query_rows`), otherwise all rows in order.
    """

    def __init__(self, forest: Forest, device: torch.device, *, pooled: bool = False) -> None:
        self.forest = forest
        self.device = device
        self.pooled = pooled
        self._segments: NDArray[np.int64] = (
            np.unique(forest.last_segments) if pooled else np.arange(len(forest.starts))
        )
        self.query_rows: NDArray[np.int64] = (
            forest.ends[self._segments] - 1 if pooled else np.arange(forest.num_rows)
        )
        self.longest_path = int(forest.position_ids.max()) + 1

    @cached_property
    def runs(self) -> Runs:
        forest = self.forest
        paths = [forest.path_rows(int(segment)) for segment in self._segments]
        num_queries = np.ones(len(paths), dtype=np.int64)
        if not self.pooled:
            num_queries = forest.ends - forest.starts
        num_keys = np.array([len(path) for path in paths])
        return Runs(
            torch.from_numpy(np.concatenate(paths)).to(self.device),
            _cumulative(num_queries).to(self.device),
            _cumulative(num_keys).to(self.device),
            int(num_queries.max()),
            int(num_keys.max()),
        )

    @cached_property
    def parts(self) -> list[_Part]:
        """The products of the cascade, such that every query's first one is its own segment's."""
        forest = self.forest
        own: list[_Part] = []
        shared: list[_Part] = []
        # The rows above a segment that no shared part covers: each segment reads them itself.
        above: dict[int, NDArray[np.int64]] = {-1: np.empty(0, np.int64)}
        for segment in range(len(forest.starts)):
            start, end = int(forest.starts[segment]), int(forest.ends[segment])
            tree_end = int(forest.tree_ends[segment])
            carried = above[int(forest.parents[segment])]
            keys = self._rows(carried, start, end)
            queries = self._queries(start, end)
            if queries.start < queries.stop:
                own.append(_Part(queries, keys, is_causal=not self.pooled))
            below = self._queries(end, tree_end)
            if len(carried) + end - start < _LEAST_SHARED_KEYS:
                above[segment] = np.concatenate([carried, np.arange(start, end)])
                continue
            above[segment] = above[-1]
            if below.start < below.stop:
                shared.append(_Part(below, keys, is_causal=False))
        return own + shared

    def _rows(self, carried: NDArray[np.int64], start: int, end: int) -> slice | Tensor:
        if not len(carried):
            return slice(start, end)
        return torch.from_numpy(np.concatenate([carried, np.arange(start, end)]))

    def _queries(self, start: int, end: int) -> slice:
        if not self.pooled:
            return slice(start, end)
        first, last = np.searchsorted(self.query_rows, [start, end])
        return slice(int(first), int(last))


def _cumulative(counts: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """(M, Hq, D), (N, Hkv, D), (N, Hkv, D) -> (M, Hq, D), by the fastest exact way there is here.

    window: how many rows of its path a query sees, itself included; None: all.
    """
    if window is not None and window >= plan.longest_path:
        window = None
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return varlen_attention(query, key, value, plan, scale, window)
    needs_gradient = torch.is_grad_enabled() and query.requires_grad
    if query.device.type == "cpu" and window is None and not needs_gradient:
        return cascade_attention(query, key, value, plan, scale)
    return path_attention(query, key, value, plan, scale, window)


def path_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """The reference: a masked product for each run of queries."""
    runs = plan.runs
    outputs = []
    cu_queries, cu_keys = runs.cu_queries.tolist(), runs.cu_keys.tolist()
    for run in range(len(cu_queries) - 1):
        rows = runs.key_rows[cu_keys[run] : cu_keys[run + 1]]
        queries = query[cu_queries[run] : cu_queries[run + 1]]
        # The position of each query and key on the path; the last query stands at the last key.
        at_key = torch.arange(len(rows), device=query.device)
        at_query = at_key[len(rows) - len(queries) :, None]
        visible = at_key <= at_query
        if window is not None:
            visible &= at_key > at_query - window
        output = nn.functional.scaled_dot_product_attention(
            queries.transpose(0, 1)[None],
            key[rows].transpose(0, 1)[None],
            value[rows].transpose(0, 1)[None],
            attn_mask=visible,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """One variable-length flash attention call over gathered paths (CUDA, bfloat16 or float16).

    The kernel aligns the causal mask to the end of the keys, which is where a run's queries stand.
    """
    from torch.nn.attention.varlen import varlen_attn

    runs = plan.runs
    groups = query.shape[1] // key.shape[1]
    keys, values = key[runs.key_rows], value[runs.key_rows]
    more: dict[str, Any] = {}
    if "num_splits" in _varlen_arguments() and not torch.is_grad_enabled():
        more["num_splits"] = 1  # a reward must not change with its neighbours, not even in a bit
    if groups > 1:
        if "enable_gqa" in _varlen_arguments():
            more["enable_gqa"] = True
        else:
            keys, values = (t.repeat_interleave(groups, dim=1) for t in (keys, values))
    output = varlen_attn(
        query,
        keys,
        values,
        runs.cu_queries,
        runs.cu_keys,
        runs.max_queries,
        runs.max_keys,
        scale=scale,
        **_causal(window),
        **more,
    )
    assert isinstance(output, Tensor)
    return output


def _causal(window: int | None) -> dict[str, Any]:
    """The kernel's arguments for causal attention, with or without a window."""
    if "window_size" not in _varlen_arguments():
        return {"is_causal": True}
    return {"window_size": (-1 if window is None else window - 1, 0)}


@lru_cache
def _varlen_arguments() -> frozenset[str]:
    """What this torch's `varlen_attn` accepts: it gained arguments from 2.10 to 2.12."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def cascade_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float | None = None
) -> Tensor:
    """Every product of `AttentionPlan.parts`, joined (CPU, no gradients)."""
    num_queries, num_heads, width = query.shape
    output = torch.empty(num_queries, num_heads, value.shape[-1], dtype=torch.float32)
    log_sum = torch.empty(num_queries, num_heads, dtype=torch.float32)
    seen = 0
    for part in plan.parts:
        rows = part.queries
        keys, values = key[part.keys], value[part.keys]
        if part.is_causal and isinstance(part.keys, Tensor):
            # The rows above are queries, too, so that the kernel's causal mask is the right one.
            queries = query[part.keys]
        else:
            queries = query[rows]
        values_out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries.transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            0.0,
            part.is_causal,
            scale=scale,
        )
        num_rows = rows.stop - rows.start
        new = values_out[0].transpose(0, 1)[-num_rows:].float()
        new_sum = sums[0].transpose(0, 1)[-num_rows:]
        if rows.start == seen:
            output[rows], log_sum[rows] = new, new_sum
            seen = rows.stop
            continue
        total = torch.logaddexp(log_sum[rows], new_sum)
        output[rows] *= (log_sum[rows] - total).exp_()[..., None]
        output[rows].addcmul_(new, (new_sum - total).exp_()[..., None])
        log_sum[rows] = total
    return output.to(query.dtype)


def forest_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    forest: AttentionPlan | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function of `transformers` for a packed forest: (1, H, N, D) -> (1, N, H, D).

    `forest` is given to the network's forward, which hands it down to every layer. Raises
    UnsupportedAttention where a layer asks for more than causal softmax attention.
    """
    unsupported = [name for name in _UNSUPPORTED if others.get(name) is not None]
    if not getattr(module, "is_causal", True):
        unsupported.append("bidirectional attention")
    if forest is None:
        unsupported.append("a forward that drops `forest`")
    if unsupported:
        raise UnsupportedAttention(f"{type(module).__name__} needs {unsupported[0]}")
    assert forest is not None
    rows = (t[0].transpose(0, 1) for t in (query, key, value))
    return attend(*rows, forest, scaling, sliding_window)[None], None


AttentionInterface.register(NAME, forest_attention)
