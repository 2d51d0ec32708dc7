"""Every private name of `transformers` that is used here, as of 5.19.

tests/reward_actor/test_transformers_internals.py fails when a new version has moved one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel


def attention_of(config: PretrainedConfig) -> str | None:
    """The name of the attention function that the layers of a network look up at each call."""
    name: str | None = config._attn_implementation
    return name


@contextmanager
def attention_is(config: PretrainedConfig, name: str | None) -> Iterator[None]:
    """Let the layers of a network call another attention function while this lasts."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def router_recorders(backbone: PreTrainedModel) -> list[tuple[type[nn.Module], str | None, int]]:
    """Where a mixture of experts gives its routers' logits: (class of a module, name of a layer in
    the module's path or None, place in the module's output)."""
    found: Any = (getattr(backbone, "_can_record_outputs", None) or {}).get("router_logits")
    recorders: list[Any] = found if isinstance(found, list) else [found] if found else []
    # A bare class, whose output is a tuple, or one with a place in it and a layer's name.
    return [
        (getattr(r, "target_class", r), getattr(r, "layer_name", None), getattr(r, "index", 1))
        for r in recorders
    ]


def initialise(network: PreTrainedModel, module: nn.Module) -> None:
    """Fill one module of a network as at its creation: weights drawn anew, buffers computed."""
    network._init_weights(module)


def tied_weights(network: PreTrainedModel) -> set[str]:
    """The names of weights that are another weight's, such as the output embeddings."""
    return set(network._tied_weights_keys or {})
