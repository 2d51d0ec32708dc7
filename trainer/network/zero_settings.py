"""DeepSpeed's settings, made from ours, and checked before any worker starts."""

from __future__ import annotations

import contextlib
import difflib
import io
from collections.abc import KeysView, Mapping
from typing import Any

import torch

from trainer.config.train import TrainConfig


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's settings. It does not divide a loss by anything but the number of workers.

    `distributed.deepspeed` is merged over them. Raises ValueError if that changes what the loop
    itself decides.
    """
    optimizer, distributed = config.optimizer, config.distributed
    zero: dict[str, Any] = {
        "stage": distributed.zero_stage,
        # Elements, not bytes; DeepSpeed's default of 5e8 reserves gigabytes for any model.
        "reduce_bucket_size": 50_000_000,
    }
    if optimizer.name == "muon":
        zero["reduce_scatter"] = False  # it is updated by whole matrices
    if distributed.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if distributed.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if distributed.zeropp_quantized_weights:
        zero["zero_quantized_weights"] = True
    if distributed.zeropp_quantized_gradients:
        zero["zero_quantized_gradients"] = True
    if distributed.zeropp_partition_size > 1:
        zero["zero_hpz_partition_size"] = distributed.zeropp_partition_size
    settings = {
        # The loop makes the passes, says which is the last of a step, and scales the loss itself.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.max_grad_norm,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        # Gradients of a step's forward passes add up in float32; without ZeRO DeepSpeed adds them
        # in the weights' dtype and takes no other.
        "data_types": {"grad_accum_dtype": "fp32" if distributed.zero_stage else None},
        "zero_optimization": zero,
        # torch's own AdamW in the loop's process; DeepSpeed's would be compiled on first use.
        "zero_force_ds_cpu_optimizer": False,
        # bitsandbytes' AdamW works element by element, or by block, so it can be cut up.
        "zero_allow_untested_optimizer": optimizer.name == "adamw_8bit",
        "steps_per_print": 2**31,
    }
    _refuse_ours(distributed.deepspeed)
    return _merged(settings, distributed.deepspeed)


# DeepSpeed's keys that another setting decides, or the loop itself (None).
_OURS = {
    "train_batch_size": "training.global_batch_pairs",
    "train_micro_batch_size_per_gpu": "training.micro_batch_tokens",
    "gradient_accumulation_steps": "training.micro_batch_tokens",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer.name",
    "scheduler": "optimizer.schedule",
    "bf16": "model.dtype",
    "bfloat16": "model.dtype",
    "fp16": "model.dtype",
    "amp": "model.dtype",
    "torch_autocast": "model.dtype",
    **dict.fromkeys(
        (
            "data_types",
            "checkpoint",
            "elasticity",
            "managed_gradient_accumulation",
            "gradient_allreduce_op",
            "disable_allgather",
            "curriculum_learning",
            "data_efficiency",
            "progressive_layer_drop",
            "compression_training",
            "quantize_training",
            "pipeline",
            "tensor_parallel",
            "expert_parallel",
            "hybrid_engine",
        )
    ),
    "zero_optimization.stage": "distributed.zero_stage",
    "zero_optimization.zero_quantized_weights": "distributed.zeropp_quantized_weights",
    "zero_optimization.zero_quantized_gradients": "distributed.zeropp_quantized_gradients",
    "zero_optimization.zero_hpz_partition_size": "distributed.zeropp_partition_size",
}


def _refuse_ours(raw: Mapping[str, Any]) -> None:
    zero = raw.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise ValueError(f"distributed.deepspeed.zero_optimization is {zero!r}, not a section")
    for key in sorted({*raw, *(f"zero_optimization.{name}" for name in zero)} & _OURS.keys()):
        ours = _OURS[key]
        raise ValueError(
            f"distributed.deepspeed.{key} is decided by {ours or 'the training loop'}"
            + (": set that instead" if ours else "")
        )


def check_settings(config: TrainConfig) -> None:
    """Raises ValueError for what DeepSpeed would refuse, or not know, of the settings; no worker
    is needed for that."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    seen = _Watched(deepspeed_config(config))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            DeepSpeedConfig(seen)
    except (DeepSpeedConfigError, ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"distributed.deepspeed: {error}") from None
    unknown = sorted(config.distributed.deepspeed.keys() - seen.asked)
    if unknown:
        near = difflib.get_close_matches(unknown[0], sorted(seen.asked), n=1)
        raise ValueError(
            f"distributed.deepspeed.{unknown[0]}: DeepSpeed has no such setting"
            + (f"; did you mean {near[0]}?" if near else "")
        )


class _Watched(dict[str, Any]):
    """Knows which keys it was asked for: DeepSpeed passes over one that it does not know."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return KeysView(self)  # asks this class what it contains


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(under[key], value)
        if isinstance(value, Mapping) and isinstance(under.get(key), Mapping)
        else value
        for key, value in over.items()
    }
    return {**under, **both}
