"""The network at the start of a training: loaded, sharded as it is read, its head made."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import distributed as dist
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from reward_actor.extract import RewardModel, head_name
from trainer.config import TrainConfig


def base_config(path: str) -> PretrainedConfig:
    """The network's configuration: one label, no dropout. Raises ValueError for no such model."""
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.path: {path} cannot be loaded: {error}") from error
    config.num_labels = 1
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in vars(part).items():
            # Dropout would make the loss another function than the reward that is served.
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
    return cast("PretrainedConfig", config)


def build_model(config: TrainConfig, settings: dict[str, Any]) -> RewardModel:
    """The network that is trained, on every worker; under ZeRO 3 each holds only its shard of it.

    `settings` are DeepSpeed's. The head starts from the seed, with a standard deviation of
    1/sqrt(hidden + 1) (Stiennon et al., arXiv:2009.01325), unless the model has a trained one.
    Raises ValueError for a model whose weights are not complete.
    """
    import deepspeed
    from transformers.integrations.deepspeed import (
        set_hf_deepspeed_config,
        unset_hf_deepspeed_config,
    )

    sharded = config.distributed.zero_stage == 3
    sharded_loading = _ShardedLoading(settings)  # transformers only keeps a weak reference
    if sharded:
        set_hf_deepspeed_config(sharded_loading)
    torch.manual_seed(config.training.seed)
    network, report = AutoModelForSequenceClassification.from_pretrained(
        config.model.directory,
        config=base_config(config.model.directory),
        dtype=getattr(torch, config.model.dtype),
        use_safetensors=True,
        output_loading_info=True,
    )
    unset_hf_deepspeed_config()
    if sharded:
        _restore_computed_buffers(network)
    head = getattr(network, head_name(network))
    absent = set(report["missing_keys"])
    ours = {f"{head_name(network)}.{name}" for name, _ in head.named_parameters()}
    if absent - ours:
        raise ValueError(
            f"model.path: {config.model.directory} lacks weights that its config.json asks for, "
            f"such as {min(absent - ours)}"
        )
    if absent & ours:
        generator = torch.Generator().manual_seed(config.training.seed)
        parameters = list(head.parameters())
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=sharded):
            if not sharded or dist.get_rank() == 0:
                std = 1 / math.sqrt(head.in_features + 1)
                first = torch.normal(
                    0.0, std, (head.out_features, head.in_features), generator=generator
                )
                head.weight.data.copy_(first)
                if head.bias is not None:
                    head.bias.data.zero_()
    return RewardModel(network)


def _restore_computed_buffers(network: PreTrainedModel) -> None:
    """Compute the buffers that are not saved (rotary frequencies) again, in float32.

    ZeRO 3's loading rounds every tensor that a network makes for itself to the weights' dtype, and
    a bfloat16 frequency turns late positions by a wrong angle.
    """
    for module in network.modules():
        own = dict(module.named_buffers(recurse=False))
        computed = [name for name in own if name in module._non_persistent_buffers_set]
        if computed and not list(module.parameters(recurse=False)):
            for name in computed:
                if own[name].is_floating_point():
                    module.register_buffer(name, own[name].float(), persistent=False)
            network._init_weights(module)


class _ShardedLoading:
    """What `from_pretrained` asks, while this lives, to shard each weight as it is read.

    In place of `transformers.integrations.HfDeepSpeedConfig`, which is the same for this purpose
    but needs `accelerate`.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def is_zero3(self) -> bool:
        return True
