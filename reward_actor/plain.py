"""`transformers`' own sequence classifiers, filled with weights that come under other names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)

from reward_actor.extract import Float32Head
from reward_actor.headers import HEADS, CheckpointError

# What a network may leave unread: the language model's head, and tables that older versions of
# `transformers` saved although they are computed.
_UNUSED = re.compile(
    r"(^|\.)(lm_head|embed_out)\.|rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$"
)


def network_of(
    weights: Mapping[str, Tensor],
    config: PretrainedConfig,
    head: str,
    dtype: torch.dtype,
    source: str,
    body_prefix: str = "",
) -> PreTrainedModel:
    """`transformers`' sequence classifier for `config`, filled with weights under other names.

    `head` is the head's name in the weights, `body_prefix` what stands before the body's names.
    Raises CheckpointError, naming `source`, unless every weight finds its place.
    """
    prefix = plain_class(config).base_model_prefix + "."
    inside = any(name.startswith(body_prefix + prefix) for name in weights)
    new_head = plain_head(config)
    renamed: dict[str, Tensor] = {}
    bias = None
    for name, tensor in weights.items():
        if name == f"{head}.weight":
            renamed[f"{new_head}.weight"] = tensor
        elif name == f"{head}.bias":
            bias = tensor
        elif body_prefix and not name.startswith(body_prefix):
            renamed[name] = tensor  # reported as unexpected
        else:
            name = name.removeprefix(body_prefix)
            renamed[name if inside else prefix + name] = tensor
    network, report = plain_class(config).from_pretrained(
        None, config=config, state_dict=renamed, dtype=dtype, output_loading_info=True
    )
    check_complete(report, source)
    if bias is not None:  # whole, also beside a bfloat16 body: a conversion moves it elsewhere
        layer = Float32Head.of(getattr(network, new_head))
        layer.bias = nn.Parameter(bias.float())
        setattr(network, new_head, layer)
    return cast("PreTrainedModel", network)


def from_directory(
    directory: Path, config: PretrainedConfig, dtype: torch.dtype, head_elsewhere: bool = False
) -> PreTrainedModel:
    """The sequence classifier in a directory, which lacks a trained head if `head_elsewhere`.

    Raises CheckpointError unless every weight finds its place.
    """
    network, report = plain_class(config).from_pretrained(  # never a class of the directory's own
        directory, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    if head_elsewhere:
        head = plain_head(config) + "."
        report["missing_keys"] = {k for k in report["missing_keys"] if not k.startswith(head)}
    check_complete(report, str(directory))
    return cast("PreTrainedModel", network)


def check_complete(report: Mapping[str, Any], source: str) -> None:
    """Raise CheckpointError if `from_pretrained` reports weights missing or left over."""
    absent = sorted(report["missing_keys"]) + sorted(str(k) for k in report["mismatched_keys"])
    if absent:
        raise CheckpointError(
            f"{source} does not hold the weights of its own config.json: {absent[0]} "
            f"({len(absent)} in all) is missing or has another shape"
        )
    unread = sorted(name for name in report["unexpected_keys"] if not _UNUSED.search(name))
    if unread:
        raise CheckpointError(
            f"{source} holds weights that its config.json knows nothing of: {unread[0]} "
            f"({len(unread)} in all). Scoring without them would give other rewards"
        )


def is_plain(network: PreTrainedModel) -> bool:
    """Whether `transformers` alone can load the network."""
    return type(network).__module__.startswith("transformers.models.")


def plain_class(config: PretrainedConfig) -> Any:
    """The class of `transformers` for a configuration. Raises CheckpointError where it has none."""
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise CheckpointError(
            f"transformers has no sequence classifier for model_type {config.model_type!r}"
        )
    return MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]


def plain_head(config: PretrainedConfig) -> str:
    """The head's name in the plain class, which is built without weights to tell."""
    with torch.device("meta"):
        network = plain_class(config)(config)
    return next(name for name in HEADS if isinstance(getattr(network, name, None), nn.Module))
