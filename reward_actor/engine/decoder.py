"""A pre-norm decoder run over a packed forest in blocks of rows, for scoring.

Everything in a decoder but its attention works on each row by itself. So rows pass through in
blocks that stay in the processor's caches, nothing wide is ever held for all of them, and in the
last layer only the rows that are pooled go beyond their keys and values.

Legend: N rows, M pooled rows, H hidden units, Hq query heads, Hkv key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from reward_actor.engine import cpu
from reward_actor.engine.attention import attend
from reward_actor.engine.attention_plan import AttentionPlan

# Rows of a block. On a CPU the widest activation of a block should stay in the last-level cache,
# and all weights are read once for each block: so many in float32, twice as many in half precision,
# whose products wait for the weights otherwise (1.3 times as long with half of the rows, by AMX).
_CPU_BLOCK_ROWS = 1024
# A GPU needs many rows to be busy, and a bound on the memory of the widest activation.
_GPU_BLOCK_ROWS = 16_384

_LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_ATTENTION_NORMS = {"q_norm", "k_norm"}
# These slide in every layer, by their configuration; the others say it of each layer, or ignore a
# window that stands in theirs.
_SLIDING_EVERYWHERE = ("mistral", "mixtral")


class Decoder:
    """The layers of a Llama-like network (Llama, Mistral, Qwen2, Qwen3, their mixtures of experts),
    run by their own modules in an order of ours."""

    def __init__(self, backbone: nn.Module, *, compiled: bool = False) -> None:
        """compiled: fuse what happens to a row between the matrix products (`torch.compile`, one
        graph for all layers and all numbers of rows).

        Raises ValueError for a backbone of another build.
        """
        self.backbone = cast("Any", backbone)
        self.is_compiled = compiled
        children = {name for name, _ in backbone.named_children()}
        if children != {"embed_tokens", "layers", "norm", "rotary_emb"}:
            raise ValueError(f"{type(backbone).__name__} is not built like Llama")
        for layer in self.backbone.layers:
            _check(layer)

        def maybe_compiled(function: Any) -> Any:
            return torch.compile(function, dynamic=True) if compiled else function

        self._queries_keys_values = maybe_compiled(_queries_keys_values)
        self._keys_values = maybe_compiled(_keys_values)
        self._queries = maybe_compiled(_queries)
        self._after = maybe_compiled(_after)

    def pack(self) -> None:
        """Keep copies of the weights in the layout that a CPU multiplies with. They must not change
        after this."""
        cpu.pack(
            module
            for layer in self.backbone.layers
            for module in layer.modules()
            if type(module) is nn.Linear
        )

    def hidden_states(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        every: AttentionPlan,
        pooled: AttentionPlan | None = None,
    ) -> Tensor:
        """(N,) ids and positions -> the final hidden states: (N, H) of all rows, with
        the plan of `every` row alone, or (M, H) of those that `pooled` queries."""
        layers = self.backbone.layers
        hidden = self.backbone.embed_tokens(token_ids)
        rotary = self.backbone.rotary_emb(hidden[None], position_ids[None])
        cos, sin = (turn[0, :, None] for turn in rotary)
        query, key, value = _empty_heads(layers[0].self_attn, hidden)
        workspace = cpu.Workspace()
        plans = [every] * (len(layers) - 1) + [pooled or every]
        for layer, plan in zip(layers, plans, strict=True):
            if plan is every:
                for block in _blocks(hidden):
                    query[block], key[block], value[block] = self._queries_keys_values(
                        layer, hidden[block], cos[block], sin[block]
                    )
            else:
                for block in _blocks(hidden):
                    key[block], value[block] = self._keys_values(
                        layer, hidden[block], cos[block], sin[block]
                    )
                rows = torch.from_numpy(plan.query_rows).to(hidden.device)
                hidden = hidden[rows]
                query = self._queries(layer, hidden, cos[rows], sin[rows])
            seen = _attended(layer, query, key, value, plan)
            for block in _blocks(hidden):
                if self.is_compiled:
                    hidden[block] = self._after(layer, hidden[block], seen[block])
                else:
                    _after_in_place(layer, hidden[block], seen[block], workspace)
        for block in _blocks(hidden):
            hidden[block] = self.backbone.norm(hidden[block])
        return cast("Tensor", hidden)


@contextmanager
def last_layer_pooled(backbone: nn.Module, pooled: AttentionPlan) -> Iterator[bool]:
    """While this lasts, the last layer of `transformers`' own forward, (1, N, H), computes and
    returns only the rows that `pooled` queries, (1, M, H), with their gradients.

    Gives whether it does: only where it is built like Llama's, with a plain feed-forward (a mixture
    of experts counts the routes of every row).
    """
    try:
        layer = cast("Any", backbone).layers[-1]
        _check(layer)
    except (AttributeError, TypeError, ValueError):
        yield False
        return
    if not _is_gated(layer.mlp):
        yield False
        return

    def forward(
        hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], **others: Any
    ) -> Tensor:
        hidden, (cos, sin) = hidden_states[0], (turn[0, :, None] for turn in position_embeddings)
        rows = torch.from_numpy(pooled.query_rows).to(hidden.device)
        kept = hidden[rows]
        key, value = _keys_values(layer, hidden, cos, sin)
        query = _queries(layer, kept, cos[rows], sin[rows])
        return _after(layer, kept, _attended(layer, query, key, value, pooled))[None]

    layer.forward = forward
    try:
        yield True
    finally:
        del layer.forward


def _check(layer: nn.Module) -> None:
    parts = {name for name, _ in layer.named_children()}
    attention = cast("nn.Module", layer.self_attn) if "self_attn" in parts else nn.Module()
    inner = {name for name, _ in attention.named_children()}
    projections = [getattr(attention, name, None) for name in _ATTENTION_PARTS]
    is_plain = all(type(projection) is nn.Linear for projection in projections)
    if parts != _LAYER_PARTS or inner - _ATTENTION_NORMS != _ATTENTION_PARTS or not is_plain:
        raise ValueError(f"{type(layer).__name__} is not built like Llama's layer")


def _is_gated(mlp: nn.Module) -> bool:
    """Whether a feed-forward is down(silu(gate(x)) * up(x)) without biases (Shazeer, GLU Variants,
    arXiv:2002.05202)."""
    parts = dict(mlp.named_children())
    if parts.keys() != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return False
    linear = [parts[name] for name in ("gate_proj", "up_proj", "down_proj")]
    # By name: transformers wraps it in a class of its own in some versions.
    is_silu = type(parts["act_fn"]).__name__ in ("SiLU", "SiLUActivation")
    return is_silu and all(type(part) is nn.Linear and part.bias is None for part in linear)


def _empty_heads(attention: Any, hidden: Tensor) -> Iterator[Tensor]:
    """Queries (N, Hq, D), keys and values (N, Hkv, D) for every layer to write over."""
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        num_heads = projection.out_features // attention.head_dim
        yield hidden.new_empty(len(hidden), num_heads, attention.head_dim)


def _blocks(rows: Tensor) -> Iterator[slice]:
    is_on_cpu = rows.device.type == "cpu"
    size = _CPU_BLOCK_ROWS * 4 // rows.element_size() if is_on_cpu else _GPU_BLOCK_ROWS
    return (slice(start, start + size) for start in range(0, len(rows), size))


def _attended(layer: Any, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
    """(M, Hq, D), (N, Hkv, D), (N, Hkv, D) -> (M, Hq * D): what the queries have seen."""
    attention = layer.self_attn
    if attention.config.model_type in _SLIDING_EVERYWHERE:
        window = attention.config.sliding_window
    else:
        window = getattr(attention, "sliding_window", None)
    return attend(query, key, value, plan, attention.scaling, window).flatten(1)


# ---- what happens to each row by itself: (n, H) hidden states, cos and sin (n, 1, D)


def _queries_keys_values(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    normed = cpu.normed(layer.input_layernorm, hidden)
    return [_heads(layer.self_attn, name, normed, cos, sin) for name in "qkv"]


def _keys_values(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    normed = cpu.normed(layer.input_layernorm, hidden)
    return [_heads(layer.self_attn, name, normed, cos, sin) for name in "kv"]


def _queries(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    normed = cpu.normed(layer.input_layernorm, hidden)
    return _heads(layer.self_attn, "q", normed, cos, sin)


def _heads(attention: Any, name: str, rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(n, H) -> (n, heads, D): the queries, keys or values of normed rows."""
    heads = cpu.linear(rows, getattr(attention, f"{name}_proj"))
    heads = heads.view(len(rows), -1, attention.head_dim)
    if name == "v":
        return heads
    norm = getattr(attention, f"{name}_norm", None)
    return cpu.apply_rotary(heads if norm is None else cpu.normed(norm, heads), cos, sin)


def _after(layer: Any, hidden: Tensor, seen: Tensor) -> Tensor:
    """The rows after the layer, from what their attention has seen (n, Hq * D)."""
    hidden = hidden + layer.self_attn.o_proj(seen)
    return cast("Tensor", hidden + layer.mlp(layer.post_attention_layernorm(hidden)[None])[0])


def _after_in_place(layer: Any, hidden: Tensor, seen: Tensor, workspace: cpu.Workspace) -> None:
    """`_after` into `hidden`, without fresh memory where the feed-forward is a plain gated one."""
    cpu.add_linear(hidden, seen, layer.self_attn.o_proj)
    normed = cpu.normed(layer.post_attention_layernorm, hidden)
    if _is_gated(layer.mlp):
        cpu.add_linear(hidden, cpu.gated(normed, layer.mlp, workspace), layer.mlp.down_proj)
    else:
        hidden += layer.mlp(normed[None])[0]
