"""Tiny random reward models of every family that the scorer supports, for tests.

Every one has 3 layers, so that a sliding window and a full layer can alternate, and a vocabulary of
`VOCAB_SIZE`. Weights are drawn wide: attention that went wrong must show in the score.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from reward_actor.engine.engine import Attention, Engine
from reward_actor.model.reward_model import RewardModel

VOCAB_SIZE = 400
WINDOW = 8
"""Tokens that a sliding layer sees; short, so that tiny sequences reach past it."""

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]

_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _SIZES),
    "qwen2": ("qwen2", {k: v for k, v in _SIZES.items() if k != "head_dim"}),
    "qwen3": ("qwen3", _SIZES),
    "mistral": ("mistral", {**_SIZES, "sliding_window": WINDOW}),
    "gemma2": ("gemma2", {**_SIZES, "sliding_window": WINDOW, "query_pre_attn_scalar": 32}),
    "gemma3": (
        "gemma3_text",
        {
            **_SIZES,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 32,
            "layer_types": _LAYERS,
        },
    ),
    "phi3": ("phi3", {k: v for k, v in _SIZES.items() if k != "head_dim"}),
    "olmo2": ("olmo2", {k: v for k, v in _SIZES.items() if k != "head_dim"}),
    "qwen3_moe": ("qwen3_moe", {**_SIZES, **_MOE, "num_experts": 4}),
    "mixtral": ("mixtral", {**_SIZES, "num_experts_per_tok": 2, "num_local_experts": 4}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 3, "n_head": 2, "n_positions": 512}),
    "opt": (
        "opt",
        {
            "hidden_size": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "max_position_embeddings": 512,
            "word_embed_proj_dim": 64,
        },
    ),
    "bloom": ("bloom", {"hidden_size": 64, "n_layer": 3, "n_head": 2}),
    "gpt_neox": (
        "gpt_neox",
        {k: v for k, v in _SIZES.items() if k not in ("head_dim", "num_key_value_heads")},
    ),
}
FAMILIES = tuple(_SETTINGS)
# Not for every test: layers without rotary positions, and interleaved ones.
_SETTINGS["smollm3"] = ("smollm3", {**_SIZES, "num_hidden_layers": 4})
_SETTINGS["helium"] = ("helium", _SIZES)

# One of each kind: plain, with windows, with experts, learned positions, ALiBi.
_ONE_OF_A_KIND = ("llama", "gemma3", "qwen3_moe", "gpt2", "bloom")
SOME_FAMILIES = tuple(
    family if family in _ONE_OF_A_KIND else pytest.param(family, marks=pytest.mark.long)
    for family in FAMILIES
)
"""For `parametrize`: all of them in `make test-long`."""


def make_network(family: str, *, seed: int = 0, num_labels: int = 1, **more: Any) -> Any:
    """A `*ForSequenceClassification` in float32 and evaluation mode; `more` are config settings."""
    model_type, settings = _SETTINGS[family]
    config = AutoConfig.for_model(
        model_type,
        **{
            **settings,
            "vocab_size": VOCAB_SIZE,
            "num_labels": num_labels,
            "pad_token_id": 3,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "use_cache": False,
            **more,
        },
    )
    for name in list(vars(config)):
        if "drop" in name and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    torch.manual_seed(seed)
    network = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() > 1:
                fan_in = parameter.shape[-1]
                torch.nn.init.normal_(parameter, std=1.0 if "embed" in name else fan_in**-0.5)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


@cache
def engine(
    family: str, dtype: torch.dtype = torch.float32, attention: Attention = "auto"
) -> Engine:
    return Engine(RewardModel(make_network(family).to(dtype)).eval(), attention)


def transformers_own(model: RewardModel, sequences: list[list[int]]) -> np.ndarray:
    """(n,) scores of each sequence alone, by the network's own forward."""
    with torch.inference_mode():
        return np.array(
            [float(model.head(model.hidden_states(torch.tensor([s]))[0, -1])) for s in sequences]
        )


def groups(seed: int, num_groups: int = 3) -> list[list[int]]:
    """Groups under one system prompt, their prompts past the window and past what is joined."""
    generate = random.Random(seed)

    def some(low: int, high: int) -> list[int]:
        return [generate.randrange(VOCAB_SIZE) for _ in range(generate.randint(low, high))]

    system = some(2, 4)
    prompts = [system + some(3, 40) for _ in range(num_groups)]
    sequences = [prompt + some(1, 30) for prompt in prompts for _ in range(4)]
    sequences += [prompts[0], sequences[0], sequences[1] + some(1, 5), some(1, 1)]
    generate.shuffle(sequences)
    return sequences
