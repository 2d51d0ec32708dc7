"""Low-rank adapters (Hu et al., LoRA, arXiv:2106.09685) through PEFT: put in, and merged out.

Shapes: a layer (out, in) has A (rank, in) and B (out, rank); it computes W + alpha / rank * B A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reward_actor.model.heads import HEADS
from reward_actor.model.reward_model import head_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trainer.config.train import AdapterConfig, TrainConfig

_BLOCK = 64
"""Weights that share a scale, bitsandbytes' default."""

_ADAPTER = "reward"


def quantization(config: AdapterConfig, dtype: str) -> dict[str, Any]:
    """The arguments of `from_pretrained` that quantise a network's linear layers, but its head, and
    compute in `dtype`.

    NormalFloat of 4 bits with quantised scales (Dettmers et al., QLoRA, arXiv:2305.14314).
    """
    if config.quantize != "4bit":
        return {}
    from transformers import BitsAndBytesConfig

    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
            llm_int8_skip_modules=list(HEADS),
        )
    }


def check_adapter(config: AdapterConfig) -> None:
    """Raises ValueError for a package that adapters or quantised weights need and is missing."""
    needed = ["peft"] if config.rank else []
    needed += ["bitsandbytes", "accelerate"] if config.quantize == "4bit" else []
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ValueError(f"adapter needs {missing[0]}: pip install {' '.join(missing)}")


def insert(network: PreTrainedModel, config: AdapterConfig, seed: int) -> None:
    """Put adapters into the linear layers that `config.targets` name; only they and the head are
    trained then.

    A starts from the seed, the same under any sharding; B is zero. Raises ValueError for a target
    that names no linear layer of the body.
    """
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT only divides it by the rank
        target_modules=_target_names(network, config.targets),
        lora_dropout=0.0,
    )
    # PEFT draws on the CPU, in float32, layer by layer, whatever holds the layer's own weight.
    torch.manual_seed(seed)
    inject_adapter_in_model(settings, network, adapter_name=_ADAPTER)
    getattr(network, head_name(network)).requires_grad_(True)
    _keep_quantised_weights(network)
    # A gradient that reaches the embeddings shows which samples make it overflow (TrainedModel).
    network.enable_input_require_grads()


def _keep_quantised_weights(network: nn.Module) -> None:
    """Evaluate with the numbers that are trained with, on every processor.

    On one with AVX-512 for bfloat16, bitsandbytes packs 4-bit weights anew for evaluation: their
    scales and products are bfloat16 then, whatever was asked for. And there it reads weights wrong
    whose rows are no whole blocks (bitsandbytes 0.50, `Linear4bit.forward`, `dequantize_4bit`).
    Raises ValueError for such a layer.
    """
    for name, module in network.named_modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            if module.in_features % _BLOCK:
                raise ValueError(
                    f"adapter.quantize: {name} has {module.in_features} inputs; on this processor "
                    f"bitsandbytes needs a multiple of {_BLOCK}"
                )
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _target_names(network: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    body = f"{network.base_model_prefix}."
    layers = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(body)
    ]
    found: list[str] = []
    for target in targets:
        matching = [
            name
            for name in layers
            if target == "all-linear" or name == target or name.endswith(f".{target}")
        ]
        if not matching:
            kinds = sorted({name.rpartition(".")[2] for name in layers})
            raise ValueError(
                f"adapter.targets: {target!r} is no linear layer of the body; there are "
                f"all-linear, {', '.join(kinds)}"
            )
        found += matching
    return list(dict.fromkeys(found))


def unquantised(network: nn.Module) -> dict[str, Tensor]:
    """The quantised weights by name, on the CPU, as the numbers that they stand for."""
    if getattr(network, "quantization_method", None) is None:
        return {}
    from peft.utils.integrations import dequantize_module_weight

    return {
        f"{name}.weight": dequantize_module_weight(module).detach().cpu()
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and not module.weight.is_floating_point()
    }


def exported(weights: Mapping[str, Tensor], config: TrainConfig) -> dict[str, Tensor]:
    """The whole weights as one plain network with one head, by its own names.

    Adapters are merged in float32 and several heads folded by their weights: the same reward, but
    for the rounding of the sums to `model.dtype`.
    """
    merged = _merged(weights, config.adapter, getattr(torch, config.model.dtype))
    attribute_weights = list(config.loss.attributes.values())
    if attribute_weights:
        for name in HEADS:
            for key in (f"{name}.weight", f"{name}.bias"):
                if key in merged:
                    rows = merged[key].float()
                    folded = torch.tensor(attribute_weights).to(rows) @ rows
                    merged[key] = folded.view(1, *rows.shape[1:]).to(merged[key].dtype)
    return merged


def _merged(
    weights: Mapping[str, Tensor], config: AdapterConfig, dtype: torch.dtype
) -> dict[str, Tensor]:
    merged = {}
    for name, weight in weights.items():
        layer, _, own = name.rpartition(".base_layer.")
        if layer and own == "weight":
            down = weights[f"{layer}.lora_A.{_ADAPTER}.weight"].float()
            up = weights[f"{layer}.lora_B.{_ADAPTER}.weight"].float()
            scale = config.alpha / config.rank
            whole = weight.float() + scale * (up @ down)
            merged[f"{layer}.weight"] = whole.to(dtype)
        elif layer:
            merged[f"{layer}.{own}"] = weight
        elif ".lora_" not in name:
            merged[name] = weight
    return merged
