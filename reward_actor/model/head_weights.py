"""A reward model's head made of its trained weights, as `reward_actor.model.heads` has found it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from reward_actor.model.heads import Head, language_head
from reward_actor.model.reward_model import ACTIVATIONS, Float32Head, Float32Layers, float32_head


def head_of(
    weights: Mapping[str, Tensor], head: Head, dtype: torch.dtype
) -> Float32Head | Float32Layers:
    """A head with its trained weights.

    In the body's dtype if it is one product without a bias, and stored no wider than the body; else
    as it is stored: it computes in float32 anyway.
    """
    if head.rows:
        return float32_head(_of_rows(weights, head.rows))
    layers = [_linear(weights, layer) for layer in head.layers]
    if len(layers) > 1:
        activation = ACTIVATIONS[head.activation or ""]
        between = [part for layer in layers for part in (layer, activation())][:-1]
        return float32_head(nn.Sequential(*between))
    [layer] = layers
    name = f"{head.layers[0]}.weight"
    is_narrow = any(
        w.dtype in (torch.bfloat16, torch.float16) for n, w in weights.items() if n != name
    )
    if not (is_narrow and layer.weight.dtype == torch.float32):
        layer.weight.data = layer.weight.data.to(dtype)
    if layer.bias is not None:
        layer.bias.data = layer.bias.data.float()
    return float32_head(layer)


def _linear(weights: Mapping[str, Tensor], name: str) -> nn.Linear:
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


def _of_rows(weights: Mapping[str, Tensor], rows: Sequence[int]) -> nn.Linear:
    """The logit of a token of the language model's head, or one less another, in float32."""
    name = language_head(weights)
    assert name is not None
    of_tokens = [weights[name][row].float().clone() for row in rows]
    bias = weights.get(f"{name.removesuffix('.weight')}.bias")
    found = {"head.weight": _less(of_tokens)[None]}
    if bias is not None:
        found["head.bias"] = _less([bias[row].float() for row in rows])[None]
    return _linear(found, "head")


def _less(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else values[0] - values[1]


def activation_of(head: nn.Module) -> str | None:
    """The one activation of a head's layers, or None."""
    inner = list(head.modules())
    if any(isinstance(module, nn.GELU) and module.approximate != "none" for module in inner):
        return None
    names = [name for name, kind in ACTIVATIONS.items() if any(type(m) is kind for m in inner)]
    return names[0] if len(names) == 1 else None
