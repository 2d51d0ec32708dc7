"""Tiny exports: random reward models in directories as the trainer writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reward_actor import RewardScorer

CORPUS = [
    "Name two fruits that grow on trees. An apple and a pear.",
    "How do I boil an egg? Put it into boiling water for seven minutes.",
    "Which tools belong in a kitchen? A knife, a spoon and a pan, please.",
    "def add(a, b):\n    return a + b\n",
    "Ünïcödé, 日本語 and ☀️ must survive the tokenizer.",
] * 8


def make_export(
    base: Path,
    directory: Path,
    *,
    seed: int = 0,
    format: str = "chat",
    heads: Sequence[str] = ("reward",),
    head_std: float = 0.5,
    **contract_fields: Any,
) -> Path:
    """An export of a random reward model on top of `base`, with these fields in its contract."""
    from dataclasses import replace

    import torch
    from transformers import AutoModelForSequenceClassification

    from reward_actor.export import export
    from reward_actor.model.inferred import contract_for
    from reward_actor.model.tokenizer import load_tokenizer

    torch.manual_seed(seed)
    network = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=len(heads), dtype=torch.float32
    )
    torch.nn.init.normal_(network.score.weight, std=head_std)
    tokenizer = load_tokenizer(base)
    contract = contract_for(tokenizer, network.config, format=format)
    contract = replace(contract, heads=list(heads), **contract_fields)
    state_dict = network.state_dict()
    export(directory, network.config, network, state_dict, tokenizer, contract, {}, "cpu")
    return directory


def from_pretrained(directory: Path, **options: Any) -> RewardScorer:
    from reward_actor import RewardScorer

    return RewardScorer.from_pretrained(directory, "cpu", **options)
