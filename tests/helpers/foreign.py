"""Reward models as other systems save them, made on the fly, each with its own system's formula.

Every maker writes a directory and returns what that system says of one row of token ids. The
formulas work on the body's hidden states and on padded batches, as their systems do, and share no
code with ours.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from families import make_network
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Score = Callable[[list[int]], float]

ROWS = [[5, 9, 33, 7], [40, 6, 8, 21, 90, 11, 13], [250], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]]
PAD = 0

REMOTE_CODE = """
import torch
from torch import nn
from transformers import {base}Model, {base}PreTrainedModel


class {base}RewardModel({base}PreTrainedModel):
    base_model_prefix = "{prefix}"

    def __init__(self, config):
        super().__init__(config)
        self.{prefix} = {base}Model(config)
        self.value_head = {head}
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        hidden = self.{prefix}(input_ids, attention_mask=attention_mask)[0]
        values = self.value_head(hidden).squeeze(-1)
        last = attention_mask.cumsum(dim=1).argmax(dim=1, keepdim=True)
        return values.gather(1, last)
"""


def hidden_states(network: PreTrainedModel, ids: Tensor, mask: Tensor, **more: Tensor) -> Tensor:
    body = getattr(network, network.base_model_prefix)
    with torch.inference_mode():
        return body(input_ids=ids, attention_mask=mask, use_cache=False, **more)[0]


def write_config(directory: Path, network: PreTrainedModel, **changes: Any) -> None:
    """config.json as a system that knows no labels writes it; None removes a key."""
    config = network.config.to_dict()
    for key in ("id2label", "label2id", "num_labels", "problem_type"):
        config.pop(key, None)
    config |= {"dtype": "float32", **changes}
    text = json.dumps({key: value for key, value in config.items() if value is not None})
    (directory / "config.json").write_text(text)


def write_weights(directory: Path, network: PreTrainedModel, head: str) -> None:
    weights = {
        key.replace("score.", f"{head}.") if key.startswith("score.") else key: weight.contiguous()
        for key, weight in network.state_dict().items()
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def openrlhf(
    directory: Path,
    family: str = "llama",
    head: str = "value_head",
    normalisation: tuple[float, float] | None = (-0.577, 1.7),
    **settings: Any,
) -> Score:
    """openrlhf/models/model.py: left padding, last real token by mask, (r - mean) / std."""
    directory.mkdir()
    network = make_network(family)
    write_weights(directory, network, head)
    saved: dict[str, Any] = {"value_head_prefix": head, "normalize_reward": True, **settings}
    if normalisation is not None:
        saved |= {"mean": normalisation[0], "std": normalisation[1]}
    write_config(directory, network, **saved)
    mean, std = normalisation or (0.0, 1.0)

    def score(row: list[int]) -> float:
        longest = max(len(row), 12)
        ids = torch.tensor([[PAD] * (longest - len(row)) + row])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row)])
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
        hidden = hidden_states(network, ids, mask, position_ids=positions)
        values = (hidden @ network.score.weight[0].detach()).squeeze(-1)
        last = mask.size(1) - 1 - mask.fliplr().argmax(dim=1, keepdim=True)
        return (values.gather(1, last).item() - mean) / std

    return score


def deepspeed_chat(
    directory: Path, family: str = "opt", body: str = "rwtranrsformer", **extra: Any
) -> Score:
    """dschat/utils/model/reward_model.py: the value before the first pad, which is EOS; for OPT
    before the second, since its tokenizer begins with one."""
    directory.mkdir()
    network = make_network(family)
    inner = getattr(network, network.base_model_prefix)
    weights = {f"{body}.{key}": weight for key, weight in inner.state_dict().items()}
    weights["v_head.weight"] = network.score.weight.data
    torch.save({**weights, **extra}, directory / "pytorch_model.bin")
    eos = int(network.config.eos_token_id)
    write_config(
        directory, network, architectures=None, pad_token_id=eos, end_token_id=eos,
    )  # fmt: skip
    num_padding_at_beginning = int(family == "opt")

    def score(row: list[int]) -> float:
        padded = row + [eos] * (20 - len(row))
        mask = [1] * len(row) + [0] * (20 - len(row))
        hidden = hidden_states(network, torch.tensor([padded]), torch.tensor([mask]))
        rewards = (hidden[0] @ network.score.weight[0].detach()).tolist()
        ends = [index for index, token in enumerate(padded) if token == eos]
        return rewards[ends[num_padding_at_beginning] - 1]

    return score


def remote_code(
    directory: Path, family: str = "llama", bias: float | None = None, **settings: Any
) -> Score:
    """A network whose class lies in the directory, with a `value_head` on a plain body."""
    directory.mkdir()
    network = make_network(family)
    base = {"llama": "Llama", "bloom": "Bloom"}[family]
    head = f"nn.Linear(config.hidden_size, 1, bias={bias is not None})"
    code = REMOTE_CODE.format(base=base, prefix=network.base_model_prefix, head=head)
    (directory / "modeling_reward.py").write_text(code)
    weights = {
        key.replace("score.", "value_head."): weight.contiguous()
        for key, weight in network.state_dict().items()
    }
    if bias is not None:
        weights["value_head.bias"] = torch.tensor([bias])
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    name = f"modeling_reward.{base}RewardModel"
    defaults = {
        "architectures": [f"{base}RewardModel"],
        "auto_map": {"AutoModel": name, "AutoModelForSequenceClassification": name},
    }
    write_config(directory, network, **(defaults | settings))

    def score(row: list[int]) -> float:
        ids = torch.tensor([row])
        hidden = hidden_states(network, ids, torch.ones_like(ids))
        return (hidden[0, -1] @ network.score.weight[0].detach()).item() + (bias or 0.0)

    return score


def peft_adapter(directory: Path, base: Path, tokenizer: Any) -> Score:
    """What TRL's RewardTrainer saves under a LoRA configuration: adapter and trained head."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    network = make_network("llama")
    causal = AutoModelForCausalLM.from_config(network.config, dtype=torch.float32)
    causal.model.load_state_dict(network.model.state_dict())
    causal.save_pretrained(base)
    tokenizer.save_pretrained(base)
    body = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, dtype=torch.float32
    )
    config = LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"]
    )
    adapted = get_peft_model(body, config)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(directory)
    adapted.eval()

    def score(row: list[int]) -> float:
        with torch.inference_mode():
            return adapted(input_ids=torch.tensor([row])).logits.item()

    return score


