"""Texts to token ids without a download: a byte-level BPE that is trained on the texts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from benchmarks.common.shapes import Shape

FIRST_ID = 3
"""The ids below pad, begin and end texts."""

_VOCABULARY = 4096


def trained_tokenizer(texts: Iterable[str], shape: Shape) -> Tokenizer:
    """Of at most 4096 words, and no more than the shape has; the same for the same texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(_VOCABULARY, shape.vocab_size),
        special_tokens=[f"<|{i}|>" for i in range(FIRST_ID)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
