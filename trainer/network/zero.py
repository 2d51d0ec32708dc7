"""The network under DeepSpeed: built, sharded by ZeRO 0 to 3, stepped, and gathered whole again.

With `zero_settings`, the only place that knows DeepSpeed.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch import distributed as dist

from trainer import deepspeed_internals
from trainer.config.train import TrainConfig
from trainer.errors import TrainingError
from trainer.network import adapters
from trainer.network.build import build_model
from trainer.network.optimizers import make_optimizer, make_schedule
from trainer.network.zero_settings import deepspeed_config

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def initialize(config: TrainConfig, num_steps: int) -> DeepSpeedEngine:
    """The engine around the network, with optimizer and schedule, on every worker at once."""
    settings = deepspeed_config(config)
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints what it compiles
        with _hidden("mlflow"):  # its autotuner, which is not used, would import it for two seconds
            import deepspeed

        deepspeed_internals.disable_shared_memory_op()
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        deepspeed.init_distributed()
        model = build_model(config, settings)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=make_optimizer(config.optimizer, model),
            config=settings,
            lr_scheduler=lambda optimizer: make_schedule(config.optimizer, optimizer, num_steps),
        )
    if config.distributed.zero_stage == 0 and config.model.dtype == "bfloat16":
        deepspeed_internals.clear_adam_state(engine)
    return engine


@contextlib.contextmanager
def _hidden(package: str) -> Iterator[None]:
    """As if a package that is not imported yet were not installed."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


def step(engine: DeepSpeedEngine, index: int) -> float:
    """Clip, update the weights, advance the learning rate; the gradient's norm before clipping.

    Muon's under ZeRO 1 to 3 is the norm of its updates. Raises TrainingError, with weights and
    optimizer as they were, if the gradient of step `index` (from 0) is not finite: DeepSpeed would
    skip the update in silence, or in float32 without ZeRO write NaN into the weights.
    """
    # Without ZeRO and bfloat16 DeepSpeed clips the gradients itself and keeps no norm of them.
    plain = not engine.zero_optimization() and not engine.bfloat16_enabled()
    norm = None
    if plain:
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not math.isfinite(float(norm)):
            dist.barrier()  # a worker that knows the samples has raised, and is the one to be heard
        _check_norm(float(norm), index)
    if deepspeed_internals.muon_overflows(engine):
        _check_norm(math.inf, index)
    engine.step()
    if norm is None:
        norm = engine.get_global_grad_norm()
    _check_norm(float(norm), index)
    if not engine.was_step_applied():
        raise TrainingError(
            f"step {index + 1}: DeepSpeed skipped an update: the gradient overflowed"
        )
    return float(norm)


def _check_norm(norm: float, index: int) -> None:
    if not math.isfinite(norm):
        raise TrainingError(
            f"step {index + 1}, rank {dist.get_rank()}: the gradient's norm is {norm}; try a lower "
            "optimizer.learning_rate"
        )


def save(engine: DeepSpeedEngine, folder: Path, tag: str) -> None:
    """Write what is trained, the optimizer and the schedule into `folder/tag`, on every worker at
    once; what is frozen comes from `model.path` again."""
    engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=True)


def is_sharded(engine: DeepSpeedEngine) -> bool:
    """Whether each worker saves a part of the state; without ZeRO the first one saves it."""
    return bool(engine.zero_optimization())


def load(engine: DeepSpeedEngine, folder: Path, tag: str, *, universal: bool = False) -> None:
    """Go on from what `save` wrote, or what was made of that in the universal format, on every
    worker at once. By pickle: only from trusted files."""
    quiet = contextlib.redirect_stdout(io.StringIO())  # DeepSpeed prints how it reads
    with quiet, deepspeed_internals.universal_loading(engine, universal):
        loaded, _ = engine.load_checkpoint(str(folder), tag=tag, custom_load_fn=load_trained)
    assert loaded is not None, "DeepSpeed did not find what it has saved"


def load_trained(src: Mapping[str, Tensor], dst: nn.Module) -> None:
    """Put the weights that are trained, and buffers, into a network that has the frozen ones."""
    # Quantised weights are there in parts that belong to no parameter and fit no loaded layer.
    wanted = {name for name, parameter in dst.named_parameters() if parameter.requires_grad}
    assert wanted <= src.keys(), "a checkpoint holds all that is trained"
    wanted |= {name for name, _ in dst.named_buffers()}
    dst.load_state_dict({name: src[name] for name in wanted & src.keys()}, strict=False)


def whole_weights(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """The network's weights by name, whole, on the CPU of rank 0; elsewhere an empty dict.

    Gathered one parameter at a time: no device ever holds the network twice.
    """
    import deepspeed

    network = engine.module.model.network
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
        weights |= adapters.unquantised(network)
    return weights


def release(engine: DeepSpeedEngine) -> None:
    """Give the engine's memory back; nothing of it may be used afterwards."""
    engine.destroy()
    engine.module = engine.optimizer = engine.lr_scheduler = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
