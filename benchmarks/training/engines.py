"""A network with its optimizer, for peers to take turns on: under DeepSpeed, or plain torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reward_actor.model.reward_model import RewardModel
from trainer.network.packed import TrainedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# So small that the weights stay as they are, and the losses comparable: Adam moves every
# one of 79 million by as much, in the direction in which the loss changes most.
_LEARNING_RATE = 1e-12
_MAX_GRAD_NORM = 1.0
_LORA_ALPHA = 32.0  # the trainer's own default
ZERO_STAGE = 2


@dataclass(frozen=True)
class Engine:
    """root: TrainedModel, or DeepSpeed's engine around it. backward: of a micro-batch's loss, and
    whether it is the step's last. step: updates the weights, gives the gradient's norm."""

    root: nn.Module
    module: TrainedModel
    backward: Callable[[Tensor, bool], None]
    step: Callable[[], float]
    close: Callable[[], None]

    def __call__(self, batches: Sequence[Any], *, hidden: bool = False) -> Tensor:
        return cast("Tensor", self.root(batches, hidden=hidden))

    @property
    def device(self) -> torch.device:
        return self.module.model.device

    def flops_per_token(self) -> int:
        """Of the products with the matrices of the decoder layers, forward and backward.

        6 for each entry that is trained: 2 forward, 2 for the gradient of the input, 2 for that of
        the matrix; 4 for one that is frozen. Attention, embeddings and the head are not counted.
        """
        matrices = [
            parameter
            for name, parameter in self.module.model.backbone.named_parameters()
            if name.startswith("layers.") and parameter.dim() == 2
        ]
        return sum((6 if matrix.requires_grad else 4) * matrix.numel() for matrix in matrices)


def torch_engine(network: PreTrainedModel, lora_rank: int) -> Engine:
    """torch's AdamW on weights, gradients and state of the network's own dtype."""
    network.train().requires_grad_(True)
    if lora_rank:
        _insert_adapters(network, lora_rank)
    module = TrainedModel(RewardModel(network))
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, _LEARNING_RATE, weight_decay=0.0, fused=True)

    def backward(loss: Tensor, is_last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step() -> float:
        norm = nn.utils.clip_grad_norm_(trained, _MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return float(norm)

    return Engine(module, module, backward, step, close=lambda: None)


class _LowRank(nn.Module):
    """x (..., in) -> x W^T + alpha / rank x A^T B^T, with W as it is (LoRA, arXiv:2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        drawn = torch.randn(rank, base.in_features) * base.in_features**-0.5
        self.down = nn.Parameter(drawn.to(base.weight))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank).to(base.weight))
        self.scale = _LORA_ALPHA / rank

    def forward(self, x: Tensor) -> Tensor:
        below: Tensor = self.base(x)
        return below + F.linear(F.linear(x, self.down), self.up) * self.scale


def _insert_adapters(network: PreTrainedModel, rank: int) -> None:
    """Train adapters of all linear layers and the head only. Without PEFT: nothing to install."""
    torch.manual_seed(0)
    backbone = getattr(network, network.base_model_prefix)
    backbone.requires_grad_(False)
    for name, layer in list(backbone.named_modules()):
        if isinstance(layer, nn.Linear):
            backbone.set_submodule(name, _LowRank(layer, rank))
    network.enable_input_require_grads()  # as the trainer does


def deepspeed_engine(
    network: PreTrainedModel, micro_batch_tokens: int, lora_rank: int, scratch: Path
) -> Engine:
    """The trainer's own engine on one worker, without Ray; it loads the network from `scratch`,
    which must be an absolute path to an empty directory.

    Raises ValueError for what the trainer refuses.
    """
    from torch import distributed as dist

    device = network.device.type
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_SIZE": "1",
        "DS_ACCELERATOR": device,
        # DeepSpeed compiles with ninja, which lies beside this Python.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        init_method=(scratch / "rendezvous").as_uri(),
        rank=0,
        world_size=1,
    )
    from trainer.config.config_file import load_config
    from trainer.network import zero

    model_dir = scratch / "model"
    network.save_pretrained(model_dir)
    settings = {
        "model.path": model_dir,
        "model.dtype": str(network.dtype).removeprefix("torch."),
        "adapter.rank": lora_rank,
        "adapter.alpha": _LORA_ALPHA,
        "data.train": "unread",
        "optimizer.learning_rate": _LEARNING_RATE,
        "optimizer.max_grad_norm": _MAX_GRAD_NORM,
        "optimizer.warmup_fraction": 0,
        "optimizer.schedule": "constant",
        "training.micro_batch_tokens": micro_batch_tokens,
        "distributed.zero_stage": ZERO_STAGE,
    }
    config = load_config(None, [(key, str(value)) for key, value in settings.items()])
    engine = zero.initialize(config, num_steps=1)
    num_steps = 0

    def backward(loss: Tensor, is_last: bool) -> None:
        engine.set_gradient_accumulation_boundary(is_last)
        engine.backward(loss, scale_wrt_gas=False)

    def step() -> float:
        nonlocal num_steps
        num_steps += 1
        return zero.step(engine, num_steps - 1)

    def close() -> None:
        zero.release(engine)
        dist.destroy_process_group()

    return Engine(engine, engine.module, backward, step, close)
