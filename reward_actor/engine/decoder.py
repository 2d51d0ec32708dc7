"""A pre-norm decoder run over a packed forest in blocks of rows, for scoring.

Everything in a decoder but its attention works on each row by itself. So rows pass through in
blocks that stay in the processor's caches, nothing wide is ever held for all of them, and in the
last layer only the rows that are pooled go beyond their keys and values.

Legend: N rows, M pooled rows, H hidden units, Hq query heads, Hkv key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from reward_actor.engine import cpu
from reward_actor.engine.attention import attend
from reward_actor.engine.attention_plan import AttentionPlan

# Rows of a block. On a CPU the widest activation of a block should stay in the last-level cache;
# a GPU needs many rows to be busy, and a bound on the memory of the widest activation.
_BLOCK_ROWS = {"cpu": 1024, "cuda": 16_384}

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
            self._check(layer)

        def maybe_compiled(function: Any) -> Any:
            return torch.compile(function, dynamic=True) if compiled else function

        self._before = maybe_compiled(_before)
        self._queries = maybe_compiled(_queries)
        self._keys_values = maybe_compiled(_keys_values)
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

    @staticmethod
    def _check(layer: nn.Module) -> None:
        parts = {name for name, _ in layer.named_children()}
        attention = cast("nn.Module", layer.self_attn) if "self_attn" in parts else nn.Module()
        inner = {name for name, _ in attention.named_children()}
        projections = [getattr(attention, name, None) for name in _ATTENTION_PARTS]
        is_plain = all(type(projection) is nn.Linear for projection in projections)
        if parts != _LAYER_PARTS or inner - _ATTENTION_NORMS != _ATTENTION_PARTS or not is_plain:
            raise ValueError(f"{type(layer).__name__} is not built like Llama's layer")

    def pooled(
        self, forest: AttentionPlan, pooled: AttentionPlan, token_ids: Tensor, position_ids: Tensor
    ) -> Tensor:
        """(N,) ids and positions -> (M, H): the final hidden states of `pooled`'s query rows."""
        hidden, rotary = self._embed(token_ids, position_ids)
        workspace = _Workspace(self.backbone.layers[0], hidden)
        for layer in self.backbone.layers[:-1]:
            self._layer(layer, hidden, rotary, forest, workspace)
        kept = self._last_layer(hidden, rotary, pooled, workspace)
        return cast("Tensor", self.backbone.norm(kept))

    def all_rows(self, forest: AttentionPlan, token_ids: Tensor, position_ids: Tensor) -> Tensor:
        """(N,) ids and positions -> (N, H) final hidden states."""
        hidden, rotary = self._embed(token_ids, position_ids)
        workspace = _Workspace(self.backbone.layers[0], hidden)
        for layer in self.backbone.layers:
            self._layer(layer, hidden, rotary, forest, workspace)
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
        workspace: _Workspace,
    ) -> None:
        """Update `hidden` (N, H) in place."""
        for block in _blocks(hidden):
            turn = rotary[0][block], rotary[1][block]
            query, key, value = self._before(layer, hidden[block], *turn)
            workspace.query[block], workspace.key[block], workspace.value[block] = query, key, value
        self._attend(layer, hidden, workspace.query, plan, workspace)

    def _last_layer(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        plan: AttentionPlan,
        workspace: _Workspace,
    ) -> Tensor:
        """(N, H) -> (M, H): the rows that `plan` queries, after the last layer."""
        layer = self.backbone.layers[-1]
        rows = torch.from_numpy(plan.query_rows).to(hidden.device)
        kept = hidden[rows]
        for block in _blocks(hidden):
            turn = rotary[0][block], rotary[1][block]
            workspace.key[block], workspace.value[block] = self._keys_values(
                layer, hidden[block], *turn
            )
        query = self._queries(layer, kept, rotary[0][rows], rotary[1][rows])
        self._attend(layer, kept, query, plan, workspace)
        return kept

    def _attend(
        self, layer: Any, hidden: Tensor, query: Tensor, plan: AttentionPlan, workspace: _Workspace
    ) -> None:
        """Update the queries' rows `hidden` in place: attention, then the feed-forward."""
        attention = layer.self_attn
        window, scale = _window(attention), attention.scaling
        seen = attend(query, workspace.key, workspace.value, plan, scale, window).flatten(1)
        for block in _blocks(hidden):
            if self.is_compiled:
                hidden[block] = self._after(layer, hidden[block], seen[block])
            else:
                _after_in_place(layer, hidden[block], seen[block], workspace)


@contextmanager
def last_layer_pooled(backbone: nn.Module, pooled: AttentionPlan) -> Iterator[bool]:
    """While this lasts, the last layer of `transformers`' own forward, (1, N, H), computes and
    returns only the rows that `pooled` queries, (1, M, H), with their gradients.

    Gives whether it does: only where it is built like Llama's, with a plain feed-forward (a mixture
    of experts counts the routes of every row).
    """
    try:
        layer = cast("Any", backbone).layers[-1]
        Decoder._check(layer)  # noqa: SLF001
    except (AttributeError, TypeError, ValueError):
        yield False
        return
    if not _is_gated(layer.mlp):
        yield False
        return

    def forward(
        hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], **others: Any
    ) -> Tensor:
        hidden, rotary = hidden_states[0], [turn[0, :, None] for turn in position_embeddings]
        rows = torch.from_numpy(pooled.query_rows).to(hidden.device)
        kept = hidden[rows]
        key, value = _keys_values(layer, hidden, rotary[0], rotary[1])
        query = _queries(layer, kept, rotary[0][rows], rotary[1][rows])
        seen = attend(query, key, value, pooled, layer.self_attn.scaling, _window(layer.self_attn))
        return _after(layer, kept, seen.flatten(1))[None]

    layer.forward = forward
    try:
        yield True
    finally:
        del layer.forward


