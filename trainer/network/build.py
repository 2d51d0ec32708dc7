"""The network at the start of a training: loaded, sharded as it is read, with a new head."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import distributed as dist
from transformers import (
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from reward_actor.model.heads import HEADS
from reward_actor.model.reward_model import RewardModel, head_name
from reward_actor.model.weights import compute_in_own_dtype
from reward_actor.transformers_internals import attention_is, attention_of, initialise
from trainer.config.train import TrainConfig
from trainer.network import adapters
from trainer.network.base_config import base_config
from trainer.network.packed import TrainedModel

Context = AbstractContextManager[None]


def build_model(config: TrainConfig, settings: dict[str, Any]) -> TrainedModel:
    """The network that is trained, on every worker; under ZeRO 3 each holds only its shard of it.

    `settings` are DeepSpeed's. A head that the model does not bring, and adapters, start from the
    seed. Raises ValueError for a model whose weights are not complete, and if nothing of it is to
    be trained.
    """
    from transformers.integrations.deepspeed import (
        set_hf_deepspeed_config,
        unset_hf_deepspeed_config,
    )

    sharded = settings["zero_optimization"]["stage"] == 3
    sharded_loading = _ShardedLoading(settings)  # transformers only keeps a weak reference
    if sharded:
        set_hf_deepspeed_config(sharded_loading)
    torch.manual_seed(config.training.seed)
    network, report = AutoModelForSequenceClassification.from_pretrained(
        config.model.directory,
        config=base_config(config.model.directory, max(1, len(config.loss.attributes))),
        dtype=getattr(torch, config.model.dtype),
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # a head of another number of outputs; others are told below
        **adapters.quantization(config.adapter, config.model.dtype),
    )
    unset_hf_deepspeed_config()
    compute_in_own_dtype(network)
    if sharded:
        _restore_computed_buffers(network)
    head = getattr(network, head_name(network))
    absent = set(report["missing_keys"]) | {key for key, *_ in report["mismatched_keys"]}
    ours = {f"{head_name(network)}.{name}" for name, _ in head.named_parameters()}
    if absent - ours:
        raise ValueError(
            f"model.path: {config.model.directory} lacks weights that its config.json asks for, "
            f"such as {min(absent - ours)}"
        )
    lost = sorted(key for key in report["unexpected_keys"] if key.split(".")[0] in HEADS)
    if lost:
        raise ValueError(
            f"model.path: {config.model.directory} has a trained head that a training cannot start "
            f"from ({lost[0]}); it starts from one linear layer without a bias, called "
            f"{head_name(network)}: try rayward convert, or remove those weights for a new head"
        )
    if absent & ours:
        std = head_std(config.model.head_init, head.in_features, network.config)
        _start_head(head, std, config.training.seed, sharded)
    if config.adapter.rank:
        adapters.insert(network, config.adapter, config.training.seed)
    _freeze(network, config.model.freeze)
    if config.model.gradient_checkpointing:
        # Reentrant checkpoints would run the first forward without gradients, routers' included.
        contexts = partial(_recomputing, getattr(network, network.base_model_prefix))
        network.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
    network.train()  # or nothing is computed again
    return TrainedModel(RewardModel(network))


def _recomputing(backbone: PreTrainedModel) -> tuple[Context, Context]:
    """Around a layer's first computation, and around the same one again in the backward pass.

    A packed pass sets the attention, and the last layer's forward, only while it lasts.
    """
    attention, forward = attention_of(backbone.config), _last_layer(backbone).get("forward")

    @contextmanager
    def again() -> Iterator[None]:
        layer = _last_layer(backbone)
        before = layer.pop("forward", None)
        layer |= {"forward": forward} if forward else {}
        try:
            with attention_is(backbone.config, attention):
                yield
        finally:
            layer.pop("forward", None)
            layer |= {"forward": before} if before else {}

    return nullcontext(), again()


def _last_layer(backbone: PreTrainedModel) -> dict[str, Any]:
    """Its own attributes; an empty dict where layers are not in a list."""
    layers = getattr(backbone, "layers", None)
    return vars(layers[-1]) if layers else {}


def _start_head(head: torch.nn.Linear, std: float, seed: int, sharded: bool) -> None:
    """Draw the head's weights from the seed, the same under any sharding; its bias is zero."""
    import deepspeed

    generator = torch.Generator().manual_seed(seed)
    with deepspeed.zero.GatheredParameters(
        list(head.parameters()), modifier_rank=0, enabled=sharded
    ):
        if not sharded or dist.get_rank() == 0:
            shape = (head.out_features, head.in_features)
            head.weight.data.copy_(torch.normal(0.0, 1.0, shape, generator=generator) * std)
            if head.bias is not None:
                head.bias.data.zero_()


def head_std(name: str, hidden_size: int, config: PretrainedConfig) -> float:
    """The standard deviation of a new head's weights, by the name of `model.head_init`.

    inverse_sqrt: 1/sqrt(hidden + 1) (Stiennon et al., arXiv:2009.01325, appendix B.1; Open
    Instruct). inverse: 1/(hidden + 1) (OpenRLHF). initializer_range: of the config (TRL).
    """
    if name == "initializer_range":
        return float(getattr(config.get_text_config(), "initializer_range", 0.02))
    return {
        "inverse_sqrt": 1 / math.sqrt(hidden_size + 1),
        "inverse": 1 / (hidden_size + 1),
        "zero": 0.0,
    }[name]


def _freeze(network: PreTrainedModel, patterns: Sequence[str]) -> None:
    """Leave parameters as they are. Raises ValueError for a pattern that matches none of them, and
    if none is left to train."""
    names = [name for name, _ in network.named_parameters()]
    for pattern in patterns:
        matching = [name for name in names if re.search(pattern, name)]
        if not matching:
            raise ValueError(
                f"model.freeze: {pattern!r} matches no parameter; they are named like {names[0]}, "
                f"{names[len(names) // 2]}, {names[-1]}"
            )
        for name in matching:
            network.get_parameter(name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError("model.freeze: every parameter matches; there is nothing left to train")


def _restore_computed_buffers(network: PreTrainedModel) -> None:
    """Compute the buffers that are not saved (rotary frequencies) again, in float32.

    ZeRO 3's loading rounds every tensor that a network makes for itself to the weights' dtype, and
    a bfloat16 frequency turns late positions by a wrong angle.
    """
    for module in network.modules():
        own = dict(module.named_buffers(recurse=False))
        if not own or list(module.parameters(recurse=False)):
            continue
        computed = own.keys() - module.state_dict().keys()
        for name in computed:
            if own[name].is_floating_point():
                module.register_buffer(name, own[name].float(), persistent=False)
        if computed:
            initialise(network, module)


class _ShardedLoading:
    """What `from_pretrained` asks, while this lives, to shard each weight as it is read.

    In place of `transformers.integrations.HfDeepSpeedConfig`, which is the same for this purpose
    but needs `accelerate`.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def is_zero3(self) -> bool:
        return True
