"""A pre-norm decoder run over a packed forest in blocks of rows, for scoring.

Everything in a decoder but its attention works on each row by itself. So rows pass through in
blocks that stay in the processor's caches, nothing wide is ever held for all of them, and in the
last layer only the rows that are pooled go beyond their keys and values.

Legend: N rows, M pooled rows, H hidden units, Hq query heads, Hkv key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from reward_actor.attention import attend
from reward_actor.attention_plan import AttentionPlan

# Rows of a block. On a CPU the widest activation of a block should stay in the last-level cache;
# a GPU needs many rows to be busy, and a bound on the memory of the widest activation.
_BLOCK_ROWS = {"cpu": 512, "cuda": 16_384}

_LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_ATTENTION_NORMS = {"q_norm", "k_norm"}


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
        if not {"embed_tokens", "layers", "norm", "rotary_emb"} >= children:
            raise ValueError(f"{type(backbone).__name__} is not built like Llama")
        for layer in self.backbone.layers:
            self._check(layer)

        def maybe_compiled(function: Any) -> Any:
            return torch.compile(function, dynamic=True) if compiled else function

        self._before = maybe_compiled(_before)
        self._queries = maybe_compiled(_queries)
        self._keys_values = maybe_compiled(_keys_values)
        self._after = maybe_compiled(_after)

    @staticmethod
    def _check(layer: nn.Module) -> None:
        parts = {name for name, _ in layer.named_children()}
        attention = cast("nn.Module", layer.self_attn) if "self_attn" in parts else nn.Module()
        inner = {name for name, _ in attention.named_children()}
        if parts != _LAYER_PARTS or inner - _ATTENTION_NORMS != _ATTENTION_PARTS:
            raise ValueError(f"{type(layer).__name__} is not built like Llama's layer")

    def pooled(
        self, forest: AttentionPlan, pooled: AttentionPlan, token_ids: Tensor, position_ids: Tensor
    ) -> Tensor:
        """(N,) ids and positions -> (M, H): the final hidden states of `pooled`'s query rows."""
        hidden, rotary = self._embed(token_ids, position_ids)
        for layer in self.backbone.layers[:-1]:
            self._layer(layer, hidden, rotary, forest)
        return cast("Tensor", self.backbone.norm(self._last_layer(hidden, rotary, pooled)))

    def all_rows(self, forest: AttentionPlan, token_ids: Tensor, position_ids: Tensor) -> Tensor:
        """(N,) ids and positions -> (N, H) final hidden states."""
        hidden, rotary = self._embed(token_ids, position_ids)
        for layer in self.backbone.layers:
            self._layer(layer, hidden, rotary, forest)
        for block in _blocks(hidden):
            hidden[block] = self.backbone.norm(hidden[block])
        return hidden

    def _embed(
        self, token_ids: Tensor, position_ids: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        hidden = self.backbone.embed_tokens(token_ids)
        cos, sin = self.backbone.rotary_emb(hidden[None], position_ids[None])
        return hidden, (cos[0, :, None], sin[0, :, None])

    def _layer(
        self, layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], plan: AttentionPlan
    ) -> None:
        """Update `hidden` (N, H) in place."""
        query, key, value = self._empty_heads(layer, hidden)
        for block in _blocks(hidden):
            turn = rotary[0][block], rotary[1][block]
            query[block], key[block], value[block] = self._before(layer, hidden[block], *turn)
        self._attend(layer, hidden, (query, key, value), plan)

    def _last_layer(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], plan: AttentionPlan
    ) -> Tensor:
        """(N, H) -> (M, H): the rows that `plan` queries, after the last layer."""
        layer = self.backbone.layers[-1]
        rows = torch.from_numpy(plan.query_rows).to(hidden.device)
        kept = hidden[rows]
        _, key, value = self._empty_heads(layer, hidden)
        for block in _blocks(hidden):
            turn = rotary[0][block], rotary[1][block]
            key[block], value[block] = self._keys_values(layer, hidden[block], *turn)
        query = self._queries(layer, kept, rotary[0][rows], rotary[1][rows])
        self._attend(layer, kept, (query, key, value), plan)
        return kept

    def _attend(
        self, layer: Any, hidden: Tensor, heads: tuple[Tensor, Tensor, Tensor], plan: AttentionPlan
    ) -> None:
        attention = layer.self_attn
        # Mistral and Mixtral slide in every layer; the others say it of each.
        everywhere = getattr(attention.config, "sliding_window", None)
        window = getattr(attention, "sliding_window", everywhere)
        seen = attend(*heads, plan, attention.scaling, window).flatten(1)
        for block in _blocks(hidden):
            hidden[block] = self._after(layer, hidden[block], seen[block])

    @staticmethod
    def _empty_heads(layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Room for the (N, heads, D) queries, keys and values of all rows."""
        attention = layer.self_attn
        num_heads = [
            projection.out_features // attention.head_dim
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        query, key, value = (
            hidden.new_empty(len(hidden), heads, attention.head_dim) for heads in num_heads
        )
        return query, key, value


# ---- what happens to each row by itself: (n, H) hidden states, cos and sin (n, 1, D)


def _before(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The queries, keys and values of a block of rows."""
    normed = layer.input_layernorm(hidden)
    attention = layer.self_attn
    query = _turned(attention, attention.q_proj(normed), "q_norm", cos, sin)
    key = _turned(attention, attention.k_proj(normed), "k_norm", cos, sin)
    return query, key, _split(attention, attention.v_proj(normed))


def _queries(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    attention = layer.self_attn
    return _turned(attention, attention.q_proj(layer.input_layernorm(hidden)), "q_norm", cos, sin)


def _keys_values(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    normed = layer.input_layernorm(hidden)
    attention = layer.self_attn
    key = _turned(attention, attention.k_proj(normed), "k_norm", cos, sin)
    return key, _split(attention, attention.v_proj(normed))


def _after(layer: Any, hidden: Tensor, seen: Tensor) -> Tensor:
    """The rows after the layer, from what their attention has seen (n, Hq * D)."""
    hidden = hidden + layer.self_attn.o_proj(seen)
    return cast("Tensor", hidden + layer.mlp(layer.post_attention_layernorm(hidden)[None])[0])


def _turned(attention: Any, heads: Tensor, norm_name: str, cos: Tensor, sin: Tensor) -> Tensor:
    """(n, heads * D) -> (n, heads, D), normed where the network does so and turned by position (Su
    et al., RoFormer, arXiv:2104.09864, in the half-split layout that these networks share)."""
    norm = getattr(attention, norm_name, None)
    heads = _split(attention, heads)
    if norm is not None:
        heads = cast("Tensor", norm(heads))
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1) * sin
    return turned + heads * cos


def _split(attention: Any, heads: Tensor) -> Tensor:
    return heads.view(len(heads), -1, attention.head_dim)


def _blocks(rows: Tensor) -> Iterator[slice]:
    size = _BLOCK_ROWS.get(rows.device.type, 16_384)
    return (slice(start, start + size) for start in range(0, len(rows), size))
