"""A small random float32 network of the same build as a large one in half precision.

Whether a path is exact does not depend on what the weights are, but half precision hides what is
wrong: its own noise is as large as the state that a recurrent layer carries over from a neighbour.
So a path is judged on a twin: the same class and configuration with few layers, few embeddings and
few experts. Of a dense 8B model that takes 1.8 GB for a moment.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from reward_actor.model.reward_model import RewardModel

_VOCAB_SIZE = 512
_MAX_EXPERTS = 8
_LEAST_LAYERS = 2
# Of a pattern of layers that is longer than this, one layer of each kind stands for all.
_MAX_PATTERN = 8

_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERT_GROUPS = ("n_group", "topk_group")
_NUM_LAYERS = ("num_hidden_layers", "num_layers", "depth")


def twin(model: RewardModel) -> RewardModel:
    """A float32 twin of `model`, in evaluation mode: on its device, or on the CPU where that has no
    room for it.

    Raises whatever a network's own code raises when it is built with a configuration of ours.
    """
    try:
        return _made(model, model.device)
    except torch.OutOfMemoryError:
        return _made(model, torch.device("cpu"))


def _made(model: RewardModel, device: torch.device) -> RewardModel:
    network = model.network
    config = copy.deepcopy(network.config)
    _shrink(config)
    # Not the random numbers of a training; not DeepSpeed's partitioned weights either, which come
    # with `from_pretrained` and `from_config` only.
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.device(device), torch.no_grad():
        torch.manual_seed(0)
        made = type(network)(config).float()
        _draw(made)
    return type(model)(made).eval().requires_grad_(False)


def _shrink(config: PretrainedConfig) -> None:
    text: Any = config.get_text_config()
    layers = _layers(text)
    before = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == before and len(layers) < before:
            setattr(text, name, [value[i] for i in layers])
    text.num_hidden_layers = len(layers)
    for name in _NUM_EXPERTS:
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, min(getattr(text, name), _MAX_EXPERTS))
    for name in _EXPERT_GROUPS:
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, 1)
    per_token = getattr(text, "num_experts_per_tok", None)
    if isinstance(per_token, int):
        text.num_experts_per_tok = min(per_token, _MAX_EXPERTS)
    for holder in {id(c): c for c in (config, text)}.values():
        holder.vocab_size = _VOCAB_SIZE
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if isinstance(getattr(holder, name, None), int):
                setattr(holder, name, 0)
    for other in _other_parts(config, text):
        for name in _NUM_LAYERS:
            if isinstance(getattr(other, name, None), int):
                setattr(other, name, 1)


def _other_parts(config: Any, text: Any) -> Iterator[Any]:
    """The configurations of what is not scored through, such as a vision tower."""
    for value in vars(config).values():
        if value is not text and hasattr(value, "to_dict"):
            yield value


def _layers(text: Any) -> list[int]:
    """Which layers stay: up to the first one after which all kinds of layers have been seen."""
    num_layers = text.num_hidden_layers
    lists = [
        v for v in vars(text).values() if isinstance(v, (list, tuple)) and len(v) == num_layers
    ]
    kinds = [tuple(map(repr, kind)) for kind in zip(*lists, strict=True)] or [()] * num_layers
    firsts = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    length = max(firsts[-1] + 1, _LEAST_LAYERS)
    if length > _MAX_PATTERN:
        return firsts if len(firsts) >= _LEAST_LAYERS else [0, *firsts]
    return list(range(min(length, num_layers)))


def _draw(network: nn.Module) -> None:
    """Weights wide enough for attention that goes wrong to show in the last hidden states."""
    embeddings = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1:
            fan_in = parameter[0].numel() if parameter.dim() == 2 else parameter.shape[-1]
            parameter.normal_(std=1.0 if id(parameter) in embeddings else fan_in**-0.5)
        elif name.endswith("bias"):
            parameter.normal_(std=0.1)


_SOFTMAX_LAYERS = ("full_attention", "sliding_attention", "attention")
_STATEFUL = ("mamba", "rwkv", "recurrent", "deltanet", "linearattention", "lightning", "retention",
             "shortconv", "lstm", "rglru", "ssm")  # fmt: skip


def other_layer(model: RewardModel) -> str | None:
    """A kind of layer that is not causal softmax attention over its whole row, or None.

    It carries something from token to token in another way (a convolution, a recurrent state), or
    counts places in the row, and in a packed row the next token may be another sequence's.
    """
    text = model.network.config.get_text_config()
    for kind in getattr(text, "layer_types", None) or ():
        if kind not in _SOFTMAX_LAYERS:
            return str(kind)
    for module in model.backbone.modules():
        name = type(module).__name__
        is_known = any(word in name.lower() for word in _STATEFUL)
        if is_known or isinstance(module, (nn.Conv1d, nn.RNNBase)):
            return name
    return None