def _window(attention: Any) -> int | None:
    if attention.config.model_type in _SLIDING_EVERYWHERE:
        return cast("int | None", attention.config.sliding_window)
    return getattr(attention, "sliding_window", None)


class _Workspace:
    """Memory that every layer uses again. Fresh memory for each would cost a CPU a tenth of its
    time: the system clears every page that it hands out.

    query (N, Hq, D), key and value (N, Hkv, D) of all rows; wide: a gated feed-forward's two
    activations of one block of rows.
    """

    def __init__(self, layer: Any, hidden: Tensor) -> None:
        attention = layer.self_attn
        self.query, self.key, self.value = (
            hidden.new_empty(
                len(hidden), projection.out_features // attention.head_dim, attention.head_dim
            )
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        self._hidden = hidden
        self._wide: tuple[Tensor, Tensor] | None = None

    def wide(self, num_rows: int, width: int) -> tuple[Tensor, Tensor]:
        if self._wide is None:
            most = max(
                min(block.stop, len(self._hidden)) - block.start for block in _blocks(self._hidden)
            )
            first, second = (self._hidden.new_empty(most, width) for _ in range(2))
            self._wide = first, second
        return self._wide[0][:num_rows], self._wide[1][:num_rows]


# ---- what happens to each row by itself: (n, H) hidden states, cos and sin (n, 1, D)


def _before(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The queries, keys and values of a block of rows."""
    normed = _normed(layer.input_layernorm, hidden)
    attention = layer.self_attn
    query = apply_rotary(attention, _product(normed, attention.q_proj), "q_norm", cos, sin)
    key = apply_rotary(attention, _product(normed, attention.k_proj), "k_norm", cos, sin)
    return query, key, _split(attention, _product(normed, attention.v_proj))


def _queries(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    attention = layer.self_attn
    query = _product(_normed(layer.input_layernorm, hidden), attention.q_proj)
    return apply_rotary(attention, query, "q_norm", cos, sin)


def _keys_values(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    normed = _normed(layer.input_layernorm, hidden)
    attention = layer.self_attn
    key = apply_rotary(attention, _product(normed, attention.k_proj), "k_norm", cos, sin)
    return key, _split(attention, _product(normed, attention.v_proj))


def _after(layer: Any, hidden: Tensor, seen: Tensor) -> Tensor:
    """The rows after the layer, from what their attention has seen (n, Hq * D)."""
    hidden = hidden + layer.self_attn.o_proj(seen)
    return cast("Tensor", hidden + layer.mlp(layer.post_attention_layernorm(hidden)[None])[0])


def _after_in_place(layer: Any, hidden: Tensor, seen: Tensor, workspace: _Workspace) -> None:
    """`_after` into `hidden`, without fresh memory where the feed-forward is a plain gated one."""
    _add_product(hidden, seen, layer.self_attn.o_proj)
    normed = _normed(layer.post_attention_layernorm, hidden)
    mlp = layer.mlp
    if not _is_gated(mlp):
        hidden += mlp(normed[None])[0]
        return
    if cpu.is_better(hidden, mlp.gate_proj):
        gate = cpu.product(normed, mlp.gate_proj, then="swish")
        _add_product(hidden, cpu.product_times(normed, mlp.up_proj, gate), mlp.down_proj)
        return
    gate, up = workspace.wide(len(hidden), mlp.gate_proj.out_features)
    torch.mm(normed, mlp.gate_proj.weight.t(), out=gate)
    torch.mm(normed, mlp.up_proj.weight.t(), out=up)
    nn.functional.silu(gate, inplace=True).mul_(up)
    _add_product(hidden, gate, mlp.down_proj)


def _normed(norm: Any, rows: Tensor) -> Tensor:
    """norm(rows); in half precision on a CPU torch's own is up to ten times as fast as the
    module's, which makes three copies in float32."""
    is_half_on_cpu = rows.device.type == "cpu" and rows.dtype != torch.float32
    if is_half_on_cpu and _is_plain(norm.__class__) and not torch.is_grad_enabled():
        return nn.functional.rms_norm(rows, norm.weight.shape, norm.weight, norm.variance_epsilon)
    return cast("Tensor", norm(rows))


@lru_cache
def _is_plain(norm_type: Any) -> bool:
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


def _product(rows: Tensor, projection: nn.Linear) -> Tensor:
    """projection(rows)"""
    if cpu.is_better(rows, projection):
        return cpu.product(rows, projection)
    return cast("Tensor", projection(rows))


def _add_product(hidden: Tensor, rows: Tensor, projection: nn.Linear) -> None:
    """hidden += projection(rows), in one pass."""
    if cpu.is_better(rows, projection):
        hidden.copy_(cpu.product_plus(rows, projection, hidden))
        return
    hidden.addmm_(rows, projection.weight.t())
    if projection.bias is not None:
        hidden += projection.bias


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


def apply_rotary(attention: Any, heads: Tensor, norm_name: str, cos: Tensor, sin: Tensor) -> Tensor:
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
