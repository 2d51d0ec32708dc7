"""Attention over a packed forest: every row sees its own path and nothing else.

Legend: N rows; M query rows; Hq query heads and Hkv key heads (Hq a multiple of Hkv); D head width.
Queries are (M, Hq, D), keys and values (N, Hkv, D), outputs (M, Hq, D). Positions along a path are
contiguous, so causal order is the order of the path and a sliding window is an ordinary band.

Five ways to the same result; all but the last are differentiable:
- `path_attention`: one masked call for each run of queries. On any device. The reference.
- `varlen_attention`: one variable-length call for all runs, on CUDA in half precision.
- `cascade_attention`: on a CPU, computed in float32. A segment's keys meet all queries below it in
  one product, and the parts are joined by their log-sum-exp (Juravsky et al., Hydragen,
  arXiv:2402.05099, section 3.1); no key is copied for each path.
- `flex_attention`: one call with the forest's mask, on CUDA, where a plan says so.
- `paged.PagedAttention`: on a CPU, by vLLM's kernel, where a plan says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from reward_actor.engine.attention_plan import AttentionPlan, AttentionProduct
from reward_actor.torch_internals import flash_for_cpu, flash_for_cpu_backward, recompile_limit

NAME = "rayward_forest"
"""The name under which `transformers` knows the attention of a packed forest."""

# What some families pass to their attention and no function here computes.
_UNSUPPORTED = ("softcap", "s_aux", "sinks", "position_bias", "alibi", "head_mask")


_MAX_COMPILED = 64
"""Graphs of FlexAttention: one for each kind of heads, window, and use of gradients."""


class UnsupportedAttention(ValueError):
    """This network's attention cannot run over a packed forest."""


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
    if plan.kernel == "flex":
        return flex_attention(query, key, value, plan, scale, window)
    dtype = query.dtype
    is_half = dtype in (torch.bfloat16, torch.float16)
    has_kernel = "window_size" in _varlen_arguments() or (_varlen_arguments() and window is None)
    if query.is_cuda and is_half and has_kernel:
        return varlen_attention(query, key, value, plan, scale, window)
    if plan.takes_pages(query.dtype) and not _needs_gradient(query, key, value):
        return plan.paged(query, key, value, scale, window)
    if query.device.type == "cpu" and window is None:
        if query.dtype == torch.float32:
            return cascade_attention(query, key, value, plan, scale)
        if is_half and not _needs_gradient(query, key, value):
            # Parts in half precision would be rounded before they are joined, and torch has no
            # faster product for them on a CPU than float32's.
            query, key, value = query.float(), key.float(), value.float()
            return cascade_attention(query, key, value, plan, scale).to(dtype)
    return path_attention(query, key, value, plan, scale, window)


def path_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """The reference: a product for each run of queries, masked where it must be."""
    on_cpu = query.device.type == "cpu" and not _needs_gradient(query, key, value)
    product = _cpu_flash if on_cpu else _general
    outputs = []
    for runs in plan.runs:
        some = query[runs.queries]
        cu_queries, cu_keys = runs.cu_queries.tolist(), runs.cu_keys.tolist()
        for run in range(len(cu_queries) - 1):
            rows = runs.key_rows[cu_keys[run] : cu_keys[run + 1]]
            queries = some[cu_queries[run] : cu_queries[run + 1]]
            is_square = len(queries) == len(rows) and window is None
            mask = None if is_square else _visible(len(queries), len(rows), window, rows.device)
            output, _ = product(queries, key[rows], value[rows], is_square, scale, mask)
            outputs.append(output)
    return torch.cat(outputs)


def _general(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    scale: float | None,
    mask: Tensor | None = None,
) -> tuple[Tensor, None]:
    """`_cpu_flash` on any device, with gradients, without the log-sum-exps."""
    queries, keys, values = _heads_first(query, key, value)
    output = nn.functional.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[0].transpose(0, 1), None


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """(M, H, D) -> (1, H, M, D) of each, without a copy."""
    return [rows.transpose(0, 1)[None] for rows in tensors]


