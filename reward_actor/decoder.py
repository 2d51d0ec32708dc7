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

    def __init__(self, backbone: nn.Module) -> None:
        """Raises ValueError for a backbone of another build."""
        self.backbone = cast("Any", backbone)
        children = {name for name, _ in backbone.named_children()}
        if not {"embed_tokens", "layers", "norm", "rotary_emb"} >= children:
            raise ValueError(f"{type(backbone).__name__} is not built like Llama")
        for layer in self.backbone.layers:
            self._check(layer)

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
        rows = torch.from_numpy(pooled.query_rows).to(hidden.device)
        kept = hidden[rows]
        self._layer(self.backbone.layers[-1], hidden, rotary, pooled, kept, rows)
        return cast("Tensor", self.backbone.norm(kept))

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
        self,
        layer: Any,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        plan: AttentionPlan,
        kept: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> None:
        """Update `hidden` (N, H) in place; given `kept` (M, H), its `rows`, update only `kept`."""
        attention = layer.self_attn
        cos, sin = rotary
        width = attention.head_dim
        num_rows = len(hidden)
        query: Tensor | None = None
        if kept is None:
            query = hidden.new_empty(num_rows, attention.q_proj.out_features // width, width)
        key = hidden.new_empty(num_rows, attention.k_proj.out_features // width, width)
        value = torch.empty_like(key)
        for block in _blocks(hidden):
            normed = layer.input_layernorm(hidden[block])
            turn = cos[block], sin[block]
            if query is not None:
                query[block] = _heads(attention, "q", normed, turn)
            key[block] = _heads(attention, "k", normed, turn)
            value[block] = attention.v_proj(normed).view(-1, key.shape[1], width)
        if query is None:
            query = _heads(attention, "q", layer.input_layernorm(kept), (cos[rows], sin[rows]))
        # Mistral and Mixtral slide in every layer; the others say it of each.
        window = getattr(
            attention, "sliding_window", getattr(attention.config, "sliding_window", None)
        )
        seen = attend(query, key, value, plan, attention.scaling, window).flatten(1)
        del query, key, value
        target = hidden if kept is None else kept
        for block in _blocks(target):
            row = target[block]
            row += attention.o_proj(seen[block])
            row += layer.mlp(layer.post_attention_layernorm(row)[None])[0]


def _blocks(rows: Tensor) -> Iterator[slice]:
    size = _BLOCK_ROWS.get(rows.device.type, 16_384)
    return (slice(start, start + size) for start in range(0, len(rows), size))


def _heads(attention: Any, name: str, normed: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """(n, H) -> (n, heads, D): queries or keys, turned by their positions (Su et al., RoFormer,
    arXiv:2104.09864, in the half-split layout that these networks share)."""
    heads = getattr(attention, f"{name}_proj")(normed).view(len(normed), -1, attention.head_dim)
    norm = getattr(attention, f"{name}_norm", None)
    if norm is not None:
        heads = norm(heads)
    cos, sin = turn
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1) * sin
    return cast("Tensor", turned + heads * cos)
