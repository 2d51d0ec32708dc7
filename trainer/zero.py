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
from transformers import get_scheduler

from reward_actor.paths import pad_right
from trainer.config import TrainConfig
from trainer.errors import TrainingError
from trainer.network import build_model

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_SHARED_MEMORY = Path("/dev/shm")


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


def initialize(config: TrainConfig, num_steps: int) -> DeepSpeedEngine:
    """The engine around the network, with optimizer and schedule, on every worker at once."""
    _sweep_shared_memory()
    settings = deepspeed_config(config)
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints what it compiles
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        deepspeed.init_distributed()
        model = build_model(config, settings)
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


def forward(engine: DeepSpeedEngine, rows: Sequence[Sequence[int]]) -> Tensor:
    """B rows of token ids -> (B,) float32 rewards, through the engine's hooks."""
    input_ids, lengths = pad_right(rows)
    return cast("Tensor", engine(input_ids.to(engine.device), lengths.to(engine.device)))


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