def _cpu_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    scale: float | None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(M, Hq, D), (N, Hkv, D), (N, Hkv, D) -> (M, Hq, D) and the log-sum-exps (M, Hq)."""
    if mask is not None:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    heads = _heads_first(query, key, value)
    output, log_sums = flash_for_cpu(*heads, is_causal=is_causal, mask=mask, scale=scale)
    return output[0].transpose(0, 1), log_sums[0].transpose(0, 1)


def _visible(
    num_queries: int, num_keys: int, window: int | None, device: torch.device
) -> Tensor | None:
    """(queries, keys) whether a query sees a key; the last query stands at the last key."""
    if num_queries == 1 and (window is None or window >= num_keys):
        return None
    at_key = torch.arange(num_keys, device=device)
    at_query = at_key[num_keys - num_queries :, None]
    visible = at_key <= at_query
    return visible if window is None else visible & (at_key > at_query - window)


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

    more: dict[str, Any] = {}
    if "num_splits" in _varlen_arguments() and not torch.is_grad_enabled():
        more["num_splits"] = 1  # a reward must not change with its neighbours, not even in a bit
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and "enable_gqa" in _varlen_arguments():
        more["enable_gqa"] = True
        groups = 1
    outputs = []
    for runs in plan.runs:
        keys, values = key[runs.key_rows], value[runs.key_rows]
        if groups > 1:
            keys, values = (t.repeat_interleave(groups, dim=1) for t in (keys, values))
        output = varlen_attn(
            query[runs.queries],
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
        outputs.append(output)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _causal(window: int | None) -> dict[str, Any]:
    """The kernel's arguments for causal attention, with or without a window."""
    if "window_size" not in _varlen_arguments():
        assert window is None, "`attend` sends windows elsewhere where the kernel knows none"
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


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """One call of FlexAttention (Dong et al., arXiv:2412.05496): no key is copied, and blocks that
    no query sees are left out."""
    output = _flex(query.is_cuda)(
        *_heads_first(query, key, value),
        block_mask=plan.block_mask(window),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[0].transpose(0, 1)


@lru_cache
def _flex(on_cuda: bool) -> Callable[..., Tensor]:
    """FlexAttention is a kernel when it is compiled, and a reference when it is not."""
    from torch.nn.attention.flex_attention import flex_attention

    if not on_cuda:
        return cast("Callable[..., Tensor]", flex_attention)
    compiled = torch.compile(flex_attention, dynamic=True, fullgraph=True)

    def call(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
        # At its limit the compiler would go on without the kernel, with all pairs in memory.
        with recompile_limit(_MAX_COMPILED):
            return compiled(query, key, value, **settings)

    return call


def flex_fault(
    num_heads: int, num_key_heads: int, width: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why FlexAttention cannot run for such heads, forward and backward, or None. It is compiled
    here, so that whatever its compiler misses is known before a network runs."""
    from reward_actor.engine.forest import plan_forests

    [forest] = plan_forests([[0] * 200 + [1] * 100, [0] * 200 + [2] * 30], 10**6)
    query, key, value = (
        torch.zeros(forest.num_rows, n, width, dtype=dtype, device=device).requires_grad_()
        for n in (num_heads, num_key_heads, num_key_heads)
    )
    try:
        with torch.enable_grad():
            plan = AttentionPlan(forest, device, kernel="flex")
            output = flex_attention(query, key, value, plan)
            torch.autograd.grad(output.sum(), (query, key, value))
    except Exception as error:  # a compiler's, a driver's, no memory
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def cascade_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float | None = None
) -> Tensor:
    """Every product of `AttentionPlan.parts`, joined (CPU)."""
    if _needs_gradient(query, key, value):
        return cast("Tensor", _Cascade.apply(query, key, value, plan, scale))
    return _joined(query, key, value, plan, scale)[0].to(query.dtype)


def _joined(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float | None
) -> tuple[Tensor, Tensor]:
    """(M, Hq, D) float32 outputs and (M, Hq) log-sum-exps over each query's whole path."""
    num_queries, num_heads = query.shape[:2]
    output = torch.empty(num_queries, num_heads, value.shape[-1], dtype=torch.float32)
    log_sum = torch.empty(num_queries, num_heads, dtype=torch.float32)
    seen = 0
    for part in plan.parts:
        rows = part.queries
        keys, values = key[part.keys], value[part.keys]
        queries = query[_query_rows(part)]
        new, new_sum = _cpu_flash(queries, keys, values, part.is_causal, scale)
        num_rows = rows.stop - rows.start
        new, new_sum = new[-num_rows:].float(), new_sum[-num_rows:]
        if rows.start == seen:
            output[rows], log_sum[rows] = new, new_sum
            seen = rows.stop
            continue
        total = torch.logaddexp(log_sum[rows], new_sum)
        output[rows] *= (log_sum[rows] - total).exp_()[..., None]
        output[rows].addcmul_(new, (new_sum - total).exp_()[..., None])
        log_sum[rows] = total
    return output, log_sum


def _query_rows(part: AttentionProduct) -> slice | Tensor:
    """The queries of a product. Where a causal part reads rows above its own they are queries, too,
    so that the kernel's causal mask is the right one."""
    return part.keys if part.is_causal and isinstance(part.keys, Tensor) else part.queries


class _Cascade(torch.autograd.Function):
    """`_joined` with its gradient, part by part.

    With the log-sum-exp and the output of the whole path, the backward pass of flash attention
    gives a part's share of the gradients: its probabilities are exp(score - log-sum-exp), and what
    it subtracts from theirs is the sum of output times gradient (Dao et al., arXiv:2205.14135,
    appendix B.2). No gradient flows through the joining itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: AttentionPlan,
        scale: float | None,
    ) -> Tensor:
        output, log_sum = _joined(query, key, value, plan, scale)
        ctx.save_for_backward(query, key, value, output, log_sum)
        ctx.plan, ctx.scale = plan, scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sum = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        of_query, of_key, of_value = (torch.zeros_like(t) for t in (query, key, value))
        for part in ctx.plan.parts:
            rows = _query_rows(part)
            given = gradient[rows]
            if rows is not part.queries:  # rows above the part's own: another part's matter
                given[: -(part.queries.stop - part.queries.start)] = 0
            to_query, to_key, to_value = flash_for_cpu_backward(
                *_heads_first(given, query[rows], key[part.keys]),
                *_heads_first(value[part.keys], output[rows]),
                log_sum=log_sum[rows].transpose(0, 1)[None],
                is_causal=part.is_causal,
                scale=ctx.scale,
            )
            of_query[rows] += to_query[0].transpose(0, 1)
            of_key[part.keys] += to_key[0].transpose(0, 1)
            of_value[part.keys] += to_value[0].transpose(0, 1)
        return of_query, of_key, of_value, None, None


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
    query, key, value = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    return attend(query, key, value, forest, scaling, sliding_window)[None], None


AttentionInterface.register(NAME, forest_attention)
