"""Policies and reward models with random weights, and prompts for them, all from fixed seeds."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

from benchmarks.serving.model import Texts
from reward_actor.model.tokenizer import load_tokenizer
from trainer.init_model import init_model

_SEED = 29
_PROMPT_WORDS = (16, 48)

NETWORKS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
             "head_dim": 32, "intermediate_size": 64},
    "5m": {"hidden_size": 256, "num_layers": 6, "num_heads": 4, "num_kv_heads": 2,
           "head_dim": 64, "intermediate_size": 768},
    "20m": {"hidden_size": 512, "num_layers": 6, "num_heads": 8, "num_kv_heads": 4,
            "head_dim": 64, "intermediate_size": 1536},
    "80m": {"hidden_size": 768, "num_layers": 11, "num_heads": 12, "num_kv_heads": 4,
            "head_dim": 64, "intermediate_size": 2304},
}  # fmt: skip
"""Arguments of `init_model` by the number of parameters that they come to."""


def make_policy(network: str, directory: Path, seed: int = 0) -> str:
    """A directory; the tokenizer is the same for all."""
    return str(init_model(directory, Texts.drawn().corpus(), seed=seed, **NETWORKS[network]))


def make_reward_model(policy: str, directory: Path) -> str:
    """With the policy's tokenizer and chat template."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from reward_actor.export import export
    from reward_actor.model.inferred import contract_for

    torch.manual_seed(_SEED)
    network = AutoModelForSequenceClassification.from_pretrained(
        policy, num_labels=1, dtype=torch.float32
    )
    # An export is checked in bfloat16, too, which rounds too coarsely for rewards that spread by 1.
    std = 0.2 * network.config.hidden_size**-0.5
    torch.nn.init.normal_(network.score.weight, std=std)
    tokenizer = load_tokenizer(Path(policy))
    contract = contract_for(tokenizer, network.config, format="chat")
    weights = network.state_dict()
    export(directory, network.config, network, weights, tokenizer, contract, {}, "cpu")
    return str(directory)


def with_other_template(policy: str, directory: Path) -> str:
    """The same policy under a template that renders the same and is another to a scorer, so that
    its rollouts travel as text."""
    shutil.copytree(policy, directory)
    tokenizer = load_tokenizer(directory)
    tokenizer.chat_template = f"{{#- another -#}}{tokenizer.chat_template}"
    tokenizer.save_pretrained(directory)
    return str(directory)


def word_ids(policy: str, count: int) -> list[int]:
    """Tokens that are words with their space before them.

    A completion of these is what its text is encoded to, as a trained policy's mostly are: it can
    travel as token ids. Of a random policy's other completions hardly any could.
    """
    tokenizer = load_tokenizer(Path(policy))
    found = []
    for token in sorted(tokenizer.get_vocab().values()):
        text = str(tokenizer.decode([token]))
        is_word = text.startswith(" ") and text[1:].isalpha()
        if is_word and tokenizer.encode(text, add_special_tokens=False) == [token]:
            found.append(token)
    assert len(found) >= count
    return found[-count:]


def prompts(count: int) -> list[str]:
    source = random.Random(_SEED)
    texts = Texts.drawn()
    return [texts.text(source, source.randint(*_PROMPT_WORDS)) for _ in range(count)]
