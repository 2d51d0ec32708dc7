"""The network under DeepSpeed: built, sharded by ZeRO 0 to 3, stepped, and gathered whole again.

The only place that knows DeepSpeed. Legend: B sequences, T tokens (padded).
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch import distributed as dist
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    get_scheduler,
)

from reward_actor.extract import RewardModel, head_name
from reward_actor.scorer import pad_right
from trainer.config import TrainConfig

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_SHARED_MEMORY = Path("/dev/shm")


class TrainingError(RuntimeError):
    """The training cannot go on; the message says where it stands and why."""


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's settings. It does not divide a loss by anything but the number of workers."""
    optimizer = config.optimizer
    return {
        "train_micro_batch_size_per_gpu": config.training.micro_batch_pairs,
        # The loop says which backward is the last of a step, and scales the loss itself.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.max_grad_norm,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        # Gradients of a step's forward passes add up in float32; without ZeRO DeepSpeed adds them
        # in the weights' dtype and takes no other.
        "data_types": {"grad_accum_dtype": "fp32" if config.distributed.zero_stage else None},
        "zero_optimization": {
            "stage": config.distributed.zero_stage,
            # Elements, not bytes; DeepSpeed's default of 5e8 reserves gigabytes for any model.
            "reduce_bucket_size": 50_000_000,
        },
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimizer.learning_rate,
                "betas": [optimizer.beta1, optimizer.beta2],
                "eps": optimizer.epsilon,
                "weight_decay": optimizer.weight_decay,
                "torch_adam": True,  # DeepSpeed's own would be compiled on first use
            },
        },
        # Every rank writes into a folder of its own; Ray Train merges them in the storage.
        "checkpoint": {"use_node_local_storage": True},
        "steps_per_print": 2**31,
    }


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


def initialize(config: TrainConfig, num_steps: int) -> DeepSpeedEngine:
    """The engine around a `RewardModel`, on every worker at once. The head's weights start from
    the seed (std 1/sqrt(hidden + 1), Stiennon et al. 2020) unless the model has a trained one."""
    _sweep_shared_memory()
    settings = deepspeed_config(config)
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints what it compiles
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        deepspeed.init_distributed()
        model = _build_model(config, settings)
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=list(model.parameters()),
            config=settings,
            lr_scheduler=lambda optimizer: get_scheduler(
                config.optimizer.schedule,
                optimizer,
                num_warmup_steps=math.ceil(config.optimizer.warmup_fraction * num_steps),
                num_training_steps=num_steps,
                scheduler_specific_kwargs=_schedule_settings(config.optimizer.schedule),
            ),
        )
    if config.distributed.zero_stage == 0 and config.model.dtype == "bfloat16":
        # Here DeepSpeed has made Adam's state by a step with zero gradients, which would count as
        # one in the bias correction.
        engine.optimizer.optimizer.state.clear()
    return engine


def _schedule_settings(schedule: str) -> dict[str, float]:
    return {"min_lr_rate": 0.1} if schedule == "cosine_with_min_lr" else {}


def _build_model(config: TrainConfig, settings: dict[str, Any]) -> RewardModel:
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
        config.model.path,
        config=base_config(config.model.path),
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
            f"model.path: {config.model.path} lacks weights that its config.json asks for, such "
            f"as {min(absent - ours)}"
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


def forward(engine: DeepSpeedEngine, rows: Sequence[Sequence[int]]) -> Tensor:
    """B rows of token ids -> (B,) float32 rewards, through the engine's hooks."""
    input_ids, mask = pad_right(rows)
    return cast("Tensor", engine(input_ids.to(engine.device), mask.to(engine.device)))


def step(engine: DeepSpeedEngine) -> float:
    """Clip, update the weights, advance the learning rate; the gradient's norm before clipping.

    Raises TrainingError if the gradient is not finite: ZeRO 1 and 2 would skip the update in
    silence, the others would write NaN into the weights.
    """
    # Without ZeRO and bfloat16 DeepSpeed clips the gradients itself and keeps no norm of them.
    plain = not engine.zero_optimization() and not engine.bfloat16_enabled()
    norm = None
    if plain:
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        _check_norm(float(norm))
    engine.step()
    if norm is None:
        norm = engine.get_global_grad_norm()
    _check_norm(float(norm))
    if not engine.was_step_applied():
        raise TrainingError("DeepSpeed skipped an update: the gradient overflowed")
    return float(norm)


def _check_norm(norm: float) -> None:
    if not math.isfinite(norm):
        raise TrainingError(f"the gradient's norm is {norm}; try a lower optimizer.learning_rate")


def whole_weights(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """The network's weights by name, whole, on the CPU of rank 0; elsewhere an empty dict.

    Gathered one parameter at a time: no device ever holds the network twice.
    """
    import deepspeed

    network = engine.module.network
    sharded = engine.zero_optimization_partition_weights()
    first = dist.get_rank() == 0
    weights: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=sharded):
            if first:
                weights[name] = parameter.detach().to("cpu", copy=True)
    if first:
        persistent = network.state_dict().keys()
        buffers = dict(network.named_buffers())
        weights |= {name: buffers[name].cpu() for name in buffers.keys() & persistent}
    return weights


def release(engine: DeepSpeedEngine) -> None:
    """Give the engine's memory back; nothing of it may be used afterwards."""
    engine.destroy()
    engine.module = engine.optimizer = engine.lr_scheduler = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _sweep_shared_memory() -> None:
    """Delete what killed workers left in /dev/shm: 66 MiB each, which nobody else deletes."""
    if int(os.environ["LOCAL_RANK"]) == 0 and _SHARED_MEMORY.is_dir():
        left = set(_SHARED_MEMORY.glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*"))
        for maps in Path("/proc").glob("[0-9]*/maps") if left else ():
            with contextlib.suppress(OSError):  # the process ended, or is not ours
                text = maps.read_text()
                left = {path for path in left if str(path) not in text}
        for path in left:
            path.unlink(missing_ok=True)
    dist.barrier()  # no worker makes its own before the sweep is over