def value_head(
    directory: Path, place: str = "file", neurons: tuple[int, ...] = (), **settings: Any
) -> Score:
    """TRL's `AutoModelForCausalLMWithValueHead`: `v_head.summary`, float32 over the last hidden
    states. "file": value_head.safetensors, as LLaMA-Factory writes it; "inside": with the model's
    weights, as TRL does. neurons: of GRM's layers before the last (its `vhead_num_neurons`)."""
    network = make_network("llama")
    causal = _causal(network)
    causal.save_pretrained(directory)
    write_config(directory, network, architectures=["LlamaForCausalLM"], **settings)
    layers, weights = _layers([network.config.hidden_size, *neurons, 1])
    named = {
        f"v_head.summary.{key}" if neurons else f"v_head.summary.{key.removeprefix('0.')}": weight
        for key, weight in weights.items()
    }
    if place == "file":
        save_file(named, directory / "value_head.safetensors")
    else:
        path = directory / "model.safetensors"
        save_file({**load_file(path), **named}, path, metadata={"format": "pt"})
    return _last(network, layers)


def value_head_adapter(directory: Path, base: Path, tokenizer: Any) -> Score:
    """A LoRA adapter of LLaMA-Factory's: for a causal model, with value_head.safetensors."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    network = make_network("llama")
    _causal(network).save_pretrained(base)
    tokenizer.save_pretrained(base)
    causal = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"])
    adapted = get_peft_model(causal, config)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(directory)
    layers, weights = _layers([network.config.hidden_size, 1])
    named = {f"v_head.summary.{key.removeprefix('0.')}": w for key, w in weights.items()}
    save_file(named, directory / "value_head.safetensors")

    def score(row: list[int]) -> float:
        with torch.inference_mode():
            output = adapted(input_ids=torch.tensor([row]), output_hidden_states=True)
            return layers(output.hidden_states[-1][0, -1].float()).item()

    return score


def layered(
    directory: Path,
    architecture: str,
    family: str = "qwen2",
    activation: type[nn.Module] = nn.ReLU,
    name: str = "score",
    **settings: Any,
) -> Score:
    """`score` of several layers with a ReLU between them (modeling_qwen2_rm.py of
    Qwen2.5-Math-RM-72B; the model card of INF-ORM-Llama3.1-70B)."""
    directory.mkdir()
    network = make_network(family)
    write_config(directory, network, architectures=[architecture], **settings)
    size = network.config.hidden_size
    layers, weights = _layers([size, size, 1], activation)
    body = {key: w for key, w in network.state_dict().items() if not key.startswith("score.")}
    named = {f"{name}.{key}": weight for key, weight in weights.items()}
    save_file({**body, **named}, directory / "model.safetensors", metadata={"format": "pt"})
    return _last(network, layers)


def layered_code(directory: Path) -> Score:
    """A network of its own code whose head has two layers with a GELU between them."""
    score = layered(
        directory,
        "LlamaRewardModel",
        "llama",
        activation=nn.GELU,
        name="value_head",
        auto_map={"AutoModelForSequenceClassification": "modeling_reward.LlamaRewardModel"},
    )
    size = "config.hidden_size"
    head = f"nn.Sequential(nn.Linear({size}, {size}), nn.GELU(), nn.Linear({size}, 1))"
    code = REMOTE_CODE.format(base="Llama", prefix="model", head=head)
    (directory / "modeling_reward.py").write_text(code)
    return score


def language_model(directory: Path, family: str = "llama", **settings: Any) -> Any:
    """A causal language model, whose logits are some system's rewards."""
    causal = _causal(make_network(family), **settings)
    causal.save_pretrained(directory)
    return causal.eval()


def _causal(network: PreTrainedModel, **settings: Any) -> Any:
    """A causal language model with the network's body and a head of its own."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(network.config)
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(3)
    causal = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    causal.model.load_state_dict(network.model.state_dict())
    causal.generation_config.pad_token_id = None
    return causal


def _layers(
    sizes: list[int], activation: type[nn.Module] = nn.ReLU
) -> tuple[nn.Sequential, dict[str, Tensor]]:
    """Linear layers with activations between them, and their weights: "0.weight", ..."""
    torch.manual_seed(2)
    parts = [
        part
        for inner, outer in pairwise(sizes)
        for part in (nn.Linear(inner, outer, dtype=torch.float32), activation())
    ]
    layers = nn.Sequential(*parts[:-1]).requires_grad_(False)
    return layers, {key: weight.contiguous() for key, weight in layers.state_dict().items()}


def _last(network: PreTrainedModel, layers: nn.Module) -> Score:
    def score(row: list[int]) -> float:
        ids = torch.tensor([row])
        hidden = hidden_states(network, ids, torch.ones_like(ids))
        return layers(hidden[0, -1])[0].item()

    return score


def scores(score: Score, rows: Iterable[list[int]] = ROWS) -> list[float]:
    return [score(row) for row in rows]
