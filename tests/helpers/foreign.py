"""Reward models as other systems save them, made on the fly, each with its own system's formula.

Every maker writes a directory and returns what that system says of one row of token ids. The
formulas work on the body's hidden states and on padded batches, as their systems do, and share no
code with ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from families import make_network
from safetensors.torch import save_file
from torch import Tensor

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
        self.value_head = nn.Linear(config.hidden_size, 1, bias={bias})
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
    code = REMOTE_CODE.format(
        base=base, prefix=network.base_model_prefix, bias=str(bias is not None)
    )
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


def scores(score: Score, rows: Iterable[list[int]] = ROWS) -> list[float]:
    return [score(row) for row in rows]
