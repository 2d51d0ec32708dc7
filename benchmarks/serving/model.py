"""The model that every server of the serving benchmark loads, and texts that its tokenizer knows.

An export with random weights of a benchmark shape: ours, vLLM and transformers load it as it is.
Its contract is plain text without additions, so that all of them score the same ids of a text.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.common.shapes import Shape, build_network
from benchmarks.common.tokens import trained_tokenizer
from reward_actor.groups import Group

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from benchmarks.common.workloads import Range
    from reward_actor.contract import ScoringContract

_SEED = 23
_SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in ("a", "e", "i", "o", "u", "ai", "en")]
_NUM_WORDS = 3000
_CORPUS_TEXTS = 200
_CORPUS_WORDS = 400


@dataclass(frozen=True)
class Texts:
    """Texts of made-up words, as frequent as Zipf's law has it."""

    words: list[str]
    weights: list[float]

    @classmethod
    def drawn(cls) -> Texts:
        source = random.Random(_SEED)
        words: dict[str, None] = {}
        while len(words) < _NUM_WORDS:
            words["".join(source.choices(_SYLLABLES, k=source.randint(1, 4)))] = None
        return cls(list(words), [1 / rank for rank in range(1, _NUM_WORDS + 1)])

    def text(self, source: random.Random, num_words: int) -> str:
        return " ".join(source.choices(self.words, self.weights, k=num_words))

    def corpus(self) -> list[str]:
        source = random.Random(_SEED)
        return [self.text(source, _CORPUS_WORDS) for _ in range(_CORPUS_TEXTS)]


def make_tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """A byte-level BPE without special tokens around a text; id 0 pads, 1 begins, 2 ends."""
    from transformers import PreTrainedTokenizerFast

    pad, begin, end = (f"<|{i}|>" for i in range(3))
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=trained_tokenizer(Texts.drawn().corpus(), shape),
        pad_token=pad,
        bos_token=begin,
        eos_token=end,
        model_max_length=shape.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    return tokenizer


def make_contract(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> ScoringContract:
    """Text as it comes; no golden samples yet."""
    from transformers import AutoConfig

    from reward_actor.model.inferred import contract_for

    config = AutoConfig.for_model(shape.model_type, **shape.config_settings())
    return contract_for(tokenizer, config, format="text", append_eos=False)


def save_model(shape: Shape, directory: Path) -> None:
    """Export a reward model of this shape, float32, with golden samples in every dtype."""
    import torch

    from reward_actor.export import export

    network = build_network(shape, torch.float32, "cpu")
    tokenizer = make_tokenizer(shape)
    contract = make_contract(shape, tokenizer)
    weights = network.state_dict()
    export(directory, network.config, network, weights, tokenizer, contract, {}, "cpu")


def text_groups(
    tokenizer: PreTrainedTokenizerFast,
    num_groups: int,
    group_size: int,
    prompt_tokens: Range,
    completion_tokens: Range,
    name: str,
) -> list[Group]:
    """Groups of texts of about as many tokens; a prompt ends its line."""
    source = random.Random(f"{_SEED}-{name}")
    texts = Texts.drawn()
    sample = texts.corpus()[0]
    words_per_token = len(sample.split()) / len(tokenizer(sample)["input_ids"])

    def text(tokens: Range) -> str:
        return texts.text(source, max(1, round(tokens.draw(source) * words_per_token)))

    return [
        Group(text(prompt_tokens) + "\n", [text(completion_tokens) for _ in range(group_size)])
        for _ in range(num_groups)
    ]
